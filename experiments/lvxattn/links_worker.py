# SPDX-License-Identifier: Apache-2.0
"""One process of several that `links.py` starts: `python -m experiments.lvxattn.links_worker CASES`, a JSON list.

All processes time the same candidates in the same order; a call begins when all are there, and takes as long as the
slowest of them. Process 0 writes one JSON line per case to the pipe whose number LINKS_PIPE holds. Who the others are
is in the variables that `vtjax run` reads, too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vtjax.account import timing
from vtjax.parallel import exchanges
from vtjax.parallel import xattn as op

AXIS = "cp"
SILENT = " silent"
"""Ends the name of a candidate that computes all and sends nothing."""


class Silent:
    """`jax.lax` whose collectives give results of the right shape at once. Behind a barrier, so that a ring's rounds do
    not become one."""

    def __init__(self, n: int):
        self._n = n

    def __getattr__(self, name: str) -> Any:
        return getattr(lax, name)

    def all_gather(self, x: Any, axis_name: Any, *, axis: int = 0, tiled: bool = False) -> Any:
        x = lax.optimization_barrier(x)
        return jnp.concatenate([x] * self._n, axis) if tiled else jnp.stack([x] * self._n, axis)

    def all_to_all(self, x: Any, axis_name: Any, *, split_axis: int, concat_axis: int, tiled: bool) -> Any:
        return jnp.concatenate(jnp.split(lax.optimization_barrier(x), self._n, split_axis), concat_axis)

    def psum_scatter(self, x: Any, axis_name: Any, *, scatter_dimension: int, tiled: bool) -> Any:
        return jnp.split(lax.optimization_barrier(x), self._n, scatter_dimension)[0]

    def ppermute(self, x: Any, axis_name: Any, perm: Any) -> Any:
        return lax.optimization_barrier(x)

    def psum(self, x: Any, axis_name: Any) -> Any:
        return lax.optimization_barrier(x)

    pmax = psum


def silenced(function: Callable[..., Any], n: int) -> Callable[..., Any]:
    """The function with nothing sent by the operation; only what is traced within is changed."""

    def run(*given: Any) -> Any:
        with mock.patch.object(exchanges, "lax", Silent(n)):
            return function(*given)

    return run


def measure(run: Callable[[], Any]) -> timing.Measure:
    """Times calls that all processes make together; the slowest one's seconds, on every process."""

    def calls(count: int) -> list[float]:
        found = []
        for _ in range(count):
            multihost_utils.sync_global_devices("call")
            start = time.perf_counter()
            jax.block_until_ready(run())
            found.append(time.perf_counter() - start)
        each = np.asarray(multihost_utils.process_allgather(np.asarray(found, np.float32)))
        return [float(s) for s in each.reshape(-1, count).max(0)]

    return calls


def drawn(mesh: Mesh, spec: P, shape: tuple[int, ...], seed: int) -> jax.Array:
    """Normal float32 numbers, every process its own part."""

    def part(index: Any) -> np.ndarray:
        own = [len(range(*s.indices(size))) for s, size in zip(index, shape, strict=True)]
        starts = [s.start or 0 for s in index]
        return np.random.default_rng([seed, *starts]).normal(size=own).astype(np.float32)

    return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), part)


def with_silent(case: dict[str, Any], candidate: Callable[[str, bool], Any]) -> dict[str, Callable[[], Any]]:
    """Every strategy, and in front of them the silent forms of those that the case names."""
    return {
        **{s + SILENT: candidate(s, True) for s in case["silent"]},
        **{s: candidate(s, False) for s in case["strategies"]},
    }


def operation(mesh: Mesh, case: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """The operation alone: forward and backward pass, or with `passes="forward"` the first one."""
    rows, keys, heads, kv_heads, d = (case[name] for name in ("rows", "keys", "heads", "kv_heads", "head_dim"))
    keys += -keys % mesh.size
    kv = P(None, AXIS)
    k, v = (drawn(mesh, kv, (1, keys, kv_heads, d), seed) for seed in (1, 2))

    def candidate(strategy: str, silent: bool) -> Callable[[], Any]:
        replicated = strategy == "replicated_q" or rows % mesh.size
        q, do = (drawn(mesh, P() if replicated else kv, (1, rows, heads, d), seed) for seed in (3, 4))

        def forward(q: Any, k: Any, v: Any) -> Any:
            return op.cross_attention(q, k, v, mesh=mesh, axis=AXIS, strategy=strategy, check_vma=False)

        def both(q: Any, k: Any, v: Any, do: Any) -> Any:
            o, back = jax.vjp(forward, q, k, v)
            return o, back(do)

        function, given = (forward, (q, k, v)) if case.get("passes") == "forward" else (both, (q, k, v, do))
        jitted = jax.jit(silenced(function, mesh.size) if silent else function)
        return lambda: jitted(*given)

    return with_silent(case, candidate)


def training(mesh: Mesh, case: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """A training step of a small multimodal model with hyper-attention (mPLUG-Owl3's form) in every layer: tower over
    this process's frames, frozen as in the paper's example; decoder and bridge with their update. The text is on every
    process."""
    import optax

    from vtjax.models.vlm import VLM
    from vtjax.spec import BridgeSpec, CrossSpec, LMSpec, ViTSpec, VLMSpec

    side, frames, rows, vocab = case["side"], case["frames"], case["rows"], 256
    tower = ViTSpec.uniform(
        depth=1, width=case["tower_width"], heads=1, mlp=2 * case["tower_width"], image_size=2 * side, patch=2,
        class_token=False, pos_prefix=0, pooling="none",
    )  # fmt: skip
    width, layers = case["width"], tuple(range(case["depth"]))
    heads = {name: case[name] for name in ("heads", "kv_heads", "head_dim")}
    text = LMSpec.uniform(depth=case["depth"], width=width, mlp=2 * width, vocab=vocab, **heads)
    spec = VLMSpec(tower, BridgeSpec(hidden=width, cross=CrossSpec.hyper(layers)), text, image_token=vocab - 1)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab - 1, (1, rows)).astype(np.int32)
    ids[0, np.linspace(0, rows - 2, frames).astype(int)] = vocab - 1
    images = drawn(mesh, P(None, AXIS), (1, frames, 2 * side, 2 * side, 3), 5)
    whole = NamedSharding(mesh, P())
    params = jax.jit(VLM(spec).init, out_shardings=whole)(jax.random.key(0))
    optimiser = optax.adamw(1e-4)
    trained = {name: params[name] for name in ("bridge", "decoder")}
    state = jax.jit(optimiser.init, out_shardings=whole)(trained)

    def candidate(strategy: str, silent: bool) -> Callable[[], Any]:
        model = VLM(spec, attend=op.attend_over(mesh, AXIS, strategy=strategy, check_vma=False))

        def step(trained: Any, tower: Any, state: Any, images: Any) -> Any:
            def loss(trained: Any) -> Any:
                logits, _ = model.apply({**trained, "tower": tower}, jnp.asarray(ids), images)
                known = jax.nn.log_softmax(logits[:, :-1])
                return -jnp.take_along_axis(known, jnp.asarray(ids)[:, 1:, None], axis=-1).mean()

            value, gradients = jax.value_and_grad(loss)(trained)
            updates, state = optimiser.update(gradients, state, trained)
            return value, optax.apply_updates(trained, updates), state

        jitted = jax.jit(silenced(step, mesh.size) if silent else step)
        return lambda: jitted(trained, params["tower"], state, images)

    return with_silent(case, candidate)


def collectives(mesh: Mesh, case: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Single collectives, to know what of a link's rate the library makes use of. Each sends `size` bytes per process,
    but for the all-gather's and all-to-all's, of which (n - 1) / n leave."""
    n, count = mesh.size, case["size"] // 4 // mesh.size * mesh.size
    x = drawn(mesh, P(AXIS), (n, count), 6)
    ring = [(i, (i + 1) % n) for i in range(n)]
    bodies = {
        "ppermute": lambda x: lax.ppermute(x, AXIS, ring),
        "all_to_all": lambda x: lax.all_to_all(x.reshape(n, -1), AXIS, 0, 0, tiled=True),
        "all_gather": lambda x: lax.all_gather(x[:, : count // n], AXIS, axis=1, tiled=True),
    }

    def candidate(body: Callable[..., Any]) -> Callable[[], Any]:
        run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS)))
        return lambda: run(x)

    return {name: candidate(body) for name, body in bodies.items()}


KINDS = {"op": operation, "decode": operation, "step": training, "collectives": collectives}


def results(mesh: Mesh, cases: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One per case: per candidate median, min, p10, p90 of the seconds of a call."""
    for case in cases:
        candidates = {name: measure(run) for name, run in KINDS[case["kind"]](mesh, case).items()}
        options = {name: case[name] for name in ("rounds", "calls", "warmup") if name in case}
        found = timing.compare(candidates, **options)
        yield {"seconds": {name: t.summary() for name, t in found.timings.items()}}


def main() -> None:
    """See the module's text."""
    address, count, index = (
        os.environ[f"JAX_{name}"] for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
    )
    jax.distributed.initialize(address, int(count), int(index))
    mesh = Mesh(np.array(jax.devices()), (AXIS,))
    for found in results(mesh, json.loads(sys.argv[1])):
        if jax.process_index() == 0:
            os.write(int(os.environ["LINKS_PIPE"]), (json.dumps(found) + "\n").encode())
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
