# SPDX-License-Identifier: Apache-2.0
"""Accuracy of configs, measured through the command line and recorded; the README's table is made from the records.

python -m experiments.vit.accuracy digits   trains (minutes), evaluates, appends to results/accuracy.jsonl
python -m experiments.vit.accuracy ti16     evaluates the pretrained weights on all 1000 photographs
python -m experiments.vit.accuracy          rewrites the table in README.md; --check exits 1 where it differs
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.command import vtjax
from vtjax.viz import tables

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "experiments" / "vit" / "results" / "accuracy.jsonl"
WHAT = {
    "digits": "small ViT trained from scratch on scikit-learn's digits",
    "ti16": "pretrained ViT-Ti/16 (AugReg) on 1000 photographs with ImageNet labels",
}
KEPT = ("top1", "loss", "count", "params", "macs_per_image", "seconds", "step", "seed", "params_sha256")


def measure(variant: str) -> dict[str, Any]:
    """Runs the commands of a variant of configs/vit.py; the figures worth keeping."""
    config = f"--config=configs/vit.py:{variant}"
    if variant == "ti16":
        result = vtjax("eval", config)
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = vtjax("run", config, f"--workdir={folder}/run")
    return {"variant": variant, **{name: result[name] for name in KEPT if name in result}}


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: the latest record of each variant."""
    latest = {r["variant"]: r for r in records}
    rows = [
        (
            WHAT[variant],
            f"**{100 * r['top1']:.1f} %**",
            f"{r['count']:,.0f}",
            f"`python -m experiments.vit.accuracy {variant}`",
            f"{r['date'][:10]}, {r['hardware']['cpu']}, jax {r['versions']['jax']}",
        )
        for variant, r in sorted(latest.items())
    ]
    return tables.markdown(("what", "top-1", "test images", "command", "when and where"), rows)


def main(arguments: list[str]) -> int:
    """See the module's text."""
    from vtjax.account import record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"to measure: {', '.join(WHAT)}")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    for variant in options.variants:
        if variant not in WHAT:
            parser.error(f"VARIANT must be one of {', '.join(WHAT)}, found {variant!r}")
    for variant in options.variants:
        written = record.write(RECORDS, measure(variant))
        print(f"{variant}: top-1 {100 * written['top1']:.2f} % of {written['count']:.0f}", file=sys.stderr)
    check = options.check
    changed = tables.refresh(ROOT / "README.md", {"accuracy": table(tables.read_jsonl(RECORDS))}, check=check)
    print(f"README.md {'differs' if check else 'rewritten'}: {', '.join(changed) or 'nothing'}", file=sys.stderr)
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
