# SPDX-License-Identifier: Apache-2.0
"""What leaving layers out saves in time, and what looking for them costs.

    python -m experiments.das.cost latency     a whole prompt, image and text, of the model of configs/das.py:easyvqa
    python -m experiments.das.cost search      SmolLM2's decoder behind 64 visual tokens, also while layers are sought
    python -m experiments.das.cost whole       a search and a fine-tuning, from runs/das/base/base_0 (see accuracy)
    ... --tiny                                 a model of no meaning, to try the script

Nothing else may use the cores. Times do not depend on weights, which are random.

A record of `latency` has the times of a batch of 32 with adapters in all layers and with m = 1, 2, 4 layers removed,
which take turns, and what part of the work that is saved is time that is saved. One of `search` has, for one m, the
median times and their ratios of the decoder without adapters, with adapters, with m layers left out while it runs (the
search's program) and with m removed; the gradient in the adapters of the last three; and the forward pass of a
candidate, from which follows the share that c candidates every `every` steps add. One of `whole` has the seconds of
both runs, once each, with what they compile and evaluate. Appends to results/cost.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.das import main as experiment
from experiments.vlm import main as vlm
from vtjax.account import flops, record, timing
from vtjax.cli import assemble
from vtjax.cli import config as config_lib
from vtjax.methods import das
from vtjax.models.adapters import STYLES
from vtjax.models.lm import LM
from vtjax.models.vlm import VLM
from vtjax.ops import bandit
from vtjax.spec import LMSpec
from vtjax.train import checkpoint, loop
from vtjax.train.executables import Executables

RECORDS = Path(__file__).resolve().parent / "results" / "cost.jsonl"
SMOLLM2 = {"depth": 30, "width": 576, "heads": 9, "kv_heads": 3, "mlp": 1536, "vocab": 49152, "context": 2048}
TINY = {"depth": 4, "width": 32, "heads": 2, "mlp": 64, "vocab": 64}
TOKENS, BATCH = 128, 4
REMOVED, ROWS = (1, 2, 4), 32
CANDIDATES, EVERY = 3, 10


def one(shape: dict[str, Any], m: int, rounds: int, seed: int = 0) -> dict[str, Any]:
    """Times one m, with layers chosen by chance."""
    base, key = LMSpec.uniform(**shape), jax.random.key(seed)
    bare = jax.jit(LM(base).init)(key)
    whole, searched = das.install(base, bare, STYLES["llama"], key)
    skips = sorted(np.random.default_rng(seed).choice(base.depth, m, replace=False).tolist())
    plain, adapted = das.remove(whole, searched, [])
    short, removed = das.remove(whole, searched, skips)
    skip = bandit.mask(tuple(skips), base.depth)
    ids = np.random.default_rng(seed).integers(0, base.vocab, (BATCH, TOKENS)).astype(np.int32)
    models = {name: LM(spec, adapters=das.attached(spec)) for name, spec in (("adapters", plain), ("removed", short))}
    search = LM(whole, adapters=das.attached(whole))

    def forward(model: LM, params: Any, knobs: Any = None) -> Callable[[], Any]:
        run = jax.jit(lambda p, k: model.prefill(p, ids, room=0, knobs=k)[0])
        return lambda: run(params, knobs)

    def masked(params: Any) -> Callable[[], Any]:
        slot = np.full((BATCH, 1), TOKENS - 1)
        run = jax.jit(lambda p, s: search.apply(p, ids, knobs={"skipped": s}, slots=slot)[0])
        return lambda: run(params, skip)

    def gradient(model: LM, params: Any, knobs: Any = None) -> Callable[[], Any]:
        def loss(own: Any, params: Any, knobs: Any) -> Any:
            return jax.nn.logsumexp(model.apply({**params, "das": own}, ids, knobs=knobs)[0], axis=-1).mean()

        run = jax.jit(jax.grad(loss))
        return lambda: run(params["das"], params, knobs)

    timed = {
        "dense": forward(LM(base), bare),
        "adapters": forward(models["adapters"], adapted),
        "masked": masked(searched),
        "removed": forward(models["removed"], removed),
        "adapters_gradient": gradient(models["adapters"], adapted),
        "masked_gradient": gradient(search, searched, {"skipped": skip}),
        "removed_gradient": gradient(models["removed"], removed),
    }
    found = timing.compare({name: timing.timer(run) for name, run in timed.items()}, rounds=rounds, calls=2, warmup=1)
    work = {
        "dense": flops.macs(base, TOKENS),
        "adapters": flops.macs(plain, TOKENS) + das.adapter_cost(plain, TOKENS)[1],
        "removed": flops.macs(short, TOKENS) + das.adapter_cost(short, TOKENS)[1],
    }
    ratio = {name: found.ratio("adapters", name) for name in ("dense", "masked", "removed")}
    ratio |= {name: found.ratio("adapters_gradient", name) for name in ("masked_gradient", "removed_gradient")}
    spent = found.timings["masked"].median / found.timings["masked_gradient"].median
    return {
        **{
            "kind": "cost",
            "layers": base.depth,
            "m": m,
            "skips": skips,
            "batch": BATCH,
            "tokens": TOKENS,
            "seed": seed,
        },
        **{"macs": work, "mac_ratio": work["adapters"] / work["removed"], "time_ratio": ratio},
        "realised": ratio["removed"] / (work["adapters"] / work["removed"]),
        **{"candidates": CANDIDATES, "every": EVERY, "search_share": CANDIDATES / EVERY * spent},
        "timing": found.summary(),
    }


def latency(config: Any, removed: tuple[int, ...], rows: int, rounds: int, seed: int = 0) -> dict[str, Any]:
    """Times whole prompts, one image and `flops.QUESTION` tokens of text a row, to the logits of the last one."""
    base, _ = vlm.composed(config)
    whole, searched = das.install(
        base, jax.jit(VLM(base).init)(jax.random.key(seed)), experiment.style_of(config), jax.random.key(1)
    )
    order, rng = np.random.default_rng(seed).permutation(base.decoder.depth), np.random.default_rng(seed)
    length = base.placeholders + flops.QUESTION
    ids = rng.integers(1, base.decoder.vocab, (rows, length)).astype(np.int32)
    ids[ids == base.image_token] = 0
    ids[:, : base.placeholders] = base.image_token
    images = rng.normal(size=(rows, *base.image_size, 3)).astype(np.float32)

    def prompt(spec: Any, params: Any) -> Callable[[], Any]:
        model, slot = das.vlm(spec), np.full((rows, 1), length - 1)
        run = jax.jit(lambda p: model.apply(p, ids, images, slots=slot)[0])
        return lambda: run(params)

    made = {m: das.remove(whole, searched, sorted(order[:m].tolist())) for m in (0, *removed)}
    found = timing.compare({str(m): timing.timer(prompt(*each)) for m, each in made.items()}, rounds=rounds, calls=5)
    work = {m: flops.macs(spec, length) + das.adapter_cost(spec.decoder, length)[1] for m, (spec, _) in made.items()}
    cuts = {
        str(m): {"work": 1 - work[m] / work[0], "time": 1 - found.timings[str(m)].median / found.timings["0"].median}
        for m in removed
    }
    for m, cut in cuts.items():
        # Ratios within a round: what else the machine did meets both.
        low, high = found.ratio_range(m, "0")
        cut |= {"time_p10": 1 - high, "time_p90": 1 - low, "realised": cut["time"] / cut["work"]}
    return {
        **{"kind": "latency", "layers": base.decoder.depth, "order": order.tolist(), "batch": rows, "tokens": length},
        **{"seed": seed, "macs": {str(m): count for m, count in work.items()}, "cut": cuts, "timing": found.summary()},
    }


def whole(base: str, variant: str) -> dict[str, Any]:
    """One search and one fine-tuning without skipping, from the same model, one after the other."""
    seconds, executables = {}, Executables()
    for phase, leaves in (("search", {}), ("finetune", {"das.skips": "0"})):
        config = config_lib.load_config("configs/das.py", f"{variant},phase={phase}", {**leaves, "init_from": base})
        with tempfile.TemporaryDirectory() as folder:
            config_lib.override(config, "workdir", folder)
            task, data = assemble.assemble(config)
            seconds[phase] = loop.train(task, data, config, folder, executables)["seconds"]
            if phase == "search":
                updates = int(checkpoint.load_extra(folder)["updates"])
                compiled = executables.compiled["step"] + task.after_step.loss._cache_size()
    return {
        **{"kind": "whole", "steps": config.steps, "updates": updates, "seconds": seconds},
        **{"candidate_passes": updates * config.das.candidates, "compilations": compiled},
    }


def main(arguments: list[str]) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("latency", "search", "whole"), nargs="+")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--skips", default="2,4,8", help="m of a search, one after the other")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--base", default="runs/das/base/base_0", help="what a whole search starts from")
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args(arguments)
    if "latency" in options.what:
        config = config_lib.load_config("configs/das.py", "tiny" if options.tiny else "easyvqa")
        removed, rows = ((1, 2), 2) if options.tiny else (REMOVED, ROWS)
        made = record.write(options.out, latency(config, removed, rows, options.rounds))
        print(f"cut of work and time by layers removed: {made['cut']}", file=sys.stderr)
    if "whole" in options.what:
        made = record.write(options.out, whole(options.base, "tiny" if options.tiny else "easyvqa"))
        print(f"seconds: {made['seconds']}", file=sys.stderr)
    for m in () if "search" not in options.what else (1,) if options.tiny else map(int, options.skips.split(",")):
        made = record.write(options.out, one(TINY if options.tiny else SMOLLM2, m, options.rounds))
        print(f"m = {m}: {made['mac_ratio']:.2f} times less work, {made['time_ratio']} times as fast", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
