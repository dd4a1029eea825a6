# SPDX-License-Identifier: Apache-2.0
"""Frames over several slices: parts are merged within a slice before they leave it, and the result is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from tests import devices
from vtjax.parallel.xattn import cross_attention


@pytest.mark.slow
def test_a_merge_in_two_steps_is_the_merge_in_one() -> None:
    environment = {**os.environ, "XLA_FLAGS": devices.flags(8), "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-m", "tests.parallel.slices"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    flat, steps = (json.loads(line) for line in done.stdout.splitlines())
    assert max(flat["error"], steps["error"]) < 1e-12
    # Of 16 rows in all, a device has 2, and its slice 8. What reaches it over the slow axis: queries forward and
    # backward (the compiler may keep them), gradients, two statistics, and parts of 4 rows; never all 16.
    row = 2 * 4 * (4 + 1)  # batch x heads x (head width and a statistic)
    assert steps["over"] >= 5 and steps["elements"] <= 7 * 4 * row


def test_several_axes_are_needed() -> None:
    mesh, q = Mesh(np.array(jax.devices()[:1]), ("cp",)), jnp.zeros((1, 2, 1, 4))
    with pytest.raises(ValueError, match=r"slow=True needs several axes and strategy='gather_q', found \('cp',\)"):
        cross_attention(q, q, q, mesh=mesh, axis="cp", slow=True)
