# SPDX-License-Identifier: Apache-2.0
"""`vtjax sweep`: every point of a grid is a run (or an evaluation) of its own, with its own folder and result.

    DIR/points/<leaf=value,...>/   a workdir of `vtjax run`, or `eval.json`; `error.json` where the point failed
    DIR/sweep.jsonl                one line per finished or failed point, in the order of the grid
    DIR/sweep.png                  the metric against what was swept

Everything is read off the points' folders, so that a sweep that was killed goes on, and several machines that share DIR
(`--shard`) fill one table.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from vtjax.cli import config as config_lib
from vtjax.errors import BusyError, InputError, MissingExtraError, NonFiniteError

LONGEST = 120  # characters of a point's name

Point = tuple[str, dict[str, Any], config_lib.Config]
"""Name, value of every swept leaf, config."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vtjax sweep`."""
    config_lib.arguments(parser)
    parser.add_argument(
        "--grid", action="append", default=[], metavar="config.LEAF=V,V", help="a leaf and its values; tuples in ()"
    )
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th point, from the I-th on (0..N-1)")
    parser.add_argument("--mode", default="run", choices=("run", "eval"), help="what a point is")
    parser.add_argument("--metric", default="top1", help="what the table and the figure show")
    parser.add_argument("--workdir", default="", help="folder of the sweep; one that holds a sweep goes on")


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Fills what is missing. The result has `points` (of the whole grid), `ran`, `failed`, and `compilations` of the
    training step (with `--mode=eval` of the evaluation step). The exit code is 1 where a point failed."""
    grid = [parse_grid(text) for text in args.grid]
    index, count = parse_shard(args.shard)
    points = build(args.config, args.overrides, grid)
    if args.print_config:
        return 0, {name: config.to_dict() for name, _, config in points}

    from vtjax.cli import assemble
    from vtjax.cli.assemble import say
    from vtjax.parallel import launch
    from vtjax.train import log
    from vtjax.train.executables import Executables

    for name, _, config in points:
        try:
            assemble.check_numbers(config)
        except InputError as error:
            raise InputError(f"point {name}: {error}") from None
    if args.mode == "eval" and (bare := [name for name, _, config in points if not config.init_from]):
        raise InputError(f"point {bare[0]} needs config.init_from (weights or a workdir) to evaluate, found none")
    assemble.check_workdir(args.workdir)
    folder = log.absolute(args.workdir)
    if args.mode == "run":
        _refuse_changes(folder, points)
    assemble.join_processes(points[0][2], args)
    told = {"mode": args.mode, "shard": args.shard, "workdir": args.workdir}
    launch.agree("sweep", {**told, **{name: json.dumps(config.to_dict()) for name, _, config in points}})
    executables = Executables()
    began, ran, failed = time.monotonic(), 0, 0
    for number, (name, _, config) in enumerate(points):
        if number % count != index:
            continue
        where, label = folder / "points" / name, f"[{number + 1}/{len(points)}] {name}"
        if launch.from_first(_finished(where, config, args.mode)):
            say(f"{label}: finished before")
            continue
        say(label)
        try:
            problem = _one(where, config, args.mode, executables)
        except BusyError as error:
            say(f"{label} is left to its run: {error}")
            continue
        ran += 1
        if problem:
            say(f"{label} failed: {problem}")
            failed += 1
        _write_records(folder, points, args.mode)
    records = _write_records(folder, points, args.mode)
    leaves = [leaf for leaf, _ in grid]
    for line in _table(records, leaves, args.metric):
        say(line)
    _draw(folder, records, leaves, args.metric)
    if records and not any(args.metric in record for record in records):
        say(f"no point has the metric {args.metric!r}: --metric takes one that a result has, such as loss")
    main = "step" if args.mode == "run" else "evaluate"
    result = {
        "points": len(points),
        "ran": ran,
        "failed": failed,
        "recorded": len(records),
        "compilations": executables.compiled[main],
        "compiled": dict(executables.compiled),
        "seconds": round(time.monotonic() - began, 2),
        "workdir": args.workdir,
    }
    return (1 if failed else 0), result


def parse_grid(text: str) -> tuple[str, list[str]]:
    """`config.a.b=1,(2,3),x` -> ("a.b", ["1", "(2,3)", "x"]).

    Raises:
      InputError: no leaf, no value, or an unclosed parenthesis.
    """
    leaf, found, values = text.partition("=")
    parts = [part.strip() for part in re.findall(r"\((?:[^()]*)\)|[^,()]+", values)]
    whole = ",".join(parts).replace(" ", "") == values.replace(" ", "")
    if not found or not leaf.startswith("config.") or not parts or not whole or not all(parts):
        raise InputError(f"--grid must be config.LEAF=VALUE,VALUE,... with tuples in parentheses, found {text!r}")
    return leaf.removeprefix("config."), parts


def parse_shard(text: str) -> tuple[int, int]:
    """`1/4` -> (1, 4).

    Raises:
      InputError: not I/N with 0 <= I < N.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not int(found[1]) < int(found[2]):
        raise InputError(f"--shard must be I/N with I in 0..N-1, found {text!r}")
    return int(found[1]), int(found[2])


def build(path: str, overrides: Mapping[str, str], grid: Sequence[tuple[str, list[str]]]) -> list[Point]:
    """(name, values by leaf, config) of every point, the last leaf changing fastest.

    Raises:
      InputError: no grid, a leaf that is swept twice, set beside the sweep or has no meaning in one, a value that does
        not fit, or two points that are the same.
    """
    if not grid:
        raise InputError("a sweep needs at least one --grid=config.LEAF=VALUE,VALUE,..., found none")
    leaves = [leaf for leaf, _ in grid]
    for leaf in leaves:
        if leaves.count(leaf) > 1 or leaf in overrides:
            raise InputError(f"config.{leaf} must be set once, by --grid or by --config.{leaf}, found it twice")
        if leaf == "workdir" or leaf.startswith("mesh."):
            raise InputError(f"config.{leaf} cannot be swept: points have workdirs of their own, and the same devices")
    points: dict[str, Point] = {}
    for texts in itertools.product(*(values for _, values in grid)):
        config = config_lib.load_config(path, overrides={**overrides, **dict(zip(leaves, texts, strict=True))})
        resolved = dict(config_lib.flatten(config))
        values = {leaf: resolved[leaf] for leaf in leaves}
        name = _name(values)
        if name in points:
            raise InputError(f"the points of a sweep must differ, found {name} twice")
        points[name] = name, values, config
    return list(points.values())


def _name(values: Mapping[str, Any]) -> str:
    """A folder's name; long ones end in a hash."""
    text = ",".join(f"{leaf}={_shown(value)}" for leaf, value in values.items())
    safe = re.sub(r"[^\w.,=+-]", "_", text)
    if safe == text and len(safe) <= LONGEST:
        return safe
    return f"{safe[: LONGEST - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _shown(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _one(where: epath.Path, config: config_lib.Config, mode: str, executables: Any) -> str:
    """Runs one point; what went wrong with it, or ""."""
    import jax

    from vtjax.cli import assemble
    from vtjax.cli import eval as eval_command
    from vtjax.parallel import launch
    from vtjax.train import log, loop

    plain = config.to_dict()
    if mode == "run":
        config_lib.override(config, "workdir", str(where))
    if (where / "error.json").exists() and launch.first():
        (where / "error.json").unlink()
    try:
        if mode == "run":
            task, data = assemble.assemble(config)
            with launch.naming_the_lost(config.heartbeat_timeout):
                loop.train(task, data, config, where, executables)
        else:
            result = eval_command.measure(config, executables=executables)
            log.write_json(where / "eval.json", {"config": plain, "result": result})
    except BusyError:
        raise
    except (InputError, NonFiniteError, jax.errors.JaxRuntimeError) as error:  # the last one: out of memory
        if isinstance(error, jax.errors.JaxRuntimeError) and launch.joined():
            raise
        log.write_json(where / "error.json", {"error": str(error)})
        return str(error)
    return ""


def _refuse_changes(folder: epath.Path, points: Sequence[Point]) -> None:
    """Raises `InputError` where a point that is there was begun under another config."""
    from vtjax.train import workdir

    for name, _, config in points:
        where = folder / "points" / name
        if not config.allow_config_change and (changes := workdir.config_changes(where, config)):
            named = "; ".join(f"{leaf} was {old!r}, found {new!r}" for leaf, (old, new) in list(changes.items())[:3])
            raise InputError(f"{where} was begun under another config: {named}; take another workdir for this sweep")


def _finished(where: epath.Path, config: config_lib.Config, mode: str) -> bool:
    """Whether a point has its result already, under this very config."""
    from vtjax.train import log, workdir

    if mode == "run":
        return workdir.finished(where, config.steps) is not None and not (where / "error.json").exists()
    saved = _read(where / "eval.json")
    return bool(saved) and saved.get("config") == log.plain(config.to_dict())


def _read(path: epath.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} must be JSON, as the sweep wrote it: {error}") from None


def _lines(path: epath.Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def _records(folder: epath.Path, points: Sequence[Point], mode: str) -> Iterator[dict[str, Any]]:
    for name, values, _ in points:
        where = folder / "points" / name
        result = _read(where / "result.json") if mode == "run" else _read(where / "eval.json").get("result", {})
        error = _read(where / "error.json")
        if result or error:
            yield {"point": name, "config": values, **({} if error else result), **error}


def _write_records(folder: epath.Path, points: Sequence[Point], mode: str) -> list[dict[str, Any]]:
    from vtjax.train import log

    # Points of another grid in the same folder keep their lines.
    names = {name for name, _, _ in points}
    others = [record for record in _lines(folder / "sweep.jsonl") if record.get("point") not in names]
    records: list[dict[str, Any]] | None = None
    # Another shard may finish a point while this one writes: until what was written is what is there.
    while (found := list(_records(folder, points, mode))) != records:
        records = found
        lines = [json.dumps(log.plain(record)) + "\n" for record in (*others, *records)]
        log.write_text(folder / "sweep.jsonl", "".join(lines), shared=True)
    return found


def _table(records: Sequence[Mapping[str, Any]], leaves: Sequence[str], metric: str) -> list[str]:
    from vtjax.viz import tables

    columns = [c for c in (metric, "loss", "macs_per_image", "seconds") if any(c in r for r in records)]
    rows = [
        (*(_shown(r["config"][leaf]) for leaf in leaves), *(r.get(c) for c in columns), r.get("error", ""))
        for r in records
    ]
    return tables.text((*leaves, *columns, "error"), rows).splitlines() if rows else []


def _draw(folder: epath.Path, records: Sequence[Mapping[str, Any]], leaves: Sequence[str], metric: str) -> None:
    from vtjax.cli.assemble import say
    from vtjax.parallel import launch
    from vtjax.train import log
    from vtjax.viz import curves, sweeps

    known = [r for r in records if isinstance(r.get(metric), int | float)]
    if not known or not launch.first() or not log.is_local(folder):
        return
    try:
        curves.save(sweeps.sweep(known, leaves, metric), folder / "sweep.png")
    except MissingExtraError as error:
        say(f"no figure: {error}")
