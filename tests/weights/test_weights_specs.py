# SPDX-License-Identifier: Apache-2.0
"""Architectures and configs of timm and Hugging Face as specs, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest

from tests.weights import oracles
from vtjax import weights
from vtjax.errors import InputError
from vtjax.spec import Preprocess, ViTSpec
from vtjax.weights import hf, names, timm
from vtjax.weights.tables import TABLES

COUNTS = {
    "vit_tiny_patch16_224": 5_717_416,
    "vit_small_patch16_224": 22_050_664,
    "vit_base_patch16_224": 86_567_656,
    "vit_large_patch16_224": 304_326_632,
    "vit_base_patch32_224": 88_224_232,
    "deit_tiny_distilled_patch16_224": 5_910_800,
    "vit_small_patch14_dinov2": 22_056_192,
    "vit_giant_patch14_reg4_dinov2": 1_136_483_840,
    "vit_so400m_patch14_siglip_384": 428_225_600,
    "eva_giant_patch14_224": 1_012_555_112,
}
"""Parameters that timm 1.0.31 counts."""


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    spec = timm.spec_from_name(name)
    assert sum(math.prod(s) for s in names.shapes(spec).values()) == COUNTS[name]


def test_names_give_size_patch_and_preprocessing():
    spec = timm.spec_from_name("vit_base_patch32_384.augreg_in21k_ft_in1k", num_classes=10)
    assert (spec.image_size, spec.patch, spec.classes, spec.preprocess.crop) == ((384, 384), 32, 10, 1.0)
    spec = timm.spec_from_name("vit_large_patch14_reg4_dinov2")
    assert (spec.image_size, spec.registers, spec.pos_prefix, spec.preprocess.mean[0]) == ((518, 518), 4, 0, 0.485)
    assert timm.spec_from_name("deit_small_patch16_224").preprocess.std == (0.229, 0.224, 0.225)
    spec = timm.spec_from_name("vit_base_patch16_clip_quickgelu_224")
    assert (spec.activation, spec.norm_before, spec.preprocess.mean[0]) == ("quick_gelu", True, 0.48145466)
    assert timm.spec_from_name("vit_so400m_patch14_siglip_384").image_size == (378, 378)
    spec = timm.spec_from_name("eva02_enormous_patch14_clip_224")
    assert (spec.norm_position, spec.blocks[0].mlp, spec.depth) == ("post", 15360, 64)


@pytest.mark.parametrize(
    "name, word",
    [
        ("eva02_base_patch14_448", "rotary position embedding"),
        ("vit_base_patch16_rope_224", "'rope'"),
        ("vit_small_patch16_dinov3", "'dinov3'"),
        ("vit_base_patch16_xp_224", "'xp'"),
        ("vit_medium_patch16_gap_256", "'gap'"),
        ("resnet50", "expected vit_"),
        ("vit_colossal_patch16_224", "then a size"),
        ("", "expected vit_"),
    ],
)
def test_unknown_architectures_are_refused_by_their_unknown_part(name, word):
    with pytest.raises(InputError, match=word):
        timm.spec_from_name(name)


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({"use_rot_pos_emb": True}, "rotary position embedding"),
        ({"use_rel_pos_bias": True}, "relative position bias"),
        ({"scale_attn_norm": True}, "norm on the attention's output"),
        ({"pool_include_prefix": True}, "mean pooling over the prefix tokens"),
        ({"global_pool": "avgmax"}, "global_pool must be one of"),
        ({"global_pool": ""}, "a head without pooling"),
        ({"act_layer": "relu"}, "act_layer must be one of"),
        ({"norm_layer": "batchnorm"}, "norm_layer must be one of"),
        ({"patch_size": [16, 8]}, "patch_size must be square"),
        ({"brand_new": 1}, "brand_new=1 is not known"),
        ({"num_heads": 7}, "multiple of heads"),
        ({"depth": "many"}, "malformed"),
        ({"act_layer": ["gelu"]}, "malformed|must be one of"),
    ],
)
def test_refused_timm_arguments(tmp_path, arguments, word):

    oracle = oracles.read("timm_vit")
    oracle.config["model_args"] = {**oracle.config["model_args"], **arguments}
    with pytest.raises(InputError, match=word) as error:
        weights.load(oracle.write(tmp_path / "m"))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_training_arguments_of_timm_are_ignored(tmp_path):

    oracle = oracles.read("timm_vit")
    plain = weights.load(oracle.write(tmp_path / "a"))[0]
    oracle.config["model_args"] |= {"drop_path_rate": 0.1, "dynamic_img_size": True, "weight_init": "skip"}
    assert weights.load(oracle.write(tmp_path / "b"))[0] == plain


def test_timm_preprocessing_and_its_warnings(caplog):
    cfg = {"input_size": [3, 384, 384], "crop_pct": 0.95, "interpolation": "bilinear", "mean": [0.1, 0.2, 0.3]}
    cfg |= {"std": [1, 1, 1], "crop_mode": "squash", "notes": ["natively QuickGELU, use quickgelu model variant"]}
    with caplog.at_level(logging.WARNING):
        spec = timm.spec_from_config({"architecture": "vit_base_patch16_clip_384", "pretrained_cfg": cfg}, "here")
    assert spec.preprocess.crop == 0.95 and spec.preprocess.interpolation == "bilinear"
    assert spec.preprocess.mean == (0.1, 0.2, 0.3) and spec.preprocess.std == (1.0, 1.0, 1.0)
    assert spec.preprocess.squash and "crop_mode" not in caplog.text and "quick GELU" in caplog.text
    with caplog.at_level(logging.WARNING):
        cfg["crop_mode"] = "border"
        spec = timm.spec_from_config({"architecture": "vit_base_patch16_clip_384", "pretrained_cfg": cfg}, "here")
    assert not spec.preprocess.squash and "crop_mode='border'" in caplog.text


def hf_spec(config, shapes=None, processor=None):
    return hf.spec_from_config(config, shapes or {}, processor, "here")[0]


def test_hf_defaults_and_whole_models():
    spec = hf_spec({"model_type": "siglip", "vision_config": {"hidden_size": 1152, "image_size": 384, "patch_size": 14,
                    "num_attention_heads": 16, "num_hidden_layers": 27, "intermediate_size": 4304}})  # fmt: skip
    assert (spec.image_size, spec.pool_mlp, spec.eps) == ((378, 378), 4304, 1e-6)
    spec = hf_spec({"model_type": "clip", "vision_config": {}}, {"visual_projection.weight": (512, 768)})
    assert (spec.patch, spec.classes, spec.eps, spec.head_bias) == (32, 512, 1e-5, False)
    spec = hf_spec({"model_type": "intern_vit_6b"})
    assert (spec.width, spec.depth, spec.qk_norm, spec.norm) == (3200, 48, "full", "rmsnorm")
    assert hf_spec({"model_type": "siglip_vision_model", "vision_use_head": False}).pooling == "none"


@pytest.mark.parametrize(
    "config, word",
    [
        ({"model_type": "bert"}, "model_type must be one of vit, deit, dinov2.*found 'bert'"),
        ({"model_type": "vit", "hidden_act": "relu"}, "hidden_act must be one of"),
        ({"model_type": "vit", "patch_size": [16, 14]}, "patch_size must be square"),
        ({"model_type": "intern_vit_6b", "norm_type": "layer_norm"}, "RMS-normed queries"),
        ({"model_type": "intern_vit_6b", "norm_type": "batch"}, "norm_type must be"),
    ],
)
def test_refused_hf_configs(config, word):
    with pytest.raises(InputError, match=word):
        hf_spec(config)


@pytest.mark.parametrize("name, whole", [("hf_clip", "clip"), ("hf_siglip", "siglip")])
def test_the_vision_part_of_a_whole_model(tmp_path, name, whole):
    oracle = oracles.read(name)
    expected = weights.load(oracle.write(tmp_path / "tower"))
    text = {"text_model.embeddings.token_embedding.weight": np.zeros((3, 4), np.float32)}
    text |= {"logit_scale": np.zeros((), np.float32), "text_model.embeddings.position_ids": np.zeros((1, 3), np.int64)}
    tower = {
        k if k.startswith(("vision_model", "visual")) else f"vision_model.{k}": v for k, v in oracle.tensors.items()
    }
    ids = {"vision_model.embeddings.position_ids": np.zeros((1, 17), np.int64)}
    both = dataclasses.replace(
        oracle, config={"model_type": whole, "vision_config": oracle.config}, tensors={**tower, **text, **ids}
    )
    spec, params = weights.load(both.write(tmp_path / "whole"))
    assert spec == expected[0]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(*map(names.flatten, (params, expected[1])), strict=True))


def test_what_hugging_face_cannot_hold(tmp_path):
    spec, params = weights.load(oracles.read("hf_clip").write(tmp_path / "src"))
    wide = weights.resize(spec, params, (16, 64))
    with pytest.raises(InputError, match="square image_size"):
        weights.save(tmp_path / "out", *wide, "hf")
    odd = spec.edit(preprocess=Preprocess(interpolation="hermite"))
    with pytest.raises(InputError, match="interpolation must be one of"):
        weights.save(tmp_path / "out", odd, params, "hf")
    assert not (tmp_path / "out").exists()


def test_dinov2_classifier_is_refused():
    with pytest.raises(InputError, match="class token beside the mean patch"):
        hf_spec({"model_type": "dinov2"}, {"classifier.weight": (1000, 1536)})


@pytest.mark.parametrize(
    "processor, edge, interpolation, squash",
    [
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True,
          "resample": 3}, 256, "bicubic", False),
        ({"size": 224, "crop_size": 224, "do_center_crop": True, "resample": 3}, 224, "bicubic", False),
        ({"size": {"height": 224, "width": 224}, "resample": 2}, 224, "bilinear", True),
        ({"size": 224, "do_resize": True}, 224, "bilinear", True),
        ({"size": {"shortest_edge": 248}, "crop_size": 224, "resample": 1}, 248, "lanczos", False),
        ({"size": {"height": 256, "width": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True,
          "resample": 3}, 256, "bicubic", True),
        # What one number means depends on the class: old files of DeiT and of CLIP differ in nothing else.
        ({"size": 256, "crop_size": 224, "feature_extractor_type": "DeiTFeatureExtractor"}, 256, "bilinear", True),
        ({"size": 256, "crop_size": 224, "feature_extractor_type": "CLIPFeatureExtractor"}, 256, "bilinear", False),
        ({"size": {"height": 224, "width": 224}, "do_resize": False, "resample": 3}, 224, "bicubic", False),
    ],
)  # fmt: skip
def test_hf_preprocessing(processor, edge, interpolation, squash):
    found = hf_spec({"model_type": "vit"}, processor=processor).preprocess
    assert math.floor(224 / found.crop) == edge
    assert found.interpolation == interpolation
    assert found.squash == squash


def test_a_squashed_image_that_the_model_sees_in_part():
    """so400m/14 reads 378 of the 384 pixels: resized to 384, cropped to 378."""
    vision = {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14}
    found = hf_spec(vision, processor={"size": {"height": 384, "width": 384}, "resample": 3}).preprocess
    assert found.squash and math.floor(378 / found.crop) == 384


@pytest.mark.parametrize("squash", [False, True])
def test_preprocessing_survives_both_exports(tmp_path, squash):
    spec, params = weights.load(oracles.read("timm_vit").write(tmp_path / "src"))
    wanted = Preprocess(crop=0.9, interpolation="bilinear", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), squash=squash)
    spec = spec.edit(preprocess=wanted)
    for layout in ("timm", "hf"):
        weights.save(tmp_path / layout, spec, params, layout)
        found = weights.load(tmp_path / layout)[0].preprocess
        assert math.floor(32 / found.crop) == math.floor(32 / 0.9)
        assert (found.interpolation, found.mean, found.std) == ("bilinear", wanted.mean, wanted.std)
        assert found.squash == squash
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == ["ViTForImageClassification"]


def test_every_name_is_documented():
    text = (Path(__file__).resolve().parents[2] / "docs" / "parameter-names.md").read_text()
    rich = ViTSpec.uniform(
        **{"depth": 2, "width": 8, "heads": 2, "image_size": 8, "patch": 4, "distill_token": True, "registers": 2},
        **{"norm_before": True, "fc_norm": True, "pooling": "attention", "pool_mlp": 8, "qk_norm": "head"},
        **{"mlp_norm": True, "activation": "swiglu", "layer_scale": 0.1, "classes": 3},
    ).edit(blocks={1: {"attn": False, "ffn": False, "adapter": 4}})
    ours = {n.split("/", 1)[1] if n.startswith("block_") else n for n in names.shapes(rich)}
    assert [n for n in sorted(ours) if f"`{n}`" not in text] == []
    foreign = {row.foreign.removesuffix(".weight").removesuffix(".bias") for t in TABLES.values() for row in t.top}
    short = {f.removeprefix("/") for f in foreign if not f.startswith("head.attention.in_proj")}
    assert [f for f in sorted(short) if f not in text] == []
