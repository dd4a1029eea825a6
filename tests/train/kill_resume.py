# SPDX-License-Identifier: Apache-2.0
"""Kills training processes at random and compares what the resumed runs arrive at, bit for bit.

    python -m tests.train.kill_resume --kills 20

Half of the kills hit a random step, half a save while its files are being written. Every run is killed twice before it
may finish. Prints one line of JSON; exits 1 where a `params_sha256` differs from the uninterrupted run's.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ARGS = ["--steps=40", "--every=5", "--hidden=200000", "--eval-every=10", "--ema=0.99"]


def start(workdir: Path, args: list[str]) -> subprocess.Popen[str]:
    """A training process."""
    command = [sys.executable, "-m", "tests.train.toy", str(workdir), *args]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(workdir: Path, args: list[str]) -> str:
    """Runs to the end; the `params_sha256` of the result."""
    child = start(workdir, args)
    out, err = child.communicate()
    assert child.returncode == 0, err
    assert json.loads((workdir / "result.json").read_text())["params_sha256"] == out.strip()
    return out.strip()


def wait_for_step(child: subprocess.Popen[str], workdir: Path, step: int) -> None:
    """Returns as soon as `metrics.jsonl` has that step."""
    lines = workdir / "metrics.jsonl"
    while not (lines.exists() and f'{{"step": {step},' in lines.read_text()):
        _alive(child)


def wait_for_save(child: subprocess.Popen[str], workdir: Path, step: int) -> None:
    """Returns while the files of a save at or after `step` are being written."""
    while True:
        names = [p.name for p in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")]
        if any(int(name.split(".")[0]) >= step for name in names):
            return
        _alive(child)


def _alive(child: subprocess.Popen[str]) -> None:
    if child.poll() is not None:
        raise RuntimeError(f"the run ended before it could be killed: {child.stderr.read() if child.stderr else ''}")
    time.sleep(0.002)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    counts = {"step": 0, "save": 0, "unfinished": 0}
    shas: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        straight = finish(Path(temporary) / "straight", ARGS)
        while counts["step"] + counts["save"] < options.kills:
            workdir = Path(temporary) / f"run{len(shas)}"
            for low, high in ((2, 19), (21, 39)):
                child = start(workdir, [*ARGS, "--delay=0.02"])
                at, kind = random.randint(low, high), ("step", "save")[(counts["step"] + counts["save"]) % 2]
                if kind == "step":
                    wait_for_step(child, workdir, at)
                    time.sleep(random.uniform(0.0, 0.05))
                else:
                    wait_for_save(child, workdir, at // 5 * 5)
                child.kill()
                child.communicate()
                counts[kind] += 1
                saves = [p for p in (workdir / "checkpoints").iterdir() if not (p / "manifest.json").exists()]
                counts["unfinished"] += bool(saves)
            shas.append(finish(workdir, ARGS))
            print(
                f"{sum(counts.values()) - counts['unfinished']} kills, equal: {shas[-1] == straight}", file=sys.stderr
            )
    equal = sum(sha == straight for sha in shas)
    print(json.dumps({"kills": counts, "runs": len(shas), "equal": equal, "params_sha256": straight}))
    return 0 if equal == len(shas) else 1


if __name__ == "__main__":
    sys.exit(main())
