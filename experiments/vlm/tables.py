# SPDX-License-Identifier: Apache-2.0
"""Tables of experiments/vlm/README.md, rebuilt from results/*.jsonl.

python -m experiments.vlm.tables           writes them between their markers
python -m experiments.vlm.tables --check   exits 1 where the README differs
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from vtjax.viz import tables

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
AIMS = {"prefill": 1.0, "decode": 1.3}


def build(results: Path = HERE / "results") -> dict[str, str]:
    """Markdown by table name; a table whose records do not exist is absent."""
    makers = (("decoder", decoder), ("beside_torch", beside_torch))
    return tables.from_records(results, ((name, name, make) for name, make in makers))


def decoder(records: list[dict[str, Any]]) -> str:
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


def beside_torch(records: list[dict[str, Any]]) -> str:
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


if __name__ == "__main__":
    sys.exit(tables.command(README, build, __doc__))
