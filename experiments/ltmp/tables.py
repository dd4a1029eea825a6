# SPDX-License-Identifier: Apache-2.0
"""Tables of experiments/ltmp/README.md, rebuilt from results/*.jsonl.

python -m experiments.ltmp.tables           writes them between their markers
python -m experiments.ltmp.tables --check   exits 1 where the README differs
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vtjax.viz import tables

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
LEARNED = {
    "ltmp": "LTMP: merge, then prune",
    "ltm": "LTM: merge only",
    "ltp": "LTP: prune only",
    "ltpm": "LTPM: prune, then merge",
}
FIXED = {
    "fixed merge": "fixed rate, merge (as ToMe)",
    "fixed prune": "fixed rate, prune",
    "fixed merge_prune": "fixed rate, merge, then prune",
    "fixed prune_merge": "fixed rate, prune, then merge",
}
PAPER = {0.8: "72.0 (-0.2)", 0.6: "71.5 (-0.7)", 0.45: "69.8 (-2.4)"}
"""DeiT-Ti of the paper on ImageNet: top-1 by target, dense 72.2 (public leaderboards, spec section 9)."""
AIMS = {0.8: 0.5, 0.6: 1.5, 0.45: 4.0}


def build(results: Path = HERE / "results") -> dict[str, str]:
    """Markdown by table name; a table whose records do not exist is absent."""
    makers = (
        ("accuracy", "accuracy", accuracy),
        ("combination", "accuracy", combination),
        ("ablations", "accuracy", ablations),
        ("changed", "changed", changed),
        ("speed", "speed", speed),
        ("beside_tome", "beside_tome", beside_tome),
        ("agreement", "agreement", agreement),
        ("sweep", "sweep", sweep),
    )
    return tables.from_records(results, makers)


def grid(records: Iterable[Mapping[str, Any]]) -> dict[tuple[str, float], list[Mapping[str, Any]]]:
    """Records of the learned variants by (variant, target), one per seed, the newest."""
    latest = {(r["method"], r["target"], r["seed"]): r for r in records if r["kind"] == "grid"}
    cells: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for (method, target, _), r in sorted(latest.items(), key=lambda item: item[0][2]):
        cells.setdefault((method, target), []).append(r)
    return cells


def accuracy(records: list[dict[str, Any]]) -> str:
    """Top-1 and real MACs, beside fixed rates, the dense model and the paper."""
    fixed = {(r["method"], r["target"]): r for r in records if r["kind"] == "fixed"}
    dense = fixed.get(("dense", 1.0))
    cells = grid(records)
    targets = sorted({target for _, target in cells}, reverse=True)
    rows: list[tuple[str, ...]] = []
    if dense:
        rows.append(("dense", *(f"{100 * dense['top1']:.1f}" for _ in targets)))
    for method, name in LEARNED.items():
        texts = []
        for target in targets:
            seeds = cells.get((method, target), [])
            tops = [100 * r["top1"] for r in seeds]
            spread = f" [{min(tops):.1f}, {max(tops):.1f}]" if len(tops) > 1 else ""
            ratio = np.mean([r["mac_ratio"] for r in seeds]) if seeds else 0.0
            texts.append(f"**{np.mean(tops):.1f}**{spread} at {ratio:.3f}" if seeds else "not run")
        rows.append((name, *texts))
    for method, name in FIXED.items():
        found = [fixed.get((method, target)) for target in targets]
        rows.append((name, *(f"{100 * r['top1']:.1f} at {r['mac_ratio']:.3f}" if r else "not run" for r in found)))
    rows.append(("the paper's DeiT-Ti on ImageNet, LTMP (dense 72.2)", *(PAPER[target] for target in targets)))
    header = ("top-1 in % at (MACs over dense)", *(f"target {target}" for target in targets))
    lines = [tables.markdown(header, rows)]
    if dense:
        told = []
        for target in targets:
            seeds = cells.get(("ltmp", target), [])
            if seeds:
                lost = 100 * (dense["top1"] - np.mean([r["top1"] for r in seeds]))
                miss = max(abs(r["mac_ratio"] / target - 1) for r in seeds)
                aim = "met" if lost <= AIMS[target] else "**missed**"
                told.append(
                    f"target {target}: {lost:.1f} points lost (aim {AIMS[target]}: {aim}), MACs within {miss:.1%}"
                )
        lines.append("LTMP, " + "; ".join(told) + ". In brackets: least and most over the seeds.")
    runs = [r for seeds in cells.values() for r in seeds]
    if runs:
        steps = ", ".join(str(n) for n in sorted({r["steps"] for r in runs}))
        seconds = np.median([r["seconds"] for r in runs])
        lines.append(
            f"Learning: {steps} steps of {runs[0]['batch_size']} photographs; a run with its start, settling and "
            f"evaluation took {seconds:.0f} s (median of {len(runs)}, on cores that other work shared)."
        )
    lines.append(circumstances(r for r in records if r["kind"] in ("grid", "fixed")))
    return "\n\n".join(lines)


def combination(records: list[dict[str, Any]]) -> str:
    """LTMP minus the better of merging and pruning alone, and minus fixed-rate merging, paired over images."""
    cells = grid(records)
    fixed = {r["target"]: r for r in records if r["kind"] == "fixed" and r["method"] == "fixed merge"}
    rows = []
    for target in sorted({target for _, target in cells}, reverse=True):
        both = cells.get(("ltmp", target))
        alone = {name: cells[name, target] for name in ("ltm", "ltp") if (name, target) in cells}
        if not both or len(alone) < 2:
            continue
        better = max(alone, key=lambda name: np.mean([r["top1"] for r in alone[name]]))
        texts = [interval(bits(both) - bits(alone[better]))]
        texts.append(interval(bits(both) - bits([fixed[target]])) if target in fixed else "not run")
        rows.append((f"{target}", LEARNED[better], *texts))
    if not rows:
        return ""
    header = (
        "target",
        "the better one alone",
        "LTMP minus it, points [95 %]",
        "LTMP minus fixed-rate merging, points [95 %]",
    )
    note = "Mean over seeds for every image; intervals by bootstrap over the images, 10,000 draws."
    return tables.markdown(header, rows) + f"\n\n{note}"


def bits(records: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """Share of the seeds that were right, per image."""
    return np.mean([[int(c) for c in r["correct"]] for r in records], 0)


def interval(difference: np.ndarray) -> str:
    """Mean and 95 % interval, in points."""
    rng = np.random.default_rng(0)
    draws = difference[rng.integers(0, len(difference), (10_000, len(difference)))].mean(1)
    low, high = np.percentile(100 * draws, [2.5, 97.5])
    return f"{100 * difference.mean():+.1f} [{low:+.1f}, {high:+.1f}]"


def ablations(records: list[dict[str, Any]]) -> str:
    """One setting changed at a time, paired with the runs that it was changed in."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for r in records:
        if r["kind"] == "ablations":
            by_name.setdefault(r["ablation"], []).append(r)
    base = grid(records)
    rows = []
    for name, found in by_name.items():
        seeds = {r["seed"] for r in found}
        same = [r for r in base.get(("ltmp", found[0]["target"]), []) if r["seed"] in seeds]
        tops, losses = [100 * r["top1"] for r in found], [r["mac_ratio"] for r in found]
        rows.append(
            (
                name,
                len(found),
                f"{np.mean(tops):.1f} at {np.mean(losses):.3f}",
                interval(bits(found) - bits(same)) if same else "not run",
                f"{np.mean([r['seconds'] for r in found]):.0f} s",
            )
        )
    if not rows:
        return ""
    return tables.markdown(
        ("changed", "seeds", "top-1 at MACs", "minus the recipe, points [95 %]", "time of a run"), rows
    )


def changed(records: list[dict[str, Any]]) -> str:
    """Top-1 and MACs of the same thresholds under other conditions."""
    latest = {(r["form"], r["condition"]): r for r in records}
    rows = []
    for condition in dict.fromkeys(r["condition"] for r in records):
        found = [latest.get((form, condition)) for form in ("dense", "plain", "relative")]
        rows.append(
            (
                condition,
                *(("" if r is None else f"{100 * r['top1']:.1f} at {r['mac_ratio']:.3f}") for r in found),
            )
        )
    return tables.markdown(("images", "dense", "plain", "relative"), rows) + "\n\n" + circumstances(records)


def speed(records: list[dict[str, Any]]) -> str:
    """The latest record of every case."""
    latest = {(r["model"], r["form"], r["batch"]): r for r in records}
    rows = [
        (
            *(r[name] for name in ("model", "form", "batch")),
            f"{r['dense_ms']['median']:.1f}",
            f"{r['reduced_ms']['median']:.1f}",
            f"{r['time_ratio']:.2f} ({r['time_ratio_p10']:.2f} to {r['time_ratio_p90']:.2f})",
            f"{r['mac_ratio']:.2f}",
            f"**{r['realised']:.2f}**",
            f"{r['realised_against_groups']:.2f}" if "realised_against_groups" in r else "",
            f"{r['realised_by_cut']:.2f}" if "realised_by_cut" in r else "",
            f"{r['sizes_mac_ratio']:.2f}" if "sizes_mac_ratio" in r else "",
            f"{r['overflow_rate']:.1%}" if "overflow_rate" in r else "",
            f"{r['compile_s']:.0f}",
            "" if r["other_cores"] is None else f"{r['other_cores']:.2f}",
        )
        for r in latest.values()
    ]
    header = (
        *("model", "form", "batch", "dense ms", "reduced ms", "times as fast (p10 to p90)", "MAC ratio", "realised"),
        *(
            "against dense in groups",
            "by cutting",
            "MAC ratio of the sizes",
            "overflow",
            "compile s",
            "other busy cores",
        ),
    )
    return tables.markdown(header, rows) + "\n\n" + circumstances(records)


def agreement(records: list[dict[str, Any]]) -> str:
    """The latest record of every target."""
    latest = {r["target"]: r for r in records}
    rows = [
        (
            target,
            f"{r['same_counts']} of {r['images']}",
            f"{r['same_class']} of {r['images']}",
            f"{r['logit_difference']:.0e}",
            f"{r['logit_difference_of_others']:.0e}" if r["same_counts"] < r["images"] else "",
            f"{r['near_ties']:,} of {r['decisions']:,}",
        )
        for target, r in sorted(latest.items(), reverse=True)
    ]
    header = ("target", "same token counts in all blocks", "same class", "logits differ by, at most", "of the others")
    return tables.markdown((*header, "near-ties"), rows) + "\n\n" + circumstances(records)


def beside_tome(records: list[dict[str, Any]]) -> str:
    """The latest record of every case."""
    latest = {(r["model"], r["batch"], str(r["rates"])): r for r in records}
    rows = [
        (
            r["model"],
            r["batch"],
            *(
                f"{1000 * r[side]['median_s']:.1f}"
                for side in ("vtjax_dense", "vtjax_merged", "torch_dense", "torch_merged")
            ),
            *(f"{r['realised'][side]:.2f}" for side in ("vtjax", "torch")),
            f"{r['ratio']['merged']:.2f}",
        )
        for r in latest.values()
    ]
    header = (
        *("model", "batch", "vtjax dense, ms", "vtjax merged", "PyTorch dense", "PyTorch ToMe"),
        *("realised, vtjax", "realised, PyTorch", "PyTorch over vtjax, merged"),
    )
    return tables.markdown(header, rows) + "\n\n" + circumstances(records)


def sweep(records: list[dict[str, Any]]) -> str:
    """How often a sweep over thresholds compiled."""
    r = records[-1]
    return (
        f"`{r['command_line']}`: {r['points']} points, **{r['compilations']} compilation**"
        f"{'' if r['compilations'] == 1 else 's'}.\n\n{circumstances(records[-1:])}"
    )


def circumstances(records: Iterable[Mapping[str, Any]]) -> str:
    """Hardware, versions, dates, in a line each."""
    lines = dict.fromkeys(
        ", ".join(
            [r["hardware"]["cpu"], f"{r['hardware']['cores']} cores"]
            + [f"{count} x {kind}" for kind, count in r["hardware"]["devices"].items() if kind != "cpu"]
        )
        + f"; jax {r['versions']['jax']}; {r['date'][:10]}."
        for r in records
    )
    return " ".join(lines)


if __name__ == "__main__":
    sys.exit(tables.command(README, build, __doc__))
