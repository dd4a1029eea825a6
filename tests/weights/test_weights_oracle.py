# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every family, recorded from timm and transformers: names, bits, outputs."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors import safe_open

from tests.weights import oracles
from vtjax import weights
from vtjax.errors import InputError
from vtjax.models.vit import ViT
from vtjax.weights import names
from vtjax.weights.tables import TABLES

MEANINGLESS = {"embeddings.mask_token", "pooler.dense.weight", "pooler.dense.bias"}
"""Arrays of the recorded files that no output depends on."""

EXPECTED = {
    "timm_vit": {"pooling": "class", "classes": 5, "activation": "gelu", "eps": 1e-6},
    "timm_vit_mean": {"pooling": "mean", "fc_norm": True, "norm_after": False, "image_size": (24, 40)},
    "timm_deit_distilled": {"distill_token": True, "pos_prefix": 2},
    "timm_dinov2": {"classes": 0, "pos_prefix": 1},
    "timm_dinov2_reg4": {"registers": 4, "pos_prefix": 0},
    "timm_dinov2_swiglu": {"activation": "swiglu"},
    "timm_clip": {"norm_before": True, "patch_bias": False, "activation": "quick_gelu", "eps": 1e-5},
    "timm_siglip": {"pooling": "attention", "class_token": False, "activation": "gelu_tanh", "pool_mlp": 32},
    "timm_qk_norm": {"qk_norm": "head", "qkv_bias": False},
    "timm_eva_post": {"norm_position": "post", "key_bias": False, "qkv_bias": True},
    "timm_eva_split": {"mlp_norm": True, "activation": "swiglu", "key_bias": False, "fc_norm": True},
    "hf_vit": {"classes": 5, "eps": 1e-12},
    "hf_vit_backbone": {"classes": 0, "image_size": (24, 40)},
    "hf_deit": {"registers": 1, "pos_prefix": 2, "distill_token": False},
    "hf_deit_distilled": {"distill_token": True, "classes": 5},
    "hf_dinov2": {"pooling": "class", "classes": 0},
    "hf_dinov2_reg4": {"registers": 4, "pos_prefix": 1},
    "hf_dinov2_swiglu": {"activation": "swiglu"},
    "hf_clip": {"head_bias": False, "classes": 7, "norm_before": True, "activation": "quick_gelu"},
    "hf_siglip": {"pooling": "attention", "pos_prefix": 0, "activation": "gelu_tanh"},
    "intern": {"norm": "rmsnorm", "qk_norm": "full", "norm_after": False, "layer_scale": 0.1},
}

REFUSED = {
    ("timm_clip", "hf"): "head_bias",  # its projection has a bias that is not zero
    ("timm_vit_mean", "hf"): "norm_after",
    ("timm_qk_norm", "hf"): "qk_norm",
    ("timm_eva_post", "hf"): "norm_position",
    ("timm_eva_split", "hf"): "dinov2",
    ("hf_vit", "timm"): "eps",
    ("hf_vit_backbone", "timm"): "eps",
    ("hf_deit", "timm"): "eps",
    ("hf_deit_distilled", "timm"): "eps",
    ("intern", "timm"): "qk_norm",
    ("intern", "hf"): "rmsnorm",
}
"""(model, folder layout): the word that the refusal must hold."""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """`loaded(name)`: (oracle, folder, spec, params), read once."""
    cache = {}

    def get(name):
        if name not in cache:
            oracle = oracles.read(name)
            folder = oracle.write(tmp_path_factory.mktemp(name) / name)
            cache[name] = (oracle, folder, *weights.load(folder))
        return cache[name]

    return get


def test_every_family_is_recorded():
    assert set(oracles.NAMES) == set(EXPECTED)


@pytest.mark.parametrize("name", oracles.NAMES)
def test_spec_and_names(loaded, name):
    oracle, _, spec, params = loaded(name)
    for field, value in EXPECTED[name].items():
        assert getattr(spec, field) == value, field
    if name.startswith("timm_dinov2") or name == "timm_eva_split":
        assert spec.layer_scale is not None
    flat = dict(names.flatten(params))
    assert {k: a.shape for k, a in flat.items()} == names.shapes(spec)
    assert all(a.dtype == np.float32 and a.flags.c_contiguous and a.flags.owndata for a in flat.values())
    model = jax.eval_shape(ViT(spec).init, jax.random.key(0))
    assert {k: a.shape for k, a in names.flatten(model)} == names.shapes(spec)


@pytest.mark.parametrize("name", oracles.NAMES)
def test_export_is_the_inverse_of_import(loaded, name):
    oracle, _, spec, params = loaded(name)
    table, prefix = names.find_table(oracle.tensors)
    back = names.to_foreign(spec, params, TABLES[table], prefix)
    meaningful = set(oracle.tensors) - MEANINGLESS
    assert set(back) - MEANINGLESS == meaningful
    for key in meaningful:
        assert back[key].dtype == oracle.tensors[key].dtype
        assert back[key].shape == oracle.tensors[key].shape
        assert back[key].tobytes() == oracle.tensors[key].tobytes(), key


@pytest.mark.parametrize("name", oracles.NAMES)
def test_model_reproduces_the_recorded_outputs(loaded, name):
    oracle, _, spec, params = loaded(name)
    y, aux = jax.jit(ViT(spec).apply)(params, oracle.images)
    np.testing.assert_allclose(y, oracle.logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(aux["features"], oracle.features, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", ["timm", "hf"])
@pytest.mark.parametrize("name", oracles.NAMES)
def test_folders_of_the_other_libraries(loaded, tmp_path, name, layout):
    _, _, spec, params = loaded(name)
    target = tmp_path / "out"
    if (name, layout) in REFUSED:
        with pytest.raises(InputError, match=REFUSED[name, layout]) as error:
            weights.save(target, spec, params, layout)
        assert "\n" not in str(error.value)
        assert list(tmp_path.iterdir()) == []
        return
    weights.save(target, spec, params, layout)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    again, read = weights.load(target)
    # A position row that only one library has is the one permitted difference.
    spec, params = names.with_pos_prefix(spec, params, again.pos_prefix)
    spec, params = names.with_head_bias(spec, params, again.head_bias)
    assert again.edit(preprocess=spec.preprocess) == spec
    wanted = dict(names.flatten(params))
    for key, array in names.flatten(read):
        assert array.tobytes() == np.asarray(wanted[key], np.float32).tobytes(), key


def test_position_rows_move_without_changing_the_function(loaded):
    oracle, _, spec, params = loaded("hf_dinov2_reg4")
    folded = names.with_pos_prefix(spec, params, 0)
    assert folded[0].pos_prefix == 0
    assert np.array_equal(folded[1]["embed"]["class_token"], params["embed"]["class_token"] + params["embed"]["pos"][0])
    assert params["embed"]["pos"].shape[0] == 17  # the input is not changed
    widened = names.with_pos_prefix(spec, params, 3)
    for changed, tree in (folded, widened):
        y, _ = jax.jit(ViT(changed).apply)(tree, oracle.images)
        np.testing.assert_allclose(y, oracle.logits, rtol=0, atol=1e-5)


def test_folding_reaches_the_distillation_token_and_the_registers(loaded):
    _, _, spec, params = loaded("timm_deit_distilled")
    folded = names.with_pos_prefix(spec, params, 0)[1]["embed"]
    assert np.array_equal(folded["distill_token"], params["embed"]["distill_token"] + params["embed"]["pos"][1])
    _, _, spec, params = loaded("hf_deit")
    folded = names.with_pos_prefix(spec, params, 1)[1]["embed"]
    assert np.array_equal(folded["registers"][0], params["embed"]["registers"][0] + params["embed"]["pos"][1])


@pytest.mark.parametrize("name", ["timm_vit", "hf_clip", "timm_eva_split", "intern"])
def test_own_format(loaded, tmp_path, name):
    _, _, spec, params = loaded(name)
    path = tmp_path / "model.safetensors"
    method = {"thresholds": np.arange(2, dtype=np.float32), "count": np.array([3], np.int64)}
    weights.save(path, spec, {**params, "ltmp": method})
    with safe_open(path, "np") as file:
        assert file.metadata()["format"] == "vtjax"
        assert json.loads(file.metadata()["spec"])["format"] == 1
        assert "block_00/attn/query/kernel" in file.keys()  # noqa: SIM118 (a safetensors handle is no mapping)
    again, read = weights.load(path)
    assert again == spec
    assert read.pop("ltmp")["count"].dtype == np.int64
    wanted = dict(names.flatten(params))
    assert {k: a.tobytes() for k, a in names.flatten(read)} == {k: a.tobytes() for k, a in wanted.items()}
    with pytest.raises(InputError, match="1 extra: ltmp/thresholds"):
        weights.save(
            tmp_path / "timm.safetensors", spec, {**params, "ltmp": {"thresholds": method["thresholds"]}}, "timm"
        )


def test_jax_arrays_and_half_precision_are_saved_as_float32(loaded, tmp_path):
    import jax.numpy as jnp

    _, _, spec, params = loaded("timm_vit")
    half = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), params)
    weights.save(tmp_path / "m.safetensors", spec, half)
    _, read = weights.load(tmp_path / "m.safetensors")
    kernel = np.asarray(half["head"]["kernel"], np.float32)
    assert read["head"]["kernel"].dtype == np.float32
    assert np.array_equal(read["head"]["kernel"], kernel)


def test_pruned_widths_survive_our_format_and_are_refused_elsewhere(loaded, tmp_path):
    _, _, spec, params = loaded("timm_vit")
    narrow = spec.edit(blocks={1: {"mlp": 10}})
    block = params["block_01"]
    mlp = {
        "up": {"kernel": block["mlp"]["up"]["kernel"][:, :10], "bias": block["mlp"]["up"]["bias"][:10]},
        "down": {"kernel": block["mlp"]["down"]["kernel"][:10], "bias": block["mlp"]["down"]["bias"]},
    }
    pruned = {**params, "block_01": {**block, "mlp": mlp}}
    weights.save(tmp_path / "p.safetensors", narrow, pruned)
    assert weights.load(tmp_path / "p.safetensors")[0] == narrow
    with pytest.raises(InputError, match=r"blocks\[1\].mlp=10"):
        weights.save(tmp_path / "folder", narrow, pruned, "timm")
    removed = spec.edit(blocks={0: {"attn": False, "ffn": False, "adapter": 4}})
    assert names.shapes(removed)["block_00/adapter/down/kernel"] == (16, 4)
    model = jax.eval_shape(ViT(removed).init, jax.random.key(0))
    assert {k: a.shape for k, a in names.flatten(model)} == names.shapes(removed)


def test_pretrained_vit_ti16(shared_data):
    path = shared_data("vit_ti16_augreg.safetensors")
    spec, params = weights.load("vit_ti16_augreg")
    assert (spec.width, spec.depth, spec.patch, spec.image_size, spec.classes) == (192, 12, 16, (224, 224), 1000)
    assert sum(a.size for _, a in names.flatten(params)) == 5_717_416
    assert int(spec.image_size[0] / spec.preprocess.crop) == 248
    assert spec.preprocess.mean == (0.5, 0.5, 0.5) and spec.preprocess.interpolation == "bicubic"
    with pytest.raises(InputError, match="says nothing about its architecture"):
        weights.load(path)
    with safe_open(path, "np") as file:
        qkv = file.get_tensor("blocks.3.attn.qkv.weight")
    assert np.array_equal(params["block_03"]["attn"]["key"]["kernel"], qkv[192:384].T)
