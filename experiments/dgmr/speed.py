# SPDX-License-Identifier: Apache-2.0
"""Realised speed and memory of pruned models: `vtjax bench` of the ViT-Ti/16 before and after, one process per case.

    python -m experiments.dgmr.speed            r = 1, 2, 3 at batch 1, 16 and 32; nothing else may use the cores
    python -m experiments.dgmr.speed --model=openclip_g --dtype=bfloat16 --batch=1,16,64       one that needs a GPU

Times do not depend on what the weights and the images are, so nothing is distilled, and other models than the ViT-Ti/16
are random and look at noise. Appends to results/speed.jsonl.
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
    parser.add_argument("--model", default="ti16", help="variant of configs/dgmr.py (default: %(default)s)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--ratios", default="1.0,2.0,3.0")
    parser.add_argument("--batch", default="1,16,32")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    failed = 0
    for ratio in map(float, options.ratios.split(",")):
        words = ["bench", f"--config=configs/dgmr.py:{options.model},ratio={ratio}", f"--batch={options.batch}"]
        words += [f"--config.dtype={options.dtype}", f"--rounds={options.rounds}"]
        words += [] if options.model == "ti16" else ["--noise"]
        try:
            told = vtjax(*words)
        except subprocess.CalledProcessError:
            failed += 1
            continue
        for found in told["batches"]:
            about = {
                "model": options.model,
                "dtype": options.dtype,
                "ratio": ratio,
                "seed": 0,
                "command_line": " ".join(["vtjax", *words]),
            }
            record.write(RECORDS, {**about, **found})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
