# SPDX-License-Identifier: Apache-2.0
"""What `test_eight_devices.py` runs on eight CPU devices, and again on one: `python -m tests.parallel.eight DIR`."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.train import toy
from vtjax.errors import InputError, Preempted
from vtjax.methods import dpn
from vtjax.models.generate import generate
from vtjax.models.lm import LM
from vtjax.models.vit import ViT
from vtjax.ops import attention
from vtjax.parallel import mesh as mesh_lib
from vtjax.parallel import rules
from vtjax.spec import LMSpec, ViTSpec
from vtjax.train import loop, optim
from vtjax.train.program import Program
from vtjax.train.task import Task
from vtjax.weights import names

LM_SPEC = LMSpec.uniform(depth=1, width=16, heads=4, kv_heads=2, mlp=24, vocab=64)
SPEC = ViTSpec.uniform(depth=1, width=16, heads=2, image_size=8, patch=4, classes=4)


def config(**leaves: Any) -> Any:
    return toy.config(batch_size=16, accumulate=2, ema=0.9, eval_every=5, **leaves)


def vit_task(settings: Any) -> Task:
    model = ViT(SPEC, constrain=rules.constrain)

    def loss(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any, key: Any, step: Any) -> Any:
        logits, _ = model.apply(params, batch["image"])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], axis=1).mean(), {}

    def init(key: jax.Array) -> Any:
        return model.init(key), {}, {}

    return Task(SPEC, init, loss, lambda *_: {}, optim.group_of(settings.optim))


def vit_losses(settings: Any, steps: int = 3) -> tuple[list[float], Program, Any]:
    """Losses of the first steps of a ViT."""
    program = Program(vit_task(settings), settings, mesh_lib.make(settings.mesh))
    losses = []
    with jax.set_mesh(program.mesh):
        state, frozen = program.init()
        for step in range(steps):
            rng = np.random.default_rng(step)
            image, label = rng.standard_normal((16, 8, 8, 3)), rng.integers(0, 4, 16)
            batch = {"image": image.astype(np.float32), "label": label.astype(np.int32)}
            placed = mesh_lib.place(batch, program.mesh)
            state, metrics = program.step(state, frozen, {}, placed, program.key, np.int32(step))
            losses.append(float(metrics["loss"]))
    return losses, program, state


def lm_tokens(mesh: Any) -> list[list[int]]:
    """What a decoder with parameters laid out over the mesh writes after ragged prompts."""
    rng = np.random.default_rng(0)
    flat = {name: 0.3 * rng.standard_normal(shape).astype(np.float32) for name, shape in names.shapes(LM_SPEC).items()}
    params = names.unflatten({name: a + 1 if name.endswith("scale") else a for name, a in flat.items()})
    ids, mask = rng.integers(0, 64, (4, 5)), np.arange(5) >= np.array([[0], [3], [1], [2]])
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, rules.shardings(params, mesh))
        batch = mesh_lib.place({"ids": ids.astype(np.int32), "mask": mask.astype(np.int32)}, mesh)
        model = LM(LM_SPEC, constrain=rules.constrain)
        return generate(model, placed, batch["ids"], batch["mask"], new_tokens=4)[0].tolist()


def splash_error(mesh: Any) -> float:
    """How far the TPU's kernel, each device on its own samples and heads, is from the reference."""
    q, k, v = (jax.random.normal(key, (4, 130, 2, 16)) for key in jax.random.split(jax.random.key(2), 3))
    with jax.set_mesh(mesh):
        placed = mesh_lib.place({"q": np.asarray(q), "k": np.asarray(k), "v": np.asarray(v)}, mesh)
        run = jax.jit(lambda b: attention._splash(b["q"], b["k"], b["v"], None, None, 0.25, interpret=True))
        y = run(placed)
    expected, _ = attention.attention(q, k, v, scale=0.25, implementation="xla")
    return float(abs(np.asarray(y) - np.asarray(expected)).max())


def pooled(mesh: Any) -> dict[str, Any]:
    """Experts that a model with parameters laid out over the mesh draws and takes, and its logits."""
    from tests.methods.test_dpn import SPEC, drawn, questions

    ids, mask, images = (a[[0, 1, 2, 0]] for a in questions())
    params = drawn(SPEC)
    model = dpn.vlm(SPEC, constrain=rules.constrain)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, rules.shardings(params, mesh))
        batch = mesh_lib.place({"ids": ids, "mask": mask, "images": images}, mesh)

        @jax.jit
        def run(params: Any, b: Any, key: Any) -> Any:
            knobs = dpn.drawing(SPEC, key)
            y, aux = model.apply(params, b["ids"], b["images"], b["mask"], knobs=knobs)
            return y, dpn.decisions(aux, SPEC)["choice"]

        y, choice = run(placed, batch, jax.random.key(5))
    live = mask > 0
    return {"choice": np.asarray(choice).tolist(), "logits": np.asarray(y)[live].astype(float).tolist()}


def refusal(function: Any, *args: Any) -> str:
    try:
        function(*args)
    except InputError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    out: dict[str, Any] = {"devices": jax.device_count()}
    # Preempted in the middle; the parent goes on with one device.
    settings = config()
    data, task = toy.Data(settings), toy.task(settings)
    save = loop.Checkpoints.save

    def save_and_preempt(self: Any, state: Any, step: int, *rest: Any) -> None:
        save(self, state, step, *rest)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    loop.Checkpoints.save = save_and_preempt  # type: ignore[method-assign]
    try:
        loop.train(task, data, settings, folder / "half")
    except Preempted:
        out["preempted"] = True
    loop.Checkpoints.save = save  # type: ignore[method-assign]

    split = config(mesh__fsdp=2, mesh__tensor=2)
    loop.train(toy.task(split), data, split, folder / "split")

    losses, program, state = vit_losses(config(mesh__fsdp=2, mesh__tensor=2))
    out["losses"] = losses
    query = state.params["block_00"]["attn"]["query"]["kernel"]
    moment = state.opt[1].mu["block_00"]["attn"]["query"]["kernel"]
    out["query"] = [list(x.sharding.shard_shape(x.shape)) for x in (query, moment)]
    out["steps_compiled"] = program.step._cache_size()

    out["lm_tokens"] = lm_tokens(program.mesh)
    out["splash_error"] = splash_error(program.mesh)
    out["pooled"] = pooled(program.mesh)
    with jax.set_mesh(program.mesh):
        halves = jax.jit(rules.constrain)(jnp.ones((8, 3)))
        uneven = jax.jit(rules.constrain)(jnp.ones((3, 3)))
    out["constrained"] = list(halves.sharding.shard_shape(halves.shape))
    out["uneven"] = uneven.tolist() == [[1.0] * 3] * 3
    out["uneven_batch"] = refusal(mesh_lib.place, {"x": np.zeros(6)}, program.mesh)
    out["shape"] = dict(mesh_lib.make({"data": -1, "tensor": 2}).shape)
    out["three"] = refusal(mesh_lib.make, {"data": -1, "fsdp": 3})
    print(json.dumps(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
