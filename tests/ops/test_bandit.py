# SPDX-License-Identifier: Apache-2.0
"""The bandit: exact laws against draws, the update's identities, cadence, and what must not hurt it."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest

from vtjax.ops import bandit
from vtjax.ops.bandit import Bandit

POLICIES = pytest.mark.parametrize("policy", bandit.POLICIES)


def preferences(n, seed=0, scale=1.5):
    return np.random.default_rng(seed).normal(0, scale, n).astype(np.float32)


def at(settings, preference):
    return settings.start()._replace(preference=np.asarray(preference, np.float32))


# Policy.


@POLICIES
@pytest.mark.parametrize(("n", "m"), [(6, 2), (7, 4), (5, 1), (4, 4), (4, 0)])
def test_the_probabilities_of_all_subsets_sum_to_one_and_of_all_arms_to_m(policy, n, m):
    r = preferences(n, m)
    total = sum(bandit.subset_probability(r, s, policy) for s in itertools.combinations(range(n), m))
    np.testing.assert_allclose(total, 1, rtol=1e-12)
    np.testing.assert_allclose(bandit.inclusion(r, m, policy).sum(), m, rtol=1e-12)


def test_the_race_is_the_draw_of_one_arm_after_the_other():
    r, subset = preferences(6), (1, 4, 5)
    p = 1 / (1 + np.exp(-r.astype(np.float64)))
    total = 0.0
    for order in itertools.permutations(subset):
        left, chance = p.sum(), 1.0
        for arm in order:
            chance, left = chance * p[arm] / left, left - p[arm]
        total += chance
    np.testing.assert_allclose(bandit.subset_probability(r, subset), total, rtol=1e-12)
    np.testing.assert_allclose(bandit.inclusion(r, 1), p / p.sum(), rtol=1e-12)


@POLICIES
def test_draws_follow_the_exact_law(policy):
    r, m, draws = preferences(6, 3), 2, 200_000
    found = bandit.draw(r, m, np.random.default_rng(0), policy, (draws,))
    assert (found[:, 0] < found[:, 1]).all()
    subsets = list(itertools.combinations(range(6), m))
    counts = np.bincount(found[:, 0] * 6 + found[:, 1], minlength=36)[[a * 6 + b for a, b in subsets]]
    expected = draws * np.array([bandit.subset_probability(r, s, policy) for s in subsets])
    used = expected > 5
    chi2 = ((counts - expected)[used] ** 2 / expected[used]).sum()
    assert chi2 < 40  # 14 degrees of freedom: beyond the 0.9997 quantile


def test_the_policies_differ_as_documented():
    p = np.array([0.35, 0.81, 0.60, 0.29, 0.32, 0.09])  # as the specification prints them, to two digits
    r = np.log(p / (1 - p))
    np.testing.assert_allclose(bandit.inclusion(r, 2, "race"), [0.30, 0.60, 0.49, 0.25, 0.28, 0.08], atol=1e-2)
    np.testing.assert_allclose(bandit.inclusion(r, 2, "uniform_topm"), [0.27, 0.73, 0.63, 0.15, 0.22, 0.001], atol=1e-2)


@POLICIES
@pytest.mark.parametrize("value", [0.0, 3.0, -200.0, -3e4])
def test_equal_preferences_are_drawn_evenly_even_where_their_weights_underflow(policy, value):
    r = np.full(5, value, np.float32)
    np.testing.assert_allclose(bandit.subset_probability(r, (0, 3), policy), 0.1, rtol=1e-9)
    found = bandit.draw(r, 2, np.random.default_rng(1), policy, (20_000,))
    np.testing.assert_allclose(np.bincount(found.ravel(), minlength=5) / 20_000, 0.4, atol=0.02)


@POLICIES
def test_names_of_arms_mean_nothing(policy):
    r, order = preferences(6), np.array([3, 1, 5, 0, 2, 4])
    np.testing.assert_allclose(bandit.inclusion(r[order], 3, policy), bandit.inclusion(r, 3, policy)[order], rtol=1e-10)


@POLICIES
def test_subsets_come_in_the_order_of_their_probability(policy):
    r = preferences(7, 2)
    found = list(bandit.by_probability(r, 3, policy))
    chances = [bandit.subset_probability(r, s, policy) for s in found]
    assert sorted(found) == list(itertools.combinations(range(7), 3)) and chances == sorted(chances, reverse=True)


def test_draws_are_a_function_of_seed_and_step():
    settings = Bandit(12, 4)
    state = at(settings, preferences(12))
    one = [bandit.step_subset(settings, state, 7, step).tolist() for step in range(40)]
    assert one == [bandit.step_subset(settings, state, 7, step).tolist() for step in range(40)]
    assert len(set(map(tuple, one))) > 20 and all(len(set(s)) == 4 for s in one)
    assert one != [bandit.step_subset(settings, state, 8, step).tolist() for step in range(40)]
    assert bandit.step_subset(settings, state, 7, 0, m=2).shape == (2,)
    assert bandit.mask(np.array([1, 3]), 5).tolist() == [False, True, False, True, False]


# Candidates.


@POLICIES
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 3e4])
def test_candidates_differ_and_are_the_same_again(policy, scale):
    settings = Bandit(12, 4, candidates=5, policy=policy)
    state = at(settings, scale * preferences(12))
    found = bandit.candidates(settings, state, 3)
    assert found.shape == (5, 4) and len(set(map(tuple, found.tolist()))) == 5
    assert (np.diff(found) > 0).all() and found.min() >= 0 and found.max() < 12
    np.testing.assert_array_equal(found, bandit.candidates(settings, state, 3))
    later = state._replace(updates=np.asarray(1, np.int32))
    if scale <= 1:
        assert (found != bandit.candidates(settings, later, 3)).any()


def test_what_saturated_preferences_do_not_yield_is_filled_by_probability():
    settings = Bandit(6, 2, candidates=4)
    state = at(settings, [60, 60, -60, -61, -62, -63])
    assert bandit.candidates(settings, state, 0).tolist() == [[0, 1], [0, 2], [1, 2], [0, 3]]
    every = Bandit(4, 2, candidates=6)
    assert len(bandit.candidates(every, at(every, [900, 900, -900, -900]), 0)) == 6


def test_all_subsets_can_be_candidates_where_too_many_arms_are_skipped_to_compute_with():
    settings = Bandit(24, 22, candidates=3)
    state = at(settings, np.arange(24) * 100 - 1200)
    found = bandit.candidates(settings, state, 0)
    assert found.shape == (3, 22) and sorted(set(range(24)) - set(found[0].tolist())) == [0, 1]


# Update.


SUBSETS = np.array([[0, 2], [0, 3], [1, 2]])
LOSSES = np.array([0.4, 0.9, 0.1])


def moved(losses=LOSSES, subsets=SUBSETS, r=None, settings=None):
    """What an update adds to r, with a rate of 1."""
    settings = settings or Bandit(6, 2)
    r = preferences(6, 4) if r is None else r
    return bandit.update(settings, at(settings, r), subsets, losses).preference - r


def test_the_update_is_the_closed_form():
    r = preferences(6, 4)
    p = 1 / (1 + np.exp(-r.astype(np.float64)))
    v = np.exp(-LOSSES)
    expected = np.zeros(6)
    for subset, advantage in zip(SUBSETS, v - v.mean(), strict=True):
        for arm in subset:
            expected[arm] += 0.5 * advantage * p[arm] * (1 - p[arm])
    np.testing.assert_allclose(moved(settings=Bandit(6, 2, rate=0.5)), expected, atol=2e-7)


def test_what_arms_gain_is_conserved():
    r = preferences(6, 4)
    p = 1 / (1 + np.exp(-r.astype(np.float64)))
    assert abs((moved() / (p * (1 - p))).sum()) < 2e-6


def test_arms_that_no_or_all_candidates_skip_stay_bit_for_bit():
    delta = moved(r=np.zeros(6, np.float32))
    assert (delta[[4, 5]] == 0).all() and (delta[:4] != 0).all()
    assert moved(subsets=np.array([[0, 1], [0, 2], [0, 3]]), r=np.zeros(6, np.float32))[0] == 0


def test_the_order_of_candidates_means_nothing_and_a_constant_scales():
    order = np.array([2, 0, 1])
    np.testing.assert_allclose(moved(LOSSES[order], SUBSETS[order]), moved(), atol=1e-7)
    np.testing.assert_allclose(moved(LOSSES + 0.7), np.exp(-0.7) * moved(), atol=2e-7)


def test_the_better_candidate_makes_its_arms_easier_to_skip():
    delta, advantage = moved(), np.exp(-LOSSES) - np.exp(-LOSSES).mean()
    assert np.sign(delta[3]) == np.sign(advantage[1]) and np.sign(delta[1]) == np.sign(advantage[2])


def test_rewards_are_float64_and_bounded():
    np.testing.assert_allclose(bandit.rewards(np.array([200.0, np.inf, -1e9])), [np.exp(-200), 0, np.exp(50)])
    assert np.isnan(bandit.rewards(np.array([np.nan]))).all()
    assert (np.diff(bandit.rewards(np.array([110.0, 111.0, 112.0]))) < 0).all()  # in float32 they are all 0


def test_a_nan_drops_the_update_and_is_counted():
    settings = Bandit(6, 2)
    state = at(settings, preferences(6))
    after = bandit.update(settings, state, SUBSETS, np.array([0.1, np.nan, 0.3]))
    np.testing.assert_array_equal(after.preference, state.preference)
    assert (int(after.poisoned), int(after.updates), int(after.flat)) == (1, 1, 0)


def test_an_infinite_loss_is_no_reward():
    delta = moved(np.array([np.inf, 0.1, 0.2]))
    assert np.isfinite(delta).all() and delta[0] != 0


@pytest.mark.parametrize("losses", [[0.1] * 3, [900.0, 950.0, 1000.0], [np.inf] * 3, [-60.0, -70.0, -80.0]])
def test_equal_rewards_move_nothing_and_warn(losses):
    settings = Bandit(6, 2)
    state = at(settings, preferences(6))
    with pytest.warns(UserWarning, match="same reward"):
        after = bandit.update(settings, state, SUBSETS, np.array(losses))
    np.testing.assert_array_equal(after.preference, state.preference)
    assert (int(after.flat), int(after.updates)) == (1, 1)


def test_preferences_stay_finite():
    settings = Bandit(6, 2, rate=1e3)
    warnings.simplefilter("ignore")  # restored by pytest
    state, random = at(settings, [3e4, -3e4, 0, 0, 1, -1]), np.random.default_rng(0)
    for _ in range(200):
        subsets = bandit.candidates(settings, state, 0)
        state = bandit.update(settings, state, subsets, random.choice([-90.0, 0.0, 1e4, np.inf], 3) + random.random(3))
    assert np.isfinite(state.preference).all()


@pytest.mark.parametrize(
    ("subsets", "losses", "message"),
    [
        ([[0, 1]], [0.1], "2 candidates or more"),
        ([[0, 1], [0, 2]], [0.1], "2 candidates or more"),
        ([[0, 1], [0, 6]], [0.1, 0.2], "in 0..5"),
        ([[0, 1], [-1, 2]], [0.1, 0.2], "in 0..5"),
        ([[0, 1], [2, 2]], [0.1, 0.2], "different arms"),
    ],
)
def test_candidates_that_are_none_are_refused(subsets, losses, message):
    settings = Bandit(6, 2)
    with pytest.raises(ValueError, match=message):
        bandit.update(settings, settings.start(), np.array(subsets), np.array(losses))


# Cadence and the end.


def fired(settings, lengths, fractional=False):
    state, calls = settings.start(), []
    steps = [(e, i, length) for e, length in enumerate(lengths) for i in range(length)]
    for call, (epoch, inside, length) in enumerate(steps):
        state, due = bandit.tick(settings, state, epoch + (inside / length if fractional else 0))
        calls += [call] if due else []
    return calls, state


def test_updates_are_due_when_the_release_makes_them():
    settings = Bandit(12, 4, every=10, warmup=1, search=3)
    assert fired(settings, (25, 45, 35, 15))[0] == [25, 35, 45, 55, 65, 75, 85, 95]
    assert fired(Bandit(32, 6, every=2, warmup=0.5, search=1), (300,), True)[0] == list(range(150, 300, 2))
    llava = Bandit(32, 4, candidates=5, every=3, warmup=20, search=1e9)
    assert fired(llava, [1] * 60)[0] == list(range(20, 60, 3))
    for off in (Bandit(12, 0), Bandit(12, 4, candidates=0), Bandit(12, 12, candidates=1)):
        assert fired(off, (25, 45, 35))[0] == []


def test_a_resumed_search_goes_on_as_it_would_have():
    settings = Bandit(12, 4, every=10, warmup=1, search=3)
    w = preferences(12)

    def go(state, calls):
        for call in calls:
            state, due = bandit.tick(settings, state, 0 if call < 25 else 1)
            if due:
                subsets = bandit.candidates(settings, state, 5)
                state = bandit.update(settings, state, subsets, w[subsets].sum(1))
        return state

    half = go(settings.start(), range(33))
    restored = bandit.State(*(np.array(a.tolist(), a.dtype) for a in half))
    for a, b in zip(go(restored, range(33, 70)), go(settings.start(), range(70)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_ramp_is_llavas():
    assert [bandit.ramped(4, t, 20) for t in range(1, 11)] == [1, 1, 2, 2, 3, 3, 3, 4, 4, 4]
    assert bandit.ramped(4, 1, 0) == 4 and bandit.ramped(0, 9, 20) == 0


def test_the_final_choice_is_stable():
    assert bandit.final(np.array([0.3, 0.1, 0.2, 0.2]), 2).tolist() == [3, 0]
    assert bandit.final(np.zeros(5), 2).tolist() == [3, 4]
    assert bandit.final(np.zeros(5), 0).tolist() == [] and bandit.final(np.zeros(5), 5).tolist() == [0, 1, 2, 3, 4]


def test_nothing_to_skip_draws_nothing():
    settings = Bandit(12, 0)
    assert bandit.step_subset(settings, settings.start(), 0, 0).tolist() == []
    assert bandit.subset_probability(np.zeros(3), ()) == 1


# Settings that no search can have.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skips": -1}, r"in 0\.\.12"),
        ({"skips": 13}, r"in 0\.\.12"),
        ({"skips": True}, "whole number"),
        ({"arms": 0, "skips": 0}, "above 0"),
        ({"candidates": -1}, "0 or more"),
        ({"skips": 12}, "as many subsets"),
        ({"skips": 11, "candidates": 13}, "found 12 of 11 of 12 arms"),
        ({"candidates": 1}, "one candidate"),
        ({"every": 0}, "1 step or more"),
        ({"every": False}, "whole number"),
        ({"rate": 0.0}, "rate must be above 0"),
        ({"rate": float("nan")}, "rate must be above 0"),
        ({"rate": 1e300}, "rate must be above 0 and at most 1e"),
        ({"warmup": float("nan")}, "warmup and search must be numbers, found nan and 3.0"),
        ({"search": float("nan")}, "warmup and search must be numbers, found 1.0 and nan"),
        ({"policy": "softmax"}, "must be one of"),
    ],
)
def test_settings_that_no_search_can_have_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Bandit(**{"arms": 12, "skips": 4, **changes})


def test_a_search_that_never_begins_warns():
    with pytest.warns(UserWarning, match="no update is ever due"):
        Bandit(12, 4, warmup=3, search=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Bandit(12, 12, candidates=1), Bandit(12, 0, candidates=0), Bandit(12, 12, candidates=0)


def test_one_candidate_or_too_few_subsets_are_refused_when_drawn():
    with pytest.raises(ValueError, match="2 candidates or more"):
        bandit.candidates(Bandit(12, 4, candidates=0), Bandit(12, 4).start(), 0)
    with pytest.raises(ValueError, match="as many subsets"):
        bandit.candidates(Bandit(4, 2, candidates=5), Bandit(4, 2).start(), 0, m=1)
    with pytest.raises(ValueError, match="20 arms or fewer"):
        bandit.subset_probability(np.zeros(30), tuple(range(25)))


# Planted redundancy.


def search(cost, settings, updates, seed, sigma=0.1):
    """The choice after some updates, where skipping arm i costs `cost[i]`."""
    state, random = settings.start(), np.random.default_rng([seed, 99])
    for _ in range(updates):
        subsets = bandit.candidates(settings, state, seed)
        losses = 0.5 + cost[subsets].sum(1) + random.normal(0, sigma, len(subsets))
        state = bandit.update(settings, state, subsets, losses)
    return set(bandit.final(state.preference, settings.skips).tolist())


def planted(seed, extra=0.3):
    free = np.random.default_rng(seed).permutation(12)[:4]
    return np.where(np.isin(np.arange(12), free), 0.0, extra), set(free.tolist())


def test_planted_redundancy_is_found():
    cost, free = planted(0)
    assert search(cost, Bandit(12, 4), 200, seed=0) == free


@pytest.mark.slow
def test_planted_redundancy_is_found_for_nearly_every_seed():
    found = [search(planted(seed)[0], Bandit(12, 4), 200, seed) == planted(seed)[1] for seed in range(30)]
    assert sum(found) >= 29
    hits = [
        len(search(planted(seed, 0.02)[0], Bandit(12, 4), 800, seed) & planted(seed, 0.02)[1]) for seed in range(30)
    ]
    assert np.mean(hits) / 4 >= 0.9


@pytest.mark.slow
def test_without_redundancy_no_arm_is_preferred():
    chosen = [arm for seed in range(240) for arm in search(np.zeros(12), Bandit(12, 4), 60, seed)]
    counts = np.bincount(chosen, minlength=12)
    assert ((counts - 80) ** 2 / 80).sum() < 32  # 11 degrees of freedom: beyond the 0.999 quantile
