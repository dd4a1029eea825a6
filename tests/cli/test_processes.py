# SPDX-License-Identifier: Apache-2.0
"""Real processes: exit codes, what a scheduler sees, and that stderr stays one line without this process's settings."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = f"--config={ROOT / 'configs' / 'vit.py'}:tiny,batch_size=8"
VTJAX = [sys.executable, "-m", "vtjax"]


def vtjax(*argv: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*VTJAX, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False, timeout=300)


def test_bad_input_from_another_folder(tmp_path):
    for argv, part in (
        (["run", TINY, f"--workdir={tmp_path / 'w'}", "--config.data.name=imagenet2012"], "imagenet2012"),
        (["eval", TINY, "--config.init_from=no/such.safetensors"], "no/such.safetensors"),
        (["inspect", "no_such_name"], "no_such_name"),
    ):
        done = vtjax(*argv, cwd=tmp_path)
        assert done.returncode == 2, done
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1 and part in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "code", "output"),
    [(signal.SIGTERM, 75, {"preempted": True}), (signal.SIGINT, 130, {"interrupted": True})],
)
def test_a_signal_saves_and_the_next_start_finishes(tmp_path, number, code, output):
    workdir = tmp_path / "w"
    argv = [
        "run",
        TINY,
        f"--workdir={workdir}",
        "--config.log_every=1",
        "--config.checkpoint.every=1000",
        "--config.optim.warmup=0",
    ]
    steps = "--config.steps=100000"
    child = subprocess.Popen(
        [*VTJAX, *map(str, argv), steps],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert child.stderr is not None and child.stdout is not None
    for line in child.stderr:
        if line.startswith("step 3/"):
            child.send_signal(number)
            break
    errors = child.stderr.read()
    printed = child.stdout.read()
    assert child.wait(timeout=120) == code, errors
    assert json.loads(printed.splitlines()[-1]) == output
    assert "Traceback" not in errors
    reached = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert 3 <= reached < 100_000
    done = vtjax(*argv, f"--config.steps={reached + 2}", "--config.allow_config_change=true")
    assert done.returncode == 0, done.stderr
    assert f"checkpoints/{reached}" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["step"] == reached + 2


def test_a_non_finite_loss_stops_the_run_with_its_own_code(tmp_path):
    argv = ["--config.steps=20", "--config.optim.lr=1e38", "--config.optim.warmup=0", "--config.optim.clip=0"]
    done = vtjax("run", TINY, f"--workdir={tmp_path / 'w'}", *argv)
    assert done.returncode == 3, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "step" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "w" / "result.json").exists()


def test_two_processes_share_one_run(tmp_path):
    """Each holds half of every batch; both tell the same result, which is that of one process on two devices."""
    workdir, port = tmp_path / "w", free_port()
    argv = ["run", TINY, "--config.steps=4", "--config.checkpoint.every=2", "--config.optim.warmup=0"]

    def start(index: int) -> subprocess.Popen[str]:
        variables = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
        }
        command = [*VTJAX, *argv, f"--workdir={workdir}"]
        environment = {**os.environ, **variables}
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )

    children = [start(index) for index in range(2)]
    results = []
    for child in children:
        output, errors = child.communicate(timeout=200)
        assert child.returncode == 0, errors
        results.append(json.loads(output.splitlines()[-1]))
    assert results[0]["count"] == results[1]["count"] == 256
    assert results[0]["params_sha256"] == results[1]["params_sha256"]
    assert results[0]["devices"].startswith("2 x")
    alone = json.loads(vtjax("eval", f"--workdir={workdir}").stdout.splitlines()[-1])
    assert (alone["top1"], alone["count"]) == (results[0]["top1"], 256)


def test_half_of_the_description_of_several_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    done = vtjax("run", TINY, f"--workdir={tmp_path / 'w'}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "JAX_PROCESS_ID=None" in done.stderr


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]
