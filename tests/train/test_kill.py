# SPDX-License-Identifier: Apache-2.0
"""Real processes, really killed. `python -m tests.train.kill_resume` does the same many times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train import kill_resume
from vtjax.errors import EXIT_PREEMPTED

ARGS = ["--steps=12", "--every=3", "--hidden=100000", "--eval-every=6"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> str:
    return kill_resume.finish(tmp_path_factory.mktemp("straight"), ARGS)


def test_sigkill_in_the_middle_then_resume(straight: str, tmp_path: Path) -> None:
    child = kill_resume.start(tmp_path, [*ARGS, "--delay=0.05"])
    kill_resume.wait_for_step(child, tmp_path, 7)
    child.kill()
    assert child.wait() == -9
    assert not (tmp_path / "result.json").exists()
    # And once more, between the two parts of a save.
    child = kill_resume.start(tmp_path, [*ARGS, "--die-before-manifest=1"])
    assert child.wait() == -9
    assert kill_resume.finish(tmp_path, ARGS) == straight
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))


def test_sigkill_while_files_are_being_written(straight: str, tmp_path: Path) -> None:
    child = kill_resume.start(tmp_path, ARGS)
    kill_resume.wait_for_save(child, tmp_path, 6)
    child.kill()
    assert child.wait() == -9
    assert kill_resume.finish(tmp_path, ARGS) == straight


def test_sigterm_during_the_first_compilation_ends_with_75_and_resumes(straight: str, tmp_path: Path) -> None:
    child = kill_resume.start(tmp_path, [*ARGS, "--term-in-init"])
    _, err = child.communicate()
    assert child.returncode == EXIT_PREEMPTED == 75, err
    assert "SIGTERM: saved " in err and "Traceback" not in err
    assert kill_resume.finish(tmp_path, ARGS) == straight


@pytest.mark.slow
def test_many_kills(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.train.kill_resume", "--kills=12"]
    done = subprocess.run(command, cwd=kill_resume.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["equal"] == record["runs"] >= 6
    assert record["kills"]["unfinished"] > 0  # some of them really hit a save


@pytest.mark.slow
def test_a_vit_of_the_command_line_killed_and_resumed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vtjax", "run", "--config=configs/vit.py:tiny", "--config.log_every=1"]
    command += ["--config.checkpoint.every=7", "--config.eval_every=20"]

    def start(workdir: Path) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([*command, f"--workdir={workdir}"], cwd=kill_resume.ROOT, text=True, **pipes)

    def finish(workdir: Path) -> dict[str, float]:
        out, err = start(workdir).communicate()
        assert out, err
        return json.loads(out.splitlines()[-1])

    straight = finish(tmp_path / "straight")
    for step in (11, 33):
        child = start(tmp_path / "killed")
        kill_resume.wait_for_step(child, tmp_path / "killed", step)
        child.kill()
        child.communicate()
    resumed = finish(tmp_path / "killed")
    for name in ("params_sha256", "loss", "top1", "best_step"):
        assert resumed[name] == straight[name], name
    files = [tmp_path / name / "metrics.jsonl" for name in ("straight", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()
