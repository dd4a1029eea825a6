# SPDX-License-Identifier: Apache-2.0
"""Model specs: frozen, JSON-able descriptions from which a model is rebuilt on any machine.

Surgery is always: edit the spec, map `params -> params`, rebuild (design, section 1). A spec is saved beside every
checkpoint as `spec.json` with `format: 1`. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vtjax.errors import InputError
from vtjax.spec import fields
from vtjax.spec.adapter import AdapterSpec, skip_list
from vtjax.spec.base import FORMAT, Lineage, ModelSpec, is_backbone
from vtjax.spec.fields import diff
from vtjax.spec.fusion import FusionSpec
from vtjax.spec.lm import DecoderBlockSpec, LMSpec, LoRASpec, RopeScaling
from vtjax.spec.tiled import TiledViTSpec
from vtjax.spec.vit import BlockSpec, Preprocess, ViTSpec
from vtjax.spec.vlm import BridgeSpec, CrossSpec, TextSpec, VLMSpec

__all__ = [
    "FORMAT",
    "KINDS",
    "AdapterSpec",
    "BlockSpec",
    "BridgeSpec",
    "CrossSpec",
    "DecoderBlockSpec",
    "FusionSpec",
    "LMSpec",
    "Lineage",
    "LoRASpec",
    "ModelSpec",
    "Preprocess",
    "RopeScaling",
    "Spec",
    "TextSpec",
    "TiledViTSpec",
    "VLMSpec",
    "ViTSpec",
    "diff",
    "from_dict",
    "from_json",
    "is_backbone",
    "skip_list",
]

if TYPE_CHECKING:
    # What a file holds shows when it is read: a union would ask every reader of a ViT's weights for a cast.
    Spec = Any
else:
    Spec = ViTSpec | TiledViTSpec | LMSpec | VLMSpec | FusionSpec
"""Any model spec."""

KINDS: dict[str, type] = {cls.__name__: cls for cls in (ViTSpec, TiledViTSpec, LMSpec, VLMSpec, FusionSpec)}


def from_dict(data: Any) -> Spec:
    """Inverse of `to_dict`.

    Raises:
      InputError: unknown format or kind, unknown or missing field, or a field of the wrong type, by dotted name.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"a spec must be a JSON object, found {type(data).__name__}")
    values = dict(data)
    if values.pop("format", None) != FORMAT:
        raise InputError(f"spec format must be {FORMAT}, found {data.get('format')!r}")
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"spec kind must be one of {', '.join(KINDS)}, found {kind!r}")
    return fields.build(KINDS[kind], values, kind)


def from_json(text: str) -> Spec:
    """Spec from JSON text; raises `InputError` as `from_dict`, and where the text is not JSON."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"a spec must be JSON text: {error}") from None
    return from_dict(data)
