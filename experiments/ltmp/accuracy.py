# SPDX-License-Identifier: Apache-2.0
"""Accuracy at a budget of MACs, on the evaluation half of the photographs: learned thresholds and their competitors.

    python -m experiments.ltmp.accuracy grid        4 variants x 3 targets x 3 seeds (an hour on 2 CPU cores)
    python -m experiments.ltmp.accuracy fixed       the dense model, and fixed rates at the same MACs
    python -m experiments.ltmp.accuracy ablations   one setting changed at a time
    python -m experiments.ltmp.accuracy sweep       12 pairs of thresholds by `vtjax sweep`: how often it compiles

Every record in results/accuracy.jsonl holds which images were right, so that differences are paired. Learned points
that were recorded are not run again; runs lie in runs/ltmp and resume.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.command import vtjax
from experiments.ltmp import deploy, start
from vtjax.account import bench, flops, record
from vtjax.cli import assemble
from vtjax.cli import config as config_lib
from vtjax.cli.sweep import parse_shard
from vtjax.methods import ltmp
from vtjax.models.vit import ViT
from vtjax.spec import ViTSpec
from vtjax.train import checkpoint, loop
from vtjax.train.executables import Executables
from vtjax.train.task import Data, Task
from vtjax.viz import tables

RECORDS = Path(__file__).resolve().parent / "results" / "accuracy.jsonl"
CONFIG = "configs/ltmp.py:ti16"
TARGETS, SEEDS = (0.45, 0.6, 0.8), (0, 1, 2)

_ADAM: dict[str, Any] = {
    **{"ltmp.tau": 0.03, "ltmp.prune_tau": 1e-3, "optim.name": "adamw", "optim.lr": 3e-3},
    "optim.groups.prune.lr_scale": 0.03,
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "start as the authors": {"ltmp.start": "authors", "optim.lr": 1e-2},
    "not learned, even start": {"optim.lr": 1e-9, "steps": 1},
    "gradient through masks only": {"ltmp.attached": False},
    "labels, no distillation": {"loss.distill": 0.0},
    "tau 0.5": {"ltmp.tau": 0.5},
    "a tau for each, Adam": _ADAM,
    "similarity of queries": {"ltmp.similarity": "queries"},
    "similarity of values": {"ltmp.similarity": "values"},
    "similarity of features": {"ltmp.similarity": "features"},
    "thresholds and weights": {"optim.groups.weights.frozen": False},
    "thresholds and weights, Adam, 120 steps": {**_ADAM, "optim.groups.weights.frozen": False, "steps": 120},
    "recipe of the release": {
        **{"ltmp.start": "authors", "ltmp.attached": False, "ltmp.form": "faithful", "ltmp.budget": "batch"},
        **{"ltmp.budget_weight": 10.0, "loss.distill": 0.0, "optim.lr": 2e-2, "steps": 100},
    },
}


def folder(name: str) -> str:
    """Where the run of a point lies."""
    return "runs/ltmp/" + name.replace(" ", "_").replace(",", "")


class Trained(NamedTuple):
    """A run that is done, what its checkpoint holds, what the loop says of it, and how many seconds it took now."""

    config: Any
    task: Task
    data: Data
    spec: ViTSpec
    params: Any
    result: dict[str, Any]
    seconds: float


def trained(name: str, overrides: dict[str, Any], executables: Executables) -> Trained:
    """Trains one point, or finds it trained. It is not evaluated: decisions tell more, of each image."""
    config = config_lib.load_config(CONFIG, overrides={leaf: str(value) for leaf, value in overrides.items()})
    workdir = folder(name)
    for leaf, value in (("workdir", workdir), ("checkpoint.best", "")):
        config_lib.override(config, leaf, value)
    task, data = assemble.assemble(config)
    began = time.monotonic()
    counted = dataclasses.replace(task, evaluate=lambda p, f, e, k, batch: {"count": batch["valid"].sum()})
    result = loop.train(counted, data, config, workdir, executables)
    seconds = time.monotonic() - began
    return Trained(config, task, data, *checkpoint.load_params(workdir), result, seconds)


def run_of(target: float, seed: int = 0) -> str:
    """Folder of the grid's run of LTMP at a target, which is trained where it is not there."""
    name = f"ltmp {target} {seed}"
    trained(name, {"ltmp.variant": "ltmp", "ltmp.target": target, "seed": seed}, Executables())
    return folder(name)


def learned(name: str, overrides: dict[str, Any], executables: Executables) -> dict[str, Any]:
    """Trains one point (or finds it trained) and evaluates it as it is deployed."""
    config, task, data, _, params, result, seconds = trained(name, overrides, executables)
    made = loop.decisions(task, data.eval("eval"), config, params, executables=executables)
    return {
        "method": config.ltmp.variant,
        "target": config.ltmp.target,
        "seed": config.seed,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "seconds": round(seconds, 1),
        "params_sha256": result["params_sha256"],
        **measured(made["correct"], made["macs"], flops.macs(task.spec)),
        "mean_kept": made["kept"].mean(0).round(1).tolist(),
        **{f"{name}s": np.asarray(value).round(6).tolist() for name, value in params["ltmp"].items()},
    }


def measured(correct: np.ndarray, macs: np.ndarray, dense: int) -> dict[str, Any]:
    """What a record says about a set of images."""
    return {
        "top1": float(np.mean(correct)),
        "count": len(correct),
        "macs_per_image": float(np.mean(macs)),
        "mac_ratio": float(np.mean(macs) / dense),
        "mac_ratio_std": float(np.std(macs) / dense),
        "correct": "".join(map(str, np.asarray(correct).astype(int))),
    }


def grid() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, overrides) of every point."""
    for seed, target, variant in itertools.product(SEEDS, TARGETS, ("ltmp", "ltm", "ltp", "ltpm")):
        yield f"{variant} {target} {seed}", {"ltmp.variant": variant, "ltmp.target": target, "seed": seed}


def ablations() -> Iterator[tuple[str, dict[str, Any]]]:
    """The same for the ablations, at the target where differences are largest."""
    for seed, (name, changed) in itertools.product(SEEDS, ABLATIONS.items()):
        yield f"{name} {seed}", {"ltmp.target": 0.45, "seed": seed, **changed, "": name}


def fixed_rates(target: float, spec: Any, variant: str) -> dict[int, tuple[int, int]]:
    """Whole numbers per block, the same in every block up to rounding, that spend `target` of the dense MACs."""
    installed, _ = ltmp.install(spec)
    total = np.rint(np.cumsum(start.rates(installed, target, 0.0))).astype(int)
    counts = np.diff(total, prepend=0)
    depth = spec.depth
    rates = {}
    for layer, count in enumerate(counts):
        # Mostly merging early, mostly pruning late, where both are done (spec section 4).
        pruned = {"merge": 0, "prune": count}.get(variant, min(int(1 + (count - 2) * layer / (depth - 1)), count))
        rates[layer] = (int(count - pruned), int(pruned))
    return rates


def fixed() -> Iterator[dict[str, Any]]:
    """The dense model, and fixed rates."""
    config = config_lib.load_config(CONFIG)
    task, data = assemble.assemble(config)
    params, _, _ = task.init(jax.random.key(0))
    backbone, spec = deploy.backbone(params), bench.undone(task.spec)
    dense = flops.macs(spec)
    cases: list[tuple[str, float, dict[int, tuple[int, int]]]] = [("dense", 1.0, {})]
    cases += [(v, t, fixed_rates(t, spec, v)) for v in ltmp.FIXED for t in TARGETS]
    for method, target, rates in cases:
        reduced = ltmp.install_fixed(spec, method, rates) if rates else spec
        model = ltmp.vit(reduced) if rates else ViT(spec)
        run = jax.jit(lambda p, x, model=model: model.apply(p, x)[0].argmax(-1))
        correct = np.concatenate(
            [(np.asarray(run(backbone, jnp.asarray(b["image"]))) == b["label"])[b["valid"]] for b in data.eval("eval")]
        )
        macs = flops.macs(spec, ltmp.fixed_tokens(reduced)) if rates else dense
        yield {
            "method": method if not rates else f"fixed {method}",
            "target": target,
            "seed": 0,
            **measured(correct, np.full(len(correct), macs), dense),
            "rates": [rates.get(layer, (0, 0)) for layer in range(spec.depth)],
        }


def sweep() -> None:
    """12 points over the thresholds themselves, on the tiny model; into results/sweep.jsonl."""
    command = ["sweep", "--config=configs/ltmp.py:tiny", "--mode=eval", "--config.init_from=runs/ltmp/tiny"]
    command += ["--grid=config.ltmp.merge_threshold=0.6,0.7,0.8,0.9"]
    command += ["--grid=config.ltmp.prune_threshold=0.0,0.02,0.04", "--workdir=runs/ltmp/sweep"]
    first = ["run", "--config=configs/vit.py:tiny", "--workdir=runs/ltmp/tiny"]
    vtjax(*first)
    told = vtjax(*command)
    fields = {name: told[name] for name in ("points", "ran", "compilations")}
    record.write(RECORDS.with_name("sweep.jsonl"), {"command_line": " ".join(["vtjax", *command]), "seed": 0, **fields})


def main(arguments: list[str]) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("grid", "fixed", "ablations", "sweep"))
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="of the ablations: how many")
    parser.add_argument(
        "--shard", default="0/1", metavar="I/N", help="each N-th point, from I on: one process per core"
    )
    options = parser.parse_args(arguments)
    if options.what == "sweep":
        sweep()
        return 0
    first, every = parse_shard(options.shard)
    known = {(r["kind"], r.get("name")) for r in (tables.read_jsonl(RECORDS) if RECORDS.exists() else [])}

    def keep(name: str, found: dict[str, Any]) -> None:
        record.write(RECORDS, {"kind": options.what, "name": name, **found})
        print(f"{name}: top-1 {100 * found['top1']:.1f} % at {found['mac_ratio']:.4f} of the MACs", file=sys.stderr)

    if options.what == "fixed":
        for found in fixed():
            keep(f"{found['method']} {found['target']}", found)
        return 0
    executables = Executables()
    points = list(grid() if options.what == "grid" else ablations())[first::every]
    for name, overrides in points:
        if (options.what, name) in known or overrides["seed"] >= options.seeds:
            continue
        label = overrides.pop("", "")
        found = learned(name, overrides, executables)
        keep(name, {**found, **({"ablation": label} if label else {})})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
