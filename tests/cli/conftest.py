# SPDX-License-Identifier: Apache-2.0
"""The command line in this process, and one small finished run that the tests copy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from vtjax.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
TINY = f"--config={ROOT / 'configs' / 'vit.py'}:tiny,steps=4,batch_size=8"


class Outcome(NamedTuple):
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The last line of standard output."""
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def vtjax(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`vtjax(*argv)`: runs the command line in this process."""

    def call(*argv: str | Path) -> Outcome:
        capsys.readouterr()
        try:
            code = main([str(a) for a in argv])
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="package")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of tiny: 4 steps, checkpoints after 2 and 4. Only to be read."""
    workdir = tmp_path_factory.mktemp("cli") / "finished"
    assert main(["run", TINY, f"--workdir={workdir}", "--config.checkpoint.every=2"]) == 0
    return workdir


@pytest.fixture
def run_copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of `finished` that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))
