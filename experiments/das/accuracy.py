# SPDX-License-Identifier: Apache-2.0
"""DAS beside its controls: every arm starts from one model per seed, which has not seen these kinds of questions.

    python -m experiments.das.accuracy base        the models that are transferred
    python -m experiments.das.accuracy search      the searches: the bandit's, and a greedy one
    python -m experiments.das.accuracy arms        full fine-tuning, LoRA, adapters; 1, 2, 4 and 8 of 12 layers left
                                                   out, chosen by the bandit, greedily and by chance
    python -m experiments.das.accuracy others      trained prompts, DGMR at equal work, weights in eight bits
    python -m experiments.das.accuracy disturbed   searches with noisy answers or few of them, and what follows
    python -m experiments.das.accuracy base search arms others disturbed    all of it, seed by seed
    python -m experiments.das.accuracy search arms --task=sortofclevr
                                                   a task that needs some layers; its models are those of
                                                   experiments.dpn.accuracy (runs/dpn/dense_SEED)

`--seed=S` and `--only=TEXT` choose; what was recorded is not run again; runs lie in runs/das and resume. Every record
in results/accuracy.jsonl (sortofclevr.jsonl) holds which questions were answered rightly, so that differences are
paired; that of a search its preferences after every update, and the validation loss without each layer.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import vtjax
from experiments.das import deployed
from experiments.das import main as experiment
from experiments.das import others as ways
from experiments.vlm import main as vlm
from vtjax.account import flops, record
from vtjax.cli import assemble
from vtjax.cli import config as config_lib
from vtjax.methods import das
from vtjax.ops import bandit
from vtjax.parallel import mesh as mesh_lib
from vtjax.train import checkpoint, loop
from vtjax.train.executables import Executables
from vtjax.train.state import flatten
from vtjax.train.task import closing
from vtjax.viz import tables
from vtjax.weights import store

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "das" / "results"
CONFIG = "configs/das.py"
SEEDS = (0, 1, 2, 3, 4)
M = 2
MOST = 8  # so many that the rest is needed: where a choice should matter
ONE_BATCH = f"bandit m={M} one batch"
LAYER_BATCHES = 8  # validation batches by which a layer is judged alone
PROMPTS = 16
NARROW = 85
"""Neurons of 128 that leave the decoder as much work as m = 2 does (`macs_per_prompt` of the records)."""

FEW = ("red", "blue", "teal")  # answers, of eight, of a biased validation split


class Arm(NamedTuple):
    """One run of a seed.

    Attributes:
      name: of its records.
      options: of the variant.
      leaves: overrides.
      after: (kind, name) of the run that it starts from; else the base model.
      chosen: (kind, name) of the search that says which layers go. Nothing else of it is taken: it trained the bridge,
        too.
      draw: number of a further draw of layers by chance, another one for every seed; 0 = none.
      way: what is special: "prompt", "dgmr", "int8", or an edit of the data.
    """

    name: str
    options: str = ""
    leaves: dict[str, str] = {}
    after: tuple[str, str] = ("base", "base")
    way: str = ""
    chosen: tuple[str, str] = ("", "")
    draw: int = 0


def base() -> Iterator[Arm]:
    """The models that are transferred."""
    yield Arm("base")


def search() -> Iterator[Arm]:
    """What chooses: the bandit, also with the release's one validation batch, and greedily."""
    for m in (1, M, 4, MOST):
        yield Arm(f"bandit m={m}", leaves={"das.skips": str(m)})
    yield Arm(ONE_BATCH, leaves={"das.skips": str(M), "das.fixed_val_batch": "true"})
    yield Arm(f"greedy m={M}", leaves={"das.skips": str(M), "das.by": "greedy"})


def arms() -> Iterator[Arm]:
    """Nothing left out, and one, two, four and eight layers of twelve."""
    yield Arm("full", "arm=full", {"optim.lr": "1e-3"})
    yield Arm("lora", "arm=lora")
    yield Arm("adapters", "phase=finetune", {"das.skips": "0"})
    for m in (M, 1, 4, MOST):
        for name in (f"bandit m={m}", *((ONE_BATCH, f"greedy m={m}") if m == M else ())):
            yield Arm(name, "phase=finetune", {"das.skips": str(m)}, chosen=("search", name))
        yield Arm(f"random m={m}", "phase=finetune", {"das.skips": str(m), "das.remove": "random"})


def others() -> Iterator[Arm]:
    """What is trained or saved otherwise."""
    yield Arm("bridge", "arm=bridge")
    yield Arm(f"prompt {PROMPTS}", "arm=prompt", way="prompt")
    yield Arm("dgmr", "phase=finetune", {"das.skips": "0"}, way="dgmr")
    yield Arm("int8", "phase=finetune", {"das.skips": "0"}, ("arms", "adapters"), way="int8")


DISTURBED = ("noise 0.1", "noise 0.2", "few answers")


def disturbed() -> Iterator[Arm]:
    """Searches whose answers are wrong, or whose validation questions have few answers; then what they chose,
    fine-tuned on clean data."""
    for way in DISTURBED:
        yield Arm(f"search, {way}", leaves={"das.skips": str(M)}, way=way)
        yield Arm(way, "phase=finetune", {"das.skips": str(M)}, chosen=("disturbed", f"search, {way}"))


def needed_search() -> Iterator[Arm]:
    """Where some layers are needed: two and four of eight."""
    for m in (M, 4):
        yield Arm(f"bandit m={m}", leaves={"das.skips": str(m)})
    yield Arm(f"greedy m={M}", leaves={"das.skips": str(M), "das.by": "greedy"})


def needed_arms() -> Iterator[Arm]:
    """The same, chosen by the bandit, greedily, by chance (several draws, as one may be lucky), and the last ones: what
    one would do who knows nothing of the model but that its first layers matter most."""
    yield Arm("adapters", "phase=finetune", {"das.skips": "0"})
    for m in (M, 4):
        for name in (f"bandit m={m}", *((f"greedy m={m}",) if m == M else ())):
            yield Arm(name, "phase=finetune", {"das.skips": str(m)}, chosen=("search", name))
        yield Arm(f"random m={m}", "phase=finetune", {"das.skips": str(m), "das.remove": "random"})
        for draw in (2, 3):
            yield Arm(f"random m={m}, draw {draw}", "phase=finetune", {"das.skips": str(m)}, draw=draw)
        last = str(list(range(8 - m, 8)))
        yield Arm(f"last m={m}", "phase=finetune", {"das.skips": str(m), "das.remove": last})


class Transfer(NamedTuple):
    """A model and what it is transferred to.

    Attributes:
      variant: of the config.
      model: where the model of a seed lies; "" = the base of the same seed among the runs.
      runs: folder of the runs.
      records: name of their file.
      kinds: what can be run.
    """

    variant: str
    model: str
    runs: str
    records: str
    kinds: dict[str, Callable[[], Iterator[Arm]]]


KINDS = {"base": base, "search": search, "arms": arms, "others": others, "disturbed": disturbed}
TASKS = {
    "easyvqa": Transfer("easyvqa", "", "runs/das", "accuracy.jsonl", KINDS),
    "sortofclevr": Transfer(
        "sortofclevr",
        "runs/dpn/dense_{seed}",
        "runs/das/sortofclevr",
        "sortofclevr.jsonl",
        {"search": needed_search, "arms": needed_arms},
    ),
}


def run_of(root: str, kind: str, name: str, seed: int) -> str:
    """Where a run lies."""
    return f"{root}/{kind}/{re.sub('[^a-z0-9=.]+', '_', name).strip('_')}_{seed}"


def settings(
    root: str, kind: str, arm: Arm, seed: int, more: dict[str, str], task: Transfer = TASKS["easyvqa"]
) -> config_lib.Config:
    """The config of one run. `more`: further overrides, for runs at another size."""
    given = {**arm.leaves, **more, "seed": str(seed)}
    if kind != "base":
        after = task.model.format(seed=seed) if arm.after[0] == "base" else ""
        given["init_from"] = after or run_of(root, *arm.after, seed)
    if arm.draw:
        m = int(arm.leaves["das.skips"])
        layers = np.random.default_rng((seed, m, arm.draw)).choice(8, m, replace=False)
        given["das.remove"] = str(sorted(layers.tolist()))
    if all(arm.chosen):
        given["das.preferences"] = run_of(root, *arm.chosen, seed)
    variant = f"{task.variant}_base" if kind == "base" else ",".join(filter(None, (task.variant, arm.options)))
    if "arm=" in arm.options:  # no leaf of the method
        given = {leaf: value for leaf, value in given.items() if not leaf.startswith("das.")}
    config = config_lib.load_config(CONFIG, variant, given)
    config_lib.override(config, "workdir", run_of(root, kind, arm.name, seed))
    return config


def prepared(config: config_lib.Config, way: str) -> tuple[Any, Any, Any]:
    """(task, data, model) of a run; the model None where it follows from what is trained."""
    if way == "prompt":
        task, model = ways.prompted(config, PROMPTS)
        return task, vlm.data(config, task), model
    if way == "dgmr":
        m = vtjax.load(config.init_from)
        path = Path(f"{config.init_from}_{NARROW}.safetensors")
        store.save(path, *ways.narrower(m.spec, m.params, NARROW))
        config_lib.override(config, "init_from", str(path))
    if way in DISTURBED:
        kind, _, share = way.partition(" ")
        held = config.das.val_split
        edit = ways.noisy(float(share), config.seed) if kind == "noise" else ways.biased(held, FEW)
        task = assemble.task(config)
        return task, experiment.data(config, task, edit=edit), None
    return *assemble.assemble(config), None


def one(
    root: str,
    kind: str,
    arm: Arm,
    seed: int,
    more: dict[str, str],
    executables: Executables,
    transfer: Transfer = TASKS["easyvqa"],
) -> dict[str, Any]:
    """Trains one arm, or finds it done, and measures it."""
    config = settings(root, kind, arm, seed, more, transfer)
    task, data, model = prepared(config, arm.way)
    found: dict[str, Any] = {"steps": config.steps, "batch_size": config.batch_size, "lr": config.optim.lr}
    if arm.way == "int8":
        spec, params = checkpoint.load_params(config.init_from)
        params = ways.int8(params, task.trainable)
    else:
        watch = Watch(task.after_step)
        task = task if task.after_step is None else dataclasses.replace(task, after_step=watch)
        programs = executables.compiled["step"] + executables.shared["step"]
        result = loop.train(task, data, config, config.workdir, executables)
        kept = ("params", "params_sha256", "loss", "seconds", "images_per_s")
        found |= {k: v for k, v in result.items() if k in kept or k.startswith("top1")}
        spec, params = checkpoint.load_params(config.workdir)
        if task.after_step is not None:
            programs = executables.compiled["step"] + executables.shared["step"] - programs
            return {**found, **searched(config, watch, data, params, programs)}
    told = answers(config, model or das.vlm(spec, **vlm.options(config)), data, params)
    tokens = spec.placeholders + flops.QUESTION
    trained = [a.size for path, a in flatten(params).items() if task.trainable(path)]
    return {
        **found,
        "skips": list(deployed.gone(spec.decoder)),
        "trained": int(sum(trained)),
        "macs_per_prompt": flops.macs(spec, tokens + (PROMPTS if arm.way == "prompt" else 0))
        + das.adapter_cost(spec.decoder, tokens)[1],
        "top1": float(told.mean()),
        "count": len(told),
        "correct": "".join(map(str, told.astype(int))),
    }


class Watch:
    """The preferences of a search after every update; not those of an earlier process that it goes on from."""

    def __init__(self, after_step: Any):
        self.after_step, self.history = after_step, list[list[float]]()

    def __call__(self, state: Any, frozen: Any, draw: Any, step: int) -> Any:
        state = self.after_step(state, frozen, draw, step)
        if int(state.extra["updates"]) > len(self.history):
            self.history.append(np.asarray(state.extra["preference"]).round(5).tolist())
        return state


def searched(config: Any, watch: Watch, data: Any, params: Any, programs: int) -> dict[str, Any]:
    """What a search has found, what it cost in forward passes beside its training steps, and what each layer is worth
    to the model that it trained: the validation loss without it alone, and with all."""
    extra, made = checkpoint.load_extra(config.workdir), watch.after_step
    m, arms, updates = config.das.skips, made.bandit.arms, int(extra["updates"])
    programs += made.loss._cache_size()  # before it is asked about parameters that lie on the host
    greedy = made.greedy * sum(arms - place for place in range(m))
    with jax.set_mesh(mesh_lib.make(config.mesh)):
        # Batches that no update has seen.
        batches = [data.draw("val", config.steps + number) for number in range(LAYER_BATCHES)]
        masks = [bandit.mask(subset, arms) for subset in ((), *((arm,) for arm in range(arms)))]
        lost = [np.mean([float(made.loss(params, batch, mask)) for batch in batches]) for mask in masks]
    return {
        "skips": sorted(bandit.final(extra["preference"], m).tolist()),
        "preference": extra["preference"].tolist(),
        "history": watch.history if len(watch.history) == updates else [],
        **{name: int(extra[name]) for name in ("updates", "poisoned", "flat")},
        "candidate_passes": updates * config.das.candidates * (made.bandit.candidates > 0) + greedy,
        "compilations": programs,
        "loss_with_all": float(lost[0]),
        "loss_without": [float(loss) for loss in lost[1:]],
    }


def answers(config: Any, model: Any, data: Any, params: Any) -> np.ndarray:
    """Which test questions are answered rightly, by their number."""
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
    parser.add_argument("what", choices=KINDS, nargs="+")
    parser.add_argument("--seed", type=int, action="append", help="one of them; else all")
    parser.add_argument("--only", default="", help="arms whose name contains this; =NAME is that one")
    parser.add_argument("--task", choices=TASKS, default="easyvqa")
    parser.add_argument("--out", type=Path, help="of the records; else in results/")
    parser.add_argument("--runs", help="folder of the runs; else runs/das or below it")
    parser.add_argument("--leaf", action="append", default=[], help="LEAF=VALUE, for runs at another size")
    options = parser.parse_args(arguments)
    more = dict(pair.split("=", 1) for pair in options.leaf)
    task = TASKS[options.task]
    unknown = [kind for kind in options.what if kind not in task.kinds]
    if unknown:
        parser.error(f"with --task={options.task} one of {', '.join(task.kinds)}, found {unknown[0]}")
    out, runs = options.out or RESULTS / task.records, options.runs or task.runs
    rows = tables.read_jsonl(out) if out.exists() else []
    known, executables = {(r["kind"], r["name"], r["seed"]) for r in rows}, Executables()
    for seed in options.seed or SEEDS:
        for kind, arm in [(what, arm) for what in options.what for arm in task.kinds[what]()]:
            if not wanted(arm.name, options.only) or (kind, arm.name, seed) in known:
                continue
            found = one(runs, kind, arm, seed, more, executables, task)
            out.parent.mkdir(exist_ok=True)
            record.write(out, {"kind": kind, "name": arm.name, "seed": seed, **found})
            print(f"{kind}: {arm.name}, seed {seed}: {100 * found['top1']:.1f} %", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
