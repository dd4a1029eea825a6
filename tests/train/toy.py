# SPDX-License-Identifier: Apache-2.0
"""A task and data small enough to train in a second, and a process: `python -m tests.train.toy DIR`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import common
from vtjax.spec import ViTSpec
from vtjax.train import checkpoint, loop, optim
from vtjax.train.task import Batch, Task

SPEC = ViTSpec.uniform(depth=1, width=8, heads=2, image_size=8, patch=4, classes=3)
FEATURES = 6


def config(**leaves: Any) -> ConfigDict:
    """A run of ten steps; `optim__lr=0.1` sets `config.optim.lr`."""
    out = common.base()
    out.update({"steps": 10, "batch_size": 8, "log_every": 1})
    out.checkpoint.every = 2
    out.optim.lr = 0.05
    out.optim.weight_decay = 0.01
    for name, value in leaves.items():
        *parents, leaf = name.split("__")
        target = out
        for parent in parents:
            target = target[parent]
        with target.unlocked():
            target[leaf] = value
    return out


def forward(params: Any, x: jax.Array) -> jax.Array:
    """A two-layer MLP with the names of the real models."""
    mlp = params["block_00"]["mlp"]
    hidden = jnp.tanh(x @ mlp["up"]["kernel"] + mlp["up"]["bias"])
    return hidden @ params["head"]["kernel"] + params["head"]["bias"]


def task(config: ConfigDict, hidden: int = 8, noise: float = 0.1, teacher: bool = False, **fields: Any) -> Task:
    """The toy; `noise` makes the loss depend on its key, `teacher` adds frozen arrays."""

    def init(key: jax.Array) -> tuple[Any, Any, Any]:
        up, head = jax.random.split(key)
        params = {
            "block_00": {
                "mlp": {"up": {"kernel": jax.random.normal(up, (FEATURES, hidden)), "bias": jnp.zeros(hidden)}}
            },
            "head": {"kernel": jax.random.normal(head, (hidden, SPEC.classes)), "bias": jnp.zeros(SPEC.classes)},
        }
        frozen = {"teacher": np.linspace(0.0, 1.0, FEATURES * SPEC.classes, dtype=np.float32)} if teacher else {}
        return params, frozen, {"counter": jnp.zeros((), jnp.int32)}

    def loss(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any, key: Any, step: Any) -> tuple[Any, Any]:
        x = batch["image"] + noise * jax.random.normal(key, batch["image"].shape) if noise else batch["image"]
        logits = forward(params, x)
        if teacher:
            logits = logits + x @ frozen["teacher"].reshape(FEATURES, SPEC.classes)
        logits = logits * knobs.get("temperature", 1.0)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], axis=1)
        return nll.mean(), {"top1": (logits.argmax(-1) == batch["label"]).mean()}

    def evaluate(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any) -> Any:
        logits = forward(params, batch["image"])
        valid = batch["valid"].astype(jnp.float32)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], axis=1)[:, 0]
        right = (logits.argmax(-1) == batch["label"]) * valid
        return {"top1": right.sum(), "loss": (nll * valid).sum(), "count": valid.sum()}

    standard = Task(spec=SPEC, init=init, loss=loss, evaluate=evaluate, trainable=optim.group_of(config.optim))
    return dataclasses.replace(standard, **fields)


class Data:
    """Random features with learnable labels. `delay` seconds per training batch; batch `poison` is not a number."""

    classes = SPEC.classes
    train_examples = 1000
    eval_examples = 21

    def __init__(self, config: ConfigDict, delay: float = 0.0, poison: int = -1):
        self.config, self.delay, self.poison = config, delay, poison

    def batch(self, stream: int, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([self.config.seed, stream, index])
        size = self.config.batch_size
        image = rng.standard_normal((size, FEATURES)).astype(np.float32)
        label = (image[:, :3].argmax(-1)).astype(np.int32)
        if stream == 0 and index == self.poison:
            image[0, 0] = np.nan
        return {"image": image, "label": label, "valid": np.ones(size, bool), "index": np.arange(size)}

    def train(self, start_step: int) -> Iterator[Batch]:
        step = start_step
        while True:
            time.sleep(self.delay)
            yield self.batch(0, step)
            step += 1

    def eval(self, split: str = "eval") -> Iterator[Batch]:
        for index in range(-(-self.eval_examples // self.config.batch_size)):
            batch = self.batch(1, index)
            rows = index * self.config.batch_size + np.arange(self.config.batch_size)
            yield {**batch, "valid": rows < self.eval_examples}

    def draw(self, split: str, index: int) -> Batch:
        return self.batch(2, index)


def kill(*ignored: Any) -> None:
    """SIGKILL to oneself."""
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--eval-every", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=8)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--ema", type=float, default=0.0)
    parser.add_argument(
        "--die-before-manifest", type=int, default=0, help="SIGKILL in the n-th save, between its parts"
    )
    parser.add_argument("--term-in-init", action="store_true", help="SIGTERM to oneself, there")
    args = parser.parse_args()
    settings = config(steps=args.steps, eval_every=args.eval_every, ema=args.ema, checkpoint__every=args.every)
    data = Data(settings, args.delay)
    if args.die_before_manifest:
        write, calls = checkpoint._write_manifest, []

        def dying(*arguments: Any) -> None:
            calls.append(1)
            (kill if len(calls) == args.die_before_manifest else write)(*arguments)

        checkpoint._write_manifest = dying
    toy = task(settings, args.hidden)
    if args.term_in_init:
        init = toy.init

        def with_signal(key: jax.Array) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return init(key)

        toy = dataclasses.replace(toy, init=with_signal)
    print(loop.train(toy, data, settings, args.workdir)["params_sha256"])


if __name__ == "__main__":
    sys.exit(main())
