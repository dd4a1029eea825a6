# SPDX-License-Identifier: Apache-2.0
"""Questions about images, by name: `open_questions("easy_vqa", "train")`; and what can be answered without looking.

Texts, answers and types of a split are in memory, images are read when they are asked for. A split is written as for
`sources.open_source`; its slices count images, each with all of its questions. Letters: Q questions, I images.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, UInt8

from vtjax.data import sources
from vtjax.data.sources import choices
from vtjax.errors import InputError


@runtime_checkable
class Images(Protocol):
    """Random access to images, uint8 `[H, W, 3]`, or videos `[F, H, W, 3]`; safe to read from several threads. Videos
    may have a method `some(index, frames)`, see `frames_of`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "*F H W 3"]: ...


def frames_of(videos: Images, index: int, frames: Sequence[int]) -> UInt8[np.ndarray, "N H W 3"]:
    """N different frames of a video, in this order; no others are made where the videos know how (`some`)."""
    some = getattr(videos, "some", None)
    return videos[index][np.asarray(frames, np.int64)] if some is None else some(index, frames)


@dataclasses.dataclass(frozen=True, eq=False)
class Questions:
    """The questions of one split; those of an image stand together.

    Attributes:
      images: I images.
      texts: Q questions.
      image: number of the image that each question is about, ascending.
      answer: number of each question's answer in `answers`.
      type: number of each question's type in `types`.
      answers, types: their texts; equal for all splits of a set.
      sees: of videos: the first and last part that each question sees, from 1.
      frames: of videos, whose images are `[F, H, W, 3]`: the part that each of their frames belongs to, from 1.

    Raises:
      InputError: columns of different lengths, or numbers that name no image, answer or type.
    """

    images: Images
    texts: tuple[str, ...]
    image: Int32[np.ndarray, " Q"]
    answer: Int32[np.ndarray, " Q"]
    type: Int32[np.ndarray, " Q"]
    answers: tuple[str, ...]
    types: tuple[str, ...]
    sees: Int32[np.ndarray, "Q 2"] | None = None
    frames: Int32[np.ndarray, " F"] | None = None

    def __post_init__(self) -> None:
        limits = {"image": len(self.images), "answer": len(self.answers), "type": len(self.types)}
        for name, limit in limits.items():
            column = getattr(self, name)
            if len(column) != len(self.texts):
                raise InputError(f"{name} must hold {len(self.texts)} numbers, one per question, found {len(column)}")
            if len(column) and not 0 <= column.min() <= column.max() < limit:
                raise InputError(f"{name} must be in 0..{limit - 1}, found {column.min()}..{column.max()}")
        if (np.diff(self.image) < 0).any():
            raise InputError("image must ascend, so that the questions of an image stand together, found a step back")

    def __len__(self) -> int:
        return len(self.texts)

    def about(self, images: range) -> Questions:
        """Those about some images, which are then numbered from 0."""
        number = np.full(len(self.images), -1, np.int32)
        number[images] = np.arange(len(images), dtype=np.int32)
        kept = np.flatnonzero(number[self.image] >= 0)
        return dataclasses.replace(
            self,
            images=_Some(self.images, images),
            texts=tuple(self.texts[i] for i in kept),
            image=number[self.image[kept]],
            answer=self.answer[kept],
            type=self.type[kept],
            sees=None if self.sees is None else self.sees[kept],
        )

    def of_types(self, names: Sequence[str]) -> Questions:
        """Those of some types; images stay.

        Raises:
          InputError: a type that the set does not have, or no question left.
        """
        for name in names:
            if name not in self.types:
                raise InputError(f"the type of a question must be one of {', '.join(self.types)}, found {name!r}")
        kept = np.flatnonzero(np.isin(self.type, [self.types.index(name) for name in names]))
        if not len(kept):
            raise InputError(f"a split must hold questions of type {', '.join(names)}, found none")
        columns = {name: getattr(self, name)[kept] for name in ("image", "answer", "type")}
        columns |= {} if self.sees is None else {"sees": self.sees[kept]}
        return dataclasses.replace(self, texts=tuple(self.texts[i] for i in kept), **columns)


class _Some:
    """Some images of another sequence."""

    def __init__(self, images: Images, positions: range):
        self.images, self.positions = images, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "*F H W 3"]:
        return self.images[self.positions[index]]

    def some(self, index: int, frames: Sequence[int]) -> UInt8[np.ndarray, "N H W 3"]:
        return frames_of(self.images, self.positions[index], frames)


class Cached:
    """Keeps each image after its first reading."""

    def __init__(self, images: Images):
        self._images = images
        self._kept: list[np.ndarray | None] = [None] * len(images)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "*F H W 3"]:
        image = self._kept[index]
        if image is None:
            image = self._kept[index] = self._images[index]
        return image


def cached(images: Images) -> Images:
    """`images`, kept in memory if all of them take less than `sources.CACHE_LIMIT`, judging by the first."""
    return Cached(images) if len(images) * images[0].nbytes < sources.CACHE_LIMIT else images


def open_questions(name: str, split: str, **options: Any) -> Questions:
    """Opens one split of a set of questions.

    Args:
      name: "easy_vqa" (splits train, test), "marked_shapes", "needle" (train, val, test), or a TFDS set that is
        prepared in array_record form, with an `image` and `questions`: a sequence of `text`, `answer` and `type`, the
        latter two class labels with names.
      split: `NAME` or `NAME[FROM:TO]`, in images.
      **options: `n, size, seed, cells, mark, objects` of "marked_shapes" (`question_sets.open_marked_shapes`);
        `n, size, frames, cameras, haystack, seed` of "needle" (`needle.open_needle`); `path` of a TFDS set.

    Raises:
      InputError: unknown name, split or option; an extra that is missing; an empty split. One line each.
    """
    opener = _OPENERS.get(name, _open_prepared)
    known = [p for p in inspect.signature(opener).parameters if p != "name"]
    for option in options:
        if option not in known:
            raise InputError(f"questions {name!r} have no option {option!r}, expected {choices(option, known)}")
    splits = opener(name, **options)
    base, positions = sources.cut(split, name)
    if base not in splits:
        raise InputError(f"questions {name!r} have no split {base!r}, expected {choices(base, splits)}")
    found = splits[base]()
    if positions is not None:
        found = found.about(positions(len(found.images)))
    if not len(found):
        raise InputError(f"split {split!r} of questions {name!r} is empty, expected at least one question")
    return found


Splits = Mapping[str, Callable[[], Questions]]
"""Split name -> function that opens it."""


def _open_easy_vqa(name: str) -> Splits:
    from vtjax.data import question_sets

    return question_sets.open_easy_vqa()


def _open_marked_shapes(
    name: str, n: int = 4000, size: int = 64, seed: int = 0, cells: int = 0, mark: int = 1, objects: float = 1.0
) -> Splits:
    from vtjax.data import question_sets

    return question_sets.open_marked_shapes(n, size, seed, cells, mark, objects)


def _open_needle(
    name: str,
    n: int = 2000,
    size: int = 32,
    frames: int = 16,
    cameras: int = 1,
    haystack: str = "drawn",
    seed: int = 0,
) -> Splits:
    from vtjax.data import needle

    return needle.open_needle(n, size, frames, cameras, haystack, seed)


def _open_prepared(name: str, path: str = "") -> Splits:
    from vtjax.data import prepared, question_sets

    return question_sets.splits(prepared.folder_of(name, path, own=tuple(_OPENERS)))


_OPENERS: dict[str, Callable[..., Splits]] = {
    "easy_vqa": _open_easy_vqa,
    "marked_shapes": _open_marked_shapes,
    "needle": _open_needle,
}


def baselines(train: Questions, test: Questions) -> dict[str, Any]:
    """What answering without looking at the image reaches on `test`, learned from `train`.

    Args:
      train, test: of one set.

    Returns:
      `majority`: accuracy, in [0, 1], of the most frequent answer; `per_text`: of the most frequent answer to the very
      same text (to a new text: the most frequent of all); `majority_answer`; `questions` in `test`; and, for every
      type that `test` has, `types[type]` with `majority` (of that type's most frequent answer), `per_text`,
      `majority_answer` and `questions`. Of equally frequent answers the one that is the more frequent
      in all of `train` counts, then the first of `answers`.

    Raises:
      InputError: splits of different sets, or without questions.
    """
    if (train.answers, train.types) != (test.answers, test.types):
        raise InputError("both splits must have the same answers and types, found those of two sets")
    if not len(train) or not len(test):
        raise InputError(f"both splits must hold questions, found {len(train)} and {len(test)}")
    counts: dict[str, Counter[int]] = {}
    for text, answer in zip(train.texts, train.answer.tolist(), strict=True):
        counts.setdefault(text, Counter())[answer] += 1
    whole = Counter(train.answer.tolist())

    def most(count: Counter[int]) -> int:
        return min(count, key=lambda answer: (-count[answer], -whole[answer], answer))

    best = {text: most(count) for text, count in counts.items()}
    overall = most(whole)
    by_text = np.array([best.get(text, overall) for text in test.texts])

    def report(seen: np.ndarray, asked: np.ndarray) -> dict[str, Any]:
        # A type that nobody trained on is answered like all the others.
        answer = most(Counter(train.answer[seen].tolist())) if seen.any() else overall
        truth = test.answer[asked]
        return {
            "majority": float((truth == answer).mean()),
            "per_text": float((truth == by_text[asked]).mean()),
            "majority_answer": test.answers[answer],
            "questions": int(asked.sum()),
        }

    everything = report(np.ones(len(train), bool), np.ones(len(test), bool))
    present = [(number, name) for number, name in enumerate(test.types) if (test.type == number).any()]
    return {**everything, "types": {name: report(train.type == k, test.type == k) for k, name in present}}


class PreparedImages:
    """The images of a prepared set, decoded by Pillow."""

    def __init__(self, records: Sequence[Mapping[str, Any]], where: str):
        self._records, self._where = records, where

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "H W 3"]:
        return sources.decode(self._records[index]["image"], f"{index} of {self._where}")


@functools.lru_cache(maxsize=8)
def read_prepared(folder: str, split: str) -> Questions:
    """One split of a prepared set; every record is read once, for its questions.

    Args:
      folder: of one version, as `question_sets.splits` has checked it.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    records = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    columns = builder.info.features["questions"]
    rows = [records[i]["questions"] for i in range(len(records))]

    def column(name: str) -> np.ndarray:
        return np.array([value for row in rows for value in row[name]], np.int32)

    return Questions(
        images=PreparedImages(records, f"split {split!r} in {os.fspath(folder)}"),
        texts=tuple(text.decode() for row in rows for text in row["text"]),
        image=np.repeat(np.arange(len(rows), dtype=np.int32), [len(row["text"]) for row in rows]),
        answer=column("answer"),
        type=column("type"),
        answers=tuple(columns["answer"].names),
        types=tuple(columns["type"].names),
    )
