# SPDX-License-Identifier: Apache-2.0
"""A link is lost in the middle of a training run of several processes: `python -m experiments.lvxattn.links down`.

Three runs of `configs/lvxattn.py:tiny` with its frames over all processes: one that nothing happens to; one in which a
host's link goes down behind a checkpoint, where every process must end within `limit` seconds, with `EXIT_LOST` and a
line that names the process that it no longer hears of; and its restart, which must go on from that checkpoint and end
with the parameters of the first one, bit for bit.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.lvxattn.links import processes
from experiments.lvxattn.network import Network
from vtjax.account import record
from vtjax.errors import EXIT_LOST

HEARTBEAT = 10  # seconds without one after which a process counts as lost
STEPS, EVERY = 40, 10
CONFIG = "configs/lvxattn.py:tiny"
LIMIT = 3 * HEARTBEAT + 10
"""Seconds in which every process must end: heartbeats are sent and looked at a few times within HEARTBEAT."""


def command(workdir: Path, hosts: int, more: Sequence[str]) -> list[str]:
    """Of every process."""
    leaves = {"mesh.data": 1, "mesh.context": hosts, "steps": STEPS, "checkpoint.every": EVERY, "log_every": 1}
    leaves["heartbeat_timeout"] = HEARTBEAT
    words = [f"--config.{name}={value}" for name, value in leaves.items()]
    return [sys.executable, "-m", "vtjax", "run", f"--config={CONFIG}", f"--workdir={workdir}", *words, *more]


def whole(net: Network, workdir: Path, folder: Path, more: Sequence[str]) -> dict[str, Any]:
    """A run to its end: its result, and `resumed`, the step of the checkpoint that it started from (0 = none).

    Raises:
      RuntimeError: a process failed.
    """
    with processes(net, command(workdir, net.hosts, more), {}, folder) as children:
        codes = [child.wait(timeout=900) for child in children]
    said = (folder / "0.err").read_text(encoding="utf-8")
    if any(codes):
        raise RuntimeError(f"exit codes {codes}: {said[-2000:]}")
    found = re.search(r"checkpoints/(\d+)", said)
    return {**json.loads((workdir / "result.json").read_text()), "resumed": int(found[1]) if found else 0}


def broken(net: Network, workdir: Path, folder: Path, lost: int, more: Sequence[str]) -> list[dict[str, Any]]:
    """A run whose host `lost` is cut off in the step after a checkpoint: how each process ended, `seconds` after that,
    with which `code` and last `line`; None where it had not ended after `LIMIT` seconds."""
    with processes(net, command(workdir, net.hosts, more), {}, folder) as children:
        told = folder / "0.err"
        while f"step {EVERY + 2}/" not in told.read_text(encoding="utf-8"):
            if any(child.poll() is not None for child in children):
                raise RuntimeError(f"ended before its link was lost: {told.read_text(encoding='utf-8')[-2000:]}")
            time.sleep(0.02)
        net.cut(lost)
        start = time.monotonic()
        ended: list[dict[str, Any]] = [{"seconds": None, "code": None, "line": None} for _ in children]
        while time.monotonic() - start < LIMIT and any(one["code"] is None for one in ended):
            for index, (one, child) in enumerate(zip(ended, children, strict=True)):
                if one["code"] is None and child.poll() is not None:
                    lines = (folder / f"{index}.err").read_text(encoding="utf-8").splitlines()
                    one.update(seconds=round(time.monotonic() - start, 1), code=child.returncode, line=lines[-1])
            time.sleep(0.05)
    net.mend(lost)
    return ended


def checked(found: dict[str, Any]) -> list[str]:
    """What is not as it must be, one line each."""
    lines = []
    for index, one in enumerate(found["ended"]):
        # Who is cut off no longer hears the coordinator; who serves it no longer hears of the other one.
        expected = found["lost"] if index != found["lost"] else (1 if index == 0 else 0)
        if one["code"] != EXIT_LOST or f"process {expected} lost" not in (one["line"] or ""):
            lines.append(f"process {index} must end with {EXIT_LOST} and name process {expected}, found {one}")
    if found["resumed"] < EVERY or not found["equal"]:
        lines.append(f"the restart must resume from step {EVERY} or later to equal parameters, found {found}")
    return lines


def run(out: Path, rate: str, hosts: int = 2, lost: Sequence[int] = (1, 0), more: Sequence[str] = ()) -> int:
    """See the module's text; 1 where something is not as it must be."""
    wrong = []
    with Network(hosts, rate) as net, tempfile.TemporaryDirectory() as name:
        top = Path(name)
        straight = whole(net, top / "straight", top, more)["params_sha256"]
        for host in lost:
            workdir = top / f"lost{host}"
            ended = broken(net, workdir, top, host, more)
            after = whole(net, workdir, top, more)
            found = {
                "kind": "down", "n": hosts, "rate": rate, "config": CONFIG, "seed": 0, "steps": STEPS,
                "heartbeat_timeout": HEARTBEAT, "limit": LIMIT, "lost": host, "ended": ended,
                "resumed": after["resumed"], "equal": after["params_sha256"] == straight,
            }  # fmt: skip
            record.write(out, found)
            wrong += checked(found)
            told = ", ".join(f"process {i} after {one['seconds']} s ({one['code']})" for i, one in enumerate(ended))
            print(f"link of {host} down: {told}; resumed from step {after['resumed']}", file=sys.stderr)
    print(
        "\n".join(wrong) or "every process named the lost one, and the restart is the run it would have been",
        file=sys.stderr,
    )
    return 1 if wrong else 0
