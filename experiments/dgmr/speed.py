# SPDX-License-Identifier: Apache-2.0
"""Realised speed and memory of pruned models: `vtjax bench` of the ViT-Ti/16 before and after, one process per case.

    python -m experiments.dgmr.speed            r = 1, 2, 3 at batch 1, 16 and 32; nothing else may use the cores

Times do not depend on what the weights are, so nothing is distilled. Appends to results/speed.jsonl.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from experiments.command import vtjax
from vtjax.account import record

RECORDS = Path(__file__).resolve().parent / "results" / "speed.jsonl"


def main() -> int:
    """See the module's text; exit code 1 where a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", default="1.0,2.0,3.0")
    parser.add_argument("--batch", default="1,16,32")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    failed = 0
    for ratio in map(float, options.ratios.split(",")):
        words = ["bench", f"--config=configs/dgmr.py:ti16,ratio={ratio}", f"--batch={options.batch}"]
        words += [f"--rounds={options.rounds}"]
        try:
            told = vtjax(*words)
        except subprocess.CalledProcessError:
            failed += 1
            continue
        for found in told["batches"]:
            about = {"model": "ViT-Ti/16", "ratio": ratio, "seed": 0, "command_line": " ".join(["vtjax", *words])}
            record.write(RECORDS, {**about, **found})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
