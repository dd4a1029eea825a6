# SPDX-License-Identifier: Apache-2.0
"""Attention over tokens that carry a size and an alive flag: one readable reference, two kernels behind the same call.

Letters: B batch, N queries, M keys, H heads, D head width.

A token of size s counts as s equal tokens (proportional attention: ln s is added to its logits, LTMP spec section 2).
A dead key takes no part. `alive` multiplies numerator and denominator of the softmax, so that it carries gradient.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from vtjax.ops import linear

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")

STATISTICS = ("importance", "lse")

FILLED_FEATURES = 8
"""Features that `filled` adds to every head."""

# Below this many keys, TPU's fused softmax over materialised scores is as fast as the kernel, and exact in float32.
_SPLASH_FROM = 1024
_LANES = 128


def attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H D"],
    *,
    size: Float[Array, "B M"] | None = None,
    alive: Float[Array, "B M"] | None = None,
    scale: float | None = None,
    implementation: str = "auto",
    want: tuple[str, ...] = (),
) -> tuple[Float[Array, "B N H D"], dict[str, Array]]:
    """Softmax attention.

    Args:
      q, k, v: queries, keys, values; float32 or bfloat16. Scores and softmax statistics are float32.
      size: original tokens per key, positive; None = all 1.
      alive: 1 for live keys, 0 for dead ones; None = all live.
      scale: multiplies q k; None = D ** -0.5.
      implementation: "xla" is the reference; "cudnn" (GPU, half precision) and "splash" (TPU) insist on that kernel;
        "auto" lets the platform decide at lowering, and takes the reference where `alive` is given, because the
        kernels hold `alive` constant (no gradient), and where cuDNN has no kernel for the shapes.
      want: any of "importance", "lse". With a kernel, which hides the scores, they come from a second blockwise pass.

    Returns:
      The output in q's dtype (rows without a live key: 0), and a dict with what was asked for, float32:
      `importance [B, M]`, the mean attention a key receives over heads and live query rows (over all rows where
      N != M); `lse [B, N, H]`, natural log of the softmax denominator, -inf for rows without a live key.

    Raises:
      ValueError: unknown implementation or statistic.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, found {implementation!r}")
    for name in want:
        if name not in STATISTICS:
            raise ValueError(f"want must hold {' and '.join(STATISTICS)} only, found {name!r}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    reference = functools.partial(_reference, scale=scale, want=want)
    if implementation == "xla" or (implementation == "auto" and alive is not None):
        return reference(q, k, v, size, alive)
    kernels = {name: functools.partial(_with_kernel, name, scale=scale, want=want) for name in ("cudnn", "splash")}
    if implementation in kernels:
        return kernels[implementation](q, k, v, size, alive)
    fast = {}
    # cuDNN is looked for while tracing, so a machine without it must not trace that branch.
    if jax.default_backend() == "gpu" and _cudnn_takes(q, k):
        fast["cuda"] = kernels["cudnn"]
    if k.shape[1] >= _SPLASH_FROM:
        fast["tpu"] = kernels["splash"]
    if not fast:
        return reference(q, k, v, size, alive)
    return jax.lax.platform_dependent(q, k, v, size, alive, **fast, default=reference)


def filled(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    *,
    alive: Float[Array, "B N"],
    size: Float[Array, "B N"] | None = None,
    want: tuple[str, ...] = (),
) -> tuple[Float[Array, "B N H D"], dict[str, Array]]:
    """`attention` where every live query reads all keys, and a dead one the live keys only: Llama 3.2 Vision's tower,
    whose images are filled up with tokens that they lack (transformers' `_prepare_aspect_ratio_attention_mask`).

    The mask is a product of two flags, so it rides along as one more feature of q and k, and the kernels need no mask.
    Every row must have a live key.
    """
    d = q.shape[-1]
    # Far below any score; features come in eights, as cuDNN wants them.
    flag = jnp.broadcast_to((1.0 - alive)[:, :, None, None] * 100.0 * d**0.25, (*q.shape[:3], 1))
    flag = jnp.pad(flag, ((0, 0), (0, 0), (0, 0), (0, FILLED_FEATURES - 1))).astype(q.dtype)
    q, k = jnp.concatenate([q, flag], -1), jnp.concatenate([k, -flag], -1)
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, FILLED_FEATURES)))
    y, aux = attention(q, k, v, size=size, scale=d**-0.5, want=want)
    return y[..., :d], aux


def removed(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    *,
    size: Float[Array, "B N"] | None = None,
    alive: Float[Array, "B N"] | None = None,
    want: tuple[str, ...] = (),
) -> tuple[Float[Array, "B N H D"], dict[str, Array]]:
    """`attention` where `alive` carries no gradient and every row has a live key: dead keys have the logit -inf, which
    takes a fifth less time on CPUs. Of the statistics it knows `importance`."""
    bias = jnp.zeros(k.shape[:2], jnp.float32) if size is None else jnp.log(size)
    bias = bias if alive is None else jnp.where(alive > 0.5, bias, -jnp.inf)
    scores = _product("bnhd,bmhd->bhnm", q * q.shape[-1] ** -0.5, k) + bias[:, None, None, :]
    weight = jnp.exp(scores - scores.max(-1, keepdims=True))
    inverse = 1.0 / weight.sum(-1, keepdims=True)
    y = (_product("bhnm,bmhd->bhnd", weight.astype(v.dtype), v) * inverse).swapaxes(1, 2)
    aux = {"importance": _received(weight, inverse, alive)} if "importance" in want else {}
    return y.astype(q.dtype), aux


def statistics(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M H D"],
    *,
    size: Float[Array, "B M"] | None = None,
    alive: Float[Array, "B M"] | None = None,
    scale: float | None = None,
    block: int = 256,
) -> tuple[Float[Array, "B M"], Float[Array, "B N H"]]:
    """Importance and LSE of `attention`, holding `block` rows of scores at a time; see there for their meaning."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    b, n, h, d = q.shape
    block = min(block, n)
    rows = _query_weights(n, k.shape[1], alive, b)
    padded = -(-n // block) * block
    q = jnp.pad(q, ((0, 0), (0, padded - n), (0, 0), (0, 0)))
    rows = jnp.pad(rows, ((0, 0), (0, padded - n)))
    blocks = (
        q.reshape(b, -1, block, h, d).swapaxes(0, 1),
        rows.reshape(b, -1, block).swapaxes(0, 1),
    )

    def step(received: Array, item: tuple[Array, Array]) -> tuple[Array, Array]:
        weight, total, top = _softmax_parts(_scores(item[0], k, size, scale), alive)
        share = weight * _inverse(total)
        received = received + jnp.einsum("bhnm,bn->bm", share, item[1], precision=jax.lax.Precision.HIGHEST)
        return received, _lse(total, top)

    received, lse = jax.lax.scan(step, jnp.zeros((b, k.shape[1]), jnp.float32), blocks)
    lse = lse.transpose(1, 0, 2, 3).reshape(b, padded, h)[:, :n]
    return received / h, lse


def _reference(q, k, v, size, alive, *, scale, want):
    if size is None and alive is None and not want:
        return _dense(*(a.swapaxes(1, 2) for a in (q * scale, k, v))).swapaxes(1, 2), {}
    weight, total, top = _softmax_parts(_scores(q, k, size, scale), alive)
    # Normalised after the product: a pass over scores less, which a tenth of a masked ViT block on CPU goes into.
    inverse = _inverse(total)
    y = _product("bhnm,bmhd->bhnd", weight.astype(v.dtype), v) * inverse
    y = y.swapaxes(1, 2)
    aux = {}
    if "importance" in want:
        aux["importance"] = _received(weight, inverse, alive)
    if "lse" in want:
        aux["lse"] = _lse(total, top)
    return y.astype(q.dtype), aux


@jax.custom_vjp
def _dense(q, k, v):
    """Plain softmax attention on scaled `q [B,H,N,D]`, `k, v [B,H,M,D]`, which keeps nothing but its shares for the
    backward pass: a tenth of a ViT training step on CPU, and a third of its score memory."""
    weight, total, _ = _softmax_parts(_product("bhnd,bhmd->bhnm", q, k), None)
    return (_product("bhnm,bhmd->bhnd", weight.astype(v.dtype), v) / total).astype(q.dtype)


def _dense_forward(q, k, v):
    weight, total, _ = _softmax_parts(_product("bhnd,bhmd->bhnm", q, k), None)
    share = weight / total
    return _product("bhnm,bhmd->bhnd", share.astype(v.dtype), v).astype(q.dtype), (q, k, v, share)


def _dense_backward(residuals, g):
    q, k, v, share = residuals
    to_share = _product("bhnd,bhmd->bhnm", g, v)
    to_score = share * (to_share - (to_share * share).sum(-1, keepdims=True))
    to_q = _product("bhnm,bhmd->bhnd", to_score.astype(k.dtype), k)
    to_k = _product("bhnm,bhnd->bhmd", to_score.astype(q.dtype), q)
    to_v = _product("bhnm,bhnd->bhmd", share.astype(g.dtype), g)
    return to_q.astype(q.dtype), to_k.astype(k.dtype), to_v.astype(v.dtype)


_dense.defvjp(_dense_forward, _dense_backward)


def _product(equation, a, b):
    """einsum accumulated in float32."""
    return jnp.einsum(equation, a, b, precision=linear.precision(a), preferred_element_type=jnp.float32)


def _scores(q, k, size, scale):
    """`[B, H, N, M]` float32 logits, ln(size) included."""
    s = _product("bnhd,bmhd->bhnm", q * scale, k)
    return s if size is None else s + jnp.log(size)[:, None, None, :]


def _softmax_parts(s, alive):
    """Numerators `[B,H,N,M]`, their sum and the row maximum `[B,H,N,1]`. The maximum is over live keys only: a dead
    key far above the live ones would otherwise flush them to zero (LTMP spec, section 8.5)."""
    if alive is None:
        top = jax.lax.stop_gradient(s.max(-1, keepdims=True))
        weight = jnp.exp(s - top)
    else:
        live = alive[:, None, None, :]
        top = jax.lax.stop_gradient(jnp.where(live > 0.5, s, -jnp.inf).max(-1, keepdims=True))
        finite = jnp.where(jnp.isfinite(top), top, 0.0)
        # A dead key keeps a finite numerator, because the gradient of `alive` is made of it; a key that leads the
        # live ones by 80 or more saturates there instead of overflowing.
        weight = jnp.exp(jnp.minimum(s - finite, 80.0)) * live
    return weight, weight.sum(-1, keepdims=True), top


def _received(weight, inverse, alive):
    """Importance `[B, M]` from softmax numerators `[B, H, N, M]` and the inverse of their sums `[B, H, N, 1]`."""
    b, h, n, m = weight.shape
    share = (inverse[..., 0] * _query_weights(n, m, alive, b)[:, None] / h)[:, :, None]
    # Per head, then their sum: as one contraction over heads and rows it costs CPUs as much as the softmax.
    per_head = jnp.einsum("bhin,bhnm->bhim", share, weight, precision=jax.lax.Precision.HIGHEST)
    return per_head[:, :, 0].sum(1)


def _inverse(total):
    return jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)


def _lse(total, top):
    """`[B, N, H]` from the `[B, H, N, 1]` parts."""
    lse = jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1.0)) + top, -jnp.inf)
    return lse[..., 0].swapaxes(1, 2)


def _query_weights(n, m, alive, b):
    """`[B, N]` weight of each query row in the mean: live rows alike, 0 for dead ones."""
    if alive is None or n != m:
        return jnp.full((b, n), 1.0 / n, jnp.float32)
    live = jax.lax.stop_gradient((alive > 0.5).astype(jnp.float32))
    return live / jnp.maximum(live.sum(-1, keepdims=True), 1.0)


def _with_kernel(name, q, k, v, size, alive, *, scale, want):
    alive = None if alive is None else jax.lax.stop_gradient(alive)
    y = {"cudnn": _cudnn, "splash": _splash}[name](q, k, v, size, alive, scale)
    aux = {}
    if want:
        importance, lse = statistics(q, k, size=size, alive=alive, scale=scale)
        aux = {key: value for key, value in (("importance", importance), ("lse", lse)) if key in want}
    return _zero_empty_rows(y, alive), aux


def _zero_empty_rows(y, alive):
    """Kernels leave rows without a live key undefined."""
    if alive is None:
        return y
    return jnp.where((alive > 0.5).any(-1)[:, None, None, None], y, 0)


def _cudnn_takes(q, k):
    """Whether cuDNN has a kernel, forwards and backwards, on every GPU it supports: half precision, a head width in
    eights up to 128, and even numbers of tokens (odd ones were refused in training on an H100 with JAX 0.11)."""
    half, width = q.dtype in (jnp.bfloat16, jnp.float16), q.shape[-1]
    return half and width % 8 == 0 and width <= 128 and q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0


def _cudnn(q, k, v, size, alive, scale):
    bias = None if size is None else jnp.log(size)[:, None, None, :].astype(q.dtype)
    mask = None if alive is None else (alive > 0.5)[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=scale, implementation="cudnn")


def _splash(q, k, v, size, alive, scale, interpret=False):
    """TPU splash attention. ln(size) rides along as one more feature of q and k; dead and padded keys get another
    segment than the queries."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (b, n, h, d), m = q.shape, k.shape[1]
    q = q * jnp.asarray(scale, q.dtype)
    if size is not None:
        q = jnp.concatenate([q, jnp.ones((b, n, h, 1), q.dtype)], -1)
        log_size = jnp.broadcast_to(jnp.log(size)[:, :, None, None], (b, m, h, 1))
        k = jnp.concatenate([k, log_size.astype(k.dtype)], -1)
    q, k, v = (_pad_to_lanes(x) for x in (q, k, v))
    live = jnp.ones((b, m), jnp.int32) if alive is None else (alive > 0.5).astype(jnp.int32)
    kv_segment = jnp.pad(live, ((0, 0), (0, k.shape[1] - m)))
    segments = splash.SegmentIds(q=jnp.ones((b, q.shape[1]), jnp.int32), kv=kv_segment)

    def run(q, k, v, segments):
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([masks.FullMask((q.shape[2], k.shape[2]))] * q.shape[1]),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        return jax.vmap(kernel)(q, k, v, segments)

    y = _on_shards(run)(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), segments)
    return y.swapaxes(1, 2)[:, :n, :, :d].astype(q.dtype)


def _on_shards(run):
    """`run(q, k, v, segments)` on `[B, H, N, D]`, on every device's own samples and heads: XLA does not partition a
    kernel. Of the ambient mesh "tensor" splits the heads and the other axes the samples, where they divide; without
    "context" and "slice" where they do not."""

    def whole(q, k, v, segments):
        mesh = jax.sharding.get_abstract_mesh()
        axes = [a for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]
        if all(mesh.shape[axis] == 1 for axis in axes):
            return run(q, k, v, segments)
        # Frames lie over these two axes, samples do not.
        frames = tuple(axis for axis in axes if axis != "tensor")
        samples = tuple(axis for axis in frames if axis not in ("slice", "context"))
        divides = (b for b in (frames, samples) if len(q) % math.prod(mesh.shape[axis] for axis in b) == 0)
        batch = next(divides, ())
        heads = "tensor" if "tensor" in axes and q.shape[1] % mesh.shape["tensor"] == 0 else None
        each = P(batch or None, heads)
        specs = (each, each, each, jax.tree.map(lambda _: P(batch or None), segments))
        mapped = jax.shard_map(run, in_specs=specs, out_specs=each, axis_names=set(axes), check_vma=False)
        return mapped(q, k, v, segments)

    return whole


def _pad_to_lanes(x):
    """Tokens and features padded with zeros to multiples of the TPU's 128 lanes."""
    tokens, features = (-x.shape[i] % _LANES for i in (1, 3))
    return jnp.pad(x, ((0, 0), (0, tokens), (0, 0), (0, features)))
