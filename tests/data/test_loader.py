# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from vtjax import data
from vtjax.data import sources, transforms
from vtjax.data.augment import Augment
from vtjax.data.loader import Batch, ImageData, from_config
from vtjax.errors import InputError
from vtjax.spec import Preprocess

ROOT = Path(__file__).resolve().parents[2]
TAR = ROOT.parent / "shared" / "data" / "nips17_224.tar"
EVERYTHING = Augment(
    "crop", flip=0.5, crop_scale=(0.3, 1.0), jitter=0.4, hue=0.1, randaugment=(2, 9), erase=0.3, mixup=0.8, cutmix=1.0
)

EVERYTHING_ALONE = dataclasses.replace(EVERYTHING, mixup=0.0, cutmix=0.0)


def procedural(n: int, split: str = "train", size: tuple[int, int] = (12, 10)) -> sources.Procedural:
    return sources.Procedural(split, n, size, 3, 0)


def make(n: int = 37, n_eval: int = 11, **options: Any) -> ImageData:
    defaults = {"seed": 3, "batch_size": 8, "image_size": (8, 8), "prefetch": 0}
    return ImageData(procedural(n), procedural(n_eval, "test"), **{**defaults, **options})


def share(index: int, count: int, batch_size: int = 8) -> range:
    """The rows of one of `count` processes, each with a part of its own."""
    rows = batch_size // count
    return range(index * rows, (index + 1) * rows)


def take(batches: Iterable[Batch], n: int) -> list[Batch]:
    return list(itertools.islice(batches, n))


def assert_equal(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for k in x:
            assert x[k].dtype == y[k].dtype
            np.testing.assert_array_equal(x[k], y[k], err_msg=k)


def joined(parts: list[list[Batch]]) -> list[Batch]:
    """The global batches from those of all processes."""
    return [{k: np.concatenate([p[k] for p in step]) for k in step[0]} for step in zip(*parts, strict=True)]


# --- training batches


def test_what_a_batch_holds() -> None:
    (batch,) = take(make(augment=EVERYTHING).train(0), 1)
    kinds = {k: (v.shape, v.dtype.name) for k, v in batch.items()}
    assert kinds == {
        "image": ((8, 8, 8, 3), "float32"),
        "label": ((8,), "int32"),
        "valid": ((8,), "bool"),
        "index": ((8,), "int64"),
        "label2": ((8,), "int32"),
        "lam": ((8,), "float32"),
    }
    assert batch["valid"].all() and type(batch["image"]) is np.ndarray
    assert set(take(make().train(0), 1)[0]) == {"image", "label", "valid", "index"}


@pytest.mark.parametrize("augment", [Augment(), EVERYTHING], ids=["plain", "everything"])
def test_a_step_is_the_same_wherever_the_stream_starts(augment: Augment) -> None:
    straight = take(make(augment=augment).train(0), 12)
    for start in (0, 1, 4, 5, 11):
        assert_equal(take(make(augment=augment).train(start), 12 - start), straight[start:])
    (late,) = take(make(augment=augment).train(10**9), 1)  # far along, at once
    assert late["valid"].all()


@pytest.mark.parametrize("augment", [Augment(), EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("count", [2, 4])
def test_the_global_batch_is_the_same_for_every_process_count(augment: Augment, count: int) -> None:
    whole = take(make(augment=augment).train(2), 7)
    parts = [take(make(augment=augment, rows=share(i, count)).train(2), 7) for i in range(count)]
    assert {len(b["label"]) for p in parts for b in p} == {8 // count}
    assert_equal(joined(parts), whole)


def test_workers_threads_and_caches_change_nothing() -> None:
    straight = take(make(augment=EVERYTHING).train(5), 9)
    assert_equal(take(make(augment=EVERYTHING, prefetch=3).train(5), 9), straight)
    assert_equal(take(make(augment=EVERYTHING, cache=False).train(5), 9), straight)
    batches = make(augment=EVERYTHING, workers=2, prefetch=1).train(5)
    with_workers = take(batches, 9)
    assert_equal(with_workers, straight)
    assert {type(v) for b in with_workers for v in b.values()} == {np.ndarray}  # owned, not shared memory
    batches.close()  # type: ignore[attr-defined]


def test_every_epoch_is_a_new_order_of_everything() -> None:
    n = 37
    index = np.concatenate([b["index"] for b in take(make(n).train(0), 37)])  # 8 epochs
    epochs = index.reshape(8, n)
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    assert len({tuple(e) for e in epochs}) == 8
    assert np.mean(epochs[0] == epochs[1]) < 0.3
    labels = np.concatenate([b["label"] for b in take(make(n).train(0), 37)])
    np.testing.assert_array_equal(labels, index % 3)


def test_the_order_is_fair() -> None:
    """Over many epochs each example is in each tenth of the epoch equally often (chi-square, 81 degrees of freedom)."""
    n, epochs = 10, 600
    index = np.concatenate([b["index"] for b in take(make(n, batch_size=1000).train(0), n * epochs // 1000)])
    counts = np.zeros((n, n))
    np.add.at(counts, (np.tile(np.arange(n), epochs), index), 1)
    assert ((counts - epochs / n) ** 2 / (epochs / n)).sum() < 140  # p < 1e-4 beyond


def test_the_order_of_this_release() -> None:
    """Whoever changes the order, numpy included, breaks the resuming of runs and must notice."""
    first, second = take(make(10**6, cache=False).train(0), 2)
    assert first["index"].tolist() == [199324, 558177, 725969, 424404, 359130, 933493, 753958, 333164]
    assert second["index"].tolist() == [883577, 2334, 54883, 745570, 924231, 954749, 801916, 482904]
    drawn = make(10**6, cache=False).draw("train", 0)
    assert drawn["index"].tolist() == [4785, 615500, 189606, 719183, 798749, 56883, 65655, 244044]


@pytest.mark.parametrize(("repeats", "batch_size"), [(3, 12), (3, 8), (4, 8), (5, 4)])
def test_repeats_show_every_image_several_times_and_differently(repeats: int, batch_size: int) -> None:
    """Over `repeats` epochs' worth of examples: each image as often, in rows that do not meet, with other pixels."""
    n, options = 24, {"augment": EVERYTHING_ALONE, "repeats": repeats, "batch_size": batch_size}
    steps = n * repeats // batch_size
    batches = take(make(n, **options).train(0), steps)
    index = np.concatenate([b["index"] for b in batches])
    assert np.bincount(index).tolist() == [repeats] * n
    images = np.concatenate([b["image"] for b in batches])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)
    for batch in batches:
        rows = batch["index"].reshape(-1, 2)
        assert batch_size < repeats or (rows[:, 0] != rows[:, 1]).all()  # what mixup pairs
        if batch_size % repeats == 0:
            assert set(np.bincount(batch["index"])) == {0, repeats} or n * repeats == batch_size
    once = np.concatenate([b["index"] for b in take(make(n, batch_size=n).train(0), 1)])
    assert sorted(set(batches[0]["index"]), key=list(once).index) == list(once[: -(-batch_size // repeats)])
    parts = [take(make(n, rows=share(i, 2, batch_size), **options).train(1), steps - 1) for i in range(2)]
    assert_equal(joined(parts), batches[1:])


def test_a_batch_larger_than_the_split_goes_through_several_epochs() -> None:
    (batch,) = take(make(3, batch_size=8).train(0), 1)
    assert batch["valid"].all()
    assert sorted(batch["index"][:3]) == sorted(batch["index"][3:6]) == [0, 1, 2]


def test_seeds_give_other_orders_and_other_augmentation() -> None:
    first, second = (take(make(augment=Augment("crop"), seed=s).train(0), 1)[0] for s in (0, 1))
    assert (first["index"] != second["index"]).any()
    a, b = (take(make(1, augment=Augment("crop"), seed=s, batch_size=2).train(0), 1)[0]["image"] for s in (0, 1))
    assert (a != b).any() and (a[0] != a[1]).any()  # the same example twice in a batch: two crops


def test_augmentation_changes_from_epoch_to_epoch() -> None:
    a, b = take(make(8, augment=Augment("crop", crop_scale=(0.2, 0.5))).train(0), 2)
    for i in range(8):
        assert (a["image"][a["index"] == i] != b["image"][b["index"] == i]).any()


def test_mixing_pairs_neighbours() -> None:
    plain, mixed = (take(make(augment=Augment(mixup=m)).train(0), 3) for m in (0.0, 0.8))
    lams = set()
    for a, b in zip(plain, mixed, strict=True):
        partner = np.arange(8) ^ 1
        lam = b["lam"][:, None, None, None]
        np.testing.assert_array_equal(b["label2"], a["label"][partner])
        np.testing.assert_array_equal(b["label"], a["label"])
        np.testing.assert_allclose(b["image"], lam * a["image"] + (1 - lam) * a["image"][partner], atol=1e-6)
        lams.update(b["lam"].tolist())
    assert len(lams) == 3  # one for each batch


# --- evaluation batches


@pytest.mark.parametrize("count", [1, 2, 4])
def test_evaluation_covers_everything_once(count: int) -> None:
    for n, batch_size in itertools.product([1, 2, 7, 8, 9, 16, 33], [4, 8, 12, 64]):
        parts = [list(make(5, n, batch_size=batch_size, rows=share(i, count, batch_size)).eval()) for i in range(count)]
        assert {len(p) for p in parts} == {-(-n // batch_size)}
        for batch in joined(parts):
            assert batch["image"].shape == (batch_size, 8, 8, 3)
            np.testing.assert_array_equal(batch["valid"], batch["index"] >= 0)
            assert not batch["image"][~batch["valid"]].any() and not batch["label"][~batch["valid"]].any()
        seen = np.concatenate([b["index"][b["valid"]] for b in joined(parts)])
        np.testing.assert_array_equal(seen, np.arange(n))


def test_evaluation_is_timms_transform_of_the_split() -> None:
    source = procedural(11, "test", (40, 50))
    source.cropped = False
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    loader = ImageData(
        None, source, seed=0, batch_size=4, image_size=(16, 16), crop=0.9, interpolation="bilinear", mean=mean, std=std
    )
    batches = list(loader.eval())
    for i in range(11):
        row = batches[i // 4]
        expected = transforms.evaluate(source[i]["image"], (16, 16), 0.9, "bilinear")
        np.testing.assert_array_equal(row["image"][i % 4], transforms.normalise(expected[None], mean, std)[0])
        assert row["label"][i % 4] == source[i]["label"]


def test_cropped_sources_are_not_cropped_again() -> None:
    source = procedural(2, size=(16, 16))
    (batch,) = ImageData(None, source, seed=0, batch_size=2, image_size=(16, 16), crop=0.5).eval()
    np.testing.assert_array_equal(np.rint((batch["image"][1] * 0.5 + 0.5) * 255), source[1]["image"])
    (batch,) = ImageData(None, source, seed=0, batch_size=2, image_size=(32, 32), crop=0.5).eval()
    expected = transforms.evaluate(source[1]["image"], (32, 32), 1.0)
    np.testing.assert_array_equal(np.rint((batch["image"][1] * 0.5 + 0.5) * 255), expected)


def test_evaluation_of_the_training_split_is_not_augmented() -> None:
    loaders = [make(augment=a) for a in (Augment(), EVERYTHING)]
    assert_equal(*(list(x.eval("train")) for x in loaders))
    assert sum(b["valid"].sum() for b in loaders[1].eval("train")) == 37


# --- draws


@pytest.mark.parametrize("split", ["train", "eval"])
def test_draws_are_pure_and_disjoint_within_an_epoch(split: str) -> None:
    size = {"train": 37, "eval": 11}[split]
    loader = make()
    per_epoch = size // 8
    draws = [loader.draw(split, i) for i in range(6 * per_epoch)]
    assert_equal([make(augment=EVERYTHING).draw(split, i) for i in range(5, -1, -1)], draws[5::-1])
    index = np.array([d["index"] for d in draws]).reshape(6, per_epoch * 8)
    assert all(len(set(epoch)) == len(epoch) and epoch.max() < size for epoch in index)
    assert len({tuple(e) for e in index}) == 6 and all(d["valid"].all() for d in draws)
    parts = [[make(rows=share(p, 4)).draw(split, i) for i in range(3)] for p in range(4)]
    assert_equal(joined(parts), draws[:3])
    by_index = {int(i): image for b in loader.eval(split) for i, image in zip(b["index"], b["image"], strict=True)}
    for i, image in zip(draws[0]["index"], draws[0]["image"], strict=True):
        np.testing.assert_array_equal(image, by_index[int(i)])


def test_draws_are_independent_of_the_training_order() -> None:
    loader = make()
    assert (take(loader.train(0), 1)[0]["index"] != loader.draw("train", 0)["index"]).any()


def test_a_draw_from_a_split_smaller_than_a_batch_is_padded() -> None:
    draws = [make(5).draw("train", i) for i in range(20)]
    assert all(sorted(d["index"]) == [-1, -1, -1, 0, 1, 2, 3, 4] for d in draws)
    assert all((d["valid"] == (d["index"] >= 0)).all() for d in draws)
    assert len({tuple(d["index"]) for d in draws}) > 10


# --- from_config


def config(**leaves: Any) -> ConfigDict:
    return ConfigDict(
        {
            "name": "procedural",
            "train_split": "train",
            "eval_split": "test",
            "path": "",
            "workers": 0,
            "prefetch": 2,
            "augment": "none",
            "crop_scale": (0.08, 1.0),
            "flip": False,
            "jitter": 0.0,
            "randaugment": (0, 0),
            "mixup": 0.0,
            "cutmix": 0.0,
            "erase": 0.0,
            **leaves,
        }
    )


def build(preprocess: Preprocess | None = None, batch_size: int = 8, **leaves: Any) -> ImageData:
    return from_config(config(**leaves), seed=0, batch_size=batch_size, image_size=(16, 16), preprocess=preprocess)


def test_from_config() -> None:
    loader = build(n=20, classes=4, augment="shift", mixup=0.2)
    assert (loader.classes, loader.train_examples, loader.eval_examples) == (4, 20, 20)
    (batch,) = take(loader.train(0), 1)
    assert batch["image"].shape == (8, 16, 16, 3) and "lam" in batch
    only = build(train_split="", eval_split="test[:5]")
    assert (only.train_examples, only.eval_examples) == (0, 5)
    with pytest.raises(InputError, match="split must be one of eval.*found 'train'"):
        only.train(0)


def test_from_config_takes_the_preprocessing_of_the_weights() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    batches = [take(build(p).eval(), 1)[0]["image"] for p in (None, Preprocess(mean=mean, std=std))]
    pixels = (batches[0] * 0.5 + 0.5).astype(np.float64)
    np.testing.assert_allclose(batches[1], (pixels - mean) / std, atol=1e-5)
    assert build(Preprocess(squash=True))._squash


@pytest.mark.parametrize("augment", ["none", "flip"])
def test_squashed_images_hold_the_whole_picture(augment: str) -> None:
    """A wide image whose ends alone are white: squashed, they are in the batch; with a centre crop, they are not."""
    wide = np.zeros((16, 64, 3), np.uint8)
    wide[:, :8] = wide[:, -8:] = 255

    class Wide:
        classes, cropped = 2, False

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"image": wide, "label": 0, "id": str(index)}

    for squash in (True, False):
        options: dict[str, Any] = {"seed": 0, "batch_size": 4, "image_size": (16, 16), "crop": 1.0, "squash": squash}
        loader = ImageData(Wide(), Wide(), augment=Augment(augment), prefetch=0, **options)
        for batches in (loader.train(0), loader.eval()):
            image = next(iter(batches))["image"]
            assert (image[:, :, [0, -1]].min() > 0.9) == squash and image[:, :, 8].max() < -0.9


def test_from_config_of_a_config_that_counts_reads() -> None:
    """Every leaf is read, also those that are off, because the command line refuses leaves that nobody reads."""
    read = set()

    class Recording(dict):
        def __getitem__(self, key: str) -> Any:
            read.add(key)
            return super().__getitem__(key)

    leaves = config().to_dict()
    from_config(Recording(leaves), seed=0, batch_size=8, image_size=(16, 16))
    assert read >= set(leaves)


@pytest.mark.skipif(not TAR.exists(), reason="../shared/data/nips17_224.tar is missing")
def test_photographs_are_only_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTJAX_DATA", str(TAR.parent))
    leaves = config(name="nips17", train_split="calibration", eval_split="all[:3]")
    loader = from_config(leaves, seed=0, batch_size=2, image_size=(224, 224))
    assert (loader.classes, loader.train_examples, loader.eval_examples) == (1000, 500, 3)
    batches = list(loader.eval())
    source = sources.open_source("nips17", "all")
    for i in range(3):
        expected = (source[i]["image"].astype(np.float64) / 255 - 0.5) / 0.5
        np.testing.assert_allclose(batches[i // 2]["image"][i % 2], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, found 0"),
        ({"rows": [6, 7, 8]}, "rows must ascend within 0..7"),
        ({"rows": [3, 2]}, "rows must ascend within 0..7"),
        ({"rows": []}, "rows must ascend within 0..7"),
        ({"workers": -1}, "data.workers must be at least 0, found -1"),
        ({"prefetch": -1}, "data.prefetch"),
        ({"seed": -1}, "seed must be at least 0, found -1"),
        ({"image_size": (8, 0)}, "image_size must be at least 1, found 0"),
        ({"crop": 1.2}, "preprocess.crop must be in"),
        ({"interpolation": "bicubik"}, "did you mean 'bicubic'"),
        ({"std": (0.5, 0.0, 0.5)}, "preprocess.std"),
        ({"batch_size": 12, "rows": range(3, 6), "augment": EVERYTHING}, "whole pairs of the 12 rows"),
        ({"rows": [1, 2, 5, 6], "augment": EVERYTHING}, "whole pairs of the 8 rows"),
    ],
)
def test_values_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make(**options)
    assert "\n" not in str(caught.value)


def test_sources_with_other_classes_and_unknown_splits() -> None:
    with pytest.raises(InputError, match=r"same number of classes, found 3 \(train\) and 2 \(eval\)"):
        ImageData(procedural(4), sources.Procedural("test", 4, (8, 8), 2, 0), seed=0, batch_size=2, image_size=(8, 8))
    for call in (lambda: make().eval("evel"), lambda: make().draw("evel", 0)):
        with pytest.raises(InputError, match="split must be one of eval, train; did you mean 'eval'.*found 'evel'"):
            call()
    with pytest.raises(InputError, match="data.augment must be one of"):
        build(augment="crops")
    with pytest.raises(InputError, match="unknown data 'procedual'.*did you mean 'procedural'"):
        build(name="procedual")


# --- streams


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_while_iterating(workers: int, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "a").mkdir()
    for i in range(8):
        Image.new("RGB", (8, 8)).save(tmp_path / "a" / f"{i}.png")
    (tmp_path / "a" / "5.png").write_bytes(b"damaged")
    source = sources.open_source("folder", "all", path=str(tmp_path))
    batches = ImageData(None, source, seed=0, batch_size=2, image_size=(8, 8), workers=workers).eval()
    assert [next(batches)["index"].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(InputError, match=r"5\.png cannot be decoded"):
        next(batches)


def run(code: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
    )


PRELUDE = """
from vtjax.data import sources, loader
source = sources.Procedural("train", 50, (8, 8), 2, 0)
def stream(workers):
    return loader.ImageData(source, source, seed=0, batch_size=4, image_size=(8, 8), workers=workers).train(0)
"""


def test_leaving_without_closing_is_quiet() -> None:
    done = run(f"{PRELUDE}\nkept = [stream(0), stream(2)]\nfor s in kept: next(s)\nprint('end')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_a_killed_worker_is_an_error_not_a_hang() -> None:
    done = run(
        f"""{PRELUDE}
import multiprocessing, os, signal
batches = stream(2)
next(batches)
for child in multiprocessing.active_children():
    os.kill(child.pid, {signal.SIGKILL:d})
for batch in batches: pass
"""
    )
    assert done.returncode == 1 and "terminated unexpectedly with exit code -9" in done.stderr


def test_workers_outlive_a_signal_to_the_group_but_not_their_parent() -> None:
    code = f"""{PRELUDE}
import multiprocessing
batches = stream(2)
for _ in range(2): next(batches)  # one of each worker
print(*[c.pid for c in multiprocessing.active_children()], flush=True)
input()
print(sum(len(next(batches)['label']) for _ in range(20)), flush=True)
input()
"""
    main = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert main.stdin is not None and main.stdout is not None
    workers = [int(pid) for pid in main.stdout.readline().split()]
    assert len(workers) == 2
    for worker, number in itertools.product(workers, [signal.SIGTERM, signal.SIGINT]):
        os.kill(worker, number)
    main.stdin.write("\n")
    main.stdin.flush()
    assert main.stdout.readline() == "80\n"
    main.kill()
    main.communicate()
    deadline = time.monotonic() + 20
    while any(map(running, workers)):
        assert time.monotonic() < deadline, "workers stayed behind"
        time.sleep(0.1)


def running(pid: int) -> bool:
    """Whether the process exists and is no zombie, which a container without an init leaves for ever."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state) and not state.startswith("Z")


def test_public_names() -> None:
    assert {"ImageData", "from_config", "open_source", "Augment"} <= set(data.__all__)
    assert all(hasattr(data, name) for name in data.__all__)
