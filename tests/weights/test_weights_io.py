# SPDX-License-Identifier: Apache-2.0
"""Bad files: what is missing, extra, mis-shaped, damaged or of another kind, in one line, with nothing half-written."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.weights import oracles
from vtjax import weights
from vtjax.errors import InputError
from vtjax.weights import io, names


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.fixture
def folder(tmp_path):
    return oracles.read("timm_vit").write(tmp_path / "model")


def edit(folder, **changes):
    """Rewrites the folder's weights: a value of None drops a name."""
    tensors = {**oracles.read("timm_vit").tensors, **{k.replace("/", "."): v for k, v in changes.items()}}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


def test_every_missing_extra_and_misshaped_name_is_listed(folder):
    edit(
        folder,
        **{
            "blocks/0/attn/qkv/bias": None,
            "norm/weight": None,
            "head/weight": np.zeros((16, 5), np.float32),
            "fc_norm/weight": np.ones(16, np.float32),
        },
    )
    with pytest.raises(InputError) as error:
        weights.load(folder)
    text = one_line(error)
    assert "2 missing: norm.weight, blocks.0.attn.qkv.bias" in text
    assert "1 extra: fc_norm.weight" in text
    assert "1 mis-shaped: head.weight expected [5, 16] found [16, 5]" in text
    assert str(folder) in text


def test_long_lists_are_bounded_and_counted():
    expected = {f"n{i}": (1,) for i in range(25)}
    with pytest.raises(InputError) as error:
        names.check(expected, {}, "x")
    assert (
        "25 missing: n0, " in one_line(error) and "n19, and 5 more" in one_line(error) and "n20" not in str(error.value)
    )


def test_own_format_lists_its_names_too(folder, tmp_path):
    spec, params = weights.load(folder)
    with pytest.raises(InputError, match="1 missing: norm/scale; 1 mis-shaped: norm/bias expected"):
        weights.save(tmp_path / "x.safetensors", spec, {**params, "norm": {"bias": np.zeros(3)}})
    assert not (tmp_path / "x.safetensors").exists()
    flat = dict(names.flatten(params))
    del flat["head/bias"]
    save_file(flat, tmp_path / "y.safetensors", metadata={"format": "vtjax", "spec": spec.to_json()})
    with pytest.raises(InputError, match="1 missing: head/bias"):
        weights.load(tmp_path / "y.safetensors")
    save_file(flat, tmp_path / "z.safetensors", metadata={"format": "vtjax", "spec": "{"})
    with pytest.raises(InputError, match="must be JSON"):
        weights.load(tmp_path / "z.safetensors")
    save_file(flat, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="without a spec"):
        weights.load(tmp_path / "w.safetensors")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_types_are_widened(folder, dtype):
    tensors = {k: v.astype(dtype) for k, v in oracles.read("timm_vit").tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    _, params = weights.load(folder)
    for name, array in names.flatten(params):
        assert array.dtype == np.float32, name
    expected = tensors["blocks.1.mlp.fc2.weight"].astype(np.float32).T
    assert np.array_equal(params["block_01"]["mlp"]["down"]["kernel"], expected)


def test_whole_numbers_are_no_weights(folder):
    edit(folder, **{"head/bias": np.zeros(5, np.int32)})
    with pytest.raises(InputError, match="head.bias must hold floating-point numbers, found int32"):
        weights.load(folder)
    header = {"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}
    file = io.File(raw(folder / "f8.safetensors", header, b"ab"))
    with pytest.raises(InputError, match="a must be float32, float16 or bfloat16, found F8_E4M3"):
        file["a"]


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 100, -1, -4096])
def test_truncated_files(folder, cut):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match="truncated|not a safetensors file") as error:
        weights.load(folder)
    assert str(path) in one_line(error)


def test_trailing_bytes_and_gaps(tmp_path):
    entry = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
    with pytest.raises(InputError, match="expected 2 bytes of arrays, found 3"):
        io.File(raw(tmp_path / "a", {"x": entry}, b"123"))
    with pytest.raises(InputError, match="one after another"):
        io.File(raw(tmp_path / "b", {"x": entry, "y": {**entry, "data_offsets": [1, 3]}}, b"123"))
    assert io.File(raw(tmp_path / "c", {"x": entry}, b"12"))["x"].tolist() == [49, 50]
    assert len(io.File(raw(tmp_path / "d", {}))) == 0


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]},
        7,
    ],
)
def test_damaged_header_entries(tmp_path, entry):
    with pytest.raises(InputError, match="damaged: the header's entry of x"):
        io.File(raw(tmp_path / "m", {"x": entry}, b"1234"))


def test_duplicate_names(tmp_path):
    entry = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    with pytest.raises(InputError, match="x occurs twice in the header"):
        io.File(raw(tmp_path / "m", b'{"x":' + entry + b',"x":' + entry + b"}", b"1"))
    with pytest.raises(InputError, match="header is not JSON"):
        io.File(raw(tmp_path / "n", b"{oops}"))
    with pytest.raises(InputError, match="header must be an object"):
        io.File(raw(tmp_path / "o", b"[]"))


@pytest.mark.parametrize(
    "content, what",
    [
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "an HTML page"),
        (b"\n<html><head></head></html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (pickle.dumps({"a": 1}, protocol=2), "a pickle or an archive"),
    ],
)
def test_files_of_another_kind(folder, content, what):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=what) as error:
        weights.load(folder)
    one_line(error)


def test_pickles_are_refused(tmp_path, folder):
    for name in ("pytorch_model.bin", "model.pth", "model.pt"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(InputError, match="convert it to safetensors"):
            weights.load(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "renamed.safetensors", "w") as file:
        file.writestr("archive/data.pkl", b"")
    with pytest.raises(InputError, match="found a pickle or an archive"):
        weights.load(tmp_path / "renamed.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"only pytorch_model.bin.*convert it to safetensors"):
        weights.load(folder)


def test_folders_without_weights_or_config(folder, tmp_path):
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="must hold config.json"):
        weights.load(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match="model_type .* or architecture"):
        weights.load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match="must hold a JSON object, found list"):
        weights.load(folder)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "b.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="found a.safetensors, b.safetensors"):
        weights.load(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="found neither"):
        weights.load(empty)


@pytest.fixture
def sharded(tmp_path):
    """A Hugging Face folder in two shards, and its model in one file."""
    oracle = oracles.read("hf_clip")
    whole = oracle.write(tmp_path / "whole")
    folder = oracle.write(tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    ordered = sorted(oracle.tensors)
    files = {"model-00001-of-00002.safetensors": ordered[:11], "model-00002-of-00002.safetensors": ordered[11:]}
    for file, keys in files.items():
        save_file({k: oracle.tensors[k] for k in keys}, folder / file)
    index = {"metadata": {}, "weight_map": {k: file for file, keys in files.items() for k in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return whole, folder, index


def test_shards_are_one_model(sharded):
    whole, folder, _ = sharded
    (spec, params), (again, read) = weights.load(whole), weights.load(folder)
    assert spec == again
    assert {k: a.tobytes() for k, a in names.flatten(read)} == {k: a.tobytes() for k, a in names.flatten(params)}


def test_bad_shards(sharded):
    _, folder, index = sharded
    second = folder / "model-00002-of-00002.safetensors"
    good = second.read_bytes()
    second.unlink()
    with pytest.raises(InputError, match="lacks 1 of the shards .*model-00002"):
        weights.load(folder)
    second.write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    with pytest.raises(InputError, match="occurs twice: in .*00001.* and in .*00002"):
        weights.load(folder)
    second.write_bytes(good)
    index["weight_map"]["ghost"] = second.name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="the shards lack 1 names of model.safetensors.index.json: ghost"):
        weights.load(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="must hold a weight_map"):
        weights.load(folder)


def test_a_failed_save_leaves_the_old_file(folder, tmp_path, monkeypatch):
    spec, params = weights.load(folder)
    path = tmp_path / "m.safetensors"
    weights.save(path, spec, params)
    before = path.read_bytes()

    def half(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io, "save_file", half)
    with pytest.raises(InputError, match="cannot write .*No space left on device"):
        weights.save(path, spec, params)
    assert path.read_bytes() == before
    with pytest.raises(InputError, match="cannot write"):
        weights.save(tmp_path / "new", spec, params, "timm")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors", "model"]


def test_save_refuses_wrong_places(folder, tmp_path):
    spec, params = weights.load(folder)
    with pytest.raises(InputError, match="layout must be one of vtjax, timm, hf, found 'onnx'"):
        weights.save(tmp_path / "m.safetensors", spec, params, "onnx")
    with pytest.raises(InputError, match="must end in .safetensors"):
        weights.save(tmp_path / "m.npz", spec, params)
    with pytest.raises(InputError, match="must be a folder"):
        weights.save(tmp_path / "m.safetensors", spec, params, "hf")
    weights.save(tmp_path / "deep" / "er" / "m.safetensors", spec, params)
    with pytest.raises(InputError, match="exists"):
        weights.save(tmp_path / "deep" / "er" / "m.safetensors", spec, params, overwrite=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="must be a folder, found the other"):
        weights.save(tmp_path / "file", spec, params, "timm")
    with pytest.raises(InputError, match="cannot write"):
        weights.save(tmp_path / "file" / "m.safetensors", spec, params)
    (tmp_path / "dir.safetensors").mkdir()
    with pytest.raises(InputError, match="must be a file, found the other"):
        weights.save(tmp_path / "dir.safetensors", spec, params)


def test_bare_files_need_a_spec(folder, tmp_path):
    spec, params = weights.load(folder)
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match="says nothing about its architecture"):
        weights.load(bare)
    again, read = weights.load(bare, spec)
    assert again == spec and np.array_equal(read["head"]["kernel"], params["head"]["kernel"])
    with pytest.raises(InputError, match="mis-shaped: pos_embed expected"):
        weights.load(bare, spec.edit(image_size=(64, 64)))
    # The file inside a folder is as good as the folder.
    assert weights.load(folder / "model.safetensors")[0] == spec
    save_file({"conv1.weight": np.zeros((1, 1), np.float32)}, tmp_path / "resnet.safetensors")
    with pytest.raises(InputError, match="neither vtjax's, timm's, Hugging Face's nor GGUF's.*conv1.weight"):
        weights.load(tmp_path / "resnet.safetensors", spec)


def test_parameters_of_a_method_come_back_as_they_were(folder, tmp_path):
    spec, params = weights.load(folder)
    method = {"threshold": np.ones(2, np.float32), "router": {"kept": np.array([True, False]), "n": np.arange(2)}}
    _, read = weights.load(weights.save(tmp_path / "m.safetensors", spec, {**params, "ltmp": method}))
    assert read.keys() == {*params, "ltmp"}
    found = dict(names.flatten(read["ltmp"]))
    for name, array in names.flatten(method):
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array), name
    for layout in ("timm", "hf"):
        with pytest.raises(InputError, match="3 extra: ltmp/router/kept, ltmp/router/n, ltmp/threshold"):
            weights.save(tmp_path / layout, spec, {**params, "ltmp": method}, layout)
    for leaf in (None, [np.ones(2)], 1.0):
        with pytest.raises(InputError, match="must be arrays in nested dicts, found .* at ltmp/a"):
            weights.save(tmp_path / "x.safetensors", spec, {**params, "ltmp": {"a": leaf}})


def test_whole_numbers_are_no_weights_in_our_format_either(folder, tmp_path):
    spec, params = weights.load(folder)
    flat = {**dict(names.flatten(params)), "head/bias": np.zeros(5, np.int32)}
    save_file(flat, tmp_path / "m.safetensors", metadata={"format": "vtjax", "spec": spec.to_json()})
    with pytest.raises(InputError, match="head/bias must hold floating-point numbers, found int32"):
        weights.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "name, change, says",
    [
        ("hf_vit", {"patch_size": 0}, "malformed"),
        ("hf_vit", {"num_channels": 3.5}, "ViTSpec.channels must be int, found 3.5"),
        ("hf_vit", {"hidden_size": True, "num_attention_heads": 1}, "ViTSpec.width must be int, found True"),
    ],
)
def test_configs_with_values_of_other_types(tmp_path, name, change, says):
    oracle = oracles.read(name)
    oracle.config.update(change)
    with pytest.raises(InputError, match=says) as error:
        weights.load(oracle.write(tmp_path / "m"))
    assert str(tmp_path / "m") in one_line(error)


def test_nulls_in_a_timm_config_are_defaults(tmp_path):
    oracle = oracles.read("timm_vit")
    expected = weights.load(oracle.write(tmp_path / "a"))[0]
    oracle.config["pretrained_cfg"] = {"crop_pct": None, "crop_mode": None, "mean": None, "std": None}
    assert weights.load(oracle.write(tmp_path / "b"))[0].preprocess.mean == expected.preprocess.mean
