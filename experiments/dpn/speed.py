# SPDX-License-Identifier: Apache-2.0
"""Prefill with pooled tokens gone, beside the dense model: how much of the saved work is saved time.

    python -m experiments.dpn.speed latency        one question: 576 visual and 64 text tokens, SmolLM2's shape
    python -m experiments.dpn.speed throughput     eight questions with different paths, regrouped by the host
    python -m experiments.dpn.speed tokens         one question, 1024 visual tokens down to 64: where it stops to pay
    python -m experiments.dpn.speed decode         four answers of 32 tokens over short caches, and the caches' bytes

Weights are random, and routers are set such that a path is taken; they and all dispatching are in the time. `realised`
= (dense time / pooled time) / (dense MACs / pooled MACs), MACs of the decoder's blocks. The static pyramid is the same
pooling without routers, compiled for its path; of several questions a program for each path, one after the other.
Sides take turns in one process; ranges are the 10th and 90th percentile of the rounds. Records go to
results/speed.jsonl. It means nothing on a machine that does other work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vtjax.account import record, timing
from vtjax.methods import dpn, dpn_deploy, dpn_switch
from vtjax.models import generate
from vtjax.models.vlm import VLM
from vtjax.ops.pooling_experts import WINDOWS
from vtjax.spec import BridgeSpec, LMSpec, ViTSpec, VLMSpec

RECORDS = Path(__file__).resolve().parent / "results" / "speed.jsonl"
SMOLLM2 = {"depth": 30, "width": 576, "heads": 9, "kv_heads": 3, "mlp": 1536, "vocab": 49152, "context": 2048}
TEXT = 64
NEW = 32  # tokens of an answer
PATHS = ((0, 0, 0), (1, 1, 1), (2, 1, 1), (2, 2, 2))
Grid = tuple[int, int]
# Rows and columns of an image's grid, multiples of 8.
GRIDS: dict[str, tuple[Grid, ...]] = {
    "latency": ((24, 24),),
    "throughput": ((24, 24),),
    "tokens": ((32, 32), (24, 24), (16, 24), (16, 16), (8, 16), (8, 8)),
    "decode": ((24, 24),),
}


def model(grid: Grid) -> tuple[VLMSpec, Any]:
    """A decoder of SmolLM2's shape behind a grid of patches; random weights."""
    size = 2 * grid[0], 2 * grid[1]
    tower = ViTSpec.uniform(depth=1, width=64, heads=1, mlp=64, image_size=size, patch=2)
    base = VLMSpec(tower, BridgeSpec(hidden=64), LMSpec.uniform(**SMOLLM2), image_token=SMOLLM2["vocab"])
    spec, _ = dpn.install(base, None, jax.random.key(0), least=1)
    params = jax.jit(VLM(spec.unreduced()).init)(jax.random.key(1))
    return spec, dpn.added(spec, params, jax.random.key(2))


def taking(spec: VLMSpec, params: Any, path: Sequence[int]) -> Any:
    """The parameters with routers that take a path whatever they read."""
    held = dict(params["decoder"][dpn.NAME])
    for (layer, _), expert in zip(dpn.reducers(spec), path, strict=True):
        name = f"block_{layer:02d}"
        router = dict(held[name]["router"])
        norm = {"scale": jnp.zeros_like(router["norm"]["scale"]), "bias": jnp.ones_like(router["norm"]["bias"])}
        said = jax.nn.gelu(jnp.ones(spec.decoder.width) @ router["hidden"]["kernel"], approximate=False)
        score = jnp.zeros((len(said), len(WINDOWS))).at[:, expert].set(100 * said)
        held[name] = {**held[name], "router": {**router, "norm": norm, "score": {"kernel": score}}}
    return {**params, "decoder": {**params["decoder"], dpn.NAME: held}}


def asked(spec: VLMSpec, batch: int) -> np.ndarray:
    """Ids of questions of `TEXT` tokens behind their image."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, spec.decoder.vocab, (batch, TEXT))
    words[:, -2] = spec.router_token
    return np.concatenate([np.full((batch, spec.visual_tokens), spec.image_token), words], axis=1).astype(np.int32)


def static(deployed: VLM, params: Any, rows: Any, path: Sequence[int]) -> jax.Array:
    """The same poolings without routers, in a program of their own."""
    grid, made = deployed.spec.grid, dpn.reducers(deployed.spec)
    ones = jnp.ones(len(rows.x))
    for stage, layers in enumerate(dpn.stretches(deployed.spec)):
        n = grid[0] * grid[1]
        rows, _ = dpn_deploy.run_layers(deployed, params, rows, n, layers, keep=False)
        if stage < len(made):
            layer, reducer = made[stage]
            held = params["decoder"][dpn.NAME][f"block_{layer:02d}"]
            rows = dpn_deploy.pooled(reducer, held, rows, ones, grid, path[stage])
            height, width = WINDOWS[path[stage]]
            grid = grid[0] // height, grid[1] // width
    return dpn_deploy.finish(deployed, params, rows, grid[0] * grid[1])


def one(what: str, grid: Grid, path: Sequence[int], rounds: int) -> dict[str, Any]:
    """Times one path for one question."""
    spec, params = model(grid)
    params = taking(spec, params, path)
    deployed = dpn.vlm(spec)
    ids, images = asked(spec, 1), np.zeros((1, *spec.image_size, 3), np.float32)
    rows = dpn_deploy.entered(deployed, params, ids, images)
    switch = jax.jit(dpn_switch.Switch(deployed).__call__)
    taken = np.asarray(switch(params, rows).choice)[0]
    if taken.tolist() != list(path):
        raise AssertionError(f"the routers must take {tuple(path)}, found {taken}")
    lm, decoder = VLM(spec.unreduced()).lm, params["decoder"]
    dense = jax.jit(lambda p, x: lm.prefill(p, embeddings=x, room=0)[0])
    pyramid = jax.jit(lambda p, r: static(deployed, p, r, path))
    found = timing.compare(
        {
            "dense": timing.timer(lambda: dense(decoder, rows.x)),
            "switch": timing.timer(lambda: switch(params, rows)),
            "static": timing.timer(lambda: pyramid(params, rows)),
        },
        rounds=rounds,
        calls=2,
        warmup=1,
    )
    return {**told(what, spec, [path]), **measures(spec, [path], found)}


def many(what: str, grid: Grid, rounds: int) -> dict[str, Any]:
    """Times eight questions that take four paths, two each."""
    spec, params = model(grid)
    paths = [path for path in PATHS for _ in range(2)]
    ids, images = asked(spec, len(paths)), np.zeros((len(paths), *spec.image_size, 3), np.float32)
    deployed = dpn.vlm(spec)
    rows = dpn_deploy.entered(deployed, params, ids, images)
    # Random routers do not differ between random questions: theirs is the time, the paths are given.
    staged, chosen = dpn_deploy.Staged(deployed), np.asarray(paths, np.int32)
    groups = [(path, _some(rows, [i for i, own in enumerate(paths) if own == path])) for path in dict.fromkeys(paths)]
    pyramids = {path: jax.jit(lambda p, r, path=path: static(deployed, p, r, path)) for path, _ in groups}
    lm, decoder = VLM(spec.unreduced()).lm, params["decoder"]
    dense = jax.jit(lambda p, x: lm.prefill(p, embeddings=x, room=0)[0])
    found = timing.compare(
        {
            "dense": timing.timer(lambda: dense(decoder, rows.x)),
            "staged": timing.timer(lambda: staged(params, rows, chosen).logits),
            "static": timing.timer(lambda: [pyramids[path](params, some) for path, some in groups]),
        },
        rounds=rounds,
        calls=1,
        warmup=1,
    )
    return {**told(what, spec, paths), **measures(spec, paths, found)}


def _some(rows: Any, which: Sequence[int]) -> Any:
    """Those of the rows."""
    return jax.tree.map(lambda x: x[np.asarray(which)], rows)


def decoding(what: str, grid: Grid, path: Sequence[int], rounds: int) -> dict[str, Any]:
    """Times the tokens after the first one, for four questions that take one path."""
    spec, params = model(grid)
    paths = [path] * 4
    ids, images = asked(spec, len(paths)), np.zeros((len(paths), *spec.image_size, 3), np.float32)
    deployed = dpn.vlm(spec)
    rows = dpn_deploy.entered(deployed, params, ids, images)
    pooled = dpn_deploy.Staged(deployed, keep=NEW - 1)(params, rows, np.asarray(paths, np.int32))
    assert pooled.cache is not None
    lm, decoder = VLM(spec.unreduced()).lm, params["decoder"]
    logits, cache = jax.jit(lambda p, x: lm.prefill(p, embeddings=x, room=NEW - 1))(decoder, rows.x)
    short = deployed.decoder_params(params)
    found = timing.compare(
        {
            "dense": timing.timer(lambda: generate.go_on(lm, decoder, logits, cache, NEW)),
            "pooled": timing.timer(lambda: generate.go_on(deployed.lm, short, pooled.logits, pooled.cache, NEW)),
        },
        rounds=rounds,
        calls=2,
        warmup=1,
    )
    times = found.timings
    return {
        **told(what, spec, paths),
        **found.summary(),
        "new_tokens": NEW,
        "pooled_ratio": found.ratio("dense", "pooled"),
        "pooled_ratio_range": found.ratio_range("dense", "pooled"),
        "tokens_per_s": {name: len(paths) * (NEW - 1) / t.median for name, t in times.items()},
        "cache_bytes": {"dense": dpn_deploy.cache_bytes(cache), "pooled": dpn_deploy.cache_bytes(pooled.cache)},
    }


def told(what: str, spec: VLMSpec, paths: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What was timed."""
    macs = [dpn.path_macs(spec, path, TEXT) for path in paths]
    dense = dpn.path_macs(spec, (0,) * len(paths[0]), TEXT)
    return {
        **{"kind": what, "visual": spec.visual_tokens, "text": TEXT, "batch": len(paths)},
        "paths": [list(path) for path in paths] if len(paths) > 1 else list(paths[0]),
        "mac_ratio": dense * len(paths) / sum(macs),
    }


def measures(spec: VLMSpec, paths: Sequence[Sequence[int]], found: timing.Comparison) -> dict[str, Any]:
    """Time over the dense time, and how much of the saved work it is."""
    summary = found.summary()
    macs = sum(dpn.path_macs(spec, path, TEXT) for path in paths)
    dense = len(paths) * dpn.path_macs(spec, (0,) * len(paths[0]), TEXT)
    out: dict[str, Any] = dict(summary)
    for name in found.timings:
        if name != "dense":
            out[f"{name}_ratio"] = found.ratio("dense", name)
            out[f"{name}_realised"] = out[f"{name}_ratio"] * macs / dense
            out[f"{name}_realised_range"] = [r * macs / dense for r in found.ratio_range("dense", name)]
    return out


def main(arguments: list[str]) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(GRIDS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--visual", type=int, nargs="*", help="numbers of visual tokens, of those that are measured")
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(exist_ok=True)
    for grid in GRIDS[options.what]:
        if options.visual and grid[0] * grid[1] not in options.visual:
            continue
        if options.what == "throughput":
            cases = iter([many(options.what, grid, options.rounds)])
        else:
            chosen = PATHS[1::2] if options.what == "tokens" else PATHS[1:]
            measure = decoding if options.what == "decode" else one
            cases = (measure(options.what, grid, path, options.rounds) for path in chosen)
        for found in cases:
            record.write(options.out, found)
            said = {name: round(v, 3) for name, v in found.items() if name.endswith(("_realised", "_ratio"))}
            print(f"{found['visual']} visual tokens, {found['paths']}: {said}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
