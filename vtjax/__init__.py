# SPDX-License-Identifier: Apache-2.0
"""vtjax: vision transformers and multimodal LLMs made cheaper, five ways.

import vtjax
m = vtjax.load("vit_ti16_augreg")     # a name, a workdir, a weights file, a timm or Hugging Face folder
y, aux = m.apply(m.params, images)    # images [B,H,W,3] float32, normalised as m.spec.preprocess says

m = vtjax.load("smollm2_135m")        # a language model: a name, a GGUF file, a Hugging Face folder, ...
logits, aux = m.apply(m.params, input_ids, attention_mask)
tokens, count = m.generate(m.params, input_ids, attention_mask, new_tokens=20)

m = vtjax.load("runs/easyvqa")        # a multimodal model: a workdir, a vtjax file, a Hugging Face folder
m.answer("shapes.png", "What colour is the circle?")
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtjax.spec import Spec

__version__ = "0.1.0"
__all__ = ["Model", "__version__", "load"]


def _absent(*args: Any, **options: Any) -> Any:
    from vtjax.errors import InputError

    raise InputError(
        "generate needs a language model, and answer a multimodal one with its tokenizer, found a model of another kind"
    )


@dataclasses.dataclass(frozen=True)
class Model:
    """What `load` returns.

    Attributes:
      spec: the architecture.
      params: nested dict of float32 arrays.
      apply: not jitted. Of a ViT: `apply(params, images, knobs=None, want=()) -> (y, aux)`, see
        `vtjax.models.vit.ViT.apply`; of a tiled one with `aspect_ratio`, see `vtjax.models.tiled.TiledViT.apply`. Of a
        language model: `apply(params, input_ids, attention_mask=None) -> (logits, aux)`, see
        `vtjax.models.lm.LM.apply`. Of a multimodal one: `apply(params, input_ids, images, attention_mask=None)`, see
        `vtjax.models.vlm.VLM.apply`.
      answer: of a multimodal model: `answer(image, question) -> str`, see `vtjax.answer.answer`. Others refuse.
      generate: of a language model: `generate(params, input_ids, attention_mask=None, new_tokens=...) -> (tokens,
        count)`, see `vtjax.models.generate.generate`; of a multimodal one with the images after the ids.
        Jitted. Others refuse.
    """

    spec: Spec
    params: dict[str, Any]
    apply: Callable[..., tuple[Any, dict[str, Any]]]
    generate: Callable[..., tuple[Any, Any]] = _absent
    answer: Callable[..., str] = _absent


def load(path_or_name: str | Path, *, spec: Spec | None = None, which: str = "last", **options: Any) -> Model:
    """Loads a model with its weights.

    Args:
      path_or_name: a workdir of `vtjax run`, a safetensors or GGUF file, a timm or Hugging Face folder, or a registered
        name (looked for along `VTJAX_DATA`, in the installed package that holds it, then on the hub where the `[hub]`
        extra is installed).
      spec: needed for a bare file of timm or Hugging Face names only.
      which: "last" or "best" checkpoint of a workdir.
      **options: passed to the model, e.g. `dtype=jnp.bfloat16`, `attention="xla"`.

    Raises:
      InputError: nothing found, an unreadable file, or names that are missing, extra or mis-shaped.
    """
    from vtjax import paths
    from vtjax.answer import Answers
    from vtjax.methods import build
    from vtjax.models.generate import generate
    from vtjax.models.lm import LM
    from vtjax.models.vlm import VLM

    if paths.is_workdir(path_or_name):
        from vtjax.train import checkpoint

        spec, params = checkpoint.load_params(path_or_name, which=which)
    else:
        from vtjax import weights

        spec, params = weights.load(path_or_name, spec=spec)
    model = build(spec, **options)
    if isinstance(model, VLM):
        answers = Answers(model, params)
        return Model(spec=spec, params=params, apply=model.apply, generate=model.generate, answer=answers)
    writes = functools.partial(generate, model) if isinstance(model, LM) else _absent
    return Model(spec=spec, params=params, apply=model.apply, generate=writes)
