# SPDX-License-Identifier: Apache-2.0
"""Memory of a stack of cross-attention layers with and without recomputation, as the TPU's compiler plans it.

    python -m experiments.lvxattn.memory kernels     attention kernels in the program by what is recomputed; seconds
    python -m experiments.lvxattn.memory temp        temporaries against S_K: v5e 2x4, four layers of Llama 3-V's widths
    python -m experiments.lvxattn.memory longest     the longest visual input that fits a v5e 2x4 and a v5p 4x4x4
    python -m experiments.lvxattn.memory time        what recomputation costs, on this machine's CPU

No TPU is needed for the first three (libtpu holds the compiler), and nothing is run. A layer projects queries from the
text and keys and values from the visual tokens y, which all layers read; bfloat16, weights on every chip, gradients of
weights, text and y. Recomputation is "none", "names" (`save_only_these_names(*SAVED)`: keys and values are projected
again, the attention is not done again, spec section 2), or "full". Records go to results/memory.jsonl; what is there
already is not compiled again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vtjax.account import aot, record, timing
from vtjax.ops.cross_attention import in_turn
from vtjax.parallel.xattn import SAVED, cross_attention
from vtjax.viz import tables

RECORDS = Path(__file__).resolve().parent / "results" / "memory.jsonl"
AXIS = "cp"
LLAMA = {"width": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "rows": 2048}
"""Llama 3-V 11B; text of 2048 tokens."""
FRAME = 6404  # tokens, four tiles
MODES = ("none", "names", "full")
KERNELS = ("forward", "dq", "dkv")
LENGTHS = (131_072, 262_144, 524_288)
STRATEGIES = ("gather_q", "ring_q", "ring_kv", "ulysses")


def stack(
    mesh: Any, layers: int, mode: str, strategy: str, case: dict[str, Any], dtype: Any, turns: bool | str = False
) -> tuple[Any, Any]:
    """A jitted loss and gradients of all, and its abstract arguments; `turns`: layers add to the gradient of the
    visual tokens one after the other, by a barrier (`in_turn`), or as "scan", whose one body compiles sooner."""
    d, heads, kv_heads, width = (case[name] for name in ("head_dim", "heads", "kv_heads", "width"))

    def layer(p: Any, x: Any, y: Any) -> Any:
        # Queries first: their gathering may hide behind the projections of keys and values (spec section 6.4).
        q, k, v = (jnp.einsum("bnd,dhe->bnhe", a, p[name]) for a, name in ((x, "q"), (y, "k"), (y, "v")))
        o = cross_attention(q, k, v, mesh=mesh, axis=AXIS, strategy=strategy)
        return x + jnp.tanh(p["gate"]) * jnp.einsum("bnhe,hed->bnd", o, p["o"])

    policy = jax.checkpoint_policies.save_only_these_names(*SAVED) if mode == "names" else None
    run = layer if mode == "none" else jax.checkpoint(layer, policy=policy)

    def loss(params: Any, x: Any, y: Any) -> Any:
        if turns == "scan":
            x, _ = jax.lax.scan(lambda x, p: (run(p, x, y), None), x, params)
        else:
            for p in params:
                x, y = in_turn(x, y) if turns else (x, y)
                x = run(p, x, y)
        return (x.astype(jnp.float32) ** 2).mean()

    shapes: dict[str, tuple[int, ...]]
    shapes = {"q": (width, heads, d), "k": (width, kv_heads, d), "v": (width, kv_heads, d), "o": (heads, d, width)}
    shapes["gate"] = ()
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, AXIS))

    def of(shape: tuple[int, ...], sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def weights(*many: int) -> dict[str, Any]:
        return {name: of((*many, *shape), whole) for name, shape in shapes.items()}

    params = weights(layers) if turns == "scan" else [weights() for _ in range(layers)]
    x, y = of((1, case["rows"], width), split), of((1, case["keys"], width), split)
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2))), (params, x, y)


def lowered(
    topology: str, layers: int, mode: str, strategy: str, keys: int, turns: bool | str = False
) -> tuple[dict[str, Any], Any, Any, Any]:
    """What is known of a case; its jitted function, arguments and devices."""
    devices = aot.topology(topology)
    case = {**LLAMA, "keys": keys}
    jitted, arguments = stack(Mesh(np.array(devices), (AXIS,)), layers, mode, strategy, case, jnp.bfloat16, turns)
    told = {"topology": topology, "n": len(devices), "layers": layers, "mode": mode, "strategy": strategy, **case}
    told["turns"] = turns
    return told, jitted, arguments, devices


def planned(*case: Any) -> dict[str, Any]:
    """What the compiler says, see `aot.compile_step`; arguments as of `lowered`."""
    told, *program = lowered(*case)
    return {**told, **aot.compile_step(*program)}


def kernels(known: Callable[..., bool]) -> Iterator[dict[str, Any]]:
    """How often a call of the program runs each attention kernel."""
    for strategy in STRATEGIES:
        for mode in MODES:
            if not known({"kind": "kernels", "strategy": strategy, "mode": mode}):
                told, jitted, arguments, _ = lowered("v5e:2x4", 4, mode, strategy, LENGTHS[0])
                found = counted(jitted.trace(*arguments).jaxpr.jaxpr)
                yield {
                    "kind": "kernels",
                    **told,
                    "kernels": {name: found[f"partial_softmax_{name}"] for name in KERNELS},
                }


def counted(jaxpr: Any, times: int = 1) -> Counter[str]:
    """Calls of Pallas kernels by name, those in scans as often as these run."""
    found: Counter[str] = Counter()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            found[eqn.params["name"]] += times
            continue
        more = times * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else times
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    found += counted(inner, more)
    return found


def temp(known: Callable[..., bool]) -> Iterator[dict[str, Any]]:
    """Temporaries against S_K, as XLA adds gradients of the visual tokens, and in turn; at the largest, and of other
    strategies, scanned alone, which compiles in a third of the time."""
    for strategy in STRATEGIES:
        for keys in LENGTHS if strategy == "gather_q" else LENGTHS[-1:]:
            for mode in MODES:
                for turns in ("scan", True, False) if keys < LENGTHS[-1] else ("scan",):
                    case = {"kind": "temp", "topology": "v5e:2x4", "strategy": strategy, "mode": mode, "keys": keys}
                    if not known({**case, "turns": turns}):
                        yield {"kind": "temp", **planned("v5e:2x4", 4, mode, strategy, keys, turns)}


BRACKET = 1.05
"""A length that does not fit is at most that much above the one that does."""


def longest(known: Callable[..., bool]) -> Iterator[dict[str, Any]]:
    """The longest visual input whose eight layers fit, between a compile that fits and one that does not."""
    for topology in ("v5e:2x4", "v5p:4x4x4"):
        n = len(aot.topology(topology))
        for strategy in STRATEGIES:
            for mode in ("none", "names"):
                case = {"kind": "longest", "topology": topology, "strategy": strategy, "mode": mode}
                if not known(case) and (strategy != "ulysses" or LLAMA["kv_heads"] % n == 0):
                    fits, above = between(topology, mode, strategy, n)
                    kept = ("layers", "turns", "keys", "hbm_bytes_per_device", "hbm_limit")
                    told = {name: above[name] for name in ("keys", "fits", "hbm_bytes_per_device")}
                    yield {**case, "n": n, **LLAMA, **{name: fits[name] for name in kept}, "above": told}


def between(topology: str, mode: str, strategy: str, n: int, most: int = 12) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the compiler says of a length that fits and of one that does not, `BRACKET` apart at most.

    Raises:
      RuntimeError: they were not found in `most` compiles.
    """
    fits: dict[str, Any] = {}
    above: dict[str, Any] = {}
    keys = n * 2**17
    for _ in range(most):
        one = planned(topology, 8, mode, strategy, keys // (n * 512) * n * 512, "scan")
        fits, above = (one, above) if one["fits"] else (fits, one)
        if fits and above and above["keys"] <= BRACKET * fits["keys"]:
            return fits, above
        if not above:  # by the memory that is left, and a little beyond
            keys = int(fits["keys"] * min(4.0, 1.04 * one["hbm_limit"] / one["hbm_bytes_per_device"]))
        elif not fits:
            keys = int(above["keys"] * min(0.9, 0.98 * one["hbm_limit"] / one["hbm_bytes_per_device"]))
        else:
            close = above["keys"] <= BRACKET**2 * fits["keys"]
            keys = int(fits["keys"] * 1.045) if close else (fits["keys"] + above["keys"]) // 2
    raise RuntimeError(f"no length between {fits.get('keys')} and {above.get('keys')} in {most} compiles")


def cost(rounds: int) -> dict[str, Any]:
    """Time of forward and backward pass of two layers on one CPU device, all modes beside each other."""
    mesh = Mesh(np.array(jax.devices()[:1]), (AXIS,))
    case = {"width": 256, "heads": 8, "kv_heads": 2, "head_dim": 64, "rows": 64, "keys": 16_384}
    candidates = {}
    for mode in MODES:
        jitted, shapes = stack(mesh, 2, mode, "gather_q", case, jnp.float32, turns=True)
        given = jax.tree.map(lambda s: 0.02 * jax.random.normal(jax.random.key(0), s.shape, s.dtype), shapes)
        candidates[mode] = timing.timer(jitted, *given)
    found = timing.compare(candidates, rounds=rounds, calls=2, warmup=1)
    ratios: dict[str, Any] = {}
    for mode in MODES[1:]:
        ratios |= {f"{mode}_over_none": found.ratio(mode, "none")}
        ratios |= {f"{mode}_over_none_range": found.ratio_range(mode, "none")}
    return {"kind": "time", "layers": 2, **case, "turns": True, "seed": 0, **found.summary(), **ratios}


def main(arguments: list[str]) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kernels", "temp", "longest", "time"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args(arguments)
    old = tables.read_jsonl(options.out) if options.out.exists() else []

    def known(case: dict[str, Any]) -> bool:
        return any(all(r.get(name, False) == value for name, value in case.items()) for r in old)

    made = {"kernels": kernels, "temp": temp, "longest": longest}
    cases = iter([cost(options.rounds)]) if options.what == "time" else made[options.what](known)
    for found in cases:
        record.write(options.out, found)
        shown = ("topology", "strategy", "mode", "turns", "keys", "kernels", "temp_bytes", "fits", "names_over_none")
        print(json.dumps({name: found[name] for name in shown if name in found}), file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
