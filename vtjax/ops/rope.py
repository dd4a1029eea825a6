# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding (Su et al. 2021), half-split: feature i turns with feature i + D/2, as in Hugging Face.

Letters: B batch, N tokens, H heads, D head width. GGUF's interleaved order (feature 2i with 2i + 1) is undone where
weights are read, not here.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def frequencies(head_dim: int, base: float) -> Float[np.ndarray, " half"]:
    """Radians per position of each pair, float64 `[D / 2]`: base ** (-2 i / D)."""
    return base ** (-np.arange(0, head_dim, 2) / head_dim)


def llama3(
    frequency: Float[np.ndarray, " half"], factor: float, low: float, high: float, context: int
) -> Float[np.ndarray, " half"]:
    """Llama 3's stretched frequencies: wavelengths above `context / low` tokens are `factor` times as long, those below
    `context / high` are kept, and between them the frequency is a blend of both."""
    turns = frequency * context / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequency * (kept + (1.0 - kept) / factor)


def rotate(
    x: Float[Array, "B N H D"], positions: Int[Array, "B N"], frequency: Float[np.ndarray, " half"]
) -> Float[Array, "B N H D"]:
    """x with every pair turned by position x frequency, computed in float32, in x's dtype."""
    angle = positions[:, :, None, None].astype(jnp.float32) * jnp.asarray(frequency, jnp.float32)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1).astype(x.dtype)
