# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import jax
import numpy as np

from vtjax.ops import packing

SEGMENTS = np.array([[0, 0, 1, 1, 2, 2, 2, -1], [0, 1, 1, 1, -1, -1, -1, -1], [-1] * 8, [1] * 8], np.int32)


def test_the_mask_is_what_it_says() -> None:
    mask = np.asarray(jax.jit(packing.attention_mask)(SEGMENTS))
    for row, segment in enumerate(SEGMENTS):
        for query in range(8):
            for key in range(8):
                seen = key <= query and segment[query] >= 0 and segment[key] in (0, segment[query])
                assert mask[row, query, key] == (seen or key == query), (row, query, key)
    np.testing.assert_array_equal(mask[3], np.tril(np.ones((8, 8), bool)))  # one question alone: plain causal attention
    assert mask.any(-1).all()  # no softmax is empty


def test_sums_per_question() -> None:
    values = np.random.default_rng(0).normal(size=SEGMENTS.shape).astype(np.float32)
    found = np.asarray(jax.jit(packing.per_question, static_argnums=2)(values, SEGMENTS, 3))
    expected = np.stack([np.where(q == SEGMENTS, values, 0).sum(-1) for q in (1, 2, 3)], -1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (found[:, 2] == 0).all()  # a question that no row has


def test_sums_per_type() -> None:
    values, kind = (
        np.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], np.float32),
        np.array([[0, 2, -1], [2, 2, 0]], np.int32),
    )
    found = jax.jit(packing.per_type, static_argnums=2)(values, kind, 4)
    np.testing.assert_array_equal(found, [33.0, 0.0, 26.0, 0.0])
