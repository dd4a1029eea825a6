# SPDX-License-Identifier: Apache-2.0
"""Batches of texts and images for encoders that fuse both and answer with a class (ViLT, METER).

Three forms are made of a set of questions about images: "answers", a question and its image, whose class is the answer;
"pairs", a question and two images, of which is said whether both have the same answer (as NLVR2 has two images for a
text); "captions", an image, its own caption and `false` other ones, caption 0 being the true one. A caption is all
questions about an image with their answers.

A batch is a dict of numpy arrays, the process's rows of the global batch: `input_ids` int32 [b, N] and `mask` int32
[b, N] (1 = token, 0 = padding at the end), of captions [b, C, N]; `images` float32 [b, H, W, 3] normalised, of pairs
[b, 2, H, W, 3]; `label`, `type` int32 [b]; `valid` bool [b] (False = padding); `index` int64 [b] (number of the row in
the split, -1 = padding). The batch of a step follows from (seed, step), as in `vtjax.data.loader`; the false captions
of a row in evaluation from its number alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from vtjax.data import question_loader, questions, stream, transforms
from vtjax.data import tokenizer as words
from vtjax.data.loader import SPLITS, Preprocess
from vtjax.data.questions import Images, Questions
from vtjax.data.sources import choices
from vtjax.data.stream import Batch
from vtjax.data.tokenizer import Tokenizer
from vtjax.errors import InputError

FORMS = ("answers", "pairs", "captions")
CLASS = "<class>"
"""The word tokenizer's token at the beginning of every text, which stands for all of it."""

STARTS, ENDS = (CLASS, "[CLS]", "<s>"), (words.END, "[SEP]", "</s>")


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """What a split asks.

    Attributes:
      images: what pictures there are.
      texts: one per row.
      image: numbers of each row's pictures.
      label, type: of each row.
      classes: K, of the labels; 1 where a row has nothing but its true caption to choose.
    """

    images: Images
    texts: tuple[str, ...]
    image: Int[np.ndarray, "R I"]
    label: Int[np.ndarray, " R"]
    type: Int[np.ndarray, " R"]
    classes: int

    def __len__(self) -> int:
        return len(self.texts)


def answers(asked: Questions) -> Rows:
    """A row per question."""
    return Rows(asked.images, asked.texts, asked.image[:, None], asked.answer, asked.type, len(asked.answers))


def pairs(asked: Questions) -> Rows:
    """A row per question that another image is asked, too: label 1 where both have the same answer, else 0. Both are
    equally frequent as far as the set has such images."""
    asking: dict[str, list[int]] = {}
    for number, text in enumerate(asked.texts):
        asking.setdefault(text, []).append(number)
    same_text = {text: np.asarray(numbers) for text, numbers in asking.items()}
    kept: list[int] = []
    partners: list[int] = []
    labels: list[int] = []
    for number, text in enumerate(asked.texts):
        others = same_text[text]
        others = others[asked.image[others] != asked.image[number]]
        equal = asked.answer[others] == asked.answer[number]
        wanted = len(kept) % 2 == 0
        fitting = others[equal == wanted]
        if not len(fitting):
            wanted, fitting = not wanted, others[equal != wanted]
        if len(fitting):
            kept.append(number)
            partners.append(int(fitting[number * 7919 % len(fitting)]))  # any fixed choice that is spread out
            labels.append(int(wanted))
    if not kept:
        raise InputError("pairs need questions that are asked about several images, found none")
    image = np.stack([asked.image[kept], asked.image[partners]], axis=1)
    said = tuple(asked.texts[i] for i in kept)
    return Rows(asked.images, said, image, np.asarray(labels, np.int32), asked.type[kept], 2)


def captions(asked: Questions) -> Rows:
    """A row per image: all of its questions, each with its answer."""
    said: dict[int, list[str]] = {}
    for text, image, answer in zip(asked.texts, asked.image.tolist(), asked.answer.tolist(), strict=True):
        said.setdefault(image, []).append(f"{text} {asked.answers[answer]}")
    nothing = np.zeros(len(said), np.int32)
    image = np.asarray(list(said), np.int32)[:, None]
    return Rows(asked.images, tuple(" ".join(parts) for parts in said.values()), image, nothing, nothing, 1)


MAKE: dict[str, Callable[[Questions], Rows]] = {"answers": answers, "pairs": pairs, "captions": captions}


class FusionData:
    """Training and evaluation batches from two splits.

    Args:
      train: None where only evaluation is wanted.
      eval: of the same set.
      tokenizer: writes the texts, with what stands for a whole text first.
      length: N, tokens of every text; 0 = those of the longest.
      false: of captions, how many false ones a row has; 0 for the other forms.
      seed, batch_size, image_size, crop, interpolation, squash, mean, std, prefetch, rows: as of `QuestionData`.

    Attributes:
      classes: of the labels, see `Rows`.
      length: N.
      train_examples, eval_examples: rows of each split.

    Raises:
      InputError: a value out of range, an empty split, a text that is too long, or too few captions.
    """

    def __init__(
        self,
        train: Rows | None,
        eval: Rows,
        tokenizer: Tokenizer,
        *,
        length: int,
        seed: int,
        batch_size: int,
        image_size: tuple[int, int],
        false: int = 0,
        crop: float = 1.0,
        interpolation: str = "bicubic",
        squash: bool = True,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        prefetch: int = 2,
        rows: Sequence[int] | None = None,
    ):
        for name, value, least in (("seed", seed, 0), ("batch_size", batch_size, 1), ("config.data.length", length, 0)):
            if value < least:
                raise InputError(f"{name} must be at least {least}, found {value}")
        self._splits = {"eval": eval} if train is None else {"train": train, "eval": eval}
        self._written, self._caption = {}, {}
        for name, split in self._splits.items():
            if not len(split):
                raise InputError(f"a split must hold at least one row, found none for {name!r}")
            texts = tuple(dict.fromkeys(split.texts))
            if len(texts) <= false:
                raise InputError(f"{false} false captions need {false + 1} different ones, found {len(texts)}")
            self._written[name] = [_ids(text, tokenizer) for text in texts]
            places = {text: place for place, text in enumerate(texts)}
            self._caption[name] = np.asarray([places[text] for text in split.texts])
        longest = max(len(ids) for written in self._written.values() for ids in written)
        if 0 < length < longest:
            raise InputError(f"config.data.length must be {longest} or more, the tokens of a text, found {length}")
        self.length, self.classes = length or longest, eval.classes
        self.train_examples = 0 if train is None else len(train)
        self.eval_examples = len(eval)
        self._images = {name: questions.cached(split.images) for name, split in self._splits.items()}
        self._seed, self._batch_size, self._rows = seed, batch_size, stream.own_rows(batch_size, rows)
        self._size, self._false, self._pad, self._prefetch = image_size, false, tokenizer.pad, prefetch
        self._normalised = functools.partial(transforms.normalise, mean=mean, std=std)
        self._resized = functools.partial(
            transforms.evaluate, size=image_size, crop=crop, interpolation=interpolation, squash=squash
        )

    def train(self, start_step: int) -> Iterator[Batch]:
        """Endless training batches, from `start_step` on.

        Raises:
          InputError: there is no training split.
        """
        self._split("train")
        return stream.batches(self._train_batch, start_step, stream.ENDLESS, prefetch=self._prefetch)

    def eval(self, split: str = "eval") -> Iterator[Batch]:
        """The split once, every row in one of the global batches."""
        size = len(self._splits[self._split(split)])

        def make(step: int) -> Batch:
            return self._batch(split, np.arange(step * self._batch_size, min(size, (step + 1) * self._batch_size)))

        return stream.batches(make, 0, -(-size // self._batch_size), prefetch=self._prefetch)

    def draw(self, split: str, index: int) -> Batch:
        """Random batch number `index` of a split, a pure function of (seed, split, index).

        Batches of one epoch (rows // batch_size of them) share no row; a split smaller than a batch is padded.
        """
        size = len(self._splits[self._split(split)])
        epoch, number = divmod(index, max(1, size // self._batch_size))
        order = stream.order(self._seed, stream.DRAW + SPLITS.index(split), epoch, size)
        return self._batch(split, order[number * self._batch_size : (number + 1) * self._batch_size], epoch)

    def _split(self, split: str) -> str:
        if split not in self._splits:
            raise InputError(f"split must be one of {choices(split, sorted(self._splits))}, found {split!r}")
        return split

    def _train_batch(self, step: int) -> Batch:
        counts = np.arange(step * self._batch_size, (step + 1) * self._batch_size)
        epochs = range(counts[0] // self.train_examples, counts[-1] // self.train_examples + 1)
        orders = [stream.order(self._seed, stream.ORDER, epoch, self.train_examples) for epoch in epochs]
        rows = np.concatenate(orders)[counts - epochs[0] * self.train_examples]
        return self._batch("train", rows, step)

    def _batch(self, split: str, rows: np.ndarray, number: int = 0) -> Batch:
        """Global batch of some rows, padded; ours of it. `number` decides about the false captions."""
        source = self._splits[split]
        index = np.full(self._batch_size, -1, np.int64)
        index[: len(rows)] = rows
        index = index[self._rows]
        texts, many = 1 + self._false, source.image.shape[1]
        ids = np.full((len(index), texts, self.length), self._pad, np.int32)
        mask = np.zeros_like(ids)
        mask[:, :, 0] = 1  # no row is without a token
        images = np.zeros((len(index), many, *self._size, 3), np.float32)
        for place, row in enumerate(index.tolist()):
            if row < 0:
                continue
            for text, chosen in enumerate(self._texts(split, row, number)):
                found = self._written[split][chosen]
                ids[place, text, : len(found)], mask[place, text, : len(found)] = found, 1
            for image, chosen in enumerate(source.image[row].tolist()):
                images[place, image] = self._normalised(self._resized(self._images[split][chosen]))
        columns = {
            name: np.where(index >= 0, getattr(source, name)[index], -1).astype(np.int32) for name in ("label", "type")
        }
        return {
            "input_ids": ids if self._false else ids[:, 0],
            "mask": mask if self._false else mask[:, 0],
            "images": images if many > 1 else images[:, 0],
            **columns,
            "valid": index >= 0,
            "index": index,
        }

    def _texts(self, split: str, row: int, number: int) -> list[int]:
        """The row's own text and, of captions, its false ones, each once."""
        own = int(self._caption[split][row])
        if not self._false:
            return [own]
        random = np.random.default_rng((self._seed, stream.EXAMPLE, SPLITS.index(split), number, row))
        others = random.choice(len(self._written[split]) - 1, self._false, replace=False)
        return [own, *(others + (others >= own)).tolist()]


def _ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """A text between what begins and what ends one."""
    start, end = (
        [tokenizer.control[name] for name in names if name in tokenizer.control][:1] for names in (STARTS, ENDS)
    )
    if not start:
        raise InputError(f"a tokenizer must have one of {', '.join(STARTS)} to begin a text with, found none")
    return [*start, *tokenizer.encode(text), *end]


def open_rows(config: Any, split: str, known: Sequence[str] = ()) -> Rows:
    """A split in the form that `config.form` says.

    Args:
      known: words of the model; () = it is not limited to words.

    Raises:
      InputError: an unknown form, a word that the model does not know; as `question_loader.open_split`.
    """
    if config["form"] not in FORMS:
        raise InputError(f"config.data.form must be one of {', '.join(FORMS)}, found {config['form']!r}")
    asked = question_loader.open_split(config, split)
    if config["types"]:
        asked = asked.of_types(config["types"])
    rows = MAKE[config["form"]](asked)
    if known and (unknown := sorted({word for text in rows.texts for word in words.split(text)} - set(known))):
        raise InputError(
            f"the model must know the words of config.data.name={config['name']!r}, found no {unknown[0]!r}: it "
            "learned those of another set"
        )
    return rows


def from_config(
    config: Any,
    *,
    seed: int,
    batch_size: int,
    image_size: tuple[int, int],
    tokenizer: Tokenizer,
    known: Sequence[str] = (),
    preprocess: Preprocess | None = None,
    rows: Sequence[int] | None = None,
) -> FusionData:
    """Data that `config.data` describes.

    Args:
      config: mapping with the leaves of `configs.das.fusion_data`.
      seed, batch_size, image_size, tokenizer, rows: as for `FusionData`.
      known: as of `open_rows`.
      preprocess: what the model's spec says; None = the whole image, mean and std 0.5.

    Raises:
      InputError: as `open_rows` and `FusionData`; augmentation or workers, which are not for questions.
    """
    question_loader.check_unaltered(config)
    names = ("crop", "interpolation", "squash", "mean", "std")
    _check_false(config)
    form = {} if preprocess is None else {name: getattr(preprocess, name) for name in names}
    return FusionData(
        open_rows(config, config["train_split"], known) if config["train_split"] else None,
        open_rows(config, config["eval_split"], known),
        tokenizer,
        length=config["length"],
        false=config["false"] if config["form"] == "captions" else 0,
        seed=seed,
        batch_size=batch_size,
        image_size=image_size,
        prefetch=config["prefetch"],
        rows=rows,
        **form,
    )


def _check_false(config: Any) -> None:
    # Read for every form, so that one set of overrides serves all.
    if config["false"] < 1 and config["form"] == "captions":
        raise InputError(f"config.data.false must be 1 false caption or more, found {config['false']}")


def batch_shapes(
    config: Any, *, batch_size: int, image_size: tuple[int, int]
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of what a global batch holds on the devices (where int64 is int32), for texts of `config.length`
    tokens; no source is opened.

    Raises:
      InputError: no length, or captions without a false one.
    """
    _check_false(config)
    if config["length"] < 1:
        raise InputError(f"config.data.length must be the tokens of a text, 1 or more, found {config['length']}")
    ints, rows = np.dtype(np.int32), (batch_size,)
    several = (1 + config["false"],) if config["form"] == "captions" else ()
    many = (2,) if config["form"] == "pairs" else ()
    return {
        **{name: ((*rows, *several, config["length"]), ints) for name in ("input_ids", "mask")},
        "images": ((*rows, *many, *image_size, 3), np.dtype(np.float32)),
        **{name: (rows, ints) for name in ("label", "type", "index")},
        "valid": (rows, np.dtype(bool)),
    }
