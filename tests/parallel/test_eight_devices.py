# SPDX-License-Identifier: Apache-2.0
"""The same program on eight (forced) CPU devices and on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import devices
from tests.parallel import eight
from tests.train import toy
from vtjax.parallel import mesh as mesh_lib
from vtjax.train import checkpoint, loop
from vtjax.train.state import flatten

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("eight")
    environment = {**os.environ, "XLA_FLAGS": devices.flags(8)}
    command = [sys.executable, "-m", "tests.parallel.eight", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.splitlines()[-1])
    assert out["devices"] == 8
    return out, folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    settings = eight.config()
    loop.train(toy.task(settings), toy.Data(settings), settings, folder)
    return folder


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def close(a: Path, b: Path) -> None:
    for x, y in zip(lines(a), lines(b), strict=True):
        assert x.keys() == y.keys()
        np.testing.assert_allclose(list(x.values()), list(y.values()), rtol=1e-5, atol=1e-6)
    for ema in (False, True):
        one, other = (flatten(checkpoint.load_params(folder, ema=ema)[1]) for folder in (a, b))
        for path, value in one.items():
            np.testing.assert_allclose(value, other[path], rtol=1e-4, atol=1e-5, err_msg=path)


def test_a_split_run_is_the_run_on_one_device(child: Any, straight: Path) -> None:
    close(straight, child[1] / "split")


def test_a_checkpoint_of_eight_devices_resumes_on_one(child: Any, straight: Path) -> None:
    assert child[0]["preempted"] and checkpoint.load_meta(child[1] / "half")["step"] == 4
    settings = eight.config()
    loop.train(toy.task(settings), toy.Data(settings), settings, child[1] / "half")
    close(straight, child[1] / "half")


def test_first_steps_of_a_vit_agree_with_one_device(child: Any) -> None:
    losses, _, _ = eight.vit_losses(eight.config())
    np.testing.assert_allclose(losses, child[0]["losses"], rtol=1e-5)


def test_a_decoder_over_all_axes_writes_what_it_writes_on_one_device(child: Any) -> None:
    assert eight.lm_tokens(mesh_lib.make({"data": -1})) == child[0]["lm_tokens"]


def test_a_kernel_works_on_every_device_s_own_samples_and_heads(child: Any) -> None:
    assert child[0]["splash_error"] < 1e-5


def test_experts_are_drawn_alike_on_any_number_of_devices(child: Any) -> None:
    alone, there = eight.pooled(mesh_lib.make({"data": -1})), child[0]["pooled"]
    assert alone["choice"] == there["choice"] and len({tuple(c) for c in alone["choice"]}) > 1
    np.testing.assert_allclose(there["logits"], alone["logits"], atol=2e-5)


def test_parameters_and_their_moments_are_split_and_the_step_compiles_once(child: Any) -> None:
    assert child[0]["query"] == [[8, 8], [8, 8]]
    assert child[0]["steps_compiled"] == 1


def test_activations_are_pinned_where_they_divide(child: Any) -> None:
    assert child[0]["constrained"] == [2, 3]
    assert child[0]["uneven"] is True


def test_meshes_and_batches_of_eight(child: Any) -> None:
    assert child[0]["shape"] == {"data": 4, "fsdp": 1, "context": 1, "tensor": 2}
    expected = "expected that many as product, so a multiple of 3 with -1"
    assert child[0]["three"] == f"mesh data=-1, fsdp=3, context=1, tensor=1 does not fit 8 devices, {expected}"
    assert child[0]["uneven_batch"] == "a batch of 6 does not divide over data x fsdp = 4 devices"
