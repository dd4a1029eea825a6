# SPDX-License-Identifier: Apache-2.0
"""Pictures of experiments/lvxattn/README.md and of the notebook.

python -m experiments.lvxattn.figures     writes results/*.png: bytes and the map of strategies from the formulas, time
                                          and memory from the records, where there are some
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from experiments.lvxattn import memory, needle
from experiments.lvxattn.tables import SILENT, latest, of_kind
from vtjax.parallel import strategies
from vtjax.parallel.strategies import Case
from vtjax.viz import curves
from vtjax.viz.tables import read_jsonl

RESULTS = Path(__file__).resolve().parent / "results"
NAMES = {
    "gather_q": "queries gathered (ours)",
    "ring_q": "queries around a ring (the paper's)",
    "ring_kv": "ring attention",
    "ring_kv_expanded": "ring attention, heads expanded",
    "ulysses": "Ulysses",
    "replicated_q": "queries on all devices",
    "gather_q_scatter": "queries gathered, outputs reduced",
}
COLORS = dict(zip(NAMES, (*curves.COLORS, curves.MUTED), strict=True))
LLAMA = Case(16, 1, 2048, 0, 32, 8, 128, 2)


def main() -> int:
    """See the module's text."""
    written = [
        curves.save(sent(LLAMA), RESULTS / "bytes.png"),
        curves.save(choices(LLAMA), RESULTS / "strategies.png"),
    ]
    for file, kind, draw in (("links", "op", times), ("memory", "temp", temporaries)):
        path = RESULTS / f"{file}.jsonl"
        records = of_kind(read_jsonl(path), kind) if path.exists() else []
        records = [r for r in records if r.get("passes") != "forward"]
        if records:
            written.append(curves.save(draw(records), RESULTS / f"{kind}.png"))
    if (path := RESULTS / "needle.jsonl").exists():
        written.append(curves.save(needle.figure(read_jsonl(path)), RESULTS / "needle.png"))
    for path in written:
        print(f"{path.relative_to(RESULTS.parent)}: {path.stat().st_size // 1000} kB", file=sys.stderr)
    return 0


def sent(case: Case) -> Any:
    """Bytes that a device sends for one layer, both passes, against the visual tokens; where the order changes."""
    figure = curves.new_figure(7.6, 4.4)
    axes = figure.add_subplot()
    keys = np.geomspace(1e3, 1e7, 200)
    for name in ("ring_kv_expanded", "ring_kv", "ulysses", "ring_q", "gather_q"):
        both = [strategies.sent(case._replace(keys=int(k)), name) for k in keys]
        style = {"linestyle": (0, (1, 2)), "linewidth": 3.2} if name == "ring_q" else {"linewidth": 2.0}
        axes.plot(keys, [(b.forward + b.backward) / 1e6 for b in both], color=COLORS[name], label=NAMES[name], **style)
    group = case.heads // case.kv_heads
    for place, text in ((group, "G S_Q"), ((case.n - 1) * group, "(n - 1) G S_Q")):
        axes.axvline(place * case.rows, color=curves.MUTED, linewidth=0.9, linestyle="--")
        axes.text(place * case.rows, 0.02, f" {text}", transform=axes.get_xaxis_transform(), color=curves.MUTED)
    axes.set(xscale="log", yscale="log", xlabel="visual tokens S_K", ylabel="MB sent by a device per layer")
    _finish(axes, f"Llama 3-V's heads, {case.rows} tokens of text, {case.n} devices, bfloat16")
    return figure


def choices(case: Case) -> Any:
    """Which strategy the model of `strategies.choose` takes, over visual tokens and devices."""
    from matplotlib import colors

    figure = curves.new_figure(7.6, 3.4)
    axes = figure.add_subplot()
    keys, devices = np.geomspace(256, 1e7, 160), (2, 4, 8, 16, 32, 64)
    taken = [[strategies.choose(case._replace(n=n, keys=int(k))) for k in keys] for n in devices]
    names = [name for name in NAMES if any(name in row for row in taken)]
    for name in names:
        there = np.where([[t == name for t in row] for row in taken], 1.0, np.nan)
        axes.pcolormesh(keys, range(len(devices)), there, cmap=colors.ListedColormap([COLORS[name]]), alpha=0.75)
        axes.scatter([], [], s=60, marker="s", color=COLORS[name], alpha=0.75, label=NAMES[name])
    group = case.heads // case.kv_heads
    for rows, style in ((np.full(len(devices), group), "--"), (np.array([(n - 1) * group for n in devices]), ":")):
        axes.plot(rows * case.rows, range(len(devices)), color=curves.INK, linewidth=1.4, linestyle=style)
    axes.set(xscale="log", xlabel="visual tokens S_K", ylabel="devices", xlim=(keys[0], keys[-1]))
    axes.set_yticks(range(len(devices)), [str(n) for n in devices])
    _finish(
        axes,
        f'strategy="auto" on v5e chips, {case.rows} tokens of text; dashed G S_Q, dotted (n - 1) G S_Q',
        out=True,
    )
    return figure


def times(records: list[dict[str, Any]]) -> Any:
    """Time of the operation over ring attention's, against S_K / S_Q, a panel per number of processes; thin: the work
    alone. Links as in the first record."""
    rate = records[0]["rate"]
    used = latest([r for r in records if r["rate"] == rate], ("n", "keys"))
    counts = sorted({r["n"] for r in used})
    figure = curves.new_figure(4.0 * len(counts) + 0.6, 3.9)
    for number, n in enumerate(counts):
        axes = figure.add_subplot(1, len(counts), number + 1)
        found = sorted((r for r in used if r["n"] == n), key=lambda r: r["ratio"])
        for name in dict.fromkeys(s for r in found for s in r["strategies"]):
            having = [r for r in found if name in r["seconds"]]
            ratio = [r["ratio"] for r in having]
            for suffix, style in (
                ("", {"linewidth": 2.0, "marker": "o", "markersize": 3.6}),
                (SILENT, {"linewidth": 0.8}),
            ):
                y = [1e3 * r["seconds"][name + suffix]["median_s"] for r in having if name + suffix in r["seconds"]]
                if len(y) == len(ratio):
                    axes.plot(ratio, y, color=COLORS[name], label="" if suffix else NAMES[name], **style)
        axes.set(xscale="log", yscale="log", xlabel="S_K / S_Q", ylabel="" if number else "ms, forward and backward")
        _finish(axes, f"{n} processes, links of {rate}", legend=number == len(counts) - 1, out=True)
    return figure


def temporaries(records: list[dict[str, Any]]) -> Any:
    """Temporary memory of a stack of layers against the visual tokens, by what is recomputed."""
    mine = [r for r in records if r["strategy"] == "gather_q" and r.get("turns") == "scan"]
    used = latest(mine, ("mode", "keys"))
    figure = curves.new_figure(6.4, 3.9)
    axes = figure.add_subplot()
    said = {"none": "everything kept", "names": "keys and values projected again", "full": "all of it done again"}
    for color, mode in zip(curves.COLORS, memory.MODES, strict=False):
        points = sorted(
            (r["keys"] / 1e3, r["temp_bytes"] / 2**30) for r in used if r["mode"] == mode and "temp_bytes" in r
        )
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker="o", linewidth=2.0, label=said[mode])
    axes.set(xlabel="visual tokens S_K, thousands", ylabel="temporary memory per chip, GiB")
    axes.set_ylim(bottom=0)
    _finish(axes, f"{used[0]['layers']} layers of Llama 3-V's widths on {used[0]['topology']}")
    return figure


def _finish(axes: Any, title: str, legend: bool = True, out: bool = False) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=curves.INK)
    axes.grid(color=curves.GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if legend:
        place = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)} if out else {"loc": "best"}
        axes.legend(frameon=False, fontsize=8.5, **place)


if __name__ == "__main__":
    sys.exit(main())
