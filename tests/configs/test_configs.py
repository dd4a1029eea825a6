# SPDX-License-Identifier: Apache-2.0
"""Every config: its resolved form is on record, every leaf can be overridden, and it builds and steps twice.

After a wanted change, write the golden files anew: `VTJAX_REGENERATE_GOLDEN=1 python -m pytest tests/configs`, and
read the diff.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import all_five, common, das, dgmr, dpn, ltmp, lvxattn, vit, vlm
from vtjax import paths
from vtjax.cli import assemble
from vtjax.cli import config as config_lib
from vtjax.errors import InputError
from vtjax.parallel import mesh as mesh_lib
from vtjax.train.program import Program

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
VARIANTS = [
    (module.__name__.rpartition(".")[2], name)
    for module in (vit, ltmp, dgmr, vlm, dpn, lvxattn, das, all_five)
    for name in module.VARIANTS
]


def load(name: str, variant: str, **overrides) -> config_lib.Config:
    return config_lib.load_config(ROOT / "configs" / f"{name}.py", variant, overrides)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_the_resolved_config_is_the_one_on_record(name, variant):
    path = GOLDEN / f"{name}_{variant}.json"
    resolved = json.dumps(load(name, variant).to_dict(), indent=1, sort_keys=True) + "\n"
    if os.environ.get("VTJAX_REGENERATE_GOLDEN"):
        path.write_text(resolved)
    assert path.read_text() == resolved


def test_no_golden_file_is_left_over():
    assert sorted(p.stem for p in GOLDEN.glob("*.json")) == sorted(f"{n}_{v}" for n, v in VARIANTS)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_leaf_takes_its_own_value_as_text(name, variant):
    config = load(name, variant)
    before = config.to_dict()
    for leaf, value in config_lib.flatten(config):
        config_lib.override(config, leaf, str(value))
    assert config.to_dict() == before


def test_rates_and_strengths_are_floats_although_their_default_is_zero():
    config = load("vit", "tiny")
    for leaf in ("ema", "optim.clip", "optim.end_lr", "optim.weight_decay", "loss.label_smoothing", "model.drop_path"):
        config_lib.override(config, leaf, "0.1")
    for leaf in ("jitter", "hue", "mixup", "cutmix", "erase"):
        config_lib.override(config, f"data.{leaf}", "0.1")


def test_arguments_are_typed_and_leftovers_are_named():
    assert load("vit", "tiny,steps=7").steps == 7
    assert load("vit", "s16_i1k,batch_size=2048").steps == round(90 * common.IMAGENET_TRAIN / 2048)
    assert load("vit", "b16_i1k,batch_size=512").optim.lr == pytest.approx(5e-4)
    for arg, message in {
        "huge": "unknown variant of the config 'huge', expected one of tiny, digits, ti16, s16_i1k, b16_i1k",
        "digit": "did you mean 'digits'",
        "tiny,step=7": "unknown option of the config 'step', expected one of steps, batch_size; did you mean 'steps'",
        "tiny,steps": "must be written steps=VALUE, found 'steps'",
        "tiny,steps=many": "'steps' must be int, found 'many'",
        "tiny,": "unknown option of the config ''",
    }.items():
        with pytest.raises(InputError) as error:
            load("vit", arg)
        assert message in str(error.value)


def test_published_recipes_have_their_published_sizes():
    small = assemble.task(load("vit", "s16_i1k"))
    base = assemble.task(load("vit", "b16_i1k"))
    # ViT-S/16 of timm (22,050,664) without class token and learned positions (198 x 384); DeiT-B as in timm.
    assert small.summary["params"] == 22_050_664 - 198 * 384
    assert base.summary["params"] == 86_567_656
    assert base.summary["macs_per_image"] == pytest.approx(17.6e9, rel=5e-3)  # published: 17.6 G


def abstract_batch(config: config_lib.Config, task) -> dict[str, jax.ShapeDtypeStruct]:
    rows, spec = config.batch_size, task.spec
    if "form" in config.data:
        config_lib.override(config, "data.length", 12)
        found = assemble.experiment(config.experiment).batch_shapes(config, task, True)
        return {name: jax.ShapeDtypeStruct(*array) for name, array in found.items()}
    if "pack" in config.data:
        config_lib.override(config, "data.limit", config.data.limit or 64 + spec.placeholders)
        found = assemble.experiment(config.experiment).batch_shapes(config, task, True)
        return {name: jax.ShapeDtypeStruct(*array) for name, array in found.items()}
    shapes = {"image": ((*spec.image_size, 3), jnp.float32), "label": ((), jnp.int32), "valid": ((), jnp.bool_)}
    if config.data.mixup or config.data.cutmix:
        shapes |= {"label2": ((), jnp.int32), "lam": ((), jnp.float32)}
    return {name: jax.ShapeDtypeStruct((rows, *shape), dtype) for name, (shape, dtype) in shapes.items()}


# The other published multimodal models differ from llava15_7b in their specs, which tests/experiments builds; smollm2
# would decode its weights; and so with DPN in them. Steps of all five begin from trained models
# (tests/experiments/test_all_five.py).
CHOSEN = {
    "vlm": ("tiny", "easyvqa", "llava15_7b"),
    "dpn": ("tiny",),
    "lvxattn": ("tiny",),
    "das": ("tiny", "fusion_tiny"),
    "all_five": (),
}
STEPPED = [(name, variant) for name, variant in VARIANTS if name not in CHOSEN or variant in CHOSEN[name]]


# Of the code that eva_8b and dinov2_g run, in other sizes.
LIKE_ANOTHER = (("dgmr", "eva_e"), ("dgmr", "openclip_bigg"), ("dgmr", "openclip_g"))


@pytest.mark.parametrize(
    ("name", "variant"),
    [pytest.param(*both, marks=[pytest.mark.slow] if both in LIKE_ANOTHER else []) for both in STEPPED],
)
def test_it_builds_and_steps_twice_abstractly(name, variant):
    config = load(name, variant)
    if config.data.name == "easy_vqa" and not importlib.util.find_spec("easy_vqa"):
        pytest.skip("needs the package easy-vqa")
    if "i1k" in variant or config.init_from.startswith("runs/"):
        config_lib.override(config, "init_from", "")  # what they start from is described in them, too
    elif config.init_from and paths.find(f"{config.init_from}.safetensors") is None:
        pytest.skip(f"needs the data file {config.init_from}.safetensors, which is not on VTJAX_DATA")
    task = assemble.task(config)
    program = Program(task, config, mesh_lib.make(config.mesh))
    batch = abstract_batch(config, task)
    frozen = jax.eval_shape(lambda key: task.init(key)[1], program.key)
    knobs = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in task.knobs}
    step = jax.ShapeDtypeStruct((), jnp.int32)
    with jax.set_mesh(program.mesh):
        state = program.abstract
        for _ in range(2):
            after, metrics = jax.eval_shape(program.step, state, frozen, knobs, batch, program.key, step)
            assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
                lambda x: (x.shape, x.dtype), program.abstract
            )
            assert metrics["loss"].shape == ()
            state = after
        sums, _ = jax.eval_shape(program.evaluate_step, state.params, frozen, state.extra, knobs, batch)
    of_method = {"mac_ratio", "macs_per_image", "feature_mse", "class_mse", "patch_mse", "agreement"}
    assert {x.shape for x in sums.values()} == {()}
    if name in CHOSEN:
        assert set(sums) >= {"top1", "loss", "count"} and "top5" not in sums
        return
    of_labels = {"top1", "top5", "loss"} if name != "dgmr" or config.dgmr.classifier else set()
    assert set(sums) - of_method == of_labels | {"count"}


def test_tiny_steps_twice_for_real():
    config = load("vit", "tiny,batch_size=4", **{"optim.warmup": 0})  # a warm-up starts at rate 0
    task, data = assemble.assemble(config)
    program = Program(task, config, mesh_lib.make(config.mesh))
    batches = data.train(0)
    with jax.set_mesh(program.mesh):
        state, frozen = program.init()
        losses = []
        for step in range(2):
            batch = mesh_lib.place(next(batches), program.mesh)
            state, metrics = program.step(state, frozen, program.knobs(), batch, program.key, np.int32(step))
            losses.append(float(metrics["loss"]))
    assert int(state.step) == 2
    assert np.isfinite(losses).all()
    assert losses[0] != losses[1]
