# SPDX-License-Identifier: Apache-2.0
"""Token merging and pruning against loops in numpy and against closed forms (LTMP spec sections 2 to 6)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtjax.ops import token_reduction as op
from vtjax.ops.tokens import Tokens

B, D = 2, 5
SLOTS = [(1, 1), (2, 1), (12, 1), (13, 1), (9, 0), (13, 4)]
"""(token slots, prefix tokens)."""

match = jax.jit(op.match, static_argnames=("prefix", "hide_dead"))
merge = jax.jit(op.merge, static_argnames=("prefix", "attached"))
merge_top = jax.jit(op.merge_top, static_argnames=("count", "prefix", "by_similarity"))
prune_least = jax.jit(op.prune_least, static_argnames=("count", "prefix"))
attend = jax.jit(op.faithful_attention, static_argnames=("want", "training"))


def halves(slots, prefix):
    """Slots of A and of B: patch tokens in even and in odd slots."""
    patches = range(prefix, slots)
    return [i for i in patches if i % 2 == 0], [i for i in patches if i % 2]


def rng_of(*numbers):
    return np.random.default_rng([17, *numbers])


def unit_vectors(rng, *shape):
    x = rng.normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def some_alive(rng, slots, prefix, share=0.6):
    alive = (rng.random((B, slots)) < share).astype(np.float32)
    alive[:, :prefix] = 1.0
    return alive


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-np.asarray(x, np.float64)))


# The masker.


@pytest.mark.parametrize("exact", [True, False])
def test_the_masker_is_a_strict_comparison(exact):
    t = np.float32(0.3)
    values = np.array([[-np.inf, -0.2, t, np.nextafter(t, np.float32(1)) + 1e-6], [0.299, 0.301, 1.0, np.inf]], "f4")
    out = op.threshold_mask(jnp.asarray(values), jnp.asarray(t), 0.1, exact=exact)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, [[0, 0, 0, 1], [0, 1, 1, 1]])


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_the_masker_has_the_gradient_of_the_sigmoid(tau):
    rng = rng_of(1)
    values = rng.uniform(0, 1, (3, 6)).astype(np.float32)
    values[0, 0], values[1, 2], values[2, 3] = np.inf, -np.inf, 0.4
    upstream, t = rng.normal(size=(3, 6)).astype(np.float32), jnp.float32(0.4)

    def value(v, t, exact):
        return (op.threshold_mask(v, t, tau, exact=exact) * upstream).sum()

    p = sigmoid((values - 0.4) / tau)
    slope = p * (1 - p) / tau
    assert slope[0, 0] == slope[1, 2] == 0
    for exact in (True, False):
        to_values, to_t = jax.grad(value, (0, 1))(jnp.asarray(values), t, exact)
        np.testing.assert_allclose(to_values, upstream * slope, atol=1e-6)
        np.testing.assert_allclose(to_t, -(upstream * slope).sum(), rtol=1e-5, atol=1e-6)
        assert to_values[0, 0] == 0 and to_values[1, 2] == 0


def test_both_forms_of_the_masker_differ_only_within_1e_8_above_the_threshold():
    t = np.float32(0.005)
    steps = np.concatenate([-np.geomspace(1e-9, 1e-3, 61), np.geomspace(1e-9, 1e-3, 61)])
    values = (t + steps).astype(np.float32)
    above = values.astype(np.float64) - np.float64(t)

    def run(exact):
        return np.asarray(op.threshold_mask(jnp.asarray(values), jnp.asarray(t), 0.1, exact=exact))

    exact, rounded = run(True), run(False)
    np.testing.assert_array_equal(exact, above > 0)
    differs = above[exact != rounded]
    assert len(differs) > 5 and differs.min() > 0 and differs.max() < 1.5e-8
    assert set(rounded) == {0.0, 1.0}


# Features and matching.


def test_unit_features_are_the_normed_mean_over_heads_and_a_zero_stays_zero():
    features = rng_of(2).normal(size=(B, 4, 3, 6)).astype(np.float32)
    features[1, 2] = 0.0
    unit = op.unit_features(jnp.asarray(features))
    for b, n in np.ndindex(B, 4):
        mean = sum(features[b, n, h].astype(np.float64) for h in range(3)) / 3
        expected = mean / np.linalg.norm(mean) if (b, n) != (1, 2) else np.zeros(6)
        np.testing.assert_allclose(unit[b, n], expected, atol=1e-6)
    grad = jax.grad(lambda f: op.unit_features(f).sum())(jnp.asarray(features))
    assert np.isfinite(grad).all()


def loop_match(unit, prefix, alive, hide_dead):
    slots = unit.shape[1]
    a, b = halves(slots, prefix)
    similarity = np.full((B, len(a)), -np.inf, np.float32)
    partner = np.zeros((B, len(a)), np.int32)
    for row in range(B):
        for i, source in enumerate(a):
            for j, target in enumerate(b):
                both = alive[row, source] > 0.5 and alive[row, target] > 0.5
                if hide_dead and not both:
                    continue
                cosine = unit[row, source].astype(np.float64) @ unit[row, target] if both else 0.0
                if cosine > similarity[row, i]:
                    similarity[row, i], partner[row, i] = cosine, j
    return similarity, partner


@pytest.mark.parametrize("masked", ["all live", "dead hidden", "dead at zero"])
@pytest.mark.parametrize(("slots", "prefix"), SLOTS)
def test_match_equals_the_loops(slots, prefix, masked):
    rng = rng_of(3, slots, prefix)
    unit = unit_vectors(rng, B, slots, D)
    alive = np.ones((B, slots), np.float32) if masked == "all live" else some_alive(rng, slots, prefix)
    hide = masked != "dead at zero"
    given = None if masked == "all live" else jnp.asarray(alive)
    found = match(jnp.asarray(unit), prefix, given, hide_dead=hide)
    similarity, partner = loop_match(unit, prefix, alive, hide)
    assert found.similarity.dtype == jnp.float32 and found.partner.dtype == jnp.int32
    np.testing.assert_allclose(found.similarity, similarity, atol=1e-6)
    np.testing.assert_array_equal(found.partner, partner)


def test_a_token_without_a_live_partner_finds_nobody():
    unit = jnp.asarray(unit_vectors(rng_of(4), B, 9, D))
    alive = jnp.ones((B, 9)).at[0, 1::2].set(0.0).at[1, 4].set(0.0)
    similarity = np.asarray(match(unit, 1, alive).similarity)
    assert np.isneginf(similarity[0]).all()
    np.testing.assert_array_equal(np.isneginf(similarity[1]), [False, True, False, False])


def test_a_tie_goes_to_the_first_and_so_does_its_gradient():
    e = np.eye(3, dtype=np.float32)
    unit = jnp.asarray(np.stack([e[0], e[1], e[2], e[2], 0.6 * e[2] + 0.8 * e[0], e[2]])[None])  # B: slots 1, 3, 5
    found = match(unit, 1)
    np.testing.assert_array_equal(found.partner, [[1, 1]])  # slots 2 and 4 find slot 3, not its twin 5
    np.testing.assert_allclose(found.similarity, [[1.0, 0.6]], atol=1e-7)
    grad = jax.grad(lambda u: match(u, 1).similarity[0, 1])(unit)
    np.testing.assert_allclose(grad[0, 3], unit[0, 4], atol=1e-7)
    np.testing.assert_array_equal(grad[0, 5], np.zeros(3))


def test_cosines_of_equal_tokens_are_at_most_1():
    unit = op.unit_features(jnp.asarray(rng_of(5).normal(size=(200, 1, 1, 64)), jnp.float32))
    unit = jnp.repeat(unit, 3, axis=1)
    raw = jnp.einsum("bd,bd->b", unit[:, 0], unit[:, 1], precision=jax.lax.Precision.HIGHEST)
    assert (raw > 1).any()  # without the clamp a threshold of 1 would merge some
    found = match(unit, 1)
    assert found.similarity.max() == 1.0 and found.similarity.min() > 1 - 1e-6


# Merging, pruning, compaction.


def random_tokens(rng, slots, prefix, *, dead=True):
    """Tokens, their importance, and a source in which every live slot holds what its size says."""
    alive = some_alive(rng, slots, prefix, 0.7) if dead else np.ones((B, slots), np.float32)
    size = rng.integers(1, 4, (B, slots)).astype(np.float32)
    size[:, :prefix] = 1.0
    originals = int((size * alive).sum(1).max()) + 3
    source = np.full((B, originals), -1, np.int32)
    for row in range(B):
        held = np.repeat(np.arange(slots), (size * alive)[row].astype(int))
        source[row, rng.permutation(originals)[: len(held)]] = held
    x = rng.normal(size=(B, slots, D)).astype(np.float32)
    importance = rng.uniform(0, 1, (B, slots)).astype(np.float32)
    importance[:, :prefix] = np.inf
    tokens = Tokens(*(jnp.asarray(a) for a in (x, size, alive, source)))
    return tokens, importance


def random_merge(rng, tokens, prefix):
    """A partner for every token of A, and which of them merge: live ones, into live partners only."""
    slots = tokens.x.shape[1]
    a, b = halves(slots, prefix)
    alive = np.asarray(tokens.alive)
    partner = rng.integers(0, max(len(b), 1), (B, len(a))).astype(np.int32)
    merged = np.zeros((B, len(a)), np.float32)
    for row in range(B):
        for i, source in enumerate(a):
            if b and alive[row, source] and alive[row, b[partner[row, i]]]:
                merged[row, i] = float(rng.random() < 0.6)
    similarity = rng.uniform(0, 1, (B, len(a))).astype(np.float32)
    return op.Match(jnp.asarray(similarity), jnp.asarray(partner)), merged


def loop_merge(tokens, importance, partner, merged, prefix):
    """Spec section 4, steps 4 to 7, one token at a time, in the old slots; then the new order."""
    slots = tokens.x.shape[1]
    a, b = halves(slots, prefix)
    x, size, alive = (np.array(v, np.float64) for v in (tokens.x, tokens.size, tokens.alive))
    source, importance = np.array(tokens.source), importance.astype(np.float64)
    x = x * size[..., None]
    start = x.copy(), size.copy()
    for row in range(B):
        for i, one in enumerate(a):
            if merged[row, i]:
                into = b[partner[row, i]]
                x[row, into] += start[0][row, one]
                size[row, into] += start[1][row, one]
                importance[row, into] = max(importance[row, into], importance[row, one])
                alive[row, one] = 0.0
                source[row][source[row] == one] = into
    x /= size[..., None]
    order = [*range(prefix), *a, *b]
    place = np.argsort(order)
    source = np.where(source < 0, -1, place[np.maximum(source, 0)])
    return x[:, order], size[:, order], alive[:, order], source, importance[:, order]


@pytest.mark.parametrize(("slots", "prefix"), SLOTS)
def test_merge_equals_the_loops(slots, prefix):
    rng = rng_of(6, slots, prefix)
    tokens, importance = random_tokens(rng, slots, prefix)
    found, merged = random_merge(rng, tokens, prefix)
    assert merged.any() or slots < 9
    out, raised = merge(tokens, jnp.asarray(importance), found, jnp.asarray(merged), prefix)
    x, size, alive, source, expected = loop_merge(tokens, importance, np.asarray(found.partner), merged, prefix)
    np.testing.assert_allclose(out.x, x, atol=1e-6)
    np.testing.assert_array_equal(out.size, size)
    np.testing.assert_array_equal(out.alive, alive)
    np.testing.assert_array_equal(out.source, source)
    np.testing.assert_array_equal(raised, expected.astype(np.float32))
    assert merge(tokens, None, found, jnp.asarray(merged), prefix)[1] is None


def test_merging_preserves_the_weighted_mean_and_the_number_of_originals():
    rng = rng_of(7)
    tokens, _ = random_tokens(rng, 13, 1)
    found, merged = random_merge(rng, tokens, 1)
    out, _ = merge(tokens, None, found, jnp.asarray(merged), 1)

    def total(t):
        w = np.asarray(t.size * t.alive, np.float64)
        return (np.asarray(t.x) * w[..., None]).sum(1), w.sum(1)

    (sums, sizes), (sums_after, sizes_after) = total(tokens), total(out)
    assert merged.any()
    np.testing.assert_allclose(sums_after, sums, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(sizes_after, sizes)
    assert np.asarray(out.size).sum() > np.asarray(tokens.size).sum()  # dead slots keep theirs: never sum without alive


def test_absent_fields_mean_ones_and_the_identity_in_a_merge():
    rng = rng_of(8)
    x = jnp.asarray(rng.normal(size=(B, 7, D)), jnp.float32)
    ones = jnp.ones((B, 7))
    whole = Tokens(x, ones, ones, jnp.broadcast_to(jnp.arange(7, dtype=jnp.int32), (B, 7)))
    found, merged = random_merge(rng, whole, 1)
    a, _ = merge(Tokens(x), None, found, jnp.asarray(merged), 1)
    b, _ = merge(whole, None, found, jnp.asarray(merged), 1)
    for name in ("x", "size", "alive", "source"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_merging_trains_through_alive_alone():
    tokens, _ = random_tokens(rng_of(9), 13, 1)
    found, merged = random_merge(rng_of(10), tokens, 1)
    assert merged.any()

    def values(merged, alive):
        out, _ = merge(tokens.replace(alive=alive), None, found, merged, 1)
        return out.x.sum() + out.size.sum(), out.alive

    none = jax.grad(lambda m: values(m, tokens.alive)[0])(jnp.asarray(merged))
    np.testing.assert_array_equal(none, np.zeros_like(merged))
    weights = jnp.arange(1.0, 14.0)
    to_merged, to_alive = jax.grad(lambda m, a: (values(m, a)[1] * weights).sum(), (0, 1))(
        jnp.asarray(merged), tokens.alive
    )
    a, b = halves(13, 1)
    alive = np.asarray(tokens.alive)
    for row in range(B):
        for i, slot in enumerate(a):  # a live token of A: 1 - merged; a dead one keeps its mask and its gradient
            live = alive[row, slot] > 0.5
            assert to_merged[row, i] == (-weights[1 + i] if live else 0.0)
            assert to_alive[row, slot] == (0.0 if live else weights[1 + i])
        for j, slot in enumerate(b):
            assert to_alive[row, slot] == weights[1 + len(a) + j]
        assert to_alive[row, 0] == 0.0


def test_an_attached_merge_trains_through_what_it_leaves_in_the_partner():
    rng = rng_of(21)
    tokens, _ = random_tokens(rng, 13, 1)
    found, merged = random_merge(rng, tokens, 1)
    to_x, to_size = rng.normal(size=(B, 13, D)), rng.normal(size=(B, 13))

    def value(merged):
        out, _ = merge(tokens, None, found, merged, 1, attached=True)
        return (out.x * to_x.astype("f4")).sum() + (out.size * to_size.astype("f4")).sum(), out

    grad, out = jax.grad(value, has_aux=True)(jnp.asarray(merged))
    same, _ = merge(tokens, None, found, jnp.asarray(merged), 1)
    np.testing.assert_array_equal(out.x, same.x)
    np.testing.assert_array_equal(out.size, same.size)
    a, _ = halves(13, 1)
    for row, i in np.ndindex(merged.shape):
        size, into = float(tokens.size[row, a[i]]), 1 + len(a) + int(found.partner[row, i])
        towards = np.asarray(tokens.x[row, a[i]] - out.x[row, into], np.float64) * size / float(out.size[row, into])
        assert grad[row, i] == pytest.approx(to_x[row, into] @ towards + to_size[row, into] * size, rel=1e-4, abs=1e-5)


def test_prune_kills_in_place_and_the_dead_stay_dead():
    tokens, _ = random_tokens(rng_of(11), 12, 1)
    keep = (rng_of(12).random((B, 12)) < 0.5).astype(np.float32)
    keep[:, 0] = 1.0
    out = op.prune(tokens, jnp.asarray(keep))
    alive, source = np.asarray(tokens.alive), np.asarray(tokens.source)
    np.testing.assert_array_equal(out.alive, alive * keep)
    np.testing.assert_array_equal(out.x, tokens.x)
    np.testing.assert_array_equal(out.size, tokens.size)
    for row in range(B):
        expected = [s if s >= 0 and keep[row, s] else -1 for s in source[row]]
        np.testing.assert_array_equal(out.source[row], expected)
    to_keep, to_alive = jax.grad(lambda k, a: op.prune(tokens.replace(alive=a), k).alive.sum(), (0, 1))(
        jnp.asarray(keep), tokens.alive
    )
    np.testing.assert_array_equal(to_keep, alive)
    np.testing.assert_array_equal(to_alive, 1 - alive)


def test_compact_is_stable_and_moves_everything_alike():
    tokens, importance = random_tokens(rng_of(13), 13, 1)
    out, moved = op.compact(tokens, jnp.asarray(importance))
    alive = np.asarray(tokens.alive)
    for row in range(B):
        live = np.flatnonzero(alive[row])
        order = [*live, *np.flatnonzero(alive[row] == 0)]
        assert order != sorted(order)
        np.testing.assert_array_equal(out.x[row], tokens.x[row][np.array(order)])
        np.testing.assert_array_equal(out.size[row], tokens.size[row][np.array(order)])
        np.testing.assert_array_equal(out.alive[row], np.arange(13) < len(live))
        np.testing.assert_array_equal(moved[row], importance[row][order])
        expected = [-1 if s < 0 else order.index(s) for s in np.asarray(tokens.source)[row]]
        np.testing.assert_array_equal(out.source[row], expected)
    again, _ = op.compact(out)
    for name in ("x", "size", "alive", "source"):
        np.testing.assert_array_equal(getattr(again, name), getattr(out, name))
    assert op.compact(tokens.replace(size=None))[0].size is None and op.compact(tokens)[1] is None
    upstream = jnp.arange(13.0)
    grad = jax.grad(lambda a: (op.compact(tokens.replace(alive=a))[0].alive * upstream).sum())(tokens.alive)
    for row in range(B):
        order = [*np.flatnonzero(alive[row]), *np.flatnonzero(alive[row] == 0)]
        np.testing.assert_array_equal(np.asarray(grad)[row][order], upstream)


def test_protect_the_prefix():
    importance = rng_of(14).uniform(0, 1, (B, 9)).astype(np.float32)
    for prefix in (1, 4):
        out = np.asarray(op.protect(jnp.asarray(importance, jnp.bfloat16), prefix, None))
        assert out.dtype == np.float32 and np.isposinf(out[:, :prefix]).all()
        np.testing.assert_allclose(out[:, prefix:], importance[:, prefix:], atol=4e-3)


def test_without_a_prefix_the_most_important_live_token_is_protected():
    importance = jnp.asarray([[0.1, 0.5, 0.3, 0.5], [0.4, 0.1, 0.2, 0.3]])
    np.testing.assert_array_equal(np.isposinf(op.protect(importance, 0, None)), [[0, 1, 0, 0], [1, 0, 0, 0]])
    alive = jnp.asarray([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0]])
    out = op.protect(importance, 0, alive)
    np.testing.assert_array_equal(np.isposinf(out), [[0, 0, 0, 1], [0, 0, 1, 0]])
    np.testing.assert_array_equal(out[0, :3], importance[0, :3])


# The budget.


def costs_of(width, layers):
    return jnp.tile(jnp.asarray([[4.0 * width**2, 2.0 * width, 8.0 * width**2]]), (layers, 1))


@pytest.mark.parametrize("per_image", [False, True])
def test_the_budget_and_its_gradient_have_the_closed_form(per_image):
    layers, tokens, width = 4, 65, 32
    fractions = np.sort(rng_of(15).uniform(0.1, 1, (layers, 3) if per_image else (layers,)), axis=0)[::-1]

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(fractions):
        ratio, share = op.budget(fractions, tokens, costs_of(width, layers))
        return ratio.sum(), (ratio, share)

    grad, (ratio, share) = run(jnp.asarray(fractions, jnp.float32))
    unit = 6 * tokens * width**2 + tokens**2 * width
    before = np.concatenate([np.ones_like(fractions[:1]), fractions[:-1]])
    parts = 2 * before * tokens * width**2 + (before * tokens) ** 2 * width + 4 * fractions * tokens * width**2
    np.testing.assert_allclose(share, parts / unit / layers, rtol=1e-5)
    np.testing.assert_allclose(ratio, (parts / unit / layers).sum(0), rtol=1e-5)
    expected = np.zeros_like(fractions)
    for layer in range(layers):
        expected[layer] = 4 * tokens * width**2
        if layer < layers - 1:
            expected[layer] += 2 * tokens * width**2 + 2 * fractions[layer] * tokens**2 * width
    np.testing.assert_allclose(grad, expected / unit / layers, rtol=1e-5)


def test_the_budget_is_1_for_the_dense_model_and_grows_with_every_block():
    costs = jnp.asarray([[100.0, 2.0, 300.0], [80.0, 3.0, 10.0], [0.0, 0.0, 50.0]])
    dense = float(op.budget(jnp.ones(3), 10, costs)[0])
    assert dense == pytest.approx(1.0, abs=1e-6)
    for layer in range(3):
        values = [float(op.budget(jnp.full(3, 0.7).at[layer].set(f), 10, costs)[0]) for f in (0.1, 0.2, 0.5, 0.9, 1.0)]
        assert (np.diff(values) > 0).all() and max(values) < dense


def test_the_budget_of_unequal_blocks_is_their_macs_over_the_dense_ones():
    costs, n = np.array([[100.0, 2.0, 300.0], [80.0, 3.0, 10.0], [0.0, 0.0, 50.0]]), [10, 7, 4, 2]
    macs = sum(c[0] * n[i] + c[1] * n[i] ** 2 + c[2] * n[i + 1] for i, c in enumerate(costs))
    dense = sum(c[0] * 10 + c[1] * 100 + c[2] * 10 for c in costs)
    ratio, _ = op.budget(jnp.asarray(n[1:]) / 10.0, 10, jnp.asarray(costs, jnp.float32))
    assert float(ratio) == pytest.approx(macs / dense, rel=1e-6)


# Fixed rates.


def loop_merge_top(tokens, importance, unit, count, prefix, by_similarity):
    slots = tokens.x.shape[1]
    a, b = halves(slots, prefix)
    count = min(count, (slots - prefix) // 2)
    similarity, partner = loop_match(unit, prefix, np.ones((B, slots)), True)
    ranked = [sorted(range(len(a)), key=lambda i, s=s: (-s[i], i)) for s in similarity]
    merged = np.zeros((B, len(a)))
    for row in range(B):
        merged[row, ranked[row][:count]] = 1
    x, size, _, source, importance = loop_merge(tokens, importance, partner, merged, prefix)
    outs = []
    for row in range(B):
        left = ranked[row][count:] if by_similarity else sorted(ranked[row][count:])
        order = [*range(prefix), *(prefix + i for i in left), *(prefix + len(a) + j for j in range(len(b)))]
        where = [order.index(s) if s in order else -1 for s in source[row]]
        outs.append((x[row, order], size[row, order], where, importance[row, order]))
    return [np.stack(part) for part in zip(*outs, strict=True)]


@pytest.mark.parametrize("by_similarity", [False, True])
@pytest.mark.parametrize(
    ("slots", "prefix", "count"), [(12, 1, 3), (13, 1, 0), (13, 4, 2), (9, 0, 99), (9, 1, 99), (1, 1, 2), (2, 1, 2)]
)
def test_merge_top_equals_the_loops(slots, prefix, count, by_similarity):
    rng = rng_of(16, slots, prefix)
    tokens, importance = random_tokens(rng, slots, prefix, dead=False)
    unit = unit_vectors(rng, B, slots, D)
    out, raised = merge_top(
        tokens, jnp.asarray(importance), jnp.asarray(unit), count, prefix, by_similarity=by_similarity
    )
    x, size, source, expected = loop_merge_top(tokens, importance, unit, count, prefix, by_similarity)
    assert out.x.shape[1] == slots - min(count, (slots - prefix) // 2) and out.alive is None
    np.testing.assert_allclose(out.x, x, atol=1e-6)
    np.testing.assert_array_equal(out.size, size)
    np.testing.assert_array_equal(out.source, source)
    np.testing.assert_array_equal(raised, expected.astype(np.float32))


@pytest.mark.parametrize(("slots", "prefix", "count"), [(12, 1, 3), (13, 4, 0), (9, 0, 99), (1, 1, 2)])
def test_prune_least_equals_the_loops(slots, prefix, count):
    rng = rng_of(17, slots)
    tokens, importance = random_tokens(rng, slots, prefix, dead=False)
    if slots > 8:
        importance[:, -1] = importance[:, -2]  # a tie: the earlier slot counts as the more important
    out, kept = prune_least(tokens, jnp.asarray(importance), count, prefix)
    stays = slots - min(count, (slots - prefix) // 2)
    for row in range(B):
        order = sorted(range(slots), key=lambda i, s=importance[row]: (-s[i], i))[:stays]
        np.testing.assert_array_equal(out.x[row], np.asarray(tokens.x)[row, order])
        np.testing.assert_array_equal(out.size[row], np.asarray(tokens.size)[row, order])
        np.testing.assert_array_equal(kept[row], importance[row, order])
        expected = [order.index(s) if s in order else -1 for s in np.asarray(tokens.source)[row]]
        np.testing.assert_array_equal(out.source[row], expected)
        assert order[:prefix] == list(range(prefix))
    assert prune_least(tokens.replace(size=None), jnp.asarray(importance), count, prefix)[0].size is None


# Dense heads.


def test_unmerge_gives_every_patch_its_holder():
    x = jnp.arange(8.0).reshape(1, 4, 2)
    tokens = Tokens(x, source=jnp.asarray([[0, 1, 3, -1, 1, 2, 3]], jnp.int32))
    grid, valid = op.unmerge(tokens, (2, 3), 1)
    np.testing.assert_array_equal(grid[0, ..., 0], [[2, 6, 0], [2, 4, 6]])
    np.testing.assert_array_equal(valid, [[[1, 1, 0], [1, 1, 1]]])
    whole, valid = op.unmerge(Tokens(x), (1, 3), 1)
    np.testing.assert_array_equal(whole[0, 0], x[0, 1:])
    assert valid.all()
    with pytest.raises(ValueError, match="grid must hold 6 patches, found 2 x 2"):
        op.unmerge(tokens, (2, 2), 1)


# The release's attention.


def loop_attention(q, k, v, size, alive, eps):
    b, n, h, d = q.shape
    y, share = np.zeros((b, n, h, d)), np.zeros((b, h, n, n))
    for i, j, r in np.ndindex(b, h, n):
        scores = np.array([q[i, r, j] @ k[i, m, j] / np.sqrt(d) + np.log(size[i, m]) for m in range(n)])
        weight = np.exp(scores - scores.max()) * alive[i]
        share[i, j, r] = (weight + eps / n) / (weight.sum() + eps)
        y[i, r, j] = share[i, j, r] @ v[i, :, j]
    return y, share


@pytest.fixture(scope="module")
def attended():
    rng = rng_of(18)
    q, k, v = (rng.normal(size=(B, 9, 2, 4)).astype(np.float32) for _ in range(3))
    size = rng.integers(1, 5, (B, 9)).astype(np.float32)
    alive = some_alive(rng, 9, 1)
    assert (alive.sum(1) < 8).all()
    return q, k, v, size, alive


@pytest.mark.parametrize("training", [False, True])
def test_the_releases_attention_equals_the_loops(attended, training):
    q, k, v, size, alive = attended
    y, aux = attend(
        *(jnp.asarray(a) for a in (q, k, v)),
        size=jnp.asarray(size),
        alive=jnp.asarray(alive),
        want=("importance",),
        training=training,
    )
    expected, share = loop_attention(*(a.astype(np.float64) for a in (q, k, v)), size, alive, 1e-5 * training)
    np.testing.assert_allclose(y, expected, atol=2e-6)
    np.testing.assert_allclose(aux["importance"], share.mean((1, 2)), atol=1e-6)  # over all rows, dead ones included
    np.testing.assert_allclose(np.asarray(aux["importance"]).sum(1), 1.0, atol=1e-5)


def test_rows_of_the_masked_softmax_sum_to_1_and_dead_keys_get_nothing(attended):
    alive = attended[4]
    dead = np.broadcast_to(alive[:, None, None] < 0.5, (B, 2, 9, 9))
    scores = jnp.asarray(rng_of(19).normal(size=dead.shape) - 9.0 * dead, jnp.float32)  # a live key holds the maximum
    for eps in (0.0, 1e-5):
        share = np.asarray(op.masked_softmax(scores, jnp.asarray(alive), eps))
        np.testing.assert_allclose(share.sum(-1), 1.0, atol=1e-6)
        assert share[dead].max() <= eps / 9 and (share[dead] > 0).all() == (eps > 0)
        assert (share[~dead] > 1e-4).all()
    np.testing.assert_allclose(op.masked_softmax(scores, None, 0.0), jax.nn.softmax(scores), atol=1e-6)


def test_the_masked_softmax_hands_gradient_to_the_mask_of_a_dead_key():
    scores = jnp.asarray(rng_of(20).normal(size=(1, 1, 1, 4)), jnp.float32)
    alive, upstream = jnp.asarray([[1.0, 1.0, 0.0, 1.0]]), np.array([0.3, -1.0, 2.0, 0.5])
    grad = jax.grad(lambda a: (op.masked_softmax(scores, a, 0.0)[0, 0, 0] * upstream).sum())(alive)
    e = np.exp(np.asarray(scores[0, 0, 0], np.float64))
    total = (e * np.asarray(alive[0])).sum()
    share = e * np.asarray(alive[0]) / total
    np.testing.assert_allclose(grad[0], e / total * (upstream - share @ upstream), rtol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_a_token_of_size_k_counts_as_k_tokens_in_the_releases_attention(attended, training):
    q, k, v, *_ = attended
    repeats = np.array([1, 3, 1, 1, 2, 1, 1, 4, 1])
    run = functools.partial(attend, training=training)
    y, _ = run(*map(jnp.asarray, (q, k, v)), size=jnp.asarray(np.tile(repeats, (B, 1)), jnp.float32))
    again, _ = run(*(jnp.asarray(np.repeat(a, repeats, axis=1)) for a in (q, k, v)))
    first = np.cumsum(repeats) - repeats
    np.testing.assert_allclose(y, again[:, first], atol=1e-5 if training else 2e-6)  # eps is spread over slots


def test_the_releases_attention_knows_no_lse(attended):
    with pytest.raises(ValueError, match="no lse"):
        op.faithful_attention(*map(jnp.asarray, attended[:3]), want=("lse",))


def test_both_sums_of_a_merge_agree_and_so_do_their_gradients():
    values = jax.random.normal(jax.random.key(0), (3, 5, 4))
    partner = jnp.asarray([[0, 0, 3, 3, 3], [1, 2, 3, 4, 5], [5, 5, 5, 5, 5]], jnp.int32)
    weights = jax.random.normal(jax.random.key(1), (3, 6, 4))
    found = {}
    for form in (op._added, op._multiplied):
        total, back = jax.vjp(lambda v, f=form: f(6, v, partner), values)
        found[form] = np.asarray(total), np.asarray(back(weights)[0])
    for a, b in zip(*found.values(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    expected = np.zeros((3, 6, 4))
    np.add.at(expected, (np.arange(3)[:, None], partner), values)
    np.testing.assert_allclose(found[op._added][0], expected, atol=1e-6)


def test_the_first_of_equal_partners_is_taken():
    x = jnp.asarray([[[1.0, 2.0, 2.0], [-jnp.inf, -jnp.inf, -jnp.inf], [0.0, -jnp.inf, 0.0]]])
    assert op._first_largest(x).tolist() == [[1, 0, 0]]


# Images on several devices.


def scatters(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name.startswith("scatter"):
            yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                    yield from scatters(inner)


def test_no_scatter_names_the_image_it_is_about():
    """Its batch would be reduced over the devices that hold it: SPMD knows batch dimensions, not indices that count."""

    def all_of_it(x, unit, importance, merged):
        tokens, beside = op.merge(Tokens(x=x), importance, op.match(unit, 1), merged, 1)
        tokens, beside = op.compact(tokens, beside)
        fixed, rest = op.merge_top(Tokens(x=x), importance, unit, 2, 1, by_similarity=True)
        return tokens.x, beside, op.prune_least(fixed, rest, 2, 1)[0].source

    x = jnp.zeros((B, 9, D))
    found = list(scatters(jax.make_jaxpr(all_of_it)(x, x, x[..., 0], x[:, :4, 0]).jaxpr))
    assert len(found) >= 4
    for eqn in found:
        numbers = eqn.params["dimension_numbers"]
        assert numbers.operand_batching_dims == (0,) or 0 in numbers.update_window_dims, eqn
