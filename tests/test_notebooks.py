# SPDX-License-Identifier: Apache-2.0
"""Every notebook runs from its first cell to its last at the size `tiny`, and is committed with its real outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest

from notebooks.execute import execute, main

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert [n.name for n in NOTEBOOKS][:1] == ["00_tour.ipynb"]


# Their runs are those of the tests of their experiments.
LONG = ("all_five", "das", "dgmr", "dpn", "ltmp", "lvxattn")


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[pytest.mark.slow] if p.stem in LONG else []) for p in NOTEBOOKS],
    ids=lambda p: p.stem,
)
def test_notebook_runs(path: Path) -> None:
    before = path.read_bytes()
    executed = execute(path, size="tiny", timeout=300)
    assert path.read_bytes() == before
    outputs = [o for c in executed.cells if c.cell_type == "code" for o in c.outputs]
    assert any("image/png" in o.get("data", {}) for o in outputs), "no figure was drawn"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_outputs_are_of_one_clean_run(path: Path) -> None:
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert [o for c in cells for o in c.outputs if o.output_type == "error"] == []


def test_the_run_speaks_of_its_cells_and_of_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cells = [nbformat.v4.new_markdown_cell("# A"), nbformat.v4.new_code_cell("1 + 1\n2 + 2")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    said: list[str] = []
    executed = execute(tmp_path / "a.ipynb", size="", say=said.append)
    assert executed.cells[1].outputs[0].data["text/plain"] == "4"
    assert said == ["a.ipynb: cell 2 of 2: 1 + 1"]
    assert capfd.readouterr().err == ""


def test_a_name_without_a_notebook_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    known = ", ".join(path.stem for path in NOTEBOOKS)
    monkeypatch.setenv("ONLY", "nope")
    assert main([]) == 2
    assert capsys.readouterr().err == f"no notebook to run: ONLY must be one of {known}, found 'nope'\n"
