# SPDX-License-Identifier: Apache-2.0
"""What every tracked file owes to whoever clones the repository."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1_000_000
# A folder of somebody's machine, or the address of a package index. Split, so that this file passes its own test.
MACHINE = re.compile(r"(?<![\w.~-])/(?:wo" r"rk/|ho" r"me/\w+/|Us" r"ers/\w+/|ro" r"ot/\.|op" r"t/pypi)")
INDEX = re.compile(r"--(?:extra-)?index" r"-url|--find" r"-links|https?://[\w.-]*pypi[\w.-]*/simp" r"le|file:/" r"//")


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("needs a git checkout (.git is missing)")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_is_large(tracked: list[Path]) -> None:
    assert {str(f.relative_to(ROOT)): f.stat().st_size for f in tracked if f.stat().st_size >= LIMIT} == {}


def test_notebooks_are_small(tracked: list[Path]) -> None:
    assert {f.name: f.stat().st_size for f in tracked if f.suffix == ".ipynb" and f.stat().st_size >= 300_000} == {}


def test_no_file_names_a_machine_or_an_index(tracked: list[Path]) -> None:
    found = []
    for file in tracked:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if MACHINE.search(line) or INDEX.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_sources_carry_the_licence_line(tracked: list[Path]) -> None:
    sources = [f for f in tracked if f.suffix == ".py" and f.stat().st_size]
    bare = [f for f in sources if "SPDX-License-Identifier: Apache-2.0" not in f.read_text().split("\n", 2)[0]]
    assert [str(f.relative_to(ROOT)) for f in bare] == []


def test_constraints_are_exact_pins() -> None:
    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if x and not x.startswith("#")]
    assert [x for x in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", x)] == []


def test_every_dependency_is_pinned() -> None:
    def key(name: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=~!; ]", name)[0]).lower()

    pinned = {key(x) for x in (ROOT / "constraints.txt").read_text().splitlines() if "==" in x}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {key(d) for d in [*project["dependencies"], *project["optional-dependencies"]["dev"]]}
    assert wanted - pinned == set()


def test_links_in_the_documents_lead_somewhere(tracked: list[Path]) -> None:
    dead = []
    for file in tracked:
        if file.suffix != ".md":
            continue
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", file.read_text()):
            if not re.match(r"[a-z]+:", target) and not (file.parent / target).exists():
                dead.append(f"{file.relative_to(ROOT)} -> {target}")
    assert dead == []


def test_the_accuracy_table_of_the_readme_is_its_records() -> None:
    from experiments.vit import accuracy
    from vtjax.viz import tables

    if not accuracy.RECORDS.exists():
        pytest.skip(f"no records yet ({accuracy.RECORDS.relative_to(ROOT)})")
    text = accuracy.table(tables.read_jsonl(accuracy.RECORDS))
    assert tables.refresh(ROOT / "README.md", {"accuracy": text}, check=True) == [], (
        "run python -m experiments.vit.accuracy"
    )
