# SPDX-License-Identifier: Apache-2.0
"""What each strategy of `cross_attention` does within `shard_map`: which of queries, keys and partial outputs travel.

`FORWARD[strategy](plan, q, k, v, low, high, number) -> Part` of this device's rows, and `BACKWARD[strategy](plan, q, k,
v, do, lse, delta, low, high, number) -> (dq, dk, dv)`, of which dk and dv are complete (spec sections 1.3, 1.4 and 6).
Letters as in `cross_attention`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from vtjax.ops import partial_softmax as ops
from vtjax.ops.partial_softmax import Part
from vtjax.parallel import kernels
from vtjax.parallel.mesh import axes_size


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static about a call.

    Attributes:
      mesh: of all devices.
      axis: mesh axes along which frames lie, the first one slowest.
      strategy: one of `STRATEGIES`, "auto" resolved.
      scale: of the scores.
      batch, heads: mesh axes over which batch and heads are split, beside `axis`.
      check_vma: `shard_map` keeps track of what differs between devices.
      kernel: what a device runs, one of `kernels.KERNELS`.
      slow: the first axis of several goes over a slow network; rows do not lie over it.
      wire: dtype in which partial results travel, outputs and gradients that are summed or merged; None: the inputs'.
        Queries, keys and values always travel as they are.
    """

    mesh: Any
    axis: tuple[str, ...]
    strategy: str
    scale: float
    batch: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    check_vma: bool = True
    kernel: str = "chunked"
    slow: bool = False
    wire: str | None = None

    def partial(self, x: Array) -> jnp.dtype:
        """The dtype in which a partial result travels, of inputs `x`."""
        return x.dtype if self.wire is None else jnp.promote_types(x.dtype, self.wire)

    @property
    def fast(self) -> tuple[str, ...]:
        """Axes over which rows lie."""
        return self.axis[1:] if self.slow else self.axis

    @property
    def n(self) -> int:
        """Devices along the axis."""
        return axes_size(self.mesh, self.axis)

    @property
    def rows(self) -> P:
        """Queries and outputs `[B, S_Q, H, D]`, or without their last axes."""
        split = None if self.strategy in ("replicated_q", "local") else self.fast
        return P(self.batch or None, split, self.heads or None)

    @property
    def keys(self) -> P:
        """Keys and values `[B, S_K, K, D]`."""
        return P(self.batch or None, None if self.strategy == "local" else self.axis, self.heads or None)


def _local(plan: Plan, *given: Any) -> Part:
    q, k, v, low, high, number = given
    forward, _ = kernels.local(plan.kernel, plan.mesh)
    return forward(q, k, v, low=low, high=high, number=number, scale=plan.scale)


def _local_back(plan: Plan, *given: Any, dtype: Any = None, kv_dtype: Any = None) -> tuple[Array, Array, Array]:
    """Gradients in `dtype`, dk and dv in `kv_dtype`; in that of statistics, None, where more is added to them here."""
    q, k, v, do, lse, delta, low, high, number = given
    _, backward = kernels.local(plan.kernel, plan.mesh)
    ids = {"low": low, "high": high, "number": number}
    return backward(q, k, v, do, lse, delta, **ids, scale=plan.scale, dtype=dtype, kv_dtype=kv_dtype)


def _alone_back(plan: Plan, q: Array, *given: Array) -> tuple[Array, Array, Array]:
    return _local_back(plan, q, *given, dtype=q.dtype)


# --- gather_q: all queries everywhere, one pass over the local keys, partial outputs merged at home


def _gathered(plan: Plan, x: Array) -> Array:
    return lax.all_gather(x, plan.fast, axis=1, tiled=True)


def _exchanged(plan: Plan, x: Array) -> Array:
    """`[B, rows, ...]`, a part of every row, -> `[n, B, rows / n, ...]`, all parts of fewer rows."""
    (b, rows), n = x.shape[:2], axes_size(plan.mesh, plan.fast)
    parts = jnp.moveaxis(x.reshape(b, n, rows // n, *x.shape[2:]), 1, 0)
    return lax.all_to_all(parts, plan.fast, split_axis=0, concat_axis=0, tiled=True)


def _of_slices(plan: Plan, x: Array) -> Array:
    """`[slices, ...]`: what every slice has made of these rows."""
    return lax.all_gather(x, plan.axis[0])


def _gather_q(plan: Plan, q: Array, k: Array, v: Array, low: Array, high: Array, number: Array) -> Part:
    part = _local(plan, _gathered(plan, q), k, v, low, high, number)
    part = ops.merge_all(Part(_exchanged(plan, part.o.astype(plan.partial(q))), _exchanged(plan, part.lse)))
    if plan.slow:
        part = ops.merge_all(Part(_of_slices(plan, part.o.astype(plan.partial(q))), _of_slices(plan, part.lse)))
    return part


def _everywhere_back(plan: Plan, q: Array, k: Array, v: Array, *known: Any) -> tuple[Array, Array, Array]:
    """This device's part of dq for all rows, in the dtype that travels, and dk and dv, complete."""
    do, lse, delta, low, high, number = known
    both = _gathered(plan, jnp.stack([lse, delta], -1))
    q_all, do_all = _gathered(plan, q), _gathered(plan, do)
    known = both[..., 0], both[..., 1], low, high, number
    return _local_back(plan, q_all, k, v, do_all, *known, dtype=plan.partial(q), kv_dtype=k.dtype)


def _gather_q_back(plan: Plan, q: Array, k: Array, v: Array, *known: Any) -> Any:
    dq, dk, dv = _everywhere_back(plan, q, k, v, *known)
    dq = _exchanged(plan, dq).astype(ops.statistics(q)).sum(0)
    if plan.slow:
        dq = _of_slices(plan, dq.astype(plan.partial(q))).astype(dq.dtype).sum(0)
    return dq, dk, dv


def _gather_q_scatter(plan: Plan, q: Array, k: Array, v: Array, low: Array, high: Array, number: Array) -> Part:
    part = _local(plan, _gathered(plan, q), k, v, low, high, number)
    base = ops.finite(lax.pmax(part.lse, plan.axis))
    weight = jnp.exp(part.lse - base)

    def reduced(x: Array) -> Array:
        return lax.psum_scatter(x, plan.axis, scatter_dimension=1, tiled=True)

    weighted = reduced((weight[..., None] * part.o).astype(plan.partial(q))).astype(weight.dtype)
    total = reduced(weight)
    here = lax.dynamic_slice_in_dim(base, _place(plan) * total.shape[1], total.shape[1], 1)
    return ops.normalised(weighted, here, total)


def _gather_q_scatter_back(plan: Plan, q: Array, k: Array, v: Array, *known: Any) -> Any:
    dq, dk, dv = _everywhere_back(plan, q, k, v, *known)
    return lax.psum_scatter(dq, plan.axis, scatter_dimension=1, tiled=True), dk, dv


# --- rings


def _place(plan: Plan) -> Array:
    """This device's place along the axis."""
    return lax.axis_index(plan.axis)


def _next(plan: Plan, x: Any) -> Any:
    """From every device to the one behind it."""
    ring = [(i, (i + 1) % plan.n) for i in range(plan.n)]
    return jax.tree.map(lambda a: lax.ppermute(a, plan.axis, ring), x)


def _around(plan: Plan, block: Any, first: Callable[[Any], Any], visit: Callable[[Any, Any], Any]) -> Any:
    """What the blocks of the others give: `first(block)` of the one that comes first, then `visit(block, carry)`.

    A block is handed on while it is looked at, so that its hop runs beside the kernel; n - 1 hops. A scan, as an
    unrolled ring keeps every copy alive (spec section 6.4).
    """
    block = _next(plan, block)
    if plan.n == 2:
        return first(block)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        block, found = carry
        return (_next(plan, block), visit(block, found)), None

    carry = _next(plan, block), first(block)
    if plan.n > 3:
        carry, _ = lax.scan(step, carry, None, length=plan.n - 3)
    return visit(*carry)


def _ring_q(plan: Plan, q: Array, k: Array, v: Array, low: Array, high: Array, number: Array) -> Part:
    """The paper's ring, where what a block finds at home stays there and is merged last: one hop less."""
    own = _local(plan, q, k, v, low, high, number)
    if plan.n == 1:
        return own

    def found(block: Any) -> Part:
        return _local(plan, block[0], k, v, *block[1:], number)

    def wire(part: Part) -> Part:
        return Part(part.o.astype(plan.partial(q)), part.lse)

    def visit(block: Any, part: Part) -> Part:
        return wire(ops.merge(_next(plan, part), found(block)))

    part = _around(plan, (q, low, high), lambda block: wire(found(block)), visit)
    return ops.merge(own, _next(plan, part))


def _ring_q_back(plan: Plan, q: Array, k: Array, v: Array, *known: Any) -> Any:
    do, lse, delta, low, high, number = known
    own, dk, dv = _local_back(plan, q, k, v, do, lse, delta, low, high, number)
    if plan.n == 1:
        return own, dk, dv

    def found(block: Any) -> Any:
        return _local_back(plan, block[0], k, v, *block[1:], number)

    def first(block: Any) -> Any:
        more = found(block)
        return more[0].astype(plan.partial(q)), dk + more[1], dv + more[2]

    def visit(block: Any, carry: Any) -> Any:
        more = found(block)
        dq = _next(plan, carry[0]).astype(own.dtype) + more[0]
        return dq.astype(plan.partial(q)), carry[1] + more[1], carry[2] + more[2]

    dq, *complete = _around(plan, (q, do, lse, delta, low, high), first, visit)
    return own + _next(plan, dq).astype(own.dtype), *complete


def _ring_kv(plan: Plan, q: Array, k: Array, v: Array, low: Array, high: Array, number: Array) -> Part:
    """Ring attention: keys and values travel (the baseline)."""
    part = _local(plan, q, k, v, low, high, number)
    if plan.n == 1:
        return part

    def visit(block: Any, part: Part) -> Part:
        return ops.merge(part, _local(plan, q, *block[:2], low, high, block[2]))

    return _around(plan, (k, v, number), lambda block: visit(block, part), visit)


def _ring_kv_back(plan: Plan, q: Array, k: Array, v: Array, *known: Any) -> Any:
    do, lse, delta, low, high, number = known
    dq, own_k, own_v = _local_back(plan, q, k, v, do, lse, delta, low, high, number)
    if plan.n == 1:
        return dq, own_k, own_v

    def found(block: Any) -> Any:
        return _local_back(plan, q, *block[:2], do, lse, delta, low, high, block[2])

    def wire(*gradients: Array) -> tuple[Array, ...]:
        return tuple(x.astype(plan.partial(k)) for x in gradients)

    def first(block: Any) -> Any:
        more = found(block)
        return dq + more[0], *wire(*more[1:])

    def visit(block: Any, carry: Any) -> Any:
        dk, dv = _next(plan, carry[1:])
        more = found(block)
        return carry[0] + more[0], *wire(dk.astype(dq.dtype) + more[1], dv.astype(dq.dtype) + more[2])

    total, *travelled = _around(plan, (k, v, number), first, visit)
    dk, dv = _next(plan, travelled)
    return total, own_k + dk.astype(dq.dtype), own_v + dv.astype(dq.dtype)


def _ring_kv_expanded(plan: Plan, q: Array, k: Array, v: Array, low: Array, high: Array, number: Array) -> Part:
    """The same with key heads repeated before they travel, as the paper's baseline was measured."""
    return _ring_kv(plan, q, *_expanded(q, k, v), low, high, number)


def _ring_kv_expanded_back(plan: Plan, q: Array, k: Array, v: Array, *known: Any) -> Any:
    do, lse, delta, low, high, number = known
    dq, dk, dv = _ring_kv_back(plan, q, *_expanded(q, k, v), do, lse, delta, low, high, number)
    b, t, heads, d = k.shape
    return dq, *(x.reshape(b, t, heads, -1, d).sum(3) for x in (dk, dv))


def _expanded(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    group = q.shape[2] // k.shape[2]
    return jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)


# --- ulysses: every device has some heads of everything


def _by_heads(plan: Plan, x: Array) -> Array:
    """`[B, s, H, ...]` -> `[B, S, H / n, ...]`."""
    return lax.all_to_all(x, plan.axis, split_axis=2, concat_axis=1, tiled=True)


def _by_rows(plan: Plan, x: Array) -> Array:
    return lax.all_to_all(x, plan.axis, split_axis=1, concat_axis=2, tiled=True)


def _ulysses(plan: Plan, q: Array, k: Array, v: Array, low: Array, high: Array, number: Array) -> Part:
    part = _local(plan, *(_by_heads(plan, x) for x in (q, k, v)), low, high, number)
    return Part(_by_rows(plan, part.o.astype(q.dtype)), _by_rows(plan, part.lse))


def _ulysses_back(plan: Plan, q: Array, k: Array, v: Array, *known: Any) -> Any:
    do, lse, delta, low, high, number = known
    given = (_by_heads(plan, x) for x in (q, k, v, do, lse, delta))
    return tuple(_by_rows(plan, x) for x in _local_back(plan, *given, low, high, number, dtype=q.dtype))


# --- replicated_q: a few rows that every device has (decoding)


def _replicated_q(plan: Plan, q: Array, k: Array, v: Array, low: Array, high: Array, number: Array) -> Part:
    part = _local(plan, q, k, v, low, high, number)
    for leg in (plan.fast, plan.axis[:1]) if plan.slow else (plan.axis,):
        packed = lax.all_gather(jnp.concatenate([part.o, part.lse[..., None]], -1), leg)
        part = ops.merge_all(Part(packed[..., :-1], packed[..., -1]))
    return part


def _replicated_q_back(plan: Plan, q: Array, k: Array, v: Array, *known: Any) -> Any:
    do, lse, delta, low, high, number = known
    dq, dk, dv = _local_back(plan, q, k, v, do, lse, delta, low, high, number)
    return lax.psum(dq, plan.axis), dk, dv


FORWARD: dict[str, Callable[..., Part]] = {
    "local": _local,
    "gather_q": _gather_q,
    "gather_q_scatter": _gather_q_scatter,
    "ring_q": _ring_q,
    "ring_kv": _ring_kv,
    "ring_kv_expanded": _ring_kv_expanded,
    "ulysses": _ulysses,
    "replicated_q": _replicated_q,
}
BACKWARD: dict[str, Callable[..., Any]] = {
    "local": _alone_back,
    "gather_q": _gather_q_back,
    "gather_q_scatter": _gather_q_scatter_back,
    "ring_q": _ring_q_back,
    "ring_kv": _ring_kv_back,
    "ring_kv_expanded": _ring_kv_expanded_back,
    "ulysses": _ulysses_back,
    "replicated_q": _replicated_q_back,
}
