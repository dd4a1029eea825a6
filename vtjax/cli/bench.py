# SPDX-License-Identifier: Apache-2.0
"""`vtjax bench`: a config's model beside the dense model it came from, taking turns in one run, on real images."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

from vtjax.cli import config as config_lib
from vtjax.cli.config import Config
from vtjax.errors import InputError


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vtjax bench`."""
    config_lib.arguments(parser, required=False)
    parser.add_argument("--workdir", default="", help="run whose model is the reduced one; else config.init_from's")
    parser.add_argument(
        "--dense",
        default="",
        metavar="MODEL",
        help="the baseline: FILE.py:VARIANT, a workdir, weights or a name",
    )
    parser.add_argument("--batch", default="", metavar="N,N", help="images per call, several one after the other")
    parser.add_argument("--step", default="forward", choices=("forward", "train"), help="what is timed")
    parser.add_argument("--images", type=int, default=64, metavar="N", help="images that the calls go through")
    parser.add_argument("--noise", action="store_true", help="noise in place of the images of config.data")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="turns that each model takes")
    parser.add_argument("--calls", type=int, default=5, metavar="N", help="timed calls per turn")
    parser.add_argument("--price", type=float, metavar="PER_HOUR", help="of this hardware: cost per million images")
    parser.add_argument("--watts", type=float, metavar="W", help="that it draws: energy per million images")
    parser.add_argument("--peak_tflops", type=float, metavar="T", help="that it has: utilisation")


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Measures; see `account.bench.report` for the result, which is that of the last batch size; `batches` holds those
    of all.

    An experiment may define `deploy(config, task, images, dense) -> (reduced, dense)`, two `account.bench.Candidate`s,
    where the reduced model is deployed in another form than it is trained in; `images` is the first batch that will be
    timed, `dense` the `vtjax.Model` of `--dense`, or None. Without it the model runs as it is, beside that of `--dense`
    or itself with its reducers taken out.
    """
    from vtjax.cli import assemble

    if args.workdir:
        assemble.check_workdir(args.workdir, exists=True)
    config = config_lib.of_command(args)
    if args.print_config:
        return 0, config.to_dict()

    from vtjax.account import bench

    rates = bench.Rates(args.price, args.watts, args.peak_tflops)
    for name in ("images", "rounds", "calls"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be 1 or more, found {getattr(args, name)}")
    if args.multihost:
        raise InputError("bench measures one process, expected no --multihost")
    if args.noise and args.step == "train":
        raise InputError("--noise makes images without labels, expected --step=forward, found 'train'")
    sizes = _sizes(args.batch) or [config.batch_size]
    config_lib.override(config, "workdir", "")
    if args.workdir:
        config_lib.override(config, "init_from", args.workdir)

    import jax

    from vtjax.account import record
    from vtjax.parallel import mesh as mesh_lib

    mesh = mesh_lib.make(config.mesh)
    measure = _forward if args.step == "forward" else _train
    with jax.set_mesh(mesh):
        # The first compile of a process also starts the compiler.
        jax.block_until_ready(jax.jit(lambda x: x + 1)(0.0))
        results, facts = measure(config, args, sizes, rates, mesh)
    return 0, {
        **results[-1],
        "batches": results,
        **facts,
        "step": args.step,
        "config": config_lib.source(config),
        "workdir": args.workdir,
        "dtype": config.dtype,
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "hardware": record.hardware(),
        "versions": record.versions(),
    }


def _sizes(text: str) -> list[int]:
    sizes = [part.strip() for part in text.split(",") if part.strip()]
    if not all(size.isdigit() and int(size) for size in sizes):
        raise InputError(f"--batch must be one or several sizes above 0, as in 1,16, found {text!r}")
    return [int(size) for size in sizes]


def _forward(
    config: Config, args: argparse.Namespace, sizes: list[int], rates: Any, mesh: Any
) -> tuple[list[Any], dict[str, Any]]:
    import jax

    from vtjax.account import bench, params
    from vtjax.cli import assemble
    from vtjax.cli.assemble import say
    from vtjax.parallel import mesh as mesh_lib
    from vtjax.parallel import rules
    from vtjax.train.task import first_examples

    count = max(args.images, *sizes)
    count += count % 2  # mixup, of which nothing is seen here, pairs rows
    for leaf, value in (("accumulate", 1), ("batch_size", min(count, config.batch_size))):
        config_lib.override(config, leaf, value)
    if args.noise:
        task = assemble.task(config)
        rows = _noise(task.spec, count)
    else:
        try:
            task, data = assemble.assemble(config)
        except InputError:
            _check_data(config)
            raise
        rows = first_examples(data, "eval", count)
    baseline = _load(args.dense, config) if args.dense else None
    make = getattr(assemble.experiment(config.experiment), "deploy", _as_it_is)
    results = []
    for size in sizes:
        host = bench.batches(rows, size)
        placed_first = mesh_lib.place(host[0], mesh, size, task.frames)
        first = placed_first.get("image", placed_first)  # rows of questions have more than an image
        pair = dict(zip(bench.SIDES, make(config, task, first, baseline), strict=True))
        if args.noise and any(callable(side.macs) for side in pair.values()):
            raise InputError("what this model costs depends on the images, expected real ones, found --noise")
        ready = {}
        for name in bench.SIDES:
            say(f"compiling the {name} model ({pair[name].name}), batch {size} ...")
            peak = bench.Peak(mesh.devices.flat[0])
            here = pair[name].params
            placed = jax.tree.map(mesh_lib.put, here, rules.shardings(here, mesh))
            batches = [mesh_lib.place(batch, mesh, size, task.frames) for batch in host]
            ready[name] = bench.forward(pair[name], placed, batches, peak)
        counts = {name: params.count(side.params) for name, side in pair.items()}
        results.append(_report(args, ready, size, params=counts, rates=rates))
    used = {"images": len(next(iter(rows.values()))), "images_from": f"{config.data.name}:{config.data.eval_split}"}
    return results, {**used, "images_from": "noise"} if args.noise else used


def _train(
    config: Config, args: argparse.Namespace, sizes: list[int], rates: Any, mesh: Any
) -> tuple[list[Any], dict[str, Any]]:
    import numpy as np

    from vtjax.account import bench, flops, params
    from vtjax.cli import assemble
    from vtjax.cli.assemble import say
    from vtjax.parallel import mesh as mesh_lib
    from vtjax.train.program import Program
    from vtjax.train.task import closing

    results = []
    for size in sizes:
        config_lib.override(config, "batch_size", size)
        task, data = assemble.assemble(config)
        sides = {"reduced": (config, task), "dense": (config, task)}
        if args.dense:
            other = _config_of(args.dense, config)
            sides["dense"] = other, assemble.task(other)
            _check_inputs(task.spec, sides["dense"][1].spec)
        elif bench.undone(task.spec).blocks != task.spec.blocks:
            raise InputError("a training step that reduces tokens needs --dense=FILE.py:VARIANT or a workdir beside it")
        stream = data.train(0)
        with closing(stream):
            host = list(itertools.islice(stream, max(1, args.images // size)))
        ready, counts = {}, {}
        for name, (its_config, its_task) in sides.items():
            say(f"compiling the training step of the {name} model ({_name(its_config)}), batch {size} ...")
            peak = bench.Peak(mesh.devices.flat[0])
            program = Program(its_task, its_config, mesh)
            state, frozen = program.init()
            stop = mesh_lib.put(np.zeros(mesh.size, np.int32), mesh_lib.device_sharding(mesh))
            # The count stays at 0: later updates are computed and masked, and the state that is timed does not wander.
            knobs, key, step = program.knobs(), program.key, np.int32(0)
            rest = [
                (frozen, knobs, mesh_lib.place(batch, mesh, size, its_task.frames), key, step, stop) for batch in host
            ]
            macs = [flops.macs(its_task.spec)] * len(rest)
            ready[name] = bench.compiled(program.step, state, rest, macs, peak, carry=True)
            counts[name] = params.count(program.abstract.params)
        results.append(_report(args, ready, size, params=counts, rates=rates, training=True))
    return results, {"images_from": f"{config.data.name}:{config.data.train_split}"}


def _as_it_is(config: Config, task: Any, images: Any, dense: Any) -> tuple[Any, Any]:
    """Both sides of a task that has no other form to be deployed in.

    Raises:
      InputError: the model before the surgery is not known, or takes other images.
    """
    import jax
    import jax.numpy as jnp

    from vtjax.account import bench, flops
    from vtjax.models import build
    from vtjax.parallel import rules
    from vtjax.spec import is_backbone

    options = {name: config.model[name] for name in ("scan", "remat", "attention") if name in config.model}

    def candidate(name: str, spec: Any, params: Any) -> Any:
        model = build(spec, dtype=jnp.dtype(config.dtype), constrain=rules.constrain, **options)
        return bench.Candidate(name, lambda p, x: model.apply(p, x)[0], params, flops.macs(spec))

    if any(block.reduce is not None for block in task.spec.blocks):
        raise InputError(f"experiment {config.experiment!r} reduces tokens, so it must define deploy(), found none")
    params, _, _ = task.init(jax.random.key(config.seed))
    reduced = candidate(_name(config), task.spec, params)
    if dense is not None:
        _check_inputs(task.spec, dense.spec)
        return reduced, candidate("the model of --dense", dense.spec, dense.params)
    before = bench.undone(task.spec)
    kept = {name: tree for name, tree in params.items() if is_backbone(name)}
    return reduced, candidate("itself", before, kept)


def _name(config: Config) -> str:
    return config.init_from or config_lib.source(config) or "the model of the config"


def _check_inputs(reduced: Any, dense: Any) -> None:
    here, there = reduced.image_size, dense.image_size
    if here != there:
        raise InputError(f"--dense must take images of {here}, as the reduced model does, found {there}")


def _config_of(text: str, config: Config) -> Config:
    """The config of `--dense`, run as `config` is: in the same type, batch and mesh.

    Raises:
      InputError: neither a config file nor a workdir.
    """
    from vtjax.parallel import mesh as mesh_lib

    if text.partition(":")[0].endswith(".py"):
        found = config_lib.load_config(text)
    else:
        found = config_lib.of_workdir(text, {"init_from": text, "workdir": ""})
    for leaf in ("dtype", "batch_size", "accumulate", *(f"mesh.{axis}" for axis in mesh_lib.AXES)):
        config_lib.override(found, leaf, dict(config_lib.flatten(config))[leaf])
    return found


def _load(text: str, config: Config) -> Any:
    """The `vtjax.Model` of `--dense`."""
    import jax
    import jax.numpy as jnp

    import vtjax
    from vtjax.cli import assemble
    from vtjax.models import build

    if not text.partition(":")[0].endswith(".py"):
        return vtjax.load(text)
    other = _config_of(text, config)
    task = assemble.task(other)
    params, _, _ = task.init(jax.random.key(other.seed))
    return vtjax.Model(task.spec, params, build(task.spec, dtype=jnp.dtype(config.dtype)).apply)


def _check_data(config: Config) -> None:
    """Raises `InputError` with the way out, where it is the data that are missing."""
    from vtjax.cli import assemble

    spec = assemble.task(config).spec
    try:
        assemble.image_data(config, spec)
    except InputError as error:
        raise InputError(f"{error} (or measure on noise: --noise)") from None


def _noise(spec: Any, count: int) -> dict[str, Any]:
    import numpy as np

    shape = (count, *spec.image_size, spec.channels)
    return {"image": np.random.default_rng(0).standard_normal(shape, np.float32)}


def _report(args: argparse.Namespace, ready: Any, size: int, **options: Any) -> dict[str, Any]:
    from vtjax.account import bench
    from vtjax.cli.assemble import say

    progress = _progress(2 * (2 + args.rounds * (2 + args.calls)))
    result = bench.report(ready, size, rounds=args.rounds, calls=args.calls, progress=progress, **options)
    for line in _table(result):
        say(line)
    if (result["other_cores"] or 0) > 0.5:
        say(f"other processes kept {result['other_cores']:.1f} cores busy: these times are no measurement")
    return result


def _progress(total: int) -> Callable[[Any], Any]:
    """Says every few seconds how many of `total` calls are done, over all that it wraps."""
    import time

    from vtjax.cli.assemble import say

    done, last = 0, time.monotonic()

    def watched(measure: Any) -> Any:
        def call(calls: int) -> Any:
            nonlocal done, last
            seconds = measure(calls)
            done += calls
            if time.monotonic() - last > 5:
                last = time.monotonic()
                say(f"timed {done} of {total} calls")
            return seconds

        return call

    return watched


def _table(result: dict[str, Any]) -> list[str]:
    from vtjax.viz import tables

    quantities = (
        ("median, ms", "median_s", 1e3),
        ("minimum, ms", "min_s", 1e3),
        ("images/s", "images_per_s", 1.0),
        ("MACs per image, G", "macs", 1e-9),
        ("the program's, all branches, G", "macs_walked", 1e-9),
        ("parameters, M", "params", 1e-6),
        ("memory, MiB", "memory_bytes", 2**-20),
        ("images that overflowed, %", "overflow_rate", 100.0),
        ("compile, s", "compile_s", 1.0),
        ("model TFLOP/s", "model_tflops", 1.0),
        ("utilisation", "mfu", 1.0),
        ("cost per million images", "cost_per_million", 1.0),
        ("kWh per million images", "kwh_per_million", 1.0),
    )
    sides = [result[side] for side in ("dense", "reduced")]
    rows = [
        (name, *(None if side.get(key) is None else float(scale * side[key]) for side in sides))
        for name, key, scale in quantities
        if any(side.get(key) is not None for side in sides)
    ]
    spread = f"{result['time_ratio_p10']:.3g} to {result['time_ratio_p90']:.3g}"
    work = "the work is not known"
    if result["mac_ratio"] == 1:
        work = f"the same work: realised {result['realised']:.3g}"
    elif result["mac_ratio"] is not None:
        work = f"{result['mac_ratio']:.3g} times less work: realised {result['realised']:.3g}"
    return [
        *tables.text((f"batch {result['batch']}", "dense", "reduced"), rows).splitlines(),
        f"{result['time_ratio']:.3g} times as fast ({spread} round by round) with {work}",
    ]
