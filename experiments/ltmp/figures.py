# SPDX-License-Identifier: Apache-2.0
"""Pictures of experiments/ltmp/README.md and of the notebook, from the records and the runs of `accuracy grid`.

python -m experiments.ltmp.figures     writes results/*.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import vtjax
from experiments.ltmp import accuracy, deploy, tables
from vtjax.cli import config as config_lib
from vtjax.methods import ltmp
from vtjax.viz import curves, reduction, tokens
from vtjax.viz.tables import read_jsonl

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
TARGET = 0.45
PHOTOGRAPH = 5  # of the evaluation half


def main() -> int:
    """See the module's text."""
    run = accuracy.run_of(TARGET)
    image, model, dense = photograph(PHOTOGRAPH), vtjax.load(run), vtjax.load("vit_ti16_augreg")
    shown = np.clip(image * 0.5 + 0.5, 0, 1).astype(np.float32)
    written = [
        tokens.save(layer_maps(model, image, shown, "LTMP at 0.45 of the MACs"), RESULTS / "maps.png"),
        tokens.save(side_by_side(image, shown, dense, 16, (1, 4, 7, 9)), RESULTS / "side_by_side.png"),
        curves.save(learned(run, "Learned thresholds, 0.45 of the MACs"), RESULTS / "thresholds.png"),
    ]
    if (RESULTS / "accuracy.jsonl").exists():
        written.append(curves.save(tradeoff(read_jsonl(RESULTS / "accuracy.jsonl")), RESULTS / "tradeoff.png"))
    for path in written:
        print(f"{path.relative_to(HERE)}: {path.stat().st_size // 1000} kB", file=sys.stderr)
    return 0


def photograph(number: int) -> np.ndarray:
    """One of the evaluation half, normalised, `[224, 224, 3]`."""
    config = config_lib.load_config(accuracy.CONFIG)
    return deploy.photographs(config, vtjax.load("vit_ti16_augreg").spec, "eval", number + 1)[number]


def sources(model: Any, params: Any, image: np.ndarray) -> np.ndarray:
    """`[L, N0]`: the slot that holds each original token after each block."""
    _, aux = jax.jit(model.apply)(params, image[None])
    return np.stack([np.asarray(block["decisions"]["source"])[0] for block in aux["blocks"]])


def layer_maps(model: Any, image: np.ndarray, shown: np.ndarray, title: str) -> Any:
    """What learned thresholds leave of an image, layer by layer; `shown` is the image in [0, 1]."""
    spec = model.spec
    found = sources(ltmp.vit(ltmp.consistent(spec)), model.params, image)
    return tokens.layer_maps(shown, found, grid=spec.grid, prefix=spec.prefix, title=title)


def side_by_side(image: np.ndarray, shown: np.ndarray, dense: Any, removed: int, layers: tuple[int, ...]) -> Any:
    """So many tokens fewer per layer, by pruning, by merging, and by both."""
    rows = {}
    for name, variant in (("pruned", "prune"), ("merged", "merge"), ("merged and pruned", "merge_prune")):
        rates = {
            layer: {"prune": (0, removed), "merge": (removed, 0)}.get(variant, pair)
            for layer, pair in enumerate(ltmp.schedule(removed, dense.spec.depth))
        }
        spec = ltmp.install_fixed(dense.spec, variant, rates)
        rows[name] = sources(ltmp.vit(spec), dense.params, image)
    title = f"{removed} tokens fewer in every layer"
    return tokens.side_by_side(shown, rows, grid=dense.spec.grid, prefix=dense.spec.prefix, layers=layers, title=title)


def learned(workdir: Any, title: str) -> Any:
    """Thresholds per layer, and on their way there."""
    series = curves.series(workdir)
    params = vtjax.load(workdir).params[ltmp.NAME]
    history = {}
    for name in params:
        columns = [series[f"{name}_{layer:02d}"] for layer in range(len(params[name]))]
        history[name] = (columns[0][0], np.stack([values for _, values in columns], 1))
    final = {name: np.asarray(values) for name, values in params.items()}
    return reduction.thresholds(final, history, title=title)


def tradeoff(records: list[dict[str, Any]]) -> Any:
    """Accuracy against MACs, of learned and fixed reduction."""
    dense = next((r for r in records if r["method"] == "dense"), None)
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for (method, _), seeds in sorted(tables.grid(records).items()):
        tops = [r["top1"] for r in seeds]
        ratio = float(np.mean([r["mac_ratio"] for r in seeds]))
        lines.setdefault(method.upper(), []).append((ratio, float(np.mean(tops)), min(tops), max(tops)))
    for r in records:
        if r["kind"] == "fixed" and r["method"] == "fixed merge":
            lines.setdefault("fixed merge", []).append((r["mac_ratio"], r["top1"], r["top1"], r["top1"]))
    rows = {name: sorted(points) for name, points in lines.items()}
    point = None if dense is None else (1.0, dense["top1"])
    return reduction.tradeoff(rows, dense=point, title="Top-1 on 500 photographs, ViT-Ti/16")


if __name__ == "__main__":
    sys.exit(main())
