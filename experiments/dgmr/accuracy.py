# SPDX-License-Identifier: Apache-2.0
"""What pruning costs and distillation brings back, on the evaluation half of the photographs and on the digits.

    python -m experiments.dgmr.accuracy grid         r = 3, 2, 1 x three criteria x 3 seeds, and the dense models
    python -m experiments.dgmr.accuracy cost         the teacher in every step against remembered; 10 against 20 epochs
    python -m experiments.dgmr.accuracy allocation   counts allocated over the blocks, at the MACs of the grid
    python -m experiments.dgmr.accuracy refit        output weights fitted anew before distillation, on the same images
    python -m experiments.dgmr.accuracy int8         models of the grid with 8-bit weights
    python -m experiments.dgmr.accuracy pruned       before any distillation: criteria, allocations, fitted or copied

`cost` counts the seconds of a whole run, compilation included. Every record in results/accuracy.jsonl holds which
images were right, so that differences are paired; and the same of the pruned model before distillation. What was
recorded is not run again; runs lie in runs/dgmr and resume. `--model=digits` needs the run of `make demo`;
`--shard=i/n` takes every n-th point.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vtjax.account import flops, params, record
from vtjax.cli import assemble
from vtjax.cli import config as config_lib
from vtjax.cli.sweep import parse_shard
from vtjax.errors import InputError
from vtjax.methods import dgmr
from vtjax.models.vit import ViT
from vtjax.ops import losses, quantize
from vtjax.spec import ViTSpec
from vtjax.train import checkpoint, loop
from vtjax.train.executables import Executables
from vtjax.train.task import Data, closing
from vtjax.viz import tables

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "experiments" / "dgmr" / "results" / "accuracy.jsonl"
MODELS, RATIOS, SEEDS = ("ti16", "digits"), (3.0, 2.0, 1.0), (0, 1, 2)
ALLOCATIONS = ("spectrum", "sensitivity")
EXAMPLES = {"ti16": 500, "digits": 1437}

Point = tuple[str, str, dict[str, Any]]
"""Name, `VARIANT,option=value`, overrides."""


def grid(model: str) -> Iterator[Point]:
    """What the paper compares, after distillation; seed by seed, so that a part of it is a smaller grid."""
    for seed, ratio, method in itertools.product(SEEDS, RATIOS, dgmr.METHODS[:-1]):
        name = f"{model} {method} {ratio} {seed}"
        yield name, f"{model},ratio={ratio}", {"dgmr.method": method, "seed": seed}


def cost(model: str) -> Iterator[Point]:
    """How much distillation is needed, and what the teacher takes of it; without augmentation, as features can only be
    kept then, and with it."""
    plain: dict[str, Any] = {"data.augment": "none"}
    for epochs, (how, overrides) in itertools.product(
        (10, 20), {"augmented": {}, "plain": plain, "plain, cached": {**plain, "dgmr.cache": True}}.items()
    ):
        config = config_lib.load_config("configs/dgmr.py", model)
        steps = epochs * (EXAMPLES[model] // config.batch_size)
        yield f"{model} {how} {epochs}", f"{model},ratio=2.0,steps={steps}", {"seed": 0, **overrides}


def allocation(model: str) -> Iterator[Point]:
    """The total of the grid's points, where it seems to be needed most."""
    for seed, ratio, how in itertools.product(SEEDS, (2.0, 1.0), ALLOCATIONS):
        yield f"{model} {how} {ratio} {seed}", f"{model},ratio={ratio}", {"dgmr.allocation": how, "seed": seed}


def refit(model: str) -> Iterator[Point]:
    """The grid, with output weights that were fitted on the training images before distillation."""
    for seed, ratio, method in itertools.product(SEEDS, RATIOS, dgmr.METHODS[:-1]):
        overrides = {"dgmr.method": method, "dgmr.refit": min(EXAMPLES[model], 500), "seed": seed}
        yield f"{model} {method} {ratio} {seed} refit", f"{model},ratio={ratio}", overrides


def int8(model: str) -> Iterator[Point]:
    """The models of the grid's first seed."""
    for ratio in RATIOS:
        name, variant, overrides = next(point for point in grid(model) if f" {ratio} " in point[0])
        yield name, variant, overrides


def pruned(model: str) -> Iterator[Point]:
    """Every way to prune, with output weights copied and fitted; nothing is trained."""
    ways = [{"dgmr.method": method} for method in dgmr.METHODS[:-1]] + [{"dgmr.allocation": how} for how in ALLOCATIONS]
    for ratio, way, count in itertools.product(RATIOS, ways, (0, EXAMPLES[model])):
        name = f"{model} {next(iter(way.values()))} {ratio} {'fitted' if count else 'copied'}"
        yield name, f"{model},ratio={ratio}", {**way, "dgmr.refit": count, "seed": 0}


POINTS = {"grid": grid, "cost": cost, "allocation": allocation, "refit": refit, "int8": int8, "pruned": pruned}


def folder(what: str, name: str) -> str:
    """Where the run of a point lies; what the grid has trained is not trained again."""
    kind = "grid" if what == "int8" else what
    return f"runs/dgmr/{kind}/" + name.replace(" ", "_").replace(",", "")


def trained(what: str, point: Point, executables: Executables) -> dict[str, Any]:
    """Prunes and distils one point (or finds it done), and measures it before and after."""
    name, variant, overrides = point
    config = config_lib.load_config("configs/dgmr.py", variant, {leaf: str(value) for leaf, value in overrides.items()})
    task, data = assemble.assemble(config)
    start, frozen, _ = task.init(jax.random.key(config.seed))
    teacher = dgmr.original(task.spec), frozen["teacher"]
    before = measured(task.spec, start, teacher, data, config.dgmr.point)
    workdir = folder(what, name)
    config_lib.override(config, "workdir", workdir)
    begun = checkpoint.begun(workdir) is not None
    if begun and what == "cost":
        raise InputError(f"a run that is timed must be whole, found {workdir} begun: remove it")
    if begun:
        task, data = assemble.assemble(config)
    began = time.monotonic()
    # What is timed compiles for itself; elsewhere equal programs are compiled once.
    result = loop.train(task, data, config, workdir, Executables() if what == "cost" else executables)
    seconds = time.monotonic() - began
    spec, values = checkpoint.load_params(workdir)
    found = {
        "model": variant.partition(",")[0],
        "method": config.dgmr.method,
        "ratio": config.dgmr.ratio,
        "allocation": config.dgmr.allocation,
        "refit": config.dgmr.refit,
        "seed": config.seed,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "lr": config.optim.lr,
        "cache": config.dgmr.cache,
        "augment": config.data.augment,
        "seconds": None if begun else round(seconds, 1),
        "images_per_s": result.get("images_per_s"),
        "keep": task.summary["keep"],
        "params": task.summary["params"],
        "macs_per_image": task.summary["macs_per_image"],
        "mac_ratio": task.summary["mac_ratio"],
        "params_sha256": result["params_sha256"],
        **{f"before_{k}": v for k, v in before.items()},
        **measured(spec, values, teacher, data, config.dgmr.point),
    }
    return found | (eight(spec, values, teacher, data, config.dgmr.point) if what == "int8" else {})


def before_training(point: Point) -> dict[str, Any]:
    """Prunes one point, and measures it."""
    _, variant, overrides = point
    config = config_lib.load_config("configs/dgmr.py", variant, {leaf: str(value) for leaf, value in overrides.items()})
    task, data = assemble.assemble(config)
    start, frozen, _ = task.init(jax.random.key(config.seed))
    teacher = dgmr.original(task.spec), frozen["teacher"]
    settings = {leaf: config.dgmr[leaf] for leaf in ("method", "ratio", "allocation", "refit")}
    return {
        **{"model": variant.partition(",")[0], **settings, "seed": config.seed, "init_from": config.init_from},
        **{name: task.summary[name] for name in ("keep", "params", "macs_per_image", "mac_ratio")},
        **measured(task.spec, start, teacher, data, config.dgmr.point),
    }


def dense(model: str, *, int8: bool) -> dict[str, Any]:
    """The model before pruning; with `int8` also with 8-bit weights."""
    config = config_lib.load_config("configs/dgmr.py", model)
    task, data = assemble.assemble(config)
    _, frozen, _ = task.init(jax.random.key(0))
    spec, values = dgmr.original(task.spec), frozen["teacher"]
    assert spec is not None
    both = (spec, values)
    found = {
        **{"model": model, "method": "dense", "seed": 0, "params": params.count(values)},
        **{"macs_per_image": flops.macs(spec), "mac_ratio": 1.0},
        **measured(spec, values, both, data, config.dgmr.point),
    }
    return found | (eight(spec, values, both, data, config.dgmr.point) if int8 else {})


def eight(spec: ViTSpec, values: Any, teacher: tuple[ViTSpec | None, Any], data: Data, point: str) -> dict[str, Any]:
    """`measured` with 8-bit weights, and the sizes of both."""
    small = quantize.quantize_kernels(values)
    found = measured(spec, quantize.dequantize_kernels(small), teacher, data, point)
    sizes = {"bytes": quantize.size_bytes(values), "int8_bytes": quantize.size_bytes(small)}
    return {f"int8_{name}": value for name, value in found.items()} | sizes


def measured(spec: ViTSpec, values: Any, teacher: tuple[ViTSpec | None, Any], data: Data, point: str) -> dict[str, Any]:
    """Which images of the evaluation split are right, and how far the features are from the teacher's."""
    there = teacher[0]
    assert there is not None

    @jax.jit
    def run(values: Any, known: Any, images: Any, labels: Any) -> Any:
        y, aux = ViT(spec).apply(values, images)
        told, its = ViT(there).apply(known, images)
        features = dgmr.features(spec, y, aux, point), dgmr.features(there, told, its, point)
        same = y.argmax(-1) == told.argmax(-1)
        return losses.top_k_correct(y, labels, 1), same, *dgmr.distances(*features)

    values, known = jax.tree.map(jnp.asarray, (values, teacher[1]))
    parts = []
    batches = data.eval("eval")
    with closing(batches):
        for batch in batches:
            valid = batch["valid"]
            found = jax.device_get(run(values, known, batch["image"], batch["label"]))
            parts.append([np.asarray(each)[valid] for each in found])
    correct, same, whole, patch = (np.concatenate(each) for each in zip(*parts, strict=True))
    return {
        "top1": float(correct.mean()),
        "agreement": float(same.mean()),
        "class_mse": float(whole.mean()),
        "patch_mse": float(patch.mean()),
        "count": len(correct),
        "correct": "".join(map(str, correct.astype(int))),
    }


def main(arguments: list[str]) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(POINTS))
    parser.add_argument("--model", choices=MODELS, action="append", help="one of them; else both")
    parser.add_argument("--only", default="", help="points whose name contains this")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th point, from I on")
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args(arguments)
    part, parts = parse_shard(options.shard)
    known = {(r["kind"], r["name"]) for r in (tables.read_jsonl(options.out) if options.out.exists() else [])}

    def keep(name: str, found: dict[str, Any]) -> None:
        record.write(options.out, {"kind": options.what, "name": name, **found})
        print(
            f"{name}: top-1 {100 * found['top1']:.1f} % at {found['mac_ratio']:.3f} of the MACs"
            + (f", before distillation {100 * found['before_top1']:.1f} %" if "before_top1" in found else ""),
            file=sys.stderr,
        )

    models = options.model or MODELS
    points: list[Point] = [point for model in models for point in POINTS[options.what](model)]
    if options.what in ("grid", "int8"):
        points = [*((f"{model} dense", model, {}) for model in models), *points]
    chosen = [point for point in points if options.only in point[0]]
    executables = Executables()
    for point in chosen[part::parts]:
        name, variant, _ = point
        if (options.what, name) in known:
            continue
        if options.what == "pruned":
            keep(name, before_training(point))
        elif name.endswith(" dense"):
            keep(name, dense(variant, int8=options.what == "int8"))
        else:
            keep(name, trained(options.what, point, executables))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
