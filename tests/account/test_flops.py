# SPDX-License-Identifier: Apache-2.0
"""The formulas against the traced model, against a model written down by hand, and against published sizes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from vtjax.account import flops, params
from vtjax.errors import InputError
from vtjax.models.vit import ViT
from vtjax.spec import BlockSpec, ViTSpec

# Sizes without common factors, so that no two terms are equal by chance.
SMALL = {"depth": 3, "width": 24, "heads": 3, "mlp": 40, "image_size": (20, 35), "patch": 5, "classes": 7}

FAMILIES = {
    "plain": {},
    "deit_distilled": {"distill_token": True, "pos_prefix": 2},
    "dinov2_registers": {"registers": 3, "pos_prefix": 0, "layer_scale": 1e-5, "activation": "swiglu", "eps": 1e-6},
    "clip": {"patch_bias": False, "norm_before": True, "activation": "quick_gelu", "head_bias": False},
    "siglip": {
        "class_token": False,
        "pos_prefix": 0,
        "pooling": "attention",
        "pool_mlp": 44,
        "activation": "gelu_tanh",
        "classes": 0,
    },
    "eva_clip_post": {"norm_position": "post", "key_bias": False},
    "eva02": {"key_bias": False, "activation": "swiglu", "mlp_norm": True, "pos": "none"},
    "internvit": {"norm": "rmsnorm", "qk_norm": "full", "qkv_bias": False, "layer_scale": 0.1, "feature_layer": -1},
    "qk_norm_per_head": {"qk_norm": "head", "out_bias": False, "mlp_bias": False},
    "mean_fc_norm": {"pooling": "mean", "fc_norm": True, "norm_after": False, "class_token": False, "pos_prefix": 0},
    "swiglu_pool": {"pooling": "attention", "pool_mlp": 12, "activation": "swiglu", "norm": "rmsnorm"},
    "dense_tokens": {"pooling": "none"},
    "mean_distilled": {"pooling": "mean", "distill_token": True, "pos_prefix": 1},
    "no_pooling_no_head": {"pooling": "none", "classes": 0, "pos": "sincos2d"},
    "one_channel": {"channels": 1, "pos": "sincos2d", "feature_layer": -2},
}

BLOCKS = {
    "narrow_heads": {1: {"heads": 2, "head_dim": 5}},
    "wide_heads": {0: {"heads": 4, "head_dim": 13}},
    "own_mlp": {0: {"mlp": 11}, 2: {"mlp": 97}},
    "no_attention": {1: {"attn": False}},
    "no_mlp": {2: {"ffn": False}},
    "removed": {1: {"attn": False, "ffn": False}},
    "adapter": {1: {"attn": False, "ffn": False, "adapter": 9}},
}


def specs() -> dict[str, ViTSpec]:
    found = {name: ViTSpec.uniform(**{**SMALL, **switches}) for name, switches in FAMILIES.items()}
    for name, edit in BLOCKS.items():
        for family in ("plain", "internvit", "eva_clip_post"):
            found[f"{family}-{name}"] = found[family].edit(blocks=edit)
    return found


def traced(spec: ViTSpec, batch: int = 1, **options) -> tuple[flops.Counts, dict]:
    model = ViT(spec, **options)
    tree = jax.eval_shape(model.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((batch, *spec.image_size, spec.channels), jnp.float32)
    return flops.walk(lambda p, x: model.apply(p, x)[0], tree, images), tree


@pytest.mark.parametrize("name", specs())
def test_formulas_equal_the_model(name: str) -> None:
    spec = specs()[name]
    counts, tree = traced(spec)
    assert counts.unknown == {} and counts.assumed == ()
    assert flops.macs(spec) == counts.macs
    assert params.count(spec) == params.count(tree)
    by_kind = {row.kind: row.params for row in flops.by_kind(flops.layers(spec)) if row.params}
    of_tree: dict[str, int] = {}
    for group in params.table(tree):
        of_tree[group.kind] = of_tree.get(group.kind, 0) + group.params
    assert of_tree == by_kind


@pytest.mark.parametrize("name", ["plain", "internvit", "dinov2_registers"])
def test_every_row_equals_its_subtree(name: str) -> None:
    spec = specs()[name]
    _, tree = traced(spec)
    for row in flops.layers(spec):
        node = tree
        for part in row.name.split("/"):
            node = node[part]
        scale = {"attn": "layer_scale1", "mlp": "layer_scale2"}.get(row.name.split("/")[-1])
        extra = [tree[row.name.split("/")[0]][scale]] if scale and spec.layer_scale is not None else []
        assert row.params == params.count([node, extra]), row.name


@pytest.mark.parametrize("options", [{"remat": "full"}, {"remat": "full", "scan": True}, {"dtype": jnp.bfloat16}])
def test_the_same_work_however_it_is_run(options: dict) -> None:
    spec = specs()["dinov2_registers"]
    assert traced(spec, **options)[0].macs == flops.macs(spec)


def test_a_kernel_that_hides_the_scores_is_named() -> None:
    """From 1024 keys on, a TPU runs a kernel: exactly its products are missing, and it is listed."""
    spec = ViTSpec.uniform(depth=2, width=24, heads=3, image_size=32, patch=1)
    model = ViT(spec)
    tree = jax.eval_shape(model.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    cpu, tpu = (flops.walk(lambda p, x: model.apply(p, x)[0], tree, images, platform=p) for p in ("cpu", "tpu"))
    assert cpu.macs == flops.macs(spec) and cpu.unknown == {}
    assert tpu.macs == flops.macs(spec) - spec.depth * 2 * 1025**2 * 24
    ((name, calls),) = tpu.unknown.items()
    assert name.startswith("pallas_call:splash") and calls == spec.depth


def test_a_batch_costs_as_many_images() -> None:
    for name in ("plain", "siglip"):
        assert traced(specs()[name], batch=5)[0].macs == 5 * flops.macs(specs()[name])


def test_training_costs_three_forwards_less_the_gradient_of_the_images() -> None:
    spec = specs()["plain"]
    model = ViT(spec)
    tree = jax.eval_shape(model.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, *spec.image_size, spec.channels), jnp.float32)
    counts = flops.walk(jax.value_and_grad(lambda p, x: model.apply(p, x)[0].sum()), tree, images)
    assert counts.macs == 3 * flops.macs(spec) - flops.layers(spec)[0].macs


def test_tokens_after_reduction() -> None:
    spec = specs()["plain"]
    d, classes, n = 24, 7, [29, 20, 11, 6]
    expected = 28 * 75 * d + d * classes
    for before, after in zip(n, n[1:], strict=False):
        expected += 4 * before * d * d + 2 * before**2 * d + 2 * after * d * 40
    assert flops.macs(spec, n) == expected
    assert flops.macs(spec, [29] * 4) == flops.macs(spec)
    for bad, message in (
        (n[:-1], "must hold 4 counts"),
        ([29, 20, 0, 6], "above 0"),
        ([29, 20, True, 6], "whole numbers"),
    ):
        with pytest.raises(InputError, match=message):
            flops.macs(spec, bad)
    removed = spec.edit(blocks={1: {"attn": False, "ffn": False}})
    with pytest.raises(InputError, match=r"tokens\[2\] must be 20, found 11"):
        flops.layers(removed, n)


def vit(depth: int, width: int, heads: int, **rest) -> ViTSpec:
    return ViTSpec.uniform(depth=depth, width=width, heads=heads, **rest)


@pytest.mark.parametrize(
    ("spec", "gmacs"),
    [
        (vit(12, 192, 3, classes=1000), 1.25),
        (vit(12, 384, 6, classes=1000), 4.60),
        (vit(12, 768, 12, classes=1000), 17.56),
        (vit(24, 1024, 16, classes=1000), 61.6),
    ],
    ids=["Ti", "S", "B", "L"],
)
def test_published_macs(spec: ViTSpec, gmacs: float) -> None:
    """LTMP spec, section 6: dense GMACs of DeiT-Ti, S, B and ViT-L at 224 px."""
    n, d = 197, spec.width
    ltmp = spec.depth * (4 * n * d**2 + 2 * n**2 * d + 8 * n * d**2) + 196 * 768 * d + d * 1000
    assert flops.macs(spec) == ltmp
    digits = 1 if gmacs == 61.6 else 2
    assert round(ltmp / 1e9, digits) == gmacs


def test_published_parameters_of_plain_models() -> None:
    assert params.count(vit(12, 192, 3, classes=1000)) == 5_717_416
    assert params.count(vit(12, 384, 6, classes=1000)) == 22_050_664
    assert params.count(vit(12, 768, 12, classes=1000)) == 86_567_656
    deit = vit(12, 192, 3, classes=1000, distill_token=True, pos_prefix=2)
    assert params.count(deit) == 5_910_800  # facebook/deit-tiny-distilled-patch16-224


CLIP = {"patch": 14, "norm_before": True, "patch_bias": False, "head_bias": False}

TOWERS = {
    "OpenCLIP-g": (vit(40, 1408, 16, mlp=6144, classes=1024, **CLIP), 1.013),
    "OpenCLIP-G": (vit(48, 1664, 16, mlp=8192, classes=1280, **CLIP), 1.845),
    # EVA adds a patch bias, has no key bias, and projects with a biased head.
    "EVA-CLIP-E+": (
        vit(64, 1792, 16, mlp=15360, patch=14, norm_position="post", key_bias=False, classes=1024),
        4.351,
    ),
    "EVA-CLIP-8B": (
        vit(32, 4096, 32, mlp=20480, patch=14, qkv_bias=False, norm="rmsnorm", classes=1280),
        7.526,
    ),
    # 5.903 B here; the published figure leaves out the position embedding (257 x 3200).
    "InternViT-6B": (
        vit(48, 3200, 25, mlp=12800, patch=14, norm="rmsnorm", qkv_bias=False, qk_norm="full", layer_scale=0.1,
            norm_after=False, pos="none"),
        5.902,
    ),
    "DINOv2-g": (
        vit(40, 1536, 24, mlp=4096, patch=14, image_size=518, activation="swiglu", layer_scale=1e-5),
        1.136,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOWERS)
def test_published_parameters_of_large_towers(name: str) -> None:
    """DGMR spec, section 3.1, in billions."""
    spec, billions = TOWERS[name]
    assert abs(params.count(spec) / 1e9 - billions) < 0.0006


def test_traced_parameters_of_a_large_tower() -> None:
    spec, _ = TOWERS["DINOv2-g"]
    tree = jax.eval_shape(ViT(dataclasses.replace(spec, blocks=spec.blocks[:2])).init, jax.random.key(0))
    assert params.count(tree) == params.count(dataclasses.replace(spec, blocks=spec.blocks[:2]))


def test_table_groups_equal_neighbours_and_keeps_the_order() -> None:
    spec = ViTSpec.uniform(**{**SMALL, "depth": 4}).edit(blocks={3: {"mlp": 8}})
    tree = jax.eval_shape(ViT(spec).init, jax.random.key(0))
    tree["ltmp"] = {"merge": jax.ShapeDtypeStruct((4,), jnp.bfloat16)}
    rows = params.table(tree)
    names = list(dict.fromkeys(row.name for row in rows))
    assert names == ["embed", "block_00..02", "block_03", "norm", "head", "ltmp"]
    assert sum(row.params for row in rows) == params.count(tree) == params.count(spec) + 4
    assert rows[-1] == params.Group("ltmp", "method", 1, 4, 4 / params.count(tree), 8e-6)
    assert sum(row.share for row in rows) == pytest.approx(1.0)


def test_blocks_beyond_99_stay_in_order() -> None:
    tree = {f"block_{i:02d}": {"mlp": {"up": {"bias": jnp.zeros(i + 1)}}} for i in (100, 99, 9, 10)}
    assert [row.name for row in params.table(tree)] == ["block_09", "block_10", "block_99", "block_100"]


def test_block_spec_without_uniform() -> None:
    spec = ViTSpec(image_size=(8, 8), patch=1, width=16, blocks=(BlockSpec(heads=2, head_dim=8, mlp=32),), channels=1)
    assert flops.macs(spec) == 64 * 16 + 4 * 65 * 256 + 2 * 65**2 * 16 + 2 * 65 * 16 * 32
