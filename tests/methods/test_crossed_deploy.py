# SPDX-License-Identifier: Apache-2.0
"""A cross-attention model without its dropped tokens says what the masked one says, whatever was dropped and pooled."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from vtjax import methods
from vtjax.errors import InputError
from vtjax.methods import crossed_deploy, das, dpn, ltmp
from vtjax.methods.crossed_deploy import Crossed, Rooms
from vtjax.models.adapters import STYLES
from vtjax.ops import cross_attention
from vtjax.spec import BridgeSpec, CrossSpec, LMSpec, ViTSpec, VLMSpec
from vtjax.weights import names

TOWER = ViTSpec.uniform(depth=2, width=12, heads=2, mlp=16, image_size=16, patch=4)
TEXT = LMSpec.uniform(depth=7, width=16, heads=4, kv_heads=2, mlp=24, vocab=29, context=120)
BRIDGE = BridgeSpec("mlp", hidden=20, cross=CrossSpec.hyper((0, 2, 4)))
BASE = VLMSpec(TOWER, BRIDGE, TEXT, 5)
KEY = jax.random.key(0)
LEARNED, STARTS = ltmp.install(TOWER)
GONE = 6


def all_of_them():
    """LTMP in the tower, two stages of DPN, and a layer that DAS took out: spec, and parameters at random."""
    pooled, _ = dpn.install(BASE.edit(tower=LEARNED), None, KEY, at=(2, 4), least=1, gate="st")
    short, _ = das.remove(das.install(pooled, None, STYLES["llama"], None)[0], None, [GONE])
    rng = np.random.default_rng(2)
    flat = {name: 0.3 * rng.normal(size=shape).astype(np.float32) for name, shape in names.shapes(short).items()}
    made = names.unflatten({name: a + (name.endswith("scale")) for name, a in flat.items()})
    thresholds = {"merge_threshold": np.full(2, 0.8, np.float32), "prune_threshold": np.full(2, 0.035, np.float32)}
    made["tower"]["ltmp"] = thresholds
    made["decoder"] = das.added(short.decoder, made["decoder"], KEY)
    return short, jax.tree.map(jnp.asarray, dpn.added(short, made, jax.random.key(1)))


SPEC, PARAMS = all_of_them()
MASKED = methods.build(SPEC)
IMAGES = np.random.default_rng(4).normal(size=(3, 2, 16, 16, 3)).astype(np.float32)
IDS = np.random.default_rng(7).integers(6, 29, (3, 10)).astype(np.int32)
IDS[:, [1, 4]], IDS[:, 7] = 5, SPEC.router_token
MASK = np.ones_like(IDS)
MASK[0, :1] = 0
SLOTS = np.array([[8, 9]] * 3)
ROOMS = crossed_deploy.calibrate(MASKED, PARAMS, IMAGES, spare=0.0)


OWN = dpn.given(SPEC, jnp.full((3, 2), -1))  # routers decide


@functools.partial(jax.jit, static_argnums=0)
def deployed(rooms, images, knobs):
    return Crossed(MASKED, rooms).apply(PARAMS, IDS, images, MASK, slots=SLOTS, knobs=knobs)


@jax.jit
def masked(images, knobs):
    logits, aux = MASKED.apply(PARAMS, IDS, images, MASK, slots=SLOTS, knobs=knobs)
    return logits, dpn.decisions(aux, SPEC), aux["tower"]


def test_tokens_that_are_gone_change_nothing() -> None:
    kept = [layer["decisions"]["kept"] for layer in masked(IMAGES, OWN)[2]]
    assert ROOMS.tower[1] < TOWER.tokens and min(map(float, kept[-1])) < max(map(float, kept[-1])) < 17
    for paths in ([[-1, -1]] * 3, [[2, 2]] * 3, [[2, 1], [0, 2], [1, 0]], [[0, 0]] * 3):
        knobs = dpn.given(SPEC, jnp.asarray(paths))
        logits, decided, _ = masked(IMAGES, knobs)
        found, told = deployed(ROOMS, IMAGES, knobs)
        assert_allclose(found, logits, atol=2e-5)
        np.testing.assert_array_equal(told["choice"], decided["choice"])
        assert not told["overflow"] and told["read"][0] == ROOMS.read[0] < 32
        # The least of the grids that holds the longest row; two images.
        longest = np.asarray(decided["visual"]).max(0)
        for read, visual in zip(np.asarray(told["read"])[1:], longest, strict=True):
            assert read == min(size for size in (2, 4, 8, 16, 32) if size >= visual)


@pytest.mark.slow
def test_an_image_that_is_longer_than_its_room_runs_masked() -> None:
    short = Rooms((ROOMS.tower[0], ROOMS.tower[1] - 2), ROOMS.read)
    found, told = deployed(short, IMAGES, OWN)
    assert told["overflow"] and told["read"].tolist() == [32, 32, 32]
    assert_allclose(found, masked(IMAGES, OWN)[0], atol=2e-5)
    assert not deployed(short, np.zeros_like(IMAGES), OWN)[1]["overflow"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda: Crossed(methods.build(BASE.edit(bridge=BridgeSpec(hidden=20)))), "found visual tokens in the text"),
        (
            lambda: Crossed(methods.build(BASE, attend=lambda *a, **k: cross_attention.attend(*a, **k))),
            "on one device, found attention that is distributed",
        ),
        (
            lambda: Crossed(methods.build(das.install(BASE, None, STYLES["llama"], None)[0])),
            "whose layers are gone (das.remove), found one in a search",
        ),
        (
            lambda: Crossed(methods.build(BASE.edit(tower=ltmp.install(TOWER, form="faithful")[0]))),
            "the consistent form (ltmp.consistent), found the faithful one at block 0",
        ),
        (lambda: Crossed(MASKED, Rooms((4,))), "rooms.tower must be 2 numbers of slots, 2..17, found (4,)"),
        (lambda: Crossed(MASKED, Rooms((4, 18))), "rooms.tower must be 2 numbers of slots, 2..17, found (4, 18)"),
        (lambda: Crossed(MASKED, Rooms((), (8, 4))), "rooms.read must ascend from 1 or more, found (8, 4)"),
    ],
)
def test_what_is_not_defined_is_one_line(change, says) -> None:
    with pytest.raises(InputError) as caught:
        change()
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_model_that_drops_nothing_has_a_form_too() -> None:
    model = methods.build(BASE)
    params = {**PARAMS, "decoder": {**jax.jit(model.lm.init)(KEY), **PARAMS["decoder"]}}
    ids = np.minimum(IDS, 28)  # no router token
    assert crossed_deploy.calibrate(model, params, IMAGES) == Rooms()
    found, told = jax.jit(lambda p: Crossed(model).apply(p, ids, IMAGES))(params)
    assert_allclose(found, jax.jit(lambda p: model.apply(p, ids, IMAGES)[0])(params), atol=2e-5)
    assert told["read"].tolist() == [32] and told["choice"].shape == (3, 0)
