# SPDX-License-Identifier: Apache-2.0
"""`partial_softmax.forward` and `backward` as Pallas kernels for NVIDIA GPUs, through Triton.

The kernels of `partial_softmax_tpu` as GPUs want them: a program has one tile of rows (of keys, for dK and dV) and goes
through the tiles of the other side that it sees, by a list: first those seen entirely, then those under a mask. A list
in place of a test in the loop leaves the loop to Triton's pipelining.

These kernels HAVE NOT RUN ON A GPU: they are tested interpreted on a CPU, and lowered for CUDA; Triton compiles what
they are lowered to for compute capability 8.0 and 9.0, with tensor cores and pipelined loads in at most 99 KB of shared
memory up to D = 128. `Shape`s are those that are common for Triton flash attention, not timed;
`experiments/lvxattn/kernels.py` times them and others. Triton rather than Mosaic GPU, as
the latter is for Hopper and newer, and the paper's devices are Ampere.

Letters as in `partial_softmax_tiles`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from vtjax.ops import partial_softmax
from vtjax.ops import partial_softmax_tiles as tiles
from vtjax.ops.partial_softmax import Part

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
LEAST = 16
"""The smallest tile of a product in Triton; sizes are powers of two."""
PROGRAMS = 128
"""About as many as GPUs have multiprocessors. With fewer the keys of the forward pass are split, as in decoding."""


class Shape(NamedTuple):
    """Sizes of a kernel for 2-byte inputs and D up to 128; half of both tiles for float32, or for twice the width.

    Attributes:
      rows, keys: of a tile, powers of two.
      warps, stages: of a program, and of the pipeline of its loop.
    """

    rows: int
    keys: int
    warps: int
    stages: int


FORWARD = Shape(128, 64, 8, 3)
DQ = Shape(128, 32, 8, 3)
DKV = Shape(32, 128, 8, 3)


def forward(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M K D"],
    v: Float[Array, "B M K D"],
    *,
    low: Int[Array, "B N"],
    high: Int[Array, "B N"],
    number: Int[Array, "B M"],
    scale: float,
    shape: Shape = FORWARD,
    interpret: bool = False,
) -> Part:
    """`partial_softmax.forward` for bfloat16, float16 and float32. `interpret`: without a GPU, slowly."""
    (b, n, heads, d), (m, kv_heads) = q.shape, k.shape[1:3]
    row_tile, key_tile = _tile_sizes(shape, q, k)
    programs = b * kv_heads * -(-n * heads // (kv_heads * row_tile))
    pieces = min(PROGRAMS // programs, m // (4 * key_tile))
    if pieces > 1:
        more: dict[str, Any] = {"low": low, "high": high, "scale": scale, "shape": shape, "interpret": interpret}
        return _in_pieces(pieces, q, k, v, number=number, **more)
    rows, keys = tiles.rows(low, high, heads // kv_heads, row_tile), tiles.keys(number, key_tile)
    q = _widened(tiles.stacked(partial_softmax.of_seeing(low, high, q), kv_heads, row_tile))
    k, v = (_widened(tiles.head_major(x, number, key_tile)) for x in (k, v))
    order, counts = _lists(rows, keys)
    ids = rows.low[:, 0], rows.high[:, 0], keys.number[:, 0]
    mine, all_keys, my_ids = _wide(q, row_tile), _wide(k), _ids(ids[0], row_tile)
    o, lse = _call(
        functools.partial(_forward_kernel, tile=key_tile, scale=scale * tiles.LOG2E),
        (q.shape[2] // row_tile, kv_heads, b),
        [_list(order), _list(counts), mine, all_keys, all_keys, my_ids, my_ids, _ids(ids[2])],
        [mine, _statistics(q, row_tile)],
        [(q.shape, jnp.float32), (q.shape[:3], jnp.float32)],
        shape,
        products=2,
        interpret=interpret,
        name="partial_softmax_forward",
    )(order, counts, q, k, v, *ids)
    return Part(tiles.unstacked(o[..., :d], n, heads), tiles.unstacked(lse, n, heads))


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
    dq_shape: Shape = DQ,
    dkv_shape: Shape = DKV,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H D"], Float[Array, "B M K D"], Float[Array, "B M K D"]]:
    """`partial_softmax.backward` for bfloat16, float16 and float32; sums are float32 whatever the `dtype`."""
    (b, n, heads, d), (m, kv_heads) = q.shape, k.shape[1:3]
    dtype = jnp.float32 if dtype is None else dtype
    kv_dtype = dtype if kv_dtype is None else kv_dtype
    least = [_tile_sizes(shape, q, k) for shape in (dq_shape, dkv_shape)]
    # Both kernels read the same arrays: the larger tiles decide how far these are padded.
    most = max(r for r, _ in least), max(c for _, c in least)
    q, do = (_widened(tiles.stacked(partial_softmax.of_seeing(low, high, x), kv_heads, most[0])) for x in (q, do))
    k, v = (_widened(tiles.head_major(x, number, most[1])) for x in (k, v))
    known = [x[:, :, 0] for x in tiles.statistics(lse, delta, kv_heads, most[0])]

    def ids(row_tile: int, key_tile: int) -> tuple[tiles.Rows, tiles.Keys]:
        return tiles.rows(low, high, heads // kv_heads, row_tile, most[0]), tiles.keys(number, key_tile, most[1])

    def given(rows: tiles.Rows, keys: tiles.Keys) -> list[Array]:
        return [q, k, v, do, *known, rows.low[:, 0], rows.high[:, 0], keys.number[:, 0]]

    row_tile, key_tile = least[0]
    rows, keys = ids(row_tile, key_tile)
    lists = _lists(rows, keys)
    mine, all_keys = _wide(q, row_tile), _wide(k)
    my_ids, my_known = _ids(rows.low[:, 0], row_tile), _statistics(q, row_tile)
    (dq,) = _call(
        functools.partial(_dq_kernel, tile=key_tile, scale=scale),
        (q.shape[2] // row_tile, kv_heads, b),
        [
            *map(_list, lists),
            mine,
            all_keys,
            all_keys,
            mine,
            my_known,
            my_known,
            my_ids,
            my_ids,
            _ids(keys.number[:, 0]),
        ],
        [mine],
        [(q.shape, dtype)],
        dq_shape,
        products=3,
        interpret=interpret,
        name="partial_softmax_dq",
    )(*lists, *given(rows, keys))
    row_tile, key_tile = least[1]
    rows, keys = ids(row_tile, key_tile)
    lists = _lists(rows, keys, of_keys=True)
    all_rows, mine = _wide(q), _wide(k, key_tile)
    all_ids, all_known = _ids(rows.low[:, 0]), _statistics(q)
    dk, dv = _call(
        functools.partial(_dkv_kernel, tile=row_tile, scale=scale),
        (k.shape[2] // key_tile, kv_heads, b),
        [*map(_list, lists), all_rows, mine, mine, all_rows, all_known, all_known, all_ids, all_ids,
         _ids(keys.number[:, 0], key_tile)],
        [mine, mine],
        [(k.shape, kv_dtype)] * 2,
        dkv_shape,
        products=4,
        interpret=interpret,
        name="partial_softmax_dkv",
    )(*lists, *given(rows, keys))  # fmt: skip
    dk, dv = (x[:, :, :m, :d].transpose(0, 2, 1, 3) for x in (dk, dv))
    return tiles.unstacked(dq[..., :d], n, heads), dk, dv


def _in_pieces(
    count: int, q: Array, k: Array, v: Array, *, low: Array, high: Array, number: Array, **more: Any
) -> Part:
    """`forward` with as many programs for each row: pieces of the keys as entries of the batch, merged."""
    b, m = number.shape
    size = -(-m // count)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, size * count - m), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(b * count, size, *x.shape[2:])

    q, low, high = (jnp.repeat(x, count, axis=0) for x in (q, low, high))
    part = forward(q, cut(k), cut(v), low=low, high=high, number=cut(number), **more)
    o, lse = (jnp.moveaxis(x.reshape(b, count, *x.shape[1:]), 1, 0) for x in part)
    return partial_softmax.merge_all(Part(o, lse))


def _tile_sizes(shape: Shape, q: Array, k: Array) -> tuple[int, int]:
    """Rows and keys of a tile, no more than there are."""
    sizes = q.shape[1] * q.shape[2] // k.shape[2], k.shape[1]
    part = max(q.dtype.itemsize // 2, 1) * max(_power_of_two(q.shape[3]) // 128, 1)
    r, c = (max(min(t // part, _power_of_two(s)), LEAST) for t, s in zip(shape, sizes, strict=False))
    return r, c


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _widened(x: Array) -> Array:
    """Head width padded to what Triton takes."""
    more = max(_power_of_two(x.shape[-1]), LEAST) - x.shape[-1]
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, more),)) if more else x


def _lists(rows: tiles.Rows, keys: tiles.Keys, of_keys: bool = False) -> tuple[Array, Array]:
    """For each tile of rows (of keys) the tiles of the other side `[B, T, S]`, those seen entirely first, then those
    seen in part; and how many there are of the first, and of both `[B, T, 2]`."""
    row = tuple(jnp.moveaxis(rows.table, 1, 0)[:, :, :, None])
    key = tuple(jnp.moveaxis(keys.table, 1, 0)[:, :, None])
    whole, visible = tiles.whole(row, key), tiles.visible(row, key)
    if of_keys:
        whole, visible = whole.swapaxes(1, 2), visible.swapaxes(1, 2)
    order = jnp.argsort(jnp.where(whole, 0, jnp.where(visible, 1, 2)), axis=-1, stable=True)
    return order.astype(jnp.int32), jnp.stack([whole.sum(-1), visible.sum(-1)], -1).astype(jnp.int32)


# What a program `(tile, key head, batch)` has before it: its own tile, or all.


def _wide(x: Array, tile: int | None = None) -> pl.BlockSpec:
    """`[B, K, X, D]`."""
    return pl.BlockSpec((None, None, tile or x.shape[2], x.shape[3]), lambda i, h, b: (b, h, i if tile else 0, 0))


def _statistics(x: Array, tile: int | None = None) -> pl.BlockSpec:
    """`[B, K, X]` of the rows of x."""
    return pl.BlockSpec((None, None, tile or x.shape[2]), lambda i, h, b: (b, h, i if tile else 0))


def _ids(x: Array, tile: int | None = None) -> pl.BlockSpec:
    """`[B, X]`."""
    return pl.BlockSpec((None, tile or x.shape[1]), lambda i, h, b: (b, i if tile else 0))


def _list(x: Array) -> pl.BlockSpec:
    """`[B, T, S]`."""
    return pl.BlockSpec((None, None, x.shape[2]), lambda i, h, b: (b, i, 0))


def _call(
    kernel: Callable[..., None],
    grid: tuple[int, int, int],
    inside: list[pl.BlockSpec],
    outside: list[pl.BlockSpec],
    results: list[tuple[Any, Any]],
    shape: Shape,
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
            grid=grid,
            in_specs=inside,
            out_specs=outside,
            compiler_params=pltriton.CompilerParams(num_warps=shape.warps, num_stages=shape.stages),
            cost_estimate=tiles.cost(given[2:], shapes, products),
            interpret=interpret,
            name=name,
        )(*given)

    return run


def _over(order: Any, counts: Any, tile: int, step: Callable[..., Any], start: Any) -> Any:
    """`step(slice, masked, carry)` for every tile of the list."""

    def at(masked: bool) -> Callable[[Any, Any], Any]:
        return lambda s, carry: step(pl.ds(order[s] * tile, tile), masked, carry)

    return lax.fori_loop(counts[0], counts[1], at(True), lax.fori_loop(0, counts[0], at(False), start))


def _forward_kernel(order, counts, q, k, v, low, high, number, o, lse, *, tile, scale):
    queries, first, last = q[...], low[...], high[...]

    def step(at: Any, masked: bool, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        acc, top, total = carry
        z = tiles.dot(queries, k[at, :], tiles.WIDTHS) * scale
        if masked:
            z = jnp.where(tiles.seen(first[:, None], last[:, None], number[at][None]), z, -jnp.inf)
        new = jnp.maximum(top, z.max(1))
        base = jnp.where(new == -jnp.inf, 0.0, new)
        weight, kept = jnp.exp2(z - base[:, None]), jnp.exp2(top - base)
        acc = acc * kept[:, None] + tiles.dot(weight.astype(v.dtype), v[at, :], tiles.PLAIN)
        return acc, new, total * kept + weight.sum(1)

    rows = len(queries)
    start = jnp.zeros(queries.shape, jnp.float32), jnp.full((rows,), -jnp.inf, jnp.float32), jnp.zeros((rows,))
    acc, top, total = _over(order, counts, tile, step, start)
    some = total != 0
    safe = jnp.where(some, total, 1.0)
    o[...] = jnp.where(some[:, None], acc / safe[:, None], 0.0)
    lse[...] = jnp.where(some, (top + jnp.log2(safe)) / tiles.LOG2E, -jnp.inf)


def _dq_kernel(order, counts, q, k, v, do, lse, delta, low, high, number, dq, *, tile, scale):
    queries, outer, first, last = q[...], do[...], low[...][:, None], high[...][:, None]
    total, change = lse[...][:, None], delta[...][:, None]

    def step(at: Any, masked: bool, acc: Array) -> Array:
        keys = k[at, :]
        z = tiles.dot(queries, keys, tiles.WIDTHS) * (scale * tiles.LOG2E)
        if masked:
            z = jnp.where(tiles.seen(first, last, number[at][None]), z, -jnp.inf)
        ds = jnp.exp2(z - total) * (tiles.dot(outer, v[at, :], tiles.WIDTHS) - change)
        return acc + tiles.dot(ds.astype(keys.dtype), keys, tiles.PLAIN)

    acc = _over(order, counts, tile, step, jnp.zeros(queries.shape, jnp.float32))
    dq[...] = (acc * scale).astype(dq.dtype)


def _dkv_kernel(order, counts, q, k, v, do, lse, delta, low, high, number, dk, dv, *, tile, scale):
    keys, values, mine = k[...], v[...], number[...][:, None]

    def step(at: Any, masked: bool, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        queries, outer = q[at, :], do[at, :]
        z = tiles.dot(keys, queries, tiles.WIDTHS) * (scale * tiles.LOG2E)
        if masked:
            z = jnp.where(tiles.seen(low[at][None], high[at][None], mine), z, -jnp.inf)
        p = jnp.exp2(z - lse[at][None])
        ds = p * (tiles.dot(values, outer, tiles.WIDTHS) - delta[at][None])
        acc_k, acc_v = carry
        acc_v = acc_v + tiles.dot(p.astype(outer.dtype), outer, tiles.PLAIN)
        return acc_k + tiles.dot(ds.astype(queries.dtype), queries, tiles.PLAIN), acc_v

    start = jnp.zeros(keys.shape, jnp.float32)
    acc_k, acc_v = _over(order, counts, tile, step, (start, start))
    dk[...] = (acc_k * scale).astype(dk.dtype)
    dv[...] = acc_v.astype(dv.dtype)
