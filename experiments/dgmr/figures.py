# SPDX-License-Identifier: Apache-2.0
"""Pictures of experiments/dgmr/README.md and of the notebook, from the records and the pretrained ViT-Ti/16.

python -m experiments.dgmr.figures     writes results/*.png
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import vtjax
from experiments.dgmr import tables
from vtjax.methods import dgmr
from vtjax.spec import ViTSpec
from vtjax.viz import curves, reduction, selection
from vtjax.viz.tables import read_jsonl

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
WEIGHTS = "vit_ti16_augreg"


def main() -> int:
    """See the module's text."""
    model = vtjax.load(WEIGHTS)
    picks = everything(model.spec, model.params)
    written = [
        curves.save(spectra(model.spec, picks, "What each neuron adds, ViT-Ti/16"), RESULTS / "spectra.png"),
        curves.save(kept(model.spec, model.params, picks, 1.0, "Kept at r = 1, ViT-Ti/16"), RESULTS / "kept.png"),
    ]
    if (RESULTS / "accuracy.jsonl").exists():
        records = read_jsonl(RESULTS / "accuracy.jsonl")
        for name in tables.dense(records):
            written.append(curves.save(recovery(records, name), RESULTS / f"recovery_{name}.png"))
    if (RESULTS / "selection.jsonl").exists():
        records = [r for r in read_jsonl(RESULTS / "selection.jsonl") if r["kind"] == "growth"]
        if records:
            written.append(curves.save(growth(records), RESULTS / "growth.png"))
    for path in written:
        print(f"{path.relative_to(HERE)}: {path.stat().st_size // 1000} kB", file=sys.stderr)
    return 0


def everything(spec: ViTSpec, params: Any) -> list[Any]:
    """All neurons of every block, in pick order."""
    return dgmr.choose(spec, params, dgmr.counts(spec, keep=dgmr.hidden(spec)))


def spectra(spec: ViTSpec, picks: dgmr.Picks, title: str) -> Any:
    """Residual norms per layer."""
    return selection.spectra([np.asarray(pick.norms) for pick in picks if pick is not None], spec.width, title)


def kept(spec: ViTSpec, params: Any, picks: dgmr.Picks, ratio: float, title: str) -> Any:
    """Which neurons are kept at a ratio, beside their magnitudes."""
    chosen, lengths = [], []
    for layer, (pick, count) in enumerate(zip(picks, dgmr.counts(spec, ratio=ratio), strict=True)):
        if pick is not None:
            chosen.append(np.asarray(pick.indices)[:count])
            lengths.append(np.linalg.norm(np.asarray(dgmr.rows(spec, params, layer)), axis=1))
    return selection.kept(lengths, chosen, title)


def recovery(records: Iterable[Mapping[str, Any]], model: str) -> Any:
    """Top-1 over MACs by criterion, pruned and distilled."""
    records = list(records)
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for (name, _, method), found in tables.grid(records).items():
        if name != model:
            continue
        for when, key in (("distilled", "top1"), ("pruned", "before_top1")):
            tops = [r[key] for r in found]
            low, high = min(tops), max(tops)
            row = (found[0]["mac_ratio"], float(np.clip(np.mean(tops), low, high)), low, high)
            lines.setdefault(f"{tables.METHODS[method]}, {when}", []).append(row)
    ordered = {name: lines[name] for name in sorted(lines, key=lambda n: n.endswith("pruned"))}
    whole = tables.dense(records)[model]
    kinds = {name: name.partition(",")[0] for name in ordered}
    title = f"Distilled (solid) and before (dashed): {model}"
    return reduction.tradeoff(ordered, dense=(1.0, whole["top1"]), title=title, kinds=kinds)


def growth(records: list[dict[str, Any]]) -> Any:
    """Time of the blocked form over each size."""
    latest = {r["axis"]: r for r in records}
    series: dict[str, Any] = {
        "N = K" if axis == "N" else axis: (r["values"], [r[str(v)]["median_s"] for v in r["values"]])
        for axis, r in latest.items()
    }
    base = {name: next(iter(latest.values()))[name] for name in "MNK"}
    return selection.growth(series, base, "Time of a selection (blocked)")


if __name__ == "__main__":
    sys.exit(main())
