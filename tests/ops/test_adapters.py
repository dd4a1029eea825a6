# SPDX-License-Identifier: Apache-2.0
"""Equations of adapters against plain NumPy; the authors' numbers are replayed in tests/conformance."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtjax.ops import adapters


def dense(random, inputs, outputs):
    return {"kernel": normal(random, inputs, outputs), "bias": normal(random, outputs)}


def normal(random, *shape):
    return jnp.asarray(random.normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def random():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def x(random):
    return normal(random, 2, 3, 8)


def layer_norm(x, p):
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return y * p["scale"] + p["bias"]


def test_a_bottleneck_norms_before_behind_or_not_at_all(random, x):
    norm = {"scale": normal(random, 8), "bias": jnp.ones(8)}
    p = {"down": dense(random, 8, 4), "up": dense(random, 4, 8), "norm": norm}

    def plain(a):
        return np.maximum(a @ p["down"]["kernel"] + p["down"]["bias"], 0) @ p["up"]["kernel"] + p["up"]["bias"]

    close = dict(atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(adapters.bottleneck(x, p, norm="none", scale=1.5), 1.5 * plain(x), **close)
    np.testing.assert_allclose(adapters.bottleneck(x, p, norm="in"), plain(layer_norm(x, norm)), **close)
    np.testing.assert_allclose(
        adapters.bottleneck(x, p, norm="out", scale=3.0), layer_norm(3 * plain(x), norm), **close
    )
    learned = {**p, "scale": jnp.array([2.0])}
    np.testing.assert_allclose(adapters.bottleneck(x, learned, norm="none", scale=9.0), 2 * plain(x), **close)
    np.testing.assert_allclose(adapters.residual(x, p), x + plain(x), **close)


def test_a_router_mixes_two_grouped_maps_by_the_first_token(random, x):
    up = {name: dense(random, 2, 4) for name in "abcd"}
    p = {"down": dense(random, 8, 4), "route": dense(random, 8, 2)}
    for name, halves in (("up0", "ab"), ("up1", "cd")):
        p[name] = {"kernel": jnp.stack([up[h]["kernel"] for h in halves])}
        p[name]["bias"] = jnp.concatenate([up[h]["bias"] for h in halves])
    z = x @ p["down"]["kernel"] + p["down"]["bias"]
    both = [
        np.concatenate([z[..., :2] @ up[a]["kernel"], z[..., 2:] @ up[b]["kernel"]], -1) + p[name]["bias"]
        for name, (a, b) in (("up0", "ab"), ("up1", "cd"))
    ]
    logits = (x[:, 0] @ p["route"]["kernel"] + p["route"]["bias"]) / 10
    w = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    router = jax.jit(adapters.router, static_argnames=("scale", "drop"))
    route = adapters.route(x[:, 0], p, 10.0)
    assert (np.asarray(route) == np.asarray(route).astype(np.float16)).all()
    np.testing.assert_allclose(route, w, atol=5e-4)
    w = np.asarray(route)[:, :, None, None]
    expected = 2 * (w[:, 0] * both[0] + w[:, 1] * both[1])
    np.testing.assert_allclose(router(x, p, scale=2.0), expected, atol=2e-5)
    # Token by token with the prompt's weights, as in decoding; without them the last token would route by itself.
    last = router(x[:, 2:], p, scale=2.0, weights=route)
    np.testing.assert_allclose(last, expected[:, 2:], atol=2e-5)
    assert np.abs(router(x[:, 2:], p, scale=2.0) - last).max() > 1e-4
    nothing = router(x, p, drop=lambda z: 0 * z)
    np.testing.assert_allclose(nothing, w[:, 0] * p["up0"]["bias"] + w[:, 1] * p["up1"]["bias"] + 0 * x, atol=2e-5)


def test_groups_must_divide(random, x):
    with pytest.raises(ValueError, match="2 groups of 3 need an input of width 6, found 8"):
        adapters.grouped(x, {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones(8)})


def test_the_stream_stays_in_bfloat16_and_the_norm_in_float32(random, x):
    p = {"down": dense(random, 8, 4), "up": dense(random, 4, 8), "norm": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}
    far = jnp.asarray(x + 100, jnp.bfloat16)  # bfloat16 statistics would see nothing of x
    y = adapters.bottleneck(far, p)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(np.float32), adapters.bottleneck(far.astype(jnp.float32), p), atol=0.2)
