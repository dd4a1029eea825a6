# SPDX-License-Identifier: Apache-2.0
"""Batches for training and evaluation on grain.

A batch is a dict of numpy arrays, the process's rows of the global batch: `image` float32 [b, H, W, 3] normalised,
`label` int32 [b], `valid` bool [b] (False = padding), `index` int64 [b] (position in the split, -1 = padding); with
mixup or CutMix also `label2` int32 [b] and `lam` float32 [b].

The global batch of a step is a pure function of (seed, step): example number c = step * batch_size + row of the stream
is position c mod n of epoch c div n, every epoch is a new order of the whole split, and the augmentation of example c
draws from (seed, c). So neither resuming nor the number of processes, workers or threads changes anything, a batch may
reach over the end of an epoch, and a batch may be larger than the split.

With `repeats` = r (repeated augmentation, Hoffer et al. 2020; DeiT) the stream shows each position r times in a row, so
that an epoch has r * n examples; within a batch the copies stand apart, so that neighbours, which mixup pairs, differ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vtjax.data import sources, stream, transforms
from vtjax.data.augment import Augment
from vtjax.data.sources import Example, Source, choices
from vtjax.data.stream import Batch
from vtjax.errors import InputError

SPLITS = ("train", "eval")


@runtime_checkable
class Preprocess(Protocol):
    """What the weights expect of an image; `vtjax.spec.Preprocess` is one."""

    crop: float
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    squash: bool


class ImageData:
    """Training and evaluation batches from two sources.

    Args:
      train: source of the training examples; None where only evaluation is wanted.
      eval: source of the evaluation examples.
      seed: of the order and the augmentation.
      batch_size: global, over all processes.
      image_size: (height, width) of the batches.
      augment: what training images go through.
      crop, interpolation, squash: evaluation transform (`transforms.evaluate`); sources with `cropped` images are not
        cropped again, and only resized where their size is another one.
      mean, std: normalisation, for values in [0, 1].
      workers: processes that prepare batches; 0 = threads of this process.
      prefetch: batches that are prepared ahead, by one thread each (with workers: per worker); 0 = none.
      repeats: how often a batch of training holds each of its images, differently augmented.
      cache: keep decoded examples in memory; None = if they take less than `sources.CACHE_LIMIT`.
      rows: this process's rows of every global batch, ascending; None = all of them. Processes may share rows.

    Attributes:
      varies: whether a training image looks different each time.

    Raises:
      InputError: a value out of range, batch sizes that do not divide, or sources with different classes.
    """

    def __init__(
        self,
        train: Source | None,
        eval: Source,
        *,
        seed: int,
        batch_size: int,
        image_size: tuple[int, int],
        augment: Augment | None = None,
        crop: float = 0.875,
        interpolation: str = "bicubic",
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        squash: bool = False,
        workers: int = 0,
        prefetch: int = 2,
        repeats: int = 1,
        cache: bool | None = None,
        rows: Sequence[int] | None = None,
    ):
        augment = augment or Augment()
        for name, value, least in [
            ("seed", seed, 0),
            ("batch_size", batch_size, 1),
            ("config.data.workers", workers, 0),
            ("config.data.prefetch", prefetch, 0),
            ("config.data.repeats", repeats, 1),
            ("image_size", min(image_size), 1),
        ]:
            if value < least:
                raise InputError(f"{name} must be at least {least}, found {value}")
        mine = stream.own_rows(batch_size, rows)
        if augment.mixes and (
            len(mine) % 2 or any(a % 2 for a in mine[::2]) or mine[1::2] != [a + 1 for a in mine[::2]]
        ):
            raise InputError(
                "config.data.mixup and config.data.cutmix pair the rows 0 and 1, 2 and 3, ...: every process must hold "
                f"whole pairs of the {batch_size} rows of a batch, found {len(mine)} rows from {mine[0]} on"
            )
        if not 0 < crop <= 1:
            raise InputError(f"preprocess.crop must be in (0, 1], found {crop}")
        if interpolation not in transforms.INTERPOLATIONS:
            expected = choices(interpolation, transforms.INTERPOLATIONS)
            raise InputError(f"preprocess.interpolation must be one of {expected}, found {interpolation!r}")
        if min(std) <= 0:
            raise InputError(f"preprocess.std must be positive, found {std}")
        if train is not None and train.classes != eval.classes:
            found = f"{train.classes} (train) and {eval.classes} (eval)"
            raise InputError(f"both splits must have the same number of classes, found {found}")
        self.classes = eval.classes
        self.train_examples, self.eval_examples = 0 if train is None else len(train), len(eval)
        self._sources = {"eval": sources.cached(eval, cache)}
        if train is not None:
            self._sources["train"] = sources.cached(train, cache)
        self._seed, self._size, self._augment = seed, image_size, augment
        self._crop, self._interpolation, self._squash, self._mean, self._std = crop, interpolation, squash, mean, std
        self._workers, self._prefetch = workers, prefetch
        self._batch_size, self._rows = batch_size, mine
        self.varies = self._augment.random or self._augment.mixes
        # Row of the global batch -> its place in the stream: all first copies, then all second ones, and so on.
        self._repeats = repeats
        self._places = np.concatenate([np.arange(copy, batch_size, repeats) for copy in range(repeats)])

    def train(self, start_step: int) -> Iterator[Batch]:
        """Endless training batches, from `start_step` on.

        Raises:
          InputError: there is no training split, or (while iterating) an image that cannot be decoded.
        """
        self._source("train")
        return self._stream(self._train_batch, start_step, stream.ENDLESS)

    def eval(self, split: str = "eval") -> Iterator[Batch]:
        """The split once, in order, without augmentation; each example is valid in one row of the global batches, and
        every process gets the same number of batches."""
        count = -(-len(self._source(split)) // self._batch_size)
        return self._stream(functools.partial(self._eval_step, split), 0, count)

    def draw(self, split: str, index: int) -> Batch:
        """Random batch number `index` of a split without augmentation, a pure function of (seed, split, index).

        Batches of one epoch (len // batch_size of them) share no example; a split smaller than a batch is padded.
        """
        size = len(self._source(split))
        epoch, number = divmod(index, max(1, size // self._batch_size))
        rows = self._row_numbers(number)
        order = stream.order(self._seed, stream.DRAW + SPLITS.index(split), epoch, size)
        return self._eval_batch(split, [int(order[r]) if r < size else -1 for r in rows])

    def _source(self, split: str) -> Source:
        if split not in self._sources:
            raise InputError(f"split must be one of {choices(split, sorted(self._sources))}, found {split!r}")
        return self._sources[split]

    def _row_numbers(self, step: int) -> list[int]:
        """Our rows of global batch `step`, counted through all batches."""
        return [step * self._batch_size + row for row in self._rows]

    def _train_batch(self, step: int) -> Batch:
        source = self._sources["train"]
        size = len(source)
        rows = self._row_numbers(step)
        counts = [
            (step * self._batch_size + int(self._places[row % self._batch_size])) // self._repeats for row in rows
        ]
        index = [int(stream.order(self._seed, stream.ORDER, c // size, size)[c % size]) for c in counts]
        examples = [source[i] for i in index]
        images = [self._augmented(e, row) for e, row in zip(examples, rows, strict=True)]
        batch = self._batch(images, [e["label"] for e in examples], index)
        if self._augment.mixes:
            rng = stream.rng(self._seed, stream.MIX, step)
            image, label2, lam = transforms.mix(
                batch["image"], batch["label"], rng, self._augment.mixup, self._augment.cutmix
            )
            batch |= {"image": image, "label2": label2, "lam": np.full(len(self._rows), lam, np.float32)}
        return batch

    def _augmented(self, example: Example, row: int) -> np.ndarray:
        if not self._augment.random:
            return self._plain("train", example)
        rng = stream.rng(self._seed, stream.EXAMPLE, row)
        form = self._crop_of("train"), self._interpolation, self._squash
        return self._augment.apply(example["image"], rng, self._size, *form)

    def _eval_step(self, split: str, step: int) -> Batch:
        size = len(self._sources[split])
        return self._eval_batch(split, [r if r < size else -1 for r in self._row_numbers(step)])

    def _eval_batch(self, split: str, index: list[int]) -> Batch:
        """Rows at the given positions; -1 gives padding."""
        source = self._sources[split]
        examples = [source[i] for i in index if i >= 0]
        return self._batch([self._plain(split, e) for e in examples], [e["label"] for e in examples], index)

    def _plain(self, split: str, example: Example) -> np.ndarray:
        crop = self._crop_of(split)
        return transforms.evaluate(example["image"], self._size, crop, self._interpolation, squash=self._squash)

    def _crop_of(self, split: str) -> float:
        return 1.0 if self._sources[split].cropped else self._crop

    def _batch(self, images: list[np.ndarray], labels: list[int], index: list[int]) -> Batch:
        """Batch whose first rows are given and whose other rows (index -1) are zero."""
        image = np.zeros((len(index), *self._size, 3), np.float32)
        label = np.zeros(len(index), np.int32)
        if images:
            image[: len(images)] = transforms.normalise(np.stack(images), self._mean, self._std)
            label[: len(labels)] = labels
        position = np.asarray(index, np.int64)
        return {"image": image, "label": label, "valid": position >= 0, "index": position}

    def _stream(self, make: Callable[[int], Batch], start: int, stop: int) -> Iterator[Batch]:
        return stream.batches(make, start, stop, prefetch=self._prefetch, workers=self._workers)


def from_config(
    config: Any,
    *,
    seed: int,
    batch_size: int,
    image_size: tuple[int, int],
    preprocess: Preprocess | None = None,
    rows: Sequence[int] | None = None,
    more: Source | None = None,
) -> ImageData:
    """Data that `config.data` describes.

    Args:
      config: mapping with `name, train_split, eval_split, path, workers, prefetch, augment, crop_scale, flip, jitter,
        randaugment, mixup, cutmix, erase`; also, where present, `hue`, `repeats`, `cache` and the options `n, classes`
        of "procedural". An empty `train_split` means evaluation only.
      seed, batch_size, image_size, rows: as for `ImageData`.
      preprocess: evaluation transform and normalisation; None = crop 0.875, bicubic, mean and std 0.5.
      more: examples that join those of the training split (or are all of them, where it is empty), for example some
        whose labels mean nothing; cropped as for evaluation where the others are.

    Raises:
      InputError: as `sources.open_source`, `Augment` and `ImageData`.
    """
    augment = augment_of(config)
    name, path = config["name"], config["path"]
    options: dict[str, Any] = {"path": path} if path else {}
    if name == "procedural":
        options["image_size"] = image_size
        options.update({k: config[k] for k in ("n", "classes") if k in config})
    train_split, eval_split = config["train_split"], config["eval_split"]
    train = sources.open_source(name, train_split, **options) if train_split else None
    names = ("crop", "interpolation", "mean", "std", "squash")
    form = {} if preprocess is None else {k: getattr(preprocess, k) for k in names}
    evaluation = sources.open_source(name, eval_split, **options)
    if more is not None:
        first = sources.Subset(evaluation, range(0)) if train is None else train
        if first.cropped and not more.cropped:
            shape: dict[str, Any] = {"crop": 0.875, "interpolation": "bicubic", "squash": False} | form
            more = sources.Cropped(more, image_size, shape["crop"], shape["interpolation"], shape["squash"])
        train = sources.Joined(first, more)
    return ImageData(
        train,
        evaluation,
        seed=seed,
        batch_size=batch_size,
        image_size=image_size,
        augment=augment,
        workers=config["workers"],
        prefetch=config["prefetch"],
        repeats=config.get("repeats", 1),
        cache=config.get("cache"),
        rows=rows,
        **form,
    )


def batch_shapes(
    config: Any, *, batch_size: int, image_size: tuple[int, int], training: bool
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of what a global batch of `config.data` holds, on the devices (where int64 is int32); no source
    is opened.

    Raises:
      InputError: as `Augment`.
    """
    rows, ints, floats = (batch_size,), np.dtype(np.int32), np.dtype(np.float32)
    shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {
        "image": ((batch_size, *image_size, 3), floats),
        "label": (rows, ints),
        "valid": (rows, np.dtype(bool)),
        "index": (rows, ints),
    }
    if training and augment_of(config).mixes:
        shapes |= {"label2": (rows, ints), "lam": (rows, floats)}
    return shapes


def augment_of(config: Any) -> Augment:
    """The augmentation that `config.data` describes.

    Raises:
      InputError: as `Augment`.
    """
    return Augment(
        geometry=config["augment"],
        flip=config["flip"],
        crop_scale=tuple(config["crop_scale"]),
        jitter=config["jitter"],
        hue=config.get("hue", 0.0),
        randaugment=tuple(config["randaugment"]),
        erase=config["erase"],
        mixup=config["mixup"],
        cutmix=config["cutmix"],
    )
