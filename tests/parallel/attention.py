# SPDX-License-Identifier: Apache-2.0
"""What `test_cross_attention.py` runs on eight CPU devices: `python -m tests.parallel.attention N[,N...] STRATEGY...`.

Prints JSON: per devices, sizes and strategy the largest error of output, log-sum-exp and gradients against dense
attention in float64, and the bytes of the collectives.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vtjax.parallel.cross_attention import cross_attention

# (B, S_Q, S_K, H, K): uneven lengths; fewer visual tokens than devices; key heads that divide over three of them.
SIZES = ((2, 7, 21, 8, 8), (1, 10, 5, 8, 2), (1, 3, 40, 7, 1), (1, 5, 13, 6, 3))


def dense(q: Any, k: Any, v: Any, low: Any, high: Any, number: Any) -> tuple[Any, Any]:
    """Softmax attention written out."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    z = jnp.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    number = number[:, None]
    seen = ((number > 0) & (low[:, :, None] <= number) & (number <= high[:, :, None]))[:, None]
    some = seen.any(-1)
    lse = jax.nn.logsumexp(jnp.where(seen, z, -1e30), axis=-1)
    p = jnp.where(some[..., None] & seen, jnp.exp(z - lse[..., None]), 0.0)
    return jnp.einsum("bhnm,bmhd->bnhd", p, v), jnp.where(some, lse, -jnp.inf).swapaxes(1, 2)


def errors(devices: int, size: tuple[int, ...], strategy: str, check_vma: bool, seed: int = 0) -> float:
    """The largest absolute error, where all inputs are of unit size; half of the rows see little or nothing."""
    b, rows, keys, heads, kv_heads = size
    rng = np.random.default_rng(seed)
    q, w = (jnp.asarray(rng.normal(size=(b, rows, heads, 4))) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(b, keys, kv_heads, 4))) for _ in range(2))
    number = jnp.asarray(rng.integers(-1, 4, (b, keys)), jnp.int32)
    low = rng.integers(1, 3, (b, rows))
    interval = jnp.asarray(np.stack([low, low + rng.integers(-1, 3, low.shape)], -1), jnp.int32)
    weight = jnp.asarray(rng.normal(size=(b, rows, heads)))
    mesh = Mesh(np.array(jax.devices()[:devices]), ("cp",))

    def ours(q: Any, k: Any, v: Any) -> Any:
        return cross_attention(
            q, k, v, mesh=mesh, axis="cp", q_interval=interval, kv_id=number, strategy=strategy, return_lse=True,
            check_vma=check_vma,
        )  # fmt: skip

    def graded(function: Any) -> Any:
        def total(q: Any, k: Any, v: Any) -> Any:
            o, lse = function(q, k, v)
            return (o * w).sum() + (jnp.where(jnp.isfinite(lse), lse, 0.0) * weight).sum(), (o, lse)

        (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
        return (*out, *gradients)

    found, wanted = graded(ours), graded(lambda *x: dense(*x, interval[..., 0], interval[..., 1], number))
    worst = 0.0
    for a, b_ in zip(found, wanted, strict=True):
        same = np.asarray(np.isneginf(a) & np.isneginf(b_))
        worst = max(worst, float(np.where(same, 0.0, np.abs(np.where(same, 0, a) - np.where(same, 0, b_))).max()))
    return worst


def main(arguments: list[str]) -> None:
    jax.config.update("jax_enable_x64", True)
    for devices in map(int, arguments[0].split(",")):
        for size in SIZES:
            for strategy in arguments[1:]:
                if strategy == "ulysses" and size[4] % devices:
                    continue
                for check_vma in (True, False):
                    told = {"n": devices, "size": size, "strategy": strategy, "check_vma": check_vma}
                    print(json.dumps({**told, "error": errors(devices, size, strategy, check_vma)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
