# SPDX-License-Identifier: Apache-2.0
"""Bytes that a device sends in compiled programs, beside those of the formulas (`strategies.sent`), to the byte.

    python -m experiments.lvxattn.traffic        every strategy on 2, 3, 4 and 8 CPU devices; minutes

Programs are compiled for CPU devices, where XLA leaves collectives as they were written; for TPUs it may make an
all-reduce of a reduce-scatter. On CPUs it widens bfloat16 before it is sent, so all of this is float32. Forward and
backward pass are programs of their own: in one program XLA gathers the queries once for both.

An all-gather, all-to-all and reduce-scatter of x bytes sends (n - 1) / n of them from each device, an all-reduce twice
that, a permute x. Numbers of images and intervals (int32) travel with the ring's blocks and are counted apart. Every
program is compiled a second time with twice as many keys: with queries on the way, no collective may change. Records go
to results/traffic.jsonl; exit code 1 where a figure differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).resolve().parent / "results" / "traffic.jsonl"
DEVICES = (2, 3, 4, 8)
MOVING_KEYS = ("ring_kv", "ring_kv_expanded", "ulysses")


def sizes(n: int) -> dict[str, int]:
    """Of the case that is compiled: four query heads to a key head."""
    return {"batch": 2, "rows": 4 * n, "keys": 24 * n, "heads": 4 * n, "kv_heads": n, "head_dim": 16, "bytes": 4}


def passes(mesh: Any, strategy: str, case: Any) -> tuple[Any, ...]:
    """HLO of the forward and of the backward pass."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from vtjax.parallel.xattn import cross_attention

    split = NamedSharding(mesh, P(None, mesh.axis_names[0]))
    rows = NamedSharding(mesh, P()) if strategy == "replicated_q" else split
    q = jax.device_put(jnp.ones((case.batch, case.rows, case.heads, case.head_dim)), rows)
    k, v = (
        jax.device_put(jnp.full((case.batch, case.keys, case.kv_heads, case.head_dim), x), split) for x in (1.0, 2.0)
    )

    def attend(q: Any, k: Any, v: Any) -> Any:
        return cross_attention(q, k, v, mesh=mesh, axis=mesh.axis_names, strategy=strategy, return_lse=True)

    forward = jax.jit(attend)
    out, pull = jax.vjp(forward, q, k, v)
    backward = jax.jit(lambda pull, given: pull(given))
    programs = forward.lower(q, k, v), backward.lower(pull, out)
    return tuple(program.compile().as_text() for program in programs)


def counted(hlo: str, n: int) -> dict[str, Any]:
    """`sent`: bytes per device; `numbers`: those of int32; `largest`: bytes of the largest collective; `counts`: of
    floating-point collectives, by kind."""
    from vtjax.account import aot

    share = {"collective-permute": 1.0, "all-reduce": 2 * (n - 1) / n}
    found: dict[str, float] = {"sent": 0.0, "numbers": 0.0}
    counts: Counter[str] = Counter()
    largest = 0
    for one in aot.each_collective(hlo):
        which = "numbers" if one.dtype == "s32" else "sent"
        found[which] += one.times * one.bytes * share.get(one.kind, (n - 1) / n)
        if which == "sent":
            counts[one.kind] += one.times
            largest = max(largest, one.bytes)
    return {**{name: round(value) for name, value in found.items()}, "largest": largest, "counts": dict(counts)}


def compare(n: int, strategy: str) -> dict[str, Any]:
    """One record: formulas and programs of both passes; and `grows`, whether twice as many keys make more traffic."""
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from vtjax.parallel import strategies

    mesh = Mesh(np.array(jax.devices()[:n]), ("cp",))
    case = strategies.Case(n, **sizes(n))
    twice = case._replace(keys=2 * case.keys)
    names = ("forward", "backward")
    found = {name: counted(hlo, n) for name, hlo in zip(names, passes(mesh, strategy, case), strict=True)}
    more = [counted(hlo, n) for hlo in passes(mesh, strategy, twice)]
    formula = strategies.sent(case, strategy)
    return {
        "n": n,
        "strategy": strategy,
        **sizes(n),
        **found,
        "formula": {"forward": formula.forward, "backward": formula.backward},
        "grows": any(a["sent"] != b["sent"] for a, b in zip(found.values(), more, strict=True)),
    }


def wrong(found: dict[str, Any]) -> list[str]:
    """What differs from the formulas, one line each."""
    who = f"n={found['n']} {found['strategy']}"
    lines = [
        f"{who} {name}: {found[name]['sent']:,} bytes are sent, expected {found['formula'][name]:,}"
        for name in ("forward", "backward")
        if found[name]["sent"] != found["formula"][name]
    ]
    if found["grows"] != (found["strategy"] in MOVING_KEYS):
        lines.append(f"{who}: what is sent {'grows' if found['grows'] else 'does not grow'} with the keys")
    return lines


def main(arguments: list[str]) -> int:
    """See the module's text."""
    from vtjax.parallel.strategies import STRATEGIES

    known = [s for s in STRATEGIES if s not in ("gspmd", "local")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="*", default=DEVICES)
    parser.add_argument("--strategy", nargs="*", default=known, choices=known)
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        for n in options.n:
            for strategy in options.strategy:
                print(json.dumps(compare(n, strategy)), flush=True)
        return 0
    from vtjax.account import record

    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    given = ["--n", *map(str, options.n), "--strategy", *options.strategy]
    words = [sys.executable, "-m", "experiments.lvxattn.traffic", "--worker", *given]
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    missed = []
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            found = json.loads(line)
            record.write(options.out, found)
            missed += wrong(found)
            told = ", ".join(f"{name} {found[name]['sent']:,} {found[name]['counts']}" for name in found["formula"])
            print(f"n={found['n']} {found['strategy']}: {told}", file=sys.stderr, flush=True)
    print("\n".join(missed) or "as the formulas say", file=sys.stderr)
    return 1 if missed or child.returncode else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
