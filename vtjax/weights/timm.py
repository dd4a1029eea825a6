# SPDX-License-Identifier: Apache-2.0
"""timm models: architecture names and hub configs to `ViTSpec`, and back.

Facts (sizes, defaults, normalisation) are timm 1.0.31's. What a `ViTSpec` cannot say is refused by name.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from typing import Any

from vtjax.errors import InputError
from vtjax.spec import Preprocess, ViTSpec
from vtjax.weights.tables import TABLES, Table

_LOG = logging.getLogger(__name__)

# (mean, standard deviation)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
INCEPTION = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

# width, depth, heads
_SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (192, 12, 3),
    "xsmall": (256, 10, 4),
    "small": (384, 12, 6),
    "medium": (512, 12, 8),
    "betwixt": (640, 12, 10),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "so400m": (1152, 27, 16),
    "huge": (1280, 32, 16),
    "giant": (1408, 40, 16),
    "giantopt": (1536, 40, 16),
    "gigantic": (1664, 48, 16),
    "enormous": (1792, 64, 16),
}
_RATIOS = {"giant": 48 / 11, "gigantic": 64 / 13, "so400m": 3.7362}
_NAME = re.compile(r"(?P<family>vit|deit3?|eva|eva02)_(?P<size>[a-z0-9]+)(?P<rest>(_[a-z0-9]+)*)")
_WORDS = re.compile(r"patch\d+|reg\d+|\d{3}|distilled|clip|quickgelu|siglip|gap|dinov2")

_TRAINING_ONLY = {
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
    *("weight_init", "fix_init", "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "head_init_scale"),
    *("ref_feat_shape", "out_indices", "features_only", "scriptable", "exportable", "pretrained_strict"),
    *("rope_type", "rope_grid_offset", "rope_grid_indexing", "rope_temperature", "rope_rotate_half"),
}
# name in timm: (the value a ViTSpec can stand for, what the other values mean)
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "scale_attn_norm": ((False,), "a norm on the attention's output before its projection"),
    "scale_attn_inner": ((False,), "a norm on the attention's output before its projection"),
    "pool_include_prefix": ((False,), "mean pooling over the prefix tokens"),
    "use_rot_pos_emb": ((False,), "rotary position embedding"),
    "attn_type": (("eva",), "another attention layer"),
    "attn_layer": (("", "attn"), "another attention layer"),
    "num_kv_heads": ((None,), "grouped-query attention"),
    "attn_only_layer_scale": ((False,), "LayerScale on the attention only"),
    "swiglu_align_to": ((0,), "an aligned SwiGLU width"),
    "attn_pool_num_heads": ((None,), "attention pooling with its own heads"),
    "attn_pool_mlp_ratio": ((None,), "attention pooling with its own MLP ratio"),
    "embed_norm_layer": ((None,), "a norm inside the patch embedding"),
    "rel_pos_bias": ((False,), "relative position bias"),
    "use_rel_pos_bias": ((False,), "relative position bias"),
    "use_shared_rel_pos_bias": ((False,), "relative position bias"),
}
_POOLS = {"token": "class", "avg": "mean", "map": "attention", "": "none"}
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}


def arguments(architecture: str) -> dict[str, Any]:
    """timm's constructor arguments for an architecture name, plus "class": "vit", "distilled" or "eva", "swiglu"
    and "eps".

    Raises:
      InputError: an architecture that this table does not know, naming the part that it does not know.
    """
    match = _NAME.fullmatch(architecture.split(".")[0])
    if match is None or match["size"] not in _SIZES:
        raise InputError(
            f"timm architecture {architecture!r} is not known: expected vit_, deit_, deit3_, eva_ or eva02_, "
            f"then a size ({', '.join(_SIZES)})"
        )
    family, size, words = match["family"], match["size"], match["rest"].strip("_").split("_")
    unknown = [w for w in words if w and not _WORDS.fullmatch(w)]
    if family == "eva02" and size != "enormous":
        unknown = ["eva02: rotary position embedding"]
    if "gap" in words and "siglip" not in words:
        unknown = ["gap"]
    if unknown:
        raise InputError(
            f"timm architecture {architecture!r} cannot be described by a ViTSpec: {unknown[0]!r} is not known"
        )
    width, depth, heads = _SIZES[size]
    args: dict[str, Any] = {"class": "vit", "embed_dim": width, "depth": depth, "num_heads": heads, "eps": 1e-6}
    args["mlp_ratio"] = _RATIOS.get(size, 4.0)
    numbers = [int(w) for w in words if w.isdigit()]
    args["img_size"] = numbers[-1] if numbers else 518 if "dinov2" in words else 224
    for word in words:
        if word.startswith("patch"):
            args["patch_size"] = int(word[5:])
        elif word.startswith("reg"):
            args |= {"reg_tokens": int(word[3:]), "no_embed_class": True}
    if family == "deit3":
        args |= {"no_embed_class": True, "init_values": 1e-6}
    if "distilled" in words:
        args["class"] = "distilled"
    if "dinov2" in words:
        args |= {"init_values": 1e-5, "num_classes": 0}
        if size == "giant":
            args |= {"embed_dim": 1536, "num_heads": 24, "mlp_ratio": 2.66667 * 2, "swiglu": True}
    if "siglip" in words:
        args |= {"class_token": False, "num_classes": 0, "global_pool": "map"}
        kind = (size, args.get("patch_size"), args["img_size"])
        if kind[:2] in (("so400m", 16), ("giantopt", 16), ("base", 32)) or kind == ("large", 16, 512):
            args["act_layer"] = "gelu_tanh"
    if "gap" in words:
        args |= {"global_pool": "avg", "fc_norm": False}
    if family in ("eva", "eva02") and size != "large":
        args |= {"class": "eva", "mlp_ratio": (15360 if size == "enormous" else 6144) / width, "global_pool": "avg"}
        args |= {"global_pool": "token"} if "clip" in words else {}
        args |= {"use_post_norm": True} if size == "enormous" else {}
    elif family == "eva":
        args["global_pool"] = "avg"
    elif "clip" in words:
        args |= {"pre_norm": True, "eps": 1e-5} | ({"act_layer": "quick_gelu"} if "quickgelu" in words else {})
    return args


def spec_from_arguments(args: Mapping[str, Any], preprocess: Preprocess, where: str) -> ViTSpec:
    """`ViTSpec` of timm's constructor arguments (as `arguments` gives them).

    Raises:
      InputError: an argument that is not known, or a value that a ViTSpec cannot say, by name.
    """
    eva = args["class"] == "eva"
    known = _EVA_ARGUMENTS if eva else _VIT_ARGUMENTS
    for name, value in args.items():
        if name in _REFUSED:
            if value not in _REFUSED[name][0]:
                raise InputError(f"{where}: {name}={value!r} ({_REFUSED[name][1]}) cannot be described by a ViTSpec")
        elif name not in known and name not in _TRAINING_ONLY and name not in ("class", "eps", "swiglu"):
            raise InputError(f"{where}: the timm argument {name}={value!r} is not known")
    get = {**known, **args}.__getitem__
    pool = _choice(get("global_pool"), _POOLS, f"{where}: global_pool")
    classes = int(get("num_classes"))
    if pool == "none" and classes:
        raise InputError(f"{where}: a head without pooling (global_pool='', num_classes={classes}) is not supported")
    width, heads, ratio = int(get("embed_dim")), int(get("num_heads")), float(get("mlp_ratio"))
    swiglu = bool(args.get("swiglu") or (eva and get("swiglu_mlp")))
    mlp = int(width * ratio) // (2 if swiglu and not eva else 1)
    distilled = args["class"] == "distilled"
    registers = int(get("num_reg_tokens" if eva else "reg_tokens"))
    prefix = int(get("class_token")) + int(distilled) + registers
    learned = bool(get("use_abs_pos_emb")) if eva else get("pos_embed") not in ("", "none")
    image, patch = get("img_size"), get("patch_size")
    size = (image, image) if isinstance(image, int) else (int(image[0]), int(image[1]))
    side = patch if isinstance(patch, int) else int(patch[0])
    if not isinstance(patch, int) and len(set(patch)) > 1:
        raise InputError(f"{where}: patch_size must be square, found {patch}")
    # Pixels right of and below the last whole patch are not seen: so400m/14 at 384 reads 378.
    size = (size[0] // side * side, size[1] // side * side)
    norm = _choice(
        get("norm_layer") or "layernorm", {"layernorm": "layernorm", "rmsnorm": "rmsnorm"}, f"{where}: norm_layer"
    )
    scales = get("init_values")
    if eva and get("use_post_norm"):
        scales = None  # timm's post-norm EVA block ignores it
    before = bool(get("use_pre_transformer_norm" if eva else "pre_norm"))
    after, fc = _final_norms(get, eva)
    activation = "swiglu" if swiglu else _choice(get("act_layer") or "gelu", _ACTIVATIONS, f"{where}: act_layer")
    return ViTSpec.uniform(
        depth=int(get("depth")),
        width=width,
        heads=heads,
        mlp=mlp,
        image_size=size,
        patch=side,
        channels=int(get("in_chans")),
        patch_bias=not before,
        class_token=bool(get("class_token")),
        distill_token=distilled,
        registers=registers,
        pos="learned" if learned else "none",
        pos_prefix=0 if get("no_embed_class") or not learned else prefix,
        norm=norm,
        eps=float(args["eps"]),
        norm_position="post" if get("use_post_norm") else "pre",
        norm_before=before,
        norm_after=after,
        fc_norm=fc,
        pooling=pool,
        pool_mlp=int(width * ratio) if pool == "attention" else 0,
        qkv_bias=bool(get("qkv_bias")),
        key_bias=not (eva and get("qkv_bias")),
        qk_norm="head" if get("qk_norm") else "none",
        out_bias=True if eva else bool(get("proj_bias")),
        mlp_bias=True if eva else bool(get("proj_bias")),
        mlp_norm=bool(get("scale_mlp" if eva else "scale_mlp_norm")),
        activation=activation,
        layer_scale=float(scales) if scales else None,
        classes=classes,
        preprocess=preprocess,
    )


_COMMON = {
    **{"img_size": 224, "patch_size": 16, "in_chans": 3, "num_classes": 1000, "embed_dim": 768, "depth": 12},
    **{"num_heads": 12, "mlp_ratio": 4.0, "qkv_bias": True, "qk_norm": False, "init_values": None, "class_token": True},
    **{"no_embed_class": False, "norm_layer": None, "act_layer": None, "use_post_norm": False},
}
_VIT_ARGUMENTS: dict[str, Any] = {
    **_COMMON,
    **{"global_pool": "token", "scale_mlp_norm": False, "proj_bias": True, "pos_embed": "learn", "reg_tokens": 0},
    **{"pre_norm": False, "final_norm": True, "fc_norm": None},
}
_EVA_ARGUMENTS: dict[str, Any] = {
    **_COMMON,
    **{"global_pool": "avg", "scale_mlp": False, "swiglu_mlp": False, "qkv_fused": True, "num_reg_tokens": 0},
    **{"use_abs_pos_emb": True, "use_pre_transformer_norm": False, "use_post_transformer_norm": None},
    **{"use_fc_norm": None},
}


def _final_norms(get: Any, eva: bool) -> tuple[bool, bool]:
    """(norm after the blocks, norm after pooling)."""
    fc = get("use_fc_norm" if eva else "fc_norm")
    fc = get("global_pool") == "avg" if fc is None else bool(fc)
    if eva:
        after = get("use_post_transformer_norm")
        return (not fc if after is None else bool(after)), fc
    return bool(get("final_norm")) and not fc, bool(get("final_norm")) and fc


def spec_from_name(architecture: str, preprocess: Preprocess | None = None, **changes: Any) -> ViTSpec:
    """The spec of a timm architecture (`vit_base_patch16_224`, `deit_tiny_distilled_patch16_224`, ...).

    Args:
      architecture: timm's name; a pretrained tag after a dot is ignored.
      preprocess: where the weights need another one than the family's usual one.
      changes: timm's constructor arguments (`num_classes=10`, `img_size=384`).
    """
    args = {**arguments(architecture), **changes}
    size = args["img_size"]
    usual = _usual_preprocess(architecture, size if isinstance(size, int) else size[0])
    return spec_from_arguments(args, preprocess or usual, architecture)


def spec_from_config(config: Mapping[str, Any], where: str) -> ViTSpec:
    """The spec of a timm-hub folder's `config.json` (`architecture`, `model_args`, `pretrained_cfg`)."""
    architecture = config["architecture"]
    cfg = config.get("pretrained_cfg") or {}
    args = arguments(architecture)
    if cfg.get("input_size"):
        args |= {"in_chans": int(cfg["input_size"][0]), "img_size": [int(s) for s in cfg["input_size"][1:]]}
    for source in (cfg, config):
        args |= {k: source[k] for k in ("num_classes", "global_pool") if source.get(k) is not None}
    given = dict(config.get("model_args") or {})
    if "mlp_layer" in given:
        layer = str(given.pop("mlp_layer")).lower()
        args["swiglu"] = _choice(layer, {"mlp": False, "swiglupacked": True}, f"{where}: mlp_layer")
    args |= given
    size = args["img_size"] if isinstance(args["img_size"], int) else args["img_size"][0]
    return spec_from_arguments(args, _preprocess(cfg, _usual_preprocess(architecture, size), where), where)


def _choice(value: Any, choices: Mapping[Any, Any], where: str) -> Any:
    if value not in choices:
        raise InputError(f"{where} must be one of {', '.join(map(repr, choices))}, found {value!r}")
    return choices[value]


def _preprocess(cfg: Mapping[str, Any], usual: Preprocess, where: str) -> Preprocess:
    cfg = {k: v for k, v in cfg.items() if v is not None}
    mode = cfg.get("crop_mode", "center")
    if mode not in ("center", "squash"):
        _LOG.warning("%s: crop_mode=%r is evaluated with a centre crop", where, mode)
    if any("quickgelu" in str(note).lower() for note in cfg.get("notes") or ()) and "quickgelu" not in where:
        _LOG.warning("%s: these weights were trained with quick GELU, which timm's architecture name leaves out", where)
    return Preprocess(
        crop=float(cfg.get("crop_pct", usual.crop)),
        interpolation=cfg.get("interpolation", usual.interpolation),
        mean=tuple(cfg.get("mean", usual.mean)),
        std=tuple(cfg.get("std", usual.std)),
        squash=mode == "squash",
    )


def _usual_preprocess(architecture: str, size: int) -> Preprocess:
    words = architecture.split(".")[0].split("_")
    if "dinov2" in words:
        crop, (mean, std) = 1.0, IMAGENET
    elif words[0].startswith("deit"):
        crop, (mean, std) = 1.0 if size >= 384 else 0.9, IMAGENET
    else:
        crop = 1.0 if size >= 336 else 0.9
        mean, std = OPENAI_CLIP if "clip" in words or words[0].startswith("eva") else INCEPTION
    return Preprocess(crop=crop, mean=mean, std=std)


def table_name(spec: ViTSpec) -> str:
    """Which of timm's namings a spec is written in."""
    eva = (spec.qkv_bias and not spec.key_bias) or (spec.mlp_norm and spec.activation == "swiglu")
    return "timm_eva" if eva else "timm"


def table(spec: ViTSpec) -> Table:
    """The table of `table_name`."""
    return TABLES[table_name(spec)]


def config(spec: ViTSpec) -> dict[str, Any]:
    """The `config.json` from which timm rebuilds the model (`timm.create_model("local-dir:FOLDER")`).

    Raises:
      InputError: a field of the spec that timm cannot express.
    """
    block, width = spec.blocks[0], spec.width
    eva, swiglu = table_name(spec) == "timm_eva", spec.activation == "swiglu"
    hidden = block.mlp * (2 if swiglu and not eva else 1)
    args: dict[str, Any] = {
        **{"img_size": list(spec.image_size), "patch_size": spec.patch, "in_chans": spec.channels, "embed_dim": width},
        **{
            "depth": spec.depth,
            "num_heads": block.heads,
            "mlp_ratio": _ratio(hidden, width),
            "qkv_bias": spec.qkv_bias,
        },
        **{"qk_norm": spec.qk_norm == "head", "init_values": spec.layer_scale, "class_token": spec.class_token},
        "no_embed_class": spec.pos_prefix == 0 and spec.prefix > 0,
        "global_pool": {v: k for k, v in _POOLS.items()}[spec.pooling],
    }
    if eva:
        architecture = "eva02_enormous_patch14_clip_224" if spec.norm_position == "post" else "eva_giant_patch14_224"
        args |= {"swiglu_mlp": swiglu, "scale_mlp": spec.mlp_norm, "num_reg_tokens": spec.registers}
        args |= {"use_abs_pos_emb": spec.pos == "learned", "use_pre_transformer_norm": spec.norm_before}
        args |= {"use_post_transformer_norm": spec.norm_after, "use_fc_norm": spec.fc_norm}
    else:
        architecture = _host(spec)
        args |= {"proj_bias": spec.out_bias, "scale_mlp_norm": spec.mlp_norm, "reg_tokens": spec.registers}
        args |= {"pos_embed": "learn" if spec.pos == "learned" else "none", "pre_norm": spec.norm_before}
        args |= {"final_norm": spec.norm_after or spec.fc_norm, "fc_norm": spec.fc_norm}
        if not swiglu:
            args["act_layer"] = spec.activation
        if spec.norm == "rmsnorm":
            args["norm_layer"] = "rmsnorm"
    out = {
        **{"architecture": architecture, "num_classes": spec.classes, "num_features": width},
        **{"global_pool": args["global_pool"], "model_args": args},
        "pretrained_cfg": {
            **{"tag": "vtjax", "custom_load": False, "input_size": [spec.channels, *spec.image_size]},
            **{
                "fixed_input_size": True,
                "interpolation": spec.preprocess.interpolation,
                "crop_pct": spec.preprocess.crop,
            },
            "crop_mode": "squash" if spec.preprocess.squash else "center",
            **{"mean": list(spec.preprocess.mean), "std": list(spec.preprocess.std)},
            **{"num_classes": spec.classes, "pool_size": None, "first_conv": "patch_embed.proj"},
            "classifier": ["head", "head_dist"] if spec.distill_token else "head",
        },
    }
    # What timm would build from this, compared with what is to be written.
    rebuilt = spec_from_config(json.loads(json.dumps(out)), "the timm config")
    faults = {k: v for k, v in rebuilt.diff(spec).items() if not k.startswith("lineage")}
    if faults:
        field, (theirs, wanted) = next(iter(faults.items()))
        raise InputError(
            f"a timm config cannot express {field}={wanted!r} (timm would build {theirs!r}); a single "
            ".safetensors file carries timm's names without a config"
        )
    return out


def _host(spec: ViTSpec) -> str:
    """A timm architecture whose fixed parts (classes that no JSON can name) are those of the spec."""
    if spec.distill_token:
        return "deit_base_distilled_patch16_224"
    if spec.activation == "swiglu":
        return "vit_giant_patch14_dinov2"
    return "vit_base_patch16_clip_224" if spec.eps == 1e-5 and spec.norm == "layernorm" else "vit_base_patch16_224"


def _ratio(hidden: int, width: int) -> float:
    """A ratio for which `int(width * ratio)` is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
