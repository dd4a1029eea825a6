# SPDX-License-Identifier: Apache-2.0
"""TFDS sets in array_record form: our own are prepared here, all are read without TensorFlow."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vtjax import paths
from vtjax.data.sources import Example, Source, Splits, choices, decode
from vtjax.errors import InputError

MANUAL = {"imagenet2012": "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar"}
STALE = 3600  # seconds after which the temporary folder of a killed preparation is removed


class Prepared:
    """One split of a prepared TFDS set, read with `as_data_source`; images are decoded by Pillow.

    Args:
      folder: of one version, holding `dataset_info.json`.
      split: one of the set's splits.
      image, label: keys of the two features.
    """

    def __init__(self, folder: str, split: str, image: str, label: str):
        self.folder, self.split, self.image, self.label = folder, split, image, label
        info = _builder(folder).info
        self.classes = info.features[label].num_classes
        shape = info.features[image].shape
        self.cropped = None not in shape[:2]  # all images have one size: there is nothing to crop away
        self._open()

    def _open(self) -> None:
        import tensorflow_datasets as tfds

        skip = {self.image: tfds.decode.SkipDecoding()}
        self._records = _builder(self.folder).as_data_source(split=self.split, decoders=skip)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_records"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        name = record.get("file_name", record.get("id", index))
        name = name.decode() if isinstance(name, bytes) else str(name)
        image = decode(record[self.image], f"{name} (example {index} of split {self.split!r} in {self.folder})")
        return {"image": image, "label": int(record[self.label]), "id": name}


def open_digits() -> Splits:
    """scikit-learn's 1797 handwritten digits, 8 x 8, prepared in the cache at the first use.

    Values 0..16 become round(255 v / 16), repeated to 3 channels; test = every fifth one (index % 5 == 0), train = the
    rest, in scikit-learn's order.
    """
    return _splits(prepare(_digits_builder()))


def open_tfds(name: str, path: str, own: tuple[str, ...]) -> Splits:
    """A set that `tfds build NAME --file_format=array_record` has prepared; see `folder_of`."""
    return _splits(folder_of(name, path, own))


def folder_of(name: str, path: str, own: tuple[str, ...]) -> str:
    """The folder of the prepared set of that name.

    Args:
      name: `NAME[/CONFIG][:VERSION]`; the newest version without one.
      path: folder to look in; "" = `tfds/` of the cache, the folders of VTJAX_DATA (and `tfds/` in them),
        `TFDS_DATA_DIR` or `~/tensorflow_datasets`.
      own: names that are no TFDS sets, for the message.

    Raises:
      InputError: the set is unknown or not prepared, with how to prepare it.
    """
    from etils import epath

    if re.fullmatch(r"\w+(/[\w.+-]+)?(:\d+\.\d+\.\d+)?", name) is None:
        raise InputError(f"data name must be {', '.join(own)} or a TFDS NAME[/CONFIG][:VERSION], found {name!r}")
    bare, _, version = name.partition(":")
    home = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    roots = [str(paths.cache_dir() / "tfds"), *(f"{p}/{s}" for p in paths.search_path() for s in ("tfds", "")), home]
    roots = [root.rstrip("/") for root in dict.fromkeys([path] if path else roots)]
    for root in roots:
        folder = epath.Path(root).expanduser() / bare
        versions = _versions(folder)
        if not versions and folder.is_dir():
            configs = sorted(p.name for p in folder.iterdir() if p.is_dir() and _versions(p))
            if len(configs) > 1:
                raise InputError(f"data {name!r} in {root} must be NAME/CONFIG, found the configs {', '.join(configs)}")
            folder = folder / configs[0] if configs else folder
            versions = _versions(folder)
        if version and versions and version not in versions:
            raise InputError(f"data {bare!r} in {folder} has no version {version}, found {', '.join(versions)}")
        if versions:
            return os.fspath(folder / (version or versions[-1]))
    raise InputError(_how_to_prepare(name, roots, own))


def prepare(builder_class: Any) -> str:
    """Prepares one of our own builders below `cache_dir()/tfds`, unless it is there; returns the version's folder.

    The set is built in a temporary folder and renamed when whole, so a killed process leaves nothing that looks
    complete, and of two processes the later one drops its copy.

    Raises:
      InputError: the cache cannot be written.
    """
    root = paths.cache_dir() / "tfds"
    config = [config.name for config in builder_class.BUILDER_CONFIGS]  # none, or one
    final = root.joinpath(builder_class.name, *config, str(builder_class.VERSION))
    if final.is_dir():
        return str(final)
    try:
        root.mkdir(parents=True, exist_ok=True)
        for old in root.glob(".partial-*"):
            if time.time() - old.stat().st_mtime > STALE:
                shutil.rmtree(old, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=root))
    except OSError as error:
        raise InputError(f"cache {root} must be writable (VTJAX_CACHE moves it): {error.strerror}") from None
    try:
        builder = builder_class(data_dir=str(partial), file_format="array_record")
        # Standard output belongs to the command's result.
        with contextlib.redirect_stdout(io.StringIO()), _no_progress_bar():
            builder.download_and_prepare()
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(builder.data_path, final)
        except OSError:
            if not final.is_dir():
                raise
    except OSError as error:
        raise InputError(f"data {builder_class.name!r} could not be prepared in {root}: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return str(final)


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    try:
        yield
    finally:
        tfds.enable_progress_bar()


@functools.cache
def _digits_builder() -> Any:
    import tensorflow_datasets as tfds

    class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """Handwritten digits of scikit-learn (UCI "Optical Recognition of Handwritten Digits", test part)."""

        VERSION = tfds.core.Version("1.0.0")
        name = "digits"

        def _info(self) -> Any:
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                    "id": tfds.features.Text(),
                }
            )
            return tfds.core.DatasetInfo(
                builder=self,
                description=type(self).__doc__,
                features=features,
                supervised_keys=("image", "label"),
                disable_shuffling=True,  # the order is scikit-learn's
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples(False), "test": self._generate_examples(True)}

        def _generate_examples(self, test: bool) -> Iterator[tuple[int, dict[str, Any]]]:
            from sklearn import datasets

            digits = datasets.load_digits()
            images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
            for i, (image, label) in enumerate(zip(images, digits.target, strict=True)):
                if (i % 5 == 0) == test:
                    # Encoded, because an array would need TensorFlow.
                    png = io.BytesIO()
                    Image.fromarray(image).convert("RGB").save(png, "PNG")
                    png.seek(0)
                    yield i, {"image": png, "label": int(label), "id": f"{i:04d}"}

    return Digits


@functools.lru_cache(maxsize=16)
def _builder(folder: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # damaged json, missing features: many types
        reason = " ".join(str(error).split())
        raise InputError(f"prepared set {folder} cannot be read ({reason}); remove and prepare it again") from None


def info_of(folder: str) -> Any:
    """The `DatasetInfo` of a prepared set.

    Raises:
      InputError: it cannot be read, or is in another form than array_record.
    """
    info = _builder(folder).info
    form = info.file_format.value
    if form != "array_record":
        raise InputError(
            f"prepared set {folder} must have file_format=array_record, found {form}; convert it with: "
            f"tfds convert_format --root_data_dir={folder} --out_file_format=array_record"
        )
    return info


def _splits(folder: str) -> Splits:
    info = info_of(folder)
    image, label = info.supervised_keys if len(info.supervised_keys or ()) == 2 else ("image", "label")
    if image not in info.features or label not in info.features or not hasattr(info.features[label], "num_classes"):
        found = ", ".join(info.features)
        raise InputError(f"prepared set {folder} must have an image and a class label, found {found}")

    def opener(split: str) -> Callable[[], Source]:
        return lambda: Prepared(folder, split, image, label)

    return {split: opener(split) for split in info.splits}


def _versions(folder: Any) -> list[str]:
    """Complete versions below a set's folder, oldest first."""
    if not folder.is_dir():
        return []
    names = [p.name for p in folder.iterdir() if re.fullmatch(r"\d+\.\d+\.\d+", p.name)]
    whole = [n for n in names if (folder / n / "dataset_info.json").exists()]
    return sorted(whole, key=lambda n: tuple(map(int, n.split("."))))


def _how_to_prepare(name: str, roots: list[str], own: tuple[str, ...]) -> str:
    import tensorflow_datasets as tfds

    stock = tfds.list_builders(with_community_datasets=False)
    bare = re.split("[:/]", name)[0]
    if bare not in stock:
        # Suggestions from all names, but the list in the message stays short.
        hint = choices(bare, [*own, *stock]).partition("; did")
        return (
            f"unknown data {name!r}, expected one of {', '.join(own)}, a TFDS set or one prepared in "
            f"{', '.join(roots)}{hint[1]}{hint[2]}"
        )
    manual = f" (first put {MANUAL[bare]} into its downloads/manual)" if bare in MANUAL else ""
    return (
        f"data {name!r} is not prepared in {', '.join(roots)}; prepare it with: pip install 'vtjax[tf]' && "
        f"tfds build {name} --file_format=array_record --data_dir={roots[0]}{manual}"
    )
