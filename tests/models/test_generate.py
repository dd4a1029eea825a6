# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.test_lm import MODEL, PARAMS, SPEC, logits
from vtjax.errors import InputError
from vtjax.models.generate import _generate, generate, restricted
from vtjax.models.lm import LM

RNG = np.random.default_rng(1)
IDS = RNG.integers(0, 29, (3, 7)).astype(np.int32)
KEPT = np.array([7, 3, 5])[:, None]
NEW = 6


LEFT, RIGHT = ((np.arange(7) >= 7 - KEPT).astype(np.int32), (np.arange(7) < KEPT).astype(np.int32))


class Halve:
    """Drops every other slot; the rest is counted anew."""

    def __call__(self, tokens, aux, knobs):
        position = jnp.broadcast_to(jnp.arange(tokens.x.shape[1] // 2), (tokens.x.shape[0], tokens.x.shape[1] // 2))
        return tokens.replace(x=tokens.x[:, 1::2], alive=None, position=position), {"kept": position.shape[1]}


class Kept:
    """What `Halve` leaves of six tokens, and the seventh."""

    def __call__(self, tokens, aux, knobs):
        x = tokens.x[:, jnp.array([1, 3, 5, 6])]
        return tokens.replace(x=x, position=jnp.broadcast_to(jnp.arange(4), (3, 4))), {}


def recomputed(model, params, prompt):
    """Greedy tokens of one unpadded prompt, the whole text anew for each."""
    text = list(prompt)
    for _ in range(NEW):
        ids = np.zeros((1, IDS.shape[1] + NEW), np.int32)
        ids[0, : len(text)] = text
        mask = np.arange(ids.shape[1])[None] < len(text)
        text.append(int(logits(model, params, ids, mask.astype(np.int32))[0, len(text) - 1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
def test_the_cache_gives_what_full_recomputation_gives(mask):
    tokens, count = generate(MODEL, PARAMS, IDS, mask, new_tokens=NEW)
    for row in range(3):
        assert tokens[row].tolist() == recomputed(MODEL, PARAMS, IDS[row][mask[row] > 0])
    assert len({tuple(row) for row in tokens.tolist()}) == 3 and count.tolist() == [NEW] * 3


def test_a_text_ends_at_its_eos():
    free, _ = generate(MODEL, PARAMS, IDS, LEFT, new_tokens=NEW)
    end = int(free[0, 2])
    assert end not in free[0, :2].tolist()
    ending = dataclasses.replace(MODEL, spec=SPEC.edit(eos=(end,)))
    tokens, count = generate(ending, PARAMS, IDS, LEFT, new_tokens=NEW)
    for row in range(3):
        told = free[row].tolist()
        length = told.index(end) + 1 if end in told else NEW
        assert count[row] == length and tokens[row].tolist() == told[:length] + [end] * (NEW - length)
    assert count[0] == 3


def test_a_reducer_between_blocks_shortens_the_caches_after_it():
    """Three blocks, of which the second has no attention and keeps no cache."""
    spec = SPEC.edit(blocks=(*SPEC.blocks, SPEC.blocks[1])).edit(blocks={0: {"reduce": "halve"}, 1: {"attn": False}})
    model, params = LM(spec, reducers=((0, Halve()),)), {**PARAMS, "block_02": PARAMS["block_00"]}
    _, cache = jax.jit(lambda p: model.prefill(p, IDS[:, :6], room=4))(params)
    assert {name: a.shape[2] for name, a in cache.keys.items()} == {"block_00": 10, "block_02": 7}
    assert [s.position.tolist() for s in cache.stretches] == [[6] * 3, [3] * 3]
    # One more token: block 0 sees seven places; the blocks after it see the three that were left, and it as the fourth.
    step, grown = jax.jit(model.step)(params, IDS[:, 6], cache)
    whole = logits(LM(spec, reducers=((0, Kept()),)), params, IDS)
    np.testing.assert_allclose(step, whole[:, -1], atol=2e-5)
    assert [s.position.tolist() for s in grown.stretches] == [[7] * 3, [4] * 3]


def test_a_reducers_decisions_are_returned():
    def decided(params):
        y, aux = LM(SPEC, reducers=((0, Halve()),)).apply(params, IDS[:, :6])
        return y, [block.get("decisions") for block in aux["blocks"]]

    y, decisions = jax.eval_shape(decided, PARAMS)
    assert y.shape == (3, 3, 29) and list(decisions[0]) == ["kept"] and decisions[1] is None


def test_samples_follow_key_and_temperature_and_compile_once():
    prompt = np.repeat(IDS[:1], 3, 0)

    def sampled(seed, temperature):
        options = {"new_tokens": NEW, "key": jax.random.key(seed), "temperature": temperature}
        return generate(MODEL, PARAMS, prompt, np.ones_like(LEFT), **options)[0].tolist()

    greedy = generate(MODEL, PARAMS, prompt, np.ones_like(LEFT), new_tokens=NEW)[0].tolist()
    a = sampled(0, 3.0)
    traces = _generate._cache_size()
    assert a == sampled(0, 3.0) and a != sampled(1, 3.0) and a[0] != a[1]
    assert sampled(5, 1e-4) == greedy and _generate._cache_size() == traces


def test_restricted_keeps_the_likeliest():
    y = jnp.log(jnp.array([[0.5, 0.1, 0.25, 0.15]]))
    kept = [
        np.isfinite(restricted(y, *at))[0].tolist()
        for at in ((2, None), (None, 0.7), (None, 0.5), (None, 1.0), (1, 0.9))
    ]
    assert kept == [[1, 0, 1, 0], [1, 0, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


@pytest.mark.parametrize(
    "arguments,says",
    [
        ({"new_tokens": 0}, "new_tokens must be 1 or more, found 0"),
        ({"new_tokens": 35}, "must fit the model's context of 40, found 7 and 34"),
        ({"new_tokens": 2, "top_k": 30}, r"top_k must be in 1\.\.29, found 30"),
        ({"new_tokens": 2, "temperature": 0.0}, "temperature must be above 0, found 0.0"),
        ({"new_tokens": 2, "top_p": 1.5}, "top_p must be above 0 and at most 1, found 1.5"),
        ({"new_tokens": 2, "attention_mask": np.zeros((3, 7), int)}, "found none in row 0"),
        ({"new_tokens": 2, "input_ids": IDS + 29}, "found 5[0-9]"),
    ],
)
def test_bad_settings_are_one_line(arguments, says):
    with pytest.raises(InputError, match=says):
        generate(MODEL, PARAMS, **{"input_ids": IDS, **arguments})
