# SPDX-License-Identifier: Apache-2.0
"""DGMR and LTMP together: thresholds are learned on a model whose MLPs were pruned and distilled.

    python -m experiments.dgmr.composition      r = 2, thresholds at 0.6 of the pruned model's MACs

With the pruned model of `python -m experiments.dgmr.accuracy grid --model=ti16` (seed 0), which is made where it is not
there. Appends to results/composition.jsonl: both alone, both together as evaluated and as deployed, and the product of
their MAC ratios.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from experiments.command import vtjax
from experiments.dgmr import accuracy
from experiments.ltmp import accuracy as ltmp_accuracy
from vtjax.account import record
from vtjax.train.executables import Executables

RECORDS = Path(__file__).resolve().parent / "results" / "composition.jsonl"
RATIO, TARGET, DENSE = 2.0, 0.6, "vit_ti16_augreg"


def main() -> int:
    """See the module's text."""
    point = next(p for p in accuracy.grid("ti16") if p[0] == f"ti16 gram_schmidt {RATIO} 0")
    pruned = accuracy.trained("grid", point, Executables())
    thresholds = vtjax("eval", f"--workdir={ltmp_accuracy.run_of(TARGET)}")
    workdir = "runs/dgmr/composition"
    source = accuracy.folder("grid", point[0])
    arguments = ("--config=configs/ltmp.py:ti16", f"--config.init_from={source}", f"--workdir={workdir}")
    both = vtjax("run", *arguments, f"--config.ltmp.target={TARGET}")
    timed = vtjax("bench", f"--workdir={workdir}", f"--dense={DENSE}", "--batch=32", "--images=64")
    keep(f"DGMR alone, r = {RATIO:.0f}", pruned["mac_ratio"], pruned["top1"])
    keep(f"LTMP alone, target {TARGET}", thresholds["mac_ratio"], thresholds["top1"])
    keep(
        "both",
        both["unpruned_mac_ratio"],
        both["top1"],
        product=pruned["mac_ratio"] * both["mac_ratio"],
        deployed={
            name: timed[name] for name in ("time_ratio", "time_ratio_p10", "time_ratio_p90", "mac_ratio", "batch")
        },
    )
    return 0


def keep(what: str, ratio: float, top1: float, **more: Any) -> None:
    """Writes one record; `ratio` is over the MACs of the model that was neither pruned nor reduced."""
    found = record.write(RECORDS, {"what": what, "mac_ratio": ratio, "top1": top1, "seed": 0, **more})
    print(f"{what}: top-1 {100 * found['top1']:.1f} % at {found['mac_ratio']:.3f} of the MACs", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
