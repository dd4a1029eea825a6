# SPDX-License-Identifier: Apache-2.0
"""Distributed cross-attention between processes whose links have a limited rate (`network.py`): Linux, root, iproute2.

    python -m experiments.lvxattn.links op          the operation: time of every strategy against S_K / S_Q
    python -m experiments.lvxattn.links forward     its forward pass alone, as in prefill
    python -m experiments.lvxattn.links decode      one new row of text over keys that lie where they were encoded
    python -m experiments.lvxattn.links step        a training step of a small multimodal model
    python -m experiments.lvxattn.links collectives what of a link's rate the library reaches
    python -m experiments.lvxattn.links down        a link is lost in the middle of a run; not a timing
    ... --rate none                                 links as fast as the machine, for honesty

Strategies take turns in one run; every process has an equal share of the cores and one thread. "silent" is the same
program without its collectives: the time of the work; what is above it is communication. Processes share one memory and
its bandwidth. Records go to results/links.jsonl; what is there already is not run again. It means nothing on a machine
that does other work.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.lvxattn import network
from experiments.lvxattn.network import Network
from vtjax.account import record, timing
from vtjax.errors import InputError
from vtjax.parallel import strategies
from vtjax.viz import tables

RECORDS = Path(__file__).resolve().parent / "results" / "links.jsonl"
PORT = 5100
PROCESSES = (2, 3, 4)
WIDE = {"heads": 28, "kv_heads": 4, "head_dim": 64}
"""mPLUG-Owl3-7b's heads, of half its head width."""
RATIOS = (2, 8, 32, 128, 365)
"""Visual tokens per row of text; 365 is the paper's 2916K to 8K."""
SMALL = {"heads": 16, "kv_heads": 4, "head_dim": 64, "side": 27, "tower_width": 16, "depth": 2, "width": 32}
"""A narrow decoder of wide heads, with a quarter as many key heads; 729 tokens per frame. In the published models the
width is several times that of all keys: projections are a larger share of the work, and links are slower per FLOP."""
STRATEGIES = ("ring_kv", "gather_q", "gather_q_scatter", "ring_q", "ring_kv_expanded", "ulysses")
DECODING = ("ring_kv", "replicated_q", "gather_q")
PATIENCE = 900  # seconds without a result


def cases(what: str, n: int, tiny: bool) -> list[dict[str, Any]]:
    """What is measured with n processes."""
    rounds = {"rounds": 2, "calls": 1, "warmup": 1} if tiny else {"rounds": 5, "calls": 1, "warmup": 1}
    able = [s for s in STRATEGIES if s != "ulysses" or WIDE["kv_heads"] % n == 0]
    rows, ratios = (12, (4, 16)) if tiny else (24, RATIOS)
    shared = {
        "kind": "op",
        "rows": rows,
        **WIDE,
        "strategies": able,
        "silent": ["ring_kv", "gather_q", "ring_q"],
        **rounds,
    }
    if what == "op":
        return [{**shared, "ratio": r, "keys": r * rows} for r in ratios]
    if what == "forward":
        return [{**shared, "ratio": r, "keys": r * rows, "passes": "forward"} for r in ratios[-1:]]
    if what == "decode":
        many = {**rounds, "rounds": 2 * rounds["rounds"]}
        lengths = (256,) if tiny else (4096, 32768)
        wanted = {"kind": "decode", "passes": "forward", "rows": 1, "strategies": DECODING, "silent": DECODING[:2]}
        return [{**WIDE, **wanted, **many, "ratio": keys, "keys": keys} for keys in lengths]
    if what == "collectives":
        return [{"kind": "collectives", "size": 2**20 if tiny else 24 * 2**20, **rounds}]
    side = 5 if tiny else SMALL["side"]
    shown = STRATEGIES[:2] if tiny else STRATEGIES[:2] + STRATEGIES[3:5]
    shared = {"kind": "step", **SMALL, "side": side, "strategies": shown, "silent": STRATEGIES[:2], **rounds}
    found = []
    for frames in (n, 2 * n, 4 * n) if n == 4 and not tiny else (n,):
        keys = frames * side**2
        found.append({**shared, "frames": frames, "rows": 2 * frames, "keys": keys, "ratio": keys / (2 * frames)})
    return found


def shares(n: int) -> list[list[int]]:
    """Cores of every process: one of its own, or all of them where they cannot be shared evenly otherwise."""
    cores = sorted(os.sched_getaffinity(0))
    if n % len(cores):
        return [cores] * n
    return [[cores[index * len(cores) // n]] for index in range(n)]


@contextlib.contextmanager
def processes(net: Network, words: Sequence[str], more: dict[str, str], folder: Path, **options: Any) -> Iterator[Any]:
    """The same command on every host, as one run of JAX; output in `folder`. Yields the children."""
    children = []
    with contextlib.ExitStack() as stack:
        for host, cores in enumerate(shares(net.hosts)):
            environment = {
                "JAX_COORDINATOR_ADDRESS": f"{net.address(0)}:{PORT}",
                "JAX_NUM_PROCESSES": str(net.hosts),
                "JAX_PROCESS_ID": str(host),
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
                **more,
            }
            out = stack.enter_context(open(folder / f"{host}.out", "w", encoding="utf-8"))
            err = stack.enter_context(open(folder / f"{host}.err", "w", encoding="utf-8"))
            children.append(net.start(host, words, cores, environment, stdout=out, stderr=err, **options))
        try:
            yield children
        finally:
            for child in children:
                child.kill()
                child.wait()


def measured(net: Network, wanted: list[dict[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    """Results of the cases, as they come.

    Raises:
      RuntimeError: a process failed, or nothing was heard for `PATIENCE` seconds.
    """
    here, there = os.pipe()
    words = [sys.executable, "-m", "experiments.lvxattn.links_worker", json.dumps(wanted)]
    with processes(net, words, {"LINKS_PIPE": str(there)}, folder, pass_fds=(there,)) as children:
        os.close(there)
        with os.fdopen(here, encoding="utf-8") as lines:
            for _ in wanted:
                meter, heard = timing.OtherLoad([child.pid for child in children]), time.monotonic()
                while not select.select([lines], [], [], 1.0)[0]:
                    failed = [i for i, child in enumerate(children) if child.poll()]
                    if failed or time.monotonic() - heard > PATIENCE:
                        said = (folder / f"{(failed or [0])[0]}.err").read_text(encoding="utf-8")[-3000:]
                        raise RuntimeError(f"process {failed or 'none'} failed, or was not heard of in time:\n{said}")
                line = lines.readline()
                if not line:
                    raise RuntimeError((folder / "0.err").read_text(encoding="utf-8")[-3000:])
                yield {**json.loads(line), "other_cores": meter.cores()}


def sent(n: int, case: dict[str, Any]) -> dict[str, Any]:
    """Bytes per process and layer by strategy, of the passes that are timed."""
    if "keys" not in case:
        return {}
    sizes = {name: case[name] for name in ("rows", "keys", "heads", "kv_heads", "head_dim")}
    known = strategies.Case(n=n, batch=1, **sizes, bytes=4)
    both = {s: strategies.sent(known, s) for s in case["strategies"]}
    forward = case.get("passes") == "forward"
    return {"sent": {s: round(b.forward + (0 if forward else b.backward)) for s, b in both.items()}}


def key(r: dict[str, Any]) -> str:
    """By which a case is known to be recorded."""
    names = ("kind", "n", "rate", "rows", "keys", "heads", "head_dim", "depth", "passes", "size", "strategies")
    return json.dumps([r.get(name) for name in names])  # tuples become lists, as in a record


def run(what: str, counts: Sequence[int], rate: str, out: Path, tiny: bool) -> None:
    """Measures and records what is not recorded yet."""
    known = {key(r) for r in tables.read_jsonl(out)} if out.exists() else set()
    for n in counts:
        shared = {"n": n, "rate": rate}
        wanted = [case for case in cases(what, n, tiny) if key({**case, **shared}) not in known]
        if not wanted:
            print(f"{what}, {n} processes, {rate}: recorded", file=sys.stderr)
            continue
        with Network(n, rate) as net, tempfile.TemporaryDirectory() as folder:
            shared |= {"goodput": network.goodput(net), "cores_each": len(os.sched_getaffinity(0)) / n}
            start = time.monotonic()
            for case, found in zip(wanted, measured(net, wanted, Path(folder)), strict=True):
                spent, start = time.monotonic() - start, time.monotonic()
                record.write(out, {**case, **shared, **found, **sent(n, case), "seed": 0})
                print(f"{n} processes, {rate}, {told(case, found)} ({spent:.0f} s)", file=sys.stderr, flush=True)


def told(case: dict[str, Any], found: dict[str, Any]) -> str:
    """A line for people: milliseconds of every candidate, with those of its work in parentheses."""
    seconds = found["seconds"]
    each = []
    for name in (name for name in seconds if not name.endswith(" silent")):
        work = seconds.get(f"{name} silent")
        each.append(
            f"{name} {1e3 * seconds[name]['median_s']:.0f}" + (f" ({1e3 * work['median_s']:.0f})" if work else "")
        )
    size = f"S_Q {case['rows']}, S_K {case['keys']}: " if "rows" in case else ""
    return f"{case['kind']} {size}{', '.join(each)} ms"


def main(arguments: list[str]) -> int:
    """See the module's text; exit code 2 where this machine cannot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("op", "forward", "decode", "step", "collectives", "down"))
    parser.add_argument("--processes", type=int, nargs="*", default=PROCESSES)
    parser.add_argument("--rate", default="1gbit", help="of a link, as tc says it, or none")
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("--tiny", action="store_true", help="sizes for tests; the figures mean nothing")
    options = parser.parse_args(arguments)
    try:
        if options.what == "down":
            from experiments.lvxattn import links_down

            return links_down.run(options.out, options.rate)
        run(options.what, options.processes, options.rate, options.out, options.tiny)
    except InputError as error:
        print(f"links: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
