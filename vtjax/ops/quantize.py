# SPDX-License-Identifier: Apache-2.0
"""Weights in 8 bits: symmetric, one scale per output channel, no calibration. What memory and downloads would cost.

w is about q s, with q in -127..127 and s = max |w| / 127 over the inputs of a channel; |w - q s| <= s / 2. Activations
stay as they are.

Letters: D inputs, M outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

LEVELS = 127
"""Largest |q|: -128 is not used, so that the scale is the same on both sides."""


class Quantized(NamedTuple):
    """A kernel in 8 bits.

    Attributes:
      values: int8 `[D, M]`.
      scales: float32 `[M]`; 0 for a channel whose weights are all 0.
    """

    values: Int8[Array, "D M"]
    scales: Float[Array, " M"]


def quantize(kernel: Float[Array, "D M"]) -> Quantized:
    """The nearest 8-bit kernel, channel by channel. Values that are not finite make their channel so."""
    w = kernel.astype(jnp.float32)
    scales = jnp.abs(w).max(0) / LEVELS
    steps = jnp.where(scales > 0, w / jnp.where(scales > 0, scales, 1.0), jnp.where(scales == 0, 0.0, jnp.nan))
    return Quantized(jnp.clip(jnp.round(steps), -LEVELS, LEVELS).astype(jnp.int8), scales)


def dequantize(quantized: Quantized, dtype: Any = jnp.float32) -> Float[Array, "D M"]:
    """The kernel that 8 bits stand for."""
    return (quantized.values.astype(jnp.float32) * quantized.scales).astype(dtype)


def quantize_kernels(params: Any) -> Any:
    """A parameter tree with every `kernel` of two axes as `Quantized`, the rest as it was."""
    if not isinstance(params, Mapping):
        return params
    return {
        name: quantize(jnp.asarray(child)) if name == "kernel" and jnp.ndim(child) == 2 else quantize_kernels(child)
        for name, child in params.items()
    }


def dequantize_kernels(params: Any) -> Any:
    """The inverse of `quantize_kernels`, up to what rounding took: a tree that models take."""
    return jax.tree.map(
        lambda x: dequantize(x) if isinstance(x, Quantized) else x, params, is_leaf=lambda x: isinstance(x, Quantized)
    )


def size_bytes(params: Any) -> int:
    """Bytes of all arrays, quantised or not, scales included."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
