# SPDX-License-Identifier: Apache-2.0
"""vtjax: vision transformers and multimodal LLMs made cheaper, five ways.

import vtjax
m = vtjax.load("vit_ti16_augreg")     # a name, a workdir, a weights file, a timm or Hugging Face folder
y, aux = m.apply(m.params, images)    # images [B,H,W,3] float32, normalised as m.spec.preprocess says
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtjax.spec import Spec

__version__ = "0.1.0"
__all__ = ["Model", "__version__", "load"]


@dataclasses.dataclass(frozen=True)
class Model:
    """What `load` returns.

    Attributes:
      spec: the architecture.
      params: nested dict of float32 arrays.
      apply: `apply(params, images, knobs=None, want=()) -> (y, aux)`, see `vtjax.models.vit.ViT.apply`. Not jitted.
    """

    spec: Spec
    params: dict[str, Any]
    apply: Callable[..., tuple[Any, dict[str, Any]]]


def load(path_or_name: str | Path, *, spec: Spec | None = None, which: str = "last", **options: Any) -> Model:
    """Loads a model with its weights.

    Args:
      path_or_name: a workdir of `vtjax run`, a safetensors file, a timm or Hugging Face folder, or a registered name
        (looked for along `VTJAX_DATA`, then on the hub where the `[hub]` extra is installed).
      spec: needed for a bare file of timm or Hugging Face names only.
      which: "last" or "best" checkpoint of a workdir.
      **options: passed to the model, e.g. `dtype=jnp.bfloat16`, `attention="xla"`.

    Raises:
      InputError: nothing found, an unreadable file, or names that are missing, extra or mis-shaped.
    """
    from vtjax import paths
    from vtjax.methods import build

    if paths.is_workdir(path_or_name):
        from vtjax.train import checkpoint

        spec, params = checkpoint.load_params(path_or_name, which=which)
    else:
        from vtjax import weights

        spec, params = weights.load(path_or_name, spec=spec)
    return Model(spec=spec, params=params, apply=build(spec, **options).apply)
