# SPDX-License-Identifier: Apache-2.0
"""What `test_slices.py` runs on eight CPU devices, as two slices of four: prints JSON, the largest error against the
local form in float64 and the elements that go over the slow axis; then what a bfloat16 model exchanges, by `wire`."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vtjax.parallel import exchanges
from vtjax.parallel.xattn import cross_attention

EXCHANGED = r"stablehlo.all_to_all.* : \(tensor<([\dx]+)x(\w+)>\) ->"
CROSSING = r"stablehlo.all_gather.*dense<\[\[0, 4\].* : \(tensor<([\dx]+)x(\w+)>\) ->"
SLOW = r"replica_groups=\{\{0,4\}"


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("slice", "context"))
    b, rows, keys, heads, kv_heads, d = 2, 13, 37, 4, 2, 4  # 13 rows are filled up to 16
    q, w = (jnp.asarray(rng.normal(size=(b, rows, heads, d))) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(b, keys, kv_heads, d))) for _ in range(2))
    number = jnp.asarray(rng.integers(-1, 4, (b, keys)), jnp.int32)
    low = rng.integers(1, 3, (b, rows))
    interval = jnp.asarray(np.stack([low, low + rng.integers(-1, 3, low.shape)], -1), jnp.int32)

    def run(strategy: str, slow: bool) -> tuple[list[Any], str]:
        def total(q: Any, k: Any, v: Any) -> Any:
            o, lse = cross_attention(
                q, k, v, mesh=mesh, axis=("slice", "context"), q_interval=interval, kv_id=number, strategy=strategy,
                slow=slow, return_lse=True,
            )  # fmt: skip
            finite = jnp.where(jnp.isfinite(lse), lse, 0)
            return (o * w).sum() + finite.sum(), (o, finite)

        step = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True)).lower(q, k, v).compile()
        return jax.tree.leaves(step(q, k, v)), step.as_text()

    wanted, _ = run("local", False)

    def compared(strategy: str, slow: bool) -> dict[str, Any]:
        found, text = run(strategy, slow)
        error = max(float(jnp.abs(a - b).max()) for a, b in zip(found, wanted, strict=True))
        over = [
            line for line in text.splitlines() if re.search(SLOW, line) and re.search("all-(gather|to-all)\\(", line)
        ]
        elements = 0
        for line in over:
            shapes = re.findall(r"f64\[([\d,]+)\]", line.split(" all-")[0])
            elements += sum(math.prod(map(int, shape.split(","))) for shape in shapes)
        return {"slow": slow, "error": error, "over": len(over), "elements": elements}

    for slow in (False, True):
        print(json.dumps(compared("gather_q", slow)), flush=True)

    def lowered(wire: str | None, slow: bool) -> str:
        def total(q: Any, k: Any, v: Any) -> Any:
            o = cross_attention(
                q, k, v, mesh=mesh, axis=("slice", "context"), q_interval=interval, kv_id=number, strategy="gather_q",
                slow=slow, wire=wire,
            )  # fmt: skip
            return o.astype(jnp.float32).sum()

        return jax.jit(jax.grad(total, (0, 1, 2))).lower(*(x.astype(jnp.bfloat16) for x in (q, k, v))).as_text()

    for slow in (False, True):
        for wire in (None, "float32"):
            text, told = lowered(wire, slow), {}
            for kind, pattern in (("exchanged", EXCHANGED), ("crossing", CROSSING)):
                found = re.findall(pattern, text)
                # Parts `[n, B, rows, heads, d]`, statistics of rows `[n, B, rows, heads]`; n is 1 before a crossing.
                told[kind] = [[dtype for shape, dtype in found if shape.count("x") == rank - 1] for rank in (5, 4)]
            print(json.dumps({"slow": slow, "wire": wire, **told}), flush=True)

    few_key_heads(q, k, v)
    print(json.dumps(compared("replicated_q", True)), flush=True)


def few_key_heads(q: Any, k: Any, v: Any) -> None:
    """Two key heads over four devices along `tensor`: prints the error and the heads that a device has."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("context", "tensor"))
    seen, plain = [], exchanges.FORWARD["gather_q"]

    def watched(plan: Any, q: Any, k: Any, *more: Any) -> Any:
        seen.append((q.shape[2], k.shape[2]))
        return plain(plan, q, k, *more)

    def graded(**where: Any) -> Any:
        def total(q: Any, k: Any, v: Any) -> Any:
            return (cross_attention(q, k, v, mesh=mesh, axis="context", **where) ** 2).sum()

        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(q, k, v)

    wanted = graded(strategy="local")
    exchanges.FORWARD["gather_q"] = watched
    for strategy in ("gather_q", "ulysses"):
        found = graded(strategy=strategy)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
        error = max(float(jnp.abs(a - b).max()) for a, b in pairs)
        told = {"strategy": strategy, "heads": seen[0], "shape": found[1][1].shape, "error": error}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
