# SPDX-License-Identifier: Apache-2.0
"""What must not change attention over a mesh: the order of rows and keys, padding, repeated heads. On one device here;
the slow test runs the others again on four."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from experiments.lvxattn import reference
from vtjax.parallel.xattn import cross_attention

MESH = Mesh(np.array(jax.devices()[:4]), ("cp",))
ROWS, KEYS, HEADS, KV_HEADS, WIDTH = 6, 22, 8, 4, 4
STRATEGIES = ("gather_q", "ring_q", "ring_kv", "ulysses") if MESH.size > 1 else ("gather_q",)
RNG = np.random.default_rng(0)
Q, W = (RNG.normal(size=(1, ROWS, HEADS, WIDTH)).astype(np.float32) for _ in range(2))
K, V = (RNG.normal(size=(1, KEYS, KV_HEADS, WIDTH)).astype(np.float32) for _ in range(2))
INTERVAL, NUMBER = reference.masks("any order", 1, ROWS, KEYS)
INTERVAL[0, 0] = 2, 1  # a row that sees nothing


def attended(strategy: str, q: Any, k: Any, v: Any, w: Any, interval: Any, number: Any) -> list[np.ndarray]:
    """o, lse, dq, dk, dv."""
    interval, number = jnp.asarray(interval), jnp.asarray(number)

    def total(q: Any, k: Any, v: Any) -> Any:
        o, lse = cross_attention(
            q, k, v, mesh=MESH, axis="cp", q_interval=interval, kv_id=number, strategy=strategy, return_lse=True
        )
        return (o * w).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum(), (o, lse)

    given = (jnp.asarray(x) for x in (q, k, v))
    (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*given)
    return [np.asarray(x) for x in (*out, *gradients)]


def assert_same(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    for name, a, b in zip(("o", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6, err_msg=name)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_order_padding_and_repeated_heads_change_nothing(strategy: str) -> None:
    o, lse, dq, dk, dv = plain = attended(strategy, Q, K, V, W, INTERVAL, NUMBER)
    # Striped frames are keys in another order.
    keys, rows = RNG.permutation(KEYS), RNG.permutation(ROWS)
    found = attended(strategy, Q[:, rows], K[:, keys], V[:, keys], W[:, rows], INTERVAL[:, rows], NUMBER[:, keys])
    assert_same(found, [o[:, rows], lse[:, rows], dq[:, rows], dk[:, keys], dv[:, keys]])
    # Tiles that an image lacks may stay or go.
    live = np.flatnonzero(NUMBER[0] > 0)
    found = attended(strategy, Q, K[:, live], V[:, live], W, INTERVAL, NUMBER[:, live])
    assert_same(found, [o, lse, dq, dk[:, live], dv[:, live]])
    dead = np.flatnonzero(NUMBER[0] <= 0)
    assert (dk[:, dead] == 0).all() and (dv[:, dead] == 0).all()
    more = np.full((1, 5, KV_HEADS, WIDTH), np.nan, np.float32)
    longer = (np.concatenate([x, more], axis=1) for x in (K, V))
    found = attended(strategy, Q, *longer, W, INTERVAL, np.concatenate([NUMBER, np.zeros((1, 5), np.int32)], axis=1))
    assert_same([*found[:3], *(x[:, :KEYS] for x in found[3:])], plain)
    # Every query head with a key head of its own.
    group = HEADS // KV_HEADS
    wide = attended(strategy, Q, np.repeat(K, group, axis=2), np.repeat(V, group, axis=2), W, INTERVAL, NUMBER)
    assert_same([*wide[:3], *(x.reshape(1, KEYS, KV_HEADS, group, WIDTH).sum(3) for x in wide[3:])], plain)
    low, high = INTERVAL[0, :, :1], INTERVAL[0, :, 1:]
    blind = np.flatnonzero(~((low <= NUMBER) & (high >= NUMBER) & (NUMBER > 0)).any(1))
    assert 0 in blind
    assert (o[:, blind] == 0).all() and np.isneginf(lse[:, blind]).all() and (dq[:, blind] == 0).all()


@pytest.mark.slow
def test_the_same_on_four_devices() -> None:
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    words = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:xdist", __file__]
    done = subprocess.run(words, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "4 passed" in done.stdout
