# SPDX-License-Identifier: Apache-2.0
"""Causal attention with grouped queries, over a whole sequence or one new token over a cache.

Letters: B batch, N tokens, C cache slots, H query heads, K key and value heads (a divisor of H), D head width.

Causality goes by slot: a token sees the slots up to its own, and of those the live ones and itself. So padding may lie
left, right or between, a padded row is finite and reads nothing dead but itself, and removing dead slots changes
nothing for the live ones. Scores and softmax statistics are float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vtjax.ops import linear

IMPLEMENTATIONS = ("auto", "square", "blocks")

BLOCK = 128
"""Rows of one block: the best of 64, 128 and 256 for a prompt of 512 tokens on one CPU core."""


def causal(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N K D"],
    v: Float[Array, "B N K D"],
    *,
    alive: Float[Array, "B N"] | None = None,
    segment: Int[Array, "B N"] | None = None,
    implementation: str = "auto",
    return_lse: bool = False,
) -> Float[Array, "B N H D"] | tuple[Float[Array, "B N H D"], Float[Array, "B N H"]]:
    """Causal softmax attention, scaled by D ** -0.5.

    Args:
      q, k, v: float32 or bfloat16; query heads h K / H .. share key head floor(h K / H).
      alive: 1 for live slots, 0 for dead ones (padding, removed tokens); None = all live. It carries no gradient.
      segment: packed texts: a token sees those of segment 0 (the shared prefix) and of its own; None = one text.
      implementation: "square" computes all N x N scores; "blocks" goes by blocks of `BLOCK` rows over the keys up to
        the block's end, which leaves out the upper triangle; "auto" takes blocks where there are two or more.
      return_lse: the natural log-sum-exp of the scores, too, float32.

    Returns:
      In q's dtype. Rows of dead slots are finite and mean nothing.

    Raises:
      ValueError: an unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, found {implementation!r}")
    n, kv_heads = q.shape[1], k.shape[2]
    q = _grouped(q * q.shape[-1] ** -0.5, kv_heads)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    block = n if implementation == "square" or (implementation == "auto" and n < 2 * BLOCK) else BLOCK
    live = None if alive is None else alive > 0.5
    parts = []
    for start in range(0, n, block):
        stop = min(start + block, n)
        seen = _seen(start, stop, live, segment)
        parts.append(_attend(q[:, :, :, start:stop], k[:, :, :stop], v[:, :, :stop], seen))
    y, lse = (parts[0][i] if len(parts) == 1 else jnp.concatenate([part[i] for part in parts], 3) for i in (0, 1))
    return (_ungrouped(y), _ungrouped(lse[..., None])[..., 0]) if return_lse else _ungrouped(y)


def cached(
    q: Float[Array, "B 1 H D"],
    k: Float[Array, "B K C D"],
    v: Float[Array, "B K C D"],
    alive: Bool[Array, "B C"],
    return_lse: bool = False,
) -> Float[Array, "B 1 H D"] | tuple[Float[Array, "B 1 H D"], Float[Array, "B 1 H"]]:
    """The attention of one new token over the live slots of a cache, which hold at least its own; in q's dtype.
    `return_lse`: as for `causal`."""
    q = _grouped(q * q.shape[-1] ** -0.5, k.shape[1])
    y, lse = _attend(q, k, v, alive[:, None])
    return (_ungrouped(y), _ungrouped(lse[..., None])[..., 0]) if return_lse else _ungrouped(y)


def weights(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N K D"],
    *,
    alive: Float[Array, "B N"] | None = None,
    segment: Int[Array, "B N"] | None = None,
) -> Float[Array, "B H N N"]:
    """What each row of `causal` takes of each slot, float32; rows sum to 1. To look at: all N x N are kept."""
    n, kv_heads = q.shape[1], k.shape[2]
    q = _grouped(q * q.shape[-1] ** -0.5, kv_heads)
    weight, _ = _weights(q, k.swapaxes(1, 2), _seen(0, n, None if alive is None else alive > 0.5, segment))
    return (weight / weight.sum(-1, keepdims=True)).reshape(len(q), -1, n, n)


def _grouped(x: Array, kv_heads: int) -> Array:
    """`[B, N, H, D]` -> `[B, K, H / K, N, D]`."""
    b, n, heads, d = x.shape
    return x.reshape(b, n, kv_heads, heads // kv_heads, d).transpose(0, 2, 3, 1, 4)


def _ungrouped(x: Array) -> Array:
    b, kv_heads, group, n, d = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(b, n, kv_heads * group, d)


def _seen(start: int, stop: int, live: Array | None, segment: Array | None) -> Array:
    """`[1 or B, rows, stop]`: which keys below `stop` the rows `start .. stop` see."""
    rows, keys = jnp.arange(start, stop)[:, None], jnp.arange(stop)
    if live is None and segment is None:
        return (keys <= rows)[None]
    seen = (keys < rows)[None]
    if live is not None:
        seen = seen & live[:, None, :stop]
    if segment is not None:
        own, other = segment[:, start:stop, None], segment[:, None, :stop]
        seen = seen & ((other == 0) | (other == own))
    return seen | (keys == rows)


def _attend(q: Array, k: Array, v: Array, seen: Array) -> tuple[Array, Array]:
    """Softmax attention of `q [B,K,G,N,D]` on `k, v [B,K,M,D]` where `seen [B,N,M]`, and its log-sum-exp `[B,K,G,N]`;
    every row sees something."""
    weight, largest = _weights(q, k, seen)
    total = weight.sum(-1, keepdims=True)
    y = jnp.einsum(
        "bkgnm,bkmd->bkgnd", weight.astype(v.dtype), v, precision=linear.precision(v),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return (y / total).astype(q.dtype), (largest + jnp.log(total))[..., 0]


def _weights(q: Array, k: Array, seen: Array) -> tuple[Array, Array]:
    """Float32 `[B,K,G,N,M]`, not yet divided by their sum, and the logarithm of what they are multiples of."""
    scores = jnp.einsum("bkgnd,bkmd->bkgnm", q, k, precision=linear.precision(q), preferred_element_type=jnp.float32)
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    return jnp.exp(scores - largest), largest
