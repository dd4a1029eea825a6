# SPDX-License-Identifier: Apache-2.0
"""Tables of experiments/das/README.md, rebuilt from results/*.jsonl.

python -m experiments.das.tables           writes them between their markers
python -m experiments.das.tables --check   exits 1 where the README differs
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from experiments.dpn.tables import by_arm, mean, paired, told
from experiments.ltmp.tables import circumstances
from vtjax.viz import tables

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"

Records = list[dict[str, Any]]


def build(results: Path = HERE / "results") -> dict[str, str]:
    """Markdown by table name; a table whose records do not exist says so."""
    makers = (
        *(("planted", "search", planted), ("null", "search", null), ("toy", "search", toy)),
        *(("base", "accuracy", base), ("arms", "accuracy", arms), ("versus", "accuracy", versus)),
        *(("searches", "accuracy", searches), ("disturbed", "accuracy", disturbed)),
        *(("needed", "sortofclevr", arms), ("needed_versus", "sortofclevr", versus)),
        ("needed_searches", "sortofclevr", layers),
        *(("latency", "cost", latency), ("whole", "cost", whole), ("cost", "cost", cost)),
        ("counts", "counts", counts),
    )
    return tables.from_records(results, makers)


def planted(records: Records) -> str:
    """Planted redundancy: how much of it is found after so many updates."""
    used = [r for r in records if r["kind"] == "planted"]
    if not used:
        return ""
    marks = sorted({int(mark) for r in used for mark in r["hit"]})
    rows = [
        (
            r["policy"],
            f"+{r['cost']:g}",
            *(f"{r['hit'][str(m)]:.2f} ({r['whole'][str(m)]})" if str(m) in r["hit"] else "" for m in marks),
        )
        for r in used
    ]
    header = ("policy", "cost of each other arm", *(f"{mark} updates" for mark in marks))
    return tables.markdown(header, rows) + "\n\n" + circumstances(used)


def null(records: Records) -> str:
    """All arms alike: how often each is chosen."""
    used = [r for r in records if r["kind"] == "null"]
    if not used:
        return ""
    rows = [
        (r["policy"], r["seeds"], r["updates"], f"{min(r['counts'])} to {max(r['counts'])}", f"{r['expected']:.0f}",
         f"{r['chi2']:.1f} ({r['degrees']})")
        for r in used
    ]  # fmt: skip
    header = ("policy", "seeds", "updates", "times chosen, per arm", "expected", "chi-squared (degrees of freedom)")
    return tables.markdown(header, rows) + "\n\n" + circumstances(used)


def toy(records: Records) -> str:
    """Decoders with two layers that do nothing."""
    used = [r for r in records if r["kind"] == "toy"]
    if not used:
        return ""
    marks = sorted({int(mark) for r in used for mark in r["hits"]})
    share = [f"{sum(r['hits'][str(m)] == len(r['idle']) for r in used)} of {len(used)}" for m in marks]
    header = ("", *(f"{mark} updates" for mark in marks))
    return (
        tables.markdown(header, [("decoders whose two idle layers were chosen", *share)])
        + "\n\n"
        + (circumstances(used))
    )


def base(records: Records) -> str:
    """The models that every arm starts from."""
    used = by_arm(records, "base").get("base", [])
    if not used:
        return ""
    rows = [(r["seed"], f"{r['params']:,}", f"{r['steps']:,}", f"{100 * r['top1']:.1f} %") for r in used]
    header = ("seed", "parameters", "steps", "accuracy on questions about shapes")
    return tables.markdown(header, rows) + "\n\n" + circumstances(used)


def runs_of(records: Records, *kinds: str) -> dict[str, Records]:
    """Records by arm, of several kinds."""
    return {name: found for kind in kinds for name, found in by_arm(records, kind).items()}


def difference(runs: Records, *others: Records) -> str:
    """`paired` over the seeds that all have. Of several `others`, draws by chance, a question counts as often as it was
    answered rightly on average."""
    there = [{r["seed"]: told(r) for r in other} for other in others]
    shared = [r for r in runs if all(r["seed"] in seeds for seeds in there)]
    pairs = [(told(r), np.mean([seeds[r["seed"]] for seeds in there], axis=0)) for r in shared]
    return paired(pairs) if pairs else ""


def arms(records: Records) -> str:
    """Every arm: accuracy, work, what is trained, and the paired difference from adapters without skipping."""
    found = runs_of(records, "arms", "others")
    if not (plain := found.get("adapters", [])):
        return ""
    rows = []
    for name, runs in found.items():
        tops = [100 * r["top1"] for r in runs]
        work = mean(runs, "macs_per_prompt") / mean(plain, "macs_per_prompt")
        skips = "; ".join(", ".join(str(layer) for layer in r["skips"]) for r in runs) if runs[0]["skips"] else ""
        rows.append(
            (
                name,
                len(runs),
                f"{sum(tops) / len(tops):.1f} [{min(tops):.1f}, {max(tops):.1f}]",
                "" if name == "adapters" else difference(runs, plain),
                f"{100 * (work - 1):+.1f} %",
                f"{mean(runs, 'trained'):,.0f}",
                skips,
            )
        )
    header = ("arm", "seeds", "accuracy, %", "minus adapters", "work", "trained", "layers left out, from 0")
    used = [r for runs in found.values() for r in runs]
    return tables.markdown(header, rows) + "\n\n" + circumstances(used)


def versus(records: Records) -> str:
    """The bandit's choice minus the other ways to choose as many layers."""
    found = by_arm(records, "arms")
    rows = []
    for m in (1, 2, 4, 8):
        own = found.get(f"bandit m={m}", [])
        for name in (f"random m={m}", f"greedy m={m}", f"last m={m}", f"bandit m={m} one batch"):
            if own and name in found:
                draws = [found[name], *(runs for other, runs in found.items() if other.startswith(f"{name}, draw"))]
                shown = f"{name}, {len(draws)} draws" if len(draws) > 1 else name
                rows.append((m, shown, difference(own, *draws)))
    if not rows:
        return ""
    return tables.markdown(("m", "the bandit's choice minus", "points"), rows)


def searches(records: Records) -> str:
    """What searches did: a fine-tuning has as many training steps, and no other passes."""
    found = by_arm(records, "search")
    if not found:
        return ""
    rows = [
        (
            name,
            len(runs),
            f"{mean(runs, 'steps'):.0f}",
            f"{mean(runs, 'updates'):.0f}",
            f"{mean(runs, 'candidate_passes'):.0f}",
            sum(r["poisoned"] + r["flat"] for r in runs),
        )
        for name, runs in found.items()
    ]
    header = ("search", "seeds", "training steps", "updates", "forward passes of candidates", "updates dropped")
    used = [r for runs in found.values() for r in runs]
    return tables.markdown(header, rows) + "\n\n" + circumstances(used)


def layers(records: Records) -> str:
    """Preferences of the searches, and what the validation loss of the searched model is without each layer alone."""
    used = [r for runs in by_arm(records, "search").values() for r in runs if r["name"].startswith("bandit")]
    if not used:
        return ""
    count = len(used[0]["preference"])
    rows: list[tuple[Any, ...]] = []
    for r in used:
        rows.append((r["name"], r["seed"], "preference", *(f"{x:+.2f}" for x in r["preference"])))
        without = (f"{x - r['loss_with_all']:+.2f}" for x in r["loss_without"])
        rows.append(("", "", "loss without it, minus with all", *without))
    return tables.markdown(("search", "seed", "layer", *map(str, range(count))), rows)


def disturbed(records: Records) -> str:
    """Searches with noisy or few answers: how much of the clean choice is left, and what fine-tuning makes of it."""
    found, clean = by_arm(records, "disturbed"), by_arm(records, "arms").get("bandit m=2", [])
    there, rows = {r["seed"]: r for r in clean}, []
    for name, runs in found.items():
        if name.startswith("search"):
            continue
        pairs = [(set(r["skips"]), set(there[r["seed"]]["skips"])) for r in runs if r["seed"] in there]
        rows.append(
            (
                name,
                len(runs),
                " ".join(f"{len(own & other)}/{len(other)}" for own, other in pairs),
                f"{100 * mean(runs, 'top1'):.1f}",
                difference(runs, clean),
            )
        )
    if not rows:
        return ""
    header = ("search", "seeds", "layers of the clean choice, by seed", "accuracy, %", "minus clean choice")
    used = [r for runs in found.values() for r in runs]
    return tables.markdown(header, rows) + "\n\n" + circumstances(used)


def whole(records: Records) -> str:
    """Seconds of a search beside a fine-tuning; the latest record."""
    used = [r for r in records if r["kind"] == "whole"][-1:]
    rows = [
        (
            r["steps"],
            r["candidate_passes"],
            r["compilations"],
            *(f"{x:.0f}" for x in (s["search"], s["finetune"])),
            f"{s['search'] / s['finetune']:.2f}",
        )
        for r in used
        for s in (r["seconds"],)
    ]
    if not rows:
        return ""
    header = (
        "steps of each",
        "forward passes of candidates",
        "programs of the search",
        "search, s",
        "fine-tuning, s",
        "ratio",
    )
    return tables.markdown(header, rows) + "\n\n" + circumstances(used)


def latency(records: Records) -> str:
    """Time saved beside work saved; the latest record."""
    used = [r for r in records if r["kind"] == "latency"][-1:]
    rows = [
        (
            f"{m} of {r['layers']}",
            r["batch"],
            f"{100 * cut['work']:.1f} %",
            f"{100 * cut['time']:.1f} % [{100 * cut['time_p10']:.1f}, {100 * cut['time_p90']:.1f}]",
            f"**{cut['realised']:.2f}**",
        )
        for r in used
        for m, cut in r["cut"].items()
    ]
    if not rows:
        return ""
    header = ("layers left out", "batch", "work saved", "time saved (10th and 90th percentile)", "time over work")
    return tables.markdown(header, rows) + "\n\n" + circumstances(used)


def cost(records: Records) -> str:
    """Time saved over work saved, and the search's share; the latest record of every case."""
    latest = {(r["layers"], r["m"]): r for r in records if r["kind"] == "cost"}
    if not latest:
        return ""
    rows = [
        (
            f"{m} of {layers}",
            *(f"{x:.2f}" for x in (r["mac_ratio"], r["time_ratio"]["removed"], r["realised"])),
            *(f"{r['time_ratio'][name]:.2f}" for name in ("masked", "removed_gradient", "masked_gradient")),
            f"{100 * r['search_share']:.0f} %",
        )
        for (layers, m), r in latest.items()
    ]
    header: tuple[str, ...] = (
        "layers left out",
        "times less work",
        "times as fast, removed",
        "realised",
        "masked",
        "gradient, removed",
    )
    header += ("gradient, masked", "time that candidates add")
    return tables.markdown(header, rows) + "\n\n" + circumstances(list(latest.values()))


def counts(records: Records) -> str:
    """Parameters and MACs of published models, beside what they were compared with."""
    used = [r for r in records if r["kind"] == "counts"]
    if not used:
        return ""
    rows = [(r["model"], r["what"], r["unit"], f"{r['ours']:.3f}", f"{r['theirs']:g}", r["whose"]) for r in used]
    header = ("model", "", "unit", "counted here", "compared with", "of")
    return tables.markdown(header, rows) + "\n\n" + circumstances(used)


if __name__ == "__main__":
    sys.exit(tables.command(README, build, __doc__))
