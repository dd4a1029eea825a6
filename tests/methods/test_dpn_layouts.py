# SPDX-License-Identifier: Apache-2.0
"""DPN's layouts, the lattice and the packed one, against the oracle that computes all experts: values and gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.dpn_compute_all import compute_all
from vtjax.errors import InputError
from vtjax.methods import dpn, dpn_packed
from vtjax.models.vlm import VLM
from vtjax.spec import BridgeSpec, CrossSpec, LMSpec, ViTSpec, VLMSpec

AT, DEPTH, N = (1, 2, 3), 5, 64
TOWER = ViTSpec.uniform(depth=1, width=12, heads=2, mlp=16, image_size=16, patch=2)
TEXT = LMSpec.uniform(width=16, heads=4, kv_heads=2, mlp=24, vocab=29, context=120, depth=DEPTH)
BASE = VLMSpec(TOWER, BridgeSpec(hidden=20), TEXT, 5)
SPEC, _ = dpn.install(BASE, None, jax.random.key(0), at=AT, least=2)
PATHS = jnp.asarray(list(itertools.product(range(3), repeat=3)), jnp.int32)
LAST = 4  # logits compared: of the last ones of every text


def drawn(spec):
    """Parameters with routers that differ between samples."""
    params = jax.jit(dpn.vlm(spec).init)(jax.random.key(1))
    params = dpn.added(spec, params, jax.random.key(2))
    sharp = jax.tree.map(lambda a: 5 * a if a.ndim == 2 else a, params["decoder"]["dpn"])
    return {**params, "decoder": {**params["decoder"], "dpn": sharp}}


def questions(count):
    """Texts of one image each, of different lengths, padded left or right."""
    rng = np.random.default_rng(0)
    ids, mask = np.full((count, N + 9), 7, np.int32), np.zeros((count, N + 9), np.int32)
    for row in range(count):
        before, after = rng.integers(0, 4), rng.integers(4, 6)
        text = [*rng.integers(6, 29, before), *[5] * N, *rng.integers(6, 29, after - 2), SPEC.router_token, 8]
        at = 0 if row % 3 else ids.shape[1] - len(text)
        ids[row, at : at + len(text)], mask[row, at : at + len(text)] = text, 1
    return ids, mask, rng.normal(size=(count, 16, 16, 3)).astype(np.float32)


def slots_of(mask):
    """The last live slots of every text."""
    return mask.shape[1] - mask[:, ::-1].argmax(1)[:, None] - LAST + np.arange(LAST)


PARAMS = drawn(SPEC)
GIVEN = questions(len(PATHS))
WEIGHT = np.random.default_rng(1).normal(size=(len(PATHS), LAST, 29)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("model", "slope"))
def said(model, params, knobs, slope=True):
    """A sum of the last tokens' logits with (these, decisions, what left the last block), and the slope of the sum."""
    ids, mask, images = GIVEN

    def of(params):
        y, aux = model.apply(params, ids, images, mask, knobs=knobs, slots=slots_of(mask))
        return (y * WEIGHT).sum(), (y, dpn.decisions(aux, SPEC), aux["tokens"].x)

    return jax.value_and_grad(of, has_aux=True)(params) if slope else (of(params), None)


@functools.partial(jax.jit, static_argnames=("gate", "pool"))
def oracle(params, choice, gate, pool):
    def of(params):
        found = compute_all(SPEC, AT, params, GIVEN, choice, gate, pool)
        slots = (GIVEN[1].sum(1) - N + found.left)[:, None] - LAST + np.arange(LAST)
        y = jnp.take_along_axis(found.logits, slots[:, :, None], axis=1)
        return (y * WEIGHT).sum(), (y, found)

    return jax.value_and_grad(of, has_aux=True)(params)


def same(slope, expected):
    for (name, a), b in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(slope), strict=True):
        most = 1e-4 * max(1.0, float(jnp.abs(a).max()))
        np.testing.assert_allclose(b, a, atol=most, err_msg=jax.tree_util.keystr(name))


def agree(model, expected, knobs):
    (_, (y, found)), slope = expected
    (_, (z, made, _)), here = said(model, PARAMS, knobs)
    np.testing.assert_array_equal(made["choice"], found.choice)
    np.testing.assert_allclose(made["p"], found.p, atol=1e-5)
    np.testing.assert_array_equal(made["visual"][:, -1], found.left)
    np.testing.assert_allclose(z, y, atol=2e-5)
    same(here, slope)


@pytest.mark.parametrize(("gate", "pool"), [("prob", "avg"), pytest.param("st", "max", marks=pytest.mark.slow)])
def test_both_layouts_are_the_oracle_on_every_path(gate, pool):
    """All 27 paths in one batch; gradients of all parameters, routers included."""
    expected, knobs = oracle(PARAMS, PATHS, gate, pool), dpn.given(SPEC, PATHS)
    agree(dpn.vlm(SPEC, gate=gate, pool=pool), expected, knobs)
    agree(dpn_packed.vlm(SPEC, gate=gate, pool=pool), expected, knobs)
    routers = expected[1]["decoder"]["dpn"]
    assert all(jnp.abs(routers[f"block_{layer - 1:02d}"]["router"]["score"]["kernel"]).max() > 1e-4 for layer in AT)


@pytest.mark.slow
def test_both_layouts_are_the_oracle_where_routers_decide():
    expected = oracle(PARAMS, None, "prob", "max")
    assert len(np.unique(expected[0][1][1].choice, axis=0)) > 2, "the samples decide alike"
    agree(dpn.vlm(SPEC), expected, {})
    agree(dpn_packed.vlm(SPEC, remat="full"), expected, {})


@pytest.mark.parametrize("slope", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_known_paths_free_slots(slope):
    """The rows of later layers are as short as the longest of the paths leaves them; another path is NaN, not wrong."""
    paths = ((2, 0, 1), (1, 1, 1))
    assert dpn_packed.cuts(SPEC, paths) == (32, 16, 8) and dpn_packed.cuts(SPEC, ()) == (0, 0, 0)
    model, knobs = dpn_packed.vlm(SPEC, paths=paths), dpn.given(SPEC, jnp.asarray(paths)[np.arange(len(PATHS)) % 2])
    (_, (whole, _, _)), expected = said(dpn.vlm(SPEC), PARAMS, knobs, slope)
    (_, (y, _, x)), here = said(model, PARAMS, knobs, slope)
    assert x.shape[1] == N + 9 - 56
    np.testing.assert_allclose(y, whole, atol=2e-5)
    if slope:
        same(here, expected)
    (_, (y, made, _)), _ = said(model, PARAMS, dpn.given(SPEC, PATHS), slope)
    slack = N + 9 - GIVEN[1].sum(1, keepdims=True)  # padding makes room
    lost = (np.asarray(made["visual"]) > np.array([32, 16, 8]) + slack).any(1)
    assert lost.any() and not lost.all()
    np.testing.assert_array_equal(np.isnan(y), np.broadcast_to(lost[:, None, None], y.shape))


@pytest.mark.slow
def test_cells_that_a_tower_pruned():
    """Dead cells of the grid enter no pool in either layout, and a window's first cell may be one of them."""
    ids, mask, images = GIVEN
    dead = (ids == SPEC.image_token) & (np.random.default_rng(5).random(ids.shape) < 0.4)
    knobs = dpn.given(SPEC, PATHS)
    y = [
        jax.jit(lambda p, model=model: model.apply(p, ids, images, mask * ~dead, knobs=knobs, slots=slots_of(mask))[0])
        for model in (dpn.vlm(SPEC, gate="off"), dpn_packed.vlm(SPEC, gate="off"))
    ]
    np.testing.assert_allclose(y[1](PARAMS), y[0](PARAMS), atol=2e-5)


@pytest.mark.slow
def test_several_images_are_pooled_alike_each_on_its_own_grid():
    """Two images of a text: in either layout each becomes what plain pooling makes of it."""
    rng, images = np.random.default_rng(6), GIVEN[2][:4].reshape(2, 2, 16, 16, 3)
    ids = rng.integers(6, 29, (2, 2 * N + 7)).astype(np.int32)
    ids[:, 1 : 1 + N] = ids[:, 3 + N : 3 + 2 * N] = SPEC.image_token
    ids[:, -2], knobs = SPEC.router_token, dpn.given(SPEC, jnp.asarray([[2, 1, 0], [1, 2, 2]]))

    @functools.partial(jax.jit, static_argnums=0)
    def last(model):
        y, aux = model.apply(PARAMS, ids, images, knobs=knobs, want=("tokens",), slots=np.full((2, 1), 2 * N + 6))
        return y, aux["blocks"][0]["tokens"].x, dpn.decisions(aux, SPEC)["visual"] if model.reducers else None

    before = np.asarray(last(VLM(SPEC.unreduced()))[1])
    y, first, visual = last(dpn.vlm(SPEC, gate="off"))
    np.testing.assert_array_equal(visual, [[32, 16, 16], [64, 16, 4]])
    z, packed, _ = last(dpn_packed.vlm(SPEC, gate="off"))
    np.testing.assert_allclose(z, y, atol=2e-5)
    for row, (h, w) in enumerate(((2, 2), (1, 2))):
        cells = [before[row, at : at + N].reshape(8 // h, h, 8 // w, w, -1).max((1, 3)) for at in (1, 3 + N)]
        cells = [made.reshape(-1, before.shape[-1]) for made in cells]
        words = before[row, :1], before[row, 1 + N : 3 + N], before[row, 3 + 2 * N :]
        expected = np.concatenate([words[0], cells[0], words[1], cells[1], words[2]])
        np.testing.assert_allclose(packed[row, : len(expected)], expected, atol=1e-5)


@pytest.mark.slow
def test_generation_over_a_packed_prefill():
    ids, mask, images = (a[:3] for a in GIVEN)
    expected, _ = dpn.vlm(SPEC).generate(PARAMS, ids, images, mask, new_tokens=4)
    found, _ = dpn_packed.vlm(SPEC).generate(PARAMS, ids, images, mask, new_tokens=4)
    np.testing.assert_array_equal(found, expected)


def test_the_packed_layout_refuses_what_it_has_not():
    made, _ = dpn.install(
        VLMSpec(TOWER, BridgeSpec("mlp", hidden=20, cross=CrossSpec.flamingo((0, 2, 4), 16, 2, 6)), TEXT, 5),
        None, jax.random.key(0), at=AT,
    )  # fmt: skip
    with pytest.raises(InputError, match="visual tokens in the text, found a bridge of cross-attention"):
        dpn_packed.vlm(made)
    with pytest.raises(InputError, match=r"an expert for each of 3 stages, found \(1, 1\)"):
        dpn_packed.vlm(SPEC, paths=((1, 1, 1), (1, 1)))
