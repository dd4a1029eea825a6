# SPDX-License-Identifier: Apache-2.0
"""Tables of experiments/lvxattn/README.md, rebuilt from results/*.jsonl.

python -m experiments.lvxattn.tables           writes them between their markers
python -m experiments.lvxattn.tables --check   exits 1 where the README differs
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.ltmp.tables import circumstances
from experiments.lvxattn import needle, needle_time
from experiments.lvxattn.exactness import TOLERANCES, judged, missed
from vtjax.parallel import strategies
from vtjax.viz import tables

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
QUANTITIES = ("o", "lse", "dq", "dk", "dv")
SILENT = " silent"
CASES = {
    "Llama 3-V, text 2048, 384 frames": strategies.Case(16, 1, 2048, 384 * 6404, 32, 8, 128, 2),
    "mPLUG-Owl3-7b, text 8192, 4096 frames": strategies.Case(16, 1, 8192, 4096 * 729, 28, 4, 128, 2),
    "OpenFlamingo-3b, text 65536, 65536 frames": strategies.Case(16, 1, 65536, 65536 * 64, 8, 8, 64, 2),
    "Llama 3-V, text 2048, one image": strategies.Case(8, 1, 2048, 6404, 32, 8, 128, 2),
}
"""Of the paper's table 3, spec section 3.3; and one image."""

Records = list[dict[str, Any]]


def build(results: Path = HERE / "results") -> dict[str, str]:
    """Markdown by table name; a table whose records do not exist says so."""
    makers: tuple[tuple[str, str, Callable[[Records], str]], ...] = (
        ("exactness", "exactness", exactness),
        ("traffic", "traffic", traffic),
        ("op", "links", lambda r: beside(r, "op")),
        ("step", "links", lambda r: beside(r, "step")),
        ("decode", "links", lambda r: beside(r, "decode")),
        ("collectives", "links", collectives),
        ("down", "links", down),
        ("kernels", "memory", kernels),
        ("temp", "memory", temp),
        ("longest", "memory", longest),
        ("recomputing", "memory", recomputing),
        ("aot", "aot", compiled),
        ("needle", "needle", lambda r: needle.table(r) + "\n\n" + circumstances(r)),
        ("needle_read", "needle", needle.by_read),
        ("needle_cameras", "needle", needle.by_type),
        ("needle_equal", "needle", needle_time.table),
    )
    return {"paper_bytes": paper_bytes(), **tables.from_records(results, makers)}


def of_kind(records: Records, kind: str) -> Records:
    return [r for r in records if r.get("kind") == kind]


def latest(records: Records, names: Sequence[str]) -> Records:
    """The last record of every case, in the order of the cases."""
    return list({tuple(str(r.get(name)) for name in names): r for r in records}.values())


def paper_bytes() -> str:
    """MB that a device sends per layer, forward and backward pass, by the formulas; bfloat16."""
    shown = ("gather_q", "ring_q", "ring_kv", "ring_kv_expanded", "ulysses")

    def cell(case: strategies.Case, name: str) -> str:
        found = strategies.sent(case, name)
        digits = 1 if found.forward < 2e8 else 0
        return f"{found.forward / 1e6:,.{digits}f} / {found.backward / 1e6:,.{digits}f}"

    rows = [(name, case.n, *(cell(case, s) for s in shown)) for name, case in CASES.items()]
    return tables.markdown(("case", "n", *shown), rows)


def exactness(records: Records) -> str:
    """The worst of all strategies and masks by type; numbers of devices at which a tolerance is missed apart."""
    used = sorted(latest(records, ("n", "dtype")), key=lambda r: r["n"])
    groups: dict[tuple[str, bool], Records] = {}
    for dtype in TOLERANCES:
        for r in (r for r in used if r["dtype"] == dtype):
            groups.setdefault((dtype, bool(missed(r))), []).append(r)
    rows: list[tuple[Any, ...]] = []
    for (dtype, above), found in groups.items():
        errors = [e for r in found for e in judged(r).values()]
        worst = (f"{max(e[name] for e in errors):.1e}" for name in QUANTITIES)
        few = [max(e for s, e in r["few"].items() if s != "gspmd") for r in found if "few" in r]
        weights = [max(r["weights"].values()) for r in found if "weights" in r]
        rows.append(
            (
                dtype,
                ", ".join(str(r["n"]) for r in found),
                f"{sum(r['cases'] for r in found):,}",
                *worst,
                f"{max(weights):.1e}" if weights else "",
                f"{found[0]['tolerance']:.0e}{', **missed**' if above else ''}",
                f"{max(few):.1e}" if few else "",
            )
        )
    header = ("type", "n", "cases", *QUANTITIES, "weights", "tolerance", "few keys")
    return tables.markdown(header, rows) + "\n\n" + circumstances(used)


def traffic(records: Records) -> str:
    """Compiled programs beside the formulas, for the most devices; whether all others agree, too."""
    used = latest(records, ("n", "strategy"))
    most = max(r["n"] for r in used)
    rows = []
    for r in (r for r in used if r["n"] == most):
        same = [
            all(o[p]["sent"] == o["formula"][p] for p in o["formula"]) for o in used if o["strategy"] == r["strategy"]
        ]
        counts = (", ".join(f"{c} {kind}" for kind, c in r[p]["counts"].items()) for p in ("forward", "backward"))
        sent = (r[p]["sent"] for p in ("forward", "backward"))
        rows.append(
            (r["strategy"], *sent, *counts, f"{sum(same)} of {len(same)}", "grows" if r["grows"] else "the same")
        )
    header = ("strategy", "forward, bytes", "backward, bytes", "collectives forward", "backward")
    header += ("n at which equal to the formula", "with twice the keys")  # type: ignore[assignment]
    return tables.markdown(header, rows) + f"\n\nn = {most}; " + circumstances(used)


def beside(records: Records, kind: str) -> str:
    """Milliseconds of the median call, those of the work alone in parentheses, and times as fast as `ring_kv`."""
    used = latest(of_kind(records, kind), ("n", "rate", "rows", "keys", "passes", "depth"))
    names = list(dict.fromkeys(s for r in used for s in r["strategies"]))
    rows = []
    for r in used:
        seconds = r["seconds"]

        def cell(name: str, seconds: Any = seconds) -> str:
            if name not in seconds:
                return ""
            one, base = seconds[name]["median_s"], seconds["ring_kv"]["median_s"]
            work = f" ({1e3 * seconds[name + SILENT]['median_s']:.0f})" if name + SILENT in seconds else ""
            return f"{1e3 * one:.0f}{work}" + ("" if name == "ring_kv" else f", **{base / one:.2f}**")

        passes = "forward" if r.get("passes") == "forward" else "both"
        rows.append((r["n"], r["rate"], passes, r["rows"], r["keys"], f"{r['ratio']:.0f}", *map(cell, names)))
    if not rows:
        return ""
    header = ("n", "link", "passes", "S_Q", "S_K", "S_K / S_Q", *names)
    return tables.markdown(header, rows) + "\n\n" + circumstances(used)


def collectives(records: Records) -> str:
    """MB per second that a process sends, of 125 that a link of 1 Gbit/s has."""
    used = latest(of_kind(records, "collectives"), ("n", "rate", "size"))
    rows = []
    for r in used:
        n, sent = r["n"], r["size"]
        share = {"ppermute": 1.0, "all_to_all": (n - 1) / n, "all_gather": (n - 1) / n}
        rate = (f"{share[name] * sent / t['median_s'] / 1e6:.0f}" for name, t in r["seconds"].items())
        rows.append((n, r["rate"], f"{r['goodput'] / 1e6:.0f}", *rate))
    if not rows:
        return ""
    return tables.markdown(("n", "link", "TCP", *used[0]["seconds"]), rows) + "\n\n" + circumstances(used)


def down(records: Records) -> str:
    """How every process ended after its link, or another one's, was lost."""
    used = latest(of_kind(records, "down"), ("n", "rate", "lost"))
    rows = []
    for r in used:
        for index, one in enumerate(r["ended"]):
            said = (one["line"] or "").partition("; start all")[0].removeprefix("vtjax: ")
            again = f"from step {r['resumed']}, {'equal' if r['equal'] else 'NOT equal'}"
            rows.append((r["lost"], index, one["seconds"], one["code"], said, "" if index else again))
    if not rows:
        return ""
    header = ("link down", "process", "ended after, s", "exit code", "its line", "the restart")
    return tables.markdown(header, rows) + "\n\n" + circumstances(used)


def kernels(records: Records) -> str:
    """How often the program has each attention kernel: forward, dq, dkv."""
    used = latest(of_kind(records, "kernels"), ("strategy", "mode"))
    modes = dict.fromkeys(r["mode"] for r in used)
    rows = []
    for strategy in dict.fromkeys(r["strategy"] for r in used):
        by = {r["mode"]: " / ".join(map(str, r["kernels"].values())) for r in used if r["strategy"] == strategy}
        rows.append((strategy, *(by.get(mode, "") for mode in modes)))
    if not rows:
        return ""
    return tables.markdown(("strategy", *modes), rows) + f"\n\n{used[0]['layers']} layers; " + circumstances(used)


def temp(records: Records) -> str:
    """Temporary memory of the stack: gradients of the visual tokens as XLA adds them, in turn by a barrier, by a
    scan."""
    found = {
        (r["topology"], r["strategy"], r["keys"], r["mode"], r.get("turns", False)): r for r in of_kind(records, "temp")
    }
    if not found:
        return ""

    def cell(r: dict[str, Any] | None) -> str:
        return "" if r is None else f"{r['temp_bytes'] / 2**20:,.0f}" if "temp_bytes" in r else "does not fit"

    cases = sorted(dict.fromkeys(case[:-1] for case in found), key=lambda case: (case[1], case[2]))
    rows = [(*case, *(cell(found.get((*case, turns))) for turns in (False, True, "scan"))) for case in cases]
    header = ("topology", "strategy", "S_K", "recomputed", "temporaries, MiB", "in turn, MiB", "scanned, MiB")
    return tables.markdown(header, rows) + "\n\n" + circumstances(list(found.values()))


def longest(records: Records) -> str:
    """The longest visual input by strategy, in frames of 6404 tokens, without and with recomputation."""
    used = latest(of_kind(records, "longest"), ("topology", "strategy", "mode"))
    by = {(r["topology"], r["strategy"], r["mode"]): r for r in used}
    rows = []
    for topology, strategy in dict.fromkeys((r["topology"], r["strategy"]) for r in used):
        none, names = (by.get((topology, strategy, mode)) for mode in ("none", "names"))
        cells = [f"{r['keys']:,} ({r['keys'] // 6404:,})" if r else "" for r in (none, names)]
        rows.append((topology, strategy, *cells, f"{names['keys'] / none['keys']:.2f}" if none and names else ""))
    if not rows:
        return ""
    header = ("topology", "strategy", "kept: tokens (frames)", "recomputed", "ratio")
    return tables.markdown(header, rows) + "\n\n" + circumstances(used)


def compiled(records: Records) -> str:
    """Whole training steps of the published models: memory, and bytes of collectives by kind."""
    used = latest(records, ("config", "step", "topology", "slices"))
    rows = []
    for r in used:
        place = f"{r['slices']} x {r['topology']}" if r["slices"] > 1 else r["topology"]
        mesh = ", ".join(f"{axis} {size}" for axis, size in r["mesh"].items() if size > 1)
        memory = f"{r['hbm_bytes_per_device'] / 2**30:.1f} of {r['hbm_limit'] / 2**30:.1f}"
        sent = {kind: f"{one['bytes'] / 2**20:,.1f}" for kind, one in r.get("collectives", {}).items()}
        within = ", ".join(f"{kind} {size}" for kind, size in sent.items() if kind != "dcn-send")
        name = r["config"].partition(":")[2]
        rows.append((name, place, mesh, memory if r["fits"] else f"{memory}, **no**", within, sent.get("dcn-send", "")))
    header = ("config", "chips", "mesh", "GiB per chip", "MiB per chip within a slice", "between slices")
    return tables.markdown(header, rows) + "\n\n" + circumstances(used)


def recomputing(records: Records) -> str:
    """What recomputation costs in time."""
    used = latest(of_kind(records, "time"), ("rows", "keys"))
    rows = [
        (
            r["rows"],
            r["keys"],
            *(f"{r[name]:.2f}" + tables.spread(r, name) for name in ("names_over_none", "full_over_none")),
        )
        for r in used
    ]
    if not rows:
        return ""
    return tables.markdown(("S_Q", "S_K", "names / none", "full / none"), rows) + "\n\n" + circumstances(used)


if __name__ == "__main__":
    sys.exit(tables.command(README, build, __doc__))
