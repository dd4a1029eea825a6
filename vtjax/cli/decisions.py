# SPDX-License-Identifier: Apache-2.0
"""What a dynamic model decided, image by image: recorded, compared with what it decided at calibration, and guarded.

`vtjax run` ends with a calibration: the decisions for the training split, without augmentation, in
DIR/calibration.json. `vtjax eval --decisions=FILE` writes one line of JSON per image, and compares.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from vtjax.errors import InputError

FILE = "calibration.json"
MOST = 1024  # images of a calibration
GIVEN = ("index", "label", "predicted", "question", "type")  # what a row is about: no decision
ACTIONS = ("off", "warn", "relax", "dense")


def check_guard(config: Any) -> None:
    """Raises InputError for an unknown action or a number out of range."""
    guard = config.guard
    if guard.action not in ACTIONS:
        raise InputError(f"config.guard.action must be one of {', '.join(ACTIONS)}, found {guard.action!r}")
    if not 0.0 < guard.bound <= 1.0:
        raise InputError(f"config.guard.bound must be in (0, 1], found {guard.bound}")
    if not 0.0 < guard.amount < 1.0:
        raise InputError(f"config.guard.amount must be in (0, 1), found {guard.amount}")


def calibrate(task: Any, data: Any, config: Any, workdir: str) -> None:
    """Writes the calibration of a finished run, once."""
    from vtjax.parallel import launch
    from vtjax.train import checkpoint, log, loop

    file = log.absolute(workdir) / FILE
    if task.decisions is None or launch.from_first(file.exists()):
        return
    from vtjax.cli.assemble import say

    _, params = checkpoint.load_params(workdir)
    extra = checkpoint.load_extra(workdir)
    say(f"calibrating on at most {MOST} images of {config.data.train_split} ...")
    batches = _some(data.eval("train"), -(-MOST // config.batch_size))
    made = loop.decisions(task, batches, config, params, extra)
    kept = {name: value.tolist() for name, value in made.items() if name not in GIVEN}
    log.write_json(file, {"split": config.data.train_split, "count": len(made["macs"]), **kept})


def load(workdir: str) -> dict[str, Any] | None:
    """The calibration of a run; None where it has none.

    Raises:
      InputError: a damaged file.
    """
    from vtjax.train import log

    file = log.absolute(workdir) / FILE
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file} must be JSON, as the run wrote it: {error}") from None
    if not isinstance(found, dict) or "macs" not in found:
        raise InputError(f"{file} must hold the decisions of a calibration, found {type(found).__name__}")
    if not isinstance(count := found.get("count"), int) or count < 1 or not isinstance(found.get("split"), str):
        raise InputError(f"{file} must name its split and a count of 1 or more images, found count {count!r}")
    for name in found.keys() - {"split", "count"}:
        try:
            values = np.asarray(found[name], float)
        except (TypeError, ValueError):
            values = np.zeros(0)
        if values.shape[:1] != (count,) or not np.isfinite(values).all():
            raise InputError(f"{file} must hold finite {name} of each of its {count} images, found something else")
    return found


def check_file(path: str) -> None:
    """Raises InputError where `--decisions=FILE` cannot be written."""
    file = Path(path)
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise InputError(f"--decisions must be a file in a folder that exists, found {path}")


def write(path: str, made: Mapping[str, np.ndarray]) -> None:
    """One line of JSON per image, in the order of the split; the file is there whole or not at all."""
    from vtjax.train import log

    rows = zip(*(value.tolist() for value in made.values()), strict=True)
    lines = [json.dumps(dict(zip(made, row, strict=True))) + "\n" for row in rows]
    log.write_text(epath.Path(path), "".join(lines))


def drift(made: Mapping[str, Any], calibration: Mapping[str, Any]) -> tuple[float, str]:
    """The largest Kolmogorov-Smirnov distance between the decisions of two sets of images, over everything that is
    decided per image and layer, and what it is of (`macs`, `kept[4]`).

    0 = the same distribution, 1 = no overlap. Two samples of 500 images of the same kind differ by about 0.05 to 0.1.
    """
    worst, whose = 0.0, ""
    for name in sorted(set(made) & set(calibration) - {*GIVEN, "correct"}):
        here, there = np.asarray(made[name], float), np.asarray(calibration[name], float)
        if here.ndim != there.ndim or here.shape[1:] != there.shape[1:]:
            raise InputError(f"{FILE} must hold {name} {list(here.shape[1:])} per image, found {list(there.shape[1:])}")
        for column in np.ndindex(here.shape[1:]):
            distance = _kolmogorov_smirnov(here[(slice(None), *column)], there[(slice(None), *column)])
            if distance > worst:
                worst, whose = distance, name + "".join(f"[{i}]" for i in column)
    return worst, whose


def compare(made: Mapping[str, np.ndarray], calibration: Mapping[str, Any] | None, config: Any) -> dict[str, Any]:
    """Says on standard error how far the decisions have drifted; `drift`, `drift_of` and `guard` for the result, where
    `guard` is "none" (no calibration), "within", or the action that is due."""
    if calibration is None:
        print("no calibration to compare with: a run writes one at its end", file=sys.stderr)
        return {"guard": "none"}
    distance, whose = drift(made, calibration)
    # Small samples of the same kind differ, too: no more than this in 99 of 100 cases, for one of the numbers.
    bound = max(config.guard.bound, 1.63 * (1 / len(made["macs"]) + 1 / calibration["count"]) ** 0.5)
    ours, theirs = float(np.mean(made["macs"])), float(np.mean(calibration["macs"]))
    text = (
        f"decisions differ from those at calibration ({calibration['count']} images of {calibration['split']}) by at "
        f"most {distance:.3f} ({whose}); {ours:,.0f} MACs per image, there {theirs:,.0f}"
    )
    result = {"drift": distance, "drift_of": whose, "guard": "within"}
    if distance > bound:
        result["guard"] = config.guard.action
        text = f"warning: {text}; the bound is {bound:.2f} (config.guard.bound, more for few images)"
    print(text, file=sys.stderr)
    return result


def guarded(task: Any, params: Any, guard: str, config: Any) -> Any:
    """The parameters that `config.guard` asks for; None where nothing is to change.

    Raises:
      InputError: the task knows no less aggressive decisions.
    """
    if guard not in ("relax", "dense"):
        return None
    if task.relax is None:
        raise InputError(f"config.guard.action={guard!r} needs a task that can relax, found none; use 'warn'")
    amount = 1.0 if guard == "dense" else config.guard.amount
    print(f"guard: {guard}; thresholds {amount:.0%} of the way to the dense model", file=sys.stderr)
    return task.relax(params, amount)


def _kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    points = np.concatenate([a, b])
    below = [np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


def _some(batches: Any, count: int) -> Any:
    from vtjax.train.task import closing

    with closing(batches):
        for _, batch in zip(range(count), batches, strict=False):
            yield batch
