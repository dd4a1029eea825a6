# SPDX-License-Identifier: Apache-2.0
"""The DGMR experiment: pruned, distilled, resumed, moved, combined with LTMP and 8 bits; the paper's models; what is
refused."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from PIL import Image

import vtjax as package
from configs import dgmr as configs
from experiments.dgmr import images, pairing
from vtjax.account import flops, params
from vtjax.cli import assemble, inspect, main
from vtjax.cli import config as config_lib
from vtjax.errors import InputError
from vtjax.methods import dgmr, ltmp
from vtjax.models.vit import ViT
from vtjax.ops import quantize
from vtjax.parallel import mesh as mesh_lib
from vtjax.parallel import rules
from vtjax.spec import ViTSpec
from vtjax.train import checkpoint, optim
from vtjax.train.program import Program
from vtjax.train.state import flatten

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/dgmr.py:tiny"
FORM = "deflated"  # the quickest to compile; all select the same


def vtjax(capsys: Any, *arguments: str) -> dict[str, Any]:
    """A command in this process; the JSON of its last line."""
    assert main.main(list(arguments)) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def config(**overrides: Any) -> config_lib.Config:
    overrides = {"dgmr__form": FORM, **overrides}
    return config_lib.load_config(CONFIG, overrides={k.replace("__", "."): str(v) for k, v in overrides.items()})


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "run"
    arguments = ["--config=configs/vit.py:tiny", f"--workdir={folder}", "--config.model.mlp=128"]
    assert main.main(["run", *arguments]) == 0
    return folder


STEPS = 80
RUN = [f"--config={CONFIG},steps={STEPS}", f"--config.dgmr.form={FORM}", "--config.checkpoint.every=40"]


@pytest.fixture(scope="module")
def run(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dgmr") / "run"
    assert main.main(["run", *RUN, f"--config.init_from={dense}", f"--workdir={folder}"]) == 0
    return folder


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_distillation_brings_the_features_back(run: Path, dense: Path, capsys: Any) -> None:
    before = vtjax(capsys, "eval", *RUN, f"--config.init_from={dense}")
    after = result_of(run)
    assert after["feature_mse"] < before["feature_mse"] / 5
    assert after["feature_mse"] == pytest.approx(after["class_mse"] + after["patch_mse"])
    assert after["agreement"] == 1.0 >= before["agreement"] and after["loss"] < before["loss"]
    assert (before["keep"], before["mac_ratio"]) == (after["keep"], after["mac_ratio"])
    spec, values = checkpoint.load_params(run)
    assert after["macs_per_image"] == flops.macs(spec) and after["dense_macs_per_image"] == 479_680
    assert after["params"] == params.count(values) and after["keep"] == 32


def test_the_teachers_head_stays_and_all_else_is_trained(run: Path, dense: Path) -> None:
    spec, values = checkpoint.load_params(run)
    started = dgmr.prune(*checkpoint.load_params(dense), ratio=1.0)[1]
    same = {path for path, leaf in flatten(values).items() if np.array_equal(leaf, flatten(started)[path])}
    assert same == {"head/kernel", "head/bias"}
    assert [step.operation for step in spec.lineage] == ["init_from", "dgmr.prune"]
    assert spec.lineage[0].parent == spec.lineage[1].parent == result_of(dense)["params_sha256"]


@pytest.mark.slow
def test_fitted_output_weights_are_closer_before_distillation(dense: Path, capsys: Any) -> None:
    before = vtjax(capsys, "eval", *RUN, f"--config.init_from={dense}")
    after = vtjax(capsys, "eval", *RUN, f"--config.init_from={dense}", "--config.dgmr.refit=64")
    assert after["feature_mse"] < before["feature_mse"] / 2 and after["mac_ratio"] == before["mac_ratio"]


def test_output_weights_may_be_fitted_before_distillation(dense: Path, tmp_path: Path, capsys: Any) -> None:
    start = [f"--config.init_from={dense}"]
    workdir = f"--workdir={tmp_path}/run"
    vtjax(capsys, "run", f"--config={CONFIG},steps=2", *start, "--config.dgmr.refit=64", workdir)
    spec, _ = checkpoint.load_params(tmp_path / "run")
    assert [step.operation for step in spec.lineage] == ["init_from", "dgmr.prune", "dgmr.refit"]
    assert main.main(["eval", *RUN, *start, "--config.dgmr.refit=10000"]) == 2
    assert "config.dgmr.refit must be at most 256, the training images, found 10000" in capsys.readouterr().err


def test_a_resumed_run_is_the_same_run(run: Path, tmp_path: Path, capsys: Any) -> None:
    """From the checkpoint in the middle: the teacher is loaded again, and checked."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "result.json").unlink()
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    started = json.loads((run / "config.json").read_text())["init_from"]
    again = vtjax(capsys, "run", *RUN, f"--config.init_from={started}", f"--workdir={copy}")
    for name in ("params_sha256", "frozen_sha256", "spec_sha256", "feature_mse"):
        assert again[name] == result_of(run)[name]


def test_a_random_teacher_is_made_again_bit_for_bit() -> None:
    """As for a run that is resumed: by another program than the one that made it together with the student."""
    chosen = config()
    task = assemble.task(chosen)
    program = Program(task, chosen, mesh_lib.make(chosen.mesh))
    with jax.set_mesh(program.mesh):
        state, frozen = program.init()
        again = program.init_frozen()
    jax.tree.map(np.testing.assert_array_equal, frozen, again)
    _, student = dgmr.prune(pairing.described(chosen.model), frozen["teacher"], ratio=1.0, form=FORM)
    jax.tree.map(np.testing.assert_array_equal, state.params, student)
    assert task.summary["teacher"] == "random weights"


def test_a_pruned_checkpoint_is_distilled_from_disk_alone(
    run: Path, dense: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = f"--workdir={tmp_path}/more"
    arguments = ["run", f"--config={CONFIG},steps=4", f"--config.init_from={run}", "--config.optim.warmup=0", workdir]
    assert main.main(arguments) == 2
    error = capsys.readouterr().err
    assert "config.dgmr.teacher must name the model that the student was cut from, with SHA-256" in error
    assert result_of(dense)["params_sha256"] in error and not (tmp_path / "more" / "config.json").exists()
    more = vtjax(capsys, *arguments, f"--config.dgmr.teacher={dense}")
    assert more["init_from_sha256"] == result_of(run)["params_sha256"]
    spec, _ = checkpoint.load_params(tmp_path / "more")
    assert [step.operation for step in spec.lineage] == ["init_from", "dgmr.prune", "init_from"]
    # Where the name in the lineage still leads to the teacher, nothing need be said.
    chosen = config(init_from=run)
    monkeypatch.chdir(dense.parent)
    task = assemble.task(chosen)
    assert task.summary["teacher"] == dense.name


def test_the_teacher_must_be_the_one(run: Path, dense: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="config.dgmr.teacher must be a model that was not pruned, found"):
        assemble.task(config(init_from=run, dgmr__teacher=run))
    m = package.load(dense)
    other = {**m.params, "head": jax.tree.map(lambda x: x + 1, m.params["head"])}
    path = package.weights.save(tmp_path / "other.safetensors", m.spec.edit(lineage=()), other)
    with pytest.raises(InputError, match="must be the model that the student was cut from, with SHA-256 .*, found"):
        assemble.task(config(init_from=run, dgmr__teacher=path))
    with pytest.raises(InputError, match="config.dgmr.teacher must be empty where config.init_from=.* is dense"):
        assemble.task(config(init_from=dense, dgmr__teacher=dense))
    with pytest.raises(InputError, match="config.dgmr.teacher needs config.init_from"):
        assemble.task(config(dgmr__teacher=dense))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"dgmr__ratio": 2.0},
            r"config.dgmr.ratio \(or keep\) must give the neurons of .*, \[32, 32\], found \[64, 64\]",
        ),
        ({"dgmr__method": "l2"}, "config.dgmr.method must be 'gram_schmidt', by which the neurons of"),
        ({"dgmr__allocation": "spectrum"}, "config.dgmr.allocation must be 'uniform', with which the neurons of"),
        ({"dgmr__refit": 64}, "config.dgmr.refit must be 0 or as when the model of .* was pruned, 0, found 64"),
    ],
)
def test_a_pruned_model_is_not_pruned_otherwise(run: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        assemble.task(config(init_from=run, **overrides))


def test_an_evaluation_can_do_without_the_teacher(run: Path, dense: Path, capsys: Any) -> None:
    alone = vtjax(capsys, "eval", f"--workdir={run}")
    assert alone["top1"] == result_of(run)["top1"] and "feature_mse" not in alone
    beside = vtjax(capsys, "eval", f"--workdir={run}", f"--config.dgmr.teacher={dense}")
    assert beside["feature_mse"] == pytest.approx(result_of(run)["feature_mse"], rel=1e-6)


def pieces(overrides: dict[str, Any], rows: int = 4) -> tuple[Any, Any, Any, Any, Any]:
    """A task, its params, frozen and knobs, and a batch of images alone."""
    task = assemble.task(config(**overrides))
    values, frozen, _ = task.init(jax.random.key(0))
    image = jax.random.normal(jax.random.key(1), (rows, 16, 16, 3))
    return task, values, frozen, {name: jnp.float32(value) for name, value in task.knobs.items()}, {"image": image}


def loss_of(task: Any, values: Any, frozen: Any, knobs: Any, batch: Any) -> float:
    return float(jax.jit(task.loss)(values, frozen, {}, knobs, batch, jax.random.key(2), jnp.int32(0))[0])


def gradient(task: Any, values: Any, frozen: Any, knobs: Any, batch: Any) -> tuple[Any, Any]:
    def loss(values: Any, frozen: Any) -> Any:
        return task.loss(values, frozen, {}, knobs, batch, jax.random.key(2), jnp.int32(0))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(values, frozen)


def test_the_teacher_itself_has_no_loss_and_no_gradient(dense: Path, tmp_path: Path) -> None:
    """And neither ever reaches the frozen side; there is no label in the batch that could be read."""
    file = tmp_path / "all.json"
    file.write_text(json.dumps([list(range(128))] * 2))
    (loss, terms), (to_student, to_teacher) = gradient(*pieces({"init_from": dense, "dgmr__indices": file}))
    assert float(loss) == 0.0 and not any(np.any(leaf) for leaf in jax.tree.leaves((to_student, to_teacher)))
    (loss, terms), (to_student, to_teacher) = gradient(*pieces({"init_from": dense}))
    assert float(loss) == pytest.approx(float(terms["class_mse"] + terms["patch_mse"])) and float(loss) > 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(to_teacher))
    assert all(
        np.any(leaf) for path, leaf in flatten(to_student).items() if path.endswith("kernel") and "head" not in path
    )


def test_the_loss_is_the_papers(dense: Path) -> None:
    """By hand, from the features of both models."""
    task, values, frozen, knobs, batch = pieces({"init_from": dense, "dgmr__w_class": 0.5, "dgmr__w_patch": 2.0})
    loss = loss_of(task, values, frozen, knobs, batch)
    m = package.load(dense)
    both = [jax.jit(ViT(task.spec).apply)(values, batch["image"]), jax.jit(m.apply)(m.params, batch["image"])]
    student, teacher = (np.asarray(aux["features"], np.float64) for _, aux in both)
    difference = (student - teacher) ** 2
    assert loss == pytest.approx(0.5 * difference[:, 0].mean() + 2.0 * difference[:, 1:].mean(), rel=1e-5)


def test_remembered_features_are_the_teachers(dense: Path) -> None:
    overrides = {"init_from": dense, "dgmr__cache": True}
    chosen = config(**overrides)
    task, data = assemble.assemble(chosen)
    batch = next(data.train(3))
    plain = next(assemble.assemble(config(init_from=dense))[1].train(3))
    for name, value in plain.items():
        np.testing.assert_array_equal(batch[name], value)
    values, frozen, _ = task.init(jax.random.key(0))
    knobs = {name: jnp.float32(value) for name, value in task.knobs.items()}
    found = [loss_of(task, values, frozen, knobs, each) for each in (batch, plain)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    batch[images.PATCH] = batch[images.PATCH] + 1.0  # it is the cache that counts, not the teacher
    assert loss_of(task, values, {}, knobs, batch) > found[0] + 0.5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"data__augment": "crop"},
            "config.dgmr.cache keeps one feature per training image, which needs images that do",
        ),
        ({"data__mixup": 0.2}, "config.dgmr.cache keeps one feature per training image"),
        ({"dgmr__cache_gib": 1e-4}, r"config.dgmr.cache_gib must be at least 0.0 to hold the features of 256 images"),
    ],
)
def test_features_that_cannot_be_kept(dense: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        assemble.assemble(config(init_from=dense, dgmr__cache=True, **overrides))


def test_unlabelled_images_join_the_training_images(tmp_path: Path, dense: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("b/deep/2.png", "a.jpg", "b/1.png"):
        path = tmp_path / "more" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(path)
    (tmp_path / "more" / "notes.txt").write_text("no image")
    chosen = config(init_from=dense, dgmr__images=tmp_path / "more", batch_size=259)
    _, data = assemble.assemble(chosen)
    assert (data.train_examples, data.eval_examples) == (259, 256)
    batch = next(data.train(0))
    assert sorted(batch["index"]) == list(range(259)) and batch["image"].shape == (259, 16, 16, 3)
    alone = config(init_from=dense, dgmr__images=tmp_path / "more", data__train_split="", batch_size=3)
    assert assemble.assemble(alone)[1].train_examples == 3
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="config.dgmr.images=.* must hold images"):
        assemble.assemble(config(init_from=dense, dgmr__images=tmp_path / "none"))


@pytest.mark.parametrize("allocation", ["spectrum", "sensitivity"])
def test_budgets_over_blocks_cost_what_even_ones_do(dense: Path, allocation: str) -> None:
    even = assemble.task(config(init_from=dense))
    overrides = {"dgmr__allocation": allocation, "dgmr__sensitivity_images": 8, "dgmr__limits": "(0.25,4.0)"}
    task = assemble.task(config(init_from=dense, **overrides))
    kept = task.summary["keep"]
    assert sum(kept) == 64 and kept[0] != kept[1] and min(kept) >= 8
    assert task.summary["macs_per_image"] == even.summary["macs_per_image"]
    assert task.summary["params"] == even.summary["params"]


def test_rates_are_those_of_the_release() -> None:
    """At the first step, at the ends of the warm-up, and at the last (spec section 2.2), against numpy."""
    chosen = config_lib.load_config("configs/dgmr.py", "eva_e,steps=1000,batch_size=320")
    steps, warmup = 1000, chosen.optim.warmup
    assert warmup == 200
    lr, least = 6e-5 * 320 / 256, 1e-6
    rise = np.linspace(0, lr, warmup)
    fall = least + (lr - least) / 2 * (1 + np.cos(np.pi * np.arange(steps - warmup) / (steps - warmup)))
    decay = 0.2 + (0.04 - 0.2) / 2 * (1 + np.cos(np.pi * np.arange(steps) / steps))
    values = {"norm": {"scale": jnp.ones(3)}, "head": {"kernel": jnp.ones((2, 2))}}
    optimiser, rate = optim.make(chosen.optim, steps, values, optim.group_of(chosen.optim))
    zeros, state = jax.tree.map(jnp.zeros_like, values), optimiser.init(values)
    for step in (0, warmup - 1, warmup, steps - 1):
        expected = np.concatenate([rise, fall])[step]
        assert float(rate(step)) == pytest.approx(expected, rel=1e-5, abs=1e-12)
        at = jax.tree.map(lambda x, n=step: jnp.asarray(n, x.dtype) if x.shape == () else x, state)
        updates, _ = optimiser.update(zeros, at, values)  # without gradients nothing but the decay moves
        for leaf in jax.tree.leaves(updates):  # of norms as well as of kernels
            np.testing.assert_allclose(leaf, -expected * decay[step], rtol=1e-4, atol=1e-12)


def test_a_decay_without_an_end_stays() -> None:
    chosen = config_lib.load_config("configs/dgmr.py", "tiny", {"optim.groups.all.end_weight_decay": -1.0})
    values = {"norm": {"scale": jnp.ones(3)}}
    optimiser, rate = optim.make(chosen.optim, 40, values, optim.group_of(chosen.optim))
    state = optimiser.init(values)
    for step in range(3):
        updates, state = optimiser.update(jax.tree.map(jnp.zeros_like, values), state, values)
        np.testing.assert_allclose(updates["norm"]["scale"], -float(rate(step)) * 0.04, rtol=1e-5)


def test_teacher_and_student_are_sharded_alike() -> None:
    task = assemble.task(config(dgmr__teacher_dtype="bfloat16"))
    values, frozen, _ = jax.eval_shape(task.init, jax.random.key(0))
    mesh = AbstractMesh((1, 4, 1, 2), mesh_lib.AXES)
    laid = flatten(rules.shardings(frozen, mesh))
    for path, sharding in flatten(rules.shardings(values, mesh)).items():
        assert laid[f"teacher/{path}"].spec == sharding.spec
    assert laid["teacher/block_00/mlp/up/kernel"].spec == jax.P("fsdp", "tensor")
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(values)} == {jnp.dtype("float32")}


# What it is combined with.


def test_thresholds_are_learned_on_a_pruned_model(run: Path, tmp_path: Path, capsys: Any) -> None:
    """Both savings multiply, against the model that was neither pruned nor reduced."""
    arguments = ["--config=configs/ltmp.py:tiny,steps=2", f"--config.init_from={run}", f"--workdir={tmp_path}/both"]
    both = vtjax(capsys, "run", *arguments, "--config.ltmp.prune_threshold=0.06")
    spec, values = checkpoint.load_params(tmp_path / "both")
    assert [step.operation for step in spec.lineage] == ["init_from", "dgmr.prune", "init_from", "ltmp.install"]
    assert [block.mlp for block in spec.blocks] == [32, 32] and set(values["ltmp"]) == {
        "merge_threshold",
        "prune_threshold",
    }
    assert both["dense_macs_per_image"] == result_of(run)["macs_per_image"]
    assert both["unpruned_macs_per_image"] == result_of(run)["dense_macs_per_image"]
    assert both["mac_ratio"] < 0.99
    product = both["mac_ratio"] * result_of(run)["mac_ratio"]
    assert both["unpruned_mac_ratio"] == pytest.approx(product, rel=1e-5)
    assert both["macs_per_image"] == pytest.approx(product * both["unpruned_macs_per_image"], rel=1e-5)
    bare = dgmr.original(spec)
    assert bare is not None and all(block.reduce for block in bare.blocks) and bare.blocks[0].mlp == 128
    with pytest.raises(InputError, match="must hold a model that reduces no tokens .prune first, then learn"):
        assemble.task(config(init_from=f"{tmp_path}/both"))


def test_both_kinds_of_surgery_commute_in_the_spec(dense: Path) -> None:
    """The library prunes a reducing model, too: thresholds stay."""
    m = package.load(dense)
    spec, thresholds = ltmp.install(m.spec)
    one, values = dgmr.prune(spec, {**m.params, "ltmp": thresholds}, ratio=1.0)
    other, _ = ltmp.install(dgmr.prune(m.spec, m.params, ratio=1.0)[0])
    assert one.edit(lineage=()) == other.edit(lineage=()) and values["ltmp"] is thresholds


def test_weights_in_8_bits_on_top(run: Path) -> None:
    spec, values = checkpoint.load_params(run)
    small = quantize.quantize_kernels(values)
    kernels = sum(leaf.size for path, leaf in flatten(values).items() if path.endswith("kernel"))
    assert quantize.size_bytes(values) - quantize.size_bytes(small) == 3 * kernels - 4 * sum(
        leaf.shape[1] for path, leaf in flatten(values).items() if path.endswith("kernel")
    )
    image = next(assemble.assemble(config(init_from=run))[1].eval())["image"]
    apply = jax.jit(ViT(spec).apply)
    here, there = (apply(each, image)[1]["features"] for each in (quantize.dequantize_kernels(small), values))
    assert 0 < float(jnp.square(here - there).mean()) < 0.01 * float(jnp.square(there).mean())


def test_the_bench_times_it_beside_its_teacher(run: Path, dense: Path, capsys: Any) -> None:
    speed = ["--noise", "--images=2", "--batch=2", "--rounds=1", "--calls=1"]
    found = vtjax(capsys, "bench", f"--workdir={run}", f"--config.dgmr.teacher={dense}", *speed)
    assert found["mac_ratio"] == pytest.approx(1 / result_of(run)["mac_ratio"])
    assert main.main(["bench", f"--workdir={run}", *speed]) == 2
    assert "or give the baseline by --dense" in capsys.readouterr().err


def test_inspect_shows_the_share_of_the_mlps(run: Path, dense: Path, capsys: Any) -> None:
    found = vtjax(capsys, "inspect", str(run))
    mlp, before = found["kinds"]["mlp"], found["unpruned"]["kinds"]["mlp"]
    assert mlp["params_share"] == mlp["params"] / found["params"]
    assert before["macs_share"] == 2 * 17 * 2 * 32 * 128 / 479_680 and before["macs_share"] > mlp["macs_share"]
    assert sum(kind["params_share"] for kind in found["kinds"].values()) == pytest.approx(1.0)
    assert main.main(["inspect", str(dense), str(run)]) == 0
    told = capsys.readouterr()
    assert "MLPs' share of parameters" in told.err and "blocks[0].mlp" in told.err
    assert json.loads(told.out.splitlines()[-1])["unpruned"][0] is None


def test_inspect_prunes_the_spec_of_absent_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VTJAX_DATA", str(tmp_path))
    found = inspect.open_model("configs/dgmr.py:ti16", {"dgmr.ratio": "2.0"})
    assert {block.mlp for block in found.spec.blocks} == {384}


# The paper's models, by their specs alone (spec section 3.1): parameters in 10^9, FLOPs of the linear layers in 10^12.

TABLE = {
    "openclip_g": (1.013, 0.479, 0.638, 0.684, 0.52),
    "openclip_bigg": (1.845, 0.802, 1.068, 0.710, 0.95),
    "eva_e": (4.351, 1.238, 1.649, 0.810, 2.23),
    # The spec's count leaves out the norms of queries and keys: 48 x 2 x 3200.
    "internvit_6b": (5.902, 2.953, 3.936, 0.666, None),
    "eva_8b": (7.526, 3.231, 4.304, 0.713, 3.86),
    "dinov2_g": (1.136, 0.664, 0.948, 0.665, None),
}


@pytest.mark.parametrize("variant", TABLE)
def test_the_papers_models_have_their_published_sizes(variant: str) -> None:
    whole, once, twice, share, linear = TABLE[variant]
    chosen = config_lib.load_config("configs/dgmr.py", variant)
    spec = pairing.described(chosen.model)
    if variant == "dinov2_g":
        spec = spec.edit(image_size=(518, 518))  # of its position embedding
    left_out = 48 * 2 * 3200 if variant == "internvit_6b" else 0

    def billions(found: ViTSpec) -> float:
        return round((params.count(found) - left_out) / 1e9, 3)

    assert billions(spec) == whole
    for ratio, expected in ((1.0, once), (2.0, twice)):
        kept = dgmr.counts(spec, ratio=ratio)
        pruned = dgmr.edit(spec, kept, method="gram_schmidt")
        assert billions(pruned) == expected and pruned.blocks[0].mlp == int(ratio * spec.width)
        block, matrices = spec.blocks[0].mlp - kept[0], 3 if spec.activation == "swiglu" else 2
        assert flops.macs(spec) - flops.macs(pruned) == matrices * block * spec.width * spec.tokens * spec.depth
    kinds = {row.kind: row for row in flops.by_kind(flops.layers(spec))}
    assert round(kinds["mlp"].params / params.count(spec), 3) == share
    if linear is not None:
        inner = spec.blocks[0].heads * spec.blocks[0].head_dim
        scores = 2 * spec.tokens**2 * inner * spec.depth
        assert round(2 * (flops.macs(spec) - scores) / 1e12, 2) == linear
    task = assemble.task(chosen)
    assert task.summary["keep"] == spec.width and not chosen.dgmr.classifier


def test_recipes_are_the_papers() -> None:
    for variant, base, epochs in (("openclip_g", 1e-4, 10), ("eva_e", 6e-5, 10), ("dinov2_g", 7.5e-6, 10)):
        chosen = config_lib.load_config("configs/dgmr.py", variant)
        assert chosen.optim.lr == pytest.approx(base * chosen.batch_size / 256)
        assert chosen.steps == epochs * (1_281_167 // chosen.batch_size)
        assert chosen.optim.groups.all.weight_decay == 0.04 and chosen.optim.groups.all.end_weight_decay == 0.2
    assert config_lib.load_config("configs/dgmr.py", "eva_e,ratio=2.0").steps == 20 * (1_281_167 // 320)
    assert config_lib.load_config("configs/dgmr.py", "dinov2_g").ema == 0.997
    assert set(configs.EXPECTED) == set(configs.VARIANTS)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("variant", ["openclip_g", "dinov2_g"])
def test_the_distillation_step_compiles_for_tpus(variant: str) -> None:
    """Of two blocks, for which a test has the time."""
    command = [sys.executable, "-m", "vtjax", "aot", f"--config=configs/dgmr.py:{variant}", "--topology=v5e:2x4"]
    variables = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(
        [*command, "--config.model.depth=2"], capture_output=True, text=True, cwd=ROOT, env=variables, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["fits"] and result["mesh"] == {"data": 1, "fsdp": 8, "context": 1, "tensor": 1}
    assert result["temp_ratio"] < 3 and "all-gather" in result["collectives"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dgmr__ratio": 0.0}, "ratio must be above 0 and finite, found 0.0"),
        ({"dgmr__ratio": 8.0}, r"K, the neurons to keep, must be a whole number in 1..M = 128, found 256"),
        ({"dgmr__keep": "(4,5,6)"}, "keep must be one number, or one for each of 2 blocks, found 3"),
        ({"dgmr__keep": "200"}, "must be a whole number in 1..M = 128, found 200"),
        ({"dgmr__keep": "x"}, "must be a whole number in 1..M = 128, found 'x'"),
        ({"dgmr__method": "taylor"}, "config.dgmr.method must be one of gram_schmidt, l2, random, found 'taylor'"),
        ({"dgmr__score": "x"}, "config.dgmr.score must be one of concat, gate, value"),
        ({"dgmr__form": "x"}, "config.dgmr.form must be one of"),
        ({"dgmr__allocation": "x"}, "config.dgmr.allocation must be one of uniform, spectrum, sensitivity"),
        ({"dgmr__allocation": "spectrum"}, "config.dgmr.allocation must be 'uniform' for random weights"),
        ({"dgmr__refit": 8}, "config.dgmr.refit must be 0 for random weights"),
        ({"dgmr__refit": -1}, "config.dgmr.refit must be at least 0, found -1"),
        ({"dgmr__limits": "(1.5,2.0)"}, r"config.dgmr.limits must be \(low, high\) with 0 <= low <= 1 <= high"),
        ({"dgmr__multiple": 0}, "config.dgmr.multiple must be at least 1, found 0"),
        ({"dgmr__sensitivity_images": 0}, "config.dgmr.sensitivity_images must be at least 1, found 0"),
        ({"dgmr__point": "logits"}, "config.dgmr.point must be one of normed, tokens, projected, found 'logits'"),
        ({"dgmr__point": "normed", "model__norm_after": False}, "point='normed' needs a norm after the last block"),
        ({"dgmr__w_class": -1.0}, "config.dgmr.w_class must be at least 0.0, found -1"),
        ({"dgmr__w_class": 0.0, "dgmr__w_patch": 0.0}, "config.dgmr.w_class and w_patch must not both be 0"),
        ({"dgmr__teacher_dtype": "int8"}, "config.dgmr.teacher_dtype must be one of float32, bfloat16"),
        ({"dgmr__indices": "some.json"}, "config.dgmr.indices must be '' for random weights"),
        ({"model__classes": 0}, "config.dgmr.classifier must be false for a model without a head, found true"),
        ({"model__drop_path": 1.0}, r"config.model.drop_path must be in \[0, 1\), found 1.0"),
    ],
)
def test_bad_settings_get_one_line(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        assemble.task(config(**overrides))
    assert "\n" not in str(error.value)


def test_indices_are_read_from_a_file(dense: Path, tmp_path: Path) -> None:
    file = tmp_path / "some.json"
    file.write_text("[[3, 1], [0]]")
    task = assemble.task(config(init_from=dense, dgmr__indices=file))
    assert task.summary["keep"] == [2, 1]
    for text in ("{", "5", "[[1, [2]], [0]]", "[[0]]", '[["a"], [0]]', "[[0.5], [0]]", "[[128], [0]]"):
        file.write_text(text)
        with pytest.raises(InputError, match="indices"):
            assemble.task(config(init_from=dense, dgmr__indices=file))


def test_indices_of_a_pruned_start_must_be_those_that_it_has(dense: Path, tmp_path: Path) -> None:
    file = tmp_path / "some.json"
    file.write_text("[[3, 1], [0]]")
    start = config(init_from=dense, dgmr__indices=file)
    task = assemble.task(start)
    package.weights.save(tmp_path / "pruned.safetensors", task.spec, task.init(jax.random.key(0))[0])
    again = {"init_from": tmp_path / "pruned.safetensors", "dgmr__indices": file, "dgmr__teacher": dense}
    assert assemble.task(config(**again)).summary["keep"] == [2, 1]
    for text in ("[[1, 3], [0]]", "5", "[[1, [2]], [0]]", '[["a"], [0]]', "[[0.5], [0]]"):
        file.write_text(text)
        with pytest.raises(InputError, match="config.dgmr.indices must"):
            assemble.task(config(**again))


def test_another_head_is_refused(dense: Path) -> None:
    with pytest.raises(InputError, match="config.model.classes must be those of the teacher's head, found 7"):
        assemble.task(config(init_from=dense, model__classes=7))
    with pytest.raises(InputError, match="config.data.name='procedural' must have the 7 classes of the teacher's head"):
        assemble.assemble(config(model__classes=7))
