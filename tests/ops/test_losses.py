# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtjax.ops import losses, norms


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_sum_over_the_mixed_smoothed_target(smoothing):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 7)).astype(np.float32) * 3
    a, b = rng.integers(0, 7, 5), rng.integers(0, 7, 5)
    lam = rng.random(5).astype(np.float32)
    target = (1 - smoothing) * (lam[:, None] * np.eye(7)[a] + (1 - lam)[:, None] * np.eye(7)[b]) + smoothing / 7
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    got = losses.cross_entropy(
        jnp.asarray(logits), jnp.asarray(a), label_smoothing=smoothing, labels2=jnp.asarray(b), lam=jnp.asarray(lam)
    )
    np.testing.assert_allclose(got, -(target * logp).sum(-1), rtol=1e-5)
    plain = losses.cross_entropy(jnp.asarray(logits), jnp.asarray(a))
    np.testing.assert_allclose(plain, -logp[np.arange(5), a], rtol=1e-5)


def test_top_k_agrees_with_a_sort_and_survives_ties_and_nan():
    logits = jax.random.normal(jax.random.key(0), (50, 10))
    labels = jnp.arange(50) % 10
    order = np.argsort(-np.asarray(logits), axis=-1, kind="stable")
    for k in (1, 5, 10):
        expected = [labels[i] in order[i, :k] for i in range(50)]
        np.testing.assert_array_equal(losses.top_k_correct(logits, labels, k), expected)
    flat = jnp.zeros((3, 4))
    np.testing.assert_array_equal(losses.top_k_correct(flat, jnp.array([0, 1, 3]), 1), [True, False, False])
    assert not losses.top_k_correct(jnp.full((1, 4), jnp.nan), jnp.array([0]), 1)[0]


def test_norms_against_float64():
    x = np.random.default_rng(0).normal(3.0, 0.1, (4, 33)).astype(np.float32)
    scale, bias = np.linspace(0.5, 2, 33, dtype=np.float32), np.linspace(-1, 1, 33, dtype=np.float32)
    y = x.astype(np.float64)
    expected = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6) * scale + bias
    np.testing.assert_allclose(
        norms.layer_norm(jnp.asarray(x), jnp.asarray(scale), jnp.asarray(bias), 1e-6), expected, atol=1e-5
    )
    expected = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(norms.rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-6), expected, atol=1e-5)
    half = norms.layer_norm(jnp.asarray(x, jnp.bfloat16), jnp.asarray(scale), jnp.asarray(bias), 1e-6)
    assert half.dtype == jnp.bfloat16
