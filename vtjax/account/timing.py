# SPDX-License-Identifier: Apache-2.0
"""Times of candidates beside each other.

The protocol: compilation is excluded, every candidate is warmed up, results are waited for, and the candidates take
turns in one run, so that whatever else the machine does meets all of them. A turn is a block of calls, not one call: a
block's first calls find the caches full of the other candidate's data and are dropped. Reported are the median, the
minimum and the 10th and 90th percentile, and what else ran.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vtjax.errors import InputError

Measure = Callable[[int], Sequence[float]]
"""`measure(n)` makes n calls and returns the seconds that each took."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call of one candidate, `rounds` turns of equally many calls, in the order in which they were made."""

    rounds: tuple[tuple[float, ...], ...]

    @property
    def seconds(self) -> list[float]:
        """All calls."""
        return [s for turn in self.rounds for s in turn]

    @property
    def median(self) -> float:
        """Median over all calls, seconds."""
        return float(np.median(self.seconds))

    def summary(self) -> dict[str, float]:
        """`median_s`, `min_s`, `p10_s`, `p90_s`, `calls`."""
        p10, median, p90 = np.percentile(self.seconds, [10, 50, 90])
        return {
            "median_s": float(median),
            "min_s": min(self.seconds),
            "p10_s": float(p10),
            "p90_s": float(p90),
            "calls": len(self.seconds),
        }


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Timings of candidates that took turns.

    Attributes:
      timings: by candidate.
      load_before, load_after: the machine's 1-minute load average; after the run it includes the run itself.
      other_cores: cores that were busy with something else, on average over the run; None where the system does not
        tell. This is the figure that says whether the machine was idle.
    """

    timings: dict[str, Timing]
    load_before: float
    load_after: float
    other_cores: float | None

    def ratio(self, slow: str, fast: str) -> float:
        """Median time of `slow` over that of `fast`: how many times as fast `fast` is."""
        return self.timings[slow].median / self.timings[fast].median

    def ratio_range(self, slow: str, fast: str) -> tuple[float, float]:
        """10th and 90th percentile of the same ratio taken round by round."""
        pairs = zip(self.timings[slow].rounds, self.timings[fast].rounds, strict=True)
        low, high = np.percentile([np.median(a) / np.median(b) for a, b in pairs], [10, 90])
        return float(low), float(high)

    def summary(self) -> dict[str, Any]:
        """JSON-able: one dict per candidate, the load and `other_cores`."""
        return {
            **{name: timing.summary() for name, timing in self.timings.items()},
            "load_before": self.load_before,
            "load_after": self.load_after,
            "other_cores": self.other_cores,
        }


def timer(fn: Callable[..., Any], *args: Any) -> Measure:
    """Measures `fn(*args)` call by call, each until its results are ready."""

    def measure(calls: int) -> list[float]:
        seconds = []
        for _ in range(calls):
            start = time.perf_counter()
            jax.block_until_ready(fn(*args))
            seconds.append(time.perf_counter() - start)
        return seconds

    return measure


def compare(
    candidates: Mapping[str, Measure],
    *,
    rounds: int = 10,
    calls: int = 5,
    warmup: int = 2,
    pause: float = 0.05,
    pids: Sequence[int] = (),
) -> Comparison:
    """Lets the candidates take turns and times them.

    Args:
      candidates: by name; compiled by their first call, which is not timed.
      rounds: turns of every candidate; the order is reversed every other round.
      calls: timed calls per turn.
      warmup: calls before the timed ones, in every turn.
      pause: seconds between turns, in which the threads of the previous candidate stop spinning.
      pids: processes of candidates that run elsewhere, whose CPU time is not "something else".

    Raises:
      InputError: no candidate, or counts below 1.
    """
    if not candidates or rounds < 1 or calls < 1 or warmup < 1:
        raise InputError(
            f"timing needs candidates and rounds, calls, warmup of at least 1, found {len(candidates)} candidates and "
            f"{rounds}, {calls}, {warmup}"
        )
    for measure in candidates.values():
        measure(warmup)
    names, turns = list(candidates), {name: [] for name in candidates}  # type: ignore[var-annotated]
    load_before, meter = os.getloadavg()[0], OtherLoad(pids)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            time.sleep(pause)
            candidates[name](warmup)
            turns[name].append(tuple(float(s) for s in candidates[name](calls)))
    timings = {name: Timing(tuple(turns[name])) for name in names}
    return Comparison(timings, load_before, os.getloadavg()[0], meter.cores())


class OtherLoad:
    """Cores that other processes kept busy since this was made (Linux; elsewhere `cores()` is None)."""

    def __init__(self, pids: Sequence[int] = ()):
        self._pids = (os.getpid(), *pids)
        self._start = self._now()

    def cores(self) -> float | None:
        """Mean number of busy cores, this process and `pids` excluded; at least 0."""
        now = self._now()
        if self._start is None or now is None:
            return None
        elapsed, busy, own = (b - a for a, b in zip(self._start, now, strict=True))
        return max(0.0, (busy - own) / elapsed) if elapsed > 0 else 0.0

    def _now(self) -> tuple[float, float, float] | None:
        try:
            with open("/proc/stat", encoding="ascii") as file:
                # user nice system idle iowait irq softirq steal; guest time is part of user.
                ticks = [int(x) for x in file.readline().split()[1:9]]
            own = sum(cpu_seconds(pid) for pid in self._pids)
        except (OSError, ValueError):
            return None
        return time.monotonic(), (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK"), own


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used, all threads; its children are not included.

    Raises:
      OSError: there is no such process, or the system has no /proc.
    """
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        # The second field is the command's name in parentheses, which may hold spaces.
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
