# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding (Su et al. 2021), half-split: feature i turns with feature i + D/2, as in Hugging Face.

Letters: B batch, N tokens, H heads, D head width. GGUF's interleaved order (feature 2i with 2i + 1) is undone where
weights are read, not here.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(
    x: Float[Array, "B N H D"], positions: Int[Array, "B N"], frequencies: Sequence[float]
) -> Float[Array, "B N H D"]:
    """x with pair i turned by position x frequency i (D / 2 of them, in radians), computed in float32, in x's dtype."""
    angle = positions[:, :, None, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1).astype(x.dtype)
