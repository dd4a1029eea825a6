# SPDX-License-Identifier: Apache-2.0
"""`vtjax bench`: a pruned model beside the whole one, training steps, deployed forms of experiments, bad input."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from vtjax import weights
from vtjax.account import flops
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
        assert side["macs"] == side["macs_walked"] == flops.macs(spec) and side["macs_agree"]
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
    assert (result["images"], result["images_from"], result["step"]) == (64, "procedural:test", "forward")


def test_a_model_is_its_own_baseline_where_nothing_was_taken(vtjax, pair):
    done = vtjax("bench", TINY, f"--config.init_from={pair[0]}", "--rounds=1", "--noise")
    assert done.code == 0, done.err
    assert done.json["mac_ratio"] == 1.0 and "cost_per_million" not in done.json["dense"]
    assert done.json["batch"] == 4 and done.json["images_from"] == "noise" and "the same work" in done.err


def test_a_run_is_measured_by_its_own_config(vtjax, finished):
    done = vtjax("bench", f"--workdir={finished}", f"--dense={TINY.removeprefix('--config=')}", "--rounds=1")
    assert done.code == 0, done.err
    assert done.json["batch"] == 8 and done.json["mac_ratio"] == 1.0
    assert f"({finished})" in done.err


def test_a_training_step_beside_that_of_another_config(vtjax, tmp_path):
    deeper = tmp_path / "deeper.py"
    deeper.write_text(
        "from configs import vit\n\n\ndef get_config(arg='tiny'):\n    config = vit.get_config(arg)\n"
        "    config.model.depth = 4\n    config.dtype = 'bfloat16'\n    return config\n"
    )
    done = vtjax("bench", TINY, "--step=train", f"--dense={deeper}:tiny", "--rounds=1", "--images=8")
    assert done.code == 0, done.err
    result = done.json
    dense, reduced = result["dense"], result["reduced"]
    # Forward, and backward by every weight and activation but the pixels: below three times the forward pass.
    for side in (dense, reduced):
        assert 2.5 < side["macs_walked"] / side["macs"] < 3
    assert result["mac_ratio"] == dense["macs_walked"] / reduced["macs_walked"] == pytest.approx(2, rel=0.15)
    assert dense["params"] > reduced["params"] and dense["memory_bytes"] > reduced["memory_bytes"]
    assert (result["step"], result["dtype"], result["images_from"]) == ("train", "float32", "procedural:train")


LAZY = """
import jax
import numpy as np

from experiments.vit.main import build
from vtjax.account import bench
from vtjax.models import build as model_of


def deploy(config, task, images, dense):
    assert images.shape == (4, 16, 16, 3)
    model = model_of(task.spec)
    params = task.init(jax.random.key(0))[0]
    run = jax.jit(model.apply)

    def bright(params, images):
        chosen = np.flatnonzero(np.asarray(images).mean((1, 2, 3)) > MEAN)
        return run(params, images[:1])[0] if len(chosen) else images

    def macs(images):
        return 1000.0 * float((np.asarray(images).mean((1, 2, 3)) > MEAN).mean())

    whole = bench.Candidate("whole", lambda p, x: model.apply(p, x)[0], params, 2000)
    return bench.Candidate("bright", bright, params, macs, {"mean": MEAN}, jit=False), whole
"""


def test_an_experiment_deploys_another_form(vtjax, tmp_path, monkeypatch):
    """Its work depends on the images, so these must be real, and are counted as they are timed."""
    folder = tmp_path / "experiments" / "lazy"
    folder.mkdir(parents=True)
    (folder / "main.py").write_text(LAZY.replace("MEAN", "-9.0"))
    monkeypatch.chdir(tmp_path)
    done = vtjax("bench", TINY, "--config.experiment=lazy", "--rounds=1")
    assert done.code == 0, done.err
    reduced = done.json["reduced"]
    assert (reduced["macs"], reduced["macs_walked"], reduced["mean"]) == (1000, None, -9.0)
    assert done.json["mac_ratio"] == 2.0 and done.json["dense"]["macs_agree"] is False
    done = vtjax("bench", TINY, "--config.experiment=lazy", "--noise")
    assert done.code == 2 and "depends on the images, expected real ones" in done.err


def test_data_that_are_not_here_may_be_noise(vtjax):
    """Scanned, as this recipe is; what is wrong with the model is not blamed on the data."""
    small = [f"--config.model.{leaf}" for leaf in ("depth=2", "width=32", "heads=2", "mlp=64", "image_size=(32,32)")]
    argv = ["bench", f"--config={ROOT / 'configs' / 'vit.py'}:s16_i1k", "--batch=2", *small]
    done = vtjax(*argv)
    assert done.code == 2 and done.err.rstrip().endswith("(or measure on noise: --noise)"), done.err
    done = vtjax(*argv, "--config.model.remat=none")
    assert done.code == 2 and "scan=True needs remat" in done.err and "noise" not in done.err
    done = vtjax(*argv, "--noise", "--rounds=1")
    assert done.code == 0, done.err
    assert done.json["dtype"] == "bfloat16" and done.json["dense"]["macs_agree"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--price=-1"], "--price must be positive and finite, found -1.0"),
        (["--watts=inf"], "--watts must be positive and finite, found inf"),
        (["--rounds=0"], "--rounds must be 1 or more, found 0"),
        (["--images=0"], "--images must be 1 or more, found 0"),
        (["--noise", "--step=train"], "--noise makes images without labels"),
        (["--config.mesh.fsdp=3"], "mesh data=-1, fsdp=3, context=1, tensor=1 does not fit 1 devices"),
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
    assert done.code == 2 and "its blocks differ in width): name it by --dense=" in done.err
    spec = ViTSpec.uniform(depth=1, width=32, heads=2, mlp=64, image_size=32, patch=4, classes=10)
    weights.save(tmp_path / "large.safetensors", spec, jax.jit(ViT(spec).init)(jax.random.key(0)))
    done = vtjax("bench", TINY, f"--config.init_from={pair[1]}", f"--dense={tmp_path / 'large.safetensors'}")
    assert done.code == 2 and "--dense must take images of (16, 16)" in done.err


def test_without_config_and_workdir(vtjax):
    done = vtjax("bench")
    assert done.code == 2 and "bench needs --config=FILE.py:VARIANT or --workdir=DIR" in done.err
