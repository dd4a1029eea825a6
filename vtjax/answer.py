# SPDX-License-Identifier: Apache-2.0
"""Questions about pictures, in words: `answer(model, params, image, "What colour is the shape?")`."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from vtjax.errors import InputError
from vtjax.spec import TextSpec, TiledViTSpec, VLMSpec

if TYPE_CHECKING:
    from vtjax.data.conversation import Template
    from vtjax.data.tokenizer import Tokenizer

ROUND = 16  # prompts are padded to a multiple of it, so that few lengths are compiled


def answer(
    model: Any,
    params: Any,
    image: Any,
    question: Any,
    *,
    new_tokens: int = 16,
    tokenizer: str | Path | None = None,
    template: str | None = None,
) -> str:
    """What the model says to a question about one picture, taking the likeliest token each time.

    Args:
      model, params: a `models.vlm.VLM`.
      image: a path, a PIL image, or uint8 `[H, W, 3]`; made ready as `model.spec.preprocess` says, for a tiled tower on
        the canvas of tiles that suits it best.
      question: a text.
      new_tokens: most tokens of the answer.
      tokenizer, template: how texts are written, as in `TextSpec`, both or none; None = as `model.spec.text` says. A
        folder of Hugging Face says neither: `answer(..., tokenizer=FOLDER, template="vicuna")`.

    Raises:
      InputError: it is not known how texts are written, a question that is no text, another model's tokenizer, an
        image that cannot be read, control tokens in the question, or a prompt that does not fit the context.
    """
    if not isinstance(question, str):
        raise InputError(f"a question must be a text, found {type(question).__name__}")
    spec = _with_text(model.spec, tokenizer, template)
    words = tokenizer_of(spec)
    if words.vocabulary > max(spec.decoder.ids, spec.image_token + 1):
        raise InputError(
            f"the tokenizer must be the model's, whose decoder has {spec.decoder.ids} ids, found one of "
            f"{words.vocabulary}"
        )
    tokens, count = model.generate(params, **inputs(spec, image, question, new_tokens), new_tokens=new_tokens)
    said = [int(token) for token in np.asarray(tokens)[0, : int(count[0])] if int(token) not in spec.decoder.eos]
    return words.decode(said).strip()


class Answers:
    """`answer` of one model: questions come one by one, and its weights go to the device with the first."""

    def __init__(self, model: Any, params: Any):
        self._model, self._params, self._placed = model, params, False

    def __call__(self, image: Any, question: Any, **options: Any) -> str:
        """See `answer`."""
        if not self._placed:
            self._params, self._placed = jax.device_put(self._params), True
        return answer(self._model, self._params, image, question, **options)


def inputs(spec: VLMSpec, image: Any, question: str, new_tokens: int = 1) -> dict[str, np.ndarray]:
    """What `VLM.apply` and `VLM.generate` take of a question about one picture, padded left: `input_ids` and
    `attention_mask`, int32 `[1, N]`, and float32 `images` `[1, H, W, C]`, for a tiled tower `[1, 1, T, H, W, C]` with
    `aspect_ratio`. Arguments and errors as of `answer`."""
    from vtjax.data import conversation, tiles, transforms

    words, ready, template = tokenizer_of(spec), spec.preprocess, template_of(spec)
    turns = [template.about_image(question)]
    options: dict[str, Any] = {"visual_tokens": spec.placeholders, "images": 1}
    options["router"] = spec.router_token if spec.adds_router_token else -1
    made = conversation.encode(turns, words, template, **options)
    length = min(-(-len(made.ids) // ROUND) * ROUND, max(spec.decoder.context - new_tokens + 1, len(made.ids)))
    ids, mask = np.full((1, length), words.pad, np.int32), np.zeros((1, length), np.int32)
    ids[0, length - len(made.ids) :], mask[0, length - len(made.ids) :] = made.ids, 1
    text = {"input_ids": ids, "attention_mask": mask}
    if isinstance(spec.tower, TiledViTSpec):
        canvases = spec.tower.aspect_ratios
        cut = tiles.cut(_pixels(image), spec.image_size, canvases, ready.mean, ready.std, ready.interpolation)
        return {**text, "images": cut.tiles[None, None], "aspect_ratio": np.full((1, 1), cut.aspect_ratio, np.int32)}
    how = ready.crop, ready.interpolation, True, ready.squash
    pixels = transforms.evaluate(_pixels(image), spec.image_size, *how)
    return {**text, "images": transforms.normalise(pixels, ready.mean, ready.std)[None]}


def _with_text(spec: VLMSpec, tokenizer: str | Path | None, template: str | None) -> VLMSpec:
    if tokenizer is None and template is None:
        return spec
    if tokenizer is None or template is None:
        raise InputError(f"tokenizer and template go together, found tokenizer={tokenizer!r}, template={template!r}")
    return spec.edit(text=TextSpec(tokenizer=str(tokenizer), template=template))


def tokenizer_of(spec: VLMSpec) -> Tokenizer:
    """The tokenizer of a spec, in the form that `vtjax.data` takes.

    Raises:
      InputError: the spec names none, or one that is not found.
    """
    if spec.text is None:
        raise InputError(
            "it must be known how texts are written: by VLMSpec.text, by config.model.text.tokenizer of a run, or by "
            "tokenizer= and template= of answer"
        )
    if spec.text.tokenizer == "words":
        from vtjax.data.tokenizer import WordTokenizer

        return WordTokenizer(spec.text.words, spec.text.control)
    return _pretrained(spec.text.tokenizer, spec.image_token)


def template_of(spec: VLMSpec) -> Template:
    """What stands around the turns of a conversation with a model of this spec."""
    from vtjax.data import conversation

    assert spec.text is not None
    return conversation.TEMPLATES[spec.text.template]


@functools.lru_cache(maxsize=4)
def _pretrained(name: str, image: int) -> Tokenizer:
    from vtjax.weights import tokenizer as tokenizers

    return dataclasses.replace(tokenizers.load(name), image=image)


def _pixels(image: Any) -> np.ndarray:
    """uint8 `[H, W, 3]` of a path, a PIL image or an array."""
    if isinstance(image, str | Path):
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(image) as opened:
                return np.asarray(opened.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise InputError(f"image {image} cannot be read: {' '.join(str(error).split())}") from None
    pixels = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise InputError(
            f"an image must be a path, a PIL image or uint8 [H, W, 3], found {pixels.dtype} {pixels.shape}"
        )
    return pixels
