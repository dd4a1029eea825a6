# SPDX-License-Identifier: Apache-2.0
"""Conversion with a replay: all layouts, and nothing written where something is wrong."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.weights import oracles
from vtjax import weights
from vtjax.errors import InputError
from vtjax.models.vit import ViT
from vtjax.weights.convert import convert


def forward(spec):
    return jax.jit(ViT(spec).apply)


def replay(oracle):
    """A model that gives what was recorded, for what needs no real one."""
    return lambda spec: lambda params, images: (oracle.logits, {"features": oracle.features})


def check_file(path, oracle, **changes):
    np.savez(path, **{"images": oracle.images, "logits": oracle.logits, "features": oracle.features, **changes})
    return path


@pytest.fixture
def oracle():
    return oracles.read("hf_vit")


@pytest.fixture
def src(oracle, tmp_path):
    return oracle.write(tmp_path / "src")


def test_round_trip_through_all_layouts(tmp_path):
    oracle = oracles.read("timm_dinov2_reg4")
    src = oracle.write(tmp_path / "timm")
    io_file = check_file(tmp_path / "io.npz", oracle)
    first = convert(src, tmp_path / "model", check=io_file, apply=forward)
    assert first["passed"] and first["written"] and first["max_abs_diff"] <= 1e-5
    assert set(first["differences"]) == {"logits", "features"}
    assert first["dst"] == str(tmp_path / "model.safetensors")
    second = convert(first["dst"], tmp_path / "hf", layout="hf", check=io_file, apply=forward)
    third = convert(second["dst"], tmp_path / "back", layout="timm", check=io_file, apply=forward)
    assert third["max_abs_diff"] <= 1e-5 and third["params"] == first["params"] + 16  # Hugging Face's zero position row
    a, b = (dict(weights.names.flatten(weights.load(p)[1])) for p in (src, tmp_path / "back"))
    assert all(np.array_equal(a[k], b[k]) for k in a) and a.keys() == b.keys()


def test_a_failed_check_writes_nothing(oracle, src, tmp_path):
    wrong = check_file(tmp_path / "io.npz", oracle, logits=oracle.logits + np.float32(0.01))
    result = convert(src, tmp_path / "out", check=wrong, apply=replay(oracle))
    assert not result["passed"] and not result["written"]
    assert result["max_abs_diff"] == pytest.approx(0.01, abs=1e-6)
    assert not (tmp_path / "out.safetensors").exists()
    assert convert(src, tmp_path / "out", check=wrong, apply=replay(oracle), atol=0.02)["written"]


def test_a_model_that_gives_nan_fails_the_check(oracle, src, tmp_path):
    def broken(spec):
        return lambda params, images: (np.full((2, 5), np.nan), {"features": oracle.features})

    result = convert(src, tmp_path / "out", check=check_file(tmp_path / "io.npz", oracle), apply=broken)
    assert result["max_abs_diff"] is None and result["differences"]["features"] == 0.0
    assert not result["passed"] and not (tmp_path / "out.safetensors").exists()


def test_refusals_come_before_any_work(oracle, src, tmp_path):
    dst = tmp_path / "out.safetensors"
    convert(src, dst)
    before = dst.read_bytes()
    with pytest.raises(InputError, match="exists; .* --overwrite"):
        convert(src, dst)
    assert dst.read_bytes() == before
    convert(src, dst, overwrite=True)
    for same in (dst, tmp_path / "src" / ".." / "out.safetensors", tmp_path / "out"):
        with pytest.raises(InputError, match="source and destination are the same"):
            convert(dst, same, overwrite=True)
    with pytest.raises(InputError, match="source and destination are the same"):
        convert(src, src, layout="hf", overwrite=True)
    with pytest.raises(InputError, match="source and destination are the same"):
        convert(src, src / "model.safetensors", overwrite=True)
    with pytest.raises(InputError, match="source and destination are the same"):
        convert(src / "model.safetensors", src, layout="timm", overwrite=True)
    with pytest.raises(InputError, match="needs a model"):
        convert(src, tmp_path / "n", check=tmp_path / "io.npz")
    with pytest.raises(InputError, match="layout must be one of"):
        convert(src, tmp_path / "n", layout="gguf")
    assert not list(tmp_path.glob("n*"))


def test_a_named_source_is_not_overwritten_either(src, tmp_path, monkeypatch):
    monkeypatch.setenv("VTJAX_DATA", str(tmp_path))
    convert(src, tmp_path / "vit_s16_augreg")
    before = (tmp_path / "vit_s16_augreg.safetensors").read_bytes()
    with pytest.raises(InputError, match="source and destination are the same"):
        convert("vit_s16_augreg", tmp_path / "vit_s16_augreg", overwrite=True)
    assert (tmp_path / "vit_s16_augreg.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "change, word",
    [
        ({"images": np.zeros((2, 3, 32, 32), np.float32)}, r"images must be \[B, 32, 32, 3\], found \[2, 3, 32, 32\]"),
        ({"logits": np.zeros((2, 6), np.float32)}, r"logits have another shape: expected \[2, 6\], found \[2, 5\]"),
    ],
)
def test_checks_of_another_shape(oracle, src, tmp_path, change, word):
    with pytest.raises(InputError, match=word):
        convert(src, tmp_path / "out", check=check_file(tmp_path / "io.npz", oracle, **change), apply=replay(oracle))
    assert not (tmp_path / "out.safetensors").exists()


def test_checks_that_cannot_be_read(oracle, src, tmp_path):
    with pytest.raises(InputError, match="cannot read .*missing.npz"):
        convert(src, tmp_path / "out", check=tmp_path / "missing.npz", apply=replay(oracle))
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(InputError, match="must be an npz file"):
        convert(src, tmp_path / "out", check=tmp_path / "text.npz", apply=replay(oracle))
    np.savez(tmp_path / "lone.npz", images=oracle.images)
    with pytest.raises(InputError, match="must hold images and logits or features, found images"):
        convert(src, tmp_path / "out", check=tmp_path / "lone.npz", apply=replay(oracle))
    np.save(tmp_path / "array.npy", oracle.images)
    with pytest.raises(InputError, match="must be an npz file"):
        convert(src, tmp_path / "out", check=tmp_path / "array.npy", apply=replay(oracle))


def test_bare_source_with_a_spec_file(oracle, src, tmp_path):
    spec, params = weights.load(src)
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes((src / "model.safetensors").read_bytes())
    (tmp_path / "spec.json").write_text(spec.to_json())
    convert(bare, tmp_path / "out", tmp_path / "spec.json")
    again, read = weights.load(tmp_path / "out.safetensors")
    assert again == spec and np.array_equal(read["head"]["bias"], params["head"]["bias"])
    with pytest.raises(InputError, match="cannot read the spec"):
        convert(bare, tmp_path / "n", tmp_path / "nowhere.json")
    (tmp_path / "spec.json").write_text('{"format": 2}')
    with pytest.raises(InputError, match="spec format must be 1, found 2"):
        convert(bare, tmp_path / "n", tmp_path / "spec.json")
    assert not (tmp_path / "n.safetensors").exists()
