# SPDX-License-Identifier: Apache-2.0
"""Frames over several slices: parts are merged within a slice before they leave it, and the result is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from tests import devices
from vtjax.parallel.xattn import cross_attention


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    """What eight devices say."""
    environment = {**os.environ, "XLA_FLAGS": devices.flags(8), "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-m", "tests.parallel.slices"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_a_merge_in_two_steps_is_the_merge_in_one(told: list[dict[str, Any]]) -> None:
    flat, steps = told[:2]
    assert max(flat["error"], steps["error"]) < 1e-12
    # Of 16 rows in all, a device has 2, and its slice 8. What reaches it over the slow axis: queries forward and
    # backward (the compiler may keep them), gradients, two statistics, and parts of 4 rows; never all 16.
    row = 2 * 4 * (4 + 1)  # batch x heads x (head width and a statistic)
    assert steps["over"] >= 5 and steps["elements"] <= 7 * 4 * row


@pytest.mark.slow
def test_what_is_exchanged_has_the_type_that_is_asked_for(told: list[dict[str, Any]]) -> None:
    """Of a bfloat16 model: partial outputs and gradients of queries, and one statistic of rows, once per leg."""
    assert [(case["slow"], case["wire"]) for case in told[2:]] == [
        (slow, wire) for slow in (False, True) for wire in (None, "float32")
    ]
    for case in told[2:]:
        legs = 1 + case["slow"]
        assert case["parts"] == ["bf16" if case["wire"] is None else "f32"] * 2 * legs
        assert case["statistics"] == ["f32"] * legs


def test_several_axes_are_needed() -> None:
    mesh, q = Mesh(np.array(jax.devices()[:1]), ("cp",)), jnp.zeros((1, 2, 1, 4))
    with pytest.raises(ValueError, match=r"slow=True needs several axes and strategy='gather_q', found \('cp',\)"):
        cross_attention(q, q, q, mesh=mesh, axis="cp", slow=True)
