# SPDX-License-Identifier: Apache-2.0
"""Conversations as ids: turns in a template, images as runs of placeholders, and what of it is to be learned.

A turn's text holds `<image>` where an image belongs. The ids hold one placeholder per visual token there, as in Hugging
Face's LLaVA. Only what the assistant says is learned, with the token that ends its turn. Letters: S tokens.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from vtjax.data import tokenizer as words
from vtjax.data.tokenizer import Tokenizer
from vtjax.errors import InputError

IMAGE = "<image>"  # in texts, whatever the tokenizer calls its placeholder
ROLES = ("system", "user", "assistant")


class Turn(NamedTuple):
    """What one side says: `role` is one of `ROLES`."""

    role: str
    text: str


@dataclasses.dataclass(frozen=True)
class Template:
    """What stands around the turns.

    Each piece (before, a stretch of text between images, after) is encoded by itself. So the ids of a question do not
    depend on what stands before it, which packing needs; tokens never reach over the edge of a piece.

    Attributes:
      turns: role -> (before, after).
      end: ends the assistant's turn, before its `after`; it is learned. It must be one token.
      system: what the system says where the conversation does not begin with it; "" = nothing.
      begin: what every conversation begins with.
      after_image: what stands between an image and the question about it (`about_image`).
    """

    turns: Mapping[str, tuple[str, str]]
    end: str
    system: str = ""
    begin: str = ""
    after_image: str = "\n"

    def about_image(self, question: str) -> Turn:
        """The user's turn that asks about one picture."""
        return Turn("user", f"{IMAGE}{self.after_image}{question}")


PLAIN = Template(
    turns={"system": ("", "\n"), "user": ("", ""), "assistant": (words.ANSWER, "")},
    end=words.END,
)
"""For small decoders on `WordTokenizer`: the question, `<answer>`, the answer, `<end>`."""

SMOLLM2 = Template(
    turns={role: (f"<|im_start|>{role}\n", "\n" if role == "assistant" else "<|im_end|>\n") for role in ROLES},
    end="<|im_end|>",
    system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
)
"""The chat template of SmolLM2-Instruct, its default system prompt included."""


VICUNA = Template(
    turns={"system": ("", " "), "user": ("USER: ", " "), "assistant": ("ASSISTANT:", "")},
    end="</s>",
    begin="<s>",
    system="A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
)
"""The conversation of Vicuna v1.1, which LLaVA-1.5 was tuned on."""

LLAMA3 = Template(
    turns={role: (f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>") for role in ("system", "user")}
    | {"assistant": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "")},
    end="<|eot_id|>",
    begin="<|begin_of_text|>",
    after_image="",
)
"""The chat of Llama 3.2 Vision, which has no system turn of its own where there is an image."""

TEMPLATES = {"plain": PLAIN, "smollm2": SMOLLM2, "vicuna": VICUNA, "llama3": LLAMA3}
"""By the names that a spec uses (`vtjax.spec.vlm.TEMPLATES`)."""


class Encoded(NamedTuple):
    """A conversation in ids.

    Attributes:
      ids: tokens, placeholders included.
      learned: True for what the assistant says.
      images: first token of each image; each takes `visual_tokens` of them.
    """

    ids: Int32[np.ndarray, " S"]
    learned: Bool[np.ndarray, " S"]
    images: tuple[int, ...]


def encode(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    template: Template,
    *,
    visual_tokens: int,
    images: int,
    length: int = 0,
    router: int = -1,
) -> Encoded:
    """A conversation in ids. One that ends with the user's turn is a prompt: the assistant's `before` follows, and
    nothing is learned from it.

    What is longer than `length` is cut at the end: to the last learned token that fits, so that neither an image nor a
    question is left that leads to nothing. An image that does not fit whole goes, with all that follows it; the
    result's `images` tell how many are left.

    Args:
      turns: an optional system turn, then user and assistant in turn.
      visual_tokens: placeholders per image.
      images: how many images come with the conversation.
      length: most tokens; 0 = any number. A prompt is never cut.
      router: id of a token that stands at the end of every turn of the user, where there are images (DPN); -1 = none.

    Raises:
      InputError: turns in another order; a number of placeholders other than `images`; control tokens in a text; an
        answer that is empty or holds unknown words; a template that does; a token outside the vocabulary; nothing
        learned, or a prompt, that fits into `length`.
    """
    _check_turns(turns)
    asked = sum(turn.text.count(IMAGE) for turn in turns)
    if asked != images:
        raise InputError(f"a conversation must name {IMAGE} once per image, expected {images} times, found {asked}")
    if template.system and turns[0].role != "system":
        turns = [Turn("system", template.system), *turns]
    ids: list[int] = []
    learned: list[bool] = []
    starts: list[int] = []

    _steering(template.begin, tokenizer)
    waiting = [template.begin]  # what is not learned, up to an image or an answer

    def add(found: list[int], learn: bool = False) -> None:
        ids.extend(found)
        learned.extend([learn] * len(found))

    def written() -> None:
        # As one text: pretrained tokenizers write its pieces otherwise, one by one.
        add(_known("".join(waiting), tokenizer))
        waiting.clear()

    for role, text in turns:
        before, after = template.turns[role]
        _steering(before + after, tokenizer)
        waiting.append(before)
        for number, part in enumerate(text.split(IMAGE)):
            if number:
                written()
                starts.append(len(ids))
                add([tokenizer.image] * visual_tokens)
            said = _said(part, role, tokenizer)
            if role == "assistant":
                written()
                add(said, learn=True)
            else:
                waiting.append(part)
        if role == "user" and router >= 0 and images:
            written()
            add([router])
        if role == "assistant":
            add(_end(template, tokenizer), learn=True)
        waiting.append(after)
    prompt = turns[-1].role == "user"
    if prompt:
        _steering(template.turns["assistant"][0], tokenizer)
        waiting.append(template.turns["assistant"][0])
    written()
    made = Encoded(np.asarray(ids, np.int32), np.asarray(learned, bool), tuple(starts))
    return _cut(made, visual_tokens, length, prompt) if 0 < length < len(ids) else made


def _cut(made: Encoded, visual_tokens: int, length: int, prompt: bool) -> Encoded:
    if prompt:
        raise InputError(f"a prompt must have at most {length} tokens, found {len(made.ids)}")
    split = [start for start in made.images if start < length < start + visual_tokens]
    kept = np.flatnonzero(made.learned[: min([length, *split])])
    if not len(kept):
        first = int(made.learned.argmax()) + 1
        raise InputError(f"a conversation must reach its answer within {length} tokens, found it at {first}")
    stop = int(kept[-1]) + 1
    return Encoded(made.ids[:stop], made.learned[:stop], tuple(s for s in made.images if s < stop))


def _check_turns(turns: Sequence[Turn]) -> None:
    roles = [turn.role for turn in turns]
    for role in roles:
        if role not in ROLES:
            raise InputError(f"the role of a turn must be one of {', '.join(ROLES)}, found {role!r}")
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or spoken != [ROLES[1 + number % 2] for number in range(len(spoken))]:
        raise InputError(
            "a conversation must be an optional system turn, then user and assistant in turn, found "
            f"{', '.join(roles) or 'no turns'}"
        )


def _steering(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of what the template says; control tokens count as such."""
    if unknown := [mark for mark in re.findall(r"<[^<>\s]+>", text) if mark not in tokenizer.control]:
        raise InputError(f"the tokenizer must know the control tokens that a template says, found no {unknown[0]!r}")
    ids = _known(text, tokenizer)
    if tokenizer.unknown in ids:
        raise InputError(f"the tokenizer must know what the template says, found unknown tokens in {text!r}")
    return ids


def _said(text: str, role: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of what a person says, who must not steer."""
    ids = _known(text, tokenizer)
    steering = {number: token for token, number in tokenizer.control.items()}
    found = next((steering[number] for number in ids if number in steering), None)
    if found is not None:
        raise InputError(f"the text of a turn must not hold control tokens, found {found!r} in that of the {role}")
    if role == "assistant" and (not ids or tokenizer.unknown in ids):
        raise InputError(f"an answer must be made of tokens that the tokenizer knows, at least one, found {text!r}")
    return ids


def _end(template: Template, tokenizer: Tokenizer) -> list[int]:
    ids = _steering(template.end, tokenizer)
    if len(ids) != 1:
        raise InputError(f"the end of a turn must be one token, found {len(ids)} for {template.end!r}")
    return ids


def _known(text: str, tokenizer: Tokenizer) -> list[int]:
    ids = tokenizer.encode(text) if text else []
    outside = next((number for number in ids if not 0 <= number < tokenizer.vocabulary), None)
    if outside is not None:
        raise InputError(f"token must be in the vocabulary, 0..{tokenizer.vocabulary - 1}, found {outside}")
    return ids
