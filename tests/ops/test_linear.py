# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtjax.ops import linear


@pytest.mark.parametrize("out", [2, 5])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_matmul_and_its_gradients_are_those_of_the_plain_product(shape, out):
    x = jax.random.normal(jax.random.key(0), shape)
    kernel = jax.random.normal(jax.random.key(1), (4, out))

    def value(product, x, kernel):
        return jnp.sin(product(x, kernel)).sum()

    def second(product, x, kernel):
        return jnp.square(jax.grad(value, 1)(product, x, kernel)).sum()

    for function in (value, second):
        ours = jax.grad(function, (1, 2))(linear.matmul, x, kernel)
        plain = jax.grad(function, (1, 2))(jnp.matmul, x, kernel)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, plain)
    stacked = jnp.stack([kernel, 2 * kernel])
    grads = jax.vmap(jax.grad(value, 2), (None, None, 0))(linear.matmul, x, stacked)
    np.testing.assert_allclose(grads[0], jax.grad(value, 2)(jnp.matmul, x, kernel), atol=1e-5)
    batched = jax.vmap(linear.matmul, (None, 0))(x, stacked)
    np.testing.assert_allclose(batched[1], 2 * linear.matmul(x, kernel), atol=1e-5)


def test_the_kernel_gradient_is_contracted_without_a_transpose():
    x, kernel = jnp.ones((2, 3, 4)), jnp.ones((4, 5))
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda k: linear.matmul(x, k).sum()))(kernel))
    assert "transpose" not in jaxpr.replace("transpose_", "")


def test_gelu_is_the_exact_one():
    from scipy.stats import norm

    x = np.linspace(-12, 12, 1001, dtype=np.float32)
    exact = x.astype(np.float64) * norm.cdf(x.astype(np.float64))
    np.testing.assert_allclose(linear.gelu(jnp.asarray(x)), exact, atol=2e-6)
    slope = norm.cdf(x.astype(np.float64)) + x * norm.pdf(x.astype(np.float64))
    np.testing.assert_allclose(jax.vmap(jax.grad(lambda a: linear.gelu(a)))(jnp.asarray(x)), slope, atol=2e-6)
