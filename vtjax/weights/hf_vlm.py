# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's LLaVA: `config.json` to `VLMSpec`, its arrays to ours. Facts are those of transformers 5.24.

Its parts are other models of the library, whose names stand behind a prefix that has changed with the releases.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vtjax.errors import InputError, check_choice
from vtjax.spec import BridgeSpec, LMSpec, ViTSpec, VLMSpec
from vtjax.weights import hf, hf_lm, names
from vtjax.weights.names import Params, Shape
from vtjax.weights.tables import TABLES

FAMILIES = ("llava",)

_PREFIXES = {
    "tower": r"(?:model\.)?vision_tower\.",
    "bridge": r"(?:model\.)?multi_modal_projector\.",
    # The head stands beside the decoder, or in it.
    "decoder": r"(?:(?:model\.)?language_model\.(?=model\.|lm_head\.)|model\.language_model\.|(?=lm_head\.))",
}
_PROJECTOR = {
    **{"projector/up/kernel": "linear_1.weight", "projector/up/bias": "linear_1.bias"},
    **{"projector/down/kernel": "linear_2.weight", "projector/down/bias": "linear_2.bias"},
}


class Part(Mapping[str, np.ndarray]):
    """The arrays of one part of a model, by the names that it has alone; read on access."""

    def __init__(self, tensors: Mapping[str, np.ndarray], part: str):
        self._tensors, shapes, pattern = tensors, names.shapes_of(tensors), re.compile(_PREFIXES[part])
        found = {name: match for name in shapes if (match := pattern.match(name))}
        self.given = {name[match.end() :]: name for name, match in found.items()}
        self.shapes: Mapping[str, Shape] = {own: tuple(shapes[name]) for own, name in self.given.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[self.given[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)


def spec_from_config(
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    processor: Mapping[str, Any] | None,
    where: str,
    generation: Mapping[str, Any] | None = None,
) -> VLMSpec:
    """The spec of a Hugging Face folder.

    Args:
      config: `config.json`, of a `model_type` in `FAMILIES`.
      tensors: the folder's arrays; only their names are looked at.
      processor: `preprocessor_config.json`, None where there is none.
      where: the folder, for error lines.
      generation: `generation_config.json`, None where there is none.

    Raises:
      InputError: a setting that a VLMSpec cannot describe, by name.
    """
    tower, _ = hf.spec_from_config(config["vision_config"], Part(tensors, "tower").shapes, processor, where)
    text = config["text_config"]
    check_choice(f"{where}: text_config.model_type", text.get("model_type"), hf_lm.FAMILIES)
    decoder = hf_lm.spec_from_config(text, where, generation)
    check_choice(f"{where}: projector_hidden_act", config.get("projector_hidden_act", "gelu"), ("gelu",))
    strategy = config.get("vision_feature_select_strategy", "default")
    check_choice(f"{where}: vision_feature_select_strategy", strategy, ("default", "full"))
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int) or not layer:
        raise InputError(f"{where}: vision_feature_layer must be one number other than 0, found {layer!r}")
    return VLMSpec(
        tower=tower.edit(feature_layer=layer if layer < 0 else layer - 1),  # theirs counts the embedding as 0
        bridge=BridgeSpec(
            hidden=decoder.width, bias=bool(config.get("multimodal_projector_bias", True)), prefix=strategy == "full"
        ),
        decoder=decoder,
        image_token=int(config.get("image_token_index", config.get("image_token_id", 32000))),
    )


def to_ours(spec: VLMSpec, tensors: Mapping[str, np.ndarray], where: str) -> Params:
    """Our parameters from the folder's arrays.

    Raises:
      InputError: one line with every missing, extra and mis-shaped name of a part, or names of no part.
    """
    parts = {part: Part(tensors, part) for part in _PREFIXES}
    known = {name for part in parts.values() for name in part.given.values()}
    if strange := sorted(set(tensors) - known):
        raise InputError(f"{where} do not fit the spec; {len(strange)} extra: {names.listed(strange)}")
    return {
        "tower": _backbone(spec.tower, parts["tower"], where),
        "bridge": _projector(spec, parts["bridge"], where),
        "decoder": _backbone(spec.decoder, parts["decoder"], where),
    }


def _backbone(spec: ViTSpec | LMSpec, part: Part, where: str) -> Params:
    own = [n for n in TABLES if n.startswith("hf_")] if isinstance(spec, ViTSpec) else [hf_lm.TABLE]
    table, prefix = names.find_table(part, own)
    return names.to_ours(spec, part, TABLES[table], prefix, where)


def _projector(spec: VLMSpec, part: Part, where: str) -> Params:
    ours = {name: shape for name, shape in names.bridge_shapes(spec).items() if name in _PROJECTOR}
    names.check({_PROJECTOR[name]: shape[::-1] for name, shape in ours.items()}, part.shapes, where)
    for name in part:
        names.check_floating(name, part[name], where)
    return names.unflatten({name: np.array(part[_PROJECTOR[name]].T, np.float32, order="C") for name in ours})
