# SPDX-License-Identifier: Apache-2.0
"""The two constants of the fit of output weights, settled on training images: fitted on some, compared on others.

    python -m experiments.dgmr.refit_constants

Neither evaluation images nor labels are looked at. ViT-Ti/16 at r = 2, 200 photographs to fit and 100 others, on which
the distillation loss is compared before any distillation. One record per fit in results/refit_constants.jsonl.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vtjax.account import record
from vtjax.cli import assemble
from vtjax.cli import config as config_lib
from vtjax.methods import dgmr, dgmr_refit
from vtjax.models.vit import ViT
from vtjax.train.task import first_examples
from vtjax.viz import tables

RECORDS = Path(__file__).resolve().parent / "results" / "refit_constants.jsonl"
RIDGES, WEIGHTS = (1e-3, 1e-2, 1e-1, 1.0), (1.0, 14.0, 196.0)
RATIO, FIT, COMPARED = 2.0, 200, 100


def main() -> int:
    """See the module's text."""
    config = config_lib.load_config("configs/dgmr.py", "ti16")
    task, data = assemble.assemble(config)
    _, frozen, _ = task.init(jax.random.key(0))
    dense_spec, dense = dgmr.original(task.spec), frozen["teacher"]
    assert dense_spec is not None
    images = first_examples(data, "train", FIT + COMPARED)["image"]
    # The files are sorted by name, which says nothing about what they show; shuffled all the same.
    images = images[np.random.default_rng(0).permutation(len(images))]
    others = np.array_split(images[FIT:], 5)
    known = [jax.jit(ViT(dense_spec).apply)(dense, jnp.asarray(part)) for part in others]
    pruned = dgmr.prune(dense_spec, dense, ratio=RATIO)
    done = {(r["ridge"], r["class_weight"]) for r in (tables.read_jsonl(RECORDS) if RECORDS.exists() else [])}
    for point in itertools.product(RIDGES, WEIGHTS):
        if point in done:
            continue
        ridge, weight = point
        spec, params = dgmr_refit.refit(*pruned, dense_spec, dense, images[:FIT], ridge=ridge, class_weight=weight)
        run = jax.jit(ViT(spec).apply)
        found = []
        for part, (told, aux) in zip(others, known, strict=True):
            y, its = run(params, jnp.asarray(part))
            whole, patch = dgmr.distances(
                dgmr.features(spec, y, its, config.dgmr.point), dgmr.features(dense_spec, told, aux, config.dgmr.point)
            )
            found.append(np.stack([whole, patch, y.argmax(-1) == told.argmax(-1)]))
        whole, patch, same = np.concatenate(found, -1).mean(-1).tolist()
        loss = config.dgmr.w_class * whole + config.dgmr.w_patch * patch
        record.write(
            RECORDS,
            {
                **{"ratio": RATIO, "ridge": ridge, "class_weight": weight, "fit": FIT, "compared": COMPARED, "seed": 0},
                **{"loss": loss, "class_mse": whole, "patch_mse": patch, "agreement": same},
            },
        )
        print(f"ridge {ridge:g}, weight {weight:g}: loss {loss:.3f}, same answer {same:.2f}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
