# SPDX-License-Identifier: Apache-2.0
"""Frames of a batch of samples, one after the other and yet where they lie: what a tower that takes `[B, H, W, C]` does
with `[B, F, H, W, C]` whose samples lie over `(data, fsdp)` and whose frames lie over `context`, or over `slice` and
`context` (`mesh.frame_axes`).

A plain reshape to `[B F, ...]` would move frames between devices wherever a device has more than one sample; the order
here is that of the devices, and nothing moves. Under no mesh it is a plain reshape.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from vtjax.parallel import rules
from vtjax.parallel.mesh import BATCH_AXES, axes_size, frame_axes
from vtjax.parallel.rules import ambient


def join(x: Array) -> Array:
    """`[B, F, ...]` -> `[B F', ...]`, where F' >= F divides over the devices: fewer frames than devices are filled
    up with zeros."""
    x = jnp.pad(x, ((0, 0), (0, padding(x.shape[1])), *((0, 0),) * (x.ndim - 2)))
    samples, devices, along = _grid(x.shape[0])
    b, f, *rest = x.shape
    if samples * devices == 1:
        return x.reshape(b * f, *rest)
    x = jax.lax.with_sharding_constraint(x, P(BATCH_AXES, along, *_free(rest)))
    x = x.reshape(samples, b // samples, devices, f // devices, *rest).swapaxes(1, 2)
    return jax.lax.with_sharding_constraint(x.reshape(b * f, *rest), P((*BATCH_AXES, *along), *_free(rest)))


def split(x: Array, batch: int) -> Array:
    """What was made of `join`'s frames, `[B F', ...]` -> `[B, F', ...]`."""
    samples, devices, along = _grid(batch)
    f, rest = x.shape[0] // batch, x.shape[1:]
    if samples * devices == 1:
        return x.reshape(batch, f, *rest)
    x = jax.lax.with_sharding_constraint(x, P((*BATCH_AXES, *along), *_free(rest)))
    x = x.reshape(samples, devices, batch // samples, f // devices, *rest).swapaxes(1, 2)
    return jax.lax.with_sharding_constraint(x.reshape(batch, f, *rest), P(BATCH_AXES, along, *_free(rest)))


def constrain(x: Array) -> Array:
    """`x` `[B F, ...]` of `join`, with its first dimension pinned to all axes along which frames lie, where it divides.
    As `rules.constrain` under a mesh that knows no frames."""
    mesh = _mesh()
    if mesh is None:
        return rules.constrain(x)
    axes = (*BATCH_AXES, *frame_axes(mesh))
    if x.ndim == 0 or x.shape[0] % axes_size(mesh, axes):
        return x
    return jax.lax.with_sharding_constraint(x, P(axes, *_free(x.shape[1:])))


def visual(x: Array) -> Array:
    """Visual tokens `[B, M, D]`, frame by frame, pinned to where their frames lie, where they divide."""
    samples, devices, along = _grid(x.shape[0])
    if samples * devices == 1 or x.shape[1] % devices:
        return x
    return jax.lax.with_sharding_constraint(x, P(BATCH_AXES, along, *_free(x.shape[2:])))


def padding(frames: int) -> int:
    """How many frames are missing for the devices of the ambient mesh."""
    return -frames % _grid(0)[1]


def order(frames: int, devices: int, stripe: bool) -> list[int]:
    """Which frame stands at which place of a batch's second axis, -1 = none: as many as divide over the devices.

    Args:
      stripe: device i gets the frames i, i + devices, ... Where rows of text see all media so far, early frames are
        seen more often, and stretches of neighbours would give the first devices most of the work (spec section 1.6).
    """
    each = -(-frames // devices)
    found = [i + j * devices if stripe else i * each + j for i in range(devices) for j in range(each)]
    return [frame if frame < frames else -1 for frame in found]


def _mesh() -> Any:
    """The ambient mesh, where the partitioner has all axes in its hands along which frames lie; else None."""
    mesh = ambient((*BATCH_AXES, "context"))
    return None if mesh is None else ambient((*BATCH_AXES, *frame_axes(mesh)))


def _grid(batch: int) -> tuple[int, int, tuple[str, ...]]:
    """Devices along samples and along frames, and the axes of these; 1 and 1 where there is no mesh, or the samples do
    not divide."""
    mesh = _mesh()
    if mesh is None or batch % axes_size(mesh, BATCH_AXES):
        return 1, 1, ()
    along = frame_axes(mesh)
    return axes_size(mesh, BATCH_AXES), axes_size(mesh, along), along


def _free(rest: list[int] | tuple[int, ...]) -> list[object]:
    return [P.UNCONSTRAINED] * len(rest)
