# SPDX-License-Identifier: Apache-2.0
"""The tokens pytree that blocks hand on.

Letters: B batch, N token slots, N0 original tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vtjax.errors import InputError
from vtjax.ops.cross_attention import Memory


@dataclasses.dataclass(frozen=True)
class Lattice:
    """Where a decoder's images are, for what shortens them in place.

    Attributes:
      place: `[B, N]` int32, place of a visual token in its image's grid, row by row; -1 = text.
      asks: `[B, N]` bool, the tokens that routers read.
      halved: `[B, 2]` int32, how often height and width of the grid were halved.
    """

    place: Int[Array, "B N"]
    asks: Bool[Array, "B N"]
    halved: Int[Array, "B 2"]


jax.tree_util.register_dataclass(Lattice, data_fields=["place", "asks", "halved"], meta_fields=[])


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens and what is known about them. Absent fields mean the undiminished case and cost nothing.

    Attributes:
      x: `[B, N, D]` features.
      size: `[B, N]` float32, how many original tokens a token stands for; None = all 1.
      alive: `[B, N]` float32 in {0, 1}, carries gradient; None = all 1. Dead slots stay dead.
      source: `[B, N0]` int32, the slot that holds each original token, -1 = pruned; None = slot i holds token i.
      position: `[B, N]` int32, place in the text, which decoders turn by; None = slot i is at place i.
      segment: `[B, N]` int32, which of several packed texts a token belongs to, 0 = the prefix that all of them share;
        decoders only; None = one text.
      memory: visual tokens that a decoder's cross-attention reads; None = it adds nothing.
      lattice: where a decoder's images and routing tokens are; None = nothing asks.
    """

    x: Float[Array, "B N D"]
    size: Float[Array, "B N"] | None = None
    alive: Float[Array, "B N"] | None = None
    source: Int[Array, "B N0"] | None = None
    position: Int[Array, "B N"] | None = None
    segment: Int[Array, "B N"] | None = None
    memory: Memory | None = None
    lattice: Lattice | None = None

    def replace(self, **fields: Any) -> Tokens:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **fields)

    def first(self) -> Int[Array, " B"] | None:
        """The first live slot of every row; None = slot 0 of all."""
        return None if self.alive is None else jnp.argmax(self.alive > 0.5, axis=1)

    def weights(self) -> Float[Array, "B N"] | None:
        """float32 weight of each slot in a mean over original tokens: size where alive; None = all 1."""
        if self.size is None and self.alive is None:
            return None
        ones = jnp.ones(self.x.shape[:2], jnp.float32)
        return (ones if self.size is None else self.size) * (ones if self.alive is None else self.alive)


jax.tree_util.register_dataclass(
    Tokens, data_fields=["x", "size", "alive", "source", "position", "segment", "memory", "lattice"], meta_fields=[]
)


def to_front(kept: Bool[Array, "B N"], room: int) -> Callable[[Array], Array]:
    """`[B, N, ...] -> [B, room, ...]`: in every row what is kept, in its order, and behind it the rest."""
    order = jnp.argsort(~kept, axis=1, stable=True)[:, :room]
    return lambda a: jnp.take_along_axis(a, order.reshape(*order.shape, *(1,) * (a.ndim - 2)), axis=1)


def check_tokens(tokens: Tokens, prefix: int, **scores: Array) -> None:
    """Refuses tokens that no block can have made. Shapes are looked at always, values only where they are known: inside
    `jit` they are not, and nothing is computed for this.

    Args:
      prefix: leading tokens, which are always live.
      **scores: arrays that decisions are made on, any shape; they must be finite where their token lives, if `[B, N]`
        or `[B, N, ...]`.

    Raises:
      InputError: a shape that does not belong to `x`; `alive` other than 0 or 1, or 0 for a prefix token; a size of a
        live token that is not positive; a source outside -1 .. N - 1; a score that is not finite.
    """
    batch, slots = tokens.x.shape[:2]
    if slots < max(prefix, 1):
        raise InputError(f"tokens must be at least the {max(prefix, 1)} that are protected, found {slots}")
    expected = {"size": (batch, slots), "alive": (batch, slots), "source": (batch,)}
    for name, shape in expected.items():
        value = getattr(tokens, name)
        if value is not None and value.shape[: len(shape)] != shape:
            raise InputError(f"{name} must be {list(shape)} as x {list(tokens.x.shape)}, found {list(value.shape)}")
    for name, value in scores.items():
        if value.shape[:2] != (batch, slots):
            raise InputError(f"{name} must begin with {[batch, slots]} as x does, found {list(value.shape)}")
    if any(isinstance(value, jax.core.Tracer) for value in [*jax.tree.leaves(tokens), *scores.values()]):
        return
    alive = np.ones((batch, slots)) if tokens.alive is None else np.asarray(tokens.alive)
    if not np.isin(alive, (0, 1)).all():
        raise InputError(f"alive must be 0 or 1, found {alive[~np.isin(alive, (0, 1))][0]}")
    if not alive[:, :prefix].all():
        raise InputError(f"alive must be 1 for the {prefix} prefix tokens, found 0")
    live = alive > 0
    if tokens.size is not None and not (size := np.asarray(tokens.size)[live] > 0).all():
        raise InputError(f"size must be positive for live tokens, found {np.asarray(tokens.size)[live][~size][0]}")
    if tokens.source is not None and not (-1 <= (source := np.asarray(tokens.source)).min() <= source.max() < slots):
        raise InputError(f"source must be -1 or a slot below {slots}, found {source.min()} .. {source.max()}")
    for name, value in scores.items():
        if not np.isfinite(np.asarray(value, np.float32)[live]).all():
            raise InputError(f"{name} must be finite for live tokens, found NaN or infinity")
