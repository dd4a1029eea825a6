# SPDX-License-Identifier: Apache-2.0
"""Pictures of experiments/das/README.md and of the notebook, from the records.

python -m experiments.das.figures     writes results/*.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.dpn.tables import by_arm, mean
from vtjax.viz import curves
from vtjax.viz.curves import BAD, COLORS, GOOD, GRID, INK, MUTED
from vtjax.viz.tables import read_jsonl

RESULTS = Path(__file__).resolve().parent / "results"
BANDIT = "bandit m=2"

Records = list[dict[str, Any]]


def main() -> int:
    """See the module's text."""
    records = read_jsonl(RESULTS / "accuracy.jsonl")
    for name, picture in pictures(records).items():
        path = curves.save(picture, RESULTS / f"{name}.png")
        print(f"{path.relative_to(RESULTS.parent)}: {path.stat().st_size // 1000} kB", file=sys.stderr)
    return 0


def pictures(records: Records) -> dict[str, Any]:
    """Figures by name, those whose records are there."""
    found = by_arm(records, "search").get(BANDIT, [])
    made: dict[str, Any] = {}
    if traced := [r for r in found if r["history"]]:
        made["preferences"] = preferences(traced)
    if chosen := {name: runs for name, runs in by_arm(records, "search").items() if runs}:
        made["chosen"] = choices(chosen)
    if found:
        made["why"] = why(found)
    if by_arm(records, "arms").get("adapters"):
        made["tradeoff"] = tradeoff(records)
    return made


def preferences(found: Sequence[dict[str, Any]]) -> Any:
    """Preferences after every update, one panel per search; the layers that are left out at the end in colour."""
    figure = curves.new_figure(2.6 * len(found) + 0.6, 2.9)
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.07, right=0.99, top=0.84, bottom=0.17, wspace=0.08)
    for axes, run in zip(panels, found, strict=True):
        history = np.array(run["history"])
        updates = np.arange(1, len(history) + 1)
        for layer in sorted(range(history.shape[1]), key=run["skips"].__contains__):
            out = run["skips"].index(layer) if layer in run["skips"] else None
            color = MUTED if out is None else COLORS[out]
            axes.plot(updates, history[:, layer], color=color, linewidth=0.8 if out is None else 2.0)
            if out is not None:
                axes.annotate(f"{layer}", (updates[-1], history[-1, layer]), color=color, fontsize=9)
        curves.quiet(axes)
        curves.set_title(axes, f"seed {run['seed']}")
        axes.set_xlabel("updates", color=MUTED, fontsize=9)
    panels[0].set_ylabel("preference", color=MUTED, fontsize=9)
    return figure


def choices(found: dict[str, Records]) -> Any:
    """Which layers each search leaves out: a row per search and seed."""
    figure = curves.new_figure(7.6, 0.7 + 0.2 * sum(len(runs) + 1 for runs in found.values()))
    axes = figure.add_subplot()
    figure.subplots_adjust(left=0.24, right=0.98, top=0.98, bottom=0.45 / figure.get_figheight())
    layers, row, ticks = len(next(iter(found.values()))[0]["preference"]), 0, []
    for number, (name, runs) in enumerate(found.items()):
        ticks.append((row + (len(runs) - 1) / 2, name))
        for run in runs:
            axes.axhline(row, color=GRID, linewidth=0.8, zorder=0)
            axes.plot(run["skips"], [row] * len(run["skips"]), "s", color=COLORS[number % 6])
            row += 1
        row += 1
    axes.set_ylim(row - 1, -1)
    axes.set_xlim(-0.6, layers - 0.4)
    axes.set_xticks(range(layers))
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.set_xlabel("layers left out, a row for each seed", color=MUTED, fontsize=9)
    curves.quiet(axes)
    axes.grid(False, axis="y")
    return figure


def why(found: Sequence[dict[str, Any]]) -> Any:
    """For each layer: what the validation loss gains when it alone is left out, and beside it its preference; a dot for
    each seed, filled where that seed left it out, and a bar for the mean."""
    cost = np.array([r["loss_without"] for r in found]) - np.array([[r["loss_with_all"]] for r in found])
    figure = curves.new_figure(9.0, 3.4)
    panels = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.08, right=0.99, top=0.88, bottom=0.15, wspace=0.2)
    told = (("Loss without the layer minus with all", cost, BAD), ("Preference", _column(found, "preference"), GOOD))
    for axes, (title, values, color) in zip(panels, told, strict=True):
        places = np.arange(values.shape[1])
        axes.bar(places, values.mean(0), color=color, alpha=0.35)
        for run, row in zip(found, values, strict=True):
            out = np.isin(places, run["skips"])
            axes.plot(places[~out], row[~out], "o", markersize=3.5, markerfacecolor="white", color=MUTED)
            axes.plot(places[out], row[out], "o", markersize=4.5, color=INK)
        curves.quiet(axes)
        curves.set_title(axes, title)
        axes.set_xticks(places)
        axes.set_xlabel("layer", color=MUTED, fontsize=9)
    return figure


def _column(found: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([r[name] for r in found])


def tradeoff(records: Records) -> Any:
    """Of every arm, the least work first: its work, what it trains (on a scale of logarithms), and accuracy, a point
    per seed and their mean."""
    runs = {**by_arm(records, "arms"), **by_arm(records, "others")}
    plain = mean(runs["adapters"], "macs_per_prompt")
    ordered = sorted(runs, key=lambda name: (mean(runs[name], "macs_per_prompt"), mean(runs[name], "top1")))
    figure = curves.new_figure(8.4, 0.6 + 0.27 * len(ordered))
    work, trained, accuracy = figure.subplots(1, 3, sharey=True, width_ratios=(1.0, 1.0, 1.8))
    figure.subplots_adjust(left=0.19, right=0.98, top=0.98, bottom=0.13, wspace=0.08)
    for row, name in enumerate(ordered):
        found = runs[name]
        color = COLORS[0] if name.startswith("bandit") else COLORS[1] if name.startswith("random") else MUTED
        work.barh(row, mean(found, "macs_per_prompt") / plain, color=color, height=0.6)
        trained.barh(row, mean(found, "trained") / 1000, color=color, height=0.6)
        tops = [100 * r["top1"] for r in found]
        accuracy.scatter(tops, [row] * len(tops), s=12, color=color, alpha=0.5)
        accuracy.scatter(float(np.mean(tops)), row, s=44, color=color, zorder=3)
    accuracy.axvline(100 * mean(runs["adapters"], "top1"), color=MUTED, linewidth=0.8, linestyle="--", zorder=0)
    trained.set_xscale("log")
    work.set_yticks(range(len(ordered)), ordered, fontsize=8)
    work.invert_yaxis()
    labels = ("work, of adapters in all layers", "trained, 1000 parameters", "questions answered rightly, %")
    for axes, label in zip((work, trained, accuracy), labels, strict=True):
        curves.quiet(axes)
        axes.set_xlabel(label, color=MUTED, fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
    return figure


if __name__ == "__main__":
    sys.exit(main())
