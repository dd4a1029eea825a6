# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a language model: from the metadata of its GGUF file, or the `tokenizer.json` of its folder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vtjax.errors import InputError, MissingExtraError
from vtjax.weights import gguf, registry

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""What SmolLM2's chat template says where a chat does not begin with a system message."""

_START, _END = "<|im_start|>", "<|im_end|>"
_CONTROL, _USER_DEFINED = 3, 4
_SPLITS = ("smollm", "gpt-2")
"""Ways to cut a text before merging that are rebuilt from GGUF's name for them."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back; what `vtjax.data` takes of a tokenizer (`data.tokenizer.Tokenizer`).

    Attributes:
      backend: the `tokenizers.Tokenizer`.
      pad: the id that fills shorter rows of a batch; masked, so that any would do.
      image: the id of one visual token, which a multimodal model names; -1 = none.
      unknown: -1, as every text can be written.
    """

    backend: Any
    pad: int = 0
    image: int = -1
    unknown: int = -1

    @functools.cached_property
    def vocabulary(self) -> int:
        """Number of ids."""
        return self.backend.get_vocab_size()

    @functools.cached_property
    def control(self) -> Mapping[str, int]:
        """Text -> id of the special tokens."""
        return {token.content: number for number, token in self.backend.get_added_tokens_decoder().items()}

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens written out in the text (`<|im_end|>`) are one id each, none are added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def batch(self, texts: Sequence[str], side: str = "left") -> tuple[np.ndarray, np.ndarray]:
        """`input_ids` and `attention_mask`, int32 `[B, N]`, padded on the given side."""
        if isinstance(texts, str):
            raise InputError(f"a batch must be a list of texts, found one text, {texts!r}")
        rows = [self.encode(text) for text in texts]
        n = max(map(len, rows))
        if not all(rows) or side not in ("left", "right"):
            raise InputError(f"a batch needs texts that are not empty and side left or right, found {side!r}, {texts}")
        ids = np.full((len(rows), n), self.pad, np.int32)
        mask = np.zeros((len(rows), n), np.int32)
        for i, row in enumerate(rows):
            at = slice(n - len(row), n) if side == "left" else slice(len(row))
            ids[i, at], mask[i, at] = row, 1
        return ids, mask

    def decode(self, ids: Sequence[int] | np.ndarray, special: bool = False) -> str:
        """The text of token ids; `special` keeps special tokens."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=not special)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for the assistant's next message, in the form of SmolLM2 and Qwen2 (ChatML).

        Args:
          messages: `{"role": "system" | "user" | "assistant", "content": ...}`; where none of the system is first,
            SmolLM2's own one is put there.

        Raises:
          InputError: a message without role or content, or a vocabulary without the form's two marks.
        """
        missing = [mark for mark in (_START, _END) if self.backend.token_to_id(mark) is None]
        if missing:
            raise InputError(f"a chat needs {_START} and {_END} in the vocabulary, found no {missing[0]}")
        for message in messages:
            if set(message) != {"role", "content"}:
                raise InputError(f"a message must have role and content, found {', '.join(message) or 'neither'}")
            if message["role"] not in (roles := ("system", "user", "assistant")):
                raise InputError(f"the role of a message must be one of {', '.join(roles)}, found {message['role']!r}")
        if not messages or messages[0]["role"] != "system":
            messages = [{"role": "system", "content": SYSTEM}, *messages]
        told = [f"{_START}{message['role']}\n{message['content']}{_END}\n" for message in messages]
        return "".join(told) + f"{_START}assistant\n"


def load(source: str | Path) -> Tokenizer:
    """The tokenizer of a GGUF file, a Hugging Face folder or a named model, as `weights.load` takes them.

    Raises:
      InputError: nothing found, or a tokenizer that cannot be rebuilt, by name.
      MissingExtraError: the tokenizers package is missing.
    """
    try:
        import tokenizers
    except ImportError:
        raise MissingExtraError("tokenizers", "gguf", f"the tokenizer of {source}") from None
    path = registry.resolve(str(source))
    if path.suffix == ".gguf":
        return from_metadata(gguf.File(path).metadata, str(path))
    file = (path if path.is_dir() else path.parent) / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"the tokenizer of {source} must be in a GGUF file or in {file}, found neither")
    try:
        return Tokenizer(tokenizers.Tokenizer.from_file(str(file)))
    except Exception as error:  # the package raises bare exceptions
        raise InputError(f"cannot read {file}: {error}") from None


def from_metadata(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """A byte-level BPE tokenizer from the header of a GGUF file (`gguf.File.metadata`).

    Raises:
      InputError: a key that is missing, or another kind of tokenizer, by name.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    def get(name: str) -> Any:
        if (value := metadata.get(f"tokenizer.ggml.{name}")) is None:
            raise InputError(f"{where} must say tokenizer.ggml.{name}, found no such key")
        return value

    for name, known in (("model", ("gpt2",)), ("pre", _SPLITS)):
        if get(name) not in known:
            raise InputError(
                f"{where}: tokenizer.ggml.{name} must be one of {', '.join(known)}, found {get(name)!r}; use the "
                "tokenizer.json of the model's Hugging Face folder"
            )
    tokens, kinds, merges = get("tokens"), get("token_type"), [tuple(merge.split(" ", 1)) for merge in get("merges")]
    if len(kinds) != len(tokens):
        raise InputError(f"{where}: token_type must have one entry per token, {len(tokens)}, found {len(kinds)}")
    try:
        model = models.BPE({token: i for i, token in enumerate(tokens)}, merges)
    except Exception as error:  # the package raises bare exceptions
        raise InputError(f"{where}: the vocabulary and its merges are damaged: {error}") from None
    backend = tokenizers.Tokenizer(model)
    split: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if get("pre") == "smollm":
        split = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), split])
    backend.pre_tokenizer, backend.decoder = split, decoders.ByteLevel()
    whole = [token for token, kind in zip(tokens, kinds, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in whole])
    return Tokenizer(backend, int(metadata.get("tokenizer.ggml.padding_token_id", 0)))
