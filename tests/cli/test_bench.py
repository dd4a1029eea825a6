# SPDX-License-Identifier: Apache-2.0
"""`vtjax bench`: a model with half of its hidden neurons beside the whole one; rates; bad input."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from vtjax import weights
from vtjax.account import bench, flops, timing
from vtjax.models.vit import ViT
from vtjax.spec import ViTSpec

ROOT = Path(__file__).resolve().parents[2]
TINY = f"--config={ROOT / 'configs' / 'vit.py'}:tiny,batch_size=4"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, ViTSpec, ViTSpec]:
    """Two weight files: a tiny model, and the same with a quarter of its hidden neurons in block 1."""
    folder = tmp_path_factory.mktemp("bench")
    dense = ViTSpec.uniform(depth=2, width=32, heads=2, mlp=64, image_size=16, patch=4, classes=10)
    params = jax.tree.map(np.asarray, jax.jit(ViT(dense).init)(jax.random.key(0)))
    pruned = dense.edit(blocks={1: {"mlp": 16}})
    mlp = params["block_01"]["mlp"]
    up = {"kernel": mlp["up"]["kernel"][:, :16], "bias": mlp["up"]["bias"][:16]}
    down = {"kernel": mlp["down"]["kernel"][:16], "bias": mlp["down"]["bias"]}
    less = {**params, "block_01": {**params["block_01"], "mlp": {"up": up, "down": down}}}
    weights.save(folder / "dense.safetensors", dense, params)
    weights.save(folder / "pruned.safetensors", pruned, less)
    return folder / "dense.safetensors", folder / "pruned.safetensors", dense, pruned


def test_a_pruned_model_beside_the_one_before(vtjax, pair):
    dense, pruned, dense_spec, pruned_spec = pair
    argv = ["bench", TINY, f"--config.init_from={pruned}", f"--dense={dense}", "--batch=1,4", "--rounds=2"]
    done = vtjax(*argv, "--price=3.6", "--watts=100")
    assert done.code == 0, done.err
    result = done.json
    assert [r["batch"] for r in result["batches"]] == [1, 4] and result["batch"] == 4
    for label, spec in (("dense", dense_spec), ("reduced", pruned_spec)):
        side = result[label]
        assert side["macs"] == side["macs_walked"] == flops.macs(spec)
        assert side["images_per_s"] == pytest.approx(4 / side["median_s"])
        assert side["cost_per_million"] == pytest.approx(1e-3 * side["median_s"] / 4 * 1e6)
        assert side["kwh_per_million"] == pytest.approx(100 * side["median_s"] / 4 * 1e6 / 3.6e6)
        assert side["min_s"] <= side["p10_s"] <= side["median_s"] <= side["p90_s"]
        assert side["memory_bytes"] > 4 * side["params"] and side["compile_s"] > 0
    assert result["dense"]["params"] - result["reduced"]["params"] == 48 * (32 + 1 + 32)
    assert result["mac_ratio"] == flops.macs(dense_spec) / flops.macs(pruned_spec) > 1
    assert result["time_ratio"] == pytest.approx(result["dense"]["median_s"] / result["reduced"]["median_s"])
    assert result["realised"] == pytest.approx(result["time_ratio"] / result["mac_ratio"])
    assert "other_cores" in result and "realised" in done.err


def test_a_model_is_its_own_baseline_where_nothing_was_taken(vtjax, pair):
    done = vtjax("bench", TINY, f"--config.init_from={pair[0]}", "--rounds=1")
    assert done.code == 0, done.err
    assert done.json["mac_ratio"] == 1.0 and "cost_per_million" not in done.json["dense"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--price=-1"], "--price must be 0 or more, found -1.0"),
        (["--watts=inf"], "--watts must be 0 or more, found inf"),
        (["--rounds=0"], "--rounds must be 1 or more, found 0"),
        (["--batch=1,-4"], "--batch must be one or several sizes above 0, as in 1,16, found '1,-4'"),
        (["--batch=many"], "found 'many'"),
        (["--multihost"], "bench measures one process"),
        (["--dense=no/such"], "no/such"),
        (["--workdir=no/such"], "no/such"),
    ],
)
def test_bad_input_is_one_line(vtjax, argv, message):
    done = vtjax("bench", TINY, *argv)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1, done.err


def test_a_pruned_model_needs_a_baseline_of_the_same_image_size(vtjax, pair, tmp_path):
    done = vtjax("bench", TINY, f"--config.init_from={pair[1]}")
    assert done.code == 2 and "--dense=MODEL must name the model before" in done.err
    spec = ViTSpec.uniform(depth=1, width=32, heads=2, mlp=64, image_size=32, patch=4, classes=10)
    weights.save(tmp_path / "large.safetensors", spec, jax.jit(ViT(spec).init)(jax.random.key(0)))
    done = vtjax("bench", TINY, f"--config.init_from={pair[1]}", f"--dense={tmp_path / 'large.safetensors'}")
    assert done.code == 2 and "--dense must take images of (16, 16)" in done.err


def test_macs_may_depend_on_the_images_and_ratios_are_dense_over_reduced(monkeypatch):
    seconds = {"dense": 0.3, "reduced": 0.1}

    def compare(timers, **_):
        turns = {name: timing.Timing(((seconds[name],) * 3,) * 2) for name in timers}
        return timing.Comparison(turns, 0.0, 0.0, 0.0)

    monkeypatch.setattr(timing, "compare", compare)
    params = {"kernel": np.ones((3, 5), np.float32)}

    def side(name, macs):
        return bench.Candidate(name, lambda p, x: x @ p["kernel"], params, macs)

    images = jax.numpy.ones((2, 3))
    result = bench.measure(side("some", lambda x: float(x.sum())), side("all", 15), images)
    assert result["reduced"]["macs"] == 6.0 and result["dense"]["macs_walked"] == 15
    assert result["mac_ratio"] == 2.5 and result["time_ratio"] == pytest.approx(3.0)
    assert result["realised"] == pytest.approx(1.2)
