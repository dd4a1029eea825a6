# SPDX-License-Identifier: Apache-2.0
"""Pooling experts on the lattice against plain reshapes; routing and its hinge against closed forms (DPN spec)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtjax.ops import pooling_experts as op

GRID, D, BEFORE = (8, 8), 5, 3
PATHS = np.array(list(itertools.product(range(3), repeat=3)))
RNG = np.random.default_rng(0)
PLACE = np.full(BEFORE + 64 + 4, -1)
PLACE[BEFORE : BEFORE + 64] = np.arange(64)


@jax.jit
def _stages_max(x, paths):
    return _stages(x, paths, "max")


def _stages(x, paths, kind, filters=None, valid=None):
    """The result of three stages, which of it is live, and the state."""
    place = jnp.broadcast_to(PLACE, x.shape[:2])
    valid = place >= 0 if valid is None else valid
    halved = jnp.zeros((len(x), 2), jnp.int32)
    for stage in range(3):
        x, valid, halved = op.pool(
            x, valid, place, halved, paths[:, stage], GRID, most=stage, kind=kind, filters=filters
        )
    return x, valid, halved


def plain(grid, expert, kind):
    h, w = op.WINDOWS[expert]
    cells = grid.reshape(grid.shape[0] // h, h, grid.shape[1] // w, w, -1)
    return cells.max((1, 3)) if kind == "max" else cells.mean((1, 3))


@pytest.mark.parametrize("kind", op.POOLS)
def test_every_path_is_that_of_plain_pooling_row_by_row(kind):
    x = RNG.normal(size=(len(PATHS), len(PLACE), D)).astype(np.float32)
    filters = {f"{h}x{w}": jnp.full((h * w, D), 1 / (h * w)) for h, w in op.WINDOWS[1:]}
    y, live, halved = jax.jit(lambda x, p: _stages(x, p, kind, filters))(x, PATHS)
    for row, path in enumerate(PATHS):
        grid = x[row, BEFORE : BEFORE + 64].reshape(*GRID, D)
        for expert in path:
            grid = plain(grid, expert, kind)
        assert (np.asarray(halved[row]) == [3 - np.log2(grid.shape[0]), 3 - np.log2(grid.shape[1])]).all()
        np.testing.assert_allclose(np.asarray(y[row])[np.asarray(live[row])], grid.reshape(-1, D), atol=1e-6)
    np.testing.assert_array_equal(y[:, PLACE < 0], x[:, PLACE < 0])  # text stays
    np.testing.assert_array_equal(y[0], x[0])  # identity three times, bit for bit


@pytest.mark.parametrize("grid", [(4, 16), (16, 4)])
def test_a_grid_need_not_be_square(grid):
    x = RNG.normal(size=(9, 64, D)).astype(np.float32)
    paths, place = jnp.asarray(list(itertools.product(range(3), repeat=2))), jnp.broadcast_to(np.arange(64), (9, 64))

    @jax.jit
    def two(x):
        found = x, place >= 0, jnp.zeros((9, 2), jnp.int32)
        for stage in range(2):
            found = op.pool(*found[:2], place, found[2], paths[:, stage], grid, most=stage)
        return found

    y, live, _ = two(x)
    for row, path in enumerate(paths):
        made = x[row].reshape(*grid, D)
        for expert in path:
            made = plain(made, expert, "max")
        np.testing.assert_array_equal(np.asarray(y[row])[np.asarray(live[row])], made.reshape(-1, D))


def test_scores_that_are_not_finite_are_heard():
    """They reach whatever is multiplied by p, so that the loss is NaN; and JAX's own debug mode names them."""
    router = {"score": {"kernel": jnp.full((D, 3), jnp.inf)}}
    logp = op.scores(jnp.ones((1, D)), router, 10.0)
    assert all(np.isnan(op.gate(logp, jnp.array([0]), kind)).all() for kind in ("prob", "st"))
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        op.scores(jnp.ones((1, D)), router, 10.0)


def test_pools_have_their_properties():
    """Averages keep the mean, maxima lie above, constants stay; an image one block further on gives the same cells."""
    x = RNG.normal(size=(4, len(PLACE), D)).astype(np.float32)
    constant = np.full_like(x, 2.5)
    paths = np.array([[2, 2, 2], [1, 2, 0], [1, 1, 1], [0, 2, 1]])
    most = _stages_max(x, paths)
    mean = jax.jit(lambda x, p: _stages(x, p, "avg"))(x, paths)
    inside = x[:, BEFORE : BEFORE + 64]
    for row in range(4):
        live = np.asarray(most[1][row])
        assert (np.asarray(most[0][row])[live] >= np.asarray(mean[0][row])[live]).all()
        np.testing.assert_allclose(np.asarray(mean[0][row])[live].mean(0), inside[row].mean(0), atol=1e-6)
        assert (np.asarray(_stages_max(constant, paths)[0][row]) == 2.5).all()
    shifted = x.copy()
    shifted[:, BEFORE : BEFORE + 64] = np.roll(inside.reshape(4, 8, 8, D), 2, axis=2).reshape(4, 64, D)
    one = jax.jit(lambda x: op.pool(x, jnp.broadcast_to(PLACE >= 0, x.shape[:2]), jnp.broadcast_to(PLACE, x.shape[:2]),
                                    jnp.zeros((4, 2), jnp.int32), jnp.full(4, 2), GRID, most=0)[:2])  # fmt: skip
    (a, live), (b, _) = one(x), one(shifted)
    cells = [np.asarray(v)[:, np.asarray(live)[0]].reshape(4, 4, 4, D) for v in (a, b)]
    np.testing.assert_array_equal(np.roll(cells[0], 1, axis=2), cells[1])


def test_cells_that_are_gone_enter_no_pool():
    """What LTMP took before is in no maximum and no mean; a window without any cell is gone itself."""
    x = RNG.normal(size=(1, len(PLACE), D)).astype(np.float32)
    valid = (PLACE >= 0) & (RNG.random(len(PLACE)) < 0.5)
    valid[[BEFORE, BEFORE + 1, BEFORE + 8, BEFORE + 9]] = False  # a whole window of 2 x 2
    for kind in ("max", "avg"):
        place = jnp.asarray(PLACE)[None]
        y, live, _ = jax.jit(
            lambda x, v, place=place, kind=kind: op.pool(
                x, v, place, jnp.zeros((1, 2), jnp.int32), jnp.array([2]), GRID, most=0, kind=kind
            )
        )(x, valid[None])
        assert not live[0, BEFORE]
        for row, column in itertools.product(range(0, 8, 2), repeat=2):
            slots = [BEFORE + 8 * (row + i) + column + j for i in (0, 1) for j in (0, 1)]
            cells = [x[0, s] for s in slots if valid[s]]
            assert bool(live[0, slots[0]]) == bool(cells)
            if cells:
                expected = np.max(cells, 0) if kind == "max" else np.mean(cells, 0)
                np.testing.assert_allclose(y[0, slots[0]], expected, atol=1e-6)


def test_draws_keep_the_floor_and_their_frequencies():
    logp = jax.nn.log_softmax(jnp.array([0.5, 1.0, -0.3]))[None]
    counts = jnp.array([64, 20, 3])
    open_ = op.allowed(counts, 8)
    assert open_.tolist() == [[True, True, True], [True, True, False], [True, False, False]]
    draw = jax.jit(jax.vmap(lambda key: op.sample(key, jnp.repeat(logp, 3, 0), open_)))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    for row in range(3):
        p = np.where(open_[row], np.exp(logp[0]), 0)
        expected = 4000 * p / p.sum()
        found = np.bincount(drawn[:, row], minlength=3)
        assert (found[expected == 0] == 0).all()
        used = expected > 0
        assert (((found - expected) ** 2)[used] / expected[used]).sum() < 16  # chi-square, 2 degrees: p of 0.0003
    assert op.likeliest(jnp.log(jnp.array([[0.2, 0.4, 0.4]])), jnp.ones((1, 3), bool)).tolist() == [1]


def test_gates():
    p, choice = jnp.array([[0.2, 0.5, 0.3]]), jnp.array([1])
    np.testing.assert_allclose(op.gate(jnp.log(p), choice, "prob"), [0.5], rtol=1e-6)
    for kind in ("st", "off"):
        assert op.gate(jnp.log(p), choice, kind).tolist() == [1.0]
    slope = jax.grad(lambda p: op.gate(jnp.log(p), choice, "st").sum())(p)
    np.testing.assert_allclose(slope, [[0.0, 2.0, 0.0]], rtol=1e-6)
    # p is 0 in float32 from a difference of about 104 on.
    far = jax.nn.log_softmax(jnp.array([[0.0, -200.0, 0.0]]))
    value, slope = jax.value_and_grad(lambda logp: op.gate(logp, choice, "st").sum())(far)
    assert value == 1.0 and slope.tolist() == [[0.0, 1.0, 0.0]]


def hinge(p, form="argmax_global", tau=1.5, routed=None):
    p = jnp.asarray(p, jnp.float32)
    routed = jnp.ones(p.shape[:2], bool) if routed is None else jnp.asarray(routed)
    return jax.value_and_grad(lambda p: op.route_loss(p, routed, tau, form=form))(p)


def test_the_hinge_in_closed_form():
    identity = np.tile([0.6, 0.3, 0.1], (4, 3, 1))
    value, slope = hinge(identity)
    assert value == 1.5 and (slope == 0).all()  # nothing pulls an identity away
    assert float(hinge(np.tile([0.0, 1.0, 0.0], (4, 3, 1)))[0]) == 0.5
    np.testing.assert_allclose(hinge(np.tile([0.2, 0.2, 0.6], (4, 3, 1)))[0], 1.5 - 2 * 0.6, rtol=1e-6)
    met, slope = hinge(np.tile([0.1, 0.1, 0.8], (4, 3, 1)))
    assert met == 0 and (slope == 0).all()
    value, slope = hinge(np.full((4, 3, 3), 1 / 3), "expected")
    np.testing.assert_allclose(value, 0.5, rtol=1e-6)
    assert np.abs(slope).max() > 0
    # A batch budget: half the samples at 2 x 2 and half at 1 x 2 meet it; a hinge per stage asks of every stage.
    mixed = np.zeros((4, 3, 3))
    mixed[:, :2, 2], mixed[:, 2, 0] = 1, 1
    assert float(hinge(mixed, tau=1.0)[0]) == 0 and float(
        hinge(mixed, "argmax_per_stage", tau=1.0)[0]
    ) == pytest.approx(1 / 3)


def test_a_hinge_per_group_is_at_least_that_of_the_batch():
    """Half the rows at 2 x 2 and half at 1 x 1 meet a hinge of the whole batch; a group of one kind does not."""
    p = np.zeros((4, 3, 3), np.float32)
    p[:2, :, 2], p[2:, :, 0] = 1, 1
    of = jax.jit(lambda p, group, form: op.route_loss(p, jnp.ones((4, 3), bool), 1.0, form=form, group=group),
                 static_argnums=(1, 2))  # fmt: skip
    for form in op.LOSSES:
        assert [float(of(p, group, form)) for group in (0, 4, 2, 1)] == [0, 0, 0.5, 0.5]
    assert float(of(p[[0, 2, 1, 3]], 2, "expected")) == 0
    with pytest.raises(ValueError, match="group must divide the batch of 4, found 3"):
        of(p, 3, "expected")


def test_what_was_not_routed_does_not_count():
    p = np.tile([0.1, 0.1, 0.8], (4, 3, 1))
    p[0] = [0.9, 0.05, 0.05]
    routed = np.ones((4, 3), bool)
    routed[0] = False
    for form in op.LOSSES:
        alone = hinge(p[1:], form, 1.9)[0]
        np.testing.assert_allclose(hinge(p, form, 1.9, routed)[0], alone, rtol=1e-6)
        np.testing.assert_allclose(hinge(p[[2, 0, 3, 1]], form, 1.9, routed[[2, 0, 3, 1]])[0], alone, rtol=1e-6)
        assert float(hinge(p, form, 1.9, np.zeros((4, 3), bool))[0]) == 0
