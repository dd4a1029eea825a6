# SPDX-License-Identifier: Apache-2.0
"""The code in the documents runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.test_layering import breaches

ROOT = Path(__file__).resolve().parent.parent


def python_blocks(file: Path) -> list[tuple[int, str]]:
    """(line number of the first line, source) of every ```python block."""
    text = file.read_text()
    return [
        (text[: m.start(1)].count("\n") + 1, m[1]) for m in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)
    ]


def run_blocks(file: Path) -> dict[str, Any]:
    """Runs the blocks of a document in one namespace; a traceback gives the document's own line numbers."""
    namespace: dict[str, Any] = {"__name__": "document"}
    blocks = python_blocks(file)
    assert blocks, f"{file} has no python blocks"
    for line, source in blocks:
        exec(compile("\n" * (line - 1) + source, str(file), "exec", dont_inherit=True), namespace)
    return namespace


def test_adding_a_method_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    namespace = run_blocks(ROOT / "docs" / "adding-a-method.md")
    assert namespace["result"]["kept"] < 1.0


def test_files_of_adding_a_method_may_import_what_they_import() -> None:
    text = (ROOT / "docs" / "adding-a-method.md").read_text()
    blocks = re.findall(r"^`([\w/]+\.py)`[^\n]*:\n\n```python\n(.*?)^```", text, re.M | re.S)
    assert len(blocks) == text.count("\n```python\n"), "a block without the name of its file above it"
    ours = [(file.split("/")[1], source) for file, source in blocks if file.startswith("vtjax/")]
    assert {package for package, _ in ours} == {"ops", "methods"}
    assert [breach for package, source in ours for breach in breaches(package, source)] == []


def test_the_quickstart_of_the_readme_runs(shared_data: Any) -> None:
    shared_data("vit_ti16_augreg.safetensors")
    namespace = run_blocks(ROOT / "README.md")
    assert namespace["logits"].shape == (1, 1000)
    assert namespace["aux"]["features"].shape == (1, 197, 192)
    assert namespace["aux"]["pooled"].shape == (1, 192)
    assert namespace["m"].spec.diff(namespace["narrow"]) == {"blocks[11].mlp": (768, 384)}
