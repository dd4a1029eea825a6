# SPDX-License-Identifier: Apache-2.0
"""Does the search find what is redundant? Redundancy is planted where it is known (spec section 10, item 5).

    python -m experiments.das.search planted     12 arms, 4 of them without cost, losses with noise; easy and hard
    python -m experiments.das.search null        all arms alike: what is chosen must be chance
    python -m experiments.das.search toy         decoders of 8 layers, 2 of which do nothing: losses of the real model

Minutes on one core together. Records go to results/search.jsonl, and what was recorded is not run again.
"""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vtjax.account import record
from vtjax.methods import das
from vtjax.models import LM
from vtjax.models.adapters import STYLES
from vtjax.ops import bandit, losses
from vtjax.ops.bandit import Bandit
from vtjax.spec import LMSpec
from vtjax.viz import tables

RECORDS = Path(__file__).resolve().parent / "results" / "search.jsonl"
ARMS, SKIPS, SEEDS = 12, 4, 30
MARKS = (50, 100, 200, 500, 1000, 2000)  # updates after which the choice is looked at
EASY, HARD, NOISE = 0.3, 0.02, 0.1
"""What it costs to skip an arm that is not redundant, in loss, and the deviation of a loss."""

NULL_SEEDS = 600
DEPTH, IDLE, TOY_UPDATES, TOY_SEEDS = 8, 2, 200, 10


def search(
    settings: Bandit, loss: Callable[[int, np.ndarray], float], updates: int, seed: int, marks: tuple[int, ...] = ()
) -> dict[int, list[int]]:
    """The arms chosen after so many updates; `loss(update, subset)` judges candidates."""
    state, found = settings.start(), {}
    for update in range(updates):
        subsets = bandit.candidates(settings, state, seed)
        state = bandit.update(settings, state, subsets, np.array([loss(update, subset) for subset in subsets]))
        if update + 1 in (*marks, updates):
            found[update + 1] = sorted(bandit.final(state.preference, settings.skips).tolist())
    return found


def planted(cost: float, updates: int, policy: str, seed: int) -> dict[int, list[int]]:
    """Arms chosen where four of twelve, other ones for each seed, cost nothing; as places among these (0..3)."""
    rng = np.random.default_rng([seed, 1])
    order = rng.permutation(ARMS)  # the first ones cost nothing
    price = np.where(np.isin(np.arange(ARMS), order[:SKIPS]), 0.0, cost)

    def loss(update: int, subset: np.ndarray) -> float:
        return 1.0 + price[subset].sum() + NOISE * rng.standard_normal()

    found = search(Bandit(ARMS, SKIPS, policy=policy), loss, updates, seed, MARKS)
    return {mark: [int(np.flatnonzero(order == arm)[0]) for arm in arms] for mark, arms in found.items()}


def planted_record(name: str, cost: float, updates: int, policy: str) -> dict[str, Any]:
    """Over all seeds: share of the four that was found, and seeds that found all."""
    found = [planted(cost, updates, policy, seed) for seed in range(SEEDS)]
    hits = {mark: [sum(place < SKIPS for place in run[mark]) for run in found] for mark in found[0]}
    return {
        **{"kind": "planted", "name": name, "policy": policy, "seeds": SEEDS, "cost": cost, "noise": NOISE},
        "hit": {str(mark): float(np.mean(values)) / SKIPS for mark, values in hits.items()},
        "whole": {str(mark): int(np.sum(np.array(values) == SKIPS)) for mark, values in hits.items()},
        "chance": SKIPS / ARMS,
    }


def null_record(name: str, updates: int, policy: str) -> dict[str, Any]:
    """How often each arm is chosen where all are alike, and chi-squared of these counts against equal ones."""
    settings, counts = Bandit(ARMS, SKIPS, policy=policy), np.zeros(ARMS)
    for seed in range(NULL_SEEDS):
        rng = np.random.default_rng([seed, 2])
        chosen = search(settings, lambda *_, rng=rng: 1.0 + NOISE * rng.standard_normal(), updates, seed)
        counts[chosen[updates]] += 1
    expected = NULL_SEEDS * SKIPS / ARMS
    # Counts of a sample without replacement vary by 1 - m / n less than those of a multinomial.
    chi2 = float(((counts - expected) ** 2 / expected).sum() * (ARMS - 1) / (ARMS - SKIPS))
    return {
        **{"kind": "null", "name": name, "policy": policy, "seeds": NULL_SEEDS, "updates": updates},
        **{"counts": counts.astype(int).tolist(), "expected": expected, "chi2": chi2, "degrees": ARMS - 1},
    }


def toy(seed: int, updates: int) -> dict[str, Any]:
    """A decoder of random weights in which two layers do nothing. A candidate's loss is the divergence of what the
    model says without its layers from what it says with all of them, on fresh random texts for every update. Stand-ins
    start as the identity and are not trained."""
    rng = np.random.default_rng([seed, 3])
    spec = LMSpec.uniform(depth=DEPTH, width=32, heads=2, mlp=64, vocab=64)
    idle = sorted(rng.choice(DEPTH, IDLE, replace=False).tolist())
    style, key = STYLES["llama"], jax.random.key(seed)
    spec, params = das.install(spec, jax.jit(LM(spec).init)(key), style, key)
    for index in idle:
        block = params[f"block_{index:02d}"]
        block["attn"]["out"]["kernel"] = jnp.zeros_like(block["attn"]["out"]["kernel"])
        block["mlp"]["down"]["kernel"] = jnp.zeros_like(block["mlp"]["down"]["kernel"])
    model = LM(spec, adapters=das.attached(spec))

    @jax.jit
    def of(params: Any, ids: Any, skip: Any) -> jax.Array:
        every, here = (
            model.apply(params, ids, knobs={"skipped": s})[0].reshape(-1, spec.vocab) for s in (skip & False, skip)
        )
        return losses.divergence(every, here).mean()

    def loss(update: int, subset: np.ndarray) -> float:
        ids = np.random.default_rng([seed, 4, update]).integers(0, spec.vocab, (4, 16))
        return float(of(params, ids, bandit.mask(subset, DEPTH)))

    found = search(Bandit(DEPTH, IDLE), loss, updates, seed, MARKS)
    single = [loss(updates, np.array([arm])) for arm in range(DEPTH)]
    return {
        **{"kind": "toy", "name": f"toy {seed}", "seed": seed, "updates": updates, "idle": idle},
        "hits": {str(mark): len(set(arms) & set(idle)) for mark, arms in found.items()},
        **{"loss_alone": single, "compilations": of._cache_size()},  # type: ignore[attr-defined]
    }


Maker = Callable[[], dict[str, Any]]


def makers(what: str) -> dict[str, Maker]:
    """Records by name."""
    found: dict[str, Maker] = {}
    for policy in bandit.POLICIES:
        for size, cost, updates in (("easy", EASY, 200), ("hard", HARD, 2000)):
            name = f"planted {size} {policy}"
            found[name] = functools.partial(planted_record, name, cost, updates, policy)
        name = f"null {policy}"
        found[name] = functools.partial(null_record, name, 50, policy)
    for seed in range(TOY_SEEDS):
        found[f"toy {seed}"] = functools.partial(toy, seed, TOY_UPDATES)
    return {name: maker for name, maker in found.items() if name.startswith(what)}


def main(arguments: list[str]) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("planted", "null", "toy"))
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args(arguments)
    known = {r["name"] for r in tables.read_jsonl(options.out)} if options.out.exists() else set()
    for name, maker in makers(options.what).items():
        if name not in known:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # an update that moves nothing would be a mistake here
                made = record.write(options.out, maker())
            told = {key: made[key] for key in ("hit", "whole", "chi2", "hits") if key in made}
            print(f"{name}: {told}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
