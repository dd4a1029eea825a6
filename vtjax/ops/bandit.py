# SPDX-License-Identifier: Apache-2.0
"""DAS's bandit over sets of modules: which of n modules a network may do without (arXiv 2309.01479; spec, section 2).

Every module is an *arm* with a *preference* r; a large one says that it is safe to skip, and p = sigmoid(r) is its
weight. An action skips exactly m arms. Everything is host NumPy, O(n c), pure: state in, state out. Draws are a
function of (seed, step) or (seed, number of the update) and of nothing else, so that all processes of a run draw alike,
and a resumed run goes on as if it had not stopped.

Letters: n arms, m skipped ones, c candidates per update, eta the rate.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

POLICIES = ("race", "uniform_topm")
"""How subsets are drawn: "race", one arm after the other without replacement with the weights p (the release), or
"uniform_topm", the m largest of s_i ~ U(0, p_i) (the paper), which is a much greedier law."""

CAP = 1000
"""Draws per update after which the candidates that lack are filled up; saturated preferences make new ones rare."""

MOST_RATE = 1e6
"""So that float32 holds every preference: rewards are exp(50) at most."""

LEAST_LOSS = -50.0
"""Losses below this count as this: rewards are exp(-loss)."""
EXACT = 20
"""Largest m whose race probabilities are computed, over 2^m states."""

_STEP, _UPDATE = 0, 1  # what a stream of random numbers is for


@dataclasses.dataclass(frozen=True)
class Bandit:
    """Settings.

    Attributes:
      arms: n.
      skips: m. 0 = nothing is skipped, drawn or learned.
      candidates: c, subsets that are compared per update; 0 = no search: the preferences stay.
      every: training steps (micro-batches) between two updates.
      rate: eta.
      warmup, search: updates are due from progress `warmup` on and before progress `search`. The unit is the caller's:
        epochs, also fractions of them, or steps.
      policy: of `POLICIES`.

    Raises:
      ValueError: counts that no search can have, a rate, cadence, progress or policy that is none; m = n, or c = 1,
        where a search would never move; fewer than c subsets of m arms. Warns where no update would ever be due.
    """

    arms: int
    skips: int
    candidates: int = 3
    every: int = 10
    rate: float = 1.0
    warmup: float = 1.0
    search: float = 3.0
    policy: str = "race"

    def __post_init__(self) -> None:
        for name in ("arms", "skips", "candidates", "every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise ValueError(f"{name} must be a whole number, found {value!r}")
        if self.arms < 1 or self.candidates < 0:
            raise ValueError(f"arms must be above 0, candidates 0 or more, found {self.arms} and {self.candidates}")
        if not 0 <= self.skips <= self.arms:
            raise ValueError(f"skips must be in 0..{self.arms} (the arms), found {self.skips}")
        if self.every < 1:
            raise ValueError(f"every must be 1 step or more, found {self.every}")
        if not 0 < self.rate <= MOST_RATE:
            raise ValueError(f"rate must be above 0 and at most {MOST_RATE:g}, found {self.rate}")
        if math.isnan(self.warmup) or math.isnan(self.search):
            raise ValueError(f"warmup and search must be numbers, found {self.warmup} and {self.search}")
        if self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, found {self.policy!r}")
        if not self.learns and self.skips in (0, self.arms):
            return
        if self.candidates == 1:
            raise ValueError(
                "one candidate is its own baseline, so preferences never move: expected candidates above 1"
            )
        check_subsets(self.arms, self.skips, self.candidates)
        if self.learns and not self.warmup < self.search:
            warnings.warn(
                f"no update is ever due: warmup={self.warmup} must be below search={self.search}", stacklevel=3
            )

    @property
    def learns(self) -> bool:
        """Whether there is anything to learn, and a search is asked for."""
        return self.skips > 0 and self.candidates > 0 and not (self.skips == self.arms and self.candidates == 1)

    def start(self) -> State:
        """The state before the first step: no preference."""
        return State(np.zeros(self.arms, np.float32), *(np.zeros((), np.int32) for _ in range(4)))


class State(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      preference: r.
      since: training steps since the last update; epochs do not reset it.
      updates: how many were due so far: the number of the next one.
      poisoned: of these, how many were dropped because a loss was NaN.
      flat: of these, how many moved nothing because all rewards were equal, or too small for float32 preferences.
    """

    preference: Float32[np.ndarray, " n"]
    since: Int[np.ndarray, ""]
    updates: Int[np.ndarray, ""]
    poisoned: Int[np.ndarray, ""]
    flat: Int[np.ndarray, ""]


def check_subsets(arms: int, skips: int, candidates: int) -> None:
    """Raises ValueError where n arms do not have c different subsets of m: the release would look for them forever."""
    if math.comb(arms, skips) < max(candidates, 1):
        raise ValueError(
            f"{candidates} candidates need as many subsets, found {math.comb(arms, skips)} of {skips} of {arms} arms; "
            f"fewer candidates or another number of skips have them"
        )


def log_weights(preference: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """log p = log sigmoid(r), float64. Finite wherever r is, where p itself has long underflowed."""
    r = np.asarray(preference, np.float64)
    return np.minimum(r, 0.0) - np.log1p(np.exp(-np.abs(r)))


def noise(random: np.random.Generator, policy: str, shape: tuple[int, ...]) -> np.ndarray:
    """What is added to log weights before the m largest are taken: Gumbel for the race, log U for "uniform_topm"."""
    # Exponential and uniform draws are 0 once in 2^53.
    if policy == "race":
        return -np.log(np.maximum(random.standard_exponential(shape), 1e-300))
    return np.log(np.maximum(random.random(shape), 1e-300))


def largest(keys: Float[np.ndarray, "*draws n"], m: int) -> Int[np.ndarray, "*draws m"]:
    """Indices of the m largest, in descending order."""
    return np.argsort(-keys, axis=-1, kind="stable")[..., :m]


def draw(
    preference: Float[np.ndarray, " n"],
    m: int,
    random: np.random.Generator,
    policy: str = "race",
    draws: tuple[int, ...] = (),
) -> Int[np.ndarray, "*draws m"]:
    """Subsets of m arms, each in ascending order (spec section 2.3)."""
    logp = log_weights(preference)
    return np.sort(largest(logp + noise(random, policy, (*draws, len(logp))), m), axis=-1)


def mask(subset: Int[np.ndarray, " m"] | tuple[int, ...], arms: int) -> Bool[np.ndarray, " n"]:
    """True at the skipped arms."""
    out = np.zeros(arms, bool)
    out[np.asarray(subset, np.int64)] = True
    return out


def step_subset(bandit: Bandit, state: State, seed: int, step: int, m: int | None = None) -> Int[np.ndarray, " m"]:
    """What training step (micro-batch) `step` skips: one fresh draw (spec section 2.4). `m`: where it is ramped."""
    random = np.random.default_rng([seed, _STEP, step])
    return draw(state.preference, bandit.skips if m is None else m, random, bandit.policy)


def tick(bandit: Bandit, state: State, progress: float) -> tuple[State, bool]:
    """One training step was made: the counter, and whether an update is due now (spec section 2.4).

    Args:
      progress: of that step, in the unit of `warmup` and `search`. At the first step after the warm-up the counter has
        long reached `every`, so an update is due at once, then every `every` steps.
    """
    if not bandit.learns or progress >= bandit.search:
        return state, False
    count = state.since + 1
    due = bool(count >= bandit.every and progress >= bandit.warmup)
    return state._replace(since=np.asarray(0 if due else count, np.int32)), due


def ramped(m: int, call: int, warmup: int) -> int:
    """How many are skipped at the `call`-th training step, from 1: m is reached after half the warm-up (LLaVA)."""
    return m if warmup <= 0 else min(m, 2 * m * call // warmup + 1)


def candidates(bandit: Bandit, state: State, seed: int, m: int | None = None) -> Int[np.ndarray, "c m"]:
    """The different subsets of the next update, in the order drawn, each in ascending order (spec section 2.5, 1).

    After `CAP` draws the ones that lack are the most probable subsets not seen yet.

    Raises:
      ValueError: fewer than two candidates, or fewer than c subsets.
    """
    m, c = bandit.skips if m is None else m, bandit.candidates
    if c < 2:
        raise ValueError(f"an update compares 2 candidates or more, found candidates={c}")
    check_subsets(bandit.arms, m, c)
    random = np.random.default_rng([seed, _UPDATE, int(state.updates)])
    found: dict[tuple[int, ...], None] = {}
    for _ in range(CAP):
        found.setdefault(tuple(draw(state.preference, m, random, bandit.policy).tolist()))
        if len(found) == c:
            break
    else:
        unseen = (subset for subset in by_probability(state.preference, m, bandit.policy) if subset not in found)
        found |= dict.fromkeys(itertools.islice(unseen, c - len(found)))
    return np.asarray(list(found), np.int64).reshape(c, m)


def rewards(losses: Float[np.ndarray, " c"]) -> Float[np.ndarray, " c"]:
    """exp(-loss), float64; 0 for an infinite loss, NaN for NaN."""
    return np.exp(-np.maximum(np.asarray(losses, np.float64), LEAST_LOSS))


def update(
    bandit: Bandit,
    state: State,
    subsets: Int[np.ndarray, "c m"],
    losses: Float[np.ndarray, " losses"],
) -> State:
    """The state after the candidates' losses are known (spec section 2.5).

    r_i += eta p_i (1 - p_i) sum over the candidates k that skip i of (v_k - mean v), v = exp(-loss): contributions sum,
    p is that of before, and an arm that all or no candidates skip stays, bit for bit.

    Args:
      subsets: of `candidates`.
      losses: of each, on one batch. A NaN drops the update (counted in `poisoned`); where all rewards are equal, 0
        included, or what would be added is lost in float32 (from r = 0: with losses above about 103), nothing moves
        (counted in `flat`, with a warning).

    Raises:
      ValueError: other than c losses, fewer than two, or a subset with an arm that does not exist or stands twice.
    """
    subsets, values = np.asarray(subsets), rewards(losses)
    if len(values) < 2 or len(values) != len(subsets):
        raise ValueError(f"an update needs a loss for each of 2 candidates or more, found {len(values)} losses")
    skipped = np.zeros((len(subsets), bandit.arms), bool)
    for row, subset in zip(skipped, subsets, strict=True):
        if len(set(subset.tolist())) != len(subset) or not all(0 <= arm < bandit.arms for arm in subset.tolist()):
            raise ValueError(f"a candidate must hold different arms in 0..{bandit.arms - 1}, found {subset.tolist()}")
        row[subset] = True
    after = state._replace(updates=np.asarray(state.updates + 1, np.int32))
    if np.isnan(values).any():
        return after._replace(poisoned=np.asarray(state.poisoned + 1, np.int32))
    if (values == values[0]).all():
        warnings.warn(
            "all candidates have the same reward, so preferences stay; are the losses too large?", stacklevel=2
        )
        return after._replace(flat=np.asarray(state.flat + 1, np.int32))
    advantage = skipped.T.astype(np.float64) @ (values - values.mean())
    # In exact arithmetic 0 where all candidates skip an arm.
    advantage[skipped.all(0)] = 0.0
    logp, logq = log_weights(state.preference), log_weights(-state.preference)
    moved = state.preference + bandit.rate * np.exp(logp + logq) * advantage
    preference = np.where(advantage == 0.0, state.preference, moved).astype(np.float32)
    if (preference == state.preference).all():
        warnings.warn(
            "an update is too small to change any preference, so all stay; are the losses too large?", stacklevel=2
        )
        after = after._replace(flat=np.asarray(state.flat + 1, np.int32))
    return after._replace(preference=preference)


def final(preference: Float[np.ndarray, " n"], m: int) -> Int[np.ndarray, " m"]:
    """The arms to skip: the m largest preferences, in ascending order of preference; of equal ones the higher index
    (spec section 2.6)."""
    return np.argsort(preference, kind="stable")[len(preference) - m :]


def subset_probability(preference: Float[np.ndarray, " n"], subset: tuple[int, ...], policy: str = "race") -> float:
    """Probability that `subset` is drawn, exactly (to rounding).

    Raises:
      ValueError: a race of more than `EXACT` arms.
    """
    logp, inside = log_weights(preference), np.asarray(subset, np.int64)
    if not len(inside) or len(inside) == len(logp):
        return 1.0
    return _race(logp, inside) if policy == "race" else _uniform(logp, inside)


def _race(logp: np.ndarray, inside: np.ndarray) -> float:
    """Sum over the orders in which the arms may be drawn, by the set of those drawn already: 2^m states."""
    m = len(inside)
    if m > EXACT:
        raise ValueError(f"the probability of a subset is computed for {EXACT} arms or fewer, found {m}")
    weight = logp[inside]
    rest = np.logaddexp.reduce(np.delete(logp, inside))
    states = np.arange(2**m)
    left = np.full(2**m, rest)  # log of the weights not drawn yet: a sum, never a difference
    for bit in range(m):
        left = np.where(states >> bit & 1, left, np.logaddexp(left, weight[bit]))
    reached = np.full(2**m, -np.inf)
    reached[0] = 0.0
    sizes = sum(states >> bit & 1 for bit in range(m))
    for size in range(1, m + 1):
        here = states[sizes == size]
        for bit in range(m):
            into = here[here >> bit & 1 == 1]
            before = into ^ (1 << bit)
            reached[into] = np.logaddexp(reached[into], reached[before] + weight[bit] - left[before])
    return float(np.exp(reached[-1]))


def _uniform(logp: np.ndarray, inside: np.ndarray) -> float:
    """Integral over t, the largest score outside: a polynomial between two weights, so Gauss's rule is exact."""
    p = np.exp(logp - logp.max())
    inner, outer = p[inside], np.delete(p, inside)
    nodes, weights = np.polynomial.legendre.leggauss(len(p) // 2 + 1)
    ends = np.concatenate([[0.0], np.unique(p)])
    total = 0.0
    for low, high in itertools.pairwise(ends):
        t = (low + (high - low) * (nodes + 1) / 2)[:, None]
        above = np.prod(np.maximum(1.0 - t / inner, 0.0), axis=1)
        below = np.minimum(t / outer, 1.0)
        density = np.zeros(len(t))
        for arm, width in enumerate(outer):
            density += np.prod(np.delete(below, arm, axis=1), axis=1) / width * (t[:, 0] < width)
        total += float(np.sum(weights * above * density)) * (high - low) / 2
    return total


def inclusion(preference: Float[np.ndarray, " n"], m: int, policy: str = "race") -> Float[np.ndarray, " n"]:
    """Probability that each arm is skipped, exactly; sums to m. Goes through all subsets: for small n."""
    out = np.zeros(len(preference))
    for subset in itertools.combinations(range(len(preference)), m):
        out[list(subset)] += subset_probability(preference, subset, policy)
    return out


def by_probability(preference: Float[np.ndarray, " n"], m: int, policy: str = "race") -> Iterator[tuple[int, ...]]:
    """All subsets of m arms, the most probable first; of equally probable ones the lexicographically first.

    An arm in exchange for one of smaller weight never makes a subset less probable: so the best one holds the m largest
    weights, and what follows is found among the neighbours of what came. Beyond `EXACT` arms a subset counts as
    probable as its product of weights says.
    """
    logp = log_weights(preference)
    order = largest(logp, len(logp)).tolist()

    def entry(places: tuple[int, ...]) -> tuple[float, tuple[int, ...], tuple[int, ...]]:
        arms = tuple(sorted(order[place] for place in places))
        if m > EXACT:
            return -float(logp[list(arms)].sum()), arms, places
        return -subset_probability(preference, arms, policy), arms, places

    first = tuple(range(m))
    heap, seen = [entry(first)], {first}
    while heap:
        _, arms, places = heapq.heappop(heap)
        yield arms
        for at, place in enumerate(places):
            beside = (*places[:at], place + 1, *places[at + 1 :])
            if place + 1 < len(logp) and place + 1 not in places and beside not in seen:
                seen.add(beside)
                heapq.heappush(heap, entry(beside))
