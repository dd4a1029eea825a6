# SPDX-License-Identifier: Apache-2.0
"""The local attention kernels on one GPU or TPU: their share of what matrix products reach there, and which tiles win.

    python -m experiments.lvxattn.kernels share      Llama 3.2 Vision's heads, 65536 keys: about a minute
    python -m experiments.lvxattn.kernels shapes     other tiles of the GPU kernels: minutes, mostly compiling
    python -m experiments.lvxattn.kernels share --head-dim 64 --keys 262144

A share is operations per second over those of a bfloat16 product of large matrices, timed in turns with it in the same
run. Operations of the forward pass are 4 S_Q S_K H D, of the backward pass 10, as is the custom; dQ and dK, dV being
two kernels, 14 are done (`executed`). The aim is 70 % forward. "before" is the same under a mask, each row seeing the
frames before it: operations are those of pairs that are seen, so that its share falls where skipping costs or tiles are
seen in part. "chunked" is the form in plain JAX that the kernels replace. Records go to results/kernels.jsonl; a timing
means nothing on a device that does other work.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vtjax.account import record, timing
from vtjax.errors import InputError
from vtjax.ops import partial_softmax, partial_softmax_gpu, partial_softmax_tpu
from vtjax.ops.partial_softmax_gpu import Shape

RECORDS = Path(__file__).resolve().parent / "results" / "kernels.jsonl"
KERNELS: dict[str, Any] = {"gpu": partial_softmax_gpu, "tpu": partial_softmax_tpu}
MATRIX = 8192
FRAMES = 64


class Case(NamedTuple):
    """Sizes of a call on one device."""

    rows: int = 2048
    keys: int = 65536
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128


def inputs(case: Case) -> tuple[jax.Array, ...]:
    """q, k, v, do, bfloat16, standard normal."""
    rows, keys, heads, kv_heads, d = case
    shapes = [(1, rows, heads, d), (1, keys, kv_heads, d), (1, keys, kv_heads, d), (1, rows, heads, d)]
    places = jax.random.split(jax.random.key(0), 4)
    return tuple(jax.random.normal(p, s, jnp.bfloat16) for p, s in zip(places, shapes, strict=True))


def rules(case: Case) -> dict[str, dict[str, Any]]:
    """Masks: everything is seen, and only the frames before a row, which come at regular distances."""
    number = 1 + np.arange(case.keys)[None] * FRAMES // case.keys
    latest = np.arange(case.rows)[None] * FRAMES // case.rows
    ids = {"low": np.ones_like(latest), "number": number}
    found = {"dense": {**ids, "high": np.full_like(latest, FRAMES)}, "before": {**ids, "high": latest}}
    return {name: {key: jnp.asarray(x, jnp.int32) for key, x in rule.items()} for name, rule in found.items()}


def operations(case: Case, rule: dict[str, Any]) -> dict[str, float]:
    """Of the pairs that are seen: forward, backward, and what two backward kernels do."""
    number = np.sort(np.asarray(rule["number"][0]))
    low, high = np.asarray(rule["low"][0]), np.asarray(rule["high"][0])
    seen = np.searchsorted(number, high, "right") - np.searchsorted(number, np.maximum(low, 1), "left")
    pairs = float(np.maximum(seen, 0).sum()) * case.heads * case.head_dim
    return {"forward": 4 * pairs, "backward": 10 * pairs, "backward_executed": 14 * pairs}


def passes(module: Any, case: Case, rule: dict[str, Any], **options: Any) -> dict[str, Callable[[], Any]]:
    """Forward and backward of a form; `options` by name of the pass."""
    q, k, v, do = inputs(case)
    fixed = {"scale": case.head_dim**-0.5}
    names = tuple(rule)

    def forward(q: Any, k: Any, v: Any, *ids: Any) -> Any:
        return module.forward(q, k, v, **dict(zip(names, ids, strict=True)), **fixed, **options.get("forward", {}))

    def backward(q: Any, k: Any, v: Any, do: Any, lse: Any, delta: Any, *ids: Any) -> Any:
        more = {**dict(zip(names, ids, strict=True)), **fixed, **options.get("backward", {})}
        return module.backward(q, k, v, do, lse, delta, **more, dtype=jnp.bfloat16)

    ids = tuple(rule.values())
    there, back = jax.jit(forward), jax.jit(backward)
    o, lse = there(q, k, v, *ids)
    delta = (do.astype(jnp.float32) * o).sum(-1)
    return {"forward": lambda: there(q, k, v, *ids), "backward": lambda: back(q, k, v, do, lse, delta, *ids)}


def peak(size: int) -> Callable[[], Any]:
    """A bfloat16 product of square matrices."""
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in jax.random.split(jax.random.key(1)))
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.bfloat16))
    return lambda: product(a, b)


def timed(candidates: dict[str, Callable[[], Any]], rounds: int) -> timing.Comparison:
    return timing.compare({n: timing.timer(f) for n, f in candidates.items()}, rounds=rounds, calls=5, warmup=2)


def share(kernel: str, case: Case, *, rounds: int, matrix: int = MATRIX, interpret: bool = False) -> dict[str, Any]:
    """Times the kernel beside matrix products and the chunked form."""
    more: dict[str, Any] = {"interpret": interpret}
    candidates: dict[str, Callable[[], Any]] = {"matmul": peak(matrix)}
    done: dict[str, float] = {"matmul": 2.0 * matrix**3}
    for name, rule in rules(case).items():
        for form, module, options in ((kernel, KERNELS[kernel], more), ("chunked", partial_softmax, {})):
            for which, call in passes(module, case, rule, forward=options, backward=options).items():
                candidates[f"{form}_{which}_{name}"] = call
                done[f"{form}_{which}_{name}"] = operations(case, rule)[which]
    found = timed(candidates, rounds)
    rates = {name: done[name] / found.timings[name].median for name in candidates}
    shares = {name: rate / rates["matmul"] for name, rate in rates.items() if name != "matmul"}
    executed = {name: shares[name] * 14 / 10 for name in shares if name.startswith(f"{kernel}_backward")}
    return {
        **{"kind": "share", "kernel": kernel, "matrix": matrix, "seed": 0, **case._asdict(), **found.summary()},
        **{"operations_per_s": rates, "share": shares, "executed": executed},
    }


def shapes(
    case: Case, grid: dict[str, list[Shape]], *, rounds: int, interpret: bool = False
) -> Iterator[dict[str, Any]]:
    """Times tiles of the GPU kernels, where everything is seen; those that do not compile are said to."""
    rule = rules(case)["dense"]
    for name, tried in grid.items():
        for shape in tried:
            which, option = ("forward", "shape") if name == "forward" else ("backward", name)
            options: dict[str, Any] = {side: {"interpret": interpret} for side in ("forward", "backward")}
            options[which][option] = shape
            told = {"kind": "shapes", "kernel": "gpu", "tiles_of": name, **shape._asdict(), "seed": 0, **case._asdict()}
            try:
                call = passes(partial_softmax_gpu, case, rule, **options)[which]
                found = timed({which: call}, rounds)
            except jax.errors.JaxRuntimeError as error:  # too much shared memory, as a rule
                yield {**told, "failed": str(error).splitlines()[0][:200]}
                continue
            rate = operations(case, rule)[which] / found.timings[which].median
            yield {**told, **found.summary(), "operations_per_s": rate}


def grid() -> dict[str, list[Shape]]:
    """Tiles that are tried; a backward pass is timed whole, with the other kernel as it is."""
    ways = list(itertools.product((4, 8), (2, 3, 4)))
    return {
        name: [Shape(r, c, *way) for r, c in sizes for way in ways]
        for name, sizes in {
            "forward": [(64, 64), (128, 32), (128, 64), (128, 128)],
            "dq_shape": [(64, 32), (64, 64), (128, 32), (128, 64)],
            "dkv_shape": [(32, 64), (32, 128), (64, 64), (64, 128)],
        }.items()
    }


def main(arguments: list[str]) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("share", "shapes"))
    for field, value in Case()._asdict().items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args(arguments)
    kernel = jax.default_backend()
    wanted = KERNELS if options.what == "share" else ("gpu",)
    if kernel not in wanted:
        raise InputError(f"kernels are timed on a {' or '.join(map(str.upper, wanted))}, found {kernel!r}")
    case = Case(*(getattr(options, field) for field in Case._fields))
    if options.what == "share":
        found: Any = [share(kernel, case, rounds=options.rounds)]
    else:
        found = shapes(case, grid(), rounds=options.rounds)
    for one in found:
        record.write(options.out, one)
        said = one.get("share") or {name: one.get(name) for name in ("tiles_of", *Shape._fields, "operations_per_s")}
        print(said, file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
