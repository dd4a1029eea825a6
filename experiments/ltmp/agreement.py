# SPDX-License-Identifier: Apache-2.0
"""Whether what is deployed is what was evaluated: every photograph of the evaluation half through the masked model and
through the deployed one, and how many decisions stood so close to a threshold that rounding could turn them.

    python -m experiments.ltmp.agreement

With the thresholds of `python -m experiments.ltmp.accuracy grid`, seed 0. Appends to results/agreement.jsonl.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import vtjax
from experiments.ltmp import accuracy, deploy
from vtjax.account import record
from vtjax.cli import config as config_lib
from vtjax.methods import ltmp

RECORDS = Path(__file__).resolve().parent / "results" / "agreement.jsonl"
NEAR = {"best_similarity": 1e-6, "prune_score": 1e-8}
"""A near-tie: a score that is as close to its threshold. Cosines are of order 1, importances of order 1/200."""
BATCH = 32
IMAGES = 500  # the evaluation half


def main() -> int:
    """See the module's text."""
    for target in accuracy.TARGETS:
        found = agreement(accuracy.run_of(target))
        record.write(RECORDS, {"target": target, "seed": 0, **found})
        print(f"target {target}: {found}", file=sys.stderr)
    return 0


def agreement(run: str) -> dict[str, Any]:
    """Counts and distances over all evaluation photographs."""
    config = config_lib.load_config(accuracy.CONFIG, overrides={"init_from": run})
    model = vtjax.load(run)
    spec, params = ltmp.consistent(model.spec), model.params
    images = deploy.photographs(config, spec, "eval", IMAGES)
    kept = deploy.calibration(config, spec, params)["kept"]
    deployed = jax.jit(deploy.packed(config, spec, kept, BATCH).apply)
    masked = jax.jit(ltmp.vit(spec).apply)
    logits: dict[str, list[np.ndarray]] = {"masked": [], "deployed": []}
    counts: dict[str, list[np.ndarray]] = {"masked": [], "deployed": []}
    near = decisions = overflow = 0
    for first in range(0, len(images), BATCH):
        rows = images[first : first + BATCH]
        padded = np.concatenate([rows, np.repeat(rows[-1:], BATCH - len(rows), 0)])
        y, told = deployed(params, padded)
        z, aux = masked(params, padded)
        logits["deployed"].append(np.asarray(y)[: len(rows)])
        logits["masked"].append(np.asarray(z)[: len(rows)])
        counts["deployed"].append(np.asarray(told["kept"])[: len(rows)])
        counts["masked"].append(np.asarray(deploy.layers(aux, spec)["kept"])[: len(rows)])
        overflow += int(np.asarray(told["overflow"])[: len(rows)].sum())
        ties, all_of_them = near_ties(aux, params[ltmp.NAME], len(rows))
        near, decisions = near + ties, decisions + all_of_them
    y, z = (np.concatenate(logits[side]) for side in ("deployed", "masked"))
    same = (np.concatenate(counts["deployed"]) == np.concatenate(counts["masked"])).all(1)
    return {
        "images": len(images),
        "same_counts": int(same.sum()),
        "same_class": int((y.argmax(1) == z.argmax(1)).sum()),
        "logit_difference": float(np.abs(y - z)[same].max()),
        "logit_difference_of_others": float(np.abs(y - z)[~same].max(initial=0.0)),
        "near_ties": near,
        "decisions": decisions,
        "near": NEAR,
        "overflow": overflow,
    }


def near_ties(aux: Any, thresholds: Any, rows: int) -> tuple[int, int]:
    """Decisions within `NEAR` of their threshold, and all decisions, of the first `rows` images of a masked model."""
    near = decisions = 0
    for layer, block in enumerate(aux["blocks"]):
        for score, threshold in (("best_similarity", "merge_threshold"), ("prune_score", "prune_threshold")):
            if score not in block["decisions"]:
                continue
            values = np.asarray(block["decisions"][score])[:rows]
            if score == "prune_score":
                values = np.where(np.asarray(block["decisions"]["prune_alive"])[:rows] > 0.5, values, np.inf)
            values = values[np.isfinite(values)]
            near += int((np.abs(values - float(thresholds[threshold][layer])) <= NEAR[score]).sum())
            decisions += values.size
    return near, decisions


if __name__ == "__main__":
    sys.exit(main())
