# SPDX-License-Identifier: Apache-2.0
"""Cross-attention to a part of the keys, and how parts are put together: everything distributed is built on these.

Letters: B batch, N rows of the text, M visual tokens, H query heads, K key and value heads (a divisor of H), D head
width. A row sees the keys whose number lies in `low .. high`; a number below 1 is padding, which is zeroed before it is
read, so that what it holds reaches nothing.

A part is a pair `(o, lse)`: the softmax over the keys that it has, and the natural logarithm of its denominator. A row
that sees none of them has (0, -inf). `merge` is associative and commutative, and that pair is its identity. Statistics
are float32, or float64 for float64 inputs.

Source: LV-XAttn (arXiv 2502.02406), spec sections 1.2 and 1.4. The released code starts the statistics at 0, which puts
a key of logit 0 and value 0 into every softmax (spec section 7); here they start at -inf.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vtjax.ops import linear

CHUNK = 512
"""Keys whose scores are held at a time: N x H x CHUNK of them."""


class Part(NamedTuple):
    """Softmax attention to some of the keys.

    Attributes:
      o: `[B, N, H, D]`, 0 where a row sees none of them.
      lse: `[B, N, H]`, natural logarithm of the softmax denominator, -inf there.
    """

    o: Float[Array, "*B N H D"]
    lse: Float[Array, "*B N H"]


def merge(a: Part, b: Part) -> Part:
    """Attention to the keys of both."""
    return merge_all(Part(jnp.stack([a.o, b.o]), jnp.stack([a.lse, b.lse])))


def merge_all(parts: Part) -> Part:
    """Attention to the keys of all parts, which lie along the leading axis; in the dtype of `lse`."""
    o, lse = parts
    top = finite(lse.max(0))
    weight = jnp.exp(lse - top)
    return normalised((weight[..., None] * o.astype(lse.dtype)).sum(0), top, weight.sum(0))


def normalised(weighted: Float[Array, "*B D"], top: Float[Array, "*B"], total: Float[Array, "*B"]) -> Part:
    """The part of a sum of values weighted by `exp(z - top)`, and the sum `total` of the weights, 0 where there were
    none."""
    some = total != 0  # nan passes
    safe = jnp.where(some, total, 1.0)
    o = jnp.where(some[..., None], weighted / safe[..., None], 0.0)
    return Part(o, jnp.where(some, top + jnp.log(safe), -jnp.inf))


def finite(top: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """What may be subtracted from logits: the largest of them, or 0 where there are none; nan stays."""
    return jnp.where(top == -jnp.inf, 0.0, top)


def statistics(x: Array) -> jnp.dtype:
    """The dtype of statistics and sums."""
    return jnp.promote_types(x.dtype, jnp.float32)


def varying_axes(*arrays: Array) -> frozenset[str]:
    """Mesh axes along which one of the arrays differs, where `shard_map` keeps track of them."""
    avals = [jax.typeof(x) for x in arrays]
    return frozenset().union(*(a.vma if hasattr(a, "vma") else a.mat.varying for a in avals))


def seen(low: Int[Array, "B N"], high: Int[Array, "B N"], number: Int[Array, "B M"]) -> Bool[Array, "B N M"]:
    """Which keys each row sees."""
    number = number[:, None]
    return (number > 0) & (low[:, :, None] <= number) & (number <= high[:, :, None])


def without_padding(number: Int[Array, "B M"], x: Float[Array, "B M K D"]) -> Float[Array, "B M K D"]:
    """Keys or values with padding zeroed, so that NaN there reaches nothing."""
    return jnp.where((number > 0)[:, :, None, None], x, 0)


def of_seeing(low: Int[Array, "B N"], high: Int[Array, "B N"], x: Float[Array, "B N H D"]) -> Float[Array, "B N H D"]:
    """Rows that see nothing, zeroed."""
    return jnp.where((high >= low)[:, :, None, None], x, 0)


def subtracted(
    lse: Float[Array, "B N H"], delta: Float[Array, "B N H"]
) -> tuple[Float[Array, "B N H"], Float[Array, "B N H"]]:
    """What a backward pass subtracts from z and from dP; rows that see nothing get exp(z - inf) = 0."""
    some = lse != -jnp.inf
    return jnp.where(some, lse, jnp.inf), jnp.where(some, delta, 0.0)


def forward(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M K D"],
    v: Float[Array, "B M K D"],
    *,
    low: Int[Array, "B N"],
    high: Int[Array, "B N"],
    number: Int[Array, "B M"],
    scale: float,
) -> Part:
    """Attention to these keys, `CHUNK` of them at a time."""
    q = _grouped(of_seeing(low, high, q), k.shape[2])
    b, kv_heads, group, n, d = q.shape
    dtype = statistics(q)

    def step(carry: tuple[Array, Array, Array], chunk: tuple[Array, Array, Array]) -> tuple[tuple[Array, ...], None]:
        o, top, total = carry
        k, v, number = chunk
        visible = seen(low, high, number)[:, None, None]
        z = jnp.where(visible, scale * _product("bkgnd,bmkd->bkgnm", q, k, dtype), -jnp.inf)
        new = jnp.maximum(top, z.max(-1))
        base = finite(new)
        weight, kept = jnp.exp(z - base[..., None]), jnp.exp(top - base)
        o = o * kept[..., None] + _product("bkgnm,bmkd->bkgnd", weight.astype(v.dtype), v, dtype)
        return (o, new, total * kept + weight.sum(-1)), None

    shape = (b, kv_heads, group, n)
    start = jnp.zeros((*shape, d), dtype), jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype)
    (o, top, total), _ = _over_chunks(step, _varying(start, q, k), k, v, number)
    part = normalised(o, top, total)
    return Part(_ungrouped(part.o), _ungrouped(part.lse))


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
) -> tuple[Float[Array, "B N H D"], Float[Array, "B M K D"], Float[Array, "B M K D"]]:
    """Gradients from the statistics of *all* keys: what these keys add to dq, and dk and dv, complete where `q` holds
    all rows.

    Args:
      do: gradient of the output.
      lse: of all keys, -inf where a row sees none.
      delta: rowsum(do * o) with the output of all keys, minus the gradient of lse.
      dtype: of the gradients, that of statistics where none is given; sums have the latter.
      kv_dtype: of dk and dv, where it is another one.
    """
    kv_heads, m = k.shape[2], k.shape[1]
    wanted, dtype = dtype, statistics(q)
    wanted = dtype if wanted is None else wanted
    of_keys = wanted if kv_dtype is None else kv_dtype
    q, do = (_grouped(of_seeing(low, high, x), kv_heads) for x in (q, do))
    lse, delta = (_grouped(x[..., None], kv_heads) for x in subtracted(lse, delta))

    def step(dq: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        k, v, number = chunk
        visible = seen(low, high, number)[:, None, None]
        z = jnp.where(visible, scale * _product("bkgnd,bmkd->bkgnm", q, k, dtype), -jnp.inf)
        p = jnp.exp(z - lse)
        dv = _product("bkgnm,bkgnd->bmkd", p.astype(do.dtype), do, dtype)
        # Not rounded to q's dtype: the gradients are, once, and a second rounding can be as large again.
        ds = p * (_product("bkgnd,bmkd->bkgnm", do, v, dtype) - delta) * scale
        dk = _product("bkgnm,bkgnd->bmkd", ds, q.astype(dtype), dtype)
        return dq + _product("bkgnm,bmkd->bkgnd", ds, k.astype(dtype), dtype), (dk.astype(of_keys), dv.astype(of_keys))

    dq, each = _over_chunks(step, _varying(jnp.zeros(q.shape, dtype), q, k), k, v, number)
    dk, dv = (jnp.moveaxis(x, 0, 1).reshape(len(x[0]), -1, *x.shape[3:])[:, :m] for x in each)
    return _ungrouped(dq.astype(wanted)), dk, dv


def _over_chunks(step, start, k, v, number):
    """`lax.scan` over chunks of keys, the last one padded."""
    m = k.shape[1]
    chunk = min(CHUNK, max(m, 1))
    count = -(-m // chunk)
    k, v = (without_padding(number, x) for x in (k, v))

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, count * chunk - m), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(len(x), count, chunk, *x.shape[2:]), 1, 0)

    return jax.lax.scan(step, start, (cut(k), cut(v), cut(number)))


def _varying(start, *like):
    """The start of a scan as different from device to device as what it is added to (under `shard_map`)."""
    axes = varying_axes(*like)

    def spread(x: Array) -> Array:
        missing = tuple(sorted(axes - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(spread, start)


def _grouped(x: Array, kv_heads: int) -> Array:
    """`[B, N, H, D]` -> `[B, K, H / K, N, D]`."""
    b, n, heads, d = x.shape
    return x.reshape(b, n, kv_heads, heads // kv_heads, d).transpose(0, 2, 3, 1, 4)


def _ungrouped(x: Array) -> Array:
    """`[B, K, H / K, N, ...]` -> `[B, N, H, ...]`."""
    b, kv_heads, group, n = x.shape[:4]
    return jnp.moveaxis(x, 3, 1).reshape(b, n, kv_heads * group, *x.shape[4:])


def _product(equation: str, a: Array, b: Array, dtype: jnp.dtype) -> Array:
    return jnp.einsum(equation, a, b, precision=linear.precision(a), preferred_element_type=dtype)
