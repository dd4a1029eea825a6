# SPDX-License-Identifier: Apache-2.0
"""Position embeddings at other resolutions, against torch."""

from __future__ import annotations

import numpy as np
import pytest

from tests.weights import oracles
from vtjax import weights
from vtjax.errors import InputError
from vtjax.spec import ViTSpec
from vtjax.weights import resample


def cases():
    with np.load(oracles.ORACLE / "resample.npz") as data:
        sources = {k.split(":")[1]: (int(k.split(":")[2]), data[k]) for k in data.files if k.startswith("pos:")}
        for key in data.files:
            if key.startswith(("timm:", "hf:")):
                method, old, new = key.split(":")
                prefix, pos = sources[old]
                grids = tuple(tuple(map(int, g.split("x"))) for g in (old, new))
                yield pytest.param(method, grids, prefix, pos, data[key], id=key)


@pytest.mark.parametrize("method, grids, prefix, pos, expected", list(cases()))
def test_equals_torch(method, grids, prefix, pos, expected):
    found = resample.position_embedding(pos, prefix, *grids, method)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.array_equal(found[:prefix], pos[:prefix])


@pytest.mark.parametrize("method", resample.METHODS)
@pytest.mark.parametrize("old, new", [(7, 7), (1, 4), (14, 3), (3, 14)])
def test_weights_sum_to_one(method, old, new):
    m = resample.matrix(old, new, method)
    np.testing.assert_allclose(m.sum(1), 1, atol=1e-12)
    if old == new:
        np.testing.assert_allclose(m, np.eye(old), atol=1e-12)


def test_resize_edits_spec_and_position_embedding_only():
    spec = ViTSpec.uniform(depth=1, width=4, heads=1, image_size=32, patch=8, classes=2)
    rng = np.random.default_rng(0)
    pos = rng.normal(size=(17, 4)).astype(np.float32)
    params = {"embed": {"pos": pos, "class_token": np.zeros(4, np.float32)}, "head": {"kernel": np.zeros((4, 2))}}
    resized, out = weights.resize(spec, params, image_size=(24, 48))
    assert resized.grid == (3, 6) and resized.edit(image_size=(32, 32)) == spec
    assert out["embed"]["pos"].shape == (19, 4)
    assert out["head"] is params["head"] and params["embed"]["pos"] is pos
    assert np.array_equal(out["embed"]["pos"], resample.position_embedding(pos, 1, (4, 4), (3, 6)))
    # A transposed grid has as many tokens and is another embedding.
    wide, a = weights.resize(spec, params, (16, 64))
    _, b = weights.resize(wide, a, (64, 16))
    assert a["embed"]["pos"].shape == b["embed"]["pos"].shape and not np.allclose(a["embed"]["pos"], b["embed"]["pos"])
    assert weights.resize(spec, params, 32) == (spec, params)
    hf = weights.resize(spec, params, (24, 48), method="hf")[1]["embed"]["pos"]
    assert not np.allclose(hf, out["embed"]["pos"], atol=1e-3)


def test_resize_without_learned_positions_keeps_the_parameters():
    spec = ViTSpec.uniform(depth=1, width=4, heads=1, image_size=32, patch=8, pos="sincos2d")
    params = {"embed": {"class_token": np.zeros(4, np.float32)}}
    resized, out = weights.resize(spec, params, 64)
    assert resized.image_size == (64, 64) and out is params


@pytest.mark.parametrize("size", [30, (32, 0), (-8, 32)])
def test_resize_refuses_bad_sizes(size):
    spec = ViTSpec.uniform(depth=1, width=4, heads=1, image_size=32, patch=8)
    with pytest.raises(InputError, match="multiple of patch=8"):
        weights.resize(spec, {"embed": {}}, size)
    with pytest.raises(InputError, match="method must be one of timm, hf, found 'nearest'"):
        weights.resize(spec, {"embed": {}}, 64, method="nearest")
