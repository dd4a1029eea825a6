# SPDX-License-Identifier: Apache-2.0
"""DAS beside its controls: every arm starts from one model per seed, which has not seen these kinds of questions.

    python -m experiments.das.accuracy base        the models that are transferred
    python -m experiments.das.accuracy search      the searches: the bandit's, and greedy ones, for m = 2
    python -m experiments.das.accuracy arms        full fine-tuning, LoRA, adapters; 2 of 12 layers left out, chosen by
                                                   the bandit, greedily and by chance
    python -m experiments.das.accuracy depth       more and fewer layers left out, by the bandit and by chance

`--seed=S` and `--only=TEXT` choose; what was recorded is not run again; runs lie in runs/das and resume. Every record
in results/accuracy.jsonl holds which questions were answered rightly, so that differences are paired.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.vlm import main as vlm
from vtjax.account import flops, record
from vtjax.cli import assemble
from vtjax.cli import config as config_lib
from vtjax.methods import das
from vtjax.parallel import mesh as mesh_lib
from vtjax.train import checkpoint, loop
from vtjax.train.state import flatten
from vtjax.train.task import closing
from vtjax.viz import tables

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "experiments" / "das" / "results" / "accuracy.jsonl"
CONFIG = "configs/das.py"
VARIANT = "shapes"
SEEDS = (0, 1, 2)
M = 2

Arm = tuple[str, str, dict[str, str]]
"""Name, options of the variant and overrides; `after`: the search that chooses, in place of the base model alone."""


def base() -> Iterator[Arm]:
    """The models that are transferred."""
    yield "base", "", {}


def search() -> Iterator[Arm]:
    """What chooses: as released, with the release's one validation batch, and greedily."""
    for m in (1, M, 4):
        yield f"bandit m={m}", "", {"das.skips": str(m)}
    yield f"bandit m={M} one batch", "", {"das.skips": str(M), "das.fixed_val_batch": "true"}
    yield f"greedy m={M}", "", {"das.skips": str(M), "das.by": "greedy"}


def arms() -> Iterator[Arm]:
    """Two layers of twelve left out, and none."""
    yield "full", "arm=full", {"optim.lr": "5e-4"}
    yield "lora", "arm=lora", {"optim.lr": "3e-3"}
    yield "adapters", "phase=finetune", {"das.skips": "0"}
    for name in (f"bandit m={M}", f"bandit m={M} one batch", f"greedy m={M}"):
        yield name, "phase=finetune", {"das.skips": str(M), "after": name}
    yield f"random m={M}", "phase=finetune", {"das.skips": str(M), "das.remove": "random"}


def depth() -> Iterator[Arm]:
    """One and four layers of twelve."""
    for m in (1, 4):
        yield f"bandit m={m}", "phase=finetune", {"das.skips": str(m), "after": f"bandit m={m}"}
        yield f"random m={m}", "phase=finetune", {"das.skips": str(m), "das.remove": "random"}


KINDS = {"base": base, "search": search, "arms": arms, "depth": depth}


def run_of(root: str, kind: str, name: str, seed: int) -> str:
    """Where a run lies; `depth` is more of `arms`."""
    kind = "arms" if kind == "depth" else kind
    return f"{root}/{kind}/{re.sub('[^a-z0-9=.]+', '_', name).strip('_')}_{seed}"


def settings(root: str, kind: str, arm: Arm, seed: int, more: dict[str, str]) -> config_lib.Config:
    """The config of one run. `more`: further overrides, for runs at another size."""
    name, options, overrides = arm
    given = {**overrides, **more, "seed": str(seed)}
    after = given.pop("after", "")
    if kind != "base":
        given["init_from"] = run_of(root, "search", after, seed) if after else run_of(root, "base", "base", seed)
    variant = f"{VARIANT}_base" if kind == "base" else ",".join(filter(None, (VARIANT, options)))
    if "arm=" in options:  # no leaf of the method
        given = {leaf: value for leaf, value in given.items() if not leaf.startswith("das.")}
    config = config_lib.load_config(CONFIG, variant, given)
    config_lib.override(config, "workdir", run_of(root, kind, name, seed))
    return config


def one(root: str, kind: str, arm: Arm, seed: int, more: dict[str, str]) -> dict[str, Any]:
    """Trains one arm, or finds it done, and measures it."""
    config = settings(root, kind, arm, seed, more)
    task, data = assemble.assemble(config)
    result = loop.train(task, data, config, config.workdir)
    found = {"steps": config.steps, "batch_size": config.batch_size, "lr": config.optim.lr}
    found |= {leaf.replace(".", "_"): value for leaf, value in arm[2].items()}
    kept = ("params_sha256", "loss", "count", "seconds", "images_per_s")
    found |= {k: v for k, v in result.items() if k in kept or k.startswith("top1")}
    if kind == "search":
        extra = checkpoint.load_extra(config.workdir)
        m = config.das.skips
        return {
            **found,
            "skips": sorted(np.argsort(extra["preference"], kind="stable")[-m:].tolist()),
            "preference": extra["preference"].tolist(),
            **{name: int(extra[name]) for name in ("updates", "poisoned", "flat")},
        }
    spec, params = checkpoint.load_params(config.workdir)
    tokens = spec.placeholders + flops.QUESTION
    trained = [a.size for path, a in flatten(params).items() if task.trainable(path)]
    right = answers(config, spec, data, params)
    return {
        **found,
        "skips": [i for i, block in enumerate(spec.decoder.blocks) if not block.attn and not block.ffn],
        "trained": int(sum(trained)),
        "macs_per_prompt": flops.macs(spec) + das.adapter_cost(spec.decoder, tokens)[1],
        "correct": "".join(map(str, right.astype(int))),
    }


def answers(config: Any, spec: Any, data: Any, params: Any) -> np.ndarray:
    """Which test questions are answered rightly, by their number."""
    model = das.vlm(spec, **vlm.options(config))
    run = jax.jit(lambda p, b: vlm.asked(model, p, b).right)
    params = jax.tree.map(jnp.asarray, params)
    told: dict[int, bool] = {}
    batches = data.eval("eval")
    with closing(batches), jax.set_mesh(mesh_lib.make(config.mesh)):
        for batch in batches:
            given = {name: value for name, value in batch.items() if name not in ("valid", "index")}
            here = np.asarray(run(params, given))
            asked = (batch["question"] >= 0) & batch["valid"][:, None]
            told |= dict(zip(batch["question"][asked].tolist(), (here[asked] > 0).tolist(), strict=True))
    return np.array([told[number] for number in sorted(told)])


def wanted(name: str, only: str) -> bool:
    """Whether `--only` means an arm."""
    return name == only[1:] if only.startswith("=") else only in name


def main(arguments: list[str]) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=KINDS)
    parser.add_argument("--seed", type=int, action="append", help="one of them; else all")
    parser.add_argument("--only", default="", help="arms whose name contains this; =NAME is that one")
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("--runs", default="runs/das", help="folder of the runs")
    parser.add_argument("--leaf", action="append", default=[], help="LEAF=VALUE, for runs at another size")
    options = parser.parse_args(arguments)
    more = dict(pair.split("=", 1) for pair in options.leaf)
    rows = tables.read_jsonl(options.out) if options.out.exists() else []
    known = {(r["kind"], r["name"], r["seed"]) for r in rows}
    for seed in options.seed or SEEDS:
        for arm in KINDS[options.what]():
            if not wanted(arm[0], options.only) or (options.what, arm[0], seed) in known:
                continue
            found = one(options.runs, options.what, arm, seed, more)
            options.out.parent.mkdir(exist_ok=True)
            record.write(options.out, {"kind": options.what, "name": arm[0], "seed": seed, **found})
            print(f"{arm[0]}, seed {seed}: {100 * found['top1']:.1f} %", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
