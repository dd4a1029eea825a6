# SPDX-License-Identifier: Apache-2.0
"""LV-XAttn: a multimodal model whose text attends to the frames of long videos that lie over a mesh axis; the method is
`vtjax.parallel.cross_attention`.

The task is that of `experiments.vlm`, with three things in place of their local forms: frames go to the tower where
they lie, visual tokens stay there, and attention to them is distributed (`config.attend`). Without a context axis it is
the local model. Letters: B rows, S tokens, F frames.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.vlm import main as vlm
from vtjax.data import question_loader
from vtjax.errors import InputError, check_choice
from vtjax.models.bridge import Frames
from vtjax.parallel import frames, kernels
from vtjax.parallel.cross_attention import attend_over
from vtjax.parallel.strategies import STRATEGIES
from vtjax.spec import VLMSpec
from vtjax.train.task import Data, Task

OVER = ("images", "image_number")
"""What of a batch lies over the context axis, frame by frame."""


def build(config: ConfigDict) -> Task:
    """The task of a config.

    Raises:
      InputError: an unknown strategy or kernel, a bridge without cross-attention, key heads that do not divide over the
        devices with strategy="ulysses", or as `experiments.vlm.main.build`.
    """
    check_choice("config.attend.strategy", config.attend.strategy, ("auto", *STRATEGIES))
    check_choice("config.attend.kernel", config.attend.kernel, ("auto", *kernels.KERNELS))
    task = vlm.build(config, **distributed(config))
    spec: Any = task.spec
    cross = spec.bridge.cross
    if cross is None:
        raise InputError("config.model.bridge.cross must be a form of cross-attention for config.attend, found 'none'")
    heads = cross.kv_heads or spec.decoder.blocks[cross.layers[0]].kv_heads
    if config.attend.strategy == "ulysses" and config.mesh.context > 0 and heads % config.mesh.context:
        raise InputError(
            f"config.attend.strategy='ulysses' needs key heads that divide over config.mesh.context="
            f"{config.mesh.context}, found {heads}"
        )
    given = {name: config.attend[name] for name in ("strategy", "stripe")}
    return dataclasses.replace(task, frames=OVER, summary={**task.summary, **given})


def distributed(config: ConfigDict) -> dict[str, Any]:
    """The options of `VLM` by which frames and attention are distributed over the ambient mesh."""
    options = {name: config.attend[name] for name in ("strategy", "check_vma", "kernel")}
    return {
        "attend": attend_over(None, "context", **options),
        "frames": Frames(frames.join, frames.split, frames.constrain),
    }


def options(config: ConfigDict) -> dict[str, Any]:
    """All options of `VLM`."""
    return {**vlm.options(config), **distributed(config)}


def data(config: ConfigDict, task: Task) -> Data:
    """The questions, with frames in the order in which devices get them."""
    return vlm.data(config, task, frame_order=order(config))


def order(config: ConfigDict) -> list[int]:
    """Which frame stands where (`frames.order`)."""
    from vtjax.parallel import mesh

    return frames.order(config.data.frames, mesh.make(config.mesh).shape["context"], config.attend.stripe)


def batch_shapes(config: ConfigDict, task: Task, training: bool) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """For `vtjax aot`: the arrays of a global batch, rows of `config.data.limit` tokens and `config.data.frames` frames
    (to be a multiple of the context axis)."""
    spec: Any = task.spec
    assert isinstance(spec, VLMSpec)
    size, ints = spec.image_size, np.dtype(np.int32)
    shapes = question_loader.batch_shapes(config.data, batch_size=config.batch_size, image_size=size)
    (rows, length), (images, floats) = shapes["input_ids"][0], shapes["images"]
    return {
        **shapes,
        "images": ((rows, config.data.frames, *images[1:]), floats),
        "image_number": ((rows, config.data.frames), ints),
        "image_interval": ((rows, length, 2), ints),
    }
