# SPDX-License-Identifier: Apache-2.0
import math

import jax.numpy as jnp
import numpy as np

from vtjax.ops import rope
from vtjax.spec import LMSpec, RopeScaling

RNG = np.random.default_rng(0)
SPEC = LMSpec.uniform(depth=1, width=8, heads=1, mlp=8, vocab=4)


def turned(x, position, frequency):
    """One head vector, pair by pair, as complex numbers."""
    half = len(x) // 2
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * position * np.asarray(frequency))
    return np.concatenate([z.real, z.imag])


def test_pairs_turn_by_position_times_frequency():
    x = RNG.standard_normal((2, 3, 2, 8)).astype(np.float32)
    positions = np.array([[0, 1, 7], [5, 5, 900]], np.int32)
    frequency = SPEC.frequencies(8)
    y = rope.rotate(jnp.asarray(x), jnp.asarray(positions), frequency)
    for b, n, h in np.ndindex(2, 3, 2):
        np.testing.assert_allclose(y[b, n, h], turned(x[b, n, h], positions[b, n], frequency), atol=1e-4)
    np.testing.assert_array_equal(y[0, 0], x[0, 0])


def test_scores_depend_on_distance_only():
    q, k = (jnp.asarray(RNG.standard_normal((1, 1, 1, 16)), jnp.float32) for _ in range(2))
    frequency = SPEC.edit(rope_base=500.0).frequencies(16)

    def score(i, j):
        at = (jnp.full((1, 1), p) for p in (i, j))
        a, b = (rope.rotate(x, p, frequency) for x, p in zip((q, k), at, strict=True))
        return float((a * b).sum())

    assert math.isclose(score(3, 1), score(103, 101), rel_tol=1e-4)
    assert not math.isclose(score(3, 1), score(3, 2), rel_tol=1e-2)


def test_llama3_keeps_short_waves_stretches_long_ones_and_is_monotone():
    spec = SPEC.edit(rope_base=500_000.0)
    plain = np.array(spec.frequencies(128))
    scaled = np.array(spec.edit(rope_scaling=RopeScaling("llama3", 8.0)).frequencies(128))
    wave = 2 * math.pi / plain
    np.testing.assert_array_equal(scaled[wave < 8192 / 4], plain[wave < 8192 / 4])
    np.testing.assert_allclose(scaled[wave > 8192], plain[wave > 8192] / 8.0)
    assert ((scaled <= plain) & (scaled >= plain / 8.0)).all() and (np.diff(scaled) < 0).all()
    linear = spec.edit(rope_scaling=RopeScaling("linear", 4.0)).frequencies(128)
    np.testing.assert_allclose(linear, plain / 4.0)


def test_half_precision_is_turned_in_float32():
    x = jnp.asarray(RNG.standard_normal((1, 1, 1, 8)), jnp.bfloat16)
    at, frequency = jnp.full((1, 1), 1001), SPEC.edit(rope_base=100.0).frequencies(8)
    y = rope.rotate(x, at, frequency)
    exact = rope.rotate(x.astype(jnp.float32), at, frequency)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))
