# SPDX-License-Identifier: Apache-2.0
"""Tables of experiments/das/README.md, rebuilt from results/*.jsonl.

python -m experiments.das.tables           writes them between their markers
python -m experiments.das.tables --check   exits 1 where the README differs
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from experiments.dpn.tables import beside, by_arm, mean
from experiments.ltmp.tables import circumstances
from vtjax.viz import tables

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"

Records = list[dict[str, Any]]


def build(results: Path = HERE / "results") -> dict[str, str]:
    """Markdown by table name; a table whose records do not exist says so."""
    makers = (("planted", "search", planted), ("null", "search", null), ("toy", "search", toy))
    return tables.from_records(results, (*makers, ("arms", "accuracy", arms), ("cost", "cost", cost)))


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


def arms(records: Records) -> str:
    """Every arm: accuracy, work, what is trained, and paired differences from adapters without skipping."""
    used = [r for r in records if r["kind"] in ("arms", "depth")]
    if not used:
        return ""
    found = {**by_arm(records, "arms"), **by_arm(records, "depth")}
    plain, rows = found.get("adapters", []), []
    for name, runs in found.items():
        work = f"{mean(runs, 'macs_per_prompt') / mean(plain, 'macs_per_prompt'):.3f}" if plain else ""
        skips = "; ".join(", ".join(map(str, r["skips"])) for r in runs) if runs[0]["skips"] else "none"
        rows.append(
            (name, f"{100 * mean(runs, 'top1'):.1f}", beside(runs, plain) if plain and name != "adapters" else "", work,
             f"{mean(runs, 'trained'):.0f}", skips, len(runs))
        )  # fmt: skip
    header = ("arm", "accuracy, %", "minus adapters", "work over adapters'", "trained", "layers left out", "seeds")
    return tables.markdown(header, rows) + "\n\n" + circumstances(used)


def cost(records: Records) -> str:
    """Time saved over work saved, and the search's share; the latest record of every case."""
    latest = {(r["layers"], r["m"]): r for r in records}
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


if __name__ == "__main__":
    sys.exit(tables.command(README, build, __doc__))
