# SPDX-License-Identifier: Apache-2.0
"""The timing protocol, on candidates whose times are known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from vtjax.account import timing
from vtjax.errors import InputError


def scripted(log: list[tuple[str, int]], name: str, seconds: float) -> timing.Measure:
    def measure(calls: int) -> list[float]:
        log.append((name, calls))
        return [seconds * (1 + i) for i in range(calls)]

    return measure


def test_candidates_take_turns_in_alternating_order() -> None:
    log: list[tuple[str, int]] = []
    candidates = {name: scripted(log, name, s) for name, s in (("dense", 3.0), ("reduced", 2.0))}
    result = timing.compare(candidates, rounds=3, calls=5, warmup=2, pause=0.0)
    turn = {name: [(name, 2), (name, 5)] for name in candidates}
    warm = [("dense", 2), ("reduced", 2)]
    assert log == warm + turn["dense"] + turn["reduced"] * 2 + turn["dense"] * 2 + turn["reduced"]
    assert result.timings["dense"].rounds == ((3.0, 6.0, 9.0, 12.0, 15.0),) * 3
    assert result.ratio("dense", "reduced") == pytest.approx(1.5)
    assert result.ratio_range("dense", "reduced") == pytest.approx((1.5, 1.5))
    summary = json.loads(json.dumps(result.summary()))
    assert summary["dense"] == {"median_s": 9.0, "min_s": 3.0, "p10_s": 3.0, "p90_s": 15.0, "calls": 15}
    assert summary["load_before"] >= 0 and summary["load_after"] >= 0


def test_ratio_range_shows_a_disturbed_round() -> None:
    slow = timing.Timing(((2.0,),) * 9 + ((20.0,),))
    result = timing.Comparison({"slow": slow, "fast": timing.Timing(((1.0,),) * 10)}, 0.0, 0.0, None)
    assert result.ratio("slow", "fast") == 2.0
    assert result.ratio_range("slow", "fast") == pytest.approx((2.0, 3.8))


def test_timer_waits_for_the_result_and_never_times_compilation() -> None:
    compiled: list[int] = []

    @jax.jit
    def fn(x):
        compiled.append(1)
        return jax.pure_callback(lambda v: (time.sleep(0.02), v)[1], x, x)

    result = timing.compare({"sleeps": timing.timer(fn, jnp.ones(3))}, rounds=2, calls=3, pause=0.0)
    assert len(compiled) == 1
    assert len(result.timings["sleeps"].seconds) == 6
    assert min(result.timings["sleeps"].seconds) >= 0.02


@pytest.mark.parametrize("bad", [{"rounds": 0}, {"calls": 0}, {"warmup": 0}])
def test_bad_counts(bad: dict) -> None:
    with pytest.raises(InputError, match="at least 1"):
        timing.compare({"a": lambda n: [0.0] * n}, **bad)
    with pytest.raises(InputError, match="0 candidates"):
        timing.compare({})


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="needs Linux's /proc/stat")
def test_other_load_sees_others_only() -> None:
    spin = "import time\nt = time.time()\nwhile time.time() < t + 60: pass"
    busy = subprocess.Popen([sys.executable, "-c", spin])
    try:
        others, ours = timing.OtherLoad(), timing.OtherLoad([busy.pid])
        before, start = timing.cpu_seconds(busy.pid), time.perf_counter()
        while timing.cpu_seconds(busy.pid) - before < 0.5 and time.perf_counter() < start + 50:
            time.sleep(0.5)  # on a busy machine it takes a while to get its share
        spun = (timing.cpu_seconds(busy.pid) - before) / (time.perf_counter() - start)
        seen, rest = others.cores(), ours.cores()
        assert seen is not None and rest is not None
        assert spun > 0
        # The same moment apart from a few ticks of 10 ms: what the two meters differ by is the spinning process.
        assert seen - rest == pytest.approx(spun, abs=0.15)
    finally:
        busy.kill()
        busy.wait()
    with pytest.raises(OSError):
        timing.cpu_seconds(busy.pid)
