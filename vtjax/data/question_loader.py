# SPDX-License-Identifier: Apache-2.0
"""Batches of questions about images, for training and evaluating multimodal LLMs.

A batch is a dict of numpy arrays, the process's rows of the global batch: `input_ids, positions, segments, labels`
int32 and `weights` float32, `[b, S]` (`packing.Row`); `learned` int32 [b, M] (slots whose label has weight, -1 =
none; M is the most that a row has); `images` float32 [b, H, W, 3] normalised; `valid` bool [b]
(False = padding); `index` int64 [b] (number of the row in the split, -1 = padding); and per question of a row, int32
[b, Q], -1 = none: `question` (its number in the split), `type`, `answer`. Q is `pack`; with 1, rows are questions.
Of videos, `images` is `[b, F, H, W, 3]`; `image_number` int32 [b, F] says which part of its video a frame belongs to,
from 1 (0 = none: it fills up), and `image_interval` int32 [b, S, 2] the first and last part that a token sees.

S is one of a few lengths. With several (`buckets`) rows of about the same length come together: the stream of rows is
cut into stretches of `GROUP` batches, each is sorted by bucket, and its batches are shuffled. Rows, their questions and
so all lengths follow from the data alone; the stream, its stretches and the batch of a step from (seed, step), as in
`vtjax.data.loader`: resuming and the number of processes change nothing, and an epoch is the whole split.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from vtjax.data import conversation, packing, questions, stream, transforms
from vtjax.data.augment import Augment
from vtjax.data.conversation import Encoded, Template, Turn
from vtjax.data.loader import SPLITS, Preprocess, augment_of
from vtjax.data.questions import Questions
from vtjax.data.sources import choices
from vtjax.data.stream import Batch
from vtjax.data.tokenizer import Tokenizer, WordTokenizer
from vtjax.errors import InputError

GROUP = 32  # batches that are sorted by length together


class QuestionData:
    """Training and evaluation batches from two splits.

    Args:
      train: None where only evaluation is wanted.
      eval: of the same set.
      tokenizer, template: how questions and answers are written.
      seed: of the order.
      batch_size: rows, global over all processes.
      image_size: (height, width) of the batches.
      visual_tokens: placeholders per image.
      router: token at the end of every question, see `conversation.encode`; -1 = none.
      pack: most questions of a row; 1 = every question has its own.
      buckets: most row lengths that batches may have, each of which is compiled once.
      limit: most tokens of a row; 0 = what the longest needs.
      learned: least M, for batches of the same form as those of other data; 0 = what the data needs.
      crop, interpolation, squash: how images of another size get it, see `transforms.evaluate`; as they are, the whole
        image is resized, whatever its aspect.
      mean, std: normalisation, for values in [0, 1].
      prefetch: batches that are prepared ahead, by one thread each; 0 = none.
      rows: this process's rows of every global batch, ascending; None = all of them. Processes may share rows.
      frame_order: of videos, which frame stands at which of this process's places, -1 = none; no other frames are made.
        None = all of them, as they come.

    Attributes:
      lengths: the row lengths, ascending.
      answers, types: of the set, in the order of their numbers.
      classes: number of answers.
      train_examples, eval_examples: rows of each split.

    Raises:
      InputError: a value out of range, splits of different sets, or a question that cannot be written or is too long.
    """

    def __init__(
        self,
        train: Questions | None,
        eval: Questions,
        tokenizer: Tokenizer,
        *,
        template: Template,
        seed: int,
        batch_size: int,
        image_size: tuple[int, int],
        visual_tokens: int,
        router: int = -1,
        pack: int = 1,
        buckets: int = 1,
        limit: int = 0,
        learned: int = 0,
        crop: float = 1.0,
        interpolation: str = "bicubic",
        squash: bool = True,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        prefetch: int = 2,
        rows: Sequence[int] | None = None,
        frame_order: Sequence[int] | None = None,
    ):
        for name, value, least in [
            ("seed", seed, 0),
            ("batch_size", batch_size, 1),
            ("visual_tokens", visual_tokens, 1),
            ("config.data.pack", pack, 1),
            ("config.data.buckets", buckets, 1),
            ("config.data.limit", limit, 0),
            ("config.data.learned", learned, 0),
            ("config.data.prefetch", prefetch, 0),
            ("image_size", min(image_size), 1),
        ]:
            if value < least:
                raise InputError(f"{name} must be at least {least}, found {value}")
        mine = stream.own_rows(batch_size, rows)
        if train is not None and (train.answers, train.types) != (eval.answers, eval.types):
            raise InputError("both splits must have the same answers and types, found those of two sets")
        for split in (train, eval):
            if split is not None and not len(split):
                raise InputError("a split must hold at least one question, found none")
        parts = 1 if eval.frames is None else int(eval.frames.max())
        write = _Writer(tokenizer, template, visual_tokens, router, parts)
        self._splits = {"eval": _Rows(eval, write, pack, limit)}
        if train is not None:
            self._splits["train"] = _Rows(train, write, pack, limit)
        self.answers, self.types, self.classes = eval.answers, eval.types, len(eval.answers)
        self.train_examples = 0 if train is None else len(self._splits["train"])
        self.eval_examples = len(self._splits["eval"])
        most = packing.buckets(self._splits["eval" if train is None else "train"].sizes.tolist(), buckets)
        longest = max(int(split.sizes.max()) for split in self._splits.values())
        self.lengths = tuple(sorted({*most[:-1], *packing.buckets([max(longest, most[-1])], 1)}))
        self._learned = max(learned, *(int(split.learned.max()) for split in self._splits.values()))
        self._bucket = {name: np.searchsorted(self.lengths, split.sizes) for name, split in self._splits.items()}
        self._seed, self._batch_size, self._rows, self._size = seed, batch_size, mine, image_size
        self._pack, self._pad, self._mean, self._std, self._prefetch = pack, tokenizer.pad, mean, std, prefetch
        self._resized = functools.partial(
            transforms.evaluate, size=image_size, crop=crop, interpolation=interpolation, squash=squash
        )
        self._frame_order = None
        if eval.frames is not None:
            order = range(len(eval.frames)) if frame_order is None else frame_order
            self._frame_order = np.asarray(order, np.int64)
        # A split smaller than a stretch would come more than once in it.
        self._group = min(GROUP, max(1, self.train_examples // batch_size)) if len(self.lengths) > 1 else 1
        # Threads are at neighbouring steps, so at one stretch or two.
        self._stretch = functools.lru_cache(maxsize=4)(self._sorted_stretch)

    def train(self, start_step: int) -> Iterator[Batch]:
        """Endless training batches, from `start_step` on.

        Raises:
          InputError: there is no training split, or (while iterating) an image that cannot be decoded.
        """
        self._split("train")
        return stream.batches(self._train_batch, start_step, stream.ENDLESS, prefetch=self._prefetch)

    def eval(self, split: str = "eval") -> Iterator[Batch]:
        """The split once, from short rows to long ones; each question stands in one row of the global batches, and
        every process gets the same number of batches."""
        order = np.argsort(self._bucket[self._split(split)], kind="stable")
        count = -(-len(order) // self._batch_size)

        def make(step: int) -> Batch:
            return self._batch(split, order[step * self._batch_size : (step + 1) * self._batch_size])

        return stream.batches(make, 0, count, prefetch=self._prefetch)

    def draw(self, split: str, index: int) -> Batch:
        """Random batch number `index` of a split, a pure function of (seed, split, index).

        Batches of one epoch (rows // batch_size of them) share no row; a split smaller than a batch is padded.
        """
        size = len(self._splits[self._split(split)])
        epoch, number = divmod(index, max(1, size // self._batch_size))
        order = stream.order(self._seed, stream.DRAW + SPLITS.index(split), epoch, size)
        return self._batch(split, order[number * self._batch_size : (number + 1) * self._batch_size])

    def _split(self, split: str) -> str:
        if split not in self._splits:
            raise InputError(f"split must be one of {choices(split, sorted(self._splits))}, found {split!r}")
        return split

    def _train_batch(self, step: int) -> Batch:
        number, place = divmod(step, self._group)
        return self._batch("train", self._stretch(number)[place])

    def _sorted_stretch(self, number: int) -> np.ndarray:
        """The rows of stretch `number` of the stream, `[group, batch_size]`."""
        size, total = self.train_examples, self._group * self._batch_size
        counts = np.arange(number * total, (number + 1) * total)
        epochs = range(counts[0] // size, counts[-1] // size + 1)
        orders = np.concatenate([stream.order(self._seed, stream.ORDER, epoch, size) for epoch in epochs])
        rows = orders[counts - epochs[0] * size]
        if self._group == 1:
            return rows.reshape(1, -1)
        rows = rows[np.argsort(self._bucket["train"][rows], kind="stable")].reshape(self._group, -1)
        return rows[stream.rng(self._seed, stream.GROUP, number).permutation(self._group)]

    def _batch(self, split: str, rows: np.ndarray) -> Batch:
        """Global batch of some rows, padded; ours of it."""
        source = self._splits[split]
        length = self.lengths[self._bucket[split][rows].max()]
        index = np.full(self._batch_size, -1, np.int64)
        index[: len(rows)] = rows
        index = index[self._rows]
        many = () if self._frame_order is None else (len(self._frame_order),)
        images = np.zeros((len(index), *many, *self._size, 3), np.float32)
        empty = np.zeros(length, np.int32)
        nothing = packing.Row(empty + self._pad, empty, empty - 1, empty, np.zeros(length, np.float32))
        made = [source.row(i, length, self._pad) if i >= 0 else nothing for i in index.tolist()]
        asked = np.full((len(index), self._pack), -1, np.int32)
        for place, i in enumerate(index.tolist()):
            if i >= 0:
                self._fill(images[place], source, i)
                asked[place, : len(source.parts[i])] = source.parts[i]
        columns = {
            name: np.where(asked >= 0, getattr(source.questions, name)[asked], -1).astype(np.int32)
            for name in ("type", "answer")
        }
        arrays = {name: np.stack([getattr(row, name) for row in made]) for name in packing.Row._fields}
        learned = np.full((len(index), self._learned), -1, np.int32)
        for place, row in enumerate(made):
            slots = np.flatnonzero(row.weights)
            learned[place, : len(slots)] = slots
        arrays["learned"] = learned
        arrays |= self._seen(source.questions, asked, arrays["segments"], index)
        return {**arrays, "images": images, "valid": index >= 0, "index": index, "question": asked, **columns}

    def _fill(self, place: np.ndarray, source: _Rows, row: int) -> None:
        """Puts the image of a row, or those frames of its video that are ours, where the batch has it."""
        if self._frame_order is None:
            place[:] = transforms.normalise(self._resized(source.image(row)), self._mean, self._std)
            return
        ours = np.flatnonzero(self._frame_order >= 0)
        for at, frame in zip(ours, source.frames(row, self._frame_order[ours]), strict=True):
            place[at] = transforms.normalise(self._resized(frame), self._mean, self._std)

    def _seen(
        self, questions: Questions, asked: np.ndarray, segments: np.ndarray, index: np.ndarray
    ) -> dict[str, np.ndarray]:
        """`image_number` and `image_interval` of videos. What questions share sees nothing: it would tell one what
        another one sees."""
        if self._frame_order is None:
            return {}
        assert questions.frames is not None and questions.sees is not None
        number = np.where(self._frame_order >= 0, questions.frames[self._frame_order], 0)
        nothing = np.array((1, 0), np.int32)
        each = np.where((asked >= 0)[:, :, None], questions.sees[asked], nothing)
        own = np.take_along_axis(each, np.maximum(segments - 1, 0)[:, :, None], axis=1)
        return {
            "image_number": np.where(index[:, None] >= 0, number, 0).astype(np.int32),
            "image_interval": np.where((segments > 0)[:, :, None], own, nothing).astype(np.int32),
        }


class _Writer:
    """Writes questions about one image, or a video of some parts; the same text is encoded once."""

    def __init__(self, tokenizer: Tokenizer, template: Template, visual_tokens: int, router: int, parts: int):
        self._tokenizer, self._template, self.visual_tokens = tokenizer, template, visual_tokens
        self._router, self._parts = router, parts
        self._known: dict[tuple[str, str], Encoded] = {}

    def __call__(self, text: str, answer: str) -> Encoded:
        if (text, answer) not in self._known:
            first = self._template.about_image(text)
            turns = [Turn(first.role, conversation.IMAGE * (self._parts - 1) + first.text), Turn("assistant", answer)]
            options: dict[str, Any] = {"visual_tokens": self.visual_tokens, "images": self._parts}
            options["router"] = self._router
            self._known[text, answer] = conversation.encode(turns, self._tokenizer, self._template, **options)
        return self._known[text, answer]


class _Rows:
    """The rows of a split: which questions share one, and how long each is."""

    def __init__(self, source: Questions, write: _Writer, pack: int, limit: int):
        # Videos are too many pictures to keep.
        self.questions = source
        self._images = questions.cached(source.images) if source.frames is None else source.images
        self._written = [
            write(text, source.answers[answer]) for text, answer in zip(source.texts, source.answer, strict=True)
        ]
        # The template begins every conversation of the set alike, up to the end of the image.
        self.prefix = self._written[0].images[-1] + write.visual_tokens
        lengths = [len(one.ids) for one in self._written]
        starts = [0, *(np.flatnonzero(np.diff(source.image)) + 1).tolist(), len(source)]
        self.parts = [
            range(start + part.start, start + part.stop)
            for start, stop in zip(starts[:-1], starts[1:], strict=True)
            for part in packing.share(lengths[start:stop], self.prefix, pack, limit)
        ]
        self.sizes = np.array([packing.size([lengths[i] for i in part], self.prefix) for part in self.parts])
        counts = [int(one.learned.sum()) for one in self._written]
        self.learned = np.array([sum(counts[i] for i in part) for part in self.parts])

    def __len__(self) -> int:
        return len(self.parts)

    def row(self, index: int, length: int, pad: int) -> packing.Row:
        return packing.row([self._written[i] for i in self.parts[index]], self.prefix, length, pad)

    def image(self, index: int) -> np.ndarray:
        return self._images[self._number(index)]

    def frames(self, index: int, wanted: np.ndarray) -> np.ndarray:
        return questions.frames_of(self._images, self._number(index), wanted.tolist())

    def _number(self, index: int) -> int:
        """Of the image or video that a row is about."""
        return int(self.questions.image[self.parts[index].start])


def vocabulary(train: Questions, extra: Sequence[str] = ()) -> WordTokenizer:
    """The words of a training split, questions and answers, and further control tokens."""
    return WordTokenizer.build([*train.texts, *train.answers], extra)


def check_unaltered(config: Any) -> None:
    """Raises InputError for augmentation or workers, which are not for questions."""
    if augment_of(config) != Augment() or config["repeats"] != 1:
        raise InputError(
            "config.data must leave augmentation at its defaults with questions, which are about colours and places, "
            "found another setting"
        )
    if config["workers"]:
        raise InputError(f"config.data.workers must be 0 with questions, which threads read, found {config['workers']}")


def open_split(config: Any, split: str) -> Questions:
    """A split of the set that `config.data` describes.

    Raises:
      InputError: as `questions.open_questions`.
    """
    leaves = {
        "marked_shapes": ("n", "size", "cells", "mark", "objects"),
        "needle": ("n", "size", "frames", "cameras", "haystack"),
    }
    wanted = leaves.get(config["name"], ())
    if missing := [name for name in wanted if name not in config]:
        raise InputError(f"config.data.name={config['name']!r} needs config.data.{missing[0]}, found no such leaf")
    # Leaves of the other sets stand in the config, too: they count as read (`cli.config.check_read`).
    known: dict[str, Any] = {name: config[name] for names in leaves.values() for name in names if name in config}
    own = {name: known[name] for name in wanted}
    elsewhere = {"path": config["path"]} if config["path"] else {}
    options = {**own, **elsewhere}
    return questions.open_questions(config["name"], split, **options)


def batch_shapes(
    config: Any, *, batch_size: int, image_size: tuple[int, int]
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of what a global batch holds on the devices (where int64 is int32), for rows of `config.limit`
    tokens; no source is opened.

    Raises:
      InputError: no limit.
    """
    if config["limit"] < 1:
        raise InputError(f"config.data.limit must be the length of a row, 1 or more, found {config['limit']}")
    ints, floats = np.dtype(np.int32), np.dtype(np.float32)
    row, asked = (batch_size, config["limit"]), (batch_size, config["pack"])
    return {
        **{name: (row, ints) for name in ("input_ids", "positions", "segments", "labels")},
        "weights": (row, floats),
        "learned": ((batch_size, config["learned"] or config["limit"]), ints),
        **{name: (asked, ints) for name in ("question", "type", "answer")},
        "images": ((batch_size, *image_size, 3), floats),
        "valid": ((batch_size,), np.dtype(bool)),
        "index": ((batch_size,), ints),
    }


def from_config(
    config: Any,
    *,
    seed: int,
    batch_size: int,
    image_size: tuple[int, int],
    visual_tokens: int,
    router: int = -1,
    tokenizer: Tokenizer | None = None,
    template: Template = conversation.PLAIN,
    preprocess: Preprocess | None = None,
    rows: Sequence[int] | None = None,
    frame_order: Sequence[int] | None = None,
    edit: Callable[[Questions, str], Questions] | None = None,
) -> tuple[QuestionData, Tokenizer]:
    """Data that `config.data` describes, and the tokenizer.

    Args:
      config: mapping with the leaves of `configs.common.questions`.
      seed, batch_size, image_size, visual_tokens, router, rows, frame_order: as for `QuestionData`.
      tokenizer: None = one of the words of the training split, questions and answers.
      template: how it writes.
      preprocess: what the model's spec says; None = the whole image, mean and std 0.5.
      edit: `(questions, split) -> questions`, what is asked in place of those of a split, such as noisy answers.

    Raises:
      InputError: as `questions.open_questions` and `QuestionData`; augmentation or workers, which are not
        for questions.
    """
    check_unaltered(config)
    evaluation = open_split(config, config["eval_split"])
    train = open_split(config, config["train_split"]) if config["train_split"] else None
    if tokenizer is None:
        if train is None:
            raise InputError("config.data.train_split must name the split whose words make the vocabulary, found none")
        tokenizer = vocabulary(train)
    if config["types"]:
        train = None if train is None else train.of_types(config["types"])
        evaluation = evaluation.of_types(config["types"])
    if edit is not None:
        train = None if train is None else edit(train, config["train_split"])
        evaluation = edit(evaluation, config["eval_split"])
    names = ("crop", "interpolation", "squash", "mean", "std")
    form = {} if preprocess is None else {name: getattr(preprocess, name) for name in names}
    data = QuestionData(
        train,
        evaluation,
        tokenizer,
        template=template,
        seed=seed,
        batch_size=batch_size,
        image_size=image_size,
        visual_tokens=visual_tokens,
        router=router,
        pack=config["pack"],
        buckets=config["buckets"],
        limit=config["limit"],
        learned=config["learned"],
        prefetch=config["prefetch"],
        rows=rows,
        frame_order=frame_order,
        **form,
    )
    return data, tokenizer
