# SPDX-License-Identifier: Apache-2.0
"""What the data need of a tokenizer, and the one of words for small decoders trained from scratch.

Unknown words become the id `unknown` in what a user or a question says: a model must read on. In an answer that is to
be learned they are refused (`conversation.encode`), because it could never be said.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from vtjax.errors import InputError

PAD, UNKNOWN, IMAGE, ANSWER, END = CONTROL = ("<pad>", "<unk>", "<image>", "<answer>", "<end>")
FORMAT = 1


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
      vocabulary: number of ids, control tokens included; ids are 0..vocabulary-1.
      control: text -> id of the tokens that steer (end of a turn, image, padding). `encode` recognises them in a text.
      pad: fills rows up; it is never looked at.
      image: stands for one visual token.
      unknown: of what is not in the vocabulary; -1 where every text can be written.
    """

    @property
    def vocabulary(self) -> int: ...

    @property
    def control(self) -> Mapping[str, int]: ...

    @property
    def pad(self) -> int: ...

    @property
    def image(self) -> int: ...

    @property
    def unknown(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class WordTokenizer:
    """One id per lower-case word or punctuation mark; spaces are not kept. Control tokens come first, then the words.

    The order of the words is an API: it is saved beside the run, and a model's embedding has its rows.

    Args:
      words: distinct, as `split` gives them.
      extra: further control tokens (`"<router>"`), which come after `CONTROL`.

    Raises:
      InputError: a word or control token that comes twice, or that a text could not contain.
    """

    def __init__(self, words: Iterable[str], extra: Iterable[str] = ()):
        self.words, self.extra = tuple(words), tuple(extra)
        tokens = (*CONTROL, *self.extra, *self.words)
        for token in self.extra:
            if not re.fullmatch(r"<\w+>", token):
                raise InputError(f"a control token must be written <name>, found {token!r}")
        for word in self.words:
            if split(word) != [word]:
                raise InputError(f"a word of the vocabulary must be one lower-case word or mark, found {word!r}")
        if len(set(tokens)) != len(tokens):
            twice = next(token for token in tokens if tokens.count(token) > 1)
            raise InputError(f"the tokens of a vocabulary must differ, found {twice!r} twice")
        self.vocabulary = len(tokens)
        self._tokens = tokens
        self._ids = {token: number for number, token in enumerate(tokens)}
        self.control: Mapping[str, int] = {
            token: self._ids[token] for token in (*CONTROL, *self.extra) if token != UNKNOWN
        }
        self.pad, self.unknown, self.image = self._ids[PAD], self._ids[UNKNOWN], self._ids[IMAGE]
        self._control = re.compile("(" + "|".join(map(re.escape, self.control)) + ")")

    @classmethod
    def build(cls, texts: Iterable[str], extra: Iterable[str] = ()) -> WordTokenizer:
        """The vocabulary of some texts, by alphabet: the same for the same texts in any order."""
        return cls(sorted({word for text in set(texts) for word in split(text)}), extra)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; control tokens are recognised where they stand as they are written."""
        ids: list[int] = []
        for part in self._control.split(text):
            known = (part,) if part in self.control else split(part)
            ids += [self._ids.get(token, self.unknown) for token in known]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The words, with a space between them.

        Raises:
          InputError: an id outside the vocabulary.
        """
        for number in ids:
            if not 0 <= number < self.vocabulary:
                raise InputError(f"token must be in 0..{self.vocabulary - 1}, found {number}")
        return " ".join(self._tokens[number] for number in ids)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON file, whole or not at all."""
        content = {"format": FORMAT, "kind": "words", "control": [*CONTROL, *self.extra], "words": list(self.words)}
        file = Path(path)
        temporary = file.with_name(f".{file.name}.tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(file)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WordTokenizer:
        """What `save` wrote.

        Raises:
          InputError: no such file, or one of another kind or format.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"tokenizer {os.fspath(path)} cannot be read: {reason}") from None
        form, kind = (content.get("format"), content.get("kind")) if isinstance(content, dict) else (None, None)
        if (form, kind) != (FORMAT, "words"):
            raise InputError(
                f"tokenizer {os.fspath(path)} must have format {FORMAT} and kind 'words', found {form!r} and {kind!r}"
            )
        control, words = content.get("control"), content.get("words")
        texts = [control, words]
        if not all(isinstance(x, list) and all(isinstance(t, str) for t in x) for x in texts):
            raise InputError(f"tokenizer {os.fspath(path)} must list control tokens and words as texts, found others")
        if tuple(control[: len(CONTROL)]) != CONTROL:
            expected = ", ".join(CONTROL)
            raise InputError(f"tokenizer {os.fspath(path)} must begin with {expected}, found {', '.join(control)}")
        return cls(words, control[len(CONTROL) :])


def split(text: str) -> list[str]:
    """Lower-case words and single punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", text.lower())
