# SPDX-License-Identifier: Apache-2.0
"""What the kernels of `partial_softmax` share: their layout, and which of their tiles need not be looked at.

Letters: B batch, N rows of the text, M visual tokens, H query heads, K key and value heads, G = H / K, D head width,
R = N G rows of a kernel. The G heads of a group lie on the row axis, a row of the text after the other, so that keys
and values are read once for all of them and are never repeated (spec section 3.2); R and M are padded to whole tiles.

A tile of rows sees a tile of keys in part, entirely or not at all, which the smallest and largest interval and number
of either say (spec section 1.5): a pair that is not seen is left out, one that is seen entirely needs no mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import ManualAxisType
from jaxtyping import Array, Bool, Float, Int

from vtjax.ops import linear, partial_softmax

LOG2E = math.log2(math.e)
"""Kernels take powers of 2: exp(x) = exp2(x log2 e), and the factor goes into the one that scores have anyway."""

NEVER = 2**31 - 1

WIDTHS = ((1,), (1,))
PLAIN = ((1,), (0,))
"""What a product of two tiles sums over: the widths of both, or as matrices are multiplied."""


class Rows(NamedTuple):
    """Intervals of the rows of a kernel.

    Attributes:
      low, high: `[B, 1, R]` int32, at least 1; (`NEVER`, 0) where a row sees nothing.
      table: `[B, 4, R / tile]`: smallest low, largest high; largest low, smallest high.
    """

    low: Int[Array, "B 1 R"]
    high: Int[Array, "B 1 R"]
    table: Int[Array, "B 4 T"]


class Keys(NamedTuple):
    """Numbers of the keys of a kernel.

    Attributes:
      number: `[B, 1, M]` int32, 0 = padding.
      table: `[B, 3, M / tile]`: smallest and largest number, padding apart (`NEVER`, 0 where there is nothing else);
        the smallest, padding included.
    """

    number: Int[Array, "B 1 M"]
    table: Int[Array, "B 3 T"]


def tile(size: int, most: int, least: int) -> int:
    """The tile that cuts `size` into as few as `most` allows, evenly: a multiple of `least`."""
    count = max(-(-size // most), 1)
    return -(-max(size, 1) // (count * least)) * least


def rows(low: Int[Array, "B N"], high: Int[Array, "B N"], group: int, tile: int, to: int | None = None) -> Rows:
    """Intervals of stacked rows, padded to a multiple of `to` (of `tile`), and their table."""
    low = jnp.maximum(low, 1)
    some = high >= low
    more = _more(low.shape[1] * group, to or tile)
    low, high = (
        jnp.pad(jnp.repeat(jnp.where(some, x, fill), group, axis=1), ((0, 0), (0, more)), constant_values=fill)
        for x, fill in ((low, NEVER), (high, 0))
    )
    a, b = (x.reshape(len(x), -1, tile) for x in (low, high))
    table = jnp.stack([a.min(-1), b.max(-1), a.max(-1), b.min(-1)], 1)
    return Rows(low[:, None], high[:, None], table)


def keys(number: Int[Array, "B M"], tile: int, to: int | None = None) -> Keys:
    """Numbers of keys, padded likewise, and their table."""
    number = jnp.pad(jnp.maximum(number, 0), ((0, 0), (0, _more(number.shape[1], to or tile))))
    a = number.reshape(len(number), -1, tile)
    table = jnp.stack([jnp.where(a > 0, a, NEVER).min(-1), a.max(-1), a.min(-1)], 1)
    return Keys(number[:, None], table)


def visible(row: tuple[Array, ...], key: tuple[Array, ...]) -> Bool[Array, "*T"]:
    """Whether a row of the tile may see a key of the other one; entries of the two tables."""
    return (row[1] >= key[0]) & (row[0] <= key[1])


def whole(row: tuple[Array, ...], key: tuple[Array, ...]) -> Bool[Array, "*T"]:
    """Whether every row sees every key."""
    return (row[2] <= key[2]) & (key[1] <= row[3])


def seen(low: Array, high: Array, number: Array) -> Bool[Array, "*R"]:
    """Which of a tile's scores count: intervals on one axis, numbers on the other."""
    return (low <= number) & (number <= high)


def dot(a: Float[Array, "M N"], b: Float[Array, "*B"], over: Any) -> Float[Array, "*C"]:
    """The product of two tiles over `WIDTHS` or `PLAIN`, in float32."""
    return lax.dot_general(a, b, (over, ((), ())), precision=linear.precision(a), preferred_element_type=jnp.float32)


def stacked(x: Float[Array, "B N H *D"], kv_heads: int, tile: int, fill: float = 0) -> Float[Array, "B K R *D"]:
    """Rows of the text as rows of a kernel, padded."""
    b, n, heads = x.shape[:3]
    x = jnp.moveaxis(x.reshape(b, n, kv_heads, heads // kv_heads, *x.shape[3:]), 2, 1)
    x = x.reshape(b, kv_heads, n * heads // kv_heads, *x.shape[4:])
    more = (0, _more(x.shape[2], tile))
    return jnp.pad(x, ((0, 0), (0, 0), more, *((0, 0),) * (x.ndim - 3)), constant_values=fill)


def unstacked(x: Float[Array, "B K R *D"], n: int, heads: int) -> Float[Array, "B N H *D"]:
    """`stacked` undone."""
    b, kv_heads = x.shape[:2]
    x = x[:, :, : n * heads // kv_heads].reshape(b, kv_heads, n, heads // kv_heads, *x.shape[3:])
    return jnp.moveaxis(x, 1, 2).reshape(b, n, heads, *x.shape[4:])


def head_major(x: Float[Array, "B M K D"], number: Int[Array, "B M"], tile: int) -> Float[Array, "B K padded D"]:
    """Keys or values as a kernel reads them: padding zeroed, more of it behind."""
    x = partial_softmax.without_padding(number, x)
    return jnp.pad(x, ((0, 0), (0, _more(x.shape[1], tile)), (0, 0), (0, 0))).transpose(0, 2, 1, 3)


def _more(size: int, tile: int) -> int:
    """Padding to whole tiles, and to one where there is nothing."""
    return -(-max(size, 1) // tile) * tile - size


def statistics(
    lse: Float[Array, "B N H"], delta: Float[Array, "B N H"], kv_heads: int, tile: int
) -> tuple[Float[Array, "B K 1 R"], Float[Array, "B K 1 R"]]:
    """What the backward kernels subtract from scores in base 2, +inf where a row sees nothing, and from dP."""
    lse, delta = partial_softmax.subtracted(lse, delta)
    return stacked(lse * LOG2E, kv_heads, tile, jnp.inf)[:, :, None], stacked(delta, kv_heads, tile)[:, :, None]


def result(shape: tuple[int, ...], dtype: Any, *of: Array) -> jax.ShapeDtypeStruct:
    """What a kernel gives: under `shard_map`, different wherever one of its arguments is."""
    return jax.ShapeDtypeStruct(
        shape, dtype, manual_axis_type=ManualAxisType(varying=partial_softmax.varying_axes(*of))
    )


def cost(given: Sequence[Array], results: Sequence[Any], products: int) -> pl.CostEstimate:
    """What a kernel costs whose rows see everything. Without it XLA would take a kernel for free, and hide no
    collective behind it (spec section 6.4).

    Args:
      given: its arrays, q `[B, K, R, D]` and k `[B, K, M, D]` first.
      products: matrix products of a pair of tiles.
    """
    (b, kv_heads, r, d), m = given[0].shape, given[1].shape[2]
    pairs = b * kv_heads * r * m
    moved = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in (*given, *results))
    return pl.CostEstimate(flops=2 * products * pairs * d, transcendentals=pairs, bytes_accessed=moved)
