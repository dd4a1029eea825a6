# SPDX-License-Identifier: Apache-2.0
"""`partial_softmax.forward` and `backward` as Pallas kernels for TPUs.

Three kernels: the forward pass, dQ, and dK and dV. dQ is a kernel of its own and comes first, so that a reduction of dq
over devices can run beside the other one (spec section 1.4). Scores live in VMEM only, statistics are float32, and
what a pair of tiles costs depends on their intervals: nothing, a product, or a product under a mask. A tile of keys
that is not seen is not fetched either.

JAX's own splash attention wants its masks before tracing, whole, and the same on every device; intervals and numbers
are data of every batch and device here, which is why these kernels are ours. Their tile sizes come from what VMEM holds
and from arithmetic intensity, compiled for v5e ahead of time; they were not timed on a TPU.

Letters as in `partial_softmax_tiles`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from vtjax.ops import partial_softmax
from vtjax.ops import partial_softmax_tiles as tiles
from vtjax.ops.partial_softmax import Part

DTYPES = (jnp.bfloat16, jnp.float32)

ROWS = 1024
"""Rows that the forward kernel holds: keys and values are read R / ROWS times."""
ROWS_BACK = 512
"""Rows of a tile of the backward kernels, which hold four tiles of scores in place of two."""
KEYS = 512
LANES = 128


def forward(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M K D"],
    v: Float[Array, "B M K D"],
    *,
    low: Int[Array, "B N"],
    high: Int[Array, "B N"],
    number: Int[Array, "B M"],
    scale: float,
    interpret: bool = False,
) -> Part:
    """`partial_softmax.forward` for bfloat16 and float32. `interpret`: without a TPU, slowly."""
    (b, n, heads, d), kv_heads = q.shape, k.shape[2]
    group = heads // kv_heads
    row_tile, key_tile = tiles.tile(n * group, ROWS, LANES), tiles.tile(k.shape[1], KEYS, LANES)
    rows, keys = tiles.rows(low, high, group, row_tile), tiles.keys(number, key_tile)
    q = tiles.stacked(partial_softmax.of_seeing(low, high, q), kv_heads, row_tile)
    k, v = (tiles.head_major(x, number, key_tile) for x in (k, v))
    grid = (b, kv_heads, q.shape[2] // row_tile, k.shape[2] // key_tile)
    r = Specs(row_tile, key_tile, d, rows_outside=True)
    o, lse = _call(
        functools.partial(_forward_kernel, scale=scale * tiles.LOG2E),
        grid,
        [r.row_wide, r.key_wide, r.key_wide, r.row_ids, r.row_ids, r.key_ids],
        [r.row_wide, r.row_number],
        [(q.shape, jnp.float32), ((b, kv_heads, 1, q.shape[2]), jnp.float32)],
        [(row_tile, 1), (row_tile, 1), (row_tile, d)],
        products=2,
        interpret=interpret,
        name="partial_softmax_forward",
    )(rows.table, keys.table, q, k, v, rows.low, rows.high, keys.number)
    return Part(tiles.unstacked(o, n, heads), tiles.unstacked(lse[:, :, 0], n, heads))


def backward(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M K D"],
    v: Float[Array, "B M K D"],
    do: Float[Array, "B N H D"],
    lse: Float[Array, "B N H"],
    delta: Float[Array, "B N H"],
    *,
    low: Int[Array, "B N"],
    high: Int[Array, "B N"],
    number: Int[Array, "B M"],
    scale: float,
    dtype: Any = None,
    kv_dtype: Any = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H D"], Float[Array, "B M K D"], Float[Array, "B M K D"]]:
    """`partial_softmax.backward` for bfloat16 and float32; sums are float32 whatever the `dtype` of the gradients."""
    (b, n, heads, d), (m, kv_heads) = q.shape, k.shape[1:3]
    dtype = jnp.float32 if dtype is None else dtype
    kv_dtype = dtype if kv_dtype is None else kv_dtype
    group = heads // kv_heads
    row_tile, key_tile = tiles.tile(n * group, ROWS_BACK, LANES), tiles.tile(m, KEYS, LANES)
    rows, keys = tiles.rows(low, high, group, row_tile), tiles.keys(number, key_tile)
    q, do = (tiles.stacked(partial_softmax.of_seeing(low, high, x), kv_heads, row_tile) for x in (q, do))
    k, v = (tiles.head_major(x, number, key_tile) for x in (k, v))
    known = tiles.statistics(lse, delta, kv_heads, row_tile)
    given = rows.table, keys.table, q, k, v, do, *known, rows.low, rows.high, keys.number
    counts = q.shape[2] // row_tile, k.shape[2] // key_tile

    def inside(r: Specs) -> list[pl.BlockSpec]:
        wide = [r.row_wide, r.key_wide, r.key_wide, r.row_wide]
        return [*wide, r.row_number, r.row_number, r.row_ids, r.row_ids, r.key_ids]

    r = Specs(row_tile, key_tile, d, rows_outside=True)
    (dq,) = _call(
        functools.partial(_dq_kernel, scale=scale),
        (b, kv_heads, *counts),
        inside(r),
        [r.row_wide],
        [(q.shape, dtype)],
        [(row_tile, d)],
        products=3,
        interpret=interpret,
        name="partial_softmax_dq",
    )(*given)
    r = Specs(row_tile, key_tile, d, rows_outside=False)
    dk, dv = _call(
        functools.partial(_dkv_kernel, scale=scale),
        (b, kv_heads, *counts[::-1]),
        inside(r),
        [r.key_wide, r.key_wide],
        [(k.shape, kv_dtype)] * 2,
        [(key_tile, d)] * 2,
        products=4,
        interpret=interpret,
        name="partial_softmax_dkv",
    )(*given)
    dk, dv = (x[:, :, :m].transpose(0, 2, 1, 3) for x in (dk, dv))
    return tiles.unstacked(dq, n, heads), dk, dv


class Specs:
    """Which block of what a step of the grid `(batch, key head, outer tile, inner tile)` has before it.

    Where a pair of tiles is not seen, the first block along the inner axis stands for the one that is not needed: a
    run of such pairs fetches one block.
    """

    def __init__(self, row_tile: int, key_tile: int, d: int, rows_outside: bool) -> None:
        def places(b: Any, outer: Any, inner: Any, rows: Any, keys: Any) -> tuple[Any, Any]:
            i, j = (outer, inner) if rows_outside else (inner, outer)
            inner = jnp.where(tiles.visible(_entries(rows, b, i), _entries(keys, b, j)), inner, 0)
            return (outer, inner) if rows_outside else (inner, outer)

        def row(b: Any, *step: Any) -> Any:
            return places(b, *step)[0]

        def key(b: Any, *step: Any) -> Any:
            return places(b, *step)[1]

        self.row_wide = pl.BlockSpec((None, None, row_tile, d), lambda b, h, *s: (b, h, row(b, *s), 0))
        self.key_wide = pl.BlockSpec((None, None, key_tile, d), lambda b, h, *s: (b, h, key(b, *s), 0))
        self.row_number = pl.BlockSpec((None, None, 1, row_tile), lambda b, h, *s: (b, h, 0, row(b, *s)))
        self.row_ids = pl.BlockSpec((None, 1, row_tile), lambda b, h, *s: (b, 0, row(b, *s)))
        self.key_ids = pl.BlockSpec((None, 1, key_tile), lambda b, h, *s: (b, 0, key(b, *s)))


def _call(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    inside: list[pl.BlockSpec],
    outside: list[pl.BlockSpec],
    results: list[tuple[Any, Any]],
    scratch: list[tuple[int, int]],
    *,
    products: int,
    interpret: bool,
    name: str,
) -> Callable[..., Any]:
    def run(*given: Any) -> Any:
        shapes = [tiles.result(s, t, *given) for s, t in results]
        return pl.pallas_call(
            kernel,
            out_shape=shapes,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=grid,
                in_specs=inside,
                out_specs=outside,
                scratch_shapes=[pltpu.VMEM(s, jnp.float32) for s in scratch],
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",)),
            cost_estimate=tiles.cost(given[2:], shapes, products),
            interpret=interpret,
            name=name,
        )(*given)

    return run


def _entries(table: Any, b: Any, i: Any) -> tuple[Any, ...]:
    return tuple(table[b, e, i] for e in range(table.shape[1]))


def _at(rows: Any, keys: Any, i: Any, j: Any, step: Callable[[bool], None]) -> None:
    """`step(masked)` where the pair of tiles is seen."""
    b = pl.program_id(0)
    row, key = _entries(rows, b, i), _entries(keys, b, j)
    whole = tiles.whole(row, key)
    pl.when(whole)(lambda: step(False))
    pl.when(tiles.visible(row, key) & ~whole)(lambda: step(True))


def _first() -> Any:
    return pl.program_id(3) == 0


def _last() -> Any:
    return pl.program_id(3) == pl.num_programs(3) - 1


def _column(row: Array) -> Array:
    """`[1, R]` -> `[R, 1]`."""
    return jnp.expand_dims(row[0], -1)


def _forward_kernel(rows, keys, q, k, v, low, high, number, o, lse, top, total, acc, *, scale):
    @pl.when(_first())
    def _() -> None:
        top[...] = jnp.full(top.shape, -jnp.inf, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    def step(masked: bool) -> None:
        z = tiles.dot(q[...], k[...], tiles.WIDTHS) * scale
        if masked:
            z = jnp.where(tiles.seen(_column(low[...]), _column(high[...]), number[...]), z, -jnp.inf)
        new = jnp.maximum(top[...], z.max(1, keepdims=True))
        base = jnp.where(new == -jnp.inf, 0.0, new)
        weight, kept = jnp.exp2(z - base), jnp.exp2(top[...] - base)
        top[...] = new
        total[...] = total[...] * kept + weight.sum(1, keepdims=True)
        acc[...] = acc[...] * kept + tiles.dot(weight.astype(v.dtype), v[...], tiles.PLAIN)

    _at(rows, keys, pl.program_id(2), pl.program_id(3), step)

    @pl.when(_last())
    def _() -> None:
        some = total[...] != 0
        safe = jnp.where(some, total[...], 1.0)
        o[...] = jnp.where(some, acc[...] / safe, 0.0)
        natural = jnp.where(some, (top[...] + jnp.log2(safe)) / tiles.LOG2E, -jnp.inf)
        lse[...] = natural.T


def _dq_kernel(rows, keys, q, k, v, do, lse, delta, low, high, number, dq, acc, *, scale):
    @pl.when(_first())
    def _() -> None:
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    def step(masked: bool) -> None:
        z = tiles.dot(q[...], k[...], tiles.WIDTHS) * (scale * tiles.LOG2E)
        if masked:
            z = jnp.where(tiles.seen(_column(low[...]), _column(high[...]), number[...]), z, -jnp.inf)
        p = jnp.exp2(z - _column(lse[...]))
        ds = p * (tiles.dot(do[...], v[...], tiles.WIDTHS) - _column(delta[...]))
        acc[...] += tiles.dot(ds.astype(k.dtype), k[...], tiles.PLAIN)

    _at(rows, keys, pl.program_id(2), pl.program_id(3), step)

    @pl.when(_last())
    def _() -> None:
        dq[...] = (acc[...] * scale).astype(dq.dtype)


def _dkv_kernel(rows, keys, q, k, v, do, lse, delta, low, high, number, dk, dv, acc_k, acc_v, *, scale):
    """Keys down, rows across: what a row has lies along the lanes, as it came."""

    @pl.when(_first())
    def _() -> None:
        acc_k[...] = jnp.zeros(acc_k.shape, jnp.float32)
        acc_v[...] = jnp.zeros(acc_v.shape, jnp.float32)

    def step(masked: bool) -> None:
        z = tiles.dot(k[...], q[...], tiles.WIDTHS) * (scale * tiles.LOG2E)
        if masked:
            z = jnp.where(tiles.seen(low[...], high[...], _column(number[...])), z, -jnp.inf)
        p = jnp.exp2(z - lse[...])
        acc_v[...] += tiles.dot(p.astype(do.dtype), do[...], tiles.PLAIN)
        ds = p * (tiles.dot(v[...], do[...], tiles.WIDTHS) - delta[...])
        acc_k[...] += tiles.dot(ds.astype(q.dtype), q[...], tiles.PLAIN)

    _at(rows, keys, pl.program_id(3), pl.program_id(2), step)

    @pl.when(_last())
    def _() -> None:
        dk[...] = (acc_k[...] * scale).astype(dk.dtype)
        dv[...] = acc_v[...].astype(dv.dtype)
