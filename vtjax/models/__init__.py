# SPDX-License-Identifier: Apache-2.0
"""Models that read a spec and call ops. Modules return `(y, aux)`: no `sow`, no hooks, no mutable state."""

from __future__ import annotations

from typing import Any

from vtjax.models.fusion import Fusion
from vtjax.models.lm import LM
from vtjax.models.tiled import TiledViT
from vtjax.models.vit import ViT
from vtjax.models.vlm import VLM
from vtjax.spec import FusionSpec, LMSpec, Spec, TiledViTSpec, ViTSpec, VLMSpec

__all__ = ["LM", "VLM", "Fusion", "TiledViT", "ViT", "build"]


def build(spec: Spec, **options: Any) -> Any:
    """The model of a spec; `options` are the model's other fields (`dtype`, `remat`, `scan`, `attention`, ...)."""
    models: dict[type, Any] = {ViTSpec: ViT, TiledViTSpec: TiledViT, LMSpec: LM, VLMSpec: VLM}
    models[FusionSpec] = Fusion
    return models[type(spec)](spec, **options)
