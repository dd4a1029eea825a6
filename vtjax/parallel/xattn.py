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
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from vtjax.ops.cross_attention import SAVED, attend
from vtjax.parallel import exchanges, kernels, strategies
from vtjax.parallel.exchanges import Plan
from vtjax.parallel.mesh import axes_size
from vtjax.parallel.strategies import STRATEGIES

EVERYTHING = 2**31 - 1


def cross_attention(
    q: Float[Array, "B S_Q H D"],
    k: Array,
    v: Array,
    *,
    mesh: Mesh | AbstractMesh,
    axis: str | Sequence[str],
    q_interval: Array | None = None,
    kv_id: Array | None = None,
    scale: float | None = None,
    strategy: str = "auto",
    return_lse: bool = False,
    check_vma: bool = True,
    kernel: str = "auto",
    slow: bool = False,
    wire: str | None = None,
    hardware: strategies.Hardware = strategies.V5E,
) -> Float[Array, "B S_Q H D"] | tuple[Float[Array, "B S_Q H D"], Float[Array, "B S_Q H"]]:
    """Softmax attention of rows of text to visual tokens that lie over a mesh axis. Differentiable in q, k and v, also
    through the log-sum-exp; once (no gradient of the gradient).

    Args:
      q, k, v: `[B, S_Q, H, D]`, `[B, S_K, K, D]` and the same: global arrays, float32, bfloat16, float16 or float64;
        query heads h H / K .. share a key head. Rows and visual tokens may come in any order, and need not divide by
        the devices.
      mesh, axis: where the visual tokens lie. Batch and heads are split over the mesh's axes "data", "fsdp" and
        "tensor" where they divide; fewer key heads than "tensor" has devices are repeated there, and the gradients of
        the copies added in their dtype. The mesh's axes are `Auto`.
      q_interval: int32 `[B, S_Q, 2]`, (lo, hi), inclusive: a row sees the keys whose id lies between; None = all that
        are no padding. lo > hi = none.
      kv_id: int32 `[B, S_K]`; 0 or less = padding; None = all are seen.
      scale: of the scores; None = D ** -0.5.
      strategy: one of `STRATEGIES`, or "auto", the cheapest by `strategies.choose` (spec section 6.5), which the
        logger "vtjax" tells at the level info.
      return_lse: the natural log-sum-exp of the scores, too, -inf where a row sees nothing, in the dtype of statistics.
      check_vma: of `jax.shard_map`.
      kernel: what a device runs: "chunked" (plain JAX), "tpu" or "gpu" (Pallas; chunks for dtypes they lack, such as
        float64), or "auto", by the platform of the mesh. "gspmd" is plain equations whatever it says.
      slow: the first of several axes goes over a slow network, between slices of TPUs: every slice has all rows of the
        text, which lie over its other axes; parts are merged within slices, and only these cross, once in either pass
        (spec section 6.6). With `strategy="gather_q"`, which "auto" then is.
      wire: dtype in which partial outputs and gradients travel that are summed where they arrive (of the gathering
        strategies and of rings), "float32"; None = that of q. In bfloat16 each of n parts is rounded once before the
        sum is (a ring's at every hop): with float32 results are rounded once, for a third more bytes in the backward
        pass of "gather_q" and half as many more in the forward pass.
      hardware: for "auto", whose default is about a TPU v5e.

    Returns:
      In q's dtype. Rows that see nothing are 0 and have no gradients.

    Raises:
      ValueError: shapes or dtypes that do not fit together, an unknown strategy, kernel, wire or axis, missing ids, or
        key heads that do not divide over the devices with `strategy="ulysses"`.
    """
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise ValueError(f"mesh must be a mesh of devices, found {type(mesh).__name__}")
    axes = _axes(axis)
    _check(q, k, v, q_interval, kv_id, mesh, axes, strategy)
    if scale is not None and not (isinstance(scale, int | float | np.number) and math.isfinite(scale)):
        raise ValueError(f"scale must be a finite number, known before anything is traced, found {scale}")
    if slow and (len(axes) < 2 or strategy not in ("auto", "gather_q", "replicated_q", "local")):
        raise ValueError(
            f"slow=True needs several axes and strategy='gather_q' (or 'replicated_q', 'local'), found {axes} and "
            f"{strategy!r}"
        )
    if not isinstance(hardware, strategies.Hardware):
        raise ValueError(f"hardware must be a strategies.Hardware, found {type(hardware).__name__}")
    if wire not in (None, "float32"):
        raise ValueError(f"wire must be None or 'float32', found {wire!r}")
    strategy = "gather_q" if slow and strategy == "auto" else strategy
    (b, s_q, heads, d), (s_k, kv_heads) = q.shape, k.shape[1:3]
    n = axes_size(mesh, axes)
    batch_axes, head_axes = _dividing(mesh, ("data", "fsdp"), axes, b), _dividing(mesh, ("tensor",), axes, kv_heads)
    if (copies := repeated(mesh, axes, strategy, heads, kv_heads)) > 1:
        # A device gets the key head that its query heads share (spec section 6.6).
        k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
        kv_heads, head_axes = copies * kv_heads, ("tensor",)
    groups = axes_size(mesh, head_axes)
    if strategy == "auto":
        own = b // axes_size(mesh, batch_axes), s_q, s_k, heads // groups, kv_heads // groups
        partial = jnp.promote_types(q.dtype, wire or q.dtype).itemsize
        strategy = strategies.choose(strategies.Case(n, *own, d, q.dtype.itemsize, partial), hardware)
        _say(strategy, n, *own)
    plan = Plan(
        mesh=mesh,
        axis=axes,
        strategy=strategy,
        scale=d**-0.5 if scale is None else scale,
        batch=batch_axes,
        heads=head_axes,
        check_vma=check_vma,
        kernel=kernels.choose(kernel, mesh, q.dtype),
        slow=slow,
        wire=wire,
    )
    if strategy == "ulysses" and kv_heads // groups % n:
        raise ValueError(f"strategy='ulysses' needs key heads that divide over {n} devices, found {kv_heads // groups}")
    low, high = (jnp.ones((b, s_q), jnp.int32), jnp.full((b, s_q), EVERYTHING, jnp.int32))
    if q_interval is not None:
        low, high = q_interval[..., 0], q_interval[..., 1]
    number = jnp.ones((b, s_k), jnp.int32) if kv_id is None else kv_id
    if strategy == "gspmd":
        o, lse = _partitioned(plan, q, k, v, low, high, number)
    else:
        q_pad = 0 if strategy in ("replicated_q", "local") else -s_q % axes_size(mesh, plan.fast)
        kv_pad = 0 if strategy == "local" else -s_k % n
        q, low = _padded(q, q_pad), _padded(low, q_pad, 1)
        high, number = _padded(high, q_pad), _padded(number, kv_pad)
        o, lse = _attend(plan, q, _padded(k, kv_pad), _padded(v, kv_pad), low, high, number)
        o, lse = o[:, :s_q], lse[:, :s_q]
    return (o, lse) if return_lse else o


@functools.lru_cache(maxsize=64)
def _say(strategy: str, n: int, b: int, s_q: int, s_k: int, heads: int, kv_heads: int) -> None:
    """What "auto" took, once per case."""
    sizes = f"batch {b}, {s_q} rows, {s_k} keys, heads {heads}/{kv_heads}"
    logging.getLogger("vtjax").info("cross_attention over %d devices: %s (%s)", n, strategy, sizes)


@dataclasses.dataclass(frozen=True)
class Over:
    """`attend_over`, as a value: models that take equal ones are equal."""

    mesh: Mesh | AbstractMesh | None
    axis: tuple[str, ...]
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, q: Array, k: Array, v: Array, *, low: Array, high: Array, number: Array) -> tuple[Array, Array]:
        """As `ops.cross_attention.attend`."""
        mesh: Any = jax.sharding.get_abstract_mesh() if self.mesh is None else self.mesh
        axes, options = self.axis, dict(self.options)
        fast = axes[1:] if options.get("slow") else axes
        if self.mesh is None and not mesh.axis_names:
            return attend(q, k, v, low=low, high=high, number=number)
        _known(mesh, axes)
        if q.shape[1] < axes_size(mesh, fast) and options.get("strategy") not in ("local", "gspmd"):
            options["strategy"] = "replicated_q"
        interval = jnp.stack([low, high], -1)
        found = cross_attention(
            q, k, v, mesh=mesh, axis=self.axis, q_interval=interval, kv_id=number, return_lse=True, **options
        )
        assert isinstance(found, tuple)
        return found


def attend_over(mesh: Mesh | AbstractMesh | None, axis: str | Sequence[str], **options: Any) -> Over:
    """`cross_attention` in the form that models take (`attend=`, `ops.cross_attention.attend`). Fewer rows than
    devices, as in decoding, are on every device (`replicated_q`).

    Args:
      mesh: None = the ambient one (`jax.set_mesh`); outside of one attention is local.
      axis, options: as for `cross_attention`.

    Raises:
      ValueError: an axis that is none, an unknown option, or an unknown strategy; when it is called, also an axis that
        the mesh lacks, and what `cross_attention` raises.
    """
    for name in options:
        if name not in OPTIONS:
            raise ValueError(f"attend_over takes {', '.join(OPTIONS)}, found {name!r}")
    if options.get("strategy", "auto") not in ("auto", *STRATEGIES):
        raise ValueError(f"strategy must be one of auto, {', '.join(STRATEGIES)}, found {options['strategy']!r}")
    return Over(mesh, _axes(axis), tuple(sorted(options.items())))


OPTIONS = ("scale", "strategy", "check_vma", "kernel", "slow", "wire", "hardware")
"""Of `attend_over`."""


def _axes(axis: Any) -> tuple[str, ...]:
    """Names of mesh axes as a tuple."""
    axes = (axis,) if isinstance(axis, str) else tuple(axis) if isinstance(axis, tuple | list) else (axis,)
    if not axes or len(set(axes)) != len(axes) or not all(isinstance(name, str) for name in axes):
        raise ValueError(f"axis must name one axis of the mesh, or several different ones, found {axis!r}")
    return axes


def _known(mesh: Any, axes: tuple[str, ...]) -> None:
    """Raises ValueError for axes that the mesh lacks, or that are not the partitioner's."""
    for name in axes:
        if name not in mesh.shape:
            raise ValueError(f"axis must be of the mesh, {', '.join(mesh.shape)}, found {name!r}")
    if explicit := [n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit]:
        raise ValueError(
            "the mesh's axes must be Auto (jax.make_mesh(..., axis_types=(AxisType.Auto, ...))), found "
            f"{explicit[0]!r} Explicit"
        )


def _check(
    q: Array, k: Array, v: Array, q_interval: Any, kv_id: Any, mesh: Any, axes: tuple[str, ...], strategy: str
) -> None:
    if strategy not in ("auto", *STRATEGIES):
        raise ValueError(f"strategy must be one of auto, {', '.join(STRATEGIES)}, found {strategy!r}")
    _known(mesh, axes)
    for x in (q, k, v):
        if not hasattr(x, "shape"):
            raise ValueError(f"q, k, v must be arrays, found {type(x).__name__}")
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v must be [B, S_Q, H, D], [B, S_K, K, D] and the same, found {shapes}")
    if k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of key heads, found {q.shape[2]} and {k.shape[2]}")
    if not q.shape[3]:
        raise ValueError("heads must be at least 1 wide, found D = 0")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
        raise ValueError(f"q, k, v must have one floating dtype, found {q.dtype}, {k.dtype}, {v.dtype}")
    if q_interval is not None and kv_id is None:
        raise ValueError("q_interval needs kv_id, found none: nothing says which images the keys are of")
    for name, value, shape in (
        ("q_interval", q_interval, (*q.shape[:2], 2)),
        ("kv_id", kv_id, k.shape[:2]),
    ):
        if value is None:
            continue
        if not hasattr(value, "shape"):
            raise ValueError(f"{name} must be an array, int32 {list(shape)}, found {type(value).__name__}")
        if value.shape != shape or value.dtype != jnp.int32:
            raise ValueError(f"{name} must be int32 {list(shape)}, found {value.dtype} {list(value.shape)}")


def repeated(mesh: Any, axes: tuple[str, ...], strategy: str, heads: int, kv_heads: int) -> int:
    """How many times every key head is repeated, so that each device along "tensor" has one: above 1 where there are
    fewer than devices, and where keys lie over devices by their rows."""
    devices = mesh.shape.get("tensor", 1) if "tensor" not in axes else 1
    by_rows = strategy not in ("ulysses", "local", "gspmd") and axes_size(mesh, axes) > 1
    return devices // kv_heads if by_rows and heads % devices == 0 and devices % kv_heads == 0 else 1


def _dividing(mesh: Any, names: tuple[str, ...], taken: tuple[str, ...], size: int) -> tuple[str, ...]:
    """Those mesh axes, beside the ones taken, over which a dimension is split evenly."""
    found: list[str] = []
    for name in names:
        if name in mesh.shape and name not in taken and size % (mesh.shape[name] * axes_size(mesh, found)) == 0:
            found.append(name)
    return tuple(found)


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
    dlse = jnp.where(lse == -jnp.inf, 0, dlse)
    delta = (do.astype(lse.dtype) * o.astype(lse.dtype)).sum(-1) - dlse
    dq, dk, dv = _backward(plan, q, k, v, do, lse, delta, low, high, number)
    return dq, dk, dv, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(plan: Plan, q: Array, k: Array, v: Array, low: Array, high: Array, number: Array) -> tuple[Array, Array]:
    def body(q: Array, k: Array, v: Array, low: Array, high: Array, number: Array) -> Any:
        o, lse = exchanges.FORWARD[plan.strategy](plan, q, k, v, low, high, number)
        return o.astype(q.dtype), lse

    if plan.strategy == "local" and plan.kernel == "chunked":
        return body(q, k, v, low, high, number)
    ids, images = _ids(plan)
    return _mapped(plan, body, (plan.rows, plan.keys, plan.keys, ids, ids, images), (plan.rows, plan.rows))(
        q, k, v, low, high, number
    )


def _backward(plan: Plan, *given: Array) -> tuple[Array, Array, Array]:
    def body(q: Array, k: Array, v: Array, *known: Array) -> Any:
        dq, dk, dv = exchanges.BACKWARD[plan.strategy](plan, q, k, v, *known)
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
    alike = plan.strategy == "replicated_q" or plan.slow
    check = plan.check_vma and not alike and not kernels.interpreted(plan.kernel, plan.mesh)
    return jax.shard_map(body, mesh=plan.mesh, in_specs=inside, out_specs=out, check_vma=check)


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
