# SPDX-License-Identifier: Apache-2.0
"""`vtjax eval`: measures a checkpoint of a workdir, or the weights that a config names. Every example counts once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from vtjax.cli import config as config_lib
from vtjax.errors import InputError


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vtjax eval`."""
    config_lib.arguments(parser, required=False)
    parser.add_argument("--workdir", default="", help="run to evaluate; without --config, by its own config")
    parser.add_argument("--which", default="last", choices=("last", "best"), help="checkpoint of the workdir")
    parser.add_argument("--decisions", default="", metavar="FILE", help="write what was decided, a line per image")


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Evaluates; the result is flat: the metrics (top1, top5, loss, count) and the task's summary (macs_per_image)."""
    from vtjax.cli import assemble
    from vtjax.cli import decisions as decisions_lib

    if args.workdir:
        assemble.check_workdir(args.workdir, exists=True)
    config = config_lib.of_command(args)
    if args.print_config:
        return 0, config.to_dict()
    if args.decisions:
        decisions_lib.check_file(args.decisions)
    # Of a run that goes on, which this is not: what is measured is the checkpoint, or `init_from`.
    config_lib.override(config, "workdir", "")

    assemble.join_processes(config, args)
    if not args.config:
        _fit_mesh(config)
    check = _check_same if args.config else None
    return 0, measure(config, args.workdir, args.which, check, decisions=args.decisions)


def measure(
    config: config_lib.Config,
    workdir: str = "",
    which: str = "last",
    check: Callable[[Any, Any, str], None] | None = None,
    executables: Any = None,
    decisions: str = "",
) -> dict[str, Any]:
    """Evaluates the checkpoint `which` of a run, or without one the weights of `config.init_from`.

    Args:
      check: called with the spec that the config describes, the checkpoint's, and the workdir.
      executables: compiled programs to share with other evaluations of this process.
      decisions: file for what a dynamic model decides, image by image; compared with the calibration of the run, and
        guarded as `config.guard` says (see `cli.decisions`).

    Raises:
      InputError: nothing to evaluate, or as `assemble`.
    """
    import jax

    from vtjax.cli import assemble
    from vtjax.cli import decisions as decisions_lib
    from vtjax.parallel import launch
    from vtjax.train import checkpoint, loop
    from vtjax.train.task import facts

    extra = None
    if workdir:
        spec, params = checkpoint.load_params(workdir, which=which)
        extra = checkpoint.load_extra(workdir, which=which)
        if check is not None:
            check(assemble.task(config).spec, spec, workdir)
        # The checkpoint brings its own spec, whatever it was started from.
        config_lib.override(config, "init_from", workdir)
        task, data = assemble.assemble(config)
        params = params if task.given is None else task.given(params)
    else:
        if not config.init_from:
            raise InputError("eval needs trained parameters: --workdir=DIR, or config.init_from (weights or a workdir)")
        if config.data.weights_split:
            config_lib.override(config, "data.eval_split", config.data.weights_split)
        task, data = assemble.assemble(config)
        if task.fresh:
            raise InputError(
                f"eval would measure fresh {task.fresh}, which no run has trained: --workdir=DIR names the run, found "
                f"config.init_from={config.init_from!r} alone"
            )
        params, _, extra = task.init(jax.random.key(config.seed))
        params = params if task.begin is None else task.begin(params)
    told: dict[str, Any] = {}
    if decisions and task.decisions is None:
        raise InputError(f"--decisions needs a model that decides per image, which {config.experiment!r} has not")
    with launch.naming_the_lost(config.heartbeat_timeout):
        if task.decisions is not None and (decisions or config.guard.action in ("relax", "dense")):
            calibration = decisions_lib.load(workdir) if workdir else None
            made = loop.decisions(task, _Watched(data).eval(), config, params, extra)
            told = decisions_lib.compare(made, calibration, config)
            if (changed := decisions_lib.guarded(task, params, told["guard"], config)) is not None:
                params = changed
                made = loop.decisions(task, data.eval("eval"), config, params, extra)
            if decisions:
                decisions_lib.write(decisions, made)
        result = loop.evaluate(task, _Watched(data), config, params, extra, executables)
    source = workdir or config.init_from
    return {**result, **facts(task, extra), **told, "source": source, "split": config.data.eval_split}


class _Watched:
    """Data whose evaluation split says every few seconds how far it is."""

    def __init__(self, data: Any):
        self._data = data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def eval(self, split: str = "eval") -> Iterator[Any]:
        from vtjax.cli.assemble import say
        from vtjax.train import log

        return log.watched(self._data.eval(split), self._data.eval_examples, say, last=True)


def _fit_mesh(config: config_lib.Config) -> None:
    """A run's own mesh may not fit the devices here: then all of them share the batch."""
    from vtjax.cli.assemble import say
    from vtjax.parallel import mesh

    try:
        mesh.make(config.mesh)
    except InputError as error:
        if any(name.startswith("mesh.") for name in config_lib.overridden(config)):
            raise
        say(f"{error}: {', '.join(f'{axis}={size}' for axis, size in mesh.DEFAULT.items())} is taken")
        for axis, size in mesh.DEFAULT.items():
            config_lib.override(config, f"mesh.{axis}", size)


def _check_same(expected: Any, found: Any, workdir: str) -> None:
    # How a model came about may be told differently, for example by the name of a folder that has moved since.
    differences = {name: pair for name, pair in expected.diff(found).items() if not name.startswith("lineage")}
    if differences:
        first = "; ".join(
            f"{name} {there!r}, expected {here!r}" for name, (here, there) in list(differences.items())[:3]
        )
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise InputError(f"workdir {workdir} holds another model than --config describes: {first}{more}")
