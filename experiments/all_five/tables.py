# SPDX-License-Identifier: Apache-2.0
"""Table and picture of experiments/all_five/README.md, from results/steps.jsonl.

python -m experiments.all_five.tables           writes the tables between their markers, and results/steps.png
python -m experiments.all_five.tables --check   exits 1 where the README differs
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from experiments.ltmp.tables import circumstances
from vtjax.viz import curves, tables

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
NAMES = {
    "base": "dense, LV-XAttn over 8 devices",
    "dgmr": "+ DGMR",
    "ltmp": "+ LTMP",
    "dpn": "+ DPN",
    "das": "+ DAS",
}
CONTROLS = {"random": "+ DAS, layers by chance", "control": "the dense model, trained on"}
TYPES = ("color", "quarter", "shape")

Records = list[dict[str, Any]]


def build(results: Path = HERE / "results") -> dict[str, str]:
    """Markdown by table name."""
    return tables.from_records(results, (("steps", "steps", steps), ("moved", "steps", moved), ("time", "steps", time)))


def latest(records: Records, kind: str) -> dict[str, dict[str, Any]]:
    """The newest record of every step, in their order."""
    found = {r["add"]: r for r in records if r["kind"] == kind and r["seed"] == 0}
    return {add: found[add] for add in (*NAMES, *CONTROLS, "all") if add in found}


def steps(records: Records) -> str:
    """Work, parameters and accuracy as the methods are added one by one."""
    found = latest(records, "train")
    if "base" not in found:
        return ""
    dense = found["base"]
    rows = []
    for add, r in found.items():
        tower, decoder = r["tower_macs"], r["decoder_macs"]
        share = (tower + decoder) / (dense["tower_macs"] + dense["decoder_macs"])
        rows.append(
            (
                {**NAMES, **CONTROLS}[add],
                f"{r['params']:,}",
                f"{tower / 1e6:.1f}",
                f"{decoder / 1e6:.1f}",
                f"{share:.2f}",
                f"{r['visual']:.0f}",
                f"**{100 * r['top1']:.1f} %**",
                *(f"{100 * r[f'top1@{kind}']:.1f}" for kind in TYPES),
            )
        )
    head = (
        "model",
        "parameters",
        "tower, 10^6 MACs",
        "decoder",
        "all, of dense",
        "visual tokens at the end",
        "accuracy",
    )
    return tables.markdown((*head, *TYPES), rows) + "\n\n" + circumstances(list(found.values()))


def moved(records: Records) -> str:
    """Bytes between eight devices, and what one of them holds."""
    found = latest(records, "moved")
    rows = [
        (
            NAMES[add],
            *(f"{r[way]['moved_bytes'] / 2**10:.0f}" for way in ("auto", "ring_kv")),
            f"{r['ring_kv']['moved_bytes'] / r['auto']['moved_bytes']:.2f}",
            f"{r['auto']['device_bytes'] / 2**20:.1f}",
        )
        for add, r in found.items()
    ]
    head = ("model", "KiB moved, LV-XAttn", "KiB moved, keys and values in a ring", "ratio", "MiB on a device")
    return tables.markdown(head, rows) + "\n\n" + circumstances(list(found.values())) if rows else ""


def time(records: Records) -> str:
    """How many times as fast as the dense model the forward pass is, by the videos of a batch."""
    found = {r["batch"]: r for r in records if r["kind"] == "time" and r["seed"] == 0}
    if not found:
        return ""
    found = dict(sorted(found.items()))
    rows = []
    for name in next(iter(found.values()))["time_ratio"]:
        add, _, form = name.partition(", ")
        cells = []
        for r in found.values():
            low, high = r["spread"][name]
            cells.append(f"{r['time_ratio'][name]:.2f} [{low:.2f}, {high:.2f}]")
            if name == "base":
                summary = r["timing"][name]
                cells[-1] = f"1 ({1e3 * summary['median_s']:.0f} ms, least {1e3 * summary['min_s']:.0f})"
        rows.append((NAMES[add] + (f", {form}" if form else ""), *cells))
    head = ("model", *(f"batch of {batch}" for batch in found))
    return tables.markdown(head, rows) + "\n\n" + circumstances(list(found.values()))


def picture(records: Records) -> Any:
    """Work of tower and decoder, and accuracy, as the methods are added."""
    found = {add: r for add, r in latest(records, "train").items() if add in NAMES}
    figure = curves.new_figure(7.4, 3.4)
    work, accuracy = figure.subplots(1, 2, width_ratios=(1.6, 1.0))
    places = range(len(found))
    labels = [NAMES[add].partition(",")[0] for add in found]
    tower, decoder = ([r[f"{part}_macs"] / 1e6 for r in found.values()] for part in ("tower", "decoder"))
    work.barh(places, tower, color=curves.COLORS[0], label="vision tower")
    work.barh(places, decoder, left=tower, color=curves.COLORS[1], label="decoder")
    for place, whole in zip(places, map(sum, zip(tower, decoder, strict=True)), strict=True):
        work.text(whole, place, f"  {whole / (tower[0] + decoder[0]):.2f}", va="center", color=curves.MUTED)
    work.set(
        yticks=list(places),
        yticklabels=labels,
        xlabel="10^6 MACs per question",
        xlim=(0, 1.15 * (tower[0] + decoder[0])),
    )
    work.legend(frameon=False, loc="lower right")
    accuracy.plot([100 * r["top1"] for r in found.values()], list(places), color=curves.COLORS[2], marker="o")
    accuracy.set(yticks=list(places), yticklabels=[""] * len(found), xlabel="accuracy, %", xlim=(0, 100))
    for axes in (work, accuracy):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    accuracy.grid(axis="x", alpha=0.3)
    return figure


if __name__ == "__main__":
    if "--check" not in sys.argv:
        curves.save(picture(tables.read_jsonl(HERE / "results" / "steps.jsonl")), HERE / "results" / "steps.png")
    sys.exit(tables.command(README, build, __doc__))
