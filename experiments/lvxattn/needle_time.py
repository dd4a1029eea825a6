# SPDX-License-Identifier: Apache-2.0
"""How many frames the cheaper ways of `needle.py` may read in the time that exact attention takes.

Everything runs on one core. There the eight pretended devices take turns, so that an eighth of the time of their
program is what a device takes that has a core of its own: `share_s`. A way that runs on one device may read as many
frames as fill that time, from the time that it takes for several numbers of frames, between which lines are drawn. What
eight devices send each other is copied in memory, which is to the advantage of exact attention; it is some kilobytes
per question. Frames that are read go through the tower, which is most of the work: a cheaper attention has little to
save.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.lvxattn import needle

SHARES = (16, 8, 4, 2)
"""Of a video's frames the others read one in so many, where `--read` says nothing."""


def run(lengths: Sequence[int], wanted: Sequence[int], arguments: argparse.Namespace) -> int:
    """Measures and records; exit code 2 where the system cannot keep a process on one core."""
    if not hasattr(os, "sched_setaffinity"):
        print("times want one core, which only Linux gives a process; nothing was measured", file=sys.stderr)
        return 2
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before JAX counts cores

    import vtjax
    from vtjax.account import record

    m = vtjax.load(arguments.workdir)
    for frames in lengths:
        told = measured(frames, wanted or [frames // share for share in SHARES], m, arguments)
        print(record.write(arguments.out, told), flush=True)
    return 0


def measured(frames: int, counts: Sequence[int], m: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a batch by way and number of frames read, all in turns."""
    from vtjax.account import timing

    candidates, read = {}, {}
    for way in needle.WAYS:
        for count in needle.reads(way, frames, counts, arguments.kept):
            this = needle.prepared(way, frames, count, m, arguments)
            name = way if way == "exact" else f"{way} {this.told['read']}"
            batch = this.place(next(iter(this.data.eval())))
            candidates[name], read[name] = timing.timer(this.run, this.params, batch), this.told["read"]
    found = timing.compare(candidates, rounds=arguments.rounds, calls=2, warmup=1)
    share = found.timings["exact"].median / needle.DEVICES
    equal, beyond = {}, {}
    for way in needle.WAYS[1:]:
        names = [name for name in candidates if name.startswith(f"{way} ")]
        times = [(read[name], found.timings[name].median) for name in names]
        equal[way], beyond[way] = affordable(share, times, frames)
    return {
        "kind": "time",
        "frames": frames,
        "batch": arguments.batch,
        "haystack": arguments.haystack,
        "cameras": arguments.cameras,
        "kept": arguments.kept,
        "cores": 1,
        "share_s": share,
        "equal": equal,
        "beyond": beyond,
        "seconds": found.summary(),
        "seed": 0,
    }


def affordable(share: float, times: Sequence[tuple[int, float]], most: int) -> tuple[int, str]:
    """Frames that can be read in `share` seconds, of `most` that there are, by lines between `(frames, seconds)`; and
    "" or, where the time lies outside of these, "<" (fewer than the fewest of them) or ">" (more than the most)."""
    counts, measured = zip(*sorted(times), strict=True)
    seconds = np.maximum.accumulate(measured)  # a measurement that is above that of more frames is noise
    beyond = "<" if share < seconds[0] else ">" if share > seconds[-1] and counts[-1] < most else ""
    return int(np.interp(share, seconds, counts)), beyond


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: frames that each way may read in the time of exact attention, and its accuracy with the next more
    frames that were tried; none where it may read more than were timed."""
    from experiments.ltmp.tables import circumstances
    from vtjax.viz import tables

    timed = [r for r in records if r.get("kind") == "time" and r["kept"] == needle.KEPT]
    times, used, rows = {needle.videos_of(r): r for r in timed}, [], []
    for exact, others in needle.cases(records):
        if (found := times.get(needle.videos_of(exact))) is None:
            continue
        used.append(found)
        cells = []
        for way in needle.WAYS[1:]:
            equal, beyond = found["equal"][way], found["beyond"][way]
            tried = sorted((r["read"], r["top1"]) for r in others if r["way"] == way and r["read"] >= equal)
            accuracy = f": {tried[0][1]:.3f} (at {tried[0][0]})" if tried and beyond != ">" else ""
            cells.append(f"{beyond} {equal}".strip() + accuracy)
        length = exact["haystack"], exact["frames"], exact["batch"]
        rows.append((*length, f"{1e3 * found['share_s']:.1f}", f"{exact['top1']:.3f}", *cells))
    if not rows:
        return ""
    head = ("haystack", "frames", "videos", "ms per device", *needle.WAYS)
    return tables.markdown(head, rows) + "\n\n" + circumstances(used)
