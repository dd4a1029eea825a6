# SPDX-License-Identifier: Apache-2.0
"""Exact cross-attention over a mesh: few rows of text, visual tokens by the million, each where it was encoded.

"LV-XAttn: Distributed Cross-Attention for Long Visual Inputs in Multimodal Large Language Models", arXiv 2502.02406
(spec sections 1 and 6). The paper sends queries and outputs around a ring, in place of keys and values. Gathering the
queries, one pass over the local keys, and an exchange of partial outputs that are merged at home sends no more and
waits for two collectives in place of 2 n hops; that is `gather_q`, and the ring is `ring_q`.

Letters: n devices along the axis, B batch, S_Q rows of text, S_K visual tokens, H query heads, K key and value heads,
D head width; within a device s = S_Q / n and t = S_K / n.

The gradient is one function for all strategies: with the output and the statistics of *all* keys, every device's part
of it is local but for dq, which is a sum (spec section 1.4). No autodiff goes through a collective.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from vtjax.ops import partial_softmax as ops
from vtjax.ops.cross_attention import SAVED, attend
from vtjax.ops.partial_softmax import Part
from vtjax.parallel import kernels, strategies
from vtjax.parallel.strategies import STRATEGIES

EVERYTHING = 2**31 - 1


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
      slow: the first axis of several goes over a slow network.
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

    @property
    def legs(self) -> tuple[tuple[str, ...], ...]:
        """Axes over which parts are merged, one after the other, the slow one last."""
        return (self.axis[1:], self.axis[:1]) if self.slow else (self.axis,)

    @property
    def n(self) -> int:
        """Devices along the axis."""
        return _size(self.mesh, self.axis)

    @property
    def rows(self) -> P:
        """Queries and outputs `[B, S_Q, H, D]`, or without their last axes."""
        split = None if self.strategy in ("replicated_q", "local") else self.axis
        return P(self.batch or None, split, self.heads or None)

    @property
    def keys(self) -> P:
        """Keys and values `[B, S_K, K, D]`."""
        return P(self.batch or None, None if self.strategy == "local" else self.axis, self.heads or None)


def cross_attention(
    q: Float[Array, "B S_Q H D"],
    k: Array,
    v: Array,
    *,
    mesh: Mesh | AbstractMesh,
    axis: str | tuple[str, ...],
    q_interval: Array | None = None,
    kv_id: Array | None = None,
    scale: float | None = None,
    strategy: str = "auto",
    return_lse: bool = False,
    check_vma: bool = True,
    kernel: str = "auto",
    slow: bool = False,
) -> Float[Array, "B S_Q H D"] | tuple[Float[Array, "B S_Q H D"], Float[Array, "B S_Q H"]]:
    """Softmax attention of rows of text to visual tokens that lie over a mesh axis. Differentiable in q, k and v, also
    through the log-sum-exp; once (no gradient of the gradient).

    Args:
      q, k, v: `[B, S_Q, H, D]`, `[B, S_K, K, D]` and the same: global arrays, float32, bfloat16 or float64; query heads
        h H / K .. share a key head. Rows and visual tokens may come in any order, and need not divide by the devices.
      mesh, axis: where the visual tokens lie. Batch and heads are split over the mesh's axes "data", "fsdp" and
        "tensor" where they divide.
      q_interval: int32 `[B, S_Q, 2]`, (lo, hi), inclusive: a row sees the keys whose id lies between; None = all that
        are no padding. lo > hi = none.
      kv_id: int32 `[B, S_K]`; 0 or less = padding; None = all are seen.
      scale: of the scores; None = D ** -0.5.
      strategy: one of `STRATEGIES`, or "auto", the cheapest by `strategies.choose` (spec section 6.5), which is logged.
      return_lse: the natural log-sum-exp of the scores, too, -inf where a row sees nothing, in the dtype of statistics.
      check_vma: of `jax.shard_map`.
      kernel: what a device runs: "chunked" (plain JAX), "tpu" or "gpu" (Pallas; chunks for dtypes they lack, such as
        float64), or "auto", by the platform of the mesh. "gspmd" is plain equations whatever it says.
      slow: the first of several axes goes over a slow network, between slices of TPUs: queries enter a slice once, and
        parts are merged within slices before they leave them (spec section 6.6). With `strategy="gather_q"`, which
        "auto" then is.

    Returns:
      In q's dtype. Rows that see nothing are 0 and have no gradients.

    Raises:
      ValueError: shapes or dtypes that do not fit together, an unknown strategy, kernel or axis, missing ids, or
        key heads that do not divide over the devices with `strategy="ulysses"`.
    """
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    _check(q, k, v, q_interval, kv_id, mesh, axes, strategy)
    if slow and (len(axes) < 2 or strategy not in ("auto", "gather_q", "replicated_q", "local")):
        raise ValueError(f"slow=True needs several axes and strategy='gather_q', found {axes} and {strategy!r}")
    strategy = "gather_q" if slow and strategy == "auto" else strategy
    (b, s_q, heads, d), (s_k, kv_heads) = q.shape, k.shape[1:3]
    n = _size(mesh, axes)
    if strategy == "auto":
        case = strategies.Case(n, b, s_q, s_k, heads, kv_heads, d, q.dtype.itemsize)
        strategy = strategies.choose(case)
        logging.log_first_n(logging.INFO, "cross_attention: %s for %s", 8, strategy, case)
    plan = Plan(
        mesh=mesh,
        axis=axes,
        strategy=strategy,
        scale=d**-0.5 if scale is None else scale,
        batch=_dividing(mesh, ("data", "fsdp"), axes, b),
        heads=_dividing(mesh, ("tensor",), axes, kv_heads),
        check_vma=check_vma,
        kernel=kernels.choose(kernel, mesh, q.dtype),
        slow=slow,
    )
    if strategy == "ulysses" and kv_heads // _size(mesh, plan.heads) % n:
        raise ValueError(f"strategy='ulysses' needs key heads that divide over {n} devices, found {kv_heads}")
    low, high = (jnp.ones((b, s_q), jnp.int32), jnp.full((b, s_q), EVERYTHING, jnp.int32))
    if q_interval is not None:
        low, high = q_interval[..., 0], q_interval[..., 1]
    number = jnp.ones((b, s_k), jnp.int32) if kv_id is None else kv_id
    if strategy == "gspmd":
        o, lse = _partitioned(plan, q, k, v, low, high, number)
    else:
        q_pad = 0 if strategy in ("replicated_q", "local") else -s_q % n
        kv_pad = 0 if strategy == "local" else -s_k % n
        q, low = _padded(q, q_pad), _padded(low, q_pad, 1)
        high, number = _padded(high, q_pad), _padded(number, kv_pad)
        o, lse = _attend(plan, q, _padded(k, kv_pad), _padded(v, kv_pad), low, high, number)
        o, lse = o[:, :s_q], lse[:, :s_q]
    return (o, lse) if return_lse else o


@dataclasses.dataclass(frozen=True)
class Over:
    """`attend_over`, as a value: models that take equal ones are equal."""

    mesh: Mesh | AbstractMesh | None
    axis: str | tuple[str, ...]
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, q: Array, k: Array, v: Array, *, low: Array, high: Array, number: Array) -> tuple[Array, Array]:
        """As `ops.cross_attention.attend`."""
        mesh: Any = jax.sharding.get_abstract_mesh() if self.mesh is None else self.mesh
        axes = (self.axis,) if isinstance(self.axis, str) else self.axis
        if self.mesh is None and not set(axes) <= set(mesh.axis_names):
            return attend(q, k, v, low=low, high=high, number=number)
        options = dict(self.options)
        if q.shape[1] < _size(mesh, axes) and options.get("strategy") not in ("local", "gspmd"):
            options["strategy"] = "replicated_q"
        interval = jnp.stack([low, high], -1)
        found = cross_attention(
            q, k, v, mesh=mesh, axis=self.axis, q_interval=interval, kv_id=number, return_lse=True, **options
        )
        assert isinstance(found, tuple)
        return found


def attend_over(mesh: Mesh | AbstractMesh | None, axis: str | tuple[str, ...], **options: Any) -> Over:
    """`cross_attention` in the form that models take (`attend=`, `ops.cross_attention.attend`). Fewer rows than
    devices, as in decoding, are on every device (`replicated_q`).

    Args:
      mesh: None = the ambient one (`jax.set_mesh`); outside of one attention is local.
      axis, options: as for `cross_attention`.
    """
    return Over(mesh, axis, tuple(sorted(options.items())))


def _check(
    q: Array, k: Array, v: Array, q_interval: Any, kv_id: Any, mesh: Any, axes: tuple[str, ...], strategy: str
) -> None:
    if strategy not in ("auto", *STRATEGIES):
        raise ValueError(f"strategy must be one of auto, {', '.join(STRATEGIES)}, found {strategy!r}")
    for name in axes:
        if name not in mesh.shape:
            raise ValueError(f"axis must be of the mesh, {', '.join(mesh.shape)}, found {name!r}")
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v must be [B, S_Q, H, D], [B, S_K, K, D] and the same, found {shapes}")
    if k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of key heads, found {q.shape[2]} and {k.shape[2]}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
        raise ValueError(f"q, k, v must have one floating dtype, found {q.dtype}, {k.dtype}, {v.dtype}")
    if q_interval is not None and kv_id is None:
        raise ValueError("q_interval needs kv_id, found none: nothing says which images the keys are of")
    for name, value, shape in (
        ("q_interval", q_interval, (*q.shape[:2], 2)),
        ("kv_id", kv_id, k.shape[:2]),
    ):
        if value is not None and (value.shape != shape or value.dtype != jnp.int32):
            raise ValueError(f"{name} must be int32 {list(shape)}, found {value.dtype} {list(value.shape)}")


def _dividing(mesh: Any, names: tuple[str, ...], taken: tuple[str, ...], size: int) -> tuple[str, ...]:
    """Those mesh axes, beside the ones taken, over which a dimension is split evenly."""
    found: list[str] = []
    for name in names:
        if name in mesh.shape and name not in taken and size % (mesh.shape[name] * _size(mesh, found)) == 0:
            found.append(name)
    return tuple(found)


def _size(mesh: Any, names: Any) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _padded(x: Array, more: int, value: int = 0) -> Array:
    """Rows behind the second axis."""
    return jnp.pad(x, ((0, 0), (0, more), *((0, 0),) * (x.ndim - 2)), constant_values=value) if more else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q: Array, k: Array, v: Array, low: Array, high: Array, number: Array) -> tuple[Array, Array]:
    return _forward(plan, q, k, v, low, high, number)


def _attend_forward(plan: Plan, q: Array, k: Array, v: Array, low: Array, high: Array, number: Array) -> Any:
    o, lse = (
        checkpoint_name(x, name) for x, name in zip(_forward(plan, q, k, v, low, high, number), SAVED, strict=True)
    )
    return (o, lse), (q, k, v, low, high, number, o, lse)


def _attend_backward(plan: Plan, saved: Any, gradients: tuple[Array, Array]) -> Any:
    q, k, v, low, high, number, o, lse = saved
    do, dlse = gradients
    # Where a row sees nothing its lse is constant; autodiff may have made nan of it.
    dlse = jnp.where(jnp.isfinite(lse), dlse, 0)
    delta = (do.astype(lse.dtype) * o.astype(lse.dtype)).sum(-1) - dlse
    dq, dk, dv = _backward(plan, q, k, v, do, lse, delta, low, high, number)
    return dq, dk, dv, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(plan: Plan, q: Array, k: Array, v: Array, low: Array, high: Array, number: Array) -> tuple[Array, Array]:
    def body(q: Array, k: Array, v: Array, low: Array, high: Array, number: Array) -> Any:
        o, lse = _FORWARD[plan.strategy](plan, q, k, v, low, high, number)
        return o.astype(q.dtype), lse

    if plan.strategy == "local" and plan.kernel == "chunked":
        return body(q, k, v, low, high, number)
    ids, images = _ids(plan)
    return _mapped(plan, body, (plan.rows, plan.keys, plan.keys, ids, ids, images), (plan.rows, plan.rows))(
        q, k, v, low, high, number
    )


def _backward(plan: Plan, *given: Array) -> tuple[Array, Array, Array]:
    def body(q: Array, k: Array, v: Array, *known: Array) -> Any:
        dq, dk, dv = _BACKWARD[plan.strategy](plan, q, k, v, *known)
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)

    if plan.strategy == "local" and plan.kernel == "chunked":
        return body(*given)
    ids, images = _ids(plan)
    rows, keys = plan.rows, plan.keys
    return _mapped(plan, body, (rows, keys, keys, rows, rows, rows, ids, ids, images), (rows, keys, keys))(*given)


def _ids(plan: Plan) -> tuple[P, P]:
    """How intervals and ids are split: whole where every device needs them, which saves collectives of their own."""
    whole = P(plan.batch or None)
    rows = whole if plan.strategy in ("gather_q", "gather_q_scatter", "replicated_q", "ulysses") else plan.rows
    return P(*rows[:2]), whole if plan.strategy == "ulysses" else P(*plan.keys[:2])


def _mapped(plan: Plan, body: Callable[..., Any], inside: tuple[P, ...], out: Any) -> Callable[..., Any]:
    # That what is gathered and then merged is equal everywhere, shard_map cannot see.
    check = plan.check_vma and plan.strategy != "replicated_q" and not kernels.interpreted(plan.kernel, plan.mesh)
    return jax.shard_map(body, mesh=plan.mesh, in_specs=inside, out_specs=out, check_vma=check)


def _local(plan: Plan, *given: Any) -> Part:
    q, k, v, low, high, number = given
    forward, _ = kernels.local(plan.kernel, plan.mesh)
    return forward(q, k, v, low=low, high=high, number=number, scale=plan.scale)


def _local_back(plan: Plan, *given: Any, dtype: Any = None) -> tuple[Array, Array, Array]:
    """Gradients in `dtype`; in that of statistics, None, where more is added to them here."""
    q, k, v, do, lse, delta, low, high, number = given
    _, backward = kernels.local(plan.kernel, plan.mesh)
    return backward(q, k, v, do, lse, delta, low=low, high=high, number=number, scale=plan.scale, dtype=dtype)


def _alone_back(plan: Plan, q: Array, *given: Array) -> tuple[Array, Array, Array]:
    return _local_back(plan, q, *given, dtype=q.dtype)


# --- gather_q: all queries everywhere, one pass over the local keys, partial outputs merged at home


def _gathered(plan: Plan, x: Array) -> Array:
    for leg in reversed(plan.legs):
        x = lax.all_gather(x, leg, axis=1, tiled=True)
    return x


def _as_gathered(plan: Plan, x: Array) -> Array:
    """What every device has of all rows, `[B, S_Q]`, in the order in which `_gathered` brings them."""
    if not plan.slow:
        return x
    inside, outside = (_size(plan.mesh, leg) for leg in plan.legs)
    return x.reshape(len(x), outside, inside, -1).swapaxes(1, 2).reshape(x.shape)


def _exchanged(plan: Plan, x: Array, leg: tuple[str, ...]) -> Array:
    """`[B, rows, ...]`, a part of every row, -> `[n, B, rows / n, ...]`, all parts of fewer rows."""
    (b, rows), n = x.shape[:2], _size(plan.mesh, leg)
    parts = jnp.moveaxis(x.reshape(b, n, rows // n, *x.shape[2:]), 1, 0)
    return lax.all_to_all(parts, leg, split_axis=0, concat_axis=0, tiled=True)


def _gather_q(plan: Plan, q: Array, k: Array, v: Array, low: Array, high: Array, number: Array) -> Part:
    low, high = _as_gathered(plan, low), _as_gathered(plan, high)
    part = _local(plan, _gathered(plan, q), k, v, low, high, number)
    for leg in plan.legs:
        part = ops.merge_all(Part(_exchanged(plan, part.o.astype(q.dtype), leg), _exchanged(plan, part.lse, leg)))
    return part


def _everywhere_back(plan: Plan, q: Array, k: Array, v: Array, *known: Any) -> tuple[Array, Array, Array]:
    """This device's part of dq for all rows, and dk and dv, complete, all in q's dtype."""
    do, lse, delta, low, high, number = known
    low, high = _as_gathered(plan, low), _as_gathered(plan, high)
    both = _gathered(plan, jnp.stack([lse, delta], -1))
    q_all, do_all = _gathered(plan, q), _gathered(plan, do)
    known = both[..., 0], both[..., 1], low, high, number
    return _local_back(plan, q_all, k, v, do_all, *known, dtype=q.dtype)


def _gather_q_back(plan: Plan, q: Array, k: Array, v: Array, *known: Any) -> Any:
    dq, dk, dv = _everywhere_back(plan, q, k, v, *known)
    for leg in plan.legs:
        dq = _exchanged(plan, dq.astype(q.dtype), leg).astype(ops.statistics(q)).sum(0)
    return dq, dk, dv


def _gather_q_scatter(plan: Plan, q: Array, k: Array, v: Array, low: Array, high: Array, number: Array) -> Part:
    part = _local(plan, _gathered(plan, q), k, v, low, high, number)
    base = ops.finite(lax.pmax(part.lse, plan.axis))
    weight = jnp.exp(part.lse - base)

    def reduced(x: Array) -> Array:
        return lax.psum_scatter(x, plan.axis, scatter_dimension=1, tiled=True)

    weighted = reduced((weight[..., None] * part.o).astype(q.dtype)).astype(weight.dtype)
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
        return Part(part.o.astype(q.dtype), part.lse)

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
        return more[0].astype(q.dtype), dk + more[1], dv + more[2]

    def visit(block: Any, carry: Any) -> Any:
        more = found(block)
        dq = _next(plan, carry[0]).astype(own.dtype) + more[0]
        return dq.astype(q.dtype), carry[1] + more[1], carry[2] + more[2]

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
        return tuple(x.astype(k.dtype) for x in gradients)

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
    packed = lax.all_gather(jnp.concatenate([part.o, part.lse[..., None]], -1), plan.axis)
    return ops.merge_all(Part(packed[..., :-1], packed[..., -1]))


def _replicated_q_back(plan: Plan, q: Array, k: Array, v: Array, *known: Any) -> Any:
    do, lse, delta, low, high, number = known
    dq, dk, dv = _local_back(plan, q, k, v, do, lse, delta, low, high, number)
    return lax.psum(dq, plan.axis), dk, dv


# --- gspmd: what the partitioner makes of the plain equations


def _partitioned(
    plan: Plan, q: Array, k: Array, v: Array, low: Array, high: Array, number: Array
) -> tuple[Array, Array]:
    def put(x: Array, spec: P) -> Array:
        return lax.with_sharding_constraint(x, jax.sharding.NamedSharding(plan.mesh, spec))

    scale = plan.scale * q.shape[-1] ** 0.5
    even = q.shape[1] % plan.n == 0, k.shape[1] % plan.n == 0
    if even[0]:
        q = put(q, plan.rows)
    if even[1]:
        k, v = put(k, plan.keys), put(v, plan.keys)
    return attend(q * scale, k, v, low=low, high=high, number=number)


_FORWARD: dict[str, Callable[..., Part]] = {
    "local": _local,
    "gather_q": _gather_q,
    "gather_q_scatter": _gather_q_scatter,
    "ring_q": _ring_q,
    "ring_kv": _ring_kv,
    "ring_kv_expanded": _ring_kv_expanded,
    "ulysses": _ulysses,
    "replicated_q": _replicated_q,
}
_BACKWARD: dict[str, Callable[..., Any]] = {
    "local": _alone_back,
    "gather_q": _gather_q_back,
    "gather_q_scatter": _gather_q_scatter_back,
    "ring_q": _ring_q_back,
    "ring_kv": _ring_kv_back,
    "ring_kv_expanded": _ring_kv_expanded_back,
    "ulysses": _ulysses_back,
    "replicated_q": _replicated_q_back,
}
