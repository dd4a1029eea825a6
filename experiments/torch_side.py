# SPDX-License-Identifier: Apache-2.0
"""PyTorch beside vtjax, for `experiments/*/beside_*.py`: its process, the turns both take, and what they check.

Two processes, one per side; while one measures the other waits for a line on a pipe, and the CPU time that it
nevertheless uses is recorded. A ratio from a machine that did other work is worthless: PyTorch loses far more by it
than XLA. The run says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vtjax.account import timing
from vtjax.errors import InputError

IDLE = 0.1
"""Cores that other work may use before a run says that its ratios are worthless."""


class Torch:
    """The other process: `worker` under another Python."""

    def __init__(self, python: str, threads: int, worker: Path, policy: str = "default"):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        if policy != "default":
            environment |= {"OMP_WAIT_POLICY": policy.upper(), "KMP_BLOCKTIME": "0"}
        try:
            self.process = subprocess.Popen(
                [python, str(worker), str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        except OSError as error:
            raise InputError(f"--torch-python must be a Python with torch, found {python}: {error}") from None

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline() or '{"error": "it ended; its last words are above"}')
        except BrokenPipeError:
            answer = {"error": "it ended; its last words are above"}
        if "error" in answer:
            raise InputError(f"the torch process failed at {do!r}: {answer['error']}")
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def watched(measure: timing.Measure, waiter: int, name: str, waiting: dict[str, float]) -> timing.Measure:
    """The measure, adding to `waiting[name]` the CPU time that the other process used meanwhile."""

    def measured(calls: int) -> Any:
        before = timing.cpu_seconds(waiter)
        seconds = measure(calls)
        waiting[name] += timing.cpu_seconds(waiter) - before
        return seconds

    return measured


def restrict(threads: int) -> None:
    """Keeps both processes on as many cores as threads; XLA sizes its pool by them. Before JAX makes its backend."""
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(cores):
        raise InputError(f"--threads must be in 1..{len(cores)}, the usable cores, found {threads}")
    os.sched_setaffinity(0, cores[:threads])


def arguments(parser: argparse.ArgumentParser, *, packages: str, rounds: int, calls: int, output: Path) -> None:
    """Adds what every comparison is told."""
    parser.add_argument("--torch-python", required=True, help=f"a Python that has {packages}")
    parser.add_argument("--threads", type=int, default=2, help="for both sides (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each side (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=calls, help="timed calls per turn (default: %(default)s)")
    parser.add_argument("--pause", type=float, default=0.3, help="seconds between turns (default: %(default)s)")
    parser.add_argument("--only", default="", help="substring of the cases to run")
    parser.add_argument("--output", default=str(output), help="(default: %(default)s)")


def about(torch: Torch, threads: int) -> dict[str, Any]:
    """What a record says of the other side and of the settings of both."""
    return {**torch.ask("about"), "threads": threads, "glibc_tunables": os.environ.get("GLIBC_TUNABLES", "")}


def logits_difference(title: str, ours: Any, theirs: np.ndarray) -> float:
    """The largest difference.

    Raises:
      InputError: it exceeds a thousandth of their spread.
    """
    difference = float(np.abs(np.asarray(ours) - theirs).max())
    if not difference <= 1e-3 * float(theirs.std()):
        raise InputError(
            f"{title}: logits must agree to 1e-3 of their spread {theirs.std():.3g}, found {difference:.3g}"
        )
    return difference


def in_turns(
    ours: timing.Measure, torch: Torch, do: str, counted: int, unit: str, options: argparse.Namespace, warmup: int
) -> dict[str, Any]:
    """Times both sides in turns; the fields of a record.

    Args:
      ours: of this process; `do` is what the other is asked for.
      counted: what one call does, in `unit`, for the field `UNIT_per_s`.
      options: of `arguments`.
      warmup: calls before the timed ones, in every turn.
    """
    waiting = {"vtjax": 0.0, "torch": 0.0}
    measures = {
        "vtjax": watched(ours, torch.process.pid, "torch", waiting),
        "torch": watched(lambda n: torch.ask(do, calls=n)["seconds"], os.getpid(), "vtjax", waiting),
    }
    found = timing.compare(
        measures,
        rounds=options.rounds,
        calls=options.calls,
        warmup=warmup,
        pause=options.pause,
        pids=[torch.process.pid],
    )
    return {
        **found.summary(),
        "ratio": found.ratio("torch", "vtjax"),
        "ratio_range": found.ratio_range("torch", "vtjax"),
        f"{unit}_per_s": {name: counted / found.timings[name].median for name in measures},
        "waiting_cpu_s": waiting,
    }


def warn(title: str, record: Mapping[str, Any]) -> None:
    """Says so where other work was on the cores."""
    if (record["other_cores"] or 0.0) > IDLE:
        busy = f"{record['other_cores']:.2f} cores were busy with other work"
        print(f"{title}: {busy}: this ratio is worthless", file=sys.stderr)


def row(title: str, record: Mapping[str, Any]) -> tuple[str, ...]:
    """For a table on the terminal under `HEAD`."""
    low, high = record["ratio_range"]
    milliseconds = (f"{1000 * record[side]['median_s']:.2f}" for side in ("vtjax", "torch"))
    other = "" if record["other_cores"] is None else f"{record['other_cores']:.2f}"
    return title, *milliseconds, f"{record['ratio']:.3f}", f"{low:.2f}..{high:.2f}", other


HEAD = ("case", "vtjax ms", "torch ms", "ratio", "p10..p90", "other cores")
