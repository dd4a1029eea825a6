# SPDX-License-Identifier: Apache-2.0
"""What `test_partial_softmax_kernels.py` runs in processes of its own.

`python -m tests.ops.kernels_over_devices`: kernels inside every strategy on eight CPU devices, interpreted, as JSON
lines with the largest error against the chunked form on one device (of unit-size results). With a topology, a head
width and check_vma (0, 1): `cross_attention` and its gradients compiled for that TPU.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vtjax.parallel.strategies import STRATEGIES
from vtjax.parallel.xattn import cross_attention


def interpreted() -> None:
    rng = np.random.default_rng(0)
    devices = np.array(jax.devices())
    q, w = (jnp.asarray(rng.normal(size=(2, 10, 8, 8)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(2, 37, 4, 8)), jnp.float32) for _ in range(2))
    number = jnp.asarray(rng.integers(-1, 4, (2, 37)), jnp.int32)
    low = rng.integers(1, 3, (2, 10))
    interval = jnp.asarray(np.stack([low, low + rng.integers(-1, 3, low.shape)], -1), jnp.int32)

    def graded(mesh: Mesh, **options: Any) -> Any:
        def total(q: Any, k: Any, v: Any) -> Any:
            o, lse = cross_attention(
                q, k, v, mesh=mesh, axis="cp", q_interval=interval, kv_id=number, return_lse=True, **options
            )
            return (o * w).sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum(), (o, lse)

        (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
        return [np.nan_to_num(np.asarray(x), neginf=-1e3) for x in (*out, *gradients)]

    wanted = graded(Mesh(devices[:1].reshape(1, 1), ("data", "cp")), strategy="local", kernel="chunked")
    mesh = Mesh(devices.reshape(2, 4), ("data", "cp"))
    for strategy in STRATEGIES:
        if strategy == "gspmd":  # has no kernels
            continue
        for kernel in ("tpu", "gpu"):
            found = graded(mesh, strategy=strategy, kernel=kernel)
            error = max(float(np.abs(a - b).max()) for a, b in zip(found, wanted, strict=True))
            print(json.dumps({"strategy": strategy, "kernel": kernel, "error": error}), flush=True)


def compiled(name: str, head_dim: int, check_vma: bool) -> None:
    from vtjax.account import aot

    devices = aot.topology(name)
    mesh = Mesh(np.array(devices), ("cp",))
    split = NamedSharding(mesh, P(None, "cp"))

    def like(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=split)

    def step(q: Any, k: Any, v: Any, w: Any, interval: Any, number: Any) -> Any:
        def loss(q: Any, k: Any, v: Any) -> Any:
            o = cross_attention(
                q, k, v, mesh=mesh, axis="cp", q_interval=interval, kv_id=number, strategy="gather_q",
                check_vma=check_vma,
            )  # fmt: skip
            return (o * w).astype(jnp.float32).sum()

        return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

    rows, keys = 2048, 65536 * len(devices)
    q, k = like(1, rows, 32, head_dim), like(1, keys, 8, head_dim)
    ids = like(1, rows, 2, dtype=jnp.int32), like(1, keys, dtype=jnp.int32)
    done = jax.jit(step).lower(q, k, k, q, *ids).compile()
    calls = [line for line in done.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    names = sorted(re.findall(r"%(partial_softmax_\w+)", line)[0] for line in calls)
    print(json.dumps({"kernels": names, "temp_bytes": done.memory_analysis().temp_size_in_bytes}))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        compiled(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1")
    else:
        interpreted()
