# SPDX-License-Identifier: Apache-2.0
"""docs/configs.md is what its command makes, holds every variant, and reads the newest record of a compile."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs import all_five, das, dgmr, dpn, ltmp, lvxattn, vit, vlm
from docs import make_configs
from vtjax.errors import InputError
from vtjax.viz import tables

ROOT = Path(__file__).resolve().parents[2]
MODULES = (all_five, das, dgmr, dpn, ltmp, lvxattn, vit, vlm)
FILES = {module.__name__.split(".")[-1]: module.VARIANTS for module in MODULES}


@pytest.fixture(scope="module")
def built() -> dict[str, str]:
    return make_configs.build()


def test_the_committed_page_is_the_generated_one(built: dict[str, str]) -> None:
    assert tables.refresh(make_configs.PAGE, built, check=True) == [], "run `make docs`"


def test_every_variant_has_a_row(built: dict[str, str]) -> None:
    rows = re.findall(r"^\| `(\S+)` \|", built["configs"], re.M)
    assert rows == [f"{file}.py:{name}" for file, known in FILES.items() for name in known]
    # Published: DeiT-B has 86.6 M parameters and 17.6 G MACs.
    assert "| `vit.py:b16_i1k` | 86,567,656 | 17,563,828,224 |" in built["configs"]


@pytest.mark.parametrize(("module", "variant"), [(m, name) for m in MODULES for name in m.VARIANTS])
def test_the_docstring_names_the_expected_figure(module: Any, variant: str) -> None:
    """Either as a share or in percent."""
    text = " ".join((module.VARIANTS[variant].__doc__ or "").split())
    for figure in re.findall(r"0\.\d+", module.EXPECTED[variant].figure):
        assert figure in text or f"{100 * float(figure):.1f} %" in text


def compile_record(**changes: Any) -> str:
    record = {
        "config": "configs/vit.py:tiny",
        "step": "train",
        "topology": "v5e:2x4",
        "slices": 1,
        "devices": 8,
        "batch_size": 32,
        "hbm_bytes_per_device": 3 * 2**29,
        "hbm_limit": 63 * 2**28,
        "fits": True,
        "compile_s": 12.4,
    }
    return json.dumps({**record, **changes}) + "\n"


def test_compiles_come_from_the_newest_records(tmp_path: Path) -> None:
    results = tmp_path / "vit" / "results"
    results.mkdir(parents=True)
    lines = [
        compile_record(compile_s=99.0, fits=False),
        compile_record(),
        compile_record(topology="v6e:2x2", slices=2, step="eval"),
        compile_record(config="configs/vit.py:no_such_variant"),
    ]
    (results / "aot.jsonl").write_text("".join(lines))
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "vit.py", tmp_path / "configs")
    built = make_configs.build(configs=tmp_path / "configs", experiments=tmp_path)
    rows = built["compiles"].splitlines()[2:]
    assert rows[0] == "| `vit.py:tiny` | train | v5e:2x4 | 8 | 32 | 1.50 | 15.75 | yes | 12 |"
    assert rows[1].startswith("| `vit.py:tiny` | eval | 2 x v6e:2x2 |") and len(rows) == 2
    overview = {row.split("`")[1]: row for row in built["configs"].splitlines()[2:]}
    assert overview["vit.py:tiny"].endswith("| v5e:2x4, 2 x v6e:2x2 |")
    assert overview["vit.py:digits"].endswith("| not yet |")


@pytest.mark.parametrize(
    "source",
    ["VARIANTS = {'a': None}\n", "VARIANTS = {'a': None}\nEXPECTED = {'b': None}\n", "x = 1\n"],
)
def test_a_config_file_without_expectations_is_refused(tmp_path: Path, source: str) -> None:
    (tmp_path / "bare.py").write_text(source)
    with pytest.raises(InputError, match="bare.py must have VARIANTS and EXPECTED of the same names"):
        make_configs.build(configs=tmp_path, experiments=tmp_path)


@pytest.mark.slow
def test_the_command_checks_without_writing() -> None:
    before = make_configs.PAGE.read_bytes()
    command = [sys.executable, "-m", "docs.make_configs", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "nothing differs")
    assert make_configs.PAGE.read_bytes() == before
