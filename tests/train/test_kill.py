# SPDX-License-Identifier: Apache-2.0
"""Real processes, really killed. `python -m tests.train.kill_resume` does the same many times."""

from __future__ import annotations

import json
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
