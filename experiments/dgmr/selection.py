# SPDX-License-Identifier: Apache-2.0
"""What selecting neurons costs: the three forms beside LAPACK's pivoted QR and the released loop.

    python -m experiments.dgmr.selection times --torch-python=PATH_TO_A_PYTHON_WITH_TORCH   half an hour on 2 cores
    python -m experiments.dgmr.selection growth                                             minutes
    python -m experiments.dgmr.selection layers                                             all MLPs of the ViT-Ti/16

`times`: sides take turns on the same matrix, K = N, with as many threads as there are usable cores. `--sizes=MxN,...`
takes other sizes than those of ViT-Ti, OpenCLIP-g, half of DINOv2-g, EVA-CLIP-E+ and EVA-CLIP-8B. Above `--all-below`
entries only the blocked form runs, and dgeqp3 with --qr. dgeqp3 is scipy's, in float64, on the CPU; the released loop
is `selection_worker.py`, on a GPU by --torch-device=cuda. Every record says, besides, how greedy the picks of each form
are (the certificate, float64), and how many of dgeqp3's and of the released loop's picks they have in common, in place
and at all; that, too, on matrices of the other `KINDS`.

`growth`: the blocked form over M, N and K, one at a time. `layers`: the certificate and dgeqp3's order on real weights.

Appends to results/selection.jsonl. Times from a machine that did other work are worthless; `other_cores` says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import torch_side
from experiments.torch_side import Torch
from vtjax.account import record, timing
from vtjax.errors import InputError
from vtjax.ops import gram_schmidt
from vtjax.viz import tables

HERE = Path(__file__).resolve().parent
RECORDS = HERE / "results" / "selection.jsonl"
SIZES = "768x192,6144x1408,4096x1536,15360x1792,20480x4096"
KINDS = {
    "normal": "independent entries; the one that is timed",
    "decaying": "columns that decay by a factor of 20",
    "strong": "32 strong directions over a flat floor of 0.011, the hardest for a guard (spec section 4.2)",
}
ALL_BELOW = 10_000_000
BASE = (4096, 1024, 1024)
GROWTH: dict[str, Sequence[int]] = {
    "M": (1024, 2048, 4096, 8192, 16384),
    "N": (256, 512, 1024, 2048),
    "K": (128, 256, 512, 1024, 2048, 3072),
}


def matrix(height: int, width: int, kind: str, seed: int) -> np.ndarray:
    """float32 `[M, N]`, one of `KINDS`."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((height, width), np.float32)
    if kind == "decaying":
        rows *= (0.02 * np.exp(-3 * np.arange(width) / width)).astype(np.float32)
    elif kind == "strong":
        rotation = np.linalg.qr(rng.standard_normal((width, width), np.float32))[0]
        rows = (rows * np.where(np.arange(width) < 32, 1, 0.011).astype(np.float32)) @ rotation
    return rows


def selection(weights: np.ndarray, k: int, form: str) -> Callable[[], gram_schmidt.Selection]:
    """A call that selects, of weights that lie on the device; bad input is refused once."""
    placed = jnp.asarray(weights)
    run = jax.jit(lambda w: gram_schmidt.select_with_norms(w, k, form=form))
    return lambda: run(placed)


def pivots(weights: np.ndarray) -> Callable[[], np.ndarray]:
    """A call of dgeqp3 that returns the first N pivots."""
    import scipy.linalg

    columns = np.asfortranarray(weights.astype(np.float64).T)
    return lambda: scipy.linalg.qr(columns, mode="r", pivoting=True, check_finite=False)[1][: len(columns)]


def memory(weights: np.ndarray, k: int, form: str) -> dict[str, int]:
    """Bytes of the program's arguments and of its temporary memory, by XLA's own account."""
    program = jax.jit(lambda w: gram_schmidt.select_with_norms(w, k, form=form))
    stats = program.lower(jax.ShapeDtypeStruct(weights.shape, jnp.float32)).compile().memory_analysis()
    assert stats is not None
    return {"argument_bytes": stats.argument_size_in_bytes, "temporary_bytes": stats.temp_size_in_bytes}


def agreement(found: np.ndarray, other: np.ndarray) -> dict[str, int]:
    """Picks in common: at the same place, and at all."""
    return {"order": int((found == other).sum()), "set": len(set(found.tolist()) & set(other.tolist()))}


def judged(weights: np.ndarray, picks: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """`shortfall` of every side's picks, and `agreement` of ours with the others'."""
    ours = [side for side in picks if side in gram_schmidt.FORMS]
    return {
        "shortfall": {side: gram_schmidt.shortfall(weights, found) for side, found in picks.items()},
        "agreement": {
            side: {form: agreement(picks[form], other) for form in ours}
            for side, other in picks.items()
            if side not in gram_schmidt.FORMS
        },
    }


def times(height: int, width: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The record of one size, then of the same size with the other kinds of matrix, untimed."""
    small = height * width <= options.all_below
    for kind in KINDS:
        weights, picks = matrix(height, width, kind, options.seed), dict[str, np.ndarray]()
        with contextlib.ExitStack() as stack:
            measures: dict[str, timing.Measure] = {}
            forms = [form for form in reversed(gram_schmidt.FORMS) if small or form == "blocked"]
            for form in forms:
                call = selection(weights, width, form)
                picks[form], measures[form] = np.asarray(call().indices), timing.timer(call)
            if small or options.qr:
                pivot = pivots(weights)
                picks["dgeqp3"], measures["dgeqp3"] = pivot(), timing.timer(pivot)
            about: dict[str, Any] = {}
            if (small or options.torch_device != "cpu") and options.torch_python:
                torch = stack.enter_context(contextlib.closing(worker(options, weights, width, stack)))

                def released(calls: int, torch: Any = torch) -> Any:
                    return torch.ask("select", calls=calls)["seconds"]

                measures["released"] = released
                picks["released"] = np.array(torch.ask("select", calls=1)["picks"])
                about = torch.ask("about") | {"torch_device": options.torch_device}
            fields: dict[str, Any] = {"kind": "times", "M": height, "N": width, "K": width, "matrix": kind}
            if kind == "normal":
                pids = [about.pop("pid")] if about else []
                result = timing.compare(measures, rounds=options.rounds, calls=1, warmup=1, pause=0.3, pids=pids)
                others = [side for side in measures if side != "blocked"]
                fields |= {
                    **result.summary(),
                    "ratio": {side: result.ratio(side, "blocked") for side in others},
                    "ratio_range": {side: result.ratio_range(side, "blocked") for side in others},
                    "memory": {form: memory(weights, width, form) for form in forms},
                }
            about.pop("pid", None)
        yield {**fields, **judged(weights, picks), **about}


def worker(options: argparse.Namespace, weights: np.ndarray, k: int, stack: contextlib.ExitStack) -> Torch:
    """The process of the released loop, which has read the weights."""
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    np.save(Path(folder) / "weights.npy", weights)
    torch = Torch(options.torch_python, len(os.sched_getaffinity(0)), worker=HERE / "selection_worker.py")
    torch.ask("load", path=str(Path(folder) / "weights.npy"), k=k, device=options.torch_device)
    return torch


def growth(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The blocked form over one size, the others as in `BASE`; K grows with N, as it does in the method."""
    for axis, values in GROWTH.items():
        cases = {}
        for value in values:
            height, width, k = (max(size // options.shrink, 1) for size in BASE)
            value //= options.shrink
            height, width, k = {"M": (value, width, k), "N": (height, value, value), "K": (height, width, value)}[axis]
            cases[str(value)] = timing.timer(selection(matrix(height, width, "normal", options.seed), k, "blocked"))
        result = timing.compare(cases, rounds=options.rounds, calls=1, warmup=1, pause=0.1)
        base = dict(zip("MNK", (size // options.shrink for size in BASE), strict=True))
        yield {"kind": "growth", "axis": axis, **base, "values": list(map(int, cases)), **result.summary()}


def layers(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every MLP of the pretrained ViT-Ti/16, K = N."""
    import vtjax

    params = vtjax.load("vit_ti16_augreg").params
    names = sorted(name for name in params if name.startswith("block_"))
    stacked = np.stack([np.asarray(params[name]["mlp"]["up"]["kernel"]).T for name in names])
    k = stacked.shape[2]
    exact = [pivots(weights)() for weights in stacked]
    for form in gram_schmidt.FORMS:
        found = np.asarray(gram_schmidt.select_layers(stacked, k, form=form).indices)
        same = [agreement(ours, theirs) for ours, theirs in zip(found, exact, strict=True)]
        falls = [gram_schmidt.shortfall(weights, ours) for weights, ours in zip(stacked, found, strict=True)]
        sizes = dict(zip("LMN", stacked.shape, strict=True))
        yield {"kind": "layers", "weights": "vit_ti16_augreg", **sizes, "K": k, "form": form} | {
            "shortfall": falls,
            "order": [s["order"] for s in same],
            "set": [s["set"] for s in same],
        }


def main(arguments: list[str] | None = None) -> int:
    """See the module's text; the exit code is 2 for bad input."""
    parser = argparse.ArgumentParser(prog="selection", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", choices=("times", "growth", "layers"))
    parser.add_argument("--torch-python", help="a Python that has torch: the released loop runs, too")
    parser.add_argument("--torch-device", default="cpu", help="where it runs (default: %(default)s)")
    parser.add_argument("--sizes", default=SIZES, help="(default: %(default)s)")
    parser.add_argument("--all-below", type=int, default=ALL_BELOW, help="entries (default: %(default)s)")
    parser.add_argument("--qr", action="store_true", help="dgeqp3 at every size")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: %(default)s)")
    parser.add_argument("--shrink", type=int, default=1, help="of growth: divides all sizes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(RECORDS))
    options = parser.parse_args(arguments)
    count = 0
    try:
        for fields in chosen(options):
            threads, seed = len(os.sched_getaffinity(0)), {"seed": options.seed}
            written = record.write(options.output, {**fields, **seed, "threads": threads})
            say(written)
            count += 1
    except InputError as error:
        print(f"selection: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"records": count}))
    return 0


def chosen(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The records that are asked for."""
    if options.what != "times":
        yield from {"growth": growth, "layers": layers}[options.what](options)
        return
    for size in options.sizes.split(","):
        try:
            height, width = map(int, size.split("x"))
        except ValueError:
            raise InputError(f"--sizes must be like {SIZES}, found {size!r}") from None
        if not 1 <= width <= height:
            raise InputError(f"--sizes must have 1 <= N <= M, found {size!r}")
        yield from times(height, width, options)


def say(r: Mapping[str, Any]) -> None:
    """Prints a record."""
    sides = [name for name in r if isinstance(r[name], dict) and "median_s" in r[name]]
    title = " ".join(f"{name}={r[name]}" for name in ("axis", "form", "matrix", "L", "M", "N", "K") if name in r)
    print(f"\n{r['kind']} {title}", file=sys.stderr)
    if sides:
        rows = [(s, r[s]["median_s"], r[s]["min_s"], r.get("ratio", {}).get(s)) for s in sides]
        print(tables.text(("", "median s", "min s", "over blocked"), rows), file=sys.stderr)
        torch_side.warn(title, r)
    for name in ("shortfall", "agreement", "order"):
        if name in r:
            print(f"  {name}: {r[name]}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
