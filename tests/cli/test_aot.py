# SPDX-License-Identifier: Apache-2.0
"""`vtjax aot` with the real TPU compiler, in processes of its own: small models, one that cannot fit, bad input."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def aot(*argv: str, code: int = 0, **environment: str) -> tuple[dict[str, Any], str]:
    """(result, standard error) of the command."""
    variables = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, "-m", "vtjax", "aot", *argv]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**variables, **environment}, check=False, timeout=400
    )
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}, done.stderr


SMALL = "--config=configs/vit.py:s16_i1k,batch_size=64"
SHALLOW = ("--config.model.depth=2", "--config.optim.warmup=10", "--config.model.mlp=512", "--config.model.heads=2")


@pytest.mark.slow
def test_a_training_step_with_all_three_axes() -> None:
    """Nobody said JAX_PLATFORMS=cpu here, and nothing of libtpu's start-up reaches the user."""
    axes = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    result, errors = aot(SMALL, "--topology=v5e:2x4", *SHALLOW, *axes)
    assert result["fits"] is True and result["devices"] == 8
    assert result["mesh"] == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    parts = [result[f"{name}_bytes"] for name in ("argument", "output", "temp", "code")]
    assert result["hbm_bytes_per_device"] == sum(parts) - result["alias_bytes"]
    assert result["hbm_bytes_per_device"] < result["hbm_limit"] == round(15.75 * 2**30)
    # Activations that the partitioner replicates would show here first.
    assert result["temp_ratio"] < 3
    gradients = 4 * result["params"]
    sent = sum(entry["bytes"] for entry in result["collectives"].values())
    assert {"all-reduce", "all-gather"} <= set(result["collectives"]) and sent > gradients / 8
    assert 3 * 64 * 2 * 1e8 < result["flops"] == 8 * result["flops_per_device"]
    known = ("compiling", "-", "memory", "of it", "FLOPs", "compiled", "all-", "reduce-", "collective-")
    assert all(line.startswith(known) for line in errors.splitlines() if line), errors


@pytest.mark.slow
def test_an_evaluation_step_on_two_slices() -> None:
    result, _ = aot(SMALL, "--topology=v6e:2x2", "--slices=2", "--step=eval", *SHALLOW)
    assert result["fits"] is True and (result["devices"], result["slices"]) == (8, 2)
    assert result["collectives"]["dcn-send"]["count"] >= 1


def test_a_batch_that_cannot_fit() -> None:
    result, errors = aot("--config=configs/vit.py:s16_i1k,batch_size=65536", "--topology=v5e:2x2", *SHALLOW)
    assert result["fits"] is False
    assert result["hbm_bytes_per_device"] > result["hbm_limit"]
    assert "does NOT fit" in errors


@pytest.mark.parametrize(
    ("topology", "slices", "axes"),
    [
        ("v5p:4x4x4", 1, {"tensor": 2}),
        ("v5p:4x4x4", 2, {"data": 2, "fsdp": 8, "tensor": 8}),
        ("v6e:4x4", 2, {"fsdp": 8}),
        ("tpu7x:2x2x1", 1, {"tensor": 8, "data": 1}),
    ],
)
def test_axes_may_take_a_part_of_the_torus(topology: str, slices: int, axes: dict[str, int]) -> None:
    sizes = {"data": -1, **axes}
    code = (
        "from vtjax.account import aot; from vtjax.parallel import mesh\n"
        f"made = mesh.make({sizes}, aot.topology({topology!r}, {slices}))\n"
        f"first = made.devices[: made.shape['data'] // {slices}].flat\n"
        "print(len({mesh.slice_of(d) for d in first}), dict(made.shape))"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 ") and all(f"'{name}': {size}" in done.stdout for name, size in axes.items())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--topology=v5e:3x4"], "found 'v5e:3x4'"),
        (["--topology=h100:8"], "found 'h100:8'"),
        (["--topology=v2:2x2"], "--topology must be of one of TPU v4"),
        (
            ["--topology=v5e:2x4", "--config.mesh.fsdp=3"],
            "mesh data=-1, fsdp=3, context=1, tensor=1 does not fit 8 devices",
        ),
        (["--topology=v5e:2x4", "--slices=3", "--config.mesh.data=2", "--config.mesh.fsdp=12"], "of the 3 slices"),
        (["--topology=v5e:2x4", "--config.batch_size=100"], "batch_size must be a multiple of"),
        ([], "--topology"),
    ],
)
def test_bad_input_is_one_line(argv: list[str], message: str) -> None:
    _, errors = aot(SMALL, *argv, code=2)
    assert errors.count("\n") == 1 and message in errors, errors
