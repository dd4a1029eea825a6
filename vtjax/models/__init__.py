# SPDX-License-Identifier: Apache-2.0
"""Models that read a spec and call ops. Modules return `(y, aux)`: no `sow`, no hooks, no mutable state."""

from __future__ import annotations

from typing import Any

from vtjax.models.vit import ViT
from vtjax.spec import Spec, ViTSpec

__all__ = ["ViT", "build"]


def build(spec: Spec, **options: Any) -> ViT:
    """The model of a spec; `options` are the model's other fields (`dtype`, `remat`, `scan`, `attention`, ...)."""
    models = {ViTSpec: ViT}
    return models[type(spec)](spec, **options)
