# SPDX-License-Identifier: Apache-2.0
"""The timings of DPN run at a tiny size, where their figures mean nothing; the table says where it stops to pay."""

from __future__ import annotations

import pytest

from experiments.dpn import speed
from experiments.dpn import tables as dpn_tables
from vtjax.viz import tables


@pytest.mark.slow
@pytest.mark.parametrize("what", speed.GRIDS)
def test_every_kind_of_timing_runs(what, tmp_path, monkeypatch):
    small = {"depth": 8, "width": 16, "heads": 2, "kv_heads": 1, "mlp": 24, "vocab": 40, "context": 256}
    monkeypatch.setattr(speed, "SMOLLM2", small)
    monkeypatch.setattr(speed, "GRIDS", {what: ((8, 16), (8, 8))[: 2 if what == "tokens" else 1]})
    monkeypatch.setattr(speed, "PATHS", ((0, 0, 0), (1, 1, 1), (2, 1, 1), (2, 2, 2))[: 2 if what == "tokens" else 4])
    monkeypatch.setattr(speed, "NEW", 3)
    assert speed.main([what, "--rounds=1", f"--out={tmp_path / 'speed.jsonl'}"]) == 0
    found = tables.read_jsonl(tmp_path / "speed.jsonl")
    assert [r["visual"] for r in found] == {"tokens": [128, 64], "throughput": [128]}.get(what, [128] * 3)
    for r in found:
        assert r["mac_ratio"] > 1 and r["kind"] == what
        assert what == "decode" or any(r.get(f"{side}_realised", 0) > 0 for side in ("switch", "staged"))
    recorded = {name for name, text in dpn_tables.build(tmp_path).items() if text != tables.NOTHING}
    assert recorded == {{"tokens": "tokens", "decode": "decode"}.get(what, "speed")}


@pytest.mark.parametrize(
    ("realised", "says"),
    [
        ((0.95, 0.97, 0.94, 0.96), "2, 2, 2: from 576 tokens on."),
        ((0.94, 0.97, 0.8, 0.96), "2, 2, 2: at no count."),
        ((0.95, 0.97, 0.95, 0.96), "2, 2, 2: from 64 tokens on."),
    ],
)
def test_where_it_stops_to_pay(realised, says):
    base = {"kind": "tokens", "paths": [2, 2, 2], "mac_ratio": 2.0, "switch_ratio": 1.8, "static_realised": 0.9}
    base |= {"hardware": {"cpu": "x", "cores": 1, "devices": {}}, "versions": {"jax": "0"}, "date": "2026-01-01"}
    records = [
        {**base, "visual": visual, "switch_realised": share}
        for visual, share in zip((1024, 576, 256, 64), realised, strict=True)
    ]
    assert says in dpn_tables.tokens(records)
