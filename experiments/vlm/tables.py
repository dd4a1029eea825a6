# SPDX-License-Identifier: Apache-2.0
"""Tables of experiments/vlm/README.md, rebuilt from results/*.jsonl.

python -m experiments.vlm.tables           writes them between their markers
python -m experiments.vlm.tables --check   exits 1 where the README differs
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from experiments.ltmp.tables import circumstances
from vtjax.viz import tables

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
AIMS = {"prefill": 1.0, "decode": 1.3}

Records = list[dict[str, Any]]


def build(results: Path = HERE / "results") -> dict[str, str]:
    """Markdown by table name; a table whose records do not exist is absent."""
    makers = (
        ("decoder", "decoder", decoder),
        ("beside_torch", "beside_torch", beside_torch),
        ("accuracy", "accuracy", accuracy),
        ("compiled", "aot", compiled),
        ("packing", "packing", packing),
        ("baselines", "data", baselines),
        ("batches", "data", batches),
    )
    return tables.from_records(results, makers)


def decoder(records: Records) -> str:
    """The latest record, beside what is right."""
    r = records[-1]
    equal = ", ".join(f"{side}: {'yes' if same else '**no**'}" for side, same in r["batch_equals_alone"].items())
    prompt, text = next(iter(r["continuations"].items()))
    where = f"{r['date'][:10]}, {r['hardware']['cpu']}, jax {r['versions']['jax']}"
    rows = [
        (
            f"perplexity, first {r['tokens']} tokens of the Apache License",
            "16.4",
            f"{r['perplexity']:.3f}",
            where,
        ),
        (f"what follows “{prompt}”", "“ Paris.”", f"“{text.splitlines()[0]}”", where),
        (f"{len(r['continuations'])} ragged prompts continue in a batch as alone", "yes", equal, where),
    ]
    return tables.markdown(("figure", "aim", "measured", "when and where"), rows)


def beside_torch(records: Records) -> str:
    """The latest record of each case and number of threads."""
    latest = {(r["case"], r["threads"]): r for r in records}
    rows = []
    for (case, threads), r in latest.items():
        low, high = r["ratio_range"]
        rates = [f"{r['tokens_per_s'][side]:.1f}" for side in ("vtjax", "torch")]
        aim = f"{AIMS[r['kind']]:.1f}"
        ratio = f"**{r['ratio']:.2f}** ({low:.2f} to {high:.2f})"
        busy = "" if r["other_cores"] is None else f"{r['other_cores']:.2f}"
        rows.append((case, threads, *rates, ratio, aim, busy))
    head = (
        "case",
        "threads",
        "vtjax tokens/s",
        "PyTorch tokens/s",
        "ratio (p10 to p90)",
        "aim",
        "cores busy elsewhere",
    )
    return tables.markdown(head, rows)


def accuracy(records: Records) -> str:
    """The last stage of every model, the seeds together, type by type."""
    found: dict[str, Records] = {}
    for r in records:
        found.setdefault(r["variant"], []).append(r)
    rows = []
    for variant, runs in found.items():
        kinds = ("top1", *(name for name in runs[0] if name.startswith("top1@")))
        seconds = [r["seconds"] for r in runs if r["seconds"] is not None]
        rows.append(
            (
                f"`{variant}`",
                len(runs),
                f"{runs[0]['params']:,}",
                f"{runs[0]['steps']:,}",
                *(_range([100 * r[kind] for r in runs], "{:.1f} %") for kind in kinds),
                _range([s / 60 for s in seconds], "{:.0f} min") if seconds else "",
            )
        )
    types = [name.partition("@")[2] for name in records[0] if name.startswith("top1@")]
    head = ("run", "seeds", "parameters", "steps", "all", *types, "time")
    return tables.markdown(head, rows) + "\n\n" + circumstances(records)


def _range(values: list[float], form: str) -> str:
    """The mean, and the least and largest of several."""
    mean = form.format(sum(values) / len(values))
    if len(values) == 1:
        return mean
    low, high = (form.format(end).split()[0] for end in (min(values), max(values)))
    return f"{mean} ({low} to {high})"


def packing(records: Records) -> str:
    """The latest record."""
    r = records[-1]
    rows = [
        (
            name,
            r["rows"][side],
            f"{r['questions_per_step'][side]:.0f}",
            f"{r['slots_per_step'][side]:,.0f}",
            f"{1e3 * r[side]['median_s']:.0f} ms",
            f"{r['questions_per_s'][side]:.0f}",
        )
        for name, side in ((f"up to {r['pack']} per row", "packed"), ("one per row", "alone"))
    ]
    head = ("questions", "rows", "questions of a step", "slots", "a step", "questions per second")
    busy = f"; {r['other_cores']:.2f} cores busy elsewhere" if r.get("other_cores") is not None else ""
    note = f"{r['per_question']:.2f} times as many questions per second when packed{busy}. "
    return tables.markdown(head, rows) + "\n\n" + note + circumstances([r])


def compiled(records: Records) -> str:
    """What compiles ahead of time say, the latest of every config and topology."""
    rows = []
    for r in {(r["config"], r["topology"]): r for r in records}.values():
        sent = "; ".join(
            f"{kind} {found['count']}, {found['bytes'] / 1e9:.1f} GB"
            for kind, found in r.get("collectives", {}).items()
        )
        memory = f"{r['hbm_bytes_per_device'] / 2**30:.1f} of {r['hbm_limit'] / 2**30:.1f}"
        fits = "yes" if r["fits"] else "**no**"
        rows.append(
            (
                f"`{r['config'].partition(':')[2]}`",
                r["topology"],
                r["devices"],
                r["batch_size"],
                memory,
                fits,
                sent,
                f"{r['compile_s']:.0f}",
            )
        )
    header = (
        "config",
        "slice",
        "chips",
        "batch",
        "GiB per chip",
        "fits",
        "collectives of a step: number, sent",
        "compiled in, s",
    )
    return tables.markdown(header, rows) + "\n\n" + circumstances(records[-1:])


def baselines(records: Records) -> str:
    """What answering blindly reaches, the latest record of every set, whole and type by type."""
    latest = {r["set"]: r for r in records if r["kind"] == "baselines"}
    rows = []
    for name, r in latest.items():
        for kind, found in (("all", r), *r["types"].items()):
            shares = (f"{100 * found[m]:.1f} %" for m in ("majority", "per_text"))
            rows.append((name, kind, f"{found['questions']:,}", *shares, found["majority_answer"]))
    if not rows:
        return ""
    header = ("set", "type", "test questions", "majority answer", "best answer per text", "the majority answer")
    return tables.markdown(header, rows) + "\n\n" + circumstances(latest.values())


def batches(records: Records) -> str:
    """Padding and time of batches, the latest record of every form."""
    latest = {(r["set"], r["pack"], tuple(r["lengths"])): r for r in records if r["kind"] == "batches"}
    rows = [
        (
            name,
            pack,
            ", ".join(map(str, r["lengths"])),
            f"{r['questions_per_batch']:.0f}",
            f"{r['slots_per_question']:.1f}",
            f"{100 * r['padding']:.1f} %",
            f"{1e3 * r['batch_s']['median']:.1f} ms",
            f"{1e3 * r['batch_s']['p10']:.1f} to {1e3 * r['batch_s']['p90']:.1f}",
        )
        for (name, pack, _), r in latest.items()
    ]
    if not rows:
        return ""
    header = (
        "set",
        "pack",
        "row lengths",
        "questions per batch",
        "slots per question",
        "padding",
        "a batch",
        "p10 to p90",
    )
    one, loads = next(iter(latest.values())), [r["load"][0] for r in latest.values()]
    note = (
        f"{one['batch_size']} rows, {one['visual_tokens']} visual tokens, one thread, images decoded before; "
        f"load of the machine {min(loads):.1f} to {max(loads):.1f}. "
    )
    return tables.markdown(header, rows) + "\n\n" + note + circumstances(latest.values())


if __name__ == "__main__":
    sys.exit(tables.command(README, build, __doc__))
