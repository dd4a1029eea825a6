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
    # Of 16 rows in all a device has 4. What comes over the slow axis is the other slice's part of these: outputs and
    # their statistic, and gradients of queries; neither queries nor what they are made of.
    rows, batch, heads, width = 4, 2, 4, 4
    assert steps["over"] == 3 and steps["elements"] == 2 * rows * batch * heads * (2 * width + 1)


@pytest.mark.slow
def test_a_few_rows_that_all_devices_have_cross_once_and_merged(told: list[dict[str, Any]]) -> None:
    """As in decoding: an output and its statistic for 13 rows from the other slice, not from each of its devices."""
    decoded = told[8]
    assert decoded["error"] < 1e-12 and decoded["over"] == 1 and decoded["elements"] == 2 * 13 * 2 * 4 * (4 + 1)


@pytest.mark.slow
def test_what_is_exchanged_has_the_type_that_is_asked_for(told: list[dict[str, Any]]) -> None:
    """Of a bfloat16 model: partial outputs and gradients of queries, and one statistic of rows, within slices and
    between them."""
    assert [(case["slow"], case["wire"]) for case in told[2:6]] == [
        (slow, wire) for slow in (False, True) for wire in (None, "float32")
    ]
    for case in told[2:6]:
        dtype = "bf16" if case["wire"] is None else "f32"
        assert case["exchanged"] == [[dtype] * 2, ["f32"]]
        assert case["crossing"] == ([[dtype] * 2, ["f32"]] if case["slow"] else [[], []])


@pytest.mark.slow
def test_key_heads_that_are_fewer_than_the_devices_for_them_are_repeated(told: list[dict[str, Any]]) -> None:
    """Four query heads and two key heads over four devices: one of either on each, and gradients of two."""
    assert told[6]["heads"] == [1, 1] and told[6]["shape"] == [2, 37, 2, 4]
    assert told[6]["error"] < 1e-12
    # Ulysses splits key heads itself, over the other axis.
    assert told[7]["strategy"] == "ulysses" and told[7]["error"] < 1e-12


def test_several_axes_are_needed() -> None:
    mesh, q = Mesh(np.array(jax.devices()[:1]), ("cp",)), jnp.zeros((1, 2, 1, 4))
    with pytest.raises(ValueError, match=r"slow=True needs several axes and strategy='gather_q' .*, found \('cp',\)"):
        cross_attention(q, q, q, mesh=mesh, axis="cp", slow=True)
