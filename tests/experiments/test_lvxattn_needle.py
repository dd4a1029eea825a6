# SPDX-License-Identifier: Apache-2.0
"""The needle's tables, what the cheaper ways may read in equal time, and the whole command at a tiny size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lvxattn import needle, needle_time
from vtjax.ops import cross_attention

ROOT = Path(__file__).resolve().parents[2]


WHERE = {"hardware": {"cpu": "x", "cores": 1, "devices": {}}, "versions": {"jax": "1"}, "date": "2026-01-01"}


def record(way: str, read: int, top1: float, **more: Any) -> dict[str, Any]:
    told = {
        "haystack": "drawn",
        "frames": 64,
        "batch": 1,
        "way": way,
        "read": read,
        "top1": top1,
        "device_bytes": 2**20,
    }
    if way == "top":
        told["kept"] = min(16, read)
    if way == "exact":
        told |= {"one_device_bytes": 2**25, "held_by_one": True}
    return {**told, **WHERE, **more}


def test_frames_in_equal_time_lie_on_lines_between_those_that_were_timed() -> None:
    times = [(16, 0.2), (4, 0.05), (8, 0.1)]
    found = [needle_time.affordable(share, times, 64) for share in (0.01, 0.05, 0.075, 0.15, 9.0)]
    assert found == [(4, "<"), (4, ""), (6, ""), (12, ""), (16, ">")]
    assert needle_time.affordable(9.0, times, 16) == (16, "")  # there are no more
    # 8 frames cannot take less than 4.
    assert needle_time.affordable(0.1, [(4, 0.05), (8, 0.04), (16, 0.15)], 64) == (12, "")


def test_what_each_way_reads() -> None:
    assert needle.reads("exact", 64, [8], 16) == [64]
    assert needle.reads("sampled", 64, (), 16) == [16] and needle.reads("pooled", 64, (), 16) == [64]
    assert needle.reads("top", 64, [8, 128], 16) == [8, 64]


def test_tables_show_the_last_record_and_the_next_more_frames() -> None:
    others = [record(way, read, top1) for way in needle.WAYS[1:] for read, top1 in ((8, 0.3), (16, 0.4), (32, 0.5))]
    times = {"kind": "time", "haystack": "drawn", "cameras": 1, "frames": 64, "batch": 1, "kept": 16, "share_s": 0.01}
    times |= {"equal": {"sampled": 9, "pooled": 16, "top": 40}, "beyond": dict.fromkeys(needle.WAYS, ""), **WHERE}
    found = [record("exact", 64, 0.1), *others, record("exact", 64, 0.9), times]
    assert needle_time.table(found).splitlines()[2] == (
        "| drawn | 64 | 1 | 10.0 | 0.900 | 9: 0.400 (at 16) | 16: 0.400 (at 16) | 40 |"
    )
    assert needle.by_read(found).splitlines()[3] == "| drawn | 64 | 0.900 | 16 | 1.0 | 0.400 | 0.400 | 0.400 |"
    assert needle_time.table(found[:-1]) == "" and len(needle.cases(found)) == 1
    types = {"color": 1.0, "shape": 0.5, "quarter": 0.25, "camera": 0.75}
    two = record("exact", 64, 0.625, cameras=2, questions=8, **types)
    assert needle.by_type([*found, two]).splitlines()[2:4] == [
        "| drawn | 2 | 64 | 8 | 0.625 | 1.000 | 0.500 | 0.250 | 0.750 |",
        "",
    ]
    assert needle.cases([*found, two]) == needle.cases(found) and needle.by_type(found) == ""
    # Before there was --read and --batch.
    old = {name: value for name, value in record("sampled", 0, 0.7, kept=16).items() if name not in ("read", "batch")}
    assert [r["read"] for r in needle.latest([old])] == [16]
    shown = needle.table([record("exact", 64, 0.9), *others])
    assert shown.splitlines()[2] == "| drawn | 64 | 1 | 32.0 | 1.0 | yes | 0.900 | 0.400 |  |  |"


def test_rows_are_told_apart_by_all_that_makes_them_differ() -> None:
    exact = record("exact", 64, 0.9)
    times = {"kind": "time", "haystack": "drawn", "cameras": 1, "frames": 64, "batch": 1, "kept": 16, "share_s": 0.01}
    times |= {"equal": {"sampled": 8, "pooled": 16, "top": 9}, "beyond": {"sampled": "<", "pooled": ">", "top": ""}}
    times |= WHERE
    others = [record(way, 16, 0.4) for way in needle.WAYS[1:]]
    row = "| drawn | 64 | 1 | 10.0 | 0.900 | < 8: 0.400 (at 16) | > 16 | 9: 0.400 (at 16) |"
    assert needle_time.table([exact, *others, times]).splitlines()[2] == row
    for other in ({"haystack": "clips"}, {"cameras": 2}, {"kept": 8}):
        assert needle_time.table([exact, *others, {**times, **other}]) == ""
    # Another number of frames kept is another way, which no table shows in the place of the usual one.
    few = record("top", 16, 0.7, kept=4)
    assert (
        needle.by_read([exact, *others, few]) == needle.by_read([exact, *others])
        and len(needle.latest([*others, few])) == 4
    )
    # One --read is enough for a row.
    assert (
        needle.by_read([exact, *others]).splitlines()[2] == "| drawn | 64 | 0.900 | 16 | 1.0 | 0.400 | 0.400 | 0.400 |"
    )
    usual = [record("sampled", 16, 0.4), record("pooled", 64, 0.4), record("top", 64, 0.4)]
    assert needle.by_read([exact, *usual]) == ""


def test_the_figure_has_one_point_per_length_and_way() -> None:
    found = [
        record(way, read, 0.5, frames=length, batch=4)
        for length in (32, 64)
        for way, reads in (
            ("exact", (length,)),
            ("sampled", (8, 16, 32)),
            ("pooled", (8, length)),
            ("top", (8, length)),
        )
        for read in reads
    ]
    drawn = needle.figure(found)
    assert [list(line.get_xdata()) for line in drawn.axes[0].lines] == [[32, 64]] * 4


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--read=-4", "--read must be above 0, found '-4'"),
        ("--read=8,0", "--read must be above 0, found '8,0'"),
        ("--frames=x", "--frames must be above 0, found 'x'"),
        ("--frames=", "--frames must be above 0, found ''"),
        *((f"--{name}=0", f"--{name} must be above 0, found '0'") for name in ("kept", "cameras", "batch", "videos")),
        ("--only=best", "--only must be one of exact, sampled, pooled, top, found 'best'"),
    ],
)
def test_numbers_that_no_measurement_can_have_are_one_line(option, line, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["needle", "--workdir=nowhere", option])
    assert needle.main() == 2 and capsys.readouterr().err == f"{line}\n"


def test_all_frames_are_the_best_frames_and_a_mean_of_one_token_is_the_token() -> None:
    rng = np.random.default_rng(0)
    b, rows, frames, tokens, heads, d = 2, 3, 5, 4, 2, 8
    q = jnp.asarray(rng.normal(size=(b, rows, heads, d)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(b, frames * tokens, heads, d)), jnp.float32) for _ in range(2))
    number = jnp.repeat(jnp.asarray([[1, 1, 2, 2, 0]] * b, jnp.int32), tokens, 1)
    told = {"low": jnp.ones((b, rows), jnp.int32), "high": jnp.full((b, rows), 2, jnp.int32)}
    wanted = cross_attention.attend(q, k, v, number=number, **told)
    every = needle.top(tokens, frames)(q, k, v, number=number, **told)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), every, wanted)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        needle.pooled(1)(q, k, v, number=number, **told),
        wanted,
    )


@pytest.mark.slow
def test_the_command_at_a_tiny_size(tmp_path: Path) -> None:
    def run(*words: str) -> None:
        subprocess.run([sys.executable, "-m", *words], check=True, cwd=ROOT, env=dict(os.environ), timeout=900)

    run("vtjax", "run", "--config=configs/lvxattn.py:video,steps=2,batch_size=2", f"--workdir={tmp_path / 'w'}",
        "--config.data.n=8")  # fmt: skip
    shared = f"--workdir={tmp_path / 'w'}", "--frames=32", "--videos=2", "--batch=1", f"--out={tmp_path / 'r.jsonl'}"
    run("experiments.lvxattn.needle", *shared, "--read=8,32")
    run("experiments.lvxattn.needle", *shared, "--what=time", "--rounds=1", "--read=4,16")
    *found, times = (json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines())
    assert [(r["way"], r["read"]) for r in found[:3]] == [("exact", 32), ("sampled", 8), ("sampled", 32)]
    assert found[0]["top1"] == found[2]["top1"] and found[0]["device_bytes"] < found[0]["one_device_bytes"]
    assert set(times["equal"]) == set(needle.WAYS[1:]) and times["hardware"]["cores"] == 1
