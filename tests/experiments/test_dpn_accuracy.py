# SPDX-License-Identifier: Apache-2.0
"""The arms of DPN's comparison: every one has a config and a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.dpn import accuracy


def test_every_arm_has_a_config_and_a_folder_of_its_own() -> None:
    folders: list[str] = []
    for kind, made in accuracy.ARMS.items():
        for name, leaves in made():
            config = accuracy.settings(name, leaves, 3, kind)
            assert config.seed == 3 and config.init_from != config.workdir
            folders.append(config.workdir)
            if before := leaves.get("after"):
                other = "easyvqa" if kind == "easyvqa" else "routers"
                assert config.init_from == accuracy.arm_run(before, 3, other)
                assert before in dict(accuracy.ARMS[other]())
    assert len(set(folders)) == len(folders) > 40


def test_controls_of_gentle_arms_learn_at_their_rate_and_add_no_token() -> None:
    made = [accuracy.settings(name, leaves, 0, "gentle") for name, leaves in accuracy.gentle()]
    assert {(config.optim.lr, config.dpn.token, config.steps) for config in made} == {(1e-4, "answer", 300)}


def test_an_arm_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "accuracy.jsonl"
    assert accuracy.main(["routers", "--only=routres", f"--out={out}"]) == 2
    said = capsys.readouterr().err
    assert "--only must mean an arm of routers" in said and "found 'routres'" in said and said.count("\n") == 1
    assert not out.exists()
