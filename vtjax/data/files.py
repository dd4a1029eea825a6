# SPDX-License-Identifier: Apache-2.0
"""Image folders and tar files, read in place.

Layouts, the same for both: `SPLIT/CLASS/name.jpg`; `CLASS/name.jpg`; or images beside one csv file with a label for
each. Where the files name no splits, there are three: "all", "calibration" (even positions in the sorted names) and
"evaluation" (odd positions).
"""

from __future__ import annotations

import csv as csv_format
import functools
import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtjax import paths
from vtjax.data.sources import Example, Source, Splits, Subset, choices, decode
from vtjax.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff")
ID_COLUMNS = ("file", "filename", "file_name", "image", "image_id", "imageid", "id")
LABEL_COLUMNS = ("label", "class", "target")
NIPS17 = "nips17_224.tar"


class Folder:
    """The files below a folder, by relative name."""

    def __init__(self, root: Path):
        self.root = root
        self.names = [
            str((Path(folder) / file).relative_to(root).as_posix())
            for folder, _, files in os.walk(root, followlinks=True)
            for file in files
        ]

    def where(self, name: str) -> str:
        return str(self.root / name)

    def read(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise InputError(f"file {self.where(name)} cannot be read: {error.strerror}") from None


class Tar:
    """The files of an uncompressed tar, by name; read by position, so threads need no lock."""

    def __init__(self, root: Path):
        self.root = root
        try:
            with tarfile.open(root, "r:") as tar:
                self._places = {
                    m.name.removeprefix("./"): (m.offset_data, m.size) for m in tar.getmembers() if m.isfile()
                }
        except (tarfile.TarError, OSError) as error:
            raise InputError(f"{root} must be a readable, uncompressed tar file: {error}") from None
        self.names = list(self._places)
        self._file = open(root, "rb")  # noqa: SIM115 - lives as long as this object

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._file = open(self.root, "rb")  # noqa: SIM115 - as above

    def __del__(self) -> None:
        if "_file" in self.__dict__:
            self._file.close()

    def where(self, name: str) -> str:
        return f"{name} in {self.root}"

    def read(self, name: str) -> bytes:
        offset, size = self._places[name]
        return os.pread(self._file.fileno(), size, offset)


Store = Folder | Tar


class Files:
    """Images of a store with their labels, in the order given."""

    def __init__(self, store: Store, names: Sequence[str], labels: Sequence[int], classes: int, cropped: bool):
        self.store, self.names, self.labels = store, names, labels
        self.classes, self.cropped = classes, cropped

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Example:
        name = self.names[index]
        image = decode(self.store.read(name), self.store.where(name))
        return {"image": image, "label": self.labels[index], "id": name}


def locate(path: str) -> Path:
    """`path` itself, or below a folder of `VTJAX_DATA`; raises `InputError` if neither exists."""
    if paths.is_url(path):
        if (copy := paths.fetch(path)) is None:
            raise InputError(f"{path} does not exist, expected a folder or a tar file of images")
        return copy
    direct = Path(path).expanduser()
    return direct if direct.exists() else paths.require(path, "give a folder or a tar file of images")


def open_nips17(path: str = "") -> Splits:
    """The 1000 labelled photographs of the NIPS 2017 "ImageNet-compatible" development set, cropped to 224 x 224.

    Label = TrueLabel - 1 (ImageNet-1k order). Splits: "all" (1000), "calibration" (500), "evaluation" (500).
    """
    how = f"put {NIPS17} into a folder of VTJAX_DATA, or give its path"
    tar = locate(path) if path else paths.require(NIPS17, how)
    return open_files(tar, "images.csv", "ImageId", "TrueLabel", label_offset=-1, classes=1000, cropped=True)


def open_files(
    path: Path,
    csv: str = "",
    id_column: str = "",
    label_column: str = "",
    label_offset: int = 0,
    classes: int = 0,
    cropped: bool = False,
) -> Splits:
    """Splits of a folder or tar file of images.

    Args:
      path: folder or uncompressed tar.
      csv: name of the csv file; "" = the only one there, if there is one.
      id_column, label_column: its columns; "" = the first one with a usual name (`ID_COLUMNS`, `LABEL_COLUMNS`).
        Ids are file names, with or without folder and suffix. Labels are integers, or class names, which are sorted.
      label_offset: added to integer labels.
      classes: number of classes; 0 = the largest label + 1, or the number of names.
      cropped: see `Source`.

    Raises:
      InputError: no images, a layout that is none of the three, a csv that does not fit the images, a bad label.
    """
    store = Folder(path) if path.is_dir() else Tar(path)
    hidden = [n for n in store.names if any(part.startswith((".", "__MACOSX")) for part in n.split("/"))]
    names = sorted(set(store.names) - set(hidden))
    images = [n for n in names if n.lower().endswith(SUFFIXES)]
    if not images:
        raise InputError(f"{path} must hold images ({', '.join(SUFFIXES)}), found none among {len(names)} files")
    tables = [n for n in names if n.lower().endswith(".csv")]
    if csv and csv not in tables:
        raise InputError(f"{path} has no csv file {csv!r}, found {', '.join(tables) or 'none'}")
    depths = {n.count("/") for n in images}
    if csv or (tables and depths == {0}):
        if not csv and len(tables) > 1:
            raise InputError(f"{path} holds several csv files ({', '.join(tables)}); name one with the option csv")
        csv = csv or tables[0]
        rows = _read_csv(store, csv, id_column, label_column)
        labels, count = _labels(_match(images, rows, store, csv), store.where(csv), label_offset, classes)
        return _halves(Files(store, images, labels, count, cropped))
    if depths not in ({1}, {2}):
        odd = next((n for n in images if n.count("/") not in (1, 2)), images[0])
        raise InputError(
            f"{path} must hold CLASS/image, SPLIT/CLASS/image (one of them throughout) or images with a csv file, "
            f"found {odd}"
        )
    parts = [n.split("/") for n in images]
    found = sorted({p[-2] for p in parts})
    if classes and classes != len(found):
        raise InputError(f"{path} must hold {classes} classes, found {len(found)} class folders")
    number = {c: i for i, c in enumerate(found)}

    def select(split: str | None) -> Source:
        chosen = [i for i, p in enumerate(parts) if split is None or p[0] == split]
        return Files(store, [images[i] for i in chosen], [number[parts[i][-2]] for i in chosen], len(found), cropped)

    if depths == {1}:
        return _halves(select(None))
    return {s: functools.partial(select, s) for s in sorted({p[0] for p in parts})}


def _halves(source: Source) -> Splits:
    return {
        "all": lambda: source,
        "calibration": lambda: Subset(source, range(0, len(source), 2)),
        "evaluation": lambda: Subset(source, range(1, len(source), 2)),
    }


def _read_csv(store: Store, name: str, id_column: str, label_column: str) -> dict[str, str]:
    """id -> label text."""
    try:
        table = list(csv_format.reader(io.StringIO(store.read(name).decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv_format.Error) as error:
        raise InputError(f"{store.where(name)} must be a csv file in UTF-8: {error}") from None
    table = [row for row in table if row]
    head = table[0] if table else []

    def column(wanted: str, usual: tuple[str, ...], option: str) -> int:
        for i, title in enumerate(head):
            if title == wanted if wanted else title.strip().lower() in usual:
                return i
        expected = repr(wanted) if wanted else f"one of {', '.join(usual)} (or the option {option})"
        raise InputError(f"{store.where(name)} lacks the column {expected}, found {choices(wanted, head)}")

    key, label = column(id_column, ID_COLUMNS, "id_column"), column(label_column, LABEL_COLUMNS, "label_column")
    rows: dict[str, str] = {}
    for line, row in enumerate(table[1:], start=2):
        if len(row) <= max(key, label) or not row[label].strip():
            raise InputError(f"row {line} of {store.where(name)} has no label, found {','.join(row)[:80]!r}")
        if row[key] in rows:
            raise InputError(f"{store.where(name)} names {row[key]!r} twice")
        rows[row[key]] = row[label].strip()
    return rows


def _match(images: list[str], rows: dict[str, str], store: Store, csv: str) -> list[str]:
    """The label text of each image; each row must have its image."""
    unused = dict(rows)
    texts = []
    for image in images:
        base = image.rsplit("/", 1)[-1]
        for key in (image, base, os.path.splitext(image)[0], os.path.splitext(base)[0]):
            if key in unused:
                texts.append(unused.pop(key))
                break
        else:
            raise InputError(f"image {store.where(image)} has no row of its own in {csv}")
    if unused:
        example = next(iter(unused))
        raise InputError(f"{store.where(csv)} names {len(unused)} images that are not there, such as {example!r}")
    return texts


def _labels(texts: list[str], where: str, offset: int, classes: int) -> tuple[list[int], int]:
    """Integer labels and the number of classes."""
    try:
        labels = [int(t) + offset for t in texts]
    except ValueError:
        number = {name: i for i, name in enumerate(sorted(set(texts)))}
        labels = [number[t] for t in texts]
    count = classes or max(labels) + 1
    for text, label in zip(texts, labels, strict=True):
        if not 0 <= label < count:
            shifted = f" with label_offset={offset}" if offset else ""
            raise InputError(f"labels of {where} must be in 0..{count - 1}{shifted}, found {text!r}")
    return labels, count
