# SPDX-License-Identifier: Apache-2.0
"""Tiny random language models of every family, recorded from transformers: names, bits, outputs, configs."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import vtjax
from vtjax import weights
from vtjax.errors import InputError
from vtjax.spec import LMSpec, RopeScaling
from vtjax.weights import hf_lm, names
from vtjax.weights.tables import TABLES

ORACLE = Path(__file__).resolve().parents[1] / "oracle"
LLAMA3 = RopeScaling("llama3", 4.0, 1.0, 4.0, 16)
EXPECTED = {
    "llama": {"tied": False, "eps": 1e-5, "eos": (3,), "context": 64, "rope_base": 10_000.0},
    "llama3": {
        "tied": True,
        "out_bias": True,
        "mlp_bias": True,
        "rope_scaling": RopeScaling("llama3", 4.0, 1.0, 4.0, 16),
    },
    "qwen2": {"qkv_bias": True, "out_bias": False, "eos": (3, 4)},
    "qwen3": {"qk_norm": "head", "qkv_bias": False},
}


@pytest.fixture(scope="module", params=EXPECTED)
def recorded(request, tmp_path_factory):
    """(name, arrays, folder as transformers would write it)."""
    with np.load(ORACLE / f"lm_{request.param}.npz") as data:
        arrays = {name: data[name] for name in data.files}
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "config.json").write_text(str(arrays["config"]))
    save_file({n[2:]: a for n, a in arrays.items() if n.startswith("w:")}, folder / "model.safetensors")
    return request.param, arrays, folder


def test_spec_names_and_bits(recorded):
    name, arrays, folder = recorded
    spec, params = weights.load(folder)
    for field, value in EXPECTED[name].items():
        assert getattr(spec, field) == value, field
    assert spec.blocks[0].kv_heads == 2 and spec.blocks[0].head_dim == (8 if name == "qwen3" else 4)
    back = names.to_foreign(spec, params, TABLES["hf_decoder"], "model.")
    assert {f"w:{n}" for n in back} == {n for n in arrays if n.startswith("w:")}
    for key, array in back.items():
        assert array.tobytes() == arrays[f"w:{key}"].tobytes(), key


def test_logits_are_those_of_transformers_padded_left_and_right(recorded):
    _, arrays, folder = recorded
    m = vtjax.load(folder)
    apply = jax.jit(lambda p, ids, mask: m.apply(p, ids, mask)[0])
    for side in ("left", "right"):
        mask = arrays[f"{side}_mask"]
        y = np.asarray(apply(m.params, arrays["input_ids"], mask)) * mask[..., None]
        # Two orders of summation in float32, on logits that reach 10.
        np.testing.assert_allclose(y, arrays[f"{side}_logits"], rtol=0, atol=5e-5)


def test_what_we_write_for_transformers_is_read_again(recorded, tmp_path):
    _, _, folder = recorded
    spec, params = weights.load(folder)
    weights.save(tmp_path / "hf", spec, params, layout="hf")
    again, read = weights.load(tmp_path / "hf")
    assert again == spec
    for (name, a), (_, b) in zip(names.flatten(params), names.flatten(read), strict=True):
        assert a.tobytes() == b.tobytes(), name
    with pytest.raises(InputError, match="timm has no language models"):
        weights.save(tmp_path / "timm", spec, params, layout="timm")


def config(**changes):
    base = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    return {**base, "num_attention_heads": 4, "max_position_embeddings": 64, **changes}


def test_configs_of_older_releases():
    spec = hf_lm.spec_from_config(config(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2}), "x")
    assert spec.rope_base == 5e5 and spec.rope_scaling == RopeScaling("linear", 2.0) and spec.blocks[0].kv_heads == 4
    both = hf_lm.spec_from_config(config(eos_token_id=2), "x", {"eos_token_id": [7, 2]})
    assert both.eos == (7, 2) and hf_lm.spec_from_config(config(eos_token_id=None), "x").eos == ()


@pytest.mark.parametrize(
    "changes,says",
    [
        ({"hidden_act": "gelu"}, "x: hidden_act must be one of silu, found 'gelu'"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window=True .* cannot be described"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "x: rope_type must be one of default, linear, llama3, found 'yarn'"),
        ({"num_key_value_heads": 3}, r"blocks\[0\].kv_heads must divide heads=4, found 3"),
    ],
)
def test_what_a_spec_cannot_say_is_refused_by_name(changes, says):
    with pytest.raises(InputError, match=says):
        hf_lm.spec_from_config(config(**changes), "x")


def test_what_a_config_cannot_say_is_refused_by_name(tmp_path):
    spec = hf_lm.spec_from_config(config(), "x")
    with pytest.raises(InputError, match=r"llama config cannot express blocks\[1\].mlp=8 \(it would give 24\)"):
        hf_lm.config(spec.edit(blocks={1: {"mlp": 8}}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="model_type must be one of vit, .*llama, qwen2, qwen3, .*found 'gpt2'"):
        weights.load(tmp_path)


def test_a_sharded_folder_and_a_malformed_config(tmp_path):
    spec = LMSpec.uniform(depth=1, width=16, heads=4, mlp=8, vocab=32)
    rng = np.random.default_rng(0)
    flat = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in names.shapes(spec).items()}
    foreign = names.to_foreign(spec, names.unflatten(flat), TABLES["hf_decoder"], "model.")
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(foreign)}
    for file in set(files.values()):
        save_file({n: a for n, a in foreign.items() if files[n] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (tmp_path / "config.json").write_text(json.dumps(hf_lm.config(spec)))
    found, read = weights.load(tmp_path)
    assert found == spec
    assert {n: a.tobytes() for n, a in names.flatten(read)} == {n: a.tobytes() for n, a in flat.items()}
    (tmp_path / "config.json").write_text(json.dumps({**config(), "rope_parameters": {"rope_type": "llama3"}}))
    with pytest.raises(InputError, match=r"config.json is malformed \(KeyError: 'low_freq_factor'\)"):
        weights.load(tmp_path)
