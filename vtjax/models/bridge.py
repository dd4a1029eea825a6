# SPDX-License-Identifier: Apache-2.0
"""From a tower's tokens to a decoder's width. The projector's parameter names are an API."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vtjax.models.layers import Dense, identity
from vtjax.ops import linear
from vtjax.spec import BridgeSpec


def _join(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])


def _split(x: Array, batch: int) -> Array:
    return x.reshape(batch, -1, *x.shape[1:])


@dataclasses.dataclass(frozen=True)
class Frames:
    """How the images of a batch go through a tower, which takes them one by one.

    Attributes:
      join: `[B, I, ...]` -> `[B I', ...]`, in any order; I' >= I where images are filled up with zeros.
      split: `([B I', ...], B)` -> `[B, I', ...]`, back in order.
      constrain: applied to the tower's activations `[B I', N, D]`; sharding is injected here.
      visual: the same for visual tokens `[B, M, D]`, image by image; None = the model's own.
    """

    join: Callable[[Array], Array] = _join
    split: Callable[[Array, int], Array] = _split
    constrain: Callable[[Array], Array] = identity
    visual: Callable[[Array], Array] | None = None


class Projector(nn.Module):
    """Two layers with exact GELU between them (LLaVA), or one."""

    spec: BridgeSpec
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N E"]) -> Float[Array, "B N D"]:
        if self.spec.projector == "mlp":
            x = linear.gelu(Dense(self.spec.hidden, self.spec.bias, self.dtype, name="up")(x))
        return Dense(self.width, self.spec.bias, self.dtype, name="down")(x)


def pooled(
    x: Float[Array, "B N E"], live: Int[Array, "B N"], grid: tuple[int, int], pool: tuple[int, int]
) -> tuple[Float[Array, "B M E"], Int[Array, "B M"]]:
    """The mean of the live patches of every window of `pool` rows and columns, tile by tile, and 1 where there are
    any. The mean is taken in float32."""
    (rows, columns), (high, wide) = grid, pool

    def windows(a: Array) -> Array:
        a = a.reshape(len(a), -1, rows // high, high, columns // wide, wide, *a.shape[2:]).swapaxes(3, 4)
        return a.reshape(len(a), -1, high * wide, *a.shape[6:])

    weight = windows(live.astype(jnp.float32))[..., None]
    total = (windows(x.astype(jnp.float32)) * weight).sum(2)
    count = weight.sum(2)
    return (total / jnp.maximum(count, 1.0)).astype(x.dtype), (count[..., 0] > 0).astype(jnp.int32)
