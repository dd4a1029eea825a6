# SPDX-License-Identifier: Apache-2.0
"""DPN beside its controls on the procedural questions: every arm starts from one dense model per seed, equal steps.

    python -m experiments.dpn.accuracy dense       the dense models, 5 seeds
    python -m experiments.dpn.accuracy arms        the arms of the comparison, from the dense models
    python -m experiments.dpn.accuracy tau         more and less budget
    python -m experiments.dpn.accuracy routers     routers learn first, while the model stands still
    python -m experiments.dpn.accuracy gentle      the same and its controls, trained at a third of the learning rate
    python -m experiments.dpn.accuracy start       the dense models as they are, on the questions of the arms
    python -m experiments.dpn.accuracy relaxed     routers at more work than they were trained for
    python -m experiments.dpn.accuracy within      routers' decisions, permuted among questions of one type
    python -m experiments.dpn.accuracy easyvqa     the same on easy-VQA: its dense model, then a few arms
    python -m experiments.dpn.accuracy paths       every path in the dense models as they are, by type of question;
                                                   routers read the token in front of the answer

`--seed=S` and `--only=TEXT` choose; what was recorded is not run again; runs lie in runs/dpn and resume. Every record
in results/accuracy.jsonl holds which questions were answered rightly and which experts were taken, so that differences
are paired; and what the same model answers with its decisions permuted over the test questions (the same histogram of
paths, so the same work), which tells whether decisions fit their questions.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.dpn import main as experiment
from experiments.vlm import main as vlm
from vtjax.account import record
from vtjax.cli import assemble
from vtjax.cli import config as config_lib
from vtjax.methods import dpn
from vtjax.ops.pooling_experts import WINDOWS
from vtjax.parallel import mesh as mesh_lib
from vtjax.train import checkpoint, loop
from vtjax.train.executables import Executables
from vtjax.train.task import closing
from vtjax.viz import tables

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "experiments" / "dpn" / "results" / "accuracy.jsonl"
CONFIG = "configs/dpn.py"
SEEDS = (0, 1, 2, 3, 4)
PERMUTATIONS = 2
LENGTHS = (2500, 3500, 4500)  # steps of a dense model, the next where it has not learnt all types
LEARNT = 0.45  # the majority answer reaches 0.25 at most
STATIC = ("(0, 1, 1)", "(1, 1, 1)", "(0, 2, 2)", "(0, 0, 2)", "(1, 2, 2)", "(2, 2, 2)", "(2, 1, 0)")
# Experts by type of question, in the order of the types; lists are not asked. An upper bound: somebody knew the type.
BY_TYPE = "(2, 2, 2, 2, 1, 1, 2, 1, 1, 0, 0, 1, 0, 0, 0)"
OURS = {
    "dpn.gate": "st",
    "dpn.loss": "expected",
    "dpn.temperature": "1.0",
    "dpn.floor_at_eval": "true",
    "dpn.lam": "0.3",
}

# The hinge counts work, not halvings.
WORK = {"dpn.loss": "macs", "dpn.lam": "3.0"}
KNOWN = {"dpn.token": "answer"}
"""Routers read a token that the model knows, so that texts stay as they were."""

CAUTIOUS = "routers at the answer, harm only budget=0.44"
RELAXING = "routers at the answer budget=0.44"

QUALITY = {"dpn.quality": "3.0", "dpn.quality_share": "0.5"}

Arm = tuple[str, dict[str, str]]
"""Name and overrides of `configs/dpn.py:sortofclevr`; `after`: the arm whose model it starts from, in place of the
dense one."""


def arms() -> Iterator[Arm]:
    """The arms of spec section 11: no compression, static paths, random routing, DPN as released, without its routing
    loss, with the expected form, and the extensions that tell a router which expert harms."""
    yield "dense", {"dpn.mode": "off"}
    for path in STATIC:
        yield f"static {path}", {"dpn.mode": "forced", "dpn.path": path}
    for pool in ("(1, 2)", "(2, 2)"):
        yield f"before the decoder {pool}", {"dpn.mode": "off", "model.bridge.pool": pool}
    yield "random", {"dpn.mode": "random"}
    yield "dpn", {}
    yield "dpn lam=0", {"dpn.lam": "0.0"}
    yield "dpn expected", {"dpn.loss": "expected", "dpn.lam": "0.1"}
    yield "by type", {"dpn.mode": "by_type", "dpn.path": BY_TYPE}
    # Controls of `routers`: as they, these read the token in front of the answer.
    yield "dense at the answer", {"dpn.mode": "off", **KNOWN}
    for path in ("(1, 1, 1)", "(1, 2, 2)"):
        yield f"static {path} at the answer", {"dpn.mode": "forced", "dpn.path": path, **KNOWN}
    yield "st", {**OURS, "dpn.tau": "1.0"}
    yield "st quality", {**OURS, **QUALITY, "dpn.tau": "1.0"}
    yield "st quality routers", {**OURS, **QUALITY, "dpn.tau": "1.0", "dpn.trainable": "routers"}


def tau() -> Iterator[Arm]:
    """More and less compression, as released and with the extensions."""
    for value in ("0.5", "1.0", "1.8"):
        yield f"dpn tau={value}", {"dpn.tau": value}
    yield "st quality tau=1.75", {**OURS, **QUALITY, "dpn.tau": "1.75"}
    for value in ("0.44", "0.5", "0.6", "0.7"):
        yield f"st quality budget={value}", {**OURS, **QUALITY, **WORK, "dpn.budget": value}


def routers() -> Iterator[Arm]:
    """Routers that learn while the model stands still, so that they see what poolings do to it as it is; and the same
    with everything trained after that."""
    for value in ("0.44", "0.5", "0.6", "0.7"):
        leaves = {**OURS, **QUALITY, **WORK, "dpn.budget": value}
        yield f"routers budget={value}", {**leaves, "dpn.trainable": "routers"}
        yield f"routers, then all budget={value}", {**leaves, "after": f"routers budget={value}"}
        # A token that the model does not know is in the way of a model that stands still: it reads one that it knows.
        known = {**leaves, **KNOWN}
        yield f"routers at the answer budget={value}", {**known, "dpn.trainable": "routers"}
        yield (
            f"routers at the answer, then all budget={value}",
            {**known, "after": f"routers at the answer budget={value}"},
        )
    # An answer that is wrong and sure of it has a lower loss when the image is blurred: that is no reason to pool.
    yield CAUTIOUS, {**known, "dpn.budget": "0.44", "dpn.trainable": "routers", "dpn.harm_only": "true"}


def gentle() -> Iterator[Arm]:
    """What is trained along with poolings, at a third of the other arms' learning rate, which costs the dense model
    points; nothing is added to the texts."""
    known = {**KNOWN, "optim.lr": "1e-4"}
    budget = {**OURS, **WORK, "dpn.budget": "0.44"}
    yield "dense", {"dpn.mode": "off", **known}
    yield "routers, then all", {**budget, **QUALITY, **known, "after": RELAXING}
    yield "routers of harm only, then all", {**budget, **QUALITY, "dpn.harm_only": "true", **known, "after": CAUTIOUS}
    for path in ("(1, 1, 1)", "(1, 2, 2)"):
        yield f"static {path}", {"dpn.mode": "forced", "dpn.path": path, **known}
    yield "random", {"dpn.mode": "random", "dpn.gate": "st", "dpn.lam": "0.0", **known}
    yield "by type", {"dpn.mode": "by_type", "dpn.path": BY_TYPE, **known}
    for pool in ("(1, 2)", "(2, 2)"):
        yield f"before the decoder {pool}", {"dpn.mode": "off", "model.bridge.pool": pool, **known}
    yield "all at once", {**budget, **QUALITY, **known}
    yield "all at once, distilled", {**budget, **known, "dpn.distill": "1.0"}


def easyvqa() -> Iterator[Arm]:
    """On questions that people have seen before: 64 visual tokens, of which all questions need few."""
    known = {**OURS, **QUALITY, **WORK, **KNOWN, "dpn.budget": "0.44"}
    yield "dense", {"dpn.mode": "off", **KNOWN}
    for path in ("(1, 1, 1)", "(2, 1, 1)", "(2, 2, 2)"):
        yield f"static {path}", {"dpn.mode": "forced", "dpn.path": path, **KNOWN}
    yield "routers", {**known, "dpn.trainable": "routers"}
    yield "routers, then all", {**known, "after": "routers"}


ARMS = {"arms": arms, "tau": tau, "routers": routers, "gentle": gentle, "easyvqa": easyvqa}


def runs(kind: str) -> str:
    """The folder of the runs of a kind."""
    return "runs/dpn_easyvqa" if kind == "easyvqa" else "runs/dpn"


def dense_run(seed: int, kind: str = "arms") -> str:
    """Where the dense model of a seed lies."""
    return f"{runs(kind)}/dense_{seed}"


def arm_run(name: str, seed: int, kind: str = "arms") -> str:
    """Where the run of an arm lies."""
    folder = "gentle" if kind == "gentle" else "arms"
    return f"{runs(kind)}/{folder}/{re.sub('[^a-z0-9=.]+', '_', name).strip('_')}_{seed}"


def dense(seed: int, kind: str = "arms") -> dict[str, Any]:
    """Trains the dense model of a seed, or finds it done. One that does not read every type of question yet goes on
    for a thousand steps more: seeds begin to read marks at different times."""
    workdir = dense_run(seed, kind)
    if kind == "easyvqa":
        given = {"seed": str(seed), "model.decoder.depth": "8"}
        return trained(config_lib.load_config("configs/vlm.py", "easyvqa", given), workdir)
    begun = config_lib.of_workdir(workdir, {}).steps if Path(workdir, "config.json").exists() else 0
    found: dict[str, Any] = {}
    for steps in [steps for steps in LENGTHS if steps >= begun]:
        given = {"seed": str(seed), "allow_config_change": str(begun > 0).lower()}
        found = trained(config_lib.load_config(CONFIG, f"sortofclevr_dense,steps={steps}", given), workdir)
        if learnt(found):
            break
        begun = steps
    return found


def trained(config: config_lib.Config, workdir: str) -> dict[str, Any]:
    """Trains a dense model, or finds it done: its figures."""
    config_lib.override(config, "workdir", workdir)
    task, data = assemble.assemble(config)
    result = loop.train(task, data, config, workdir)
    kept = ("params", "params_sha256", "loss", "count")
    return {"steps": config.steps, **{k: v for k, v in result.items() if k in kept or k.startswith("top1")}}


def learnt(result: Mapping[str, Any]) -> bool:
    """Whether a dense model answers every type of question better than the majority answer by 20 points."""
    types = [value for name, value in result.items() if name.startswith("top1@")]
    return bool(types) and min(types) >= LEARNT


def arm(
    name: str, overrides: dict[str, str], seed: int, executables: Executables, kind: str = "arms"
) -> dict[str, Any]:
    """Trains one arm from the dense model of the seed, and measures it."""
    config = settings(name, overrides, seed, kind)
    workdir = config.workdir
    task, data = assemble.assemble(config)
    result = loop.train(task, data, config, workdir, executables)
    _, params = checkpoint.load_params(workdir)
    return {
        **{"arm": name, "steps": config.steps, "batch_size": config.batch_size, "lr": config.optim.lr},
        **{leaf.replace(".", "_"): value for leaf, value in overrides.items()},
        **{"params_sha256": result["params_sha256"], "images_per_s": result.get("images_per_s")},
        **measured(config, task, data, params),
    }


def settings(name: str, overrides: dict[str, str], seed: int, kind: str = "arms") -> config_lib.Config:
    """The config of one arm."""
    given = {**overrides, "seed": str(seed)}
    before = given.pop("after", "")
    given["init_from"] = (
        arm_run(before, seed, kind if kind == "easyvqa" else "routers") if before else dense_run(seed, kind)
    )
    config = config_lib.load_config(CONFIG, "easyvqa" if kind == "easyvqa" else "sortofclevr", given)
    config_lib.override(config, "workdir", arm_run(name, seed, kind))
    return config


def measured(config: Any, task: Any, data: Any, params: Any) -> dict[str, Any]:
    """Answers and decisions for every test question; and the answers with decisions of other questions."""
    made = loop.decisions(task, data.eval("eval"), config, params)
    order = np.argsort(made["question"])
    made = {key: value[order] for key, value in made.items()}
    right, kind, choice = made["correct"], made["type"], made["choice"]
    names = {i: name for i, name in enumerate(vlm.TYPES[config.data.name]) if (kind == i).any()}
    found = {
        "top1": float(right.mean()),
        **{f"top1@{name}": float(right[kind == i].mean()) for i, name in names.items()},
        "mac_ratio": float(made["mac_ratio"].mean()),
        **{f"halvings@{name}": float(choice[kind == i].mean(-1).mean()) for i, name in names.items()},
        "halvings": float(choice.mean()),
        "information_bits": information(choice, kind),
        "paths": {
            str(tuple(map(int, p))): int(c) for p, c in zip(*np.unique(choice, axis=0, return_counts=True), strict=True)
        },
        "count": len(right),
        "correct": "".join(map(str, right.astype(int))),
    }
    if config.dpn.mode == "adaptive":
        told = [permuted(config, task, data, params, choice, number) for number in range(PERMUTATIONS)]
        found["permuted_top1"] = [float(row.mean()) for row in told]
        found["permuted_correct"] = ["".join(map(str, row.astype(int))) for row in told]
        found["choice"], found["type"] = ("".join(map(str, x.ravel().astype(int))) for x in (choice, kind))
    return found


def permuted(
    config: Any, task: Any, data: Any, params: Any, choice: np.ndarray, number: int, kind: np.ndarray | None = None
) -> np.ndarray:
    """Which questions are right where each takes the experts of another one; of the same `kind` where that is given."""
    rng, shuffled = np.random.default_rng((config.seed, number)), choice.copy()
    for each in [np.arange(len(choice))] if kind is None else [np.flatnonzero(kind == k) for k in np.unique(kind)]:
        shuffled[each] = choice[each[rng.permutation(len(each))]]
    options = {**vlm.options(config), "gate": config.dpn.gate, "floor_at_eval": config.dpn.floor_at_eval}
    model, params = dpn.vlm(task.spec, **options), jax.tree.map(jnp.asarray, params)
    run = _forced(model)
    right = np.zeros(len(choice), bool)
    batches = data.eval("eval")
    with closing(batches), jax.set_mesh(mesh_lib.make(config.mesh)):
        for batch in batches:
            asked = batch["question"][:, 0]
            taken = shuffled[np.maximum(asked, 0)]
            given = {name: batch[name] for name in batch if name not in ("valid", "index")}
            said = np.asarray(run(params, given, taken))
            right[asked[batch["valid"]]] = said[batch["valid"]] > 0
    return right


@functools.lru_cache(maxsize=8)
def _forced(model: Any) -> Any:
    return jax.jit(lambda p, b, choice: vlm.asked(model, p, b, dpn.given(model.spec, choice)).right[:, 0])


def information(choice: np.ndarray, kind: np.ndarray) -> float:
    """Mutual information between path and type of question, in bits, less what chance gives (the mean of 20
    permutations of the types)."""
    _, path = np.unique(choice, axis=0, return_inverse=True)

    def of(kind: np.ndarray) -> float:
        joint = np.zeros((path.max() + 1, kind.max() + 1))
        np.add.at(joint, (path, kind), 1 / len(path))
        expected = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
        used = joint > 0
        return float((joint[used] * np.log2(joint[used] / expected[used])).sum())

    rng = np.random.default_rng(0)
    return of(kind) - float(np.mean([of(rng.permutation(kind)) for _ in range(20)]))


def start(seed: int) -> dict[str, Any]:
    """What the dense model of a seed answers as it is, to the questions of the arms."""
    given = {"seed": str(seed), "init_from": dense_run(seed), "dpn.mode": "off", **KNOWN}
    config = config_lib.load_config(CONFIG, "sortofclevr", given)
    task, data = assemble.assemble(config)
    return measured(config, task, data, jax.jit(lambda key: task.init(key)[0])(jax.random.key(seed)))


RELAXED = (0.5, 0.6, 0.7)  # shares of the dense work


def relaxed(seed: int, name: str, overrides: dict[str, str]) -> dict[str, Any]:
    """Routers that were trained for one budget at another one: their probabilities are moved towards identity
    (`knobs.relax`) until questions of "val" take `share` of the dense work."""
    leaves = dict(overrides)
    share = float(leaves.pop("share"))
    config = settings(RELAXING, leaves, seed, "routers")
    task, data = assemble.assemble(config)
    _, params = checkpoint.load_params(config.workdir)
    few = copy.deepcopy(config)
    config_lib.override(few, "data.eval_split", "val[:25]")
    _, small = assemble.assemble(few)
    executables, (low, high) = Executables(), (0.0, 0.5)
    for _ in range(8):
        amount = (low + high) / 2
        moved = experiment.relaxed(params, amount)
        spent = loop.decisions(task, small.eval("eval"), few, moved, executables=executables)["mac_ratio"].mean()
        low, high = (amount, high) if spent < share else (low, amount)
    moved = experiment.relaxed(params, amount)
    found = measured(config, task, data, moved)
    kind, choice = (np.array(list(found[name]), int) for name in ("type", "choice"))
    found["within_correct"] = of_a_type(config, task, data, moved, choice.reshape(len(kind), -1), kind)
    return {"arm": name, "share": share, "relax": amount, **found}


def of_a_type(config: Any, task: Any, data: Any, params: Any, choice: np.ndarray, kind: np.ndarray) -> list[str]:
    """Which questions are right where each takes the experts of another one of its type, a row per permutation."""
    told = [permuted(config, task, data, params, choice, number, kind) for number in range(PERMUTATIONS)]
    return ["".join(map(str, row.astype(int))) for row in told]


def routed() -> Iterator[tuple[str, Arm]]:
    """The arms whose routers decide, each with its kind."""
    for kind in ("routers", "gentle"):
        yield from ((kind, arm) for arm in ARMS[kind]() if arm[1].get("dpn.mode", "adaptive") == "adaptive")


def within(seed: int, name: str, overrides: dict[str, str]) -> dict[str, Any]:
    """The answers of an arm that was run, with decisions of other questions of the same type: what is lost by that is
    what a lookup of the type would not have found."""
    kind_of = {arm: kind for kind, (arm, _) in routed()}
    config = settings(name, overrides, seed, kind_of[name])
    task, data = assemble.assemble(config)
    _, params = checkpoint.load_params(config.workdir)
    made = loop.decisions(task, data.eval("eval"), config, params)
    order = np.argsort(made["question"])
    kind, choice = made["type"][order], made["choice"][order]
    right = made["correct"][order].astype(int)
    return {
        "arm": name,
        "top1": float(right.mean()),
        "correct": "".join(map(str, right)),
        "permuted_correct": of_a_type(config, task, data, params, choice, kind),
    }


def paths(seed: int) -> dict[str, Any]:
    """What every path does to the dense model of a seed that was trained without poolings: right answers by type, to a
    quarter of the questions."""
    given = {"seed": str(seed), "init_from": dense_run(seed), "data.eval_split": "test[:50]"}
    config = config_lib.load_config(CONFIG, "sortofclevr", given)
    config_lib.override(config, "dpn.gate", "st")
    config_lib.override(config, "dpn.token", "answer")
    task, data = assemble.assemble(config)
    params = jax.tree.map(jnp.asarray, task.init(jax.random.key(seed))[0])
    run = _forced(dpn.vlm(task.spec, **vlm.options(config)))
    every = list(itertools.product(range(len(WINDOWS)), repeat=len(dpn.reducers(task.spec))))
    names = vlm.TYPES[config.data.name]
    right, count, words = np.zeros((len(every), len(names))), np.zeros(len(names)), 0
    answered: list[dict[int, int]] = [{} for _ in every]
    batches = data.eval("eval")
    with closing(batches), jax.set_mesh(mesh_lib.make(config.mesh)):
        for batch in batches:
            given = {name: batch[name] for name in batch if name not in ("valid", "index")}
            kind, valid = batch["type"][:, 0], batch["valid"]
            np.add.at(count, kind[valid], 1)
            words += int((batch["segments"][valid] >= 0).sum()) - task.spec.visual_tokens * int(valid.sum())
            for row, path in enumerate(every):
                said = np.asarray(run(params, given, np.broadcast_to(np.asarray(path), (len(kind), len(path)))))
                np.add.at(right[row], kind[valid], said[valid] > 0)
                answered[row] |= dict(zip(batch["question"][valid, 0].tolist(), said[valid].tolist(), strict=True))
    asked = [i for i in range(len(names)) if count[i]]
    text = round(words / count.sum())
    work = [dpn.path_macs(task.spec, path, text) for path in every]
    return {
        "types": [names[i] for i in asked],
        "count": [int(count[i]) for i in asked],
        "paths": [list(path) for path in every],
        "work": [spent / work[0] for spent in work],
        "top1_by_type": [[float(right[row, i] / count[i]) for i in asked] for row in range(len(every))],
        "top1": float(right[0].sum() / count.sum()),
        "correct": ["".join(str(int(told[q] > 0)) for q in sorted(told)) for told in answered],
    }


def wanted(name: str, only: str) -> bool:
    """Whether `--only` means an arm."""
    return name == only[1:] if only.startswith("=") else only in name


def main(arguments: list[str]) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("dense", "start", "paths", "within", "relaxed", *ARMS))
    parser.add_argument("--seed", type=int, action="append", help="one of them; else all")
    parser.add_argument("--only", default="", help="arms whose name contains this; =NAME is that one")
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args(arguments)
    rows = tables.read_jsonl(options.out) if options.out.exists() else []
    known = {(r["kind"], r["name"], r["seed"]) for r in rows if r["kind"] != "dense" or learnt(r)}
    executables = Executables()
    for seed in options.seed or SEEDS:
        made: list[Arm] = list(ARMS[options.what]()) if options.what in ARMS else [(options.what, {})]
        if options.what == "within":
            made = [arm for kind, arm in routed() if (kind, arm[0], seed) in known]
        if options.what == "relaxed":
            made = [(f"{RELAXING} at {share}", {**dict(routers())[RELAXING], "share": str(share)}) for share in RELAXED]
        if options.only and not any(wanted(name, options.only) for name, _ in made):
            names = ", ".join(name for name, _ in made)
            print(
                f"accuracy: --only must mean an arm of {options.what}, {names}, found {options.only!r}", file=sys.stderr
            )
            return 2
        for name, overrides in made:
            if not wanted(name, options.only) or (options.what, name, seed) in known:
                continue
            if options.what in ARMS:
                if options.what == "easyvqa":
                    dense(seed, "easyvqa")
                found = arm(name, overrides, seed, executables, options.what)
            elif options.what in ("within", "relaxed"):
                found = {"within": within, "relaxed": relaxed}[options.what](seed, name, overrides)
            else:
                found = {"dense": dense, "start": start, "paths": paths}[options.what](seed)
            options.out.parent.mkdir(exist_ok=True)
            record.write(options.out, {"kind": options.what, "name": name, "seed": seed, **found})
            work = f" at {found['mac_ratio']:.3f} of the work" if "mac_ratio" in found else ""
            print(f"{name}, seed {seed}: {100 * found['top1']:.1f} %{work}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
