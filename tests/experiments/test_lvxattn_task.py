# SPDX-License-Identifier: Apache-2.0
"""The experiment on distributed cross-attention: a run, the same over eight devices and two processes; bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.lvxattn import main as experiment
from tests import devices
from tests.cli.test_processes import Pair
from vtjax.cli import aot, assemble, main
from vtjax.cli import config as config_lib
from vtjax.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
TINY = "configs/lvxattn.py:tiny"


def config(name: str = TINY, **overrides: Any) -> config_lib.Config:
    return config_lib.load_config(name, overrides={k.replace("__", "."): str(v) for k, v in overrides.items()})


def losses(workdir: Path) -> list[float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "grad_norm" in line]


def test_a_run(tmp_path: Path, capsys: Any) -> None:
    assert main.main(["run", f"--config={TINY},steps=4", f"--workdir={tmp_path}", "--config.log_every=2"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["count"] == 12 and result["strategy"] == "auto" and np.isfinite(losses(tmp_path)).all()


@pytest.mark.slow
def test_frames_over_eight_devices_and_over_two_processes_are_the_run_of_one(tmp_path: Path) -> None:
    short = f"{ROOT / TINY},frames=7,steps=4", "--config.log_every=2", "--config.checkpoint.every=4"

    def run(name: str, count: int, *more: str) -> list[float]:
        environment = {**os.environ, "XLA_FLAGS": devices.flags(count)}
        words = [sys.executable, "-m", "vtjax", "run", f"--workdir={tmp_path / name}", f"--config={short[0]}"]
        subprocess.run([*words, *short[1:], *more], check=True, cwd=ROOT, env=environment, timeout=600)
        return losses(tmp_path / name)

    alone = run("one", 1)
    over = "--config.mesh.context=4", "--config.mesh.data=2"
    np.testing.assert_allclose(run("eight", 8, *over), alone, rtol=2e-4)
    slices = "--config.mesh.slice=2", "--config.mesh.context=2", "--config.mesh.data=2"
    np.testing.assert_allclose(run("slices", 8, *slices), alone, rtol=2e-4)
    # Four devices each, and the context axis reaches over both.
    words = ("run", f"--config={short[0]}", *short[1:], f"--workdir={tmp_path / 'pair'}")
    children = Pair(*words, "--config.mesh.context=8").children
    errors = [child.communicate(timeout=900)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], errors
    np.testing.assert_allclose(losses(tmp_path / "pair"), alone, rtol=2e-4)


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ({"attend__strategy": "ring"}, "config.attend.strategy must be one of auto, gather_q, .*, found 'ring'"),
        ({"attend__kernel": "cuda"}, "config.attend.kernel must be one of auto, chunked, tpu, gpu, found 'cuda'"),
        ({"model__bridge__cross": "none", "model__bridge__projector": "linear"}, "must be a form of cross-attention"),
        (
            {"attend__strategy": "ulysses", "mesh__context": 4},
            "'ulysses' needs key heads that divide over config.mesh.context=4, found 2",
        ),
        (
            {"attend__strategy": "ring_q", "mesh__slice": 2},
            r"strategy must be auto or gather_q .* several slices \(config.mesh.slice=2\), found 'ring_q'",
        ),
        ({"data__frames": 3}, "needle needs 4 frames per camera, one in every quarter, found 3 for 1"),
    ],
)
def test_bad_settings_are_named(leaves: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        experiment.build(config(**leaves))
    assert "\n" not in str(caught.value)


def test_a_context_that_does_not_fit_is_named() -> None:
    with pytest.raises(InputError, match="context=3, tensor=1 does not fit 1 devices"):
        experiment.order(config(mesh__context=3))


def test_published_models_are_described_with_their_videos() -> None:
    for name, frames in (("llama3v_11b", 96), ("owl3_7b", 256), ("openflamingo_3b", 1024)):
        made = config(f"configs/lvxattn.py:{name}")
        task = assemble.task(made)
        shapes = experiment.batch_shapes(made, task, True)
        assert shapes["images"][0][:2] == (4, frames) and shapes["image_interval"][0] == (4, made.data.limit, 2)
        assert task.frames == ("images", "image_number") and made.mesh.context == 8
        assert jax.eval_shape(task.init, jax.random.key(0))[0]["bridge"]
        assert re.search("frames", str(experiment.distributed(made)["frames"].join.__module__))


def test_shapes_for_a_mesh_of_all_the_rest_know_its_size() -> None:
    """`vtjax aot` with `config.mesh.context=-1`: frames are filled up to a multiple of the devices that there are."""
    made = config(mesh__data=1, mesh__context=-1, data__frames=5, data__limit=64)
    known = aot.resolved(made, types.SimpleNamespace(shape={"data": 1, "fsdp": 1, "context": 4, "tensor": 1}))
    assert (made.mesh.context, known.mesh.context) == (-1, 4)
    shapes = experiment.batch_shapes(known, assemble.task(known), True)
    assert shapes["images"][0][1] == shapes["image_number"][0][1] == 8
