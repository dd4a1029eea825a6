# SPDX-License-Identifier: Apache-2.0
"""What distributed cross-attention is compared with: softmax attention written out, and masks of every kind.

Letters: B batch, N rows of the text, M visual tokens, H query heads, K key and value heads, D head width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vtjax.ops import cross_attention as ops

MASKS = ("none", "before", "latest", "run", "packed", "padding", "rows before the first image", "nothing", "any order")
"""Kinds of `masks`, spec section 1.5."""


def dense(q: Any, k: Any, v: Any, low: Any, high: Any, number: Any) -> tuple[Any, Any]:
    """Output `[B, N, H, D]` and log-sum-exp `[B, N, H]` of softmax attention; (0, -inf) for rows that see nothing."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    z = jnp.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    number = number[:, None]
    seen = ((number > 0) & (low[:, :, None] <= number) & (number <= high[:, :, None]))[:, None]
    some = seen.any(-1)
    # Finite where nothing is seen: else its gradient is nan.
    lse = jax.nn.logsumexp(jnp.where(seen | ~some[..., None], z, -jnp.inf), axis=-1)
    p = jnp.where(seen, jnp.exp(jnp.where(seen, z - lse[..., None], 0.0)), 0.0)
    return jnp.einsum("bhnm,bmhd->bnhd", p, v), jnp.where(some, lse, -jnp.inf).swapaxes(1, 2)


def masks(kind: str, batch: int, rows: int, keys: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`q_interval [B, N, 2]` and `kv_id [B, M]`, int32, of one of `MASKS`, for three images of uneven lengths."""
    rng = np.random.default_rng(seed)
    number = np.sort(rng.integers(1, 4, (batch, keys)), axis=1)
    low, high = np.ones((batch, rows), int), np.full((batch, rows), 3)
    if kind in ("before", "latest", "run"):
        found = ops.interval(jnp.asarray(rng.random((batch, rows)) < 0.4), kind)
        low, high = (np.asarray(x) for x in found)
    elif kind == "packed":  # two documents: image 1, and images 2 and 3
        second = np.broadcast_to(np.arange(rows) >= (rows + 1) // 2, low.shape)
        low, high = np.where(second, 2, low), np.where(second, 3, 1)
    elif kind == "padding":
        number = np.where(rng.random(number.shape) < 0.4, rng.integers(-1, 1, number.shape), number)
        high = np.where(rng.random(high.shape) < 0.3, 0, high)
    elif kind == "rows before the first image":
        high = np.where(np.arange(rows)[None] < (rows + 1) // 2, 0, high)
    elif kind == "nothing":
        high = np.zeros_like(high)
    elif kind == "any order":
        number, low = rng.integers(-1, 4, number.shape), rng.integers(1, 3, low.shape)
        high = low + rng.integers(-1, 3, low.shape)
    elif kind != "none":
        raise ValueError(f"kind must be one of {', '.join(MASKS)}, found {kind!r}")
    return np.stack([low, high], -1).astype(np.int32), number.astype(np.int32)
