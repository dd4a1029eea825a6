# SPDX-License-Identifier: Apache-2.0
"""LV-XAttn: a multimodal model whose text attends to the frames of long videos that lie over a mesh axis; the method is
`vtjax.parallel.xattn`.

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
from vtjax.parallel import frames, kernels, mesh
from vtjax.parallel.strategies import STRATEGIES
from vtjax.parallel.xattn import attend_over
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
    check_choice("config.attend.wire", config.attend.wire, ("", "float32"))
    check_choice("config.data.name", config.data.name, ("", "needle"))
    task = vlm.build(config, **distributed(config))
    spec: Any = task.spec
    cross = spec.bridge.cross
    if cross is None:
        raise InputError("config.model.bridge.cross must be a form of cross-attention for config.attend, found 'none'")
    if config.mesh.slice > 1 and config.attend.strategy not in ("auto", "gather_q"):
        raise InputError(
            f"config.attend.strategy must be auto or gather_q with frames over several slices "
            f"(config.mesh.slice={config.mesh.slice}), found {config.attend.strategy!r}"
        )
    heads = cross.kv_heads or spec.decoder.blocks[cross.layers[0]].kv_heads
    if config.attend.strategy == "ulysses":
        context, tensor = config.mesh.context, config.mesh.tensor
        if -1 in (context, tensor):
            shape = mesh.make(config.mesh).shape
            context, tensor = shape["context"], shape["tensor"]
        own = heads // tensor if heads % tensor == 0 else heads  # as cross_attention splits them
        if own % context:
            raise InputError(
                f"config.attend.strategy='ulysses' needs key heads that divide over config.mesh.context={context}, "
                f"found {own}"
            )
    # Counted for prompts of one image; a video has many.
    known = {name: value for name, value in task.summary.items() if name != "macs_per_prompt"}
    given = {name: config.attend[name] for name in ("strategy", "stripe")}
    return dataclasses.replace(task, frames=OVER, summary={**known, **given})


def distributed(config: ConfigDict) -> dict[str, Any]:
    """The options of `VLM` by which frames and attention are distributed over the ambient mesh."""
    options = {name: config.attend[name] for name in ("strategy", "check_vma", "kernel")}
    options["wire"] = config.attend.wire or None
    slices = config.mesh.slice > 1
    axis = ("slice", "context") if slices else "context"
    return {
        "attend": attend_over(None, axis, slow=slices, **options),
        "frames": Frames(frames.join, frames.split, frames.constrain, frames.visual),
    }


def options(config: ConfigDict) -> dict[str, Any]:
    """All options of `VLM`."""
    return {**vlm.options(config), **distributed(config)}


def data(config: ConfigDict, task: Task) -> Data:
    """The questions, with the frames that this process's devices hold, in their order."""
    places = order(config)
    mine = mesh.local_frames(mesh.make(config.mesh), len(places))
    return vlm.data(config, task, frame_order=[places[place] for place in mine])


def order(config: ConfigDict) -> list[int]:
    """Which frame stands where (`frames.order`)."""
    made = mesh.make(config.mesh)
    devices = mesh.axes_size(made, mesh.frame_axes(made))
    return frames.order(config.data.frames, devices, config.attend.stripe)


def batch_shapes(config: ConfigDict, task: Task, training: bool) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """For `vtjax aot`: the arrays of a global batch, rows of `config.data.limit` tokens and `config.data.frames`
    frames, filled up to a multiple of the devices along them (`config.mesh` without -1)."""
    spec: Any = task.spec
    assert isinstance(spec, VLMSpec)
    size, ints = spec.image_size, np.dtype(np.int32)
    shapes = question_loader.batch_shapes(config.data, batch_size=config.batch_size, image_size=size)
    (rows, length), (images, floats) = shapes["input_ids"][0], shapes["images"]
    devices = config.mesh.context * config.mesh.slice
    many = -(-config.data.frames // devices) * devices
    return {
        **shapes,
        "images": ((rows, many, *images[1:]), floats),
        "image_number": ((rows, many), ints),
        "image_interval": ((rows, length, 2), ints),
    }


def deploy(config: ConfigDict, task: Task, rows: Any, dense: Any) -> Any:
    """Raises InputError: `vtjax bench` knows one device."""
    raise InputError("vtjax bench compares models on one device; python -m experiments.lvxattn.links times these")
