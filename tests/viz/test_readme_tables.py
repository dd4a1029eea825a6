# SPDX-License-Identifier: Apache-2.0
"""No figure in a README is typed by hand: every table between markers is what its records say."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from vtjax.viz import tables

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(ROOT.glob("experiments/*/tables.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=[s.parent.name for s in SCRIPTS])
def test_readme_agrees_with_its_records(script: Path) -> None:
    module = importlib.import_module(f"experiments.{script.parent.name}.tables")
    found = module.build()
    if not found:
        pytest.skip(f"no records in experiments/{script.parent.name}/results yet")
    assert tables.refresh(module.README, found, check=True) == [], (
        f"run: python -m experiments.{script.parent.name}.tables"
    )


def test_beside_torch_table_takes_the_latest_of_each_case() -> None:
    from experiments.vit.tables import beside_torch

    def record(batch: int, seconds: float) -> dict:
        return {
            "kind": "forward",
            "model": "ViT-Ti/16",
            "batch": batch,
            "vtjax": {"median_s": seconds, "calls": 120},
            "torch": {"median_s": 0.012},
            "ratio": 0.012 / seconds,
            "ratio_range": [1.0, 1.5],
            "images_per_s": {"vtjax": batch / seconds},
            "other_cores": 0.02,
            "hardware": {"cpu": "A CPU"},
            "versions": {"jax": "0.10.2"},
            "threads": 2,
            "torch_threads": 2,
            "torch_version": "2.13",
            "timm_version": "1.0.31",
            "adamw": "fused",
            "omp_wait_policy": "default",
            "glibc_tunables": "glibc.malloc.hugetlb=1",
            "date": "2026-11-25T02:00:00+00:00",
            "commit": "abc",
        }

    text = beside_torch([record(1, 0.02), record(16, 0.2), record(1, 0.01)])
    assert "| forward | ViT-Ti/16 | 1 | yes | 10.00 ms | 12.00 ms | 100.0 | **1.20** | 1.00 to 1.50 | 0.02 |" in text
    assert text.count("| forward |") == 2
    assert text.count("A CPU; 2 threads, float32; jax 0.10.2, torch 2.13, timm 1.0.31") == 1


def test_scale_table_says_what_was_not_equal() -> None:
    from experiments.vit.tables import scale

    common = {
        "command": "scale.py kills",
        "date": "2026-11-25T02:00:00+00:00",
        "commit": "abc",
        "hardware": {"cpu": "A CPU", "cores": 2},
        "versions": {"jax": "0.10.2"},
    }
    kills = {
        "figure": "kills",
        "kills": {"0": 1, "1": 2},
        "ended_with_76": 3,
        "named_the_lost": 2,
        "median_s": 4.55,
        "max_s": 9.0,
        "heartbeat_timeout": 5,
    }
    text = scale([{**kills, "equal": True, **common}, {**kills, "equal": False, **common}])
    assert "| equal | **not equal** | `python -m experiments.vit.scale kills` | 2026-11-25, abc |" in text
    assert "| all 3 | 3 ended so, 2 named it (3 kills: 1 of process 0, 2 of process 1) |" in text
    assert text.endswith("A CPU, 2 cores; jax 0.10.2.") and "scale_curves.png" not in text
