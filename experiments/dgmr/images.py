# SPDX-License-Identifier: Apache-2.0
"""What a distillation is fed: images, labelled or not, and what the teacher says of them where that is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vtjax.cli import assemble
from vtjax.data import files, loader
from vtjax.errors import InputError
from vtjax.methods import dgmr
from vtjax.spec import ViTSpec
from vtjax.train.task import Batch, closing

Teacher = Callable[[Any], dgmr.Features]
"""Images `[B, H, W, C]` -> features; jitted."""

WHOLE, PATCH = "teacher_whole", "teacher_patch"
"""What a batch holds where the teacher's features are kept: `[b, P, D]` and `[b, T, D]` float32."""


def opened(config: ConfigDict, spec: ViTSpec) -> loader.ImageData:
    """The data of `config.data`, with the images of `config.dgmr.images` among the training images.

    Raises:
      InputError: as `loader.from_config`; a path without images; classes that are not those of a model whose head is a
        classifier.
    """
    more = unlabelled(config.dgmr.images) if config.dgmr.images else None
    data: loader.ImageData = assemble.open_images(config, spec, more=more)
    if config.dgmr.classifier and data.classes != spec.classes:
        raise InputError(
            f"config.data.name={config.data.name!r} must have the {spec.classes} classes of the teacher's head (or set "
            f"config.dgmr.classifier=false), found {data.classes}"
        )
    return data


def unlabelled(path: str) -> files.Files:
    """All images of a folder or an uncompressed tar, at any depth, sorted by name; their labels mean nothing.

    Raises:
      InputError: no such folder or tar, or no images in it.
    """
    root = files.locate(path)
    store = files.Folder(root) if root.is_dir() else files.Tar(root)
    names = sorted(
        name
        for name in store.names
        if name.lower().endswith(files.SUFFIXES) and not any(p.startswith((".", "__MACOSX")) for p in name.split("/"))
    )
    if not names:
        raise InputError(f"config.dgmr.images={path!r} must hold images ({', '.join(files.SUFFIXES)}), found none")
    return files.Files(store, names, [0] * len(names), classes=1, cropped=False)


class Remembered:
    """Data whose training batches hold what the teacher says of their images, so that no step asks it again.

    The features of all training images are computed when training starts, once, and kept in the host's memory, float32.

    Args:
      numbers: that an image has features.

    Raises:
      InputError: images that look different each time, features that take more than `limit_gib`, or several processes.
    """

    def __init__(self, data: loader.ImageData, teacher: Teacher, numbers: int, limit_gib: float):
        if data.varies:
            raise InputError(
                "config.dgmr.cache keeps one feature per training image, which needs images that do not vary: set "
                "config.data.augment=none and leave jitter, hue, randaugment, erase, mixup and cutmix at 0"
            )
        if jax.process_count() > 1:
            raise InputError(f"config.dgmr.cache needs one process, found {jax.process_count()}")
        need = data.train_examples * 4 * numbers / 2**30
        if need > limit_gib:
            raise InputError(
                f"config.dgmr.cache_gib must be at least {need:.1f} to hold the features of {data.train_examples} "
                f"images, found {limit_gib}; or ask the teacher in every step (config.dgmr.cache=false)"
            )
        self.classes, self.train_examples, self.eval_examples = data.classes, data.train_examples, data.eval_examples
        self._data, self._teacher = data, teacher
        self._kept: dict[str, np.ndarray] = {}

    def train(self, start_step: int) -> Iterator[Batch]:
        """As of `ImageData`, with `teacher_whole` and `teacher_patch`."""
        if not self._kept:
            self._kept = self._ask()
        batches = self._data.train(start_step)
        with closing(batches):
            for batch in batches:
                yield {**batch, **{name: kept[batch["index"]] for name, kept in self._kept.items()}}

    def eval(self, split: str = "eval") -> Iterator[Batch]:
        """As of `ImageData`."""
        return self._data.eval(split)

    def draw(self, split: str, index: int) -> Batch:
        """As of `ImageData`."""
        return self._data.draw(split, index)

    def _ask(self) -> dict[str, np.ndarray]:
        parts: dict[str, list[np.ndarray]] = {WHOLE: [], PATCH: []}
        batches = self._data.eval("train")
        with closing(batches):
            for batch in batches:
                found = jax.device_get(self._teacher(batch["image"]))
                for name, value in ((WHOLE, found.whole), (PATCH, found.patch)):
                    parts[name].append(value[batch["valid"]])
        return {name: np.concatenate(values) for name, values in parts.items()}
