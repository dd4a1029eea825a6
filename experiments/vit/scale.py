# SPDX-License-Identifier: Apache-2.0
"""One command on more devices, through losses, and over a grid; each appends a record to results/scale.jsonl.

python -m experiments.vit.scale curves             1 device, 8 devices, 2 processes x 4: the same losses? And a figure
python -m experiments.vit.scale kills --kills=20   two processes, one of them killed at random, both started again
python -m experiments.vit.scale sweep              a sweep of 12 points beside 12 runs of their own

`curves` trains `digits` for 200 steps, logged every 5, and once more for 10 steps, all of them logged: a run of its
own, with the warm-up and decay of 10 steps. Its figure, scale_curves.png, goes beside the records.

`kills` is one run of `tiny`, split over both processes (fsdp x tensor), so that both write every checkpoint. It is
divided into as many stretches as there are kills, and one: in each, one of the two processes gets SIGKILL at a random
step. Times of `kills` and `sweep` want idle cores. Exit code 1 where something is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "experiments" / "vit" / "results" / "scale.jsonl"
VTJAX = [sys.executable, "-m", "vtjax"]
CONFIG = "--config=configs/vit.py:"

MESH = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
PLACES = {"one": "1 device", "eight": "8 devices", "two": "2 processes x 4 devices"}

SPLIT = ("--config.mesh.data=1", "--config.mesh.fsdp=2")
HEARTBEAT = 5  # seconds
STRETCH = 8  # steps from kill to kill, on average
EVERY = 3  # steps from checkpoint to checkpoint
PATIENCE = 120.0  # seconds for the other process to end: heartbeats, and a busy machine
LOST = 76  # vtjax.errors.EXIT_LOST; not imported, for the environment has to be set before JAX is

GRID = ("config.optim.lr=1e-3,3e-3,1e-2", "config.seed=0,1", "config.loss.label_smoothing=0.0,0.1")


class Processes:
    """The processes of one run, `count` of them with `devices` each; what they say goes into files of `folder`."""

    def __init__(self, argv: Sequence[str], folder: Path, count: int = 1, devices: int = 1):
        folder.mkdir(parents=True)
        (folder / "tmp").mkdir()
        self.folder = folder
        self.children: list[subprocess.Popen[bytes]] = []
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        together = {"JAX_COORDINATOR_ADDRESS": f"localhost:{_free_port()}", "JAX_NUM_PROCESSES": str(count)}
        for index in range(count):
            variables = {**together, "JAX_PROCESS_ID": str(index)} if count > 1 else {}
            environment = {**os.environ, "XLA_FLAGS": flags, "TMPDIR": str(folder / "tmp"), **variables}
            with open(folder / f"{index}.out", "wb") as out, open(folder / f"{index}.err", "wb") as err:
                child = subprocess.Popen([*VTJAX, *argv], cwd=ROOT, stdout=out, stderr=err, env=environment)
            self.children.append(child)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children:
            child.kill()
            child.wait()

    def errors(self, index: int) -> str:
        """Standard error of a process, so far."""
        return (self.folder / f"{index}.err").read_text(errors="replace")

    def wait_for_step(self, step: int) -> None:
        """Returns as soon as process 0, which speaks for all, has said that step (or a later one)."""
        while max(map(int, re.findall(r"^step (\d+)/", self.errors(0), re.MULTILINE)), default=0) < step:
            for index, child in enumerate(self.children):
                if child.poll() is not None:
                    raise RuntimeError(f"process {index} ended before step {step}: {self.errors(index)[-2000:]}")
            time.sleep(0.005)

    def result(self) -> dict[str, Any]:
        """Waits for the end; the line of JSON that process 0 prints."""
        for index, child in enumerate(self.children):
            if code := child.wait():
                raise RuntimeError(f"process {index} ended with {code}: {self.errors(index)[-2000:]}")
        return json.loads((self.folder / "0.out").read_text().splitlines()[-1])


def vtjax(argv: Sequence[str], folder: Path, count: int = 1, devices: int = 1) -> dict[str, Any]:
    """Runs a command to its end; its result."""
    with Processes(argv, folder, count, devices) as processes:
        return processes.result()


def curves(steps: int, figure: Path) -> dict[str, Any]:
    """Losses of one config on one device, on eight, and on two processes with four each."""
    from vtjax.viz.curves import Series, save, series

    places = {"one": (1, 1, ()), "eight": (1, 8, MESH), "two": (2, 4, MESH)}
    losses: dict[str, dict[str, Series]] = {"first": {}, "all": {}}
    top1, seconds = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, (count, devices, mesh) in places.items():
            for kind, length, every in (("first", 10, 1), ("all", steps, 5)):
                workdir = Path(temporary) / f"{name}-{kind}"
                argv = ["run", f"{CONFIG}digits,steps={length}", f"--workdir={workdir}", f"--config.log_every={every}"]
                result = vtjax([*argv, *mesh], Path(temporary) / f"{name}-{kind}-said", count, devices)
                losses[kind][name] = series(workdir)["loss"]
            top1[name], seconds[name] = result["top1"], result["seconds"]
            _say(f"{PLACES[name]}: {steps} steps in {seconds[name]} s, top1 {top1[name]:.4f}")
    largest = {
        kind: {name: float(difference(runs["one"], runs[name]).max()) for name in ("eight", "two")}
        for kind, runs in losses.items()
    }
    save(_draw(losses["all"], max(largest["first"].values())), figure)
    return {
        "config": "configs/vit.py:digits",
        "seed": 0,
        "steps": steps,
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "rel_diff_first_10": largest["first"],
        "rel_diff_all": largest["all"],
        "logged": len(losses["all"]["one"][0]),
        "top1": top1,
        "seconds": seconds,
    }


def difference(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Relative difference of two series of the same steps."""
    if not np.array_equal(one[0], other[0]):
        raise RuntimeError(f"runs logged other steps: {one[0]} and {other[0]}")
    return np.abs(other[1] - one[1]) / np.abs(one[1])


def _draw(runs: Mapping[str, tuple[np.ndarray, np.ndarray]], first: float) -> Any:
    """The losses on top of each other, wide below and thin above; below, how far they are from one device's."""
    from vtjax.viz.curves import COLORS, INK, new_figure, quiet, set_title

    figure = new_figure(8.0, 5.6)
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [1.5, 1.0], "hspace": 0.26})
    styles: dict[str, dict[str, Any]] = {
        "one": {"color": COLORS[0], "linewidth": 7.0, "alpha": 0.3, "solid_capstyle": "round"},
        "eight": {"color": COLORS[1], "linewidth": 2.6},
        "two": {"color": COLORS[3], "linewidth": 1.4, "linestyle": (0, (4, 3))},
    }
    for name, (steps, values) in runs.items():
        above.plot(steps, values, label=PLACES[name], **styles[name])
        if name != "one":
            apart = difference(runs["one"], runs[name])
            below.plot(steps, np.where(apart > 0, apart, np.nan), marker="o", markersize=2.6, **styles[name])
    below.set_yscale("log")
    set_title(above, "Training loss: digits, one config, three layouts")
    set_title(below, f"Relative difference to 1 device (in a run of 10 steps: at most {first:.0e})")
    for axes, xlabel in ((above, ""), (below, "step")):
        quiet(axes, xlabel)
        axes.margins(x=0.02)
    above.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")
    return figure


def kills(count: int, seed: int) -> dict[str, Any]:
    """One run of two processes that loses one of them `count` times, beside the same run left alone."""
    choose = random.Random(seed)
    steps = STRETCH * (count + 1)
    argv = ["run", f"{CONFIG}tiny,steps={steps},batch_size=8", "--config.log_every=1", *SPLIT]
    argv += [f"--config.checkpoint.every={EVERY}", f"--config.heartbeat_timeout={HEARTBEAT}"]
    found: list[dict[str, Any]] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        alone = vtjax([*argv, f"--workdir={folder / 'alone'}"], folder / "alone-said", 2)
        _say(f"left alone: {steps} steps in {alone['seconds']} s")
        argv.append(f"--workdir={folder / 'killed'}")
        for number in range(count):
            # Each stretch begins with steps without a kill, so that every life saves and the run gets on.
            at, lost = STRETCH * number + choose.randint(EVERY + 1, STRETCH - 1), choose.randint(0, 1)
            with Processes(argv, folder / f"life{number}", 2) as pair:
                pair.wait_for_step(at)
                time.sleep(choose.uniform(0.0, 0.05))
                found.append({"lost": lost, "step": at, **_kill(pair, lost)})
            resumed = re.search(r"\(step (\d+) of", pair.errors(0))
            found[-1]["resumed_at"] = int(resumed[1]) if resumed else 0
            _say(f"{number + 1} of {count}: {json.dumps(found[-1])}")
        killed = vtjax(argv, folder / "last", 2)
    return {
        "config": "configs/vit.py:tiny",
        "seed": seed,
        "steps": steps,
        "batch_size": 8,
        "mesh": {"data": 1, "fsdp": 2, "tensor": 1},
        "heartbeat_timeout": HEARTBEAT,
        "kills": {str(lost): sum(f["lost"] == lost for f in found) for lost in (0, 1)},
        "killed_at": [f["step"] for f in found],
        "resumed_at": [f["resumed_at"] for f in found],
        "ended_with_76": sum(f["code"] == LOST for f in found),
        "named_the_lost": sum(f["named"] for f in found),
        "seconds_to_end": {
            str(lost): {"median": round(statistics.median(taken), 2), "max": round(max(taken), 2)}
            for lost in (0, 1)
            if (taken := [f["seconds"] for f in found if f["lost"] == lost])
        },
        "median_s": round(statistics.median(f["seconds"] for f in found), 2),
        "max_s": max(f["seconds"] for f in found),
        "equal": killed["params_sha256"] == alone["params_sha256"],
        "params_sha256": alone["params_sha256"],
        "seconds": round(time.monotonic() - began, 1),
    }


def _kill(pair: Processes, lost: int) -> dict[str, Any]:
    """Kills one process; how and when the other ended."""
    other = pair.children[1 - lost]
    if other.poll() is not None or pair.children[lost].poll() is not None:
        raise RuntimeError(f"the run ended before it could be killed: {pair.errors(1 - lost)[-2000:]}")
    pair.children[lost].kill()
    began = time.monotonic()
    try:
        code: int | None = other.wait(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        code = None
    seconds = round(time.monotonic() - began, 2)
    said = [line for line in pair.errors(1 - lost).splitlines() if line.startswith("vtjax: ")]
    return {"code": code, "named": bool(said) and f"process {lost} lost: " in said[-1], "seconds": seconds}


def sweep(grid: Sequence[str], steps: int) -> dict[str, Any]:
    """`vtjax sweep` over the grid, then every point as a `vtjax run` in a process of its own."""
    config = f"{CONFIG}tiny,steps={steps}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        began = time.monotonic()
        argv = ["sweep", config, *(f"--grid={leaf}" for leaf in grid), f"--workdir={folder / 'sweep'}"]
        result = vtjax(argv, folder / "sweep-said")
        together = time.monotonic() - began
        _say(f"sweep: {result['points']} points in {together:.1f} s, {result['compilations']} compilations")
        points = [json.loads(line) for line in (folder / "sweep" / "sweep.jsonl").read_text().splitlines()]
        apart, equal = 0.0, 0
        for number, point in enumerate(points, 1):
            began = time.monotonic()
            leaves = [f"--config.{leaf}={value}" for leaf, value in point["config"].items()]
            argv = ["run", config, f"--workdir={folder / f'run{number}'}", *leaves]
            one = vtjax(argv, folder / f"run{number}-said")
            apart += time.monotonic() - began
            equal += one["params_sha256"] == point["params_sha256"]
            _say(f"{number} of {len(points)}: {apart:.1f} s, {equal} equal")
    return {
        "config": "configs/vit.py:tiny",
        "seeds": sorted({point["config"].get("seed", 0) for point in points}),
        "grid": list(grid),
        "steps": steps,
        "points": len(points),
        "compilations": {"sweep": result["compilations"], "runs": len(points)},
        "sweep_s": round(together, 1),
        "runs_s": round(apart, 1),
        "equal": equal,
        "different_sha256": len({point["params_sha256"] for point in points}),
    }


def right(figure: str, values: Mapping[str, Any]) -> bool:
    """Whether a record is as it should be; times are not asked for."""
    if figure == "curves":
        return max(values["rel_diff_first_10"].values()) <= 1e-5
    if figure == "kills":
        done = sum(values["kills"].values())
        return values["equal"] and values["ended_with_76"] == values["named_the_lost"] == done
    return values["equal"] == values["points"]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="figure", required=True)
    for name in ("curves", "kills", "sweep"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, default=RECORDS, help="file that the record is appended to")
        if name == "kills":
            command.add_argument("--kills", type=int, default=20)
            command.add_argument("--seed", type=int, default=0)
        else:
            command.add_argument("--steps", type=int, default=200 if name == "curves" else 60)
        if name == "sweep":
            command.add_argument("--grid", action="append", metavar="config.LEAF=V,V", help="instead of the 12 points")
    arguments = parser.parse_args()
    if arguments.figure == "kills" and arguments.kills < 1:
        print(f"--kills must be 1 or more, found {arguments.kills}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes end with this one
    os.environ["JAX_PLATFORMS"] = "cpu"  # fake devices are the CPU's
    from vtjax.account import record

    values = {
        "curves": lambda: curves(arguments.steps, arguments.out.parent / "scale_curves.png"),
        "kills": lambda: kills(arguments.kills, arguments.seed),
        "sweep": lambda: sweep(arguments.grid or GRID, arguments.steps),
    }[arguments.figure]()
    print(json.dumps(record.write(arguments.out, {"figure": arguments.figure, **values})))
    return 0 if right(arguments.figure, values) else 1


if __name__ == "__main__":
    sys.exit(main())
