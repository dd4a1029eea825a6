# SPDX-License-Identifier: Apache-2.0
"""Tables of experiments/dgmr/README.md, rebuilt from results/*.jsonl.

python -m experiments.dgmr.tables           writes them between their markers
python -m experiments.dgmr.tables --check   exits 1 where the README differs
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.ltmp.tables import bits, circumstances, interval
from vtjax.ops.gram_schmidt import FORMS
from vtjax.viz import tables

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
METHODS = {"gram_schmidt": "Gram-Schmidt", "l2": "magnitude", "random": "random"}
SIDES = {**{form: f"ours, {form}" for form in reversed(FORMS)}, "dgeqp3": "LAPACK dgeqp3", "released": "released loop"}

Records = list[dict[str, Any]]


def build(results: Path = HERE / "results") -> dict[str, str]:
    """Markdown by table name; a table whose records do not exist is absent."""
    makers = (
        ("selection", "selection", selection),
        ("agreement", "selection", agreement),
        ("layers", "selection", layers),
        ("accuracy", "accuracy", accuracy),
        ("criteria", "accuracy", criteria),
        ("pruned", "accuracy", pruned),
        ("refit", "accuracy", refit),
        ("constants", "refit_constants", constants),
        ("allocation", "accuracy", allocation),
        ("cost", "accuracy", cost),
        ("int8", "accuracy", int8),
        ("speed", "speed", speed),
        ("composition", "composition", composition),
    )
    return tables.from_records(results, makers)


def selection(records: Records) -> str:
    """Seconds per layer, the latest record of every size."""
    latest = {(device(r), r["M"], r["N"]): r for r in records if r["kind"] == "times" and r["matrix"] == "normal"}
    rows = []
    for (where, height, width), r in latest.items():
        times = [f"{r[side]['median_s']:.3g}" if side in r else "" for side in SIDES]
        rows.append((where, f"{height} x {width}", *times, _over(r, "dgeqp3"), _over(r, "released")))
    if not rows:
        return ""
    header = ("on", "M x N", *(f"{name}, s" for name in SIDES.values()), "dgeqp3 over blocked", "released over blocked")
    note = "K = N, median of the rounds; ratios with their range over the rounds. "
    return tables.markdown(header, rows) + "\n\n" + note + circumstances(latest.values())


def device(r: Mapping[str, Any]) -> str:
    """What a record was measured on, as "CPU" or "H100"."""
    kind = next(iter(r["hardware"]["devices"]))
    return kind.upper() if kind == "cpu" else kind.removeprefix("NVIDIA ").split()[0]


def _over(r: Mapping[str, Any], side: str) -> str:
    if side not in r.get("ratio", {}):
        return ""
    low, high = r["ratio_range"][side]
    return f"**{r['ratio'][side]:.1f}** ({low:.1f} to {high:.1f})"


def agreement(records: Records) -> str:
    """How greedy the picks are, and what they have in common with others'."""
    latest = {(device(r), r["M"], r["N"], r["matrix"]): r for r in records if r["kind"] == "times"}
    rows = []
    for (where, height, width, kind), r in latest.items():
        common = {side: each["blocked"] for side, each in r["agreement"].items()}
        rows.append(
            (
                where,
                f"{height} x {width}",
                kind,
                f"{r['shortfall']['blocked']:.0e}",
                *(f"{r['shortfall'][side]:.0e}" if side in r["shortfall"] else "" for side in ("dgeqp3", "released")),
                *(
                    f"{common[side]['order']} in place, {common[side]['set']} at all, of {r['K']}"
                    if side in common
                    else ""
                    for side in ("dgeqp3", "released")
                ),
            )
        )
    if not rows:
        return ""
    header = (
        "on",
        "M x N",
        "matrix",
        "shortfall, ours",
        "dgeqp3's",
        "released",
        "as dgeqp3 picks",
        "as the release picks",
    )
    return tables.markdown(header, rows)


def layers(records: Records) -> str:
    """The same on every MLP of the ViT-Ti/16."""
    latest = {r["form"]: r for r in records if r["kind"] == "layers"}
    rows = [
        (
            form,
            f"{max(r['shortfall']):.0e}",
            f"{sum(r['order'])} of {r['L'] * r['K']}",
            f"{sum(r['set'])} of {r['L'] * r['K']}",
        )
        for form, r in latest.items()
    ]
    header = ("form", "largest shortfall", "picks in dgeqp3's place", "picks that dgeqp3 has, too")
    return tables.markdown(header, rows) if rows else ""


def grid(records: Iterable[Mapping[str, Any]], kind: str = "grid") -> dict[tuple[str, float, str], Records]:
    """Records by (model, ratio, method), one per seed; the weakest pruning first, then as in `METHODS`."""
    latest = {r["name"]: r for r in records if r["kind"] == kind and r["method"] != "dense"}
    cells: dict[tuple[str, float, str], Records] = {}
    for r in sorted(
        latest.values(), key=lambda r: (r["model"], -r["ratio"], list(METHODS).index(r["method"]), r["seed"])
    ):
        cells.setdefault((r["model"], r["ratio"], r["method"]), []).append(dict(r))
    return cells


def dense(records: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Records of the unpruned models, by model."""
    return {r["model"]: r for r in records if r["kind"] == "grid" and r["method"] == "dense"}


def accuracy(records: Records) -> str:
    """Top-1 before and after distillation."""
    cells, whole = grid(records), dense(records)
    rows: list[tuple[Any, ...]] = []
    for model, r in whole.items():
        rows.append((model, "dense", "", "1.000", f"{r['params'] / 1e6:.2f}", "", f"{100 * r['top1']:.1f}", "", ""))
        for (name, ratio, method), found in cells.items():
            if name != model:
                continue
            rows.append(
                (
                    model,
                    METHODS[method],
                    f"{ratio:.0f}",
                    f"{found[0]['mac_ratio']:.3f}",
                    f"{found[0]['params'] / 1e6:.2f}",
                    _spread([100 * r["before_top1"] for r in found]),
                    f"**{_spread([100 * r['top1'] for r in found])}**",
                    _spread([100 * r["agreement"] for r in found]),
                    len(found),
                )
            )
    if not rows:
        return ""
    header: tuple[str, ...] = (
        "model",
        "criterion",
        "r",
        "MACs over dense",
        "parameters, M",
        "top-1 pruned",
        "top-1 distilled",
    )
    header += ("says what the dense model says, %", "seeds")
    note = "In brackets: least and most over the seeds. "
    runs = [r for found in cells.values() for r in found]
    return tables.markdown(header, rows) + "\n\n" + note + circumstances([*whole.values(), *runs])


def _spread(values: list[float]) -> str:
    if len(set(values)) == 1:
        return f"{values[0]:.1f}"
    return f"{np.mean(values):.1f} [{min(values):.1f}, {max(values):.1f}]"


def criteria(records: Records) -> str:
    """Gram-Schmidt minus the other criteria, paired over images."""
    cells = grid(records)
    rows = []
    for model, ratio in dict.fromkeys((m, r) for m, r, _ in cells):
        three = [cells.get((model, ratio, method), []) for method in METHODS]
        seeds = set.intersection(*({r["seed"] for r in found} for found in three))
        if not seeds:
            continue
        ours, *others = ([r for r in found if r["seed"] in seeds] for found in three)
        texts = []
        for correct in ("before_correct", "correct"):
            mine = bits({"correct": r[correct]} for r in ours)
            texts += [interval(mine - bits({"correct": r[correct]} for r in other)) for other in others]
        rows.append((model, f"{ratio:.0f}", len(seeds), *texts))
    if not rows:
        return ""
    header = (
        "model",
        "r",
        "seeds",
        "pruned: minus magnitude",
        "minus random",
        "distilled: minus magnitude",
        "minus random ",
    )
    note = (
        "Points of top-1 [95 %]; mean over seeds for every image, intervals by bootstrap over the images, 10,000 draws."
    )
    return tables.markdown(header, rows) + "\n\n" + note


def pruned(records: Records) -> str:
    """Before any distillation: how the neurons were chosen and their output weights made, on the same images."""
    found = {r["name"]: r for r in records if r["kind"] == "pruned"}
    rows = []
    for name, copied in found.items():
        fitted = found.get(name.removesuffix("copied") + "fitted")
        if not name.endswith(" copied") or fitted is None:
            continue
        how = METHODS[copied["method"]]
        how += "" if copied["allocation"] == "uniform" else f", counts by {copied['allocation']}"
        rows.append(
            (
                *(copied["model"], f"{copied['ratio']:.0f}", how, f"{copied['mac_ratio']:.3f}"),
                *(f"{100 * copied['top1']:.1f}", f"**{100 * fitted['top1']:.1f}**"),
                interval(bits([fitted]) - bits([copied])),
                *(
                    f"{copied['class_mse'] + copied['patch_mse']:.3g}",
                    f"{fitted['class_mse'] + fitted['patch_mse']:.3g}",
                ),
            )
        )
    if not rows:
        return ""
    header: tuple[str, ...] = ("model", "r", "neurons by", "MACs over dense", "top-1, copied", "top-1, fitted")
    header += ("fitted minus copied [95 %]", "feature distance, copied", "fitted")
    return tables.markdown(header, rows) + "\n\n" + circumstances(found.values())


def refit(records: Records) -> str:
    """Output weights fitted anew, beside copied ones."""
    copied, rows = grid(records), []
    for (model, ratio, method), found in grid(records, "refit").items():
        seeds = {r["seed"] for r in found}
        known = [r for r in copied.get((model, ratio, method), []) if r["seed"] in seeds]
        same = bool(known) and len(known) == len(found)
        rows.append(
            (
                *(model, METHODS[method], f"{ratio:.0f}", len(found)),
                _spread([100 * r["before_top1"] for r in known]) if known else "not run",
                f"**{_spread([100 * r['before_top1'] for r in found])}**",
                _spread([100 * r["top1"] for r in known]) if known else "not run",
                f"**{_spread([100 * r['top1'] for r in found])}**",
                interval(bits(found) - bits(known)) if same else "",
            )
        )
    header: tuple[str, ...] = (
        "model",
        "criterion",
        "r",
        "seeds",
        "pruned: copied",
        "fitted",
        "distilled: from copied",
        "from fitted",
    )
    header += ("fitted minus copied, distilled [95 %]",)
    return tables.markdown(header, rows) if rows else ""


def constants(records: Records) -> str:
    """The distillation loss on images that the fit has not seen, pull by weight of the class token."""
    found = {(r["ridge"], r["class_weight"]): r["loss"] for r in records}
    ridges, weights = (sorted({pair[i] for pair in found}) for i in (0, 1))
    best = min(found.values())
    rows = []
    for ridge in ridges:
        losses = (found[ridge, weight] for weight in weights)
        rows.append((f"{ridge:g}", *(f"**{x:.1f}**" if x == best else f"{x:.1f}" for x in losses)))
    header = ("pull", *(f"class token {weight:g}" for weight in weights))
    one = records[-1]
    note = f"Fitted on {one['fit']} training photographs, compared on {one['compared']} others. "
    return tables.markdown(header, rows) + "\n\n" + note + circumstances(records)


def allocation(records: Records) -> str:
    """Counts per block, at the MACs of one count for all."""
    cells = grid(records)
    found: dict[tuple[str, float, str], list[Mapping[str, Any]]] = {}
    for r in {r["name"]: r for r in records if r["kind"] == "allocation"}.values():
        if r["allocation"] != "uniform":
            found.setdefault((r["model"], r["ratio"], r["allocation"]), []).append(r)
    rows = []
    for (model, ratio, how), each in found.items():
        even = cells.get((model, ratio, "gram_schmidt"), [])
        even = [r for r in even if r["seed"] in {e["seed"] for e in each}]
        rows.append(
            (
                *(model, f"{ratio:.0f}", how, len(each), f"{each[0]['mac_ratio']:.3f}"),
                _spread([100 * r["before_top1"] for r in each]),
                _spread([100 * r["top1"] for r in each]),
                interval(
                    bits({"correct": r["before_correct"]} for r in each)
                    - bits({"correct": r["before_correct"]} for r in even)
                )
                if even
                else "not run",
                interval(bits(each) - bits(even)) if even else "not run",
                " ".join(map(str, each[0]["keep"])),
            )
        )
    if not rows:
        return ""
    header: tuple[str, ...] = (
        "model",
        "r",
        "allocated by",
        "seeds",
        "MACs over dense",
        "top-1 pruned",
        "top-1 distilled",
    )
    header += ("pruned, minus even counts", "distilled, minus even counts", "neurons per block (seed 0)")
    return tables.markdown(header, rows)


def cost(records: Records) -> str:
    """What distillation takes."""
    rows = [
        (
            *(r["model"], "remembered" if r["cache"] else "in every step"),
            "none" if r["augment"] == "none" else "crops, flips" if r["augment"] == "crop" else "shifts",
            *(r["steps"], "" if r["seconds"] is None else f"{r['seconds']:.0f}", f"{r['images_per_s']:.1f}"),
            *(f"{100 * r['before_top1']:.1f}", f"{100 * r['top1']:.1f}", f"{r['class_mse'] + r['patch_mse']:.3f}"),
        )
        for r in {r["name"]: r for r in records if r["kind"] == "cost"}.values()
    ]
    header = ("model", "teacher", "augmentation", "steps", "s", "images/s", "top-1 pruned", "distilled", "feature MSE")
    return tables.markdown(header, rows) if rows else ""


def int8(records: Records) -> str:
    """8-bit weights on top."""
    rows = [
        (
            *(r["model"], "dense" if r["method"] == "dense" else f"r = {r['ratio']:.0f}", f"{r['mac_ratio']:.3f}"),
            *(f"{100 * r['top1']:.1f}", f"{100 * r['int8_top1']:.1f}"),
            *(f"{r['bytes'] / 2**20:.1f}", f"{r['int8_bytes'] / 2**20:.1f}"),
        )
        for r in {r["name"]: r for r in records if r["kind"] == "int8"}.values()
    ]
    header = ("model", "pruned to", "MACs over dense", "top-1, float32", "top-1, 8 bits", "MiB, float32", "MiB, 8 bits")
    return tables.markdown(header, rows) if rows else ""


def speed(records: Records) -> str:
    """Times of pruned models beside dense ones."""
    latest = {(device(r), r["model"], r["dtype"], r["ratio"], r["batch"]): r for r in records}
    rows = [
        (
            *(device(r), r["model"], r["dtype"], f"{r['ratio']:.0f}", r["batch"]),
            f"{1000 * r['dense']['median_s']:.1f}",
            f"{1000 * r['reduced']['median_s']:.1f}",
            f"{r['time_ratio']:.2f} ({r['time_ratio_p10']:.2f} to {r['time_ratio_p90']:.2f})",
            *(f"{r['mac_ratio']:.2f}", f"**{r['realised']:.2f}**"),
            *(_mib(r[side].get("memory_bytes")) for side in ("dense", "reduced")),
            *(_mib(4 * r[side]["params"]) for side in ("dense", "reduced")),
            "" if r["other_cores"] is None else f"{r['other_cores']:.2f}",
        )
        for r in latest.values()
    ]
    header: tuple[str, ...] = (
        "on",
        "model",
        "type",
        "r",
        "batch",
        "dense ms",
        "pruned ms",
        "times as fast (p10 to p90)",
        "MAC ratio",
        "realised",
    )
    header += ("memory dense, MiB", "pruned", "weights dense, MiB", "pruned ", "other busy cores")
    return tables.markdown(header, rows) + "\n\n" + circumstances(latest.values())


def _mib(count: float | None) -> str:
    return "" if count is None else f"{count / 2**20:.0f}"


def composition(records: Records) -> str:
    """A pruned model under LTMP."""
    rows = []
    for r in {r["what"]: r for r in records}.values():
        timed = r.get("deployed")
        rows.append(
            (
                *(r["what"], f"{r['mac_ratio']:.3f}", "" if "product" not in r else f"{r['product']:.3f}"),
                f"{100 * r['top1']:.1f}",
                f"{timed['time_ratio']:.2f} ({timed['time_ratio_p10']:.2f} to {timed['time_ratio_p90']:.2f})"
                if timed
                else "",
            )
        )
    header = ("model", "MACs over dense", "product of both savings", "top-1", "times as fast as dense, batch 32")
    return tables.markdown(header, rows) + "\n\n" + circumstances(records)


if __name__ == "__main__":
    sys.exit(tables.command(README, build, __doc__))
