# SPDX-License-Identifier: Apache-2.0
"""Records: complete, appended whole, without a path of the machine."""

from __future__ import annotations

import json
import multiprocessing
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from vtjax.account import record

ROOT = Path(record.__file__).resolve().parent.parent.parent


def test_a_record_says_what_is_needed_to_repeat_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys,
        "argv",
        [f"{ROOT}/experiments/vit/x.py", "--workdir=/root/secret/run1", f"--config={ROOT}/configs/vit.py:ti16"],
    )
    file = tmp_path / "results" / "forward.jsonl"
    written = record.write(file, {"seed": 3, "top1": np.float32(0.5), "count": jnp.int32(4), "shape": np.array([1, 2])})
    (line,) = file.read_text().splitlines()
    assert json.loads(line) == written == record.read(file)[0]
    assert list(written)[:4] == ["seed", "top1", "count", "shape"]
    assert written["top1"] == 0.5 and written["count"] == 4 and written["shape"] == [1, 2]
    assert written["command"] == "x.py --workdir=run1 --config=configs/vit.py:ti16"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", written["date"])
    assert {"python", "jax", "flax", "numpy"} <= set(written["versions"])
    assert written["hardware"]["cores"] >= 1 and written["hardware"]["memory_gb"] > 0
    assert sum(written["hardware"]["devices"].values()) >= 1 and written["hardware"]["cpu"]
    assert len(written["load"]) == 3
    assert written["commit"] is None or re.fullmatch(r"[0-9a-f]{12}\+?", written["commit"])


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/root/x/y.npz", "y.npz"),
        ("a=/root/x/y.npz,/opt/z/w", "a=y.npz,w"),
        (f"{ROOT}/configs/vit.py", "configs/vit.py"),
        (str(ROOT), ROOT.name),
        ("images/s", "images/s"),
        ("1/2 and 3 / 4", "1/2 and 3 / 4"),
        ("gs://bucket/run/1", "gs://bucket/run/1"),
        ("../shared/data/x.tar", "../shared/data/x.tar"),
        ("~/runs/1", "~/runs/1"),
    ],
)
def test_absolute_paths_are_cut(tmp_path: Path, text: str, kept: str) -> None:
    written = record.write(tmp_path / "r.jsonl", {"note": text, "deep": [{"p": (text,)}]})
    assert written["note"] == kept and written["deep"] == [{"p": [kept]}]


def test_pathlike_values_are_cut_too(tmp_path: Path) -> None:
    assert record.write(tmp_path / "r.jsonl", {"source": tmp_path / "w.npz"})["source"] == "w.npz"


def test_a_torn_line_is_closed_and_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    record.write(file, {"n": 1})
    with file.open("a") as handle:
        handle.write('{"n": 2, "half')
    record.write(file, {"n": 3})
    assert [r["n"] for r in record.read(file)] == [1, 3]
    assert len(file.read_text().splitlines()) == 3


@pytest.mark.parametrize("bad", [{"date": "today"}, {"x": float("nan")}, {"x": object()}])
def test_bad_records_leave_the_file_alone(tmp_path: Path, bad: dict) -> None:
    file = tmp_path / "r.jsonl"
    record.write(file, {"n": 1})
    before = file.read_bytes()
    with pytest.raises(ValueError):
        record.write(file, bad)
    assert file.read_bytes() == before


def _many(file: Path, who: int) -> None:
    for n in range(20):
        record.write(file, {"who": who, "n": n, "padding": "x" * 5000})


def test_several_processes_do_not_mix_lines(tmp_path: Path) -> None:
    record.write(tmp_path / "warm.jsonl", {})  # fills the cache of hardware() before the fork
    file = tmp_path / "r.jsonl"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_many, args=(file, who)) for who in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    found = [(r["who"], r["n"]) for r in record.read(file)]
    assert sorted(found) == [(who, n) for who in range(2) for n in range(20)]
    assert len(file.read_text().splitlines()) == 40
