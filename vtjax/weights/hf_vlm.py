# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's LLaVA and Llama 3.2 Vision: `config.json` to `VLMSpec`, their arrays to ours.

Facts are those of transformers 5.24. The parts are other models of the library, whose names stand behind a prefix that
has changed with the releases.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vtjax.errors import InputError, check_choice
from vtjax.spec import BridgeSpec, CrossSpec, LMSpec, TiledViTSpec, ViTSpec, VLMSpec
from vtjax.weights import hf, hf_lm, names
from vtjax.weights.names import Params, Shape
from vtjax.weights.tables import TABLES

FAMILIES = ("llava", "mllama")

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
_MLLAMA_PROJECTOR = {"projector/down/kernel": "weight", "projector/down/bias": "bias"}
_CROSS = {
    **{"norm1/scale": "input_layernorm.weight", "norm2/scale": "post_attention_layernorm.weight"},
    **{f"attn/{n}/kernel": f"cross_attn.{n[0]}_proj.weight" for n in ("query", "key", "value", "out")},
    **{f"attn/{n}_norm/scale": f"cross_attn.{n[0]}_norm.weight" for n in ("query", "key")},
    **{f"mlp/{n}/kernel": f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")},
    **{"gate1": "cross_attn_attn_gate", "gate2": "cross_attn_mlp_gate"},
}

# Defaults of fields that a config may leave out.
_MLLAMA_VISION: dict[str, Any] = {
    **{"hidden_size": 1280, "hidden_act": "gelu", "num_hidden_layers": 32, "num_global_layers": 8},
    **{"attention_heads": 16, "num_channels": 3, "intermediate_size": 5120, "image_size": 448, "patch_size": 14},
    **{"norm_eps": 1e-5, "max_num_tiles": 4, "intermediate_layers_indices": [3, 7, 15, 23, 30]},
}
_MLLAMA_TEXT: dict[str, Any] = {
    **{"hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5},
    **{"rope_theta": 500_000.0, "cross_attention_layers": list(range(3, 40, 5)), "eos_token_id": 128001},
}
_MLLAMA_EXTRA = 8
"""Rows of the embedding beyond the vocabulary."""


class Part(Mapping[str, np.ndarray]):
    """The arrays of one part of a model, whose names begin with `pattern`, by those that it has alone; read on
    access."""

    def __init__(self, tensors: Mapping[str, np.ndarray], pattern: str):
        self._tensors, shapes, begins = tensors, names.shapes_of(tensors), re.compile(pattern)
        found = {name: match for name in shapes if (match := begins.match(name))}
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
    if config["model_type"] == "mllama":
        return _mllama(config, processor, where, generation)
    shapes = Part(tensors, _PREFIXES["tower"]).shapes
    tower, _ = hf.spec_from_config(config["vision_config"], shapes, processor, where)
    text = config["text_config"]
    check_choice(f"{where}: text_config.model_type", text.get("model_type"), hf_lm.FAMILIES)
    decoder = hf_lm.spec_from_config(text, where, generation)
    check_choice(f"{where}: projector_hidden_act", config.get("projector_hidden_act", "gelu"), ("gelu",))
    strategy = config.get("vision_feature_select_strategy", "default")
    check_choice(f"{where}: vision_feature_select_strategy", strategy, ("default", "full"))
    if strategy == "default" and not tower.prefix:
        raise InputError(f"{where}: vision_feature_select_strategy must be full for a tower without class token")
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


def _mllama(
    config: Mapping[str, Any],
    processor: Mapping[str, Any] | None,
    where: str,
    generation: Mapping[str, Any] | None,
) -> VLMSpec:
    text = _MLLAMA_TEXT | {k: v for k, v in config["text_config"].items() if v is not None}
    # Whatever is written there, its heads share out the width, and nothing has a bias.
    text |= {"model_type": "llama", "head_dim": text["hidden_size"] // text["num_attention_heads"]}
    text |= {"attention_bias": False, "mlp_bias": False}
    if text.get("tie_word_embeddings"):
        raise InputError(f"{where}: text_config.tie_word_embeddings must be false, found true")
    layers = tuple(text["cross_attention_layers"])
    decoder = hf_lm.spec_from_config(text, where, generation)
    if strange := [layer for layer in layers if not 0 <= layer < decoder.depth]:
        raise InputError(f"{where}: cross_attention_layers must be in 0..{decoder.depth - 1}, found {strange[0]}")
    block = decoder.blocks[0]
    cross = CrossSpec.mllama(layers, block.heads, block.kv_heads, block.head_dim, block.mlp)
    return VLMSpec(
        tower=_tiled(config["vision_config"], processor, where),
        bridge=BridgeSpec("linear", prefix=True, cross=dataclasses.replace(cross, eps=decoder.eps)),
        decoder=decoder.edit(blocks={layer: {"attn": False, "ffn": False} for layer in layers}, extra=_MLLAMA_EXTRA),
        image_token=int(config.get("image_token_index", config.get("image_token_id", 128256))),
    )


def _tiled(vision: Mapping[str, Any], processor: Mapping[str, Any] | None, where: str) -> TiledViTSpec:
    """The tower of a `vision_config`."""
    get = _MLLAMA_VISION | {k: v for k, v in vision.items() if v is not None}
    heads = get.get("num_attention_heads", get["attention_heads"])
    check_choice(f"{where}: vision_config.hidden_act", get["hidden_act"], hf.ACTIVATIONS)
    side, patch = (hf.square(get[name], f"{where}: vision_config.{name}") for name in ("image_size", "patch_size"))
    features, depth, tiles = get["intermediate_layers_indices"], get["num_hidden_layers"], get["max_num_tiles"]
    if strange := [layer for layer in features if not 0 <= layer <= depth]:
        raise InputError(
            f"{where}: vision_config.intermediate_layers_indices must be in 0..{depth}, found {strange[0]}"
        )
    preprocess: dict[str, Any] = {}
    if processor is not None:
        for name, wanted in (("max_image_tiles", tiles), ("size", {"height": side, "width": side})):
            if (found := processor.get(name, wanted)) != wanted:
                raise InputError(
                    f"{where}/preprocessor_config.json: {name} must be the model's {wanted}, found {found}"
                )
        preprocess["preprocess"] = hf.preprocess(processor, side, where)
    spec = TiledViTSpec.uniform(
        depth=depth,
        global_blocks=get["num_global_layers"],
        width=get["hidden_size"],
        heads=heads,
        mlp=get["intermediate_size"],
        image_size=side,
        patch=patch,
        tiles=tiles,
        features=features,
        channels=get["num_channels"],
        eps=float(get["norm_eps"]),
        activation=hf.ACTIVATIONS[get["hidden_act"]],
        **preprocess,
    )
    ratios = get.get("supported_aspect_ratios") or spec.aspect_ratios
    if tuple(map(tuple, ratios)) != spec.aspect_ratios:
        raise InputError(
            f"{where}: vision_config.supported_aspect_ratios must be all of at most {tiles} tiles in order, "
            f"{list(map(list, spec.aspect_ratios))}, found {list(map(list, ratios))}"
        )
    if (output := get.get("vision_output_dim", spec.output_width)) != spec.output_width:
        raise InputError(
            f"{where}: vision_config.vision_output_dim must be {spec.output_width}, hidden_size for the last layer and "
            f"each of intermediate_layers_indices, found {output}"
        )
    return spec


def to_ours(spec: VLMSpec, tensors: Mapping[str, np.ndarray], where: str) -> Params:
    """Our parameters from the folder's arrays.

    Raises:
      InputError: one line with every missing, extra and mis-shaped name of a part, or names of no part.
    """
    parts = {part: Part(tensors, pattern) for part, pattern in _prefixes(spec).items()}
    known = {name for part in parts.values() for name in part.given.values()}
    if strange := sorted(set(tensors) - known):
        raise InputError(f"{where} do not fit the spec; {len(strange)} extra: {names.listed(strange)}")
    return {
        "tower": _backbone(spec.tower, parts["tower"], where),
        "bridge": _bridge(spec, parts["bridge"], where),
        "decoder": _backbone(spec.decoder, parts["decoder"], where),
    }


def _prefixes(spec: VLMSpec) -> Mapping[str, str]:
    """What the names of each part begin with. Llama 3.2 Vision's cross-attention stands among the text's layers."""
    if not isinstance(spec.tower, TiledViTSpec) or spec.bridge.cross is None:
        return _PREFIXES
    crossing = rf"layers\.(?:{'|'.join(map(str, spec.bridge.cross.layers))})\."
    text = r"(?:language_model\.model\.|model\.language_model\.)"
    return {
        "tower": r"(?:model\.)?vision_model\.",
        "bridge": rf"(?:model\.)?multi_modal_projector\.|{text}(?={crossing})",
        "decoder": rf"(?!{text}{crossing}){_PREFIXES['decoder']}",
    }


def _backbone(spec: ViTSpec | TiledViTSpec | LMSpec, part: Part, where: str) -> Params:
    own = [hf_lm.TABLE] if isinstance(spec, LMSpec) else [n for n in TABLES if n.startswith("hf_")]
    table, prefix = names.find_table(part, own)
    return names.to_ours(spec, part, TABLES[table], prefix, where)


def _bridge(spec: VLMSpec, part: Part, where: str) -> Params:
    shapes = names.bridge_shapes(spec)
    foreign = {name: _foreign(name, isinstance(spec.tower, TiledViTSpec)) for name in shapes}
    if unknown := [name for name, theirs in foreign.items() if theirs is None]:
        raise InputError(f"this naming has no place for {names.listed(unknown)}, which the spec asks for")
    wanted = {ours: theirs for ours, theirs in foreign.items() if theirs is not None}
    names.check({theirs: shapes[ours][::-1] for ours, theirs in wanted.items()}, part.shapes, where)
    for name in part:
        names.check_floating(name, part[name], where)
    return names.unflatten({n: np.array(part[theirs].T, np.float32, order="C") for n, theirs in wanted.items()})


def _foreign(name: str, mllama: bool) -> str | None:
    """The library's name of a parameter of the bridge."""
    if not name.startswith("block_"):
        return (_MLLAMA_PROJECTOR if mllama else _PROJECTOR).get(name)
    block, _, rest = name.partition("/")
    return f"layers.{int(block.removeprefix('block_'))}.{_CROSS[rest]}" if mllama and rest in _CROSS else None
