# SPDX-License-Identifier: Apache-2.0
"""Named weights: the search path, the hub, and the lines that say how to get what is missing."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
import types

import pytest

from tests.weights import oracles
from vtjax import weights
from vtjax.errors import InputError
from vtjax.weights import registry


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Two folders on VTJAX_DATA and an empty cache."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setenv("VTJAX_DATA", ":".join(map(str, folders)))
    monkeypatch.setenv("VTJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return folders


def without_hub(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "huggingface_hub" else find(n, *a))


def with_hub(monkeypatch, download):
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=download))
    find = importlib.util.find_spec
    here = importlib.util.spec_from_loader("huggingface_hub", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: here if n == "huggingface_hub" else find(n, *a))


def test_search_order(data):
    for folder, content in zip(data, (b"first", b"second"), strict=True):
        (folder / "vit_s16_augreg.safetensors").write_bytes(content)
    assert registry.resolve("vit_s16_augreg") == data[0] / "vit_s16_augreg.safetensors"
    (data[0] / "vit_s16_augreg.safetensors").unlink()
    assert registry.resolve("vit_s16_augreg") == data[1] / "vit_s16_augreg.safetensors"


@pytest.mark.parametrize("place", ["dinov2_s14", "dinov2-small", "facebook/dinov2-small"])
@pytest.mark.parametrize("name", ["dinov2_s14", "facebook/dinov2-small"])
def test_folders_are_found_by_name_and_hub_id(data, place, name, monkeypatch):
    without_hub(monkeypatch)
    oracles.read("hf_dinov2").write(data[1] / place)
    if name == "facebook/dinov2-small" and place == "dinov2_s14":
        with pytest.raises(InputError, match="were not found"):
            weights.load(name)
    else:
        assert weights.load(name)[0].layer_scale == 1.0


def test_missing_without_the_hub_says_where_and_how(data, monkeypatch):
    without_hub(monkeypatch)
    with pytest.raises(InputError) as error:
        weights.load("clip_b32")
    text = str(error.value)
    assert "\n" not in text
    for part in (*map(str, data), "VTJAX_DATA", "openai/clip-vit-base-patch32", "vtjax[hub]"):
        assert part in text


def test_unknown_names_get_a_suggestion(data):
    with pytest.raises(InputError, match="did you mean 'vit_ti16_augreg'"):
        weights.load("vit_ti16_augre")
    with pytest.raises(InputError, match="known names: vit_ti16_augreg, "):
        weights.load("qqqq")
    for path in ("runs/x.safetensors", "./a/b", "/nowhere/at/all"):
        with pytest.raises(InputError, match="do not exist, neither as a path nor in"):
            weights.load(path)


def test_hub_download(data, tmp_path, monkeypatch):
    calls = []

    def download(repo, allow_patterns):
        calls.append((repo, allow_patterns))
        return str(oracles.read("timm_vit").write(tmp_path / "snapshot"))

    with_hub(monkeypatch, download)
    assert weights.load("vit_s16_augreg")[0].width == 16
    assert calls[0][0] == "timm/vit_small_patch16_224.augreg_in21k_ft_in1k"
    assert "config.json" in calls[0][1] and not any("bin" in pattern for pattern in calls[0][1])
    weights.load("someone/model")
    assert calls[1][0] == "someone/model"


def test_hub_failure_is_one_line(data, monkeypatch):
    def download(repo, allow_patterns):
        raise ConnectionError("no route\nto host")

    with_hub(monkeypatch, download)
    with pytest.raises(
        InputError, match="the hub did not give google/siglip.*ConnectionError: no route to host"
    ) as error:
        weights.load("siglip_b16")
    assert "\n" not in str(error.value)


def test_damaged_named_file(data):
    (data[0] / "vit_ti16_augreg.safetensors").write_bytes(b"something else")
    with pytest.raises(InputError, match="expected sha256 3f1f07da.*found") as error:
        weights.load("vit_ti16_augreg")
    assert hashlib.sha256(b"something else").hexdigest() in str(error.value)


def test_named_bare_file_brings_its_spec(data, monkeypatch):
    spec, params = weights.load(oracles.read("timm_vit").write(data[0] / "src"))
    monkeypatch.setitem(registry.NAMED, "mine", registry.Named("me/mine", "vit_tiny_patch16_224"))
    weights.save(data[1] / "mine.safetensors", spec, params, "timm")
    with pytest.raises(InputError, match="do not fit the spec"):  # a ViT-Ti's spec, but a smaller model's arrays
        weights.load("mine")
    assert weights.load("mine", spec)[0] == spec
    # A file that carries its own spec is believed.
    weights.save(data[1] / "mine.safetensors", spec, params)
    assert weights.load("mine")[0] == spec
    shutil.move(data[1] / "mine.safetensors", data[1] / "other.safetensors")
    assert weights.load("other.safetensors")[0] == spec


def test_registry_entries_are_sound():
    for name, entry in registry.NAMED.items():
        assert registry._HUB_ID.fullmatch(entry.hub), name
        if entry.architecture:
            spec = entry.spec()
            assert spec is not None and spec.classes == 1000
            assert entry.hub.startswith(f"timm/{entry.architecture}.")
