# SPDX-License-Identifier: Apache-2.0
"""Speed beside PyTorch on the CPU: timm's ViT-Ti and ViT-S forward, and a training step, against the same in vtjax.

    python -m experiments.vit.beside_torch --torch-python=PATH_TO_A_PYTHON_WITH_TORCH_AND_TIMM

Both sides get the same weights, images and threads in float32, and are first checked to compute the same: logits, and
the losses of three training steps. They run in two processes that take turns; while one measures the other waits for a
line on a pipe, and the CPU time that it nevertheless uses is recorded. timm runs with fused attention, in inference
mode for the forward pass; its training step is eager with a fused or foreach AdamW. vtjax's training step is that of
`vtjax run`, with its gradient norm and its guard against non-finite updates.

Run it with and without GLIBC_TUNABLES=glibc.malloc.hugetlb=1, which both processes inherit: XLA allocates the temporary
memory of a step anew each time, and huge pages save a quarter of a training step in page faults.

Appends one record per case to results/beside_torch.jsonl; `python -m experiments.vit.tables` puts them into the README.
A ratio from a machine that did other work is worthless: PyTorch loses far more by it than XLA. The run says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vtjax.account import record, timing
from vtjax.errors import InputError
from vtjax.viz import tables

HERE = Path(__file__).resolve().parent
MODELS = {"ViT-Ti/16": ("vit_tiny_patch16_224", 192, 3), "ViT-S/16": ("vit_small_patch16_224", 384, 6)}
CASES = [("forward", model, batch) for model in MODELS for batch in (1, 16)] + [("train", "ViT-Ti/16", 16)]
LR, WEIGHT_DECAY = 1e-4, 0.05
IDLE = 0.1
"""Cores that other work may use before a run says that its ratios are worthless."""


class Torch:
    """The other process: `worker` under another Python."""

    def __init__(self, python: str, threads: int, policy: str = "default", worker: Path = HERE / "torch_worker.py"):
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
            raise InputError(f"--torch-python must be a Python with torch and timm, found {python}: {error}") from None

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


class Jax:
    """This process: one model and one batch."""

    def __init__(self, model: str, batch: int, seed: int):
        import jax

        from configs import vit
        from experiments.vit import main as experiment
        from vtjax.parallel import mesh
        from vtjax.train.program import Program

        _, width, heads = MODELS[model]
        config = vit.classification(steps=1_000_000, batch_size=batch)
        config.seed = seed
        config.optim.update(lr=LR, weight_decay=WEIGHT_DECAY, schedule="constant", warmup=0)
        config.model = vit.model(width=width, heads=heads, image_size=(224, 224))
        task = experiment.build(config)
        self.spec = task.spec
        self.program = Program(task, config, mesh.make(config.mesh))
        self.state, self.frozen = self.program.init()
        # Fresh heads are 0, and a comparison of zeros shows nothing.
        rng = np.random.default_rng(seed + 1)
        noisy = jax.tree.map(
            lambda p: np.asarray(p) + 0.02 * rng.standard_normal(p.shape, np.float32), self.state.params
        )
        self.state = dataclasses.replace(self.state, params=self.program.place_params(noisy))
        rng = np.random.default_rng(seed)
        self.images = rng.standard_normal((batch, 224, 224, 3), np.float32)
        labels = rng.integers(0, 1000, batch)
        self.batch = mesh.place(
            {"image": self.images, "label": labels, "valid": np.ones(batch, bool)}, self.program.mesh
        )
        self.knobs = self.program.knobs()
        self.steps = 0

    def save(self, path: Path) -> None:
        """Writes the weights under timm's names."""
        from vtjax import weights

        weights.save(path, self.spec, self.state.params, layout="timm")

    def forward(self) -> Callable[[], Any]:
        """A call that returns the logits."""
        import jax

        from vtjax.models.vit import ViT

        model = ViT(self.spec)
        apply = jax.jit(lambda params, images: model.apply(params, images)[0])
        images = jax.device_put(self.images)
        return lambda: apply(self.state.params, images)

    def train(self) -> Any:
        """One training step; returns its metrics."""
        count = np.int32(self.steps)
        self.steps += 1
        program = self.program
        self.state, metrics = program.step(self.state, self.frozen, self.knobs, self.batch, program.key, count)
        return metrics


def case(kind: str, model: str, batch: int, torch: Torch, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Checks and measures one case; returns its record."""
    ours = Jax(model, batch, options.seed)
    weights = folder / "model.safetensors"
    ours.save(weights)
    torch.ask("load", model=MODELS[model][0], weights=str(weights), seed=options.seed, batch=batch, image_size=224)
    torch.ask("logits", path=str(folder / "logits.npy"))
    apply = ours.forward()
    logits = np.asarray(apply())
    theirs = np.load(folder / "logits.npy")
    difference = float(np.abs(logits - theirs).max())
    if not difference <= 1e-3 * float(theirs.std()):
        raise InputError(
            f"{model}: logits must agree to 1e-3 of their spread {theirs.std():.3g}, found {difference:.3g}"
        )
    fields: dict[str, Any] = {"kind": kind, "model": model, "batch": batch, "logits_max_abs_diff": difference}
    if kind == "train":
        torch.ask("optimiser", lr=LR, weight_decay=WEIGHT_DECAY, kind=options.adamw)
        expected = torch.ask("train", calls=3)["losses"]
        losses = [float(ours.train()["loss"]) for _ in range(3)]
        drift = float(np.abs(np.subtract(losses, expected)).max())
        if not drift <= 1e-3 * expected[0] or not losses[0] > losses[2]:
            raise InputError(f"{model}: losses of three steps must agree and fall, found {losses} and {expected}")
        fields["losses_max_abs_diff"] = drift
    waiting = {"vtjax": 0.0, "torch": 0.0}
    measures = {
        "vtjax": watched(timing.timer(ours.train if kind == "train" else apply), torch.process.pid, "torch", waiting),
        "torch": watched(lambda n: torch.ask(kind, calls=n)["seconds"], os.getpid(), "vtjax", waiting),
    }
    result = timing.compare(
        measures,
        rounds=options.rounds,
        calls=options.calls,
        warmup=2,
        pause=options.pause,
        pids=[torch.process.pid],
    )
    images = {name: batch / result.timings[name].median for name in measures}
    return {
        **fields,
        **result.summary(),
        "ratio": result.ratio("torch", "vtjax"),
        "ratio_range": result.ratio_range("torch", "vtjax"),
        "images_per_s": images,
        "waiting_cpu_s": waiting,
    }


def watched(measure: timing.Measure, waiter: int, name: str, waiting: dict[str, float]) -> timing.Measure:
    """The measure, adding to `waiting[name]` the CPU time that the other process used meanwhile."""

    def measured(calls: int) -> Any:
        before = timing.cpu_seconds(waiter)
        seconds = measure(calls)
        waiting[name] += timing.cpu_seconds(waiter) - before
        return seconds

    return measured


def main(arguments: list[str] | None = None) -> int:
    """Runs the cases; the exit code is 2 for bad input."""
    parser = argparse.ArgumentParser(prog="beside_torch", description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", required=True, help="a Python that has torch, timm and safetensors")
    parser.add_argument("--threads", type=int, default=2, help="for both sides (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each side (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=8, help="timed calls per turn (default: %(default)s)")
    parser.add_argument("--pause", type=float, default=0.3, help="seconds between turns (default: %(default)s)")
    parser.add_argument("--only", default="", help="substring of the cases to run, such as 'train' or 'ViT-S'")
    parser.add_argument(
        "--adamw", choices=("fused", "foreach"), default="fused", help="PyTorch's (default: %(default)s)"
    )
    parser.add_argument(
        "--omp-wait",
        choices=("default", "passive", "active"),
        default="default",
        help="how PyTorch's threads wait between operations; passive costs it speed (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(HERE / "results" / "beside_torch.jsonl"))
    options = parser.parse_args(arguments)
    try:
        restrict(options.threads)
        records = run(options)
    except InputError as error:
        print(f"beside_torch: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"cases": len(records), "ratios": {_title(r): round(r["ratio"], 3) for r in records}}))
    return 0


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases that `options.only` names, each recorded as soon as it is measured."""
    import jax

    wanted = [c for c in CASES if options.only in f"{c[0]} {c[1]} batch {c[2]}"]
    if not wanted:
        raise InputError(f"--only must be part of a case such as 'forward ViT-Ti/16 batch 1', found {options.only!r}")
    records = []
    torch = Torch(options.torch_python, options.threads, options.omp_wait)
    try:
        about = {**torch.ask("about"), "threads": options.threads, "adamw": options.adamw, "seed": options.seed}
        about["glibc_tunables"] = os.environ.get("GLIBC_TUNABLES", "")
        with tempfile.TemporaryDirectory() as folder:
            for kind, model, batch in wanted:
                start = time.perf_counter()
                fields = case(kind, model, batch, torch, options, Path(folder))
                records.append(record.write(options.output, {**fields, **about}))
                jax.clear_caches()
                _say(records[-1], time.perf_counter() - start)
    finally:
        torch.close()
    rows = [_row(r) for r in records]
    print(
        "\n" + tables.text(("case", "vtjax ms", "torch ms", "ratio", "p10..p90", "other cores"), rows), file=sys.stderr
    )
    return records


def restrict(threads: int) -> None:
    """Keeps both processes on as many cores as threads; XLA sizes its pool by them. Before JAX makes its backend."""
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(cores):
        raise InputError(f"--threads must be in 1..{len(cores)}, the usable cores, found {threads}")
    os.sched_setaffinity(0, cores[:threads])


def _title(r: dict[str, Any]) -> str:
    return f"{r['kind']} {r['model']} batch {r['batch']}"


def _row(r: dict[str, Any]) -> tuple[Any, ...]:
    low, high = r["ratio_range"]
    milliseconds = (f"{1000 * r[side]['median_s']:.2f}" for side in ("vtjax", "torch"))
    other = "" if r["other_cores"] is None else f"{r['other_cores']:.2f}"
    return _title(r), *milliseconds, f"{r['ratio']:.3f}", f"{low:.2f}..{high:.2f}", other


def _say(r: dict[str, Any], seconds: float) -> None:
    print(f"{_title(r)}: vtjax is {r['ratio']:.3f} times as fast as PyTorch ({seconds:.0f} s)", file=sys.stderr)
    if (r["other_cores"] or 0.0) > IDLE:
        print(f"  {r['other_cores']:.2f} cores were busy with other work: this ratio is worthless", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
