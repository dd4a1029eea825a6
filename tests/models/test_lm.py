# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtjax.errors import InputError
from vtjax.models import build
from vtjax.models.lm import LM, check_mask
from vtjax.ops import decoder_attention
from vtjax.spec import LMSpec
from vtjax.weights import names

SPEC = LMSpec.uniform(depth=2, width=16, heads=4, kv_heads=2, mlp=24, vocab=29, context=40)
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 29, (2, 6)).astype(np.int32)


def random_params(spec):
    """Numbers of a size by which every parameter matters: fresh ones hide mistakes, and take a compilation."""
    rng = np.random.default_rng(7)
    flat = {name: 0.3 * rng.standard_normal(shape).astype(np.float32) for name, shape in names.shapes(spec).items()}
    return names.unflatten({name: a + 1 if name.endswith("scale") else a for name, a in flat.items()})


MODEL, PARAMS = LM(SPEC), random_params(SPEC)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, ids=None, mask=None, **options):
    return model.apply(params, ids, mask, **options)[0]


def test_init_makes_the_tree_that_the_spec_names():
    for spec in (SPEC, SPEC.edit(tied=False, qk_norm="head", qkv_bias=True)):
        params = jax.eval_shape(LM(spec).init, jax.random.key(0))
        assert {n: a.shape for n, a in names.flatten(params)} == names.shapes(spec)


def test_every_switch_builds_and_reaches_the_output():
    edits = {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "qk_norm": "head", "tied": False}
    spec = SPEC.edit(blocks={1: {"attn": False, "ffn": False, "adapter": 3}}, **edits)
    model = build(spec)
    params = random_params(spec)

    def value(p):
        y, aux = model.apply(p, IDS)
        assert y.shape == (2, 6, 29) and y.dtype == jnp.float32 and aux["features"].shape == (2, 6, 16)
        return jnp.square(jax.nn.softmax(y)).sum()

    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(value))(params)):
        assert float(jnp.abs(leaf).max()) > 0, jax.tree_util.keystr(path)


def test_a_later_token_changes_nothing_before_it():
    other = IDS.copy()
    other[:, 4] += 1
    a, b = (np.asarray(logits(MODEL, PARAMS, ids % 29)) for ids in (IDS, other))
    np.testing.assert_array_equal(a[:, :4], b[:, :4])
    assert (np.abs(a[:, 4:] - b[:, 4:]).max((0, 2)) > 1e-3).all()


def test_padding_on_either_side_changes_nothing():
    whole = logits(MODEL, PARAMS, IDS)
    for side in ((3, 0), (0, 3), (1, 2)):
        padded = np.pad(IDS, ((0, 0), side), constant_values=5)
        mask = np.pad(np.ones_like(IDS), ((0, 0), side))
        y = logits(MODEL, PARAMS, padded, mask)
        assert np.isfinite(y).all()
        np.testing.assert_allclose(y[:, side[0] : side[0] + 6], whole, atol=2e-5)


def test_embeddings_and_positions_take_the_place_of_ids():
    whole = logits(MODEL, PARAMS, IDS)
    x = MODEL.embed(PARAMS, IDS)
    shifted = np.broadcast_to(np.arange(6, dtype=np.int32) + 11, IDS.shape)
    np.testing.assert_allclose(logits(MODEL, PARAMS, embeddings=x, positions=shifted), whole, atol=3e-5)
    spread = shifted * 2
    assert np.abs(np.asarray(logits(MODEL, PARAMS, IDS, positions=spread)) - whole).max() > 1e-2


def test_packed_texts_are_read_as_if_alone():
    prefix, first, second = IDS[:1, :2], IDS[:1, 2:6], IDS[1:, :3]
    row = np.concatenate([prefix, first, second, [[5]]], 1)
    segments = np.array([[0] * 2 + [1] * 4 + [2] * 3 + [-1]], np.int32)
    positions = np.array([[0, 1, 2, 3, 4, 5, 2, 3, 4, 0]], np.int32)
    y = logits(MODEL, PARAMS, row, positions=positions, segments=segments)
    for text, at in ((first, slice(2, 6)), (second, slice(6, 9))):
        alone = logits(MODEL, PARAMS, np.concatenate([prefix, text], 1))
        np.testing.assert_allclose(y[:, at], alone[:, 2:], atol=2e-5)
    assert np.isfinite(y).all()
    with pytest.raises(InputError, match="segments need positions"):
        MODEL.apply(PARAMS, row, segments=segments)


def test_scan_and_remat_change_nothing_but_memory():
    def value(m, p):
        return jnp.square(m.apply(p, IDS)[0]).mean()

    other = dataclasses.replace(MODEL, remat="full", scan=True)
    a, ga = jax.jit(jax.value_and_grad(lambda p: value(MODEL, p)))(PARAMS)
    b, gb = jax.jit(jax.value_and_grad(lambda p: value(other, p)))(PARAMS)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-3), ga, gb)
    text = str(jax.make_jaxpr(lambda p: value(other, p))(PARAMS))
    assert text.count("scan[") == 1 and "length=2" in text


def test_blocks_of_scores_change_nothing(monkeypatch):
    monkeypatch.setattr(decoder_attention, "BLOCK", 2)
    y = logits(dataclasses.replace(MODEL, attention="blocks"), PARAMS, IDS)
    np.testing.assert_allclose(y, logits(dataclasses.replace(MODEL, attention="square"), PARAMS, IDS), atol=2e-5)


def test_removed_blocks_are_the_identity():
    spec = SPEC.edit(blocks={0: {"attn": False, "ffn": False}})
    bare = {k: v for k, v in PARAMS.items() if k != "block_00"}
    shorter = dataclasses.replace(SPEC, blocks=SPEC.blocks[1:])
    renamed = {"block_00" if k == "block_01" else k: v for k, v in bare.items()}
    np.testing.assert_array_equal(logits(LM(spec), bare, IDS), logits(LM(shorter), renamed, IDS))


def test_adapters_act_where_they_say():

    def one(x, knobs):
        return x * knobs["gain"]

    model = LM(SPEC, adapters=((0, "attn_in", one), (0, "mlp", one), (1, "out", one)))
    base, y = (logits(model, PARAMS, IDS, knobs={"gain": np.array(gain)}) for gain in ([1.0, 1.0], [1.0, 0.0]))
    # The last block's result is doubled, or not; what the final norm makes of it is the same.
    np.testing.assert_allclose(base, y, atol=1e-4)
    other = logits(model, PARAMS, IDS, knobs={"gain": np.array([0.5, 0.0])})
    assert np.abs(other - y).max() > 1e-2 and np.abs(y - logits(MODEL, PARAMS, IDS)).max() > 1e-2
    with pytest.raises(InputError, match="'skip' at layer 0 would not act"):
        LM(SPEC, adapters=((0, "skip", one),))


BAD = [
    ({"input_ids": np.array([[3, 29]])}, r"input_ids must be in 0\.\.28 \(the vocabulary\), found 29"),
    ({"input_ids": np.array([[3, -1]])}, "found -1"),
    ({"input_ids": np.array([3, 1])}, r"must be whole numbers \[B, N\], found int64 \[2\]"),
    ({"input_ids": np.ones((1, 2), np.float32)}, "must be whole numbers"),
    ({}, "takes input_ids or embeddings, found both or neither"),
    ({"input_ids": IDS, "attention_mask": np.ones((2, 5), int)}, r"attention_mask must be \[2, 6\].*found \[2, 5\]"),
    ({"input_ids": IDS, "attention_mask": np.full((2, 6), 2)}, "must be 0 or 1, found 2"),
    ({"input_ids": IDS, "attention_mask": np.array([[1] * 6, [0] * 6])}, "found none in row 1"),
    ({"embeddings": np.zeros((1, 2, 15), np.float32)}, r"embeddings must be \[B, N, 16\], found \[1, 2, 15\]"),
]


@pytest.mark.parametrize("given,says", BAD)
def test_bad_input_is_one_line(given, says):
    # Not by `apply`, whose annotations the tests check before it looks itself.
    arguments = dict.fromkeys(("input_ids", "attention_mask", "embeddings", "positions")) | given
    with pytest.raises(InputError, match=says) as error:
        MODEL.enter(PARAMS, **arguments)
    assert "\n" not in str(error.value)


def test_logits_of_wanted_slots_are_those_of_all():
    slots = np.array([[5, 0, 2]] * len(IDS))
    found = jax.jit(lambda p: MODEL.apply(p, IDS, slots=slots)[0])(PARAMS)
    whole = jax.jit(lambda p: MODEL.apply(p, IDS)[0])(PARAMS)
    np.testing.assert_allclose(found, np.asarray(whole)[:, [5, 0, 2]], atol=1e-6)


class WithoutThird:
    """Drops token 2; the others move up."""

    keeps_slots = False

    def __call__(self, tokens, aux, knobs):
        source = jnp.broadcast_to(jnp.asarray([0, 1, -1, 2, 3, 4]), tokens.x.shape[:2])
        return tokens.replace(x=jnp.delete(tokens.x, 2, axis=1), source=source), {}


def test_the_logits_of_a_token_that_is_gone_are_nan_and_stop_no_gradient():
    model, slots = LM(SPEC, reducers=((0, WithoutThird()),)), np.array([[5, 2, 0]] * len(IDS))

    def value(p):
        y, aux = model.apply(p, IDS, slots=slots)
        return jnp.where(jnp.isnan(y), 0.0, jax.nn.log_softmax(y)).sum(), (y, model.logits(p, aux["tokens"].x))

    slope, (found, left) = jax.jit(jax.grad(value, has_aux=True))(PARAMS)
    assert np.isnan(found[:, 1]).all()
    np.testing.assert_allclose(found[:, ::2], np.asarray(left)[:, [4, 0]], atol=1e-6)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))


def test_a_model_that_cannot_run_is_refused():
    with pytest.raises(InputError, match=r"attention_mask must be \[B, N\], found \[6\]"):
        check_mask(np.ones(6, np.int32))
    with pytest.raises(InputError, match="want must be a tuple of queries, keys, values, .*tokens, found 'importance'"):
        MODEL.apply(PARAMS, IDS, want=("importance",))
    with pytest.raises(InputError, match="attention must be one of auto, square, blocks, found 'splash'"):
        LM(SPEC, attention="splash")
    with pytest.raises(InputError, match=r"blocks\[0\].reduce='pool' needs a reducer"):
        LM(SPEC.edit(blocks={0: {"reduce": "pool"}})).apply(PARAMS, IDS)
