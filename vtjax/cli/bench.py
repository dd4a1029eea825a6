# SPDX-License-Identifier: Apache-2.0
"""`vtjax bench`: a reduced model beside its dense baseline, timed in turns in one run, on real images."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any

from vtjax.cli import config as config_lib
from vtjax.errors import InputError


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vtjax bench`."""
    config_lib.arguments(parser)
    parser.add_argument("--workdir", default="", help="run whose model is the reduced one; else config.init_from's")
    parser.add_argument("--dense", default="", metavar="MODEL", help="the baseline: a workdir, weights file or name")
    parser.add_argument("--batch", default="", metavar="N,N", help="images per call, several one after the other")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="turns that each model takes")
    parser.add_argument("--price", type=float, metavar="PER_HOUR", help="of this hardware: cost per million images")
    parser.add_argument("--watts", type=float, help="that this hardware draws: energy per million images")


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Measures the forward pass; see `account.bench.measure` for the result, which is that of the last batch size;
    `batches` holds those of all.

    An experiment may define `deploy(config, task, images, dense) -> (reduced, dense)`, two `account.bench.Candidate`s,
    where the reduced model is deployed in another form than it is trained in; `dense` is the model of `--dense`, or
    None. Without it the model runs as it is, beside that of `--dense` or itself with its reducers taken out.
    """
    for name in ("price", "watts"):
        if (value := getattr(args, name)) is not None and not 0 <= value < math.inf:
            raise InputError(f"--{name} must be 0 or more, found {value}")
    if args.rounds < 1:
        raise InputError(f"--rounds must be 1 or more, found {args.rounds}")
    if args.multihost:
        raise InputError("bench measures one process, expected no --multihost")
    config = config_lib.from_args(args)
    if args.workdir:
        config_lib.override(config, "init_from", args.workdir)
    sizes = _sizes(args.batch) or [config.batch_size]
    config_lib.override(config, "batch_size", max(sizes))
    if args.print_config:
        return 0, config.to_dict()

    import jax
    import numpy as np

    import vtjax
    from vtjax.account import bench
    from vtjax.cli import assemble
    from vtjax.cli.assemble import say
    from vtjax.parallel import mesh as mesh_lib

    dense = vtjax.load(args.dense) if args.dense else None
    task, data = assemble.assemble(config)
    mesh = mesh_lib.make(config.mesh)
    make = getattr(assemble.experiment(config.experiment), "deploy", _as_it_is)
    real = next(iter(data.eval("eval")))
    real = real["image"][real["valid"]]
    results = []
    with jax.set_mesh(mesh):
        for size in sizes:
            repeated = np.resize(real, (size, *real.shape[1:]))  # where the split is smaller than the batch
            images = mesh_lib.place({"image": repeated}, mesh, size)["image"]
            reduced, baseline = (_on(mesh, candidate) for candidate in make(config, task, images, dense))
            say(f"compiling and timing {reduced.name} beside {baseline.name}, batch {size} ...")
            rates = {"price": args.price, "watts": args.watts}
            results.append(bench.measure(reduced, baseline, images, rounds=args.rounds, **rates))
            for line in _table(results[-1]):
                say(line)
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return 0, {**results[-1], "batches": results, "config": config_lib.source(config), "devices": devices}


def _sizes(text: str) -> list[int]:
    sizes = [part.strip() for part in text.split(",") if part.strip()]
    if not all(size.isdigit() and int(size) for size in sizes):
        raise InputError(f"--batch must be one or several sizes above 0, as in 1,16, found {text!r}")
    return [int(size) for size in sizes]


def _as_it_is(config: Any, task: Any, images: Any, dense: Any) -> tuple[Any, Any]:
    import jax
    import jax.numpy as jnp

    from vtjax.account import bench, flops
    from vtjax.models import build

    def candidate(name: str, spec: Any, params: Any) -> Any:
        model = build(spec, dtype=jnp.dtype(config.dtype))
        return bench.Candidate(name, lambda p, x: model.apply(p, x)[0], params, flops.macs(spec))

    params, _, _ = task.init(jax.random.key(config.seed))
    spec = task.spec
    reduced = candidate(config.init_from or "the model of the config", spec, params)
    if dense is not None:
        here, there = spec.image_size, dense.spec.image_size
        if here != there:
            raise InputError(f"--dense must take images of {here}, as the reduced model does, found {there}")
        return reduced, candidate("the model of --dense", dense.spec, dense.params)
    if any(not b.attn or not b.ffn or b.adapter for b in spec.blocks) or len({b.mlp for b in spec.blocks}) > 1:
        raise InputError("blocks of this model were removed or pruned: --dense=MODEL must name the model before")
    plain = spec.edit(blocks=lambda _, block: dataclasses.replace(block, reduce=None))
    return reduced, candidate("itself, dense", plain, params)


def _on(mesh: Any, candidate: Any) -> Any:
    import jax

    from vtjax.parallel import mesh as mesh_lib
    from vtjax.parallel import rules

    placed = jax.tree.map(mesh_lib.put, candidate.params, rules.shardings(candidate.params, mesh))
    return dataclasses.replace(candidate, params=placed)


def _table(result: dict[str, Any]) -> list[str]:
    from vtjax.viz import tables

    quantities = (
        ("median, ms", "median_s", 1e3),
        ("minimum, ms", "min_s", 1e3),
        ("images/s", "images_per_s", 1.0),
        ("MACs per image, G", "macs", 1e-9),
        ("parameters, M", "params", 1e-6),
        ("memory, MiB", "memory_bytes", 2**-20),
        ("compile, s", "compile_s", 1.0),
        ("cost per million images", "cost_per_million", 1.0),
        ("kWh per million images", "kwh_per_million", 1.0),
    )
    sides = ("dense", "reduced")
    rows = [
        (name, *(float(scale * result[side][key]) for side in sides))
        for name, key, scale in quantities
        if key in result["dense"]
    ]
    spread = f"{result['time_ratio_p10']:.3g} to {result['time_ratio_p90']:.3g}"
    return [
        *tables.text(("", *sides), rows).splitlines(),
        f"{result['time_ratio']:.3g} times as fast ({spread} round by round) with {result['mac_ratio']:.3g} times less "
        f"work: realised {result['realised']:.3g}",
    ]
