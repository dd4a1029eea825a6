# SPDX-License-Identifier: Apache-2.0
"""Hugging Face vision towers: `config.json` and `preprocessor_config.json` to `ViTSpec`, and back.

Facts (defaults, class names) are those of transformers 5.24; files written by older releases carry the same names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from vtjax.errors import InputError
from vtjax.spec import Preprocess, ViTSpec
from vtjax.weights import hf_lm

# model_type -> (table, defaults of fields that a config may leave out)
_COMMON: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_channels": 3}
_VIT: dict[str, Any] = {
    **_COMMON,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
}
_VIT |= {"patch_size": 16, "qkv_bias": True}
_DINOV2: dict[str, Any] = {
    **_COMMON,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "patch_size": 14,
}
_DINOV2 |= {"qkv_bias": True, "layerscale_value": 1.0, "use_swiglu_ffn": False}
_CLIP: dict[str, Any] = {
    **_COMMON,
    "intermediate_size": 3072,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "image_size": 224,
}
_CLIP |= {"patch_size": 32}
_SIGLIP: dict[str, Any] = {
    **_CLIP,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "patch_size": 16,
    "vision_use_head": True,
}
_INTERN: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 3200,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
}
_INTERN |= {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "image_size": 448, "patch_size": 14, "qkv_bias": False}
_INTERN |= {"qk_normalization": True, "norm_type": "rms_norm", "initializer_factor": 0.1}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("hf_vit", _VIT),
    "deit": ("hf_vit", _VIT),
    "dinov2": ("hf_dinov2", _DINOV2),
    "dinov2_with_registers": ("hf_dinov2", {**_DINOV2, "num_register_tokens": 4}),
    "clip_vision_model": ("hf_clip", _CLIP),
    "siglip_vision_model": ("hf_siglip", _SIGLIP),
    "intern_vit_6b": ("hf_intern", _INTERN),
}
_WHOLE = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "internvl_chat": "intern_vit_6b"}
"""Models of which the vision part is taken."""

ACTIVATIONS = {
    **{"gelu": "gelu", "quick_gelu": "quick_gelu"},
    **{"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"},
}
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def spec_from_config(
    config: Mapping[str, Any],
    names: Mapping[str, tuple[int, ...]],
    processor: Mapping[str, Any] | None,
    where: str,
) -> tuple[ViTSpec, str]:
    """(spec, table name) of a Hugging Face folder.

    Args:
      config: `config.json`.
      names: shapes of the file's arrays; they say which heads exist.
      processor: `preprocessor_config.json`, None where there is none.
      where: the folder, for error lines.

    Raises:
      InputError: a model type or a setting that a ViTSpec cannot describe, by name.
    """
    kind = config.get("model_type")
    if kind in _WHOLE:
        kind, config = _WHOLE[kind], config.get("vision_config") or {}
    if kind not in FAMILIES:
        known = ", ".join([*FAMILIES, *_WHOLE, *hf_lm.FAMILIES, "llava", "mllama"])
        raise InputError(f"{where}: model_type must be one of {known}, found {config.get('model_type')!r}")
    table, defaults = FAMILIES[kind]
    get = {**defaults, **{k: v for k, v in config.items() if v is not None}}
    if get["hidden_act"] not in ACTIVATIONS:
        raise InputError(f"{where}: hidden_act must be one of {', '.join(ACTIVATIONS)}, found {get['hidden_act']!r}")
    side = square(get["patch_size"], f"{where}: patch_size")
    image = get["image_size"]
    height, width = (image, image) if isinstance(image, int) else (int(image[0]), int(image[1]))
    # Pixels right of and below the last whole patch are not seen: SigLIP so400m/14 at 384 reads 378.
    size = (height // side * side, width // side * side)
    common: dict[str, Any] = {
        **{"depth": get["num_hidden_layers"], "width": get["hidden_size"], "heads": get["num_attention_heads"]},
        **{"image_size": size, "patch": side, "channels": get["num_channels"], "eps": float(get["layer_norm_eps"])},
        **{"activation": ACTIVATIONS[get["hidden_act"]], "preprocess": preprocess(processor, size[0], where)},
    }
    build = {"hf_vit": _vit, "hf_dinov2": _dinov2, "hf_clip": _clip, "hf_siglip": _siglip, "hf_intern": _intern}[table]
    return ViTSpec.uniform(**{**common, **build(get, names, where)}), table


def _vit(get: dict[str, Any], names: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"mlp": get["intermediate_size"], "qkv_bias": bool(get["qkv_bias"])}
    distilled = any(n.endswith("embeddings.distillation_token") for n in names)
    if "cls_classifier.weight" in names:
        return {**fields, "classes": names["cls_classifier.weight"][0], "distill_token": True, "pos_prefix": 2}
    if "classifier.weight" in names:
        fields["classes"] = names["classifier.weight"][0]
    # Without its own head the distillation token is one more token that others attend to: a register with a position.
    return {**fields, "registers": 1, "pos_prefix": 2} if distilled else fields


def _dinov2(get: dict[str, Any], names: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Any]:
    if "classifier.weight" in names:
        raise InputError(
            f"{where}: DINOv2's classifier reads the class token beside the mean patch, which a ViTSpec cannot "
            "describe; use the backbone (Dinov2Model)"
        )
    hidden = int(get["hidden_size"] * get["mlp_ratio"])
    fields: dict[str, Any] = {
        "qkv_bias": bool(get["qkv_bias"]),
        "layer_scale": float(get["layerscale_value"]),
        "mlp": hidden,
    }
    if get["use_swiglu_ffn"]:
        fields |= {"activation": "swiglu", "mlp": _swiglu_width(hidden)}
    return {**fields, "registers": int(get.get("num_register_tokens", 0))}


def _clip(get: dict[str, Any], names: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "mlp": get["intermediate_size"],
        "patch_bias": False,
        "norm_before": True,
        "head_bias": False,
    }
    if "visual_projection.weight" in names:
        fields["classes"] = names["visual_projection.weight"][0]
    return fields


def _siglip(get: dict[str, Any], names: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"mlp": get["intermediate_size"], "class_token": False, "pos_prefix": 0, "pooling": "none"}
    if get["vision_use_head"]:
        fields |= {"pooling": "attention", "pool_mlp": get["intermediate_size"]}
    return fields


def _intern(get: dict[str, Any], names: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Any]:
    norms = {"rms_norm": "rmsnorm", "layer_norm": "layernorm"}
    if get["norm_type"] not in norms:
        raise InputError(f"{where}: norm_type must be rms_norm or layer_norm, found {get['norm_type']!r}")
    if get["qk_normalization"] and get["norm_type"] != "rms_norm":
        raise InputError(f"{where}: RMS-normed queries and keys beside LayerNorm cannot be described by a ViTSpec")
    return {
        **{"mlp": get["intermediate_size"], "qkv_bias": bool(get["qkv_bias"]), "norm": norms[get["norm_type"]]},
        **{"qk_norm": "full" if get["qk_normalization"] else "none", "norm_after": False},
        "layer_scale": float(get["initializer_factor"]),
    }


def _swiglu_width(hidden: int) -> int:
    """Two thirds, rounded up to a multiple of 8 (DINOv2)."""
    return (int(hidden * 2 / 3) + 7) // 8 * 8


def square(value: Any, where: str) -> int:
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise InputError(f"{where} must be square, found {value}")
    return int(sides.pop())


def preprocess(processor: Mapping[str, Any] | None, side: int, where: str) -> Preprocess:
    """Resize and crop of an image processor, as a crop fraction of the resized height, and whether it squashes. An
    image that is larger than the `side` that the model sees (SigLIP so400m/14 reads 378 of 384) is cropped to it."""
    if processor is None:
        return Preprocess()
    size, crop = processor.get("size") or {}, processor.get("crop_size")
    does_crop = processor.get("do_center_crop", crop is not None)
    if isinstance(size, int):
        size = {"shortest_edge": size} if _keeps_aspect(processor, does_crop) else {"height": size, "width": size}
    squash = "height" in size and bool(processor.get("do_resize", True))
    cropped = crop if isinstance(crop, int) else (crop or {}).get("height", side)
    cropped = cropped if does_crop else side
    edge = size.get("shortest_edge", size.get("height", cropped)) if does_crop or squash else cropped
    fraction = cropped / edge
    if math.floor(cropped / fraction) != edge:  # so that the fraction gives the edge back
        fraction = math.nextafter(fraction, 0)
    resample = _RESAMPLE.get(processor.get("resample", 2))
    if resample is None:
        raise InputError(f"{where}: resample must be one of {_RESAMPLE}, found {processor['resample']!r}")
    if not processor.get("do_normalize", True):
        return Preprocess(fraction, resample, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), squash)
    mean, std = (processor.get(name, [0.5, 0.5, 0.5]) for name in ("image_mean", "image_std"))
    return Preprocess(fraction, resample, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]), squash)


def _keeps_aspect(processor: Mapping[str, Any], does_crop: bool) -> bool:
    """Whether a `size` that is one number is the shorter side: each processor class has its own default."""
    kind = str(processor.get("image_processor_type") or processor.get("feature_extractor_type") or "")
    return kind.startswith(("CLIP", "Bit", "Siglip")) if kind else does_crop


def config(spec: ViTSpec) -> tuple[dict[str, Any], str, str]:
    """(`config.json`, table name, prefix) from which transformers rebuilds the model.

    Raises:
      InputError: a field of the spec that none of vit, deit, dinov2, dinov2_with_registers, clip_vision_model,
        siglip_vision_model can express.
    """
    kind, architecture, prefix = _kind(spec)
    table, _ = FAMILIES[kind]
    block = spec.blocks[0]
    if table in ("hf_clip", "hf_siglip") and spec.image_size[0] != spec.image_size[1]:
        raise InputError(f"a Hugging Face {kind} must have a square image_size, found {spec.image_size}")
    activations = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "swiglu": "gelu"}
    image = spec.image_size[0] if len(set(spec.image_size)) == 1 else list(spec.image_size)
    out: dict[str, Any] = {
        **{"architectures": [architecture], "model_type": kind, "dtype": "float32", "image_size": image},
        **{"hidden_size": spec.width, "num_hidden_layers": spec.depth, "num_attention_heads": block.heads},
        **{"num_channels": spec.channels, "patch_size": spec.patch, "hidden_act": activations[spec.activation]},
        "layer_norm_eps": spec.eps,
    }
    heads: dict[str, tuple[int, ...]] = {}
    if table == "hf_dinov2":
        out |= {"qkv_bias": spec.qkv_bias, "layerscale_value": spec.layer_scale, "mlp_ratio": _mlp_ratio(spec)}
        out |= {"use_swiglu_ffn": spec.activation == "swiglu"}
        out |= {"num_register_tokens": spec.registers} if spec.registers else {}
    else:
        out["intermediate_size"] = block.mlp
    if table == "hf_vit":
        out["qkv_bias"] = spec.qkv_bias
        if spec.classes:
            labels = {str(i): f"LABEL_{i}" for i in range(spec.classes)}
            out |= {"id2label": labels, "label2id": {label: int(i) for i, label in labels.items()}}
            heads["cls_classifier.weight" if spec.distill_token else "classifier.weight"] = (spec.classes, spec.width)
        if kind == "deit":
            heads["embeddings.distillation_token"] = (1, 1, spec.width)
    if table == "hf_clip":
        out["projection_dim"] = spec.classes or 512
        heads |= {"visual_projection.weight": (spec.classes, spec.width)} if spec.classes else {}
    if table == "hf_siglip":
        out["vision_use_head"] = spec.pooling == "attention"
    # What transformers would build from this, compared with what is to be written.
    rebuilt, _ = spec_from_config(json.loads(json.dumps(out)), heads, None, "the Hugging Face config")
    faults = rebuilt.edit(preprocess=spec.preprocess, lineage=spec.lineage).diff(spec)
    if faults:
        field, (theirs, wanted) = next(iter(faults.items()))
        raise InputError(f"a Hugging Face {kind} config cannot express {field}={wanted!r} (it would give {theirs!r})")
    return out, table, prefix


def processor(spec: ViTSpec) -> dict[str, Any]:
    """The `preprocessor_config.json` of a spec."""
    preprocess = spec.preprocess
    height, width = (math.floor(side / preprocess.crop) for side in spec.image_size)
    numbers = {name: number for number, name in _RESAMPLE.items()}
    if preprocess.interpolation not in numbers:
        raise InputError(f"interpolation must be one of {', '.join(numbers)}, found {preprocess.interpolation!r}")
    return {
        **{"image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_center_crop": True},
        **{"do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255, "do_convert_rgb": True},
        "size": {"height": height, "width": width} if preprocess.squash else {"shortest_edge": height},
        "resample": numbers[preprocess.interpolation],
        **{"crop_size": {"height": spec.image_size[0], "width": spec.image_size[1]}},
        **{"image_mean": list(preprocess.mean), "image_std": list(preprocess.std)},
    }


def _kind(spec: ViTSpec) -> tuple[str, str, str]:
    """(model_type, class, prefix) of the Hugging Face family nearest to a spec."""
    if spec.pooling == "attention" or not spec.class_token:
        return "siglip_vision_model", "SiglipVisionModel", ""
    if spec.norm_before:
        # Both classes read names with this prefix.
        return (
            "clip_vision_model",
            "CLIPVisionModelWithProjection" if spec.classes else "CLIPVisionModel",
            "vision_model.",
        )
    if spec.layer_scale is not None:
        return (
            ("dinov2_with_registers", "Dinov2WithRegistersModel", "")
            if spec.registers
            else ("dinov2", "Dinov2Model", "")
        )
    name, kind = ("DeiT", "deit") if spec.distill_token or spec.registers else ("ViT", "vit")
    if not spec.classes:
        return kind, f"{name}Model", ""
    teacher = "WithTeacher" if spec.distill_token else ""
    return kind, f"{name}ForImageClassification{teacher}", f"{kind}."


def _mlp_ratio(spec: ViTSpec) -> int:
    """The whole ratio that gives the MLP's width."""
    width, mlp = spec.width, spec.blocks[0].mlp
    for ratio in range(1, 17):
        if (_swiglu_width(width * ratio) if spec.activation == "swiglu" else width * ratio) == mlp:
            return ratio
    raise InputError(f"a Hugging Face dinov2 config cannot express blocks[0].mlp={mlp} for width {width}")
