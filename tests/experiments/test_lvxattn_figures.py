# SPDX-License-Identifier: Apache-2.0
"""The measurements of experiments/lvxattn: what they count, what they refuse, and small runs of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.lvxattn import links, links_down, network, tables, traffic
from tests import devices
from vtjax.account import aot

FLAGS = {"XLA_FLAGS": devices.flags(8)}
needs_hosts = pytest.mark.skipif(bool(network.missing()), reason=network.missing() or "there are namespaces")


def module(name: str, *words: str | Path, timeout: int = 1200) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"experiments.lvxattn.{name}", *map(str, words)]
    environment = {**os.environ, **FLAGS}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=timeout)


def test_what_is_sent_is_what_the_formula_says() -> None:
    done = module("traffic", "--worker", "--n", "2", "--strategy", "gather_q")
    found = json.loads(done.stdout)
    assert traffic.wrong(found) == []
    assert found["forward"]["counts"] == {"all-gather": 1, "all-to-all": 2}
    assert found["backward"]["counts"] == {"all-gather": 3, "all-to-all": 1}
    spoilt = {**found, "formula": {"forward": 1.0, "backward": found["formula"]["backward"]}, "grows": True}
    assert [line.partition(": ")[0] for line in traffic.wrong(spoilt)] == ["n=2 gather_q forward", "n=2 gather_q"]


@pytest.mark.slow
def test_what_all_strategies_send(tmp_path: Path) -> None:
    done = module("traffic", "--n", "3", "8", "--out", tmp_path / "traffic.jsonl")
    assert done.returncode == 0, done.stderr[-2000:]


def test_collectives_of_a_cpu_program_share_a_channel() -> None:
    line = "  %{0} = {1} {2}(%x), channel_id=1, replica_groups={{{{0,1}}}}, dimensions={{0}}"
    lines = [line.format("a", "f32[4,2]{1,0}", "all-gather"), line.format("b", "s32[6]{0}", "all-gather")]
    hlo = "\n".join(["ENTRY %main (p: f32[2]) -> f32[2] {", *lines, "}"])
    found = [(one.kind, one.dtype, one.bytes, one.times) for one in aot.each_collective(hlo)]
    assert found == [("all-gather", "f32", 32, 1), ("all-gather", "s32", 24, 1)]


def test_without_root_or_tools_one_line(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    for name, part in (("geteuid", "need root, found user 1000"), ("which", "Debian's package iproute2, util-linux")):
        with monkeypatch.context() as patched:
            if name == "geteuid":
                patched.setattr(network.shutil, "which", lambda tool: tool)
                patched.setattr(network.os, "geteuid", lambda: 1000)
            else:
                patched.setattr(network.shutil, "which", lambda tool: None)
            assert links.main(["op", "--tiny", "--out", str(tmp_path / "links.jsonl")]) == 2
        said = capsys.readouterr().err
        assert part in said and said.count("\n") == 1


def test_shares_are_equal(monkeypatch: Any) -> None:
    monkeypatch.setattr(links.os, "sched_getaffinity", lambda _: {0, 1})
    assert [links.shares(n) for n in (2, 3, 4)] == [[[0], [1]], [[0, 1]] * 3, [[0], [0], [1], [1]]]


def test_lost_processes_must_be_named() -> None:
    good = {"seconds": 11.0, "code": 76, "line": "vtjax: process 0 lost: the coordinator does not answer"}
    other = {**good, "line": "vtjax: process 1 lost: no heartbeat for 10 s"}
    found: dict[str, Any] = {"lost": 1, "ended": [other, good], "resumed": 10, "equal": True}
    assert links_down.checked(found) == []
    assert len(links_down.checked({**found, "ended": [good, other], "resumed": 0})) == 3


@pytest.mark.slow
@needs_hosts
def test_strategies_over_links(tmp_path: Path) -> None:
    out = tmp_path / "links.jsonl"
    for what, count in (("op", 2), ("op", 2), ("decode", 3), ("step", 4)):
        done = module("links", what, "--tiny", "--processes", "2", "--out", out)
        assert done.returncode == 0, done.stderr[-2000:]
        assert len(out.read_text().splitlines()) == count  # what is recorded is not measured again
    found = [json.loads(line) for line in out.read_text().splitlines()]
    names = {*found[0]["strategies"], *(f"{s} silent" for s in found[0]["silent"])}
    assert names == set(found[0]["seconds"])


@pytest.mark.slow
@needs_hosts
def test_a_lost_link_ends_all_processes_and_the_restart_resumes(tmp_path: Path) -> None:
    done = module("links", "down", "--out", tmp_path / "links.jsonl", timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_keys_are_projected_again_and_attention_is_not_done_again(tmp_path: Path) -> None:
    pytest.importorskip("libtpu", reason="the extra [tpu] is not installed")
    done = module("memory", "kernels", "--out", tmp_path / "memory.jsonl")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (tmp_path / "memory.jsonl").read_text().splitlines()
    found = {(r["strategy"], r["mode"]): r["kernels"] for r in map(json.loads, lines)}
    for strategy in ("gather_q", "ring_q", "ring_kv", "ulysses"):
        kept, names, full = (found[strategy, mode] for mode in ("none", "names", "full"))
        assert kept == names and full["forward"] == 2 * kept["forward"] > 0


def test_compiled_steps_tell_what_crosses_slices() -> None:
    where = {"hardware": {"cpu": "x", "cores": 1, "devices": {}}, "versions": {"jax": "1"}, "date": "2026-01-01"}
    one = {"config": "configs/lvxattn.py:tiny", "step": "train", "topology": "v5e:2x2", "slices": 2, **where}
    mesh = {"data": 1, "fsdp": 1, "slice": 2, "context": 4, "tensor": 1}
    sent = {"all-gather": {"count": 3, "bytes": 2**21}, "dcn-send": {"count": 2, "bytes": 2**20}}
    fits = {**one, "mesh": mesh, "fits": True, "hbm_bytes_per_device": 2**30, "hbm_limit": 2**34, "collectives": sent}
    not_so = {
        **one,
        "slices": 1,
        "mesh": {"context": 4},
        "fits": False,
        "hbm_bytes_per_device": 2**35,
        "hbm_limit": 2**34,
    }
    assert tables.compiled([fits, not_so]).splitlines()[2:4] == [
        "| tiny | 2 x v5e:2x2 | slice 2, context 4 | 1.0 of 16.0 | all-gather 2.0 | 1.0 |",
        "| tiny | v5e:2x2 | context 4 | 32.0 of 16.0, **no** |  |  |",
    ]
