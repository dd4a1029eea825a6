# SPDX-License-Identifier: Apache-2.0
"""Selection against an obvious numpy version, float64 QR, the greedy certificate, and itself on eight devices."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import vtjax
from tests import devices
from vtjax.errors import InputError
from vtjax.ops import gram_schmidt as ops

ROOT = Path(__file__).resolve().parents[2]


def obvious(weights, k):
    """Spec sections 1 and 6.1 in float64: indices, and distances."""
    rows, (height, width) = np.asarray(weights, np.float64), np.shape(weights)
    picks, norms, left = [], [], list(range(height))
    while len(picks) < k:
        residual = rows[left].copy()
        start = np.linalg.norm(residual, axis=1).max()
        free = np.ones(len(left), bool)
        for _ in range(min(width, k - len(picks), len(left))):
            distance = np.where(free, np.linalg.norm(residual, axis=1), -1)
            best = int(distance.argmax())
            if start > 0 and distance[best] <= 4 * np.finfo(np.float32).eps * np.sqrt(width) * start:
                break
            picks.append(left[best])
            norms.append(distance[best])
            free[best] = False
            if start > 0:
                unit = residual[best] / distance[best]
                residual -= np.outer(residual @ unit, unit)
        left = [row for row, kept in zip(left, free, strict=True) if kept]
    return np.array(picks), np.array(norms)


def random(height, width, seed=0, kind="scaled"):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((height, width), np.float32)
    if kind == "scaled":
        x *= rng.lognormal(size=(height, 1)).astype(np.float32)
    elif kind == "low rank":
        x = (rng.integers(-3, 4, (height, 5)) @ rng.integers(-3, 4, (5, width))).astype(np.float32)
    elif kind == "zero rows":
        x[rng.permutation(height)[: height // 2]] = 0
        x[1::4] = x[::4]  # and some twice
    elif isinstance(kind, float):  # 32 strong directions over a flat floor
        basis = np.linalg.qr(rng.standard_normal((width, width)))[0]
        x = (x * np.where(np.arange(width) < 32, 1, kind) @ basis).astype(np.float32)
    return x


SMALL = (40, 12, 30)  # two rounds and a half
SHARDED = (1024, 96, 150)
LARGE = (700, 256, 300)  # candidates and rows outside, many blocks, all stages, a second round


@pytest.mark.parametrize("form", ops.FORMS)
@pytest.mark.parametrize("kind", ["plain", "scaled", "low rank", "zero rows"])
def test_small_matrices_give_the_picks_of_the_obvious_loop(form, kind):
    height, width, k = SMALL
    for seed in range(4):
        weights = random(height, width, seed, kind)
        found = ops.select_with_norms(weights, k, form=form)
        picks, norms = obvious(weights, k)
        _, classes = np.unique(weights, axis=0, return_inverse=True)  # of equal rows either may be taken
        zero = ~weights[picks].any(1)
        np.testing.assert_array_equal(classes[found.indices][~zero], classes[picks][~zero])
        assert len(set(found.indices.tolist())) == k
        np.testing.assert_allclose(found.norms, norms, rtol=2e-5, atol=1e-12)
        assert found.indices.dtype == jnp.int32 and found.norms.dtype == jnp.float32


@pytest.mark.parametrize("form", ops.FORMS)
@pytest.mark.parametrize("kind", ["plain", "scaled"])
def test_large_matrices_give_the_pivots_of_qr_in_float64(form, kind):
    height, width, k = LARGE
    weights = random(height, width, 1, kind)
    found = ops.select_with_norms(weights, k, form=form)
    picks, left = [], np.arange(height)
    for _ in range(2):
        triangle, order = scipy.linalg.qr(weights[left].astype(np.float64).T, mode="r", pivoting=True)
        np.testing.assert_allclose(
            found.norms[len(picks) : len(picks) + width], np.abs(np.diagonal(triangle))[: k - len(picks)], rtol=1e-5
        )
        picks += left[order[:width]].tolist()
        left = left[order[width:]] if len(picks) >= k else np.setdiff1d(left, left[order[:width]])
    np.testing.assert_array_equal(found.indices, picks[:k])
    assert ops.shortfall(weights, found.indices) < 1e-6


@pytest.mark.parametrize("form", ops.FORMS)
@pytest.mark.parametrize("floor", [0.011, 0.002])
def test_strong_directions_over_a_flat_floor_are_picked_greedily(form, floor):
    for seed in range(3):
        weights = random(768, 192, seed, floor)
        assert ops.shortfall(weights, ops.select(weights, 192, form=form)) < 1e-6


def test_without_its_guard_the_blocked_form_would_lose_the_order(monkeypatch):
    weights = jnp.asarray(random(768, 192, 0, 0.002))
    # Where it matters most: many candidates, many picks per block.
    for name, value in {"_GUARD": 0.0, "_CANDIDATES": 768, "_PICKS": 128}.items():
        monkeypatch.setattr(ops, name, value)
    unguarded = jax.jit(lambda w: ops._select.__wrapped__(w, 192, "blocked"))(weights)
    assert ops.shortfall(weights, unguarded.indices) > 1e-4


# The forms pick the same neurons, which other tests say of smaller matrices.
@pytest.mark.parametrize(
    "form", [pytest.param(f, marks=[] if f == "blocked" else [pytest.mark.slow]) for f in ops.FORMS]
)
def test_every_layer_of_the_pretrained_vit_is_picked_greedily(form, shared_data):
    params = vtjax.load("vit_ti16_augreg").params
    stacked = np.stack([params[f"block_{layer:02d}"]["mlp"]["up"]["kernel"].T for layer in range(12)])
    found = ops.select_layers(stacked, 192, form=form)
    for weights, indices, norms in zip(stacked, *found, strict=True):
        assert ops.shortfall(weights, indices) < 1e-6
        triangle, order = scipy.linalg.qr(weights.astype(np.float64).T, mode="r", pivoting=True)
        np.testing.assert_array_equal(indices, order[:192])
        np.testing.assert_allclose(norms, np.abs(np.diagonal(triangle)), rtol=5e-6)


# Properties of the spec's section 7, of the default form.


def test_fewer_picks_are_the_beginning_of_more_and_all_are_a_permutation():
    height, width, k = SMALL
    weights = random(height, width)
    most = ops.select_with_norms(weights, height)
    assert sorted(most.indices.tolist()) == list(range(height))
    for fewer in (width, k):
        found = ops.select_with_norms(weights, fewer)
        np.testing.assert_array_equal(found.indices, most.indices[:fewer])
        np.testing.assert_array_equal(found.norms, most.norms[:fewer])


def test_a_second_round_is_a_fresh_run_on_the_rows_that_are_left():
    height, width, k = SMALL
    weights = random(height, width)
    both = ops.select_with_norms(weights, k)
    left = np.setdiff1d(np.arange(height), both.indices[:width])
    fresh = ops.select_with_norms(weights[left], k - width)
    np.testing.assert_array_equal(both.indices[width:], left[fresh.indices])
    np.testing.assert_array_equal(both.norms[width:], fresh.norms)
    for norms in np.split(both.norms, [width, 2 * width]):
        assert (np.diff(norms) <= 1e-6 * norms[0]).all()
    assert both.norms[width] > both.norms[width - 1]


def test_scale_signs_rotations_and_the_order_of_rows_change_nothing_but_scales_of_columns_do():
    height, width, k = SMALL
    rng, weights = np.random.default_rng(5), random(height, width, 3)
    expected = np.asarray(ops.select(weights, k))
    rotation = np.linalg.qr(rng.standard_normal((width, width)))[0]
    signs, order = rng.choice([-1, 1], (height, 1)), rng.permutation(height)
    for same in (0.013 * weights, signs * weights, weights @ rotation):
        np.testing.assert_array_equal(ops.select(same.astype(np.float32), k), expected)
    np.testing.assert_array_equal(order[ops.select(weights[order], k)], expected)
    assert (ops.select(weights * np.linspace(0.1, 3, width, dtype=np.float32), k) != expected).any()


@pytest.mark.parametrize("form", ops.FORMS)
@pytest.mark.parametrize("scale", [2.0**84, 2.0**127, 2.0**-100])
def test_squares_that_would_overflow_or_vanish_do_not(form, scale):
    height, width, k = SMALL
    weights = random(height, width)
    weights /= 4 * np.abs(weights).max()
    plain, scaled = (ops.select_with_norms(w, k, form=form) for w in (weights, weights * np.float32(scale)))
    np.testing.assert_array_equal(scaled.indices, plain.indices)
    np.testing.assert_array_equal(scaled.norms, plain.norms * np.float32(scale))


def test_rows_far_below_the_largest_have_an_order_too():
    height, width, _ = SMALL
    weights = random(height, width)
    weights[width:] *= 2.0**-90  # squares relative to the first round vanish
    found = ops.select(weights, height)
    assert set(found[:width].tolist()) == set(range(width))
    np.testing.assert_array_equal(found[width:] - width, ops.select(weights[width:], height - width))


@pytest.mark.parametrize("form", ops.FORMS)
def test_copies_are_taken_only_when_nothing_else_is_left(form):
    rng = np.random.default_rng(2)
    base = random(13, 20, 4)  # fewer independent rows than a round has picks
    weights = np.concatenate([base, -2 * base, 0.5 * base])[order := rng.permutation(39)]
    found = np.asarray(ops.select(weights, 39, form=form))
    # Largest first: those times -2, then times 1, then times 0.5.
    assert [set(part // 13) for part in np.split(order[found], 3)] == [{1}, {0}, {2}]
    assert sorted(found) == list(range(39))


@pytest.mark.parametrize("form", ops.FORMS)
def test_lowest_index_of_exact_ties(form):
    weights = np.concatenate([-np.eye(8), np.eye(8)[::-1], 2 * np.eye(8)]).astype(np.float32)
    np.testing.assert_array_equal(ops.select(weights, 24, form=form), [*range(16, 24), *range(16)])
    np.testing.assert_array_equal(ops.select(np.zeros((6, 4), np.float32), 6, form=form), range(6))


def test_selection_happens_in_float32_and_leaves_its_input_alone():
    height, width, k = SMALL
    weights = random(height, width)
    for dtype in (jnp.bfloat16, np.float64):
        narrow = weights.astype(dtype)
        kept = narrow.copy()
        expected = ops.select(narrow.astype(np.float32), k)
        np.testing.assert_array_equal(ops.select(narrow, np.int64(k)), expected)
        np.testing.assert_array_equal(narrow, kept)


@pytest.mark.parametrize("form", ops.FORMS)
def test_jit_and_layers_give_what_a_loop_over_layers_gives(form):
    height, width, k = SMALL
    stacked = np.stack([random(height, width, seed, kind) for seed, kind in enumerate(("plain", "low rank", "scaled"))])
    expected = [ops.select_with_norms(weights, k, form=form) for weights in stacked]
    indices, norms = (np.stack(part) for part in zip(*expected, strict=True))
    found = jax.jit(functools.partial(ops.select_layers, k=k, form=form))(stacked)
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_allclose(found.norms, norms, rtol=1e-6)


def test_one_program_serves_all_layers_of_a_shape():
    ops._select.clear_cache()
    for seed in range(3):
        ops.select(random(24, 8, seed), 8)
    assert ops._select._cache_size() == 1


@pytest.mark.parametrize("form", ops.FORMS)
def test_every_product_is_at_highest_precision(form):
    def products(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield equation.params["precision"]
            for inner in jaxprs_in_params(equation.params):
                yield from products(inner)

    traced = jax.make_jaxpr(functools.partial(ops.select, k=300, form=form))(jnp.zeros(LARGE[:2]))
    found = list(products(traced.jaxpr))
    assert len(found) >= 1 and set(found) == {(jax.lax.Precision.HIGHEST,) * 2}


@pytest.mark.parametrize("form", ops.FORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_under_jit_what_is_not_finite_shows_in_the_norms(form, bad):
    weights = random(12, 6)
    weights[4, 3] = bad
    found = jax.jit(functools.partial(ops.select_with_norms, k=9, form=form))(weights)
    assert np.isposinf(found.norms).all() and len(set(found.indices.tolist())) == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "K must be a whole number in 1..M = 12, found 0"),
        ({"k": 13}, "K must be a whole number in 1..M = 12, found 13"),
        ({"weights": np.full((12, 6), np.nan, np.float32)}, "weights must be finite in float32, found NaN or infinite"),
        ({"weights": np.full((12, 6), 1e39)}, "weights must be finite in float32"),
        ({"weights": np.ones((12, 6), np.int32)}, r"weights must be floating \[M, N\], found int32 \[12, 6\]"),
        ({"weights": np.ones(12, np.float32)}, r"weights must be floating \[M, N\], found float32 \[12\]"),
        ({"weights": np.ones((12, 0), np.float32)}, r"weights must be floating \[M, N\], found float32 \[12, 0\]"),
        ({"form": "fast"}, "form must be one of deflated, lazy, blocked, found 'fast'"),
    ],
)
def test_bad_input_is_refused_in_one_line(change, message):
    arguments = {"weights": random(12, 6), "k": 4, "form": "blocked", **change}
    with pytest.raises(InputError, match=message) as caught:
        ops.select(**arguments)
    assert "\n" not in str(caught.value)


def test_layers_are_refused_by_their_own_shape():
    with pytest.raises(InputError, match=r"weights must be floating \[L, M, N\], found float32 \[12, 6\]"):
        ops.select_layers(random(12, 6), 4)
    with pytest.raises(InputError, match="K must be a whole number in 1..M = 12, found 13"):
        ops.select_layers(random(12, 6)[None], 13)


def test_scores_of_a_gated_mlp():
    w12 = random(20, 6)
    np.testing.assert_array_equal(ops.scores(w12), np.concatenate([w12[:10], w12[10:]], 1))
    np.testing.assert_array_equal(ops.scores(w12, "gate"), w12[:10])
    np.testing.assert_array_equal(ops.scores(w12, "value"), w12[10:])
    with pytest.raises(InputError, match="mode must be one of concat, gate, value, found 'both'"):
        ops.scores(w12, "both")
    with pytest.raises(InputError, match="w12 must have as many gate as value rows, found 19 rows"):
        ops.scores(w12[:19])
    # Rows as long as a pair: a round has 2 N picks.
    found, (picks, _) = ops.select(ops.scores(w12), 10), obvious(ops.scores(w12), 10)
    np.testing.assert_array_equal(found, picks)


def test_the_certificate_finds_what_is_not_greedy():
    height, width, k = SMALL
    weights = random(height, width)
    good = np.asarray(ops.select(weights, k))
    assert ops.shortfall(weights, good) < 1e-6
    for at in (0, width - 2, width, k - 2):  # in the first round, at its end, where the next one begins, in the last
        swapped = good.copy()
        swapped[[at, at + 1]] = swapped[[at + 1, at]]
        assert ops.shortfall(weights, swapped) > 1e-3
    with pytest.raises(InputError, match="indices must be distinct rows in 0..39"):
        ops.shortfall(weights, np.array([1, 2, 1]))
    with pytest.raises(InputError, match=r"indices must be whole numbers \[K\], found"):
        ops.shortfall(weights, np.array([], int))
    with pytest.raises(InputError, match="weights must be finite"):
        ops.shortfall(weights * np.nan, np.array([0, 1]))
    exhausted = random(height, width, 0, "low rank")
    assert ops.shortfall(exhausted, ops.select(exhausted, height)) < 1e-6


# Eight devices, in a process of their own.


def exchanged(compiled):
    """Entries of the largest array that the devices exchange."""
    kinds = "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter"
    results = re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", compiled.as_text())
    shapes = re.findall(r"\[([\d,]*)\]", " ".join(results))
    return max((int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes), default=0)


def eight():
    """Prints what the sharded programs found and exchanged."""
    height, width, k = SHARDED
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows = jax.device_put(random(height, width, 7), NamedSharding(mesh, P(("data", "tensor"))))
    layers = jnp.stack([random(40, 12, seed) for seed in range(11)])  # 8 do not divide 11
    programs = {form: (ops._select.lower(rows, k, form), rows) for form in ops.FORMS}
    programs["layers"] = (ops._select_layers.lower(layers, 30, "blocked", mesh), layers)
    out = {"devices": jax.device_count()}
    for name, (lowered, weights) in programs.items():
        compiled = lowered.compile()
        indices, norms = compiled(weights)
        out[name] = {"indices": indices.tolist(), "norms": norms.tolist(), "exchanged": exchanged(compiled)}
    print(json.dumps(out))


@pytest.fixture(scope="module")
def child():
    environment = {**os.environ, "XLA_FLAGS": devices.flags(8)}
    command = [sys.executable, "-c", "from tests.ops import test_gram_schmidt; test_gram_schmidt.eight()"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("form", "most"), [("deflated", 1024), ("lazy", 1024), ("blocked", 512 * 96)])
def test_rows_split_over_eight_devices_give_the_same_picks_and_stay_where_they_are(child, form, most):
    height, width, k = SHARDED
    expected, found = ops.select_with_norms(random(height, width, 7), k, form=form), child[form]
    np.testing.assert_array_equal(found["indices"], expected.indices)
    np.testing.assert_allclose(found["norms"], expected.norms, rtol=1e-5)
    assert child["devices"] == 8 and width <= found["exchanged"] <= most  # distances, or candidates


def test_layers_split_over_eight_devices_give_the_same_picks_and_exchange_nothing_else(child):
    expected = ops.select_layers(np.stack([random(40, 12, seed) for seed in range(11)]), 30)
    np.testing.assert_array_equal(child["layers"]["indices"], expected.indices)
    np.testing.assert_allclose(child["layers"]["norms"], expected.norms, rtol=1e-6)
    assert child["layers"]["exchanged"] == 16 * 30


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 5), (520, 270, 300)])
def test_odd_shapes(shape):
    """One row, one column, widths beside the stages' and panels' multiples, more candidates than rows."""
    height, width, k = shape
    weights = random(height, width)
    found = ops.select_with_norms(weights, k)
    assert len(set(found.indices.tolist())) == k and np.isfinite(found.norms).all()
    assert ops.shortfall(weights, found.indices) < 1e-6


def test_among_equals_the_first_is_picked_whatever_their_order_among_the_candidates():
    """Candidates come sorted by distance; of two that are equally far after the first pick the lower index is next."""
    weights = np.zeros((6, 4), np.float32)
    weights[5, 0], weights[4, :2], weights[1, 2], weights[2, 3] = 4, (2, 1), 1, 1
    for form in ops.FORMS:
        assert ops.select(weights, 6, form=form).tolist() == [5, 1, 2, 4, 0, 3], form
