# SPDX-License-Identifier: Apache-2.0
"""Matrix product and exact GELU, written so that XLA's CPU backend is as quick backwards as forwards.

Letters: D input width, M output width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def matmul(x: Float[Array, "*B D"], kernel: Float[Array, "D M"]) -> Float[Array, "*B M"]:
    """x @ kernel in x's dtype. float32 means float32 on every backend (TPUs and GPUs round it by default).

    The kernel's gradient is one product of matrices whose narrower side is transposed. JAX's own rule lets XLA
    transpose the wide side, which costs a ViT training step on CPU a quarter of its time. The price: no forward-mode
    differentiation (`jax.jvp`).
    """
    return _dot(x, kernel, ((x.ndim - 1,), (0,)))


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    # The product itself, not `matmul`: remat policies look for dot_general and see into no custom_vjp.
    return _dot(x, kernel, ((x.ndim - 1,), (0,))), (x, kernel)


def _backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    rows, columns = x, g
    sizes = jax.sharding.get_abstract_mesh().shape
    if sizes.get("context", 1) * sizes.get("slice", 1) == 1:
        # Tokens that lie over devices beside the batch would be gathered to be flattened.
        rows, columns = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    over = (tuple(range(rows.ndim - 1)),) * 2
    if x.shape[-1] <= g.shape[-1]:
        to_kernel = _dot(rows, columns, over)
    else:
        # The barrier keeps XLA from folding this transpose back into the product.
        to_kernel = jax.lax.optimization_barrier(_dot(columns, rows, over)).T
    return _dot(g, kernel, ((g.ndim - 1,), (1,))), to_kernel


matmul.defvjp(_forward, _backward)


def _dot(a: Array, b: Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    return jax.lax.dot_general(a, b, (contract, ((), ())), precision=precision(a))


def precision(x: Array) -> jax.lax.Precision:
    """HIGHEST for float32, the backend's default for anything narrower."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def gelu(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Exact GELU, x (1 + erf(x / sqrt 2)) / 2; `jax.nn.gelu` goes by erfc, which costs CPUs twice as much."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5)))
