# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vtjax.data import sources
from vtjax.data.sources import open_source
from vtjax.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
TAR = SHARED / "nips17_224.tar"


@pytest.fixture(scope="module")
def digits_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and nothing of this machine on the search path."""
    monkeypatch.setenv("VTJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VTJAX_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "cache"


def refused(*args: object, **options: object) -> str:
    """The message of the InputError, which must be one line."""
    with pytest.raises(InputError) as caught:
        source = open_source(*args, **options)  # type: ignore[arg-type]
        [source[i] for i in range(len(source))]
    message = str(caught.value)
    assert "\n" not in message
    return message


def png(colour: tuple[int, int, int] = (1, 2, 3), size: tuple[int, int] = (12, 10)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return data.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def pack(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


# --- digits: our own TFDS builder


def test_digits_equal_scikit_learn(digits_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from sklearn import datasets

    monkeypatch.setenv("VTJAX_CACHE", str(digits_cache))
    digits = datasets.load_digits()
    test = np.arange(len(digits.target)) % 5 == 0
    for split, rows in [("train", np.flatnonzero(~test)), ("test", np.flatnonzero(test))]:
        source = open_source("digits", split)
        assert len(source) == len(rows) and source.classes == 10 and source.cropped
        images = np.stack([source[i]["image"] for i in range(len(source))])
        expected = np.floor(digits.images[rows] * 255 / 16 + 0.5)
        np.testing.assert_array_equal(images, np.repeat(expected[..., None], 3, -1))
        assert [source[i]["label"] for i in range(len(source))] == digits.target[rows].tolist()
        assert source[3]["id"] == f"{rows[3]:04d}"
    assert images.max() == 255 and images.dtype == np.uint8
    assert capsys.readouterr().out == ""  # standard output belongs to the commands
    assert "tensorflow" not in sys.modules
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[7]["image"], source[7]["image"])


def child(code: str, cache: Path) -> subprocess.Popen:
    env = {**os.environ, "VTJAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)


OPEN = "from vtjax.data.sources import open_source\nprint(len(open_source('digits', 'train')), flush=True)"
PAUSES = {
    "while examples are written": """
import os
from PIL import Image
save, calls = Image.Image.save, []
def pause(*args, **options):
    calls.append(1)
    if len(calls) == 1000: os.write(1, b'now\\n'); time.sleep(120)  # sys.stdout is redirected here
    save(*args, **options)
Image.Image.save = pause
""",
    "before the rename": """
import os
from vtjax.data import prepared
rename = os.rename
def pause(a, b):
    if os.fspath(b).endswith('tfds/digits/1.0.0') and '.partial' not in os.fspath(b):
        print('now', flush=True); time.sleep(120)
    rename(a, b)
prepared.os.rename = pause
""",
}


@pytest.mark.parametrize("moment", PAUSES)
def test_sigkill_during_preparation_leaves_nothing_complete(moment: str, cache: Path) -> None:
    killed = child(f"import time\n{PAUSES[moment]}\n{OPEN}", cache)
    assert killed.stdout is not None and killed.stdout.readline() == "now\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (cache / "tfds" / "digits" / "1.0.0").exists()
    (left,) = (cache / "tfds").glob(".partial-*")
    os.utime(left, (0, 0))
    assert len(open_source("digits", "train")) == 1437
    assert [p.name for p in (cache / "tfds").iterdir()] == ["digits"]  # what the killed process left is gone


def test_two_processes_prepare_at_once(cache: Path) -> None:
    together = (
        "import os, time\nfrom vtjax.data import prepared, sources\nfrom pathlib import Path\n"
        f"Path({str(cache)!r}).mkdir(exist_ok=True)\nopen(Path({str(cache)!r}) / str(os.getpid()), 'w').close()\n"
        f"while len(os.listdir({str(cache)!r})) < 2: time.sleep(0.01)\n"
    )
    pair = [child(together + OPEN, cache) for _ in range(2)]
    assert [p.communicate(timeout=60)[0] for p in pair] == ["1437\n"] * 2
    assert [p.returncode for p in pair] == [0, 0]
    assert [p.name for p in (cache / "tfds").iterdir()] == ["digits"]


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VTJAX_CACHE", str(tmp_path / "file"))
    assert "must be writable (VTJAX_CACHE moves it)" in refused("digits", "train")


# --- splits and slices


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("test[:4]", [0, 1, 2, 3]),
        ("test[-3:]", [7, 8, 9]),
        ("test[50%:]", [5, 6, 7, 8, 9]),
        ("test[:-80%]", [0, 1]),
        ("test[25%:75%]", [2, 3, 4, 5, 6, 7]),
        ("test[8:99]", [8, 9]),
        ("test[:]", list(range(10))),
    ],
)
def test_slices(split: str, expected: list[int]) -> None:
    source = open_source("procedural", split, n=10)
    assert [source[i]["id"] for i in range(len(source))] == [f"procedural/test/{i}" for i in expected]


def test_percentages_cut_a_split_without_gap_or_overlap() -> None:
    for n in range(11, 40):
        for percent in range(10, 100, 7):
            parts = [open_source("procedural", s, n=n) for s in (f"train[:{percent}%]", f"train[{percent}%:]")]
            ids = [part[i]["id"] for part in parts for i in (0, len(part) - 1)]
            assert ids[0] == "procedural/train/0" and ids[3] == f"procedural/train/{n - 1}"
            assert int(ids[1].split("/")[2]) + 1 == int(ids[2].split("/")[2])


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("tset", "data 'procedural' has no split 'tset', expected train, test; did you mean 'test'?"),
        ("test[4:4]", "split 'test[4:4]' of data 'procedural' is empty"),
        ("test[a:]", "must be NAME or NAME[FROM:TO], such as train[:90%], found 'test[a:]'"),
        ("test[3]", "must be NAME or NAME[FROM:TO]"),
        ("", "must be NAME or NAME[FROM:TO]"),
        ("test[%:]", "must hold integers or percentages, found '%'"),
    ],
)
def test_bad_splits(split: str, message: str) -> None:
    assert message in refused("procedural", split, n=10)


def test_bad_options() -> None:
    assert refused("procedural", "train", clases=3) == (
        "data 'procedural' has no option 'clases', expected n, image_size, classes, seed; did you mean 'classes'?"
    )
    assert "n=0" in refused("procedural", "train", n=0)
    assert "needs the option path" in refused("folder", "train")


# --- procedural


def test_procedural_images_show_their_class_where_they_say() -> None:
    source = sources.Procedural("train", 60, (24, 32), 6, seed=1)
    colours: dict[int, set[tuple[int, ...]]] = {}
    for i in range(60):
        example = source[i]
        top, left, side = source.salient(i)
        image = example["image"].astype(int)
        square = image[top : top + side, left : left + side]
        assert image.shape == (24, 32, 3) and side == 6 and square.shape == (6, 6, 3)
        assert (square == square[0, 0]).all()
        grey = image.copy()
        grey[top : top + side, left : left + side] = 128
        assert (grey == grey[..., :1]).all() and grey.min() >= 96 and grey.max() < 160
        colours.setdefault(example["label"], set()).add(tuple(square[0, 0]))
    assert sorted(colours) == list(range(6)) and all(len(c) == 1 for c in colours.values())
    assert len(set().union(*colours.values())) == 6
    assert len({source.salient(i) for i in range(60)}) > 10


def test_procedural_depends_on_seed_and_split_only() -> None:
    def image(split: str, seed: int) -> bytes:
        return open_source("procedural", split, seed=seed)[5]["image"].tobytes()

    assert image("train", 0) == image("train", 0)
    assert len({image("train", 0), image("train", 1), image("test", 0)}) == 3
    tiny = open_source("procedural", "train", n=3, image_size=(1, 1), classes=1)
    assert tiny[2]["image"].shape == (1, 1, 3)


# --- folders and tars


CLASSES = {"train/cat/a.png": png(), "train/dog/b.png": png(), "val/cat/c.png": png(), "val/emu/d.png": png()}


@pytest.mark.parametrize("tar", [False, True])
def test_class_folders_in_splits(tar: bool, tmp_path: Path) -> None:
    files = {**CLASSES, "README.txt": b"", ".hidden/x/y.png": b"", "train/cat/._a.png": b""}
    path = pack(tmp_path / "x.tar", files) if tar else write(tmp_path / "x", files)
    train, val = (open_source("folder", s, path=str(path)) for s in ("train", "val"))
    assert train.classes == val.classes == 3  # over all splits, so that labels mean the same
    assert [(e["id"], e["label"]) for e in (val[0], val[1])] == [("val/cat/c.png", 0), ("val/emu/d.png", 2)]
    assert val[0]["image"].shape == (10, 12, 3) and (val[0]["image"] == (1, 2, 3)).all() and not val.cropped
    assert "expected train, val" in refused("folder", "test", path=str(path))
    copy = pickle.loads(pickle.dumps(train))
    assert copy[1]["id"] == "train/dog/b.png"


def test_class_folders_without_splits_are_halved(tmp_path: Path) -> None:
    path = write(tmp_path, {f"{c}/{i}.png": png() for c in "ab" for i in range(3)})
    ids = {
        s: [source[i]["id"] for i in range(len(source))]
        for s in ("all", "calibration", "evaluation")
        for source in [open_source("folder", s, path=str(path))]
    }
    assert ids["all"] == ["a/0.png", "a/1.png", "a/2.png", "b/0.png", "b/1.png", "b/2.png"]
    assert (ids["calibration"], ids["evaluation"]) == (ids["all"][::2], ids["all"][1::2])


@pytest.mark.parametrize(
    ("table", "labels", "classes"),
    [
        ("file,label\na.png,0\nb.png,2\n", [0, 2], 3),
        ("x,Image,Class\n1,b,zebra\n2,a,ape\n\n", [0, 1], 2),
        ("\ufefffilename,label\nb.png,7\na.png,3\n", [3, 7], 8),
    ],
)
def test_images_with_a_csv(table: str, labels: list[int], classes: int, tmp_path: Path) -> None:
    path = write(tmp_path, {"a.png": png(), "b.png": png(), "labels.csv": table.encode()})
    source = open_source("folder", "all", path=str(path))
    assert [source[i]["label"] for i in range(2)] == labels and source.classes == classes


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"a.txt": b""}, {}, "must hold images (.jpg, .jpeg, .png, .webp, .bmp, .gif, .ppm, .tif, .tiff), found none"),
        ({"a.png": png()}, {}, "found a.png"),
        ({"a/b.png": png(), "c.png": png()}, {}, "found c.png"),
        ({"a/b.png": png(), "x/a/b.png": png()}, {}, "one of them throughout"),
        ({"a/b.png": png()}, {"classes": 3}, "must hold 3 classes, found 1 class folders"),
        ({"a.png": png(), "l.csv": b"file,label\n"}, {}, "a.png|has no row of its own in l.csv"),
        ({"a.png": png(), "l.csv": b""}, {}, "l.csv|lacks the column one of file"),
        ({"a.png": png(), "l.csv": b"file,labl\na,1\n"}, {"label_column": "label"}, "did you mean 'labl'?"),
        ({"a.png": png(), "l.csv": b"file,label\na.png,\n"}, {}, "row 2 of"),
        ({"a.png": png(), "l.csv": b"file,label\na.png\n"}, {}, "has no label, found 'a.png'"),
        ({"a.png": png(), "l.csv": b"file,label\na.png,1\nb.png,1\n"}, {}, "names 1 images that are not there"),
        ({"a.png": png(), "l.csv": b"file,label\na.png,1\na.png,2\n"}, {}, "names 'a.png' twice"),
        ({"a.png": png(), "l.csv": b"file,label\na.png,0\n"}, {"label_offset": -1}, "with label_offset=-1, found '0'"),
        ({"a.png": png(), "l.csv": b"file,label\na.png,5\n"}, {"classes": 5}, "must be in 0..4, found '5'"),
        ({"a.png": png(), "l.csv": b"\xff\xfe\x00"}, {}, "must be a csv file in UTF-8"),
        ({"a.png": png(), "l.csv": b"", "m.csv": b""}, {}, "several csv files (l.csv, m.csv)"),
        ({"a.png": png(), "l.csv": b""}, {"csv": "k.csv"}, "has no csv file 'k.csv', found l.csv"),
        ({"a/good.png": png(), "a/bad.png": png()[:45]}, {}, "bad.png|cannot be decoded (45 bytes)"),
        ({"a/bad.png": b"no image at all"}, {}, "bad.png|cannot be decoded (15 bytes): no image format recognised"),
        ({"a/bad.png": b""}, {}, "bad.png|cannot be decoded (0 bytes)"),
    ],
)
def test_bad_folders_name_the_file(files: dict[str, bytes], options: dict, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "folder", files)
    found = refused("folder", "all", path=str(folder), **options)
    assert all(part in found for part in message.split("|")), found
    tar = pack(tmp_path / "x.tar", files)
    found = refused("folder", "all", path=str(tar), **options)
    assert all(part in found for part in [*message.split("|"), "x.tar"]), found


def test_bad_tars(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "no.tar").write_bytes(b"not a tar" * 200)
    pack(tmp_path / "x.tar.gz", CLASSES, "w:gz")
    whole = pack(tmp_path / "cut.tar", {f"a/{i}.png": png() * 50 for i in range(20)})
    whole.write_bytes(whole.read_bytes()[:20000])
    for name in ("no.tar", "x.tar.gz", "cut.tar"):
        message = refused("folder", "all", path=str(tmp_path / name))
        assert name in message and ("uncompressed tar" in message or "cannot be decoded" in message)
    assert "'nowhere' was not found in" in refused("folder", "all", path="nowhere")


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, {"a/x.png": png()})
    source = open_source("folder", "all", path=str(path))
    (tmp_path / "a" / "x.png").unlink()
    with pytest.raises(InputError, match=r"x\.png cannot be read: No such file"):
        source[0]


def test_grey_palette_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for mode in ("L", "P", "RGBA", "CMYK"):
        Image.new("RGB", (4, 4), (200, 200, 200)).convert(mode).save(tmp_path / "a" / f"{mode}.tif")
    source = open_source("folder", "all", path=str(tmp_path))
    for i in range(4):
        image = source[i]["image"]
        assert image.shape == (4, 4, 3) and image.dtype == np.uint8
        assert np.abs(image.astype(int) - 200).max() <= 4  # the palette is coarse


# --- photographs


@pytest.mark.skipif(not TAR.exists(), reason="../shared/data/nips17_224.tar is missing")
def test_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTJAX_DATA", str(SHARED))
    everything = open_source("nips17", "all")
    halves = [open_source("nips17", s) for s in ("calibration", "evaluation")]
    assert (len(everything), *map(len, halves)) == (1000, 500, 500)
    assert everything.classes == 1000 and everything.cropped
    with tarfile.open(TAR) as tar:
        names = sorted(n for n in tar.getnames() if n.endswith(".jpg"))
        rows = tar.extractfile("images.csv").read().decode().splitlines()  # type: ignore[union-attr]
        for i in (0, 1, 499, 999):
            example, name = everything[i], names[i]
            (row,) = [r for r in rows if r.startswith(name[:-4] + ",")]
            assert example["id"] == name
            assert example["label"] == int(next(csv.reader([row]))[6]) - 1
            np.testing.assert_array_equal(example["image"], np.asarray(Image.open(tar.extractfile(name))))  # type: ignore[arg-type]
            half = halves[i % 2][i // 2]
            assert half["id"] == name and half["image"].shape == (224, 224, 3)


def test_photographs_that_are_missing(cache: Path) -> None:
    message = refused("nips17", "all")
    assert message.startswith("'nips17_224.tar' was not found in") and "VTJAX_DATA" in message


# --- stock TFDS sets


def make_stock(root: Path, name: str = "fashion_mnist", version: str = "3.0.1", label: bool = True) -> Path:
    """A prepared set as `tfds build` leaves it: grey images of one size."""
    import tensorflow_datasets as tfds

    class Stock(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        def _info(self):
            features = {"image": tfds.features.Image(shape=(28, 28, 1))}
            if label:
                features["label"] = tfds.features.ClassLabel(num_classes=4)
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(8), "test": self._generate_examples(5)}

        def _generate_examples(self, n):
            for i in range(n):
                data = io.BytesIO()
                Image.new("L", (28, 28), 10 * i).save(data, "PNG")
                data.seek(0)
                yield i, {"image": data, **({"label": i % 4} if label else {})}

    Stock.name = name
    builder = Stock(data_dir=str(root), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_path)


@pytest.mark.parametrize("where", ["cache/tfds", "data", "data/tfds", "tfds", "elsewhere"])
def test_a_prepared_stock_set_is_found(where: str, cache: Path) -> None:
    make_stock(cache.parent / where)
    options = {"path": str(cache.parent / where)} if where == "elsewhere" else {}
    source = open_source("fashion_mnist", "test[1:]", **options)
    assert len(source) == 4 and source.classes == 4 and source.cropped
    assert source[2]["label"] == 3 and (source[2]["image"] == 30).all() and source[2]["image"].shape == (28, 28, 3)
    assert "expected train, test" in refused("fashion_mnist", "validation", **options)


def test_versions_and_formats_of_a_stock_set(cache: Path) -> None:
    root = cache / "tfds"
    for version in ("3.0.2", "3.0.10"):
        make_stock(root, version=version)
    source = open_source("fashion_mnist", "train")
    assert "3.0.10" in source.folder  # type: ignore[attr-defined]
    assert "3.0.2/" in open_source("fashion_mnist:3.0.2", "train").folder + "/"  # type: ignore[attr-defined]
    assert "has no version 1.0.0, found 3.0.2, 3.0.10" in refused("fashion_mnist:1.0.0", "train")

    info = root / "fashion_mnist" / "3.0.10" / "dataset_info.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "fileFormat": "tfrecord"}))
    from vtjax.data import prepared

    prepared._builder.cache_clear()
    message = refused("fashion_mnist", "train")
    assert "must have file_format=array_record, found tfrecord" in message and "tfds convert_format" in message
    info.write_text("{")
    prepared._builder.cache_clear()
    assert "3.0.10 cannot be read" in refused("fashion_mnist", "train")


def test_a_set_without_labels(cache: Path) -> None:
    make_stock(cache / "tfds", label=False)
    assert "must have an image and a class label, found image" in refused("fashion_mnist", "train")


def test_a_stock_set_that_is_not_prepared(cache: Path) -> None:
    message = refused("imagenet2012", "train")
    assert message.startswith("data 'imagenet2012' is not prepared in")
    roots = (cache / "tfds", cache.parent / "data", cache.parent / "tfds")
    for part in (*map(str, roots), "pip install 'vtjax[tf]'"):
        assert part in message
    assert "tfds build imagenet2012 --file_format=array_record" in message and "ILSVRC2012_img_val.tar" in message


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("digist", "digits"), ("imagenet2021", "imagenet2012"), ("nips_17", "nips17"), ("qqqq", "")],
)
def test_unknown_names(name: str, suggestion: str, cache: Path) -> None:
    message = refused(name, "train")
    assert message.startswith(f"unknown data {name!r}, expected one of digits, nips17, folder, procedural")
    assert (f"did you mean {suggestion!r}?" in message) if suggestion else ("did you mean" not in message)
    assert len(message) < 600


def test_a_name_that_is_no_name(cache: Path) -> None:
    assert "found '../digits'" in refused("../digits", "train")


# --- cache in memory


def test_small_sets_stay_in_memory_and_do_not_travel() -> None:
    class Counting(sources.Procedural):
        reads = 0

        def __getitem__(self, index: int) -> sources.Example:
            Counting.reads += 1
            return super().__getitem__(index)

    source = sources.cached(Counting("train", 4, (8, 8), 2, 0))
    assert isinstance(source, sources.Cached)
    first = [source[i]["image"] for i in range(4)]
    before = Counting.reads
    assert all(source[i]["image"] is first[i] for i in range(4)) and Counting.reads == before
    plain = sources.Procedural("train", 4, (64, 64), 2, 0)
    full = sources.Cached(plain)
    [full[i] for i in range(4)]
    assert len(pickle.dumps(full)) < 5000 and len(pickle.loads(pickle.dumps(full))) == 4
    large = sources.Procedural("train", 10**6, (64, 64), 2, 0)
    assert sources.cached(large) is large
    assert sources.cached(plain, cache=False) is plain
