# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtjax.data.conversation import LLAMA3, PLAIN, SMOLLM2, TEMPLATES, VICUNA, Encoded, Template, Turn, encode
from vtjax.data.tokenizer import CONTROL, Tokenizer, WordTokenizer, split
from vtjax.errors import InputError
from vtjax.spec import vlm
from vtjax.weights import tokenizer

WORDS = WordTokenizer.build(["What shape is it?", "how many shapes?", "a circle.", "two"], extra=["<router>"])


class Characters:
    """A stand-in for a BPE tokenizer: one id per character, SmolLM2's control tokens, every text can be written."""

    control = {"<|im_start|>": 256, "<|im_end|>": 257, "<image>": 258}
    vocabulary, pad, image, unknown = 259, 257, 258, -1

    def encode(self, text: str) -> list[int]:
        parts = re.split(r"(<\|im_start\|>|<\|im_end\|>|<image>)", text)
        return [i for p in parts for i in ([self.control[p]] if p in self.control else map(ord, p))]

    def decode(self, ids: Any) -> str:
        names = {number: token for token, number in self.control.items()}
        return "".join(names.get(int(i), chr(int(i))) for i in ids)


CHARACTERS = Characters()


def talk(*texts: str) -> list[Turn]:
    """User and assistant in turn."""
    return [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


def written(turns: list[Turn], **options: Any) -> Encoded:
    asked = {"visual_tokens": 3, "images": sum(t.text.count("<image>") for t in turns), **options}
    return encode(turns, WORDS, PLAIN, **asked)


def one_line(match: str) -> Any:
    return pytest.raises(InputError, match=r"\A[^\n]*" + match)


# --- tokenizer of words


def test_words_and_back() -> None:
    assert split("What's the NEAREST-one?\n") == ["what", "'", "s", "the", "nearest", "-", "one", "?"]
    ids = WORDS.encode("What shape<image>\nis IT?<end>")
    assert WORDS.decode(ids) == "what shape <image> is it ? <end>"
    assert WORDS.encode("what zebra") == [WORDS.encode("what")[0], WORDS.unknown]
    assert isinstance(WORDS, Tokenizer) and isinstance(CHARACTERS, Tokenizer)
    assert [WORDS.control[t] for t in CONTROL if t != "<unk>"] == [0, 2, 3, 4] and WORDS.control["<router>"] == 5


def test_the_vocabulary_is_deterministic_and_saved(tmp_path: Path) -> None:
    texts = ["b a?", "c a", "B"]
    first, second = WordTokenizer.build(texts), WordTokenizer.build(reversed(texts * 2))
    assert first.words == second.words == ("?", "a", "b", "c") and first.vocabulary == len(CONTROL) + 4
    WORDS.save(tmp_path / "tokenizer.json")
    again = WordTokenizer.load(tmp_path / "tokenizer.json")
    assert (again.words, again.extra, again.control) == (WORDS.words, WORDS.extra, WORDS.control)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "must have format 1 and kind 'words', found None and None"),
        ({"format": 2, "kind": "words"}, "must have format 1 and kind 'words', found 2 and 'words'"),
        ({"format": 1, "kind": "words", "control": list(CONTROL), "words": [3]}, "as texts, found others"),
        ({"format": 1, "kind": "words", "control": ["<pad>"], "words": []}, "must begin with <pad>, <unk>"),
        ({"format": 1, "kind": "words", "control": list(CONTROL), "words": ["a", "a"]}, "must differ, found 'a' twice"),
        ({"format": 1, "kind": "words", "control": list(CONTROL), "words": ["A b"]}, "found 'A b'"),
        ({"format": 1, "kind": "words", "control": [*CONTROL, "x"], "words": []}, "written <name>, found 'x'"),
    ],
)
def test_bad_tokenizer_files(content: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    with one_line(re.escape(message)):
        WordTokenizer.load(file)


def test_tokens_outside_the_vocabulary() -> None:
    with one_line("token must be in 0..17, found 18"):
        WORDS.decode([0, 18])
    beyond = Characters()
    beyond.vocabulary = 50
    with one_line("token must be in the vocabulary, 0..49, found"):
        encode(talk("x"), beyond, SMOLLM2, visual_tokens=1, images=0)


# --- templates and labels


def test_the_plain_format() -> None:
    made = written(talk("<image>\nWhat shape is it?", "a circle."))
    assert WORDS.decode(made.ids.tolist()) == ("<image> <image> <image> what shape is it ? <answer> a circle . <end>")
    assert made.images == (0,)
    assert WORDS.decode(made.ids[made.learned].tolist()) == "a circle . <end>"


def test_smollm2_chat() -> None:
    turns = [Turn("system", "Be short."), *talk("<image>\nWhat?", "Red.", "And<image>?", "Blue.")]
    made = encode(turns, CHARACTERS, SMOLLM2, visual_tokens=2, images=2)
    assert CHARACTERS.decode(made.ids) == (
        "<|im_start|>system\nBe short.<|im_end|>\n"
        "<|im_start|>user\n<image><image>\nWhat?<|im_end|>\n<|im_start|>assistant\nRed.<|im_end|>\n"
        "<|im_start|>user\nAnd<image><image>?<|im_end|>\n<|im_start|>assistant\nBlue.<|im_end|>\n"
    )
    assert CHARACTERS.decode(made.ids[made.learned]) == "Red.<|im_end|>Blue.<|im_end|>"
    for start in made.images:
        assert made.ids[start : start + 2].tolist() == [258, 258] and made.ids[start - 1] != 258
    # As the model's own template has it: a default system turn, and the assistant's header where it is to speak.
    prompt = encode(talk("Hi"), CHARACTERS, SMOLLM2, visual_tokens=1, images=0)
    assert CHARACTERS.decode(prompt.ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not prompt.learned.any()


class Headers(Characters):
    """Llama 3's control tokens."""

    control = dict.fromkeys(("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>"))
    control = {token: 256 + number for number, token in enumerate(control)}
    vocabulary, pad, image = 261, 259, 260

    def encode(self, text: str) -> list[int]:
        parts = re.split(r"(<\|\w+\|>|<image>)", text)
        return [i for p in parts for i in ([self.control[p]] if p in self.control else map(ord, p))]


def test_llama3_chat() -> None:
    """As the model's own template has it: no system turn, nothing between the image and the question."""
    made = encode(
        [LLAMA3.about_image("What?"), Turn("assistant", "Red.")], Headers(), LLAMA3, visual_tokens=1, images=1
    )
    assert Headers().decode(made.ids) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<image>What?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nRed.<|eot_id|>"
    )
    assert Headers().decode(made.ids[made.learned]) == "Red.<|eot_id|>"


def test_templates_have_the_names_that_a_spec_may_say() -> None:
    assert tuple(TEMPLATES) == vlm.TEMPLATES
    assert SMOLLM2.system == tokenizer.SYSTEM  # said twice, as neither package may import the other
    assert PLAIN.about_image("what?") == Turn("user", "<image>\nwhat?")


def test_a_router_token_stands_after_every_question() -> None:
    routed = dataclasses.replace(PLAIN, turns={**PLAIN.turns, "user": ("", "<router>")})
    made = encode(talk("<image>what?", "two", "how many?", "two"), WORDS, routed, visual_tokens=1, images=1)
    assert WORDS.decode(made.ids.tolist()) == (
        "<image> what ? <router> <answer> two <end> how many ? <router> <answer> two <end>"
    )


# --- truncation


@pytest.mark.parametrize(
    ("length", "kept", "images"),
    [
        (0, 18, 2),
        (18, 18, 2),
        (16, 16, 2),  # the end of the last answer goes
        (15, 7, 1),  # its question leads to nothing without it
        (11, 7, 1),  # in the second image: it goes whole
        (8, 7, 1),
        (7, 7, 1),
        (6, 6, 1),
    ],
)
def test_truncation_ends_with_an_answer_and_never_cuts_an_image(length: int, kept: int, images: int) -> None:
    # <image> x3 what <answer> two <end> | <image> x3 how many shapes ? <answer> a circle <end>
    #   0-2      3      4      5    6        7-9      10   11    12   13   14    15   16    17
    turns = talk("<image>what", "two", "<image>how many shapes?", "a circle")
    whole, made = written(turns), written(turns, length=length)
    assert (len(made.ids), len(made.images)) == (kept, images)
    np.testing.assert_array_equal(made.ids, whole.ids[:kept])
    np.testing.assert_array_equal(made.learned, whole.learned[:kept])
    assert made.learned[-1]
    assert (made.ids == WORDS.image).sum() == 3 * images


def test_what_cannot_be_cut() -> None:
    with one_line("must reach its answer within 5 tokens, found it at 6"):
        written(talk("<image>what", "two"), length=5)
    with one_line("a prompt must have at most 4 tokens, found 5"):
        written(talk("<image>what"), length=4)


class Prefixed(Characters):
    """As Llama's tokenizer does: what stands between control tokens gets a blank before it."""

    control = {"<s>": 256, "</s>": 257, "<image>": 258}

    def encode(self, text: str) -> list[int]:
        parts = [p for p in re.split(r"(<s>|</s>|<image>)", text) if p]
        return [i for p in parts for i in ([self.control[p]] if p in self.control else map(ord, f" {p}"))]


def test_what_is_not_learned_is_written_as_one_text() -> None:
    """The blanks of Vicuna's template belong to the words around them; one piece at a time there would be more."""
    made = encode(talk("<image>\nwhat?", "two", "why?"), Prefixed(), VICUNA, visual_tokens=2, images=1)
    said = Prefixed().decode(made.ids.tolist())
    assert said == f"<s> {VICUNA.system} USER: <image><image> \nwhat? ASSISTANT: two</s> USER: why? ASSISTANT:"
    assert Prefixed().decode(made.ids[made.learned].tolist()) == " two</s>"


# --- one line for each mistake


@pytest.mark.parametrize(
    ("turns", "options", "message"),
    [
        (talk("<image>what"), {"images": 2}, "must name <image> once per image, expected 2 times, found 1"),
        (talk("what"), {"images": 1}, "expected 1 times, found 0"),
        ([], {}, "found no turns"),
        ([Turn("system", "what")], {}, "found system"),
        (talk("what", "two")[1:], {}, "user and assistant in turn, found assistant"),
        ([*talk("what"), *talk("what")], {}, "found user, user"),
        ([Turn("human", "what")], {}, "must be one of system, user, assistant, found 'human'"),
        (talk("what", ""), {}, "at least one, found ''"),
        (talk("what", "a zebra"), {}, "made of tokens that the tokenizer knows, at least one, found 'a zebra'"),
        (talk("what<end>", "two"), {}, "must not hold control tokens, found '<end>' in that of the user"),
        (talk("what", "two <answer>"), {}, "found '<answer>' in that of the assistant"),
    ],
)
def test_bad_conversations(turns: list[Turn], options: dict, message: str) -> None:
    with one_line(re.escape(message)):
        written(turns, **options)


def test_templates_that_do_not_fit_the_tokenizer() -> None:
    with one_line(r"must know the control tokens that a template says, found no '<\|im_start\|>'"):
        encode(talk("what", "two"), WORDS, SMOLLM2, visual_tokens=1, images=0)
    with one_line("must know what the template says, found unknown tokens in 'zebra'"):
        strange = Template(turns={**PLAIN.turns, "user": ("zebra", "")}, end=PLAIN.end)
        encode(talk("what", "two"), WORDS, strange, visual_tokens=1, images=0)
    loud = Template(turns=PLAIN.turns, end="two two")
    with one_line("the end of a turn must be one token, found 2 for 'two two'"):
        encode(talk("what", "two"), WORDS, loud, visual_tokens=1, images=0)


def test_unknown_words_of_a_question_are_read_on() -> None:
    made = written(talk("what zebra", "two"))
    assert (made.ids == WORDS.unknown).sum() == 1
