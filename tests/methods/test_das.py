# SPDX-License-Identifier: Apache-2.0
"""DAS in a multimodal model: left out while running or for good it says the same, writes the same, trains the same."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vtjax
from vtjax import weights
from vtjax.account import flops
from vtjax.account.walk import walk
from vtjax.errors import InputError
from vtjax.methods import das
from vtjax.models.adapters import STYLES
from vtjax.models.vlm import VLM
from vtjax.spec import BridgeSpec, CrossSpec, LMSpec, ViTSpec, VLMSpec, from_json

TOWER = ViTSpec.uniform(depth=1, width=12, heads=2, mlp=16, image_size=8, patch=4)
TEXT = LMSpec.uniform(depth=3, width=16, heads=2, mlp=24, vocab=29, context=40)
IMAGE, NEW = 29, 3  # no word: it is not said
BASE = VLMSpec(TOWER, BridgeSpec(hidden=20), TEXT, IMAGE)
SMALL = {
    name: dataclasses.replace(style, inner=style.inner.edit(width=4), skip=style.skip.edit(width=8))
    for name, style in STYLES.items()
}
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
PROMPT = np.array([[3, *[IMAGE] * 4, 9, 11], [8, *[IMAGE] * 4, 7, 2]])


def abstract(key, style="llama"):
    return das.install(BASE, VLM(BASE).init(key), SMALL[style], key)[1]


SPEC = das.install(BASE, None, SMALL["llama"], jax.random.key(0))[0]


@pytest.fixture(scope="module")
def params():
    """Parameters at random, also where they start at 0."""
    random = np.random.default_rng(1)
    tree = jax.eval_shape(abstract, jax.random.key(0))
    tree = jax.tree.map(lambda a: 0.3 * random.normal(size=a.shape).astype(np.float32), tree)
    for name, block in tree["decoder"]["das"].items():
        block["skip"]["norm_in"] = tree["decoder"][name]["norm1"]
    return tree


@functools.cache
def masked(scan=False):
    """Compiled: logits of all slots, and the gradient of their squares in the adapters, with some layers left out."""
    model = das.vlm(SPEC, **({"scan": True, "remat": "full"} if scan else {}))

    def loss(own, params, ids, skip):
        whole = {**params, "decoder": {**params["decoder"], "das": own}}
        logits = model.apply(whole, ids, IMAGES, knobs={"skipped": skip})[0]
        return (logits**2).sum(), logits

    return jax.jit(jax.grad(loss, has_aux=True))


def left_out(params, skips, ids, scan=False):
    skip = np.isin(np.arange(3), skips)
    return masked(scan)(params["decoder"]["das"], params, ids, skip)


@functools.cache
def removed(skips):
    """Compiled: the logits of the model without some layers."""
    spec, _ = das.remove(SPEC, None, skips)
    model = das.vlm(spec)
    return jax.jit(lambda params, ids: model.apply(params, ids, IMAGES)[0])


def test_what_is_left_out_is_what_is_removed_in_reading_and_in_writing(params):
    skips = (1,)
    spec, kept = das.remove(SPEC, params, skips)
    tokens, count = das.vlm(spec).generate(kept, PROMPT, IMAGES, new_tokens=NEW)
    assert count.tolist() == [NEW, NEW]
    ids = np.concatenate([PROMPT, np.asarray(tokens)], axis=1)
    gradient, logits = left_out(params, skips, ids)
    np.testing.assert_allclose(logits, removed(skips)(kept, ids), atol=1e-5)
    np.testing.assert_array_equal(logits[:, -NEW - 1 : -1].argmax(-1), tokens)
    # Of what is not taken the gradient is 0; of what is, it is not.
    for name, block in gradient.items():
        for site, own in block.items():
            trained = [a for part, tree in own.items() if part != "norm_in" for a in tree.values()]
            size = max(float(jnp.abs(a).max()) for a in trained)
            assert (size > 0) == ((site == "skip") == (name == "block_01")), (name, site)


@pytest.mark.slow
def test_under_scan_it_is_the_same(params):
    for skips in ((), (0, 2)):
        gradient, logits = left_out(params, skips, PROMPT)
        scanned, again = left_out(params, skips, PROMPT, scan=True)
        np.testing.assert_allclose(again, logits, atol=1e-5)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4), scanned, gradient)
    text = masked(True).lower(params["decoder"]["das"], params, PROMPT, np.zeros(3, bool)).as_text()
    assert text.count("stablehlo.while") >= 1 and masked(True)._cache_size() == 1


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_every_subset_in_every_style(style):
    random = np.random.default_rng(2)
    spec = das.install(BASE, None, SMALL[style], jax.random.key(0))[0]
    tree = jax.eval_shape(functools.partial(abstract, style=style), jax.random.key(0))
    params = jax.tree.map(lambda a: 0.3 * random.normal(size=a.shape).astype(np.float32), tree)
    for name, block in params["decoder"]["das"].items():
        if SMALL[style].normed:
            block["skip"]["norm_in"] = params["decoder"][name]["norm1"]
    model = das.vlm(spec)
    run = jax.jit(lambda params, skip: model.apply(params, PROMPT, IMAGES, knobs={"skipped": skip})[0])
    for m in range(4):
        for skips in itertools.combinations(range(3), m):
            short, kept = das.remove(spec, params, skips)
            expected = jax.jit(lambda p, short=short: das.vlm(short).apply(p, PROMPT, IMAGES)[0])(kept)
            np.testing.assert_allclose(run(params, np.isin(np.arange(3), skips)), expected, atol=1e-5)
    assert run._cache_size() == 1


def test_what_is_removed_has_no_parameters_no_cache_and_no_work(params):
    spec, kept = das.remove(SPEC, params, [2, 0])
    assert das.remove(SPEC, None, "[0, 2]")[0] == spec
    assert [b.attn or b.ffn for b in spec.blocks] == [False, True, False]
    assert {name: set(own) for name, own in kept["decoder"]["das"].items()} == {
        "block_00": {"skip"}, "block_01": {"attn_in"}, "block_02": {"skip"},
    }  # fmt: skip
    assert not {"block_00", "block_02"} & kept["decoder"].keys()
    model, decoder = das.vlm(spec).lm, kept["decoder"]
    keys = jax.eval_shape(lambda p: dict(model.prefill(p, PROMPT % 29, room=2)[1].keys), decoder)
    assert set(keys) == {"block_01"}
    step = spec.decoder.lineage[-1]
    assert (step.operation, step.arguments) == ("das.remove", '{"skips": [0, 2]}')
    again = from_json(spec.to_json())
    assert again == spec and das.installed(again.decoder) == (SMALL["llama"], False)
    # Work and parameters, by formula and as they are.
    n = PROMPT.shape[1]
    count, work = das.adapter_cost(spec.decoder, n)
    found = walk(lambda p: model.prefill(p, PROMPT % 29, room=0)[0], decoder)
    assert found.macs == len(PROMPT) * (flops.macs(spec.decoder, n) + work)
    own = jax.tree_util.tree_leaves_with_path(decoder["das"])
    assert count == sum(a.size for path, a in own if "norm_in" not in jax.tree_util.keystr(path))
    assert count == 2 * (2 * 16 * 8 + 8 + 16) + 2 * 16 * 4 + 4 + 16


@pytest.mark.slow
def test_untrained_adapters_change_nothing():
    """Up-projections start at 0: the whole model is the one that it was put into, and a layer that does nothing may be
    left out."""
    key = jax.random.key(3)

    @jax.jit
    def run(key, skip):
        bare = VLM(BASE).init(key)
        idle = bare["decoder"]["block_01"]
        for part, name in (("attn", "out"), ("mlp", "down")):
            idle[part][name]["kernel"] = jnp.zeros_like(idle[part][name]["kernel"])
        _, params = das.install(BASE, bare, SMALL["llama"], key)
        plain = VLM(BASE).apply(bare, PROMPT, IMAGES)[0]
        return plain, das.vlm(SPEC).apply(params, PROMPT, IMAGES, knobs={"skipped": skip})[0]

    for skip, same in ((np.zeros(3, bool), True), (np.arange(3) == 1, True), (np.arange(3) == 2, False)):
        plain, found = run(key, skip)
        assert np.allclose(plain, found, atol=1e-6) == same


def test_it_is_loaded_as_it_was_saved(params, tmp_path):
    spec, kept = das.remove(SPEC, params, [1])
    weights.save(tmp_path / "short.safetensors", spec, kept)
    m = vtjax.load(tmp_path / "short.safetensors")
    assert m.spec == spec
    loaded = jax.jit(lambda p: m.apply(p, PROMPT, IMAGES)[0])(m.params)
    expected = jax.jit(lambda p: das.vlm(spec).apply(p, PROMPT, IMAGES)[0])(kept)
    np.testing.assert_array_equal(loaded, expected)


def test_greedy_takes_the_next_cheapest_one_beside_those_that_are_gone():
    cost = np.array([0.3, 0.1, 0.2, 0.1])
    seen = []

    def loss(skip):
        seen.append(skip.copy())
        return float(cost[skip].sum() + 5 * (skip[1] and skip[3]))  # each alone is cheap, both are not

    assert das.greedy(loss, 4, 2) == (1, 2)
    assert len(seen) == 4 + 3 and das.greedy(loss, 4, 0) == ()


def test_greedy_takes_nothing_without_which_the_loss_is_no_number():
    assert das.greedy(lambda skip: float("nan") if skip[0] else float(skip[2]), 3, 2) == (1, 2)
    with pytest.raises(InputError, match=r"needs losses that are numbers, found NaN without any of the arms \[0, 2\]"):
        das.greedy(lambda skip: 0.0 if skip.tolist() == [False, True, False] else float("nan"), 3, 2)


CROSSING = dataclasses.replace(BASE, image_token=5, bridge=BridgeSpec("none", cross=CrossSpec.flamingo((0,), 16, 2, 6)))


def test_layers_that_read_images_or_pool_them_are_no_arms():
    pooling = CROSSING.edit(decoder=TEXT.edit(blocks={1: {"reduce": "dpn:stage=0"}}))
    assert das.arms(BASE) == (0, 1, 2) and das.arms(CROSSING) == (1, 2) and das.arms(pooling) == (2,)
    spec, _ = das.install(pooling, None, SMALL["llama"], None)
    own = das.attached(spec.decoder)
    assert [layer for layer, site, _ in own if site == "instead"] == [2]
    assert [layer for layer, site, _ in own if site == "attn_in"] == [0, 1, 2]
    with pytest.raises(InputError, match=r"skips must be among the layers that may be left out, \(2,\), found 1"):
        das.remove(spec, None, [1])
    short, _ = das.remove(spec, None, [2])
    assert das.arms(short) == (2,) and short.decoder.blocks[1].reduce == "dpn:stage=0"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (das.remove(SPEC, None, [1])[0], "needs all layers whole and without reducers, found attn=False"),
        (
            SPEC.edit(decoder=SPEC.decoder.edit(blocks={0: {"reduce": "dpn:stage=0"}})),
            "reduce='dpn:stage=0' at layer 0",
        ),
        (BASE.edit(bridge=BridgeSpec("none", cross=CrossSpec.flamingo((0, 1, 2), 16, 2, 6)), image_token=5), "none"),
    ],
)
def test_models_that_cannot_be_searched_are_refused(spec, message):
    with pytest.raises(InputError, match=message):
        das.install(spec, None, SMALL["llama"], jax.random.key(0))


def test_a_style_may_be_named():
    spec, _ = das.install(BASE, None, "llama", None)
    assert das.installed(spec.decoder) == (STYLES["llama"], True)
    with pytest.raises(InputError, match="style must be one of vilt, lavin, llama, llava, found 'lama'"):
        das.install(BASE, None, "lama", None)


def test_a_model_is_shortened_once():
    """Its kept layers have lost what would stand in for them."""
    with pytest.raises(InputError, match=r"was shortened by \[1\] has no adapters to stand in .*, found \[2\] more"):
        das.remove(das.remove(SPEC, None, [1])[0], None, [2])


@pytest.mark.parametrize(
    ("skips", "message"),
    [
        ([0, 3], "skips must be in 0..2, found 3"),
        ([-1], "skips must be in 0..2, found -1"),
        ([1, 1], "found 1 twice"),
        ([0.5], "must hold whole numbers, found 0.5"),
        ("all", "must be a list of modules, found 'all'"),
    ],
)
def test_lists_that_are_none_are_one_line(skips, message):
    with pytest.raises(InputError, match=message) as caught:
        das.remove(SPEC, None, skips)
    assert "\n" not in str(caught.value)


def routed():
    """A model with routers and without its middle layer, and random parameters whose routers decide clearly."""
    random = np.random.default_rng(4)
    spec = das.install(BASE, None, SMALL["lavin"], jax.random.key(0))[0]
    shapes = jax.eval_shape(functools.partial(abstract, style="lavin"), jax.random.key(0))
    params = jax.tree.map(lambda a: 0.3 * random.normal(size=a.shape).astype(np.float32), shapes)
    for name, block in params["decoder"]["das"].items():
        block["skip"]["norm_in"] = params["decoder"][name]["norm1"]
        for own in block.values():
            own["route"] = jax.tree.map(lambda a: 40 * a, own["route"])
    spec, params = das.remove(spec, params, [1])
    return das.vlm(spec), jax.tree.map(jnp.asarray, params)


@pytest.mark.slow
def test_a_router_writes_by_what_it_decided_at_the_prompt():
    """As if every text were read again from its first token on, on whichever side it is padded."""
    model, params = routed()
    prompts = [PROMPT[0], PROMPT[1][:-1]]
    left, right = (np.array([PROMPT[0], row]) for row in (np.r_[0, prompts[1]], np.r_[prompts[1], 0]))
    masks = [np.array([[1] * 7, row]) for row in ([0] + [1] * 6, [1] * 6 + [0])]
    padded = zip((left, right), masks, strict=True)
    written = [model.generate(params, ids, IMAGES, mask, new_tokens=NEW)[0] for ids, mask in padded]
    read = jax.jit(lambda p, ids, image: model.apply(p, ids, image)[0][:, -1])
    for row, text in enumerate(prompts):
        for place in range(NEW):
            token = int(read(params, text[None], IMAGES[row : row + 1]).argmax())
            assert [int(tokens[row, place]) for tokens in written] == [token, token]
            text = np.append(text, token)
    # The routers have their say.
    _, cache = model.lm.prefill(params["decoder"], PROMPT[:, -2:], room=1)
    route = cache.routes["attn_in_route"]
    assert route.shape == (3, 2, 2) and np.abs(route[0] - 0.5).max() > 0.1


def test_a_router_does_not_decode_without_the_prompts_weights():
    model, params = routed()

    def forgetful(params):
        _, cache = model.lm.prefill(params, PROMPT[:, -2:], room=1)
        assert set(cache.routes) == {"attn_in_route", "skip_route"}
        return model.lm.step(params, jnp.zeros(2, jnp.int32), dataclasses.replace(cache, routes={}))

    with pytest.raises(InputError, match="decoding needs attn_in_route"):
        jax.eval_shape(forgetful, params["decoder"])
