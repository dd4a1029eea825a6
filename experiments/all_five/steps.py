# SPDX-License-Identifier: Apache-2.0
"""The chain of `configs/all_five.py:video`, and what each step changes.

    python -m experiments.all_five.steps train     the six runs, one after the other, in runs/all_five; resumes
    python -m experiments.all_five.steps control   the dense model, trained on for as many steps; and the last step with
                                                   layers that chance has chosen
    python -m experiments.all_five.steps moved     bytes between eight devices, and what a device holds (compiled only)
    python -m experiments.all_five.steps time      nothing else may use the cores

Records go to results/steps.jsonl. `train` writes one per run: accuracy on the test videos, MACs per question of live
tokens, and parameters. `moved` compiles the forward pass for eight devices that
hold one frame each, once as LV-XAttn's cost model would have it and once with keys and values that go round
(`ring_kv`). `time` lets all models take turns on one batch: the compiled program, in which dead tokens of LTMP and DPN
are masked, so that only DGMR and DAS save time; the same model without them (`methods.crossed_deploy`), its rooms
calibrated on other batches; and one whose tower drops its mean counts whatever it sees, which is another model.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECORDS = HERE / "results" / "steps.jsonl"
CONFIG = "configs/all_five.py"
DEVICES = 8
CALIBRATION = 8  # batches
WHOLE = ("dgmr", "ltmp", "dpn")  # steps in which all weights are trained


def config_of(options: argparse.Namespace, add: str, more: dict[str, Any] | None = None) -> Any:
    """The config of a step's run."""
    from experiments.all_five.main import STEPS
    from vtjax.cli import config as config_lib

    before = STEPS[STEPS.index(add) - 1] if add != "base" else ""
    given = {"init_from": workdir(options, before) if before else "", "seed": str(options.seed)}
    given |= dict(pair.split("=", 1) for pair in options.leaf)
    given |= {name: str(value) for name, value in (more or {}).items()}
    config = config_lib.load_config(CONFIG, f"{options.variant},add={add}", given)
    config_lib.override(config, "workdir", workdir(options, add))
    return config


def workdir(options: argparse.Namespace, add: str) -> str:
    """Where a run lies."""
    return f"{options.runs}/{add}_{options.seed}"


def control(options: argparse.Namespace) -> Any:
    """The config of the dense model, trained on for the steps of the three in which all weights are."""
    from vtjax.cli import config as config_lib

    first = config_of(options, WHOLE[0])
    steps = sum(config_of(options, add).steps for add in WHOLE)
    leaves = {"init_from": workdir(options, "base"), "data.pack": first.data.pack, "optim.lr": first.optim.lr}
    leaves |= {"seed": options.seed, "optim.warmup": steps // 20, "eval_every": 0}
    config = config_lib.load_config(
        CONFIG, f"{options.variant},steps={steps}", {name: str(value) for name, value in leaves.items()}
    )
    config_lib.override(config, "workdir", workdir(options, "control"))
    return config


def by_chance(options: argparse.Namespace) -> Any:
    """The config of the last step, with layers that chance has chosen."""
    from vtjax.cli import config as config_lib

    config = config_of(options, "das", {"das.remove": "random"})
    config_lib.override(config, "workdir", workdir(options, "random"))
    return config


def train(config: Any) -> dict[str, Any]:
    """Trains one step, or finds it done."""
    from experiments.das import deployed
    from vtjax.account import params as parameters
    from vtjax.cli import assemble
    from vtjax.cli import config as config_lib
    from vtjax.cli import eval as evaluation
    from vtjax.train import checkpoint, loop

    task, data = assemble.assemble(config)
    result = loop.train(task, data, config, config.workdir)
    if config.data.pack != 1:
        # The others read one question per row: work is counted for that.
        alone = copy.deepcopy(config)
        config_lib.override(alone, "data.pack", 1)
        config_lib.override(alone, "workdir", "")
        result |= evaluation.measure(alone, config.workdir)
    kept = ("params_sha256", "loss", "count", "tower_macs", "decoder_macs", "visual", "methods")
    found = {name: value for name, value in result.items() if name in kept or name.startswith("top1")}
    spec, params = checkpoint.load_params(config.workdir)
    found["params"] = parameters.count(params)
    skips = list(deployed.gone(spec.decoder))
    extra = checkpoint.load_extra(config.workdir)
    if "preference" in extra:
        found["preference"] = extra["preference"].tolist()
    return {**found, "skips": skips, "steps": config.steps, "batch_size": config.batch_size, "lr": config.optim.lr}


def forward(options: argparse.Namespace, add: str, over: int, **attend: str) -> Any:
    """`(run, parameters, batch, mesh)`: the forward pass of a trained step on `over` devices; not jitted."""
    import jax

    from experiments.lvxattn import main as lvxattn
    from experiments.vlm import main as vlm
    from vtjax import methods
    from vtjax.cli import assemble
    from vtjax.parallel import mesh as mesh_lib
    from vtjax.train import checkpoint

    more = {"mesh.context": over, "mesh.data": 1, "batch_size": options.batch, "data.pack": 1}
    config = config_of(options, add, {**more, **{f"attend.{name}": value for name, value in attend.items()}})
    _, data = assemble.assemble(config)
    spec, params = checkpoint.load_params(config.workdir)
    mesh = mesh_lib.make(config.mesh, jax.devices()[:over])
    model = methods.build(spec, **lvxattn.options(config))

    def run(params: Any, batch: Any) -> Any:
        return vlm.asked(model, params, batch).loss

    with jax.set_mesh(mesh):
        placed = mesh_lib.place(next(iter(data.eval())), mesh, options.batch, lvxattn.OVER)
        params = jax.tree.map(lambda x: mesh_lib.put(x, mesh_lib.replicated(mesh)), params)
    return run, params, placed, mesh


def moved(options: argparse.Namespace, add: str) -> dict[str, Any]:
    """Bytes that one device moves for a batch, and what it holds."""
    import jax

    from vtjax.account import aot

    found: dict[str, Any] = {"devices": DEVICES, "batch": options.batch}
    for strategy in ("auto", "ring_kv"):
        run, params, placed, mesh = forward(options, add, DEVICES, strategy=strategy)
        with jax.set_mesh(mesh):
            compiled = jax.jit(run).lower(params, placed).compile()
        each = aot.collectives(str(compiled.as_text()))
        plan: Any = compiled.memory_analysis()
        held = plan.argument_size_in_bytes + plan.temp_size_in_bytes
        found[strategy] = {"moved_bytes": sum(kind["bytes"] for kind in each.values()), "device_bytes": int(held)}
        found[strategy]["collectives"] = each
    return found


def times(options: argparse.Namespace, steps: tuple[str, ...]) -> dict[str, Any]:
    """Seconds of the forward pass over one batch, all models in turns on one device."""
    import jax

    from vtjax.account import timing

    measures = {}
    for add in steps:
        for name, run in programs(options, add).items():
            measures[name] = timing.timer(run)
    found = timing.compare(measures, rounds=options.rounds, calls=2, warmup=1)
    return {
        "batch": options.batch,
        "time_ratio": {name: found.ratio("base", name) for name in measures},
        "spread": {name: found.ratio_range("base", name) for name in measures},
        "timing": found.summary(),
        "devices": len(jax.devices()),
    }


def programs(options: argparse.Namespace, add: str) -> dict[str, Any]:
    """The step's compiled program, and where its tower reduces those whose tokens are gone."""
    import jax
    import numpy as np

    from experiments.all_five.main import plain
    from experiments.lvxattn import main as lvxattn
    from experiments.vlm import main as vlm
    from vtjax import methods
    from vtjax.methods import ltmp, ltmp_deploy
    from vtjax.train import checkpoint

    config = config_of(options, add, {"batch_size": options.batch})
    run, params, placed, _ = forward(options, add, 1)
    compiled = jax.jit(run)
    made = {add: lambda: compiled(params, placed)}
    spec, _ = checkpoint.load_params(config.workdir)
    if ltmp.reducers(plain(spec.tower)):
        short = jax.jit(gone(config, spec, params))
        made[f"{add}, tokens gone"] = lambda: short(params, placed)
        model = methods.build(spec, **lvxattn.options(config))
        layers = jax.jit(lambda p, b: vlm.asked(model, p, b).aux["tower"])(params, placed)
        counts = [
            np.stack([np.asarray(layer["decisions"][name]) for layer in layers], 1) for name in ("merged", "pruned")
        ]
        fixed = spec.edit(tower=ltmp_deploy.fixed(spec.tower, *counts))
        shorter = methods.build(fixed, **lvxattn.options(config))
        run_fixed = jax.jit(lambda p, b: vlm.asked(shorter, p, b).loss)
        made[f"{add}, counts fixed"] = lambda: run_fixed(params, placed)
    return made


def gone(config: Any, spec: Any, params: Any) -> Any:
    """`(params, batch) -> the loss of every question`, of the model without the tokens that it drops.

    Raises:
      AssertionError: it says something else than the masked model to a batch that its rooms were not made for.
    """
    import jax
    import numpy as np

    from experiments.lvxattn import main as lvxattn
    from experiments.vlm import main as vlm
    from vtjax import methods
    from vtjax.cli import assemble
    from vtjax.methods import crossed_deploy
    from vtjax.parallel import mesh as mesh_lib

    mesh = mesh_lib.make(config.mesh)
    _, data = assemble.assemble(config)
    model = methods.build(spec, **vlm.options(config))
    drawn = [data.draw("train", index) for index in range(CALIBRATION)]
    with jax.set_mesh(mesh):
        rooms = crossed_deploy.calibrate(model, params, np.concatenate([batch["images"] for batch in drawn]))
        deployed: Any = crossed_deploy.Crossed(model, rooms)
        other = mesh_lib.place(data.draw("eval", 0), mesh, config.batch_size, lvxattn.OVER)
        short = jax.jit(lambda p, b: vlm.asked(deployed, p, b))(params, other)
        masked = jax.jit(lambda p, b: vlm.asked(model, p, b))(params, other)
    np.testing.assert_allclose(short.loss, masked.loss, rtol=1e-3, atol=1e-4)
    say = {name: np.asarray(short.aux[name]).tolist() for name in ("read", "overflow")}
    print(f"slots {rooms.tower} of {spec.tower.tokens} in the tower; {say}", file=sys.stderr)
    return lambda p, b: vlm.asked(deployed, p, b).loss


def wrong(options: argparse.Namespace, known: tuple[str, ...]) -> str:
    """A line about an `--again` that cannot be had, or nothing."""
    for add in filter(None, options.again.split(",")):
        if add not in known:
            return f"--again must be of {', '.join(known)} for {options.what!r}, found {add!r}"
        if options.what in ("train", "control") and Path(folder := workdir(options, add), "result.json").exists():
            return (
                f"--again={add} needs a folder without a finished run, whose result would be recorded as new: {folder}"
            )
    return ""


def main(arguments: list[str]) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "control", "moved", "time"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=4, help="videos of a timed or compiled batch")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--variant", default="video")
    parser.add_argument("--runs", default="runs/all_five", help="folder of the runs")
    parser.add_argument("--leaf", action="append", default=[], help="LEAF=VALUE, for runs at another size")
    parser.add_argument("--again", default="", help="STEP,STEP: recorded, to be done anew; the newest counts")
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args(arguments)
    if options.what == "moved":
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    from experiments.all_five.main import STEPS
    from vtjax.account import record
    from vtjax.viz import tables

    rows = tables.read_jsonl(options.out) if options.out.exists() else []
    known = {(r["kind"], r.get("add"), r["seed"]) for r in rows}
    built = tuple(add for add in STEPS if add != "search")
    wanted = {"train": STEPS, "control": ("random", "control"), "moved": built, "time": ("all",)}[options.what]
    if line := wrong(options, wanted):
        print(line, file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)

    kind = "train" if options.what == "control" else options.what

    def write(add: str, found: dict[str, Any]) -> None:
        record.write(options.out, {"kind": kind, "add": add, "seed": options.seed, **found})
        print(f"{options.what} {add}, seed {options.seed}: recorded", file=sys.stderr)

    if options.what == "time":
        write("all", times(options, built))
        return 0
    for add in wanted:
        if (kind, add, options.seed) in known and add not in options.again.split(","):
            continue
        print(f"{options.what} {add}, seed {options.seed} ...", file=sys.stderr)
        if kind == "moved":
            write(add, moved(options, add))
        else:
            made = {"control": control, "random": by_chance}.get(add)
            write(add, train(config_of(options, add) if made is None else made(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
