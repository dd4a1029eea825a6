# SPDX-License-Identifier: Apache-2.0
"""How many questions are answered rightly, and what it takes to learn it.

    python -m experiments.vlm.accuracy easyvqa      the small model from scratch, 3 seeds
    python -m experiments.vlm.accuracy smollm2      ViT-Ti/16 and SmolLM2-135M: the bridge, then all, the decoder by
                                                    low-rank updates
    python -m experiments.vlm.accuracy packing      training with several questions per row, and with one

The first two append one record per run to results/accuracy.jsonl; what was recorded is not run again, and runs lie in
runs/vlm and resume. Seconds are those of the whole run, compilation and evaluations included, and None where it was
interrupted. `packing` compares equal numbers of questions per step, in turns, and appends to results/packing.jsonl; its
ratio means nothing on a machine that does other work.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vtjax.account import record, timing
from vtjax.cli import assemble
from vtjax.cli import config as config_lib
from vtjax.parallel import mesh as mesh_lib
from vtjax.train import checkpoint, loop
from vtjax.train.program import Program
from vtjax.viz import curves, tables

RESULTS = Path(__file__).resolve().parent / "results"
CONFIG = "configs/vlm.py"
SEEDS = (0, 1, 2)
PACK, QUESTIONS = 12, 384  # questions of a row, and of a training step

Run = tuple[str, str, dict[str, str]]
"""Name, `VARIANT,option=value`, overrides."""


def easyvqa() -> Iterator[Run]:
    """The recipe, three times."""
    for seed in SEEDS:
        yield f"easyvqa {seed}", "easyvqa", {"seed": str(seed)}


def smollm2() -> Iterator[Run]:
    """The bridge alone; from there the decoder by low-rank updates, and the tower with it."""
    yield "smollm2 bridge 0", "smollm2,stage=bridge,steps=300", {}
    start = {"init_from": folder("smollm2 bridge 0"), "optim.lr": "3e-4"}
    yield "smollm2 decoder 0", "smollm2,stage=decoder,lora=8", start
    yield "smollm2 all 0", "smollm2,stage=all,lora=8", start


RUNS = {"easyvqa": easyvqa, "smollm2": smollm2}


def folder(name: str) -> str:
    """Where a run lies."""
    return "runs/vlm/" + name.replace(" ", "_")


def trained(run: Run) -> dict[str, Any]:
    """Trains (or finds done) and tells the result, the evaluations on the way and the time."""
    name, variant, overrides = run
    config = config_lib.load_config(CONFIG, variant, overrides)
    workdir = folder(name)
    config_lib.override(config, "workdir", workdir)
    begun = checkpoint.begun(workdir) is not None
    began = time.monotonic()
    task, data = assemble.assemble(config)
    result = loop.train(task, data, config, workdir)
    seconds = time.monotonic() - began
    known = curves.series(workdir)
    accuracies = {kind.removeprefix("eval/"): known[kind] for kind in known if kind.startswith("eval/top1")}
    left_out = ("seed", "versions", "devices", "seconds", "experiment")  # a record has its own, or says it otherwise
    return {
        **{"variant": variant, "seed": config.seed, "steps": config.steps, "batch_size": config.batch_size},
        **{"lr": config.optim.lr, "pack": config.data.pack, "rows": data.train_examples},
        **{k: v for k, v in result.items() if k not in left_out},
        "seconds": None if begun else round(seconds, 1),
        "evaluations": {kind: [s.tolist(), np.round(v, 4).tolist()] for kind, (s, v) in accuracies.items()},
    }


def packing(rounds: int, calls: int) -> dict[str, Any]:
    """Seconds of a training step on the same number of questions, packed and not."""
    measures: dict[str, timing.Measure] = {}
    asked: dict[str, float] = {}
    slots: dict[str, float] = {}
    for name, pack in (("packed", PACK), ("alone", 1)):
        overrides = {"data.pack": str(pack), "data.prefetch": "0"}
        config = config_lib.load_config(CONFIG, f"easyvqa,batch_size={QUESTIONS // pack}", overrides)
        task, data = assemble.assemble(config)
        program = Program(task, config, mesh_lib.make(config.mesh))
        state, frozen = program.init()
        batches = [next(data.train(step)) for step in range(8)]
        placed = mesh_lib.place(batches[0], program.mesh)
        asked[name] = float(np.mean([(b["question"] >= 0).sum() for b in batches]))
        slots[name] = float(np.mean([b["input_ids"].size for b in batches]))
        held = [state]

        def step(program: Any = program, held: Any = held, frozen: Any = frozen, placed: Any = placed) -> Any:
            held[0], metrics = program.step(held[0], frozen, program.knobs(), placed, program.key, np.int32(0))
            return metrics

        measures[name] = timing.timer(step)
    found = timing.compare(measures, rounds=rounds, calls=calls, warmup=1)
    per_s = {name: asked[name] / found.timings[name].median for name in measures}
    return {
        **{
            "kind": "packing",
            "set": "easy_vqa",
            "pack": PACK,
            "rows": {"packed": QUESTIONS // PACK, "alone": QUESTIONS},
        },
        **{"questions_per_step": asked, "slots_per_step": slots, "questions_per_s": per_s},
        **{"per_question": per_s["packed"] / per_s["alone"], **found.summary()},
    }


def main(arguments: list[str]) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*RUNS, "packing"))
    parser.add_argument("--only", default="", help="runs whose name contains this")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each side of packing")
    parser.add_argument("--calls", type=int, default=3, help="timed steps per turn of packing")
    parser.add_argument("--out", type=Path, help="in place of results/accuracy.jsonl or results/packing.jsonl")
    options = parser.parse_args(arguments)
    if options.what == "packing":
        found = record.write(options.out or RESULTS / "packing.jsonl", packing(options.rounds, options.calls))
        print(f"{found['per_question']:.2f} times as many questions per second when packed", file=sys.stderr)
        return 0
    out = options.out or RESULTS / "accuracy.jsonl"
    known = {r["name"] for r in (tables.read_jsonl(out) if out.exists() else [])}
    for run in RUNS[options.what]():
        if options.only not in run[0] or run[0] in known:
            continue
        found = record.write(out, {"kind": options.what, "name": run[0], **trained(run)})
        print(f"{run[0]}: accuracy {found['top1']:.3f}", file=sys.stderr)
        jax.clear_caches()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
