# SPDX-License-Identifier: Apache-2.0
"""Tables of experiments/dpn/README.md, rebuilt from results/*.jsonl.

python -m experiments.dpn.tables           writes them between their markers
python -m experiments.dpn.tables --check   exits 1 where the README differs
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from experiments.ltmp.tables import bits, circumstances, interval
from vtjax.viz import tables

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
TYPES = ("coarse", "relation", "fine")

Records = list[dict[str, Any]]


def build(results: Path = HERE / "results") -> dict[str, str]:
    """Markdown by table name; a table whose records do not exist is absent."""
    makers = (("dense", "accuracy", dense), ("arms", "accuracy", arms), ("speed", "speed", speed))
    return tables.from_records(results, makers)


def by_arm(records: Records, kind: str) -> dict[str, Records]:
    """The records of every arm, one per seed, in the order of the seeds."""
    found: dict[str, Records] = {}
    for r in sorted((r for r in records if r["kind"] == kind), key=lambda r: r["seed"]):
        found.setdefault(r["name"], []).append(r)
    return found


def dense(records: Records) -> str:
    """The models that every arm starts from."""
    rows = [
        (
            r["seed"],
            f"{r['params']:,}",
            f"{r['steps']:,}",
            *(f"{100 * r[name]:.1f} %" for name in ("top1", *(f"top1@{t}" for t in TYPES))),
        )
        for r in by_arm(records, "dense").get("dense", [])
    ]
    if not rows:
        return ""
    used = [r for r in records if r["kind"] == "dense"]
    return tables.markdown(("seed", "parameters", "steps", "all", *TYPES), rows) + "\n\n" + circumstances(used)


def arms(records: Records) -> str:
    """Accuracy and work of every arm; and what its own decisions are worth, against the same ones permuted."""
    rows = []
    for kind in ("arms", "tau"):
        for name, found in by_arm(records, kind).items():
            tops = [100 * r["top1"] for r in found]
            gain = information = ""
            if "permuted_correct" in found[0]:
                other = np.mean([[[int(c) for c in row] for row in r["permuted_correct"]] for r in found], (0, 1))
                gain, information = (
                    interval(bits(found) - other),
                    f"{np.mean([r['information_bits'] for r in found]):.3f}",
                )
            types = [f"{100 * np.mean([r[f'top1@{t}'] for r in found]):.1f}" for t in TYPES]
            halvings = [f"{np.mean([r[f'halvings@{t}'] for r in found]):.2f}" for t in TYPES]
            spread = f"{np.mean(tops):.1f}" + (f" [{min(tops):.1f}, {max(tops):.1f}]" if len(tops) > 1 else "")
            work = f"{np.mean([r['mac_ratio'] for r in found]):.3f}"
            rows.append((name, len(found), work, f"**{spread}**", *types, *halvings, gain, information))
    if not rows:
        return ""
    header = ("arm", "seeds", "work over dense", "accuracy, %", *TYPES, *(f"halvings, {t}" for t in TYPES))
    header += ("own decisions minus permuted ones [95 %]", "path tells of the type, bits")
    used = [r for r in records if r["kind"] in ("arms", "tau")]
    return tables.markdown(header, rows) + "\n\n" + circumstances(used)


def speed(records: Records) -> str:
    """Time saved over work saved, the latest record of every case."""
    rows = []
    for r in {(r["kind"], r["visual"], str(r["paths"])): r for r in records}.values():
        path = "four paths, two each" if r["batch"] > 1 else ", ".join(map(str, r["paths"]))
        for side in ("switch", "static", "staged"):
            if f"{side}_ratio" in r:
                times = f"{r[f'{side}_ratio']:.2f}"
                rows.append(
                    (
                        r["batch"],
                        r["visual"],
                        path,
                        side,
                        f"{r['mac_ratio']:.2f}",
                        times,
                        f"**{r[f'{side}_realised']:.2f}**",
                    )
                )
    header = ("batch", "visual tokens", "experts", "program", "times less work", "times as fast", "realised")
    return tables.markdown(header, rows) + "\n\n" + circumstances(records)


if __name__ == "__main__":
    sys.exit(tables.command(README, build, __doc__))
