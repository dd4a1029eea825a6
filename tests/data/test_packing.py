# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from vtjax.data import packing
from vtjax.data.conversation import PLAIN, SMOLLM2, Encoded, Template, Turn, encode
from vtjax.data.tokenizer import Tokenizer, WordTokenizer
from vtjax.errors import InputError
from vtjax.ops import packing as ops

ASKED = [("what shape is it?", "a circle"), ("how many?", "two"), ("is it red or is it blue?", "red")]
WORDS = WordTokenizer.build([text for pair in ASKED for text in pair])
VISUAL = 4


def conversations(tokenizer: Tokenizer = WORDS, template: Template = PLAIN) -> list[Encoded]:
    turns = [[Turn("user", f"<image>\n{q}"), Turn("assistant", a)] for q, a in ASKED]
    return [encode(t, tokenizer, template, visual_tokens=VISUAL, images=1) for t in turns]


class Reference:
    """Two layers of attention in numpy, float64; visual tokens have features of their own, in the image's order."""

    def __init__(self, vocabulary: int, width: int = 8):
        rng = np.random.default_rng(0)
        self.embed, self.place = rng.normal(size=(vocabulary, width)), rng.normal(size=(64, width))
        self.visual = rng.normal(size=(VISUAL, width))
        self.layers = rng.normal(size=(2, 4, width, width)) / width**0.5

    def losses(self, row: packing.Row, mask: np.ndarray, image: int) -> np.ndarray:
        """Cross entropy of each token times its weight, `[S]`."""
        x = self.embed[row.input_ids].copy()
        places = np.flatnonzero(row.input_ids == image)
        x[places] = self.visual[np.arange(len(places)) % VISUAL]
        x += self.place[row.positions]
        for query, key, value, out in self.layers:
            scores = np.where(mask, (x @ query) @ (x @ key).T, -np.inf)
            share = np.exp(scores - scores.max(-1, keepdims=True))
            x = x + np.tanh((share / share.sum(-1, keepdims=True)) @ (x @ value)) @ out
        logits = x @ self.embed.T
        log = (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )
        return -log[np.arange(len(log)), row.labels] * row.weights


MASK = jax.jit(ops.attention_mask)


def mask_of(row: packing.Row) -> np.ndarray:
    return np.asarray(MASK(row.segments[None]))[0]


def test_packed_equals_unpacked() -> None:
    model, asked = Reference(WORDS.vocabulary), conversations()
    prefix = VISUAL
    together = packing.row(asked, prefix, 48, WORDS.pad)
    packed = model.losses(together, mask_of(together), WORDS.image)
    for number, one in enumerate(asked, 1):
        alone = packing.row([one], prefix, 48, WORDS.pad)
        expected = model.losses(alone, mask_of(alone), WORDS.image)
        here = packed[together.segments == number]
        np.testing.assert_allclose(here, expected[alone.segments == 1], rtol=1e-12)
        assert expected.sum() > 1 and together.weights[together.segments == number].sum() == one.learned.sum()
        # The same tokens in the same order as the conversation itself, under plain causal attention.
        plain, size = packing.row([one], 0, 48, WORDS.pad), len(one.ids)
        np.testing.assert_array_equal(plain.input_ids[:size], one.ids)
        np.testing.assert_array_equal(mask_of(plain)[:size, :size], np.tril(np.ones((size, size), bool)))
        np.testing.assert_allclose(model.losses(plain, mask_of(plain), WORDS.image).sum(), here.sum(), rtol=1e-12)


def test_what_would_break_it_is_seen() -> None:
    model, asked = Reference(WORDS.vocabulary), conversations()
    row = packing.row(asked, VISUAL, 48, WORDS.pad)
    right = model.losses(row, mask_of(row), WORDS.image)
    second = row.segments == 2
    for spoiled, mask in [
        (row, np.tril(np.ones((48, 48), bool))),  # questions see each other
        (row._replace(positions=np.arange(48, dtype=np.int32)), mask_of(row)),  # positions run on
        (row._replace(segments=np.where(second, 1, row.segments).astype(np.int32)), None),
    ]:
        found = model.losses(spoiled, mask_of(spoiled) if mask is None else mask, WORDS.image)
        assert abs(found - right)[second].max() > 1e-3


def test_labels_are_the_next_token_of_the_same_question() -> None:
    row = packing.row(conversations(), VISUAL, 40, WORDS.pad)
    says = [WORDS.decode(row.labels[(row.segments == q) & (row.weights > 0)].tolist()) for q in (1, 2, 3)]
    assert says == ["a circle <end>", "two <end>", "red <end>"]
    heard = [WORDS.decode(row.input_ids[(row.segments == q) & (row.weights > 0)].tolist()) for q in (1, 2, 3)]
    assert heard == ["<answer> a circle", "<answer> two", "<answer> red"]
    assert (row.segments == -1).sum() == 40 - 30 and (row.weights[row.segments < 1] == 0).all()
    assert (row.input_ids[row.segments == -1] == WORDS.pad).all()
    for q in (1, 2, 3):
        positions = row.positions[row.segments == q]
        np.testing.assert_array_equal(positions, VISUAL + np.arange(len(positions)))


def test_a_chat_shares_its_system_turn_and_image() -> None:
    from tests.data.test_conversation import CHARACTERS

    asked = conversations(CHARACTERS, SMOLLM2)
    prefix = asked[0].images[0] + VISUAL
    row = packing.row(asked, prefix, 400, CHARACTERS.pad)
    assert CHARACTERS.decode(row.input_ids[row.segments == 0]).endswith("<|im_start|>user\n" + "<image>" * VISUAL)
    assert CHARACTERS.decode(row.labels[(row.segments == 2) & (row.weights > 0)]) == "two<|im_end|>"


def test_bad_rows() -> None:
    asked = conversations()
    for make, message in [
        (lambda: packing.row([], 0, 8, 0), "at least one conversation"),
        (lambda: packing.row(asked, VISUAL, 29, 0), "at most 29 tokens, found 30"),
        (lambda: packing.row(asked, VISUAL + 1, 40, 0), f"share their first {VISUAL + 1} tokens"),
        (lambda: packing.row(asked[:1], len(asked[0].ids) - 2, 40, 0), "nothing may be learned before token"),
        (lambda: packing.share([9, 30], 4, 2, limit=29), "at most 29 tokens with its image, found 30"),
    ]:
        with pytest.raises(InputError, match=message):
            make()


def test_rows_are_few_and_even() -> None:
    assert [len(p) for p in packing.share([10] * 21, 4, 8)] == [7, 7, 7]
    assert [len(p) for p in packing.share([10] * 9, 4, 8)] in ([4, 5], [5, 4])
    assert [list(p) for p in packing.share([10] * 5, 4, 1)] == [[i] for i in range(5)]
    assert [list(p) for p in packing.share([12, 12, 5, 5], 4, 4, limit=20)] == [[0, 1], [2, 3]]
    assert [list(p) for p in packing.share([12, 12, 5, 5], 4, 4, limit=19)] == [[0], [1, 2], [3]]
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(5, 20, rng.integers(1, 12)).tolist()
        parts = packing.share(lengths, 4, 5, limit=40)
        assert list(itertools.chain(*parts)) == list(range(len(lengths)))  # all, in order
        assert all(packing.size([lengths[i] for i in p], 4) <= 40 and len(p) <= 5 for p in parts)


def test_lengths_are_few_multiples_of_eight_and_enough() -> None:
    lengths = [70, 71, 72, 73, 80, 90, 100, 131]
    assert packing.buckets(lengths, 1) == (136,)
    for count in range(1, 9):
        found = packing.buckets(lengths, count)
        assert len(found) <= count and max(found) >= 131 and all(b % 8 == 0 for b in found)
        assert list(found) == sorted(set(found))
    assert packing.buckets(lengths, 2) == (80, 136)
