# SPDX-License-Identifier: Apache-2.0
"""Labelled images with random access, by name: `open_source("digits", "train")`.

A source is a sequence of `{"image": uint8 [H, W, 3], "label": int, "id": str}`. Sources hold no decoded data, are safe
to read from several threads, and pickle (worker processes get their own file handles). `Cached` keeps decoded images.
A split is written as `NAME` or `NAME[FROM:TO]`, with counts or percentages (`train[:90%]`, `all[-16:]`).
"""

from __future__ import annotations

import colorsys
import difflib
import functools
import inspect
import io
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vtjax.data import transforms
from vtjax.errors import InputError

CACHE_LIMIT = 256 * 2**20  # bytes; sets that are smaller than this when decoded stay in memory


class Example(TypedDict):
    """One labelled image: `image` uint8 [H, W, 3] RGB, `label` in 0..classes-1, `id` a name for people."""

    image: UInt8[np.ndarray, "H W 3"]
    label: int
    id: str


@runtime_checkable
class Source(Protocol):
    """Random access to labelled images.

    Attributes:
      classes: number of classes.
      cropped: the images are already what a centre crop would leave, so evaluation must not crop them again.
    """

    classes: int
    cropped: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def open_source(name: str, split: str, **options: Any) -> Source:
    """Opens one split of a data set.

    Args:
      name: "digits", "nips17", "folder", "procedural" or any TFDS set (`cifar10`, `NAME/CONFIG:VERSION`).
      split: `NAME` or `NAME[FROM:TO]`.
      **options: of the set: `path` (folder or tar; for a TFDS set the folder to look in) for all but "digits" and
        "procedural"; `csv, id_column, label_column, label_offset, classes` for "folder" (`files.open_files`);
        `n, image_size, classes, seed` for "procedural" (`Procedural`).

    Raises:
      InputError: unknown name, split or option; missing or damaged files; an empty split. One line each.
    """
    opener = _OPENERS.get(name, _open_tfds)
    known = [p for p in inspect.signature(opener).parameters if p != "name"]
    for option in options:
        if option not in known:
            raise InputError(f"data {name!r} has no option {option!r}, expected {choices(option, known)}")
    splits = opener(name, **options)
    base, positions = cut(split, name)
    if base not in splits:
        raise InputError(f"data {name!r} has no split {base!r}, expected {choices(base, splits)}")
    source = splits[base]()
    if positions is not None:
        source = Subset(source, positions(len(source)))
    if not len(source):
        raise InputError(f"split {split!r} of data {name!r} is empty, expected at least one example")
    return source


def choices(found: str, known: Any) -> str:
    """`a, b, c`, with a suggestion where one of them is close to what was found."""
    known = [str(k) for k in known]
    close = difflib.get_close_matches(found, known, n=1)
    return (", ".join(known) or "none") + (f"; did you mean {close[0]!r}?" if close else "")


def decode(data: bytes, where: str) -> UInt8[np.ndarray, "H W 3"]:
    """Encoded image (PNG, JPEG, ...) as RGB.

    Raises:
      InputError: naming `where` the bytes came from, if they are not an image that Pillow can read to its end.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    # Pillow's plugins raise what they like on damaged files.
    except Exception as error:
        reason = "no image format recognised" if "BytesIO" in str(error) else " ".join(str(error).split())
        raise InputError(f"image {where} cannot be decoded ({len(data)} bytes): {reason}") from None


class Subset:
    """Some positions of another source, in the order given."""

    def __init__(self, source: Source, positions: range):
        self.source, self.positions = source, positions
        self.classes, self.cropped = source.classes, source.cropped

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Example:
        return self.source[self.positions[index]]


class Joined:
    """One source after another; classes are those of the first.

    Raises:
      InputError: only one of them is `cropped`.
    """

    def __init__(self, first: Source, second: Source):
        if first.cropped != second.cropped:
            raise InputError(f"joined sources must agree on cropped, found {first.cropped} and {second.cropped}")
        self.first, self.second = first, second
        self.classes, self.cropped = first.classes, first.cropped

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, index: int) -> Example:
        start = len(self.first)
        return self.first[index] if index < start else self.second[index - start]


class Cropped:
    """Another source, its images as evaluation would crop them; arguments as of `transforms.evaluate`."""

    cropped = True

    def __init__(self, source: Source, size: tuple[int, int], crop: float, interpolation: str, squash: bool):
        self.source, self.classes = source, source.classes
        self.size, self.crop, self.interpolation, self.squash = size, crop, interpolation, squash

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        image = transforms.evaluate(example["image"], self.size, self.crop, self.interpolation, squash=self.squash)
        return {**example, "image": image}


class Cached:
    """Keeps each example after its first reading. A pickled copy starts empty."""

    def __init__(self, source: Source):
        self.source = source
        self.classes, self.cropped = source.classes, source.cropped
        self._kept: list[Example | None] = [None] * len(source)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Example:
        example = self._kept[index]
        if example is None:
            example = self._kept[index] = self.source[index]
        return example

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": [None] * len(self)}


def cached(source: Source, cache: bool | None = None) -> Source:
    """`source`, with decoded examples kept in memory if `cache`; None: if all of them take less than `CACHE_LIMIT`,
    judging by the first."""
    if cache is None:
        cache = len(source) * source[0]["image"].nbytes < CACHE_LIMIT
    return Cached(source) if cache else source


class Procedural:
    """Images made on the spot: grey noise and one square whose colour is the class, so the salient place is known.

    The square's side is a quarter of the image's shorter side (at least 1 pixel) and it lies on the grid of that side.

    Args:
      split: its name enters the random stream.
      n: number of examples; example i has the label i mod classes.
      image_size: (height, width).
      classes: colours, evenly spaced hues.
      seed: of positions and noise.
    """

    cropped = True

    def __init__(self, split: str, n: int, image_size: tuple[int, int], classes: int, seed: int):
        if n < 1 or not 1 <= classes <= 1000 or len(image_size) != 2 or min(image_size) < 1 or seed < 0:
            raise InputError(
                "procedural data needs n >= 1, classes in 1..1000, image_size (height, width) and seed >= 0, "
                f"found n={n}, classes={classes}, image_size={image_size}, seed={seed}"
            )
        self.split, self.n, self.image_size, self.classes, self.seed = split, n, tuple(image_size), classes, seed

    def __len__(self) -> int:
        return self.n

    def _rng(self, index: int) -> np.random.Generator:
        if not 0 <= index < self.n:
            raise IndexError(index)
        return np.random.default_rng((self.seed, *self.split.encode(), index))

    def _place(self, rng: np.random.Generator) -> tuple[int, int, int]:
        side = max(1, min(self.image_size) // 4)
        row, column = (int(rng.integers(s // side)) for s in self.image_size)
        return row * side, column * side, side

    def salient(self, index: int) -> tuple[int, int, int]:
        """(top, left, side) in pixels of the coloured square of example `index`."""
        return self._place(self._rng(index))

    def __getitem__(self, index: int) -> Example:
        rng = self._rng(index)
        top, left, side = self._place(rng)
        label = index % self.classes
        image = np.repeat(rng.integers(96, 160, (*self.image_size, 1), np.uint8), 3, axis=2)
        colour = colorsys.hsv_to_rgb(label / self.classes, 1.0, 1.0)
        image[top : top + side, left : left + side] = np.rint(255 * np.array(colour)).astype(np.uint8)
        return {"image": image, "label": label, "id": f"procedural/{self.split}/{index}"}


Splits = Mapping[str, Callable[[], Source]]
"""Split name -> function that opens it."""


def _open_procedural(
    name: str, n: int = 256, image_size: tuple[int, int] = (32, 32), classes: int = 10, seed: int = 0
) -> Splits:
    return {s: functools.partial(Procedural, s, n, image_size, classes, seed) for s in ("train", "test")}


def _open_digits(name: str) -> Splits:
    from vtjax.data import prepared

    return prepared.open_digits()


def _open_tfds(name: str, path: str = "") -> Splits:
    from vtjax.data import prepared

    return prepared.open_tfds(name, path, own=tuple(_OPENERS))


def _open_nips17(name: str, path: str = "") -> Splits:
    from vtjax.data import files

    return files.open_nips17(path)


def _open_folder(
    name: str,
    path: str = "",
    csv: str = "",
    id_column: str = "",
    label_column: str = "",
    label_offset: int = 0,
    classes: int = 0,
) -> Splits:
    from vtjax.data import files

    if not path:
        raise InputError("data 'folder' needs the option path (a folder or a tar file), found none")
    return files.open_files(files.locate(path), csv, id_column, label_column, label_offset, classes)


_OPENERS: dict[str, Callable[..., Splits]] = {
    "digits": _open_digits,
    "nips17": _open_nips17,
    "folder": _open_folder,
    "procedural": _open_procedural,
}


def cut(split: str, name: str) -> tuple[str, Callable[[int], range] | None]:
    """Splits `NAME[FROM:TO]` into the name and what gives its positions from the size; None for all.

    Raises:
      InputError: a split that is not written so; a side of the slice that is no count or percentage.
    """
    match = re.fullmatch(r"([^\[\]:%]+)(?:\[(-?\d*%?):(-?\d*%?)\])?", split)
    if match is None:
        raise InputError(f"split of data {name!r} must be NAME or NAME[FROM:TO], such as train[:90%], found {split!r}")
    base, *sides = match.groups()
    if sides[0] is None:
        return base, None
    return base, lambda size: range(*(_position(text, end, size, split) for end, text in enumerate(sides)))


def _position(text: str, end: int, size: int, split: str) -> int:
    """Position 0..size that one side of a slice means; `end` is 1 for the right side."""
    if not text:
        return size * end
    if text in ("-", "%", "-%"):
        raise InputError(f"slice of split {split!r} must hold integers or percentages, found {text!r}")
    value = round(size * int(text[:-1]) / 100) if text.endswith("%") else int(text)
    return max(0, min(size, value + size if text.startswith("-") else value))
