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
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments import torch_side
from experiments.torch_side import Torch
from vtjax.account import record, timing
from vtjax.errors import InputError
from vtjax.viz import tables

HERE = Path(__file__).resolve().parent
MODELS = {"ViT-Ti/16": ("vit_tiny_patch16_224", 192, 3), "ViT-S/16": ("vit_small_patch16_224", 384, 6)}
CASES = [("forward", model, batch) for model in MODELS for batch in (1, 16)] + [("train", "ViT-Ti/16", 16)]
LR, WEIGHT_DECAY = 1e-4, 0.05


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
    difference = torch_side.logits_difference(model, logits, theirs)
    fields: dict[str, Any] = {"kind": kind, "model": model, "batch": batch, "logits_max_abs_diff": difference}
    if kind == "train":
        torch.ask("optimiser", lr=LR, weight_decay=WEIGHT_DECAY, kind=options.adamw)
        expected = torch.ask("train", calls=3)["losses"]
        losses = [float(ours.train()["loss"]) for _ in range(3)]
        drift = float(np.abs(np.subtract(losses, expected)).max())
        if not drift <= 1e-3 * expected[0] or not losses[0] > losses[2]:
            raise InputError(f"{model}: losses of three steps must agree and fall, found {losses} and {expected}")
        fields["losses_max_abs_diff"] = drift
    call = timing.timer(ours.train if kind == "train" else apply)
    return {**fields, **torch_side.in_turns(call, torch, kind, batch, "images", options, warmup=2)}


def main(arguments: list[str] | None = None) -> int:
    """Runs the cases; the exit code is 2 for bad input."""
    parser = argparse.ArgumentParser(prog="beside_torch", description=__doc__.splitlines()[0])
    output = HERE / "results" / "beside_torch.jsonl"
    torch_side.arguments(parser, packages="torch, timm and safetensors", rounds=15, calls=8, output=output)
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
    options = parser.parse_args(arguments)
    try:
        torch_side.restrict(options.threads)
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
    torch = Torch(options.torch_python, options.threads, HERE / "torch_worker.py", options.omp_wait)
    try:
        about = {**torch_side.about(torch, options.threads), "adamw": options.adamw, "seed": options.seed}
        with tempfile.TemporaryDirectory() as folder:
            for kind, model, batch in wanted:
                start = time.perf_counter()
                fields = case(kind, model, batch, torch, options, Path(folder))
                records.append(record.write(options.output, {**fields, **about}))
                jax.clear_caches()
                _say(records[-1], time.perf_counter() - start)
    finally:
        torch.close()
    rows = [torch_side.row(_title(r), r) for r in records]
    print("\n" + tables.text(torch_side.HEAD, rows), file=sys.stderr)
    return records


def _title(r: dict[str, Any]) -> str:
    return f"{r['kind']} {r['model']} batch {r['batch']}"


def _say(r: dict[str, Any], seconds: float) -> None:
    print(f"{_title(r)}: vtjax is {r['ratio']:.3f} times as fast as PyTorch ({seconds:.0f} s)", file=sys.stderr)
    torch_side.warn(_title(r), r)


if __name__ == "__main__":
    sys.exit(main())
