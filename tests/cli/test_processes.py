# SPDX-License-Identifier: Apache-2.0
"""Real processes: exit codes, what a scheduler sees, and that stderr stays one line without this process's settings."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests import devices
from vtjax.train import checkpoint

ROOT = Path(__file__).resolve().parents[2]
TINY = f"--config={ROOT / 'configs' / 'vit.py'}:tiny,batch_size=8"
ONE_BLOCK = "--config.model.depth=1"  # half the time to compile
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
        ONE_BLOCK,
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


class Pair:
    """Two processes of one run, with four devices each."""

    def __init__(self, *argv: str | Path, each: tuple[tuple[str, ...], ...] = ((), ())):
        port = free_port()
        self.children = []
        for index in range(2):
            variables = {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
                "XLA_FLAGS": devices.flags(4),
            }
            command = [*VTJAX, *map(str, argv), *each[index], "--config.heartbeat_timeout=5"]
            child = subprocess.Popen(
                command, stdout=-1, stderr=-1, text=True, cwd=ROOT, env={**os.environ, **variables}
            )
            self.children.append(child)

    def wait_for(self, line: str) -> None:
        """Until process 0, which speaks for both, says a line that begins so."""
        for said in self.children[0].stderr:
            if said.startswith(line):
                return
        raise AssertionError(f"process 0 ended without {line!r}")

    def end(self) -> list[tuple[int, list[str], str]]:
        """(exit code, lines of standard output, standard error) of both."""
        out = []
        for child in self.children:
            output, errors = child.communicate(timeout=200)
            out.append((child.returncode, output.splitlines(), errors))
        return out


SPLIT = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")


def test_one_device_eight_and_two_processes_compute_the_same(tmp_path, monkeypatch):
    """Ten steps alone; on eight devices, whose checkpoint of step 9 two processes go on from, and theirs one device."""
    argv = ["run", f"{TINY},steps=10", ONE_BLOCK, "--config.log_every=1", "--config.ema=0.9", "--config.accumulate=2"]
    assert vtjax(*argv, f"--workdir={tmp_path / 'one'}").returncode == 0
    moving = [
        *argv,
        f"--workdir={tmp_path / 'moving'}",
        "--config.checkpoint.every=3",
        "--config.allow_config_change=1",
    ]
    monkeypatch.setenv("XLA_FLAGS", devices.flags(8))
    eight = vtjax(*moving, *SPLIT)
    assert eight.returncode == 0, eight.stderr
    assert (tmp_path / "moving" / "checkpoints" / "9").is_dir()
    shutil.rmtree(tmp_path / "moving" / "checkpoints" / "10")
    (tmp_path / "moving" / "result.json").unlink()
    first = lines(tmp_path / "moving")
    results = Pair(*moving, *SPLIT).end()
    assert [code for code, _, _ in results] == [0, 0], results
    one, other = (json.loads(output[-1]) for _, output, _ in results)
    assert [len(output) for _, output, _ in results] == [1, 1]  # nothing but the result: Gloo is quiet
    assert one["params_sha256"] == other["params_sha256"] and one["count"] == 256
    assert one["devices"].startswith("8 x")
    assert "resumed from" in results[0][2] and "step 9 of 10" in results[0][2]
    for found in (first, lines(tmp_path / "moving")):
        assert [line["step"] for line in found] == list(range(1, 11))
        for a, b in zip(lines(tmp_path / "one"), found, strict=True):
            assert a.keys() == b.keys()
            np.testing.assert_allclose([*a.values()], [*b.values()], rtol=1e-5)
    monkeypatch.setenv("XLA_FLAGS", devices.flags(1))
    alone = json.loads(vtjax("eval", f"--workdir={tmp_path / 'moving'}").stdout.splitlines()[-1])
    assert (alone["top1"], alone["count"]) == (one["top1"], 256)


@pytest.mark.slow
def test_processes_may_share_the_rows_of_a_batch(tmp_path):
    """With all eight devices on the tensor axis both processes hold the whole batch."""
    argv = ["run", f"{TINY},steps=2", "--config.log_every=1", "--config.optim.warmup=0"]
    assert vtjax(*argv, f"--workdir={tmp_path / 'one'}").returncode == 0
    results = Pair(*argv, f"--workdir={tmp_path / 'two'}", "--config.mesh.data=1", "--config.mesh.tensor=8").end()
    assert [code for code, _, _ in results] == [0, 0], results
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        np.testing.assert_allclose([*a.values()], [*b.values()], rtol=1e-5)


@pytest.mark.slow
def test_thresholds_start_and_settle_alike_on_two_processes(tmp_path):
    argv = ["run", f"--config={ROOT / 'configs' / 'ltmp.py'}:tiny,steps=1,batch_size=8", "--config.ltmp.start=even"]
    argv += ["--config.ltmp.settle_images=16", "--config.ltmp.start_images=16", "--config.checkpoint.best="]
    assert vtjax(*argv, f"--workdir={tmp_path / 'one'}").returncode == 0
    results = Pair(*argv, f"--workdir={tmp_path / 'two'}", "--config.mesh.data=2", "--config.mesh.fsdp=4").end()
    assert [code for code, _, _ in results] == [0, 0], results
    one, two = (checkpoint.load_params(tmp_path / name)[1]["ltmp"] for name in ("one", "two"))
    assert one.keys() == two.keys() == {"merge_threshold", "prune_threshold"}
    for name, values in one.items():
        np.testing.assert_allclose(values, two[name], atol=1e-5)
    counts = [json.loads((tmp_path / name / "calibration.json").read_text())["kept"] for name in ("one", "two")]
    assert (np.asarray(counts[0]) != np.asarray(counts[1])).mean() < 0.01  # near-ties


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_the_loss_of_a_process_ends_the_other_and_names_it(tmp_path, lost):
    workdir = tmp_path / "w"
    argv = ["run", TINY, ONE_BLOCK, f"--workdir={workdir}", "--config.log_every=1", "--config.checkpoint.every=5"]
    pair = Pair(*argv, "--config.steps=100000")
    pair.wait_for("step 12/")
    pair.children[lost].kill()
    began = time.monotonic()
    code, output, errors = pair.end()[1 - lost]
    assert code == 76 and output == [], errors
    assert time.monotonic() - began < 60  # 5 s of heartbeats, the rest for a busy machine
    assert f"vtjax: process {lost} lost: " in errors.splitlines()[-1]
    assert "Traceback" not in errors and "***" not in errors
    again = vtjax(*argv, "--config.steps=12", "--config.allow_config_change=true")
    assert again.returncode == 0, again.stderr
    assert "resumed from" in again.stderr and "(step 10 of 12)" in again.stderr


@pytest.mark.slow
def test_a_signal_to_one_process_saves_the_same_step_on_both(tmp_path):
    workdir = tmp_path / "w"
    argv = ["run", TINY, f"--workdir={workdir}", "--config.checkpoint.every=1000", "--config.log_every=10"]
    # The tensor axis spans both: they hold the same rows, and each its own word on whether to stop.
    pair = Pair(*argv, "--config.steps=100000", "--config.mesh.data=1", "--config.mesh.tensor=8")
    pair.wait_for("step 10/")
    pair.children[1].send_signal(signal.SIGTERM)
    results = pair.end()
    assert [(code, output) for code, output, _ in results] == [(75, ['{"preempted": true}'])] * 2, results
    (saved,) = [int(p.name) for p in (workdir / "checkpoints").iterdir()]
    assert 10 <= saved < 30  # soon, not only at the next line of the log
    assert f"checkpoints/{saved}" in results[0][2]


@pytest.mark.parametrize(
    ("each", "message"),
    [
        (
            (("--config.optim.lr=0.1",), ("--config.optim.lr=0.2",)),
            "all processes of a run must have the same config: config.optim.lr is 0.1 on process 0",
        ),
        (
            (("--config.model.depth=1",), ("--config.model.depth=2", "--config.model.mlp=32")),
            "config.model.depth is 1 on process 0",
        ),
    ],
)
def test_processes_with_unequal_configs_are_refused(tmp_path, each, message):
    workdir = tmp_path / "w"
    for code, output, errors in Pair("run", TINY, f"--workdir={workdir}", each=each).end():
        assert code == 2 and output == []
        joined, refused = errors.splitlines()
        assert joined.startswith("joined as process ") and message in refused, errors
    assert not workdir.exists()


def test_a_workdir_that_is_not_shared_is_refused(tmp_path):
    # The config must be the same, so the folders are the same word in different places.
    code = "import os, sys; os.chdir(sys.argv.pop(1)); from vtjax.cli.main import main; sys.exit(main())"
    argv = [sys.executable, "-c", code]
    port, children = free_port(), []
    for index, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        variables = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
            "PYTHONPATH": str(ROOT),
        }
        command = [*argv, str(tmp_path / name), "run", TINY, "--workdir=w", "--config.heartbeat_timeout=5"]
        children.append(subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env={**os.environ, **variables}))
    for child in children:
        output, errors = child.communicate(timeout=120)
        assert child.returncode == 2 and output == "", errors
        assert "must be one folder that all processes share" in errors and "process 1 does not see" in errors
    assert not list((tmp_path / "a" / "w").iterdir())


def lines(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_half_of_the_description_of_several_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    done = vtjax("run", TINY, f"--workdir={tmp_path / 'w'}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "JAX_PROCESS_ID=None" in done.stderr


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]
