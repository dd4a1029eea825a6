# SPDX-License-Identifier: Apache-2.0
"""`vtjax aot`: compiles the real step of a config for a TPU topology, on a machine without TPUs."""

from __future__ import annotations

import argparse
import copy
from typing import Any

from vtjax.cli import config as config_lib


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vtjax aot`."""
    config_lib.arguments(parser)
    parser.add_argument("--topology", required=True, help="chips and how they lie: v5e:2x4, v6e:16x16, v5p:8x8x8, ...")
    parser.add_argument("--slices", type=int, default=1, help="so many of these, joined by a data centre network")
    parser.add_argument("--step", default="train", choices=("train", "eval"), help="which program")


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Compiles; the result says whether it fits (`fits`), what it takes and what it sends; the exit code is 0 anyway.

    The data of the config need not be there: only their shapes enter.
    """
    config = config_lib.from_args(args)
    if args.print_config:
        return 0, config.to_dict()

    import math

    import jax

    from vtjax.account import aot, flops
    from vtjax.cli import assemble
    from vtjax.cli.assemble import say
    from vtjax.data import loader
    from vtjax.parallel import mesh as mesh_lib
    from vtjax.spec import ViTSpec
    from vtjax.train.program import Program
    from vtjax.train.state import flatten, split

    jax.config.update("jax_platforms", "cpu")  # a TPU VM's own chips may be at work
    jax.config.update("jax_enable_compilation_cache", False)  # seconds are to be those of a compile
    devices = aot.topology(args.topology, args.slices)
    mesh = mesh_lib.make(config.mesh, devices)
    task = assemble.task(config)
    program = Program(task, config, mesh)
    training = args.step == "train"
    module = assemble.experiment(config.experiment)
    if hasattr(module, "batch_shapes"):
        shapes = module.batch_shapes(resolved(config, mesh), task, training)
    else:
        shapes = loader.batch_shapes(
            config.data, batch_size=config.batch_size, image_size=task.spec.image_size, training=training
        )
    abstract = program.abstract_arguments(args.step, shapes)
    step = program.step if training else program.evaluate_step
    count = f"{args.slices} x " if args.slices > 1 else ""
    say(f"compiling the {args.step} step for {count}{args.topology} ({len(devices)} devices) ...")
    with jax.set_mesh(mesh):
        counts = flops.walk(step, *abstract, platform="tpu")
        report = aot.compile_step(step, abstract, devices)

    def on_a_device(tree: Any) -> int:
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in flatten(tree).values())

    estimated = {}
    # The hand estimate is one of a ViT's step.
    if isinstance(task.spec, ViTSpec):
        trained, _ = split(program.abstract.params, program.groups)
        blocks = {name: x for name, x in program.abstract.params.items() if name.startswith("block_")}
        width_bytes = 2 if config.dtype == "bfloat16" else 4
        estimate = aot.temporaries(
            task.spec,
            rows=config.batch_size // mesh_lib.batch_shards(mesh) // (config.accumulate if training else 1),
            training=training,
            remat=config.model.remat,
            width_bytes=width_bytes,
            trained_bytes=on_a_device(trained),
            stacked_bytes=on_a_device(blocks) * width_bytes // 4 if config.model.scan else 0,
            tensor=mesh.shape["tensor"],
        )
        estimated["temp_estimate_bytes"] = estimate
        if "temp_bytes" in report:
            estimated["temp_ratio"] = round(report["temp_bytes"] / estimate, 2)
    result = {
        **report,
        **estimated,
        "flops": counts.flops,
        "flops_per_device": counts.flops // len(devices),
        "params": sum(math.prod(x.shape) for x in flatten(program.abstract.params).values()),
        "config": config_lib.source(config),
        "batch_size": config.batch_size,
        "step": args.step,
        "topology": args.topology,
        "slices": args.slices,
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "hbm_chip_gb": aot.CHIPS[devices[0].device_kind].hbm_gb,
        "mesh": dict(mesh.shape),
    }
    for line in _table(result):
        say(line)
    return 0, result


def resolved(config: Any, mesh: Any) -> Any:
    """The config with the mesh's sizes: none of them is "all the rest" any more."""
    known = copy.deepcopy(config)
    for axis, size in mesh.shape.items():
        known.mesh[axis] = size
    return known


def _table(result: dict[str, Any]) -> list[str]:
    def gib(size: int) -> str:
        return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"

    from vtjax.viz import tables

    verdict = "fits" if result["fits"] else "does NOT fit"
    rows = [
        ("memory per device", f"{gib(result['hbm_bytes_per_device'])} of {gib(result['hbm_limit'])}: {verdict}"),
        ("FLOPs of a step", f"{result['flops']:.4g}, {result['flops_per_device']:.4g} per device"),
        ("compiled in", f"{result['compile_s']} s"),
    ]
    if "temp_bytes" in result:
        beside = ""
        if "temp_ratio" in result:
            beside = f", {result['temp_ratio']} x the hand estimate of {gib(result['temp_estimate_bytes'])}"
        rows.insert(1, ("of it temporary", f"{gib(result['temp_bytes'])}{beside}"))
        for kind, entry in result["collectives"].items():
            rows.append((kind, f"{entry['count']} per step, {entry['bytes'] / 2**20:.1f} MiB per device"))
    return tables.text(("", ""), rows).splitlines()
