# SPDX-License-Identifier: Apache-2.0
"""DAS in fusion encoders: what is made of questions, the losses, both phases, and what cannot be run."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.das import counts, deployed, fusion, phases
from vtjax import paths, weights
from vtjax.account import flops
from vtjax.cli import assemble
from vtjax.cli import config as config_lib
from vtjax.data import fusion_loader, question_loader
from vtjax.errors import InputError
from vtjax.methods import das
from vtjax.models.adapters import STYLES
from vtjax.models.fusion import Fusion
from vtjax.ops import bandit
from vtjax.spec import BridgeSpec, FusionSpec, LMSpec, ViTSpec, VLMSpec
from vtjax.train import checkpoint, loop
from vtjax.train.executables import Executables
from vtjax.train.state import flatten

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/das.py:fusion_tiny"
STEPS = 24
SMALL = {"log_every": "1", "checkpoint.best": ""}
SHAPES: dict[int, dict[str, str]] = {1: {"model__streams": "1", "model__depth": "3"}, 2: {}}
SLOW_FORMS = [(1, "answers"), (1, "pairs"), (2, "captions"), (2, "answers")]


def config(arg: str = "", **overrides: Any) -> config_lib.Config:
    named = {name.replace("__", "."): str(value) for name, value in overrides.items()}
    return config_lib.load_config(",".join(filter(None, (CONFIG, arg))), overrides={**SMALL, **named})


def trained(arg: str, workdir: Path, executables: Executables | None = None, **overrides: Any) -> Any:
    """A finished run: its task and result."""
    settings = config(arg, workdir=workdir, **overrides)
    task, data = assemble.assemble(settings)
    return task, loop.train(task, data, settings, workdir, executables)


def rows(form: str) -> tuple[fusion_loader.Rows, Any]:
    settings = config(data__form=form)
    asked = question_loader.open_split(settings.data, "train").of_types(("coarse",))
    return fusion_loader.open_rows(settings.data, "train"), asked


def test_pairs_say_whether_both_images_have_one_answer() -> None:
    made, asked = rows("pairs")
    of = {(text, image): answer for text, image, answer in zip(asked.texts, asked.image, asked.answer, strict=True)}
    assert (made.image[:, 0] != made.image[:, 1]).all() and abs(made.label.mean() - 0.5) < 0.02
    for text, (first, second), label in zip(made.texts, made.image.tolist(), made.label.tolist(), strict=True):
        assert (of[text, first] == of[text, second]) == label


def test_captions_are_an_images_own_and_false_ones() -> None:
    made, asked = rows("captions")
    assert len(made) == len(set(asked.image.tolist())) and made.texts[0].startswith(asked.texts[0])
    settings = config(data__form="captions", batch_size=4)
    task, data = assemble.assemble(settings)
    batch = data.draw("train", 3)
    assert batch["input_ids"].shape[:2] == (4, 4) and (batch["label"] == 0).all()
    for texts in batch["input_ids"]:
        assert len({tuple(ids) for ids in texts.tolist()}) == 4
    first, again = next(data.train(5)), next(data.train(5))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    other = next(data.train(5 + len(made) * 3 // 4))  # some epochs later
    assert not np.array_equal(first["input_ids"], other["input_ids"])
    last = list(data.eval())[-1]
    assert last["valid"].sum() == data.eval_examples % 4 and last["mask"][..., 0].all() and (last["mask"] <= 1).all()
    with pytest.raises(InputError, match="15 false captions need 16 different ones, found"):
        assemble.assemble(config(data__form="captions", data__false=15, batch_size=4, data__n=8))


def test_losses_are_the_releases() -> None:
    random = np.random.default_rng(0)
    logits, label = random.normal(size=(3, 7)).astype(np.float32), np.array([0, 6, 2])
    target = np.eye(7)[label]
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    bce = -(target * np.log(p) + (1 - target) * np.log(1 - p))
    np.testing.assert_allclose(fusion.answer_loss(jnp.asarray(logits), jnp.asarray(label)), bce.mean(1) * 7, rtol=1e-5)
    # Half of the rows look at the true caption, by chance; the same half where there is no key.
    match = jnp.zeros((6, 3, 2)).at[:, 0, 1].set(50.0).at[:, 1, 0].set(30.0)
    assert float(fusion.match_loss(match, None).max()) < 1e-5
    wrong = jnp.zeros((6, 3, 2)).at[:, 0, 0].set(50.0)
    looked = [tuple((np.asarray(fusion.match_loss(wrong, jax.random.key(k))) > 1).tolist()) for k in range(4)]
    assert all(sum(true) == 3 for true in looked) and len(set(looked)) > 1


def test_rewards_of_large_losses_are_told_apart_in_float64_or_nothing_moves_and_is_counted() -> None:
    """At first the sum over 3129 answers is above 2000; float32 has no reward below exp(-103)."""
    settings = bandit.Bandit(arms=12, skips=4)
    state = settings.start()
    subsets = bandit.candidates(settings, state, 0)
    assert len(set(bandit.rewards(np.array([110.0, 111.0, 700.0])).tolist())) == 3
    for losses in ([2169.0, 2170.0, 2171.0], [110.0, 111.0, 112.0]):
        with pytest.warns(UserWarning, match="are the losses too large"):
            after = bandit.update(settings, state, subsets, np.array(losses))
        assert (int(after.flat), int(after.updates)) == (1, 1) and not after.preference.any()
    moved = bandit.update(settings, state, subsets, np.array([80.0, 81.0, 82.0]))
    assert int(moved.flat) == 0 and moved.preference.any() and np.isfinite(moved.preference).all()


@pytest.mark.parametrize(
    ("arg", "overrides", "says"),
    [
        ("", {"das__skips": 4}, r"config.das: skips must be in 0..3 \(the arms\), found 4"),
        ("", {"das__skips": -1}, r"config.das: skips must be in 0..3 \(the arms\), found -1"),
        ("", {"das__skips": 3}, "config.das: 3 candidates need as many subsets, found 1 of 3 of 3 arms"),
        ("", {"das__candidates": 1}, "config.das: one candidate is its own baseline"),
        ("", {"das__candidates": 4}, "config.das: 4 candidates need as many subsets, found 3 of 1 of 3 arms"),
        ("", {"das__every": 0}, "config.das: every must be 1 step or more, found 0"),
        ("", {"das__warmup": 24}, "config.das.warmup must be below config.steps=24, or no update is ever due"),
        ("", {"das__phase": "both"}, "config.das.phase must be one of search, finetune, full, found 'both'"),
        ("", {"data__form": "poems"}, "config.data.form must be one of answers, pairs, captions, found 'poems'"),
        ("", {"model__family": "clip"}, "config.model.family must be one of meter, vilt, small, found 'clip'"),
        ("", {"model__remat": "dots"}, "remat of a fusion encoder must be none or full, found 'dots'"),
        ("", {"loss__match": -1.0}, "config.loss.match must be 0 or more, found -1.0"),
        ("", {"data__length": 3}, "config.data.length must be 8 or more, the tokens of a text, found 3"),
        ("", {"das__val_split": "val[:0]"}, r"split 'val\[:0\]' .* is empty, expected at least one question"),
        ("", {"das__val_split": "val[:1]"}, r"val\[:1\]' must have a batch of rows, config.batch_size=8, found 3"),
        ("", {"das__val_split": "", "data__train_split": "train[:1]"}, "must have a batch of rows, .*found 3"),
        ("phase=finetune", {}, "which layers go a search says: config.das.preferences must be its workdir"),
        ("phase=finetune", {"das__remove": "[3]"}, "skips must be in 0..2, found 3"),
        ("phase=finetune", {"das__remove": "[0"}, r"skips must be a list of modules, found '\[0'"),
        ("phase=finetune", {"das__preferences": "nowhere"}, "must be the workdir of a search, found 'nowhere'"),
    ],
)
def test_what_cannot_be_run_is_one_line(arg: str, overrides: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        assemble.assemble(config(arg, **overrides))
    assert "\n" not in str(caught.value)


def saved(spec: FusionSpec, folder: Path) -> Path:
    """A model on disk."""
    shapes = jax.eval_shape(Fusion(spec).init, jax.random.key(0))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda a: 0.1 * random.normal(size=a.shape).astype(np.float32), shapes)
    return weights.save(folder.with_suffix(".safetensors"), spec, {name: tree for name, tree in params.items() if tree})


def test_what_a_run_starts_from_has_to_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config("phase=full")
    base = saved(assemble.task(settings).spec, tmp_path / "base")
    searched = saved(assemble.task(config(init_from=base)).spec, tmp_path / "searched")
    cases: list[tuple[str, dict[str, Any], str]] = [
        (
            "",
            {"init_from": base, "model__width": 24},
            "config.model must have width 16, as config.init_from has, found 24",
        ),
        (
            "",
            {"init_from": base, "model__depth": 2},
            "config.model must have depth 3, as config.init_from has, found 6",
        ),
        ("", {"init_from": searched, "das__keep": True, "das__skip_width": 5}, "needs the adapters of a search of the"),
        ("phase=finetune", {"init_from": searched, "das__skips": 0}, "must be what the search started from"),
    ]
    for arg, overrides, says in cases:
        with pytest.raises(InputError, match=says) as caught:
            assemble.task(config(arg, **overrides))
        assert "\n" not in str(caught.value)
    short = saved(assemble.task(config("phase=finetune", init_from=base, das__remove="[1]")).spec, tmp_path / "short")
    with pytest.raises(InputError, match=r"a search needs all modules, found a model without \[1\]"):
        assemble.task(config(init_from=short))
    again = config("phase=finetune", init_from=short)
    assert assemble.task(again).summary["skips"] == [1]
    with pytest.raises(InputError, match=r"config.das.remove='\[0\]' asks for a model without \[0\], .* \[1\] already"):
        assemble.task(config("phase=finetune", init_from=short, das__remove="[0]"))
    monkeypatch.setattr(paths, "is_workdir", lambda where: where == "there")
    there, told = weights.load(searched)[0], {"preference": np.zeros(3, np.float32)}
    monkeypatch.setattr(checkpoint, "load_extra", lambda where: told)
    monkeypatch.setattr(checkpoint, "begun", lambda where: there if where == "there" else None)
    named = config("phase=finetune", init_from=base, das__preferences="there", das__skips=1)
    assert assemble.task(named).summary["skips"] == [2]
    told["preference"] = np.array([0.0, np.nan, 1.0], np.float32)
    with pytest.raises(InputError, match=r"the preferences in there must be finite, one for each arm .* \[ 0. nan"):
        assemble.task(named)
    there, mine = assemble.task(config(**SHAPES[1])).spec, "a fusion encoder of 2 streams and 3 modules"
    with pytest.raises(InputError, match=f"must be of {mine}, found those of a fusion encoder of 1 stream and 3"):
        assemble.task(named)


def test_another_task_has_another_head_and_the_rest_stays(tmp_path: Path) -> None:
    base = saved(assemble.task(config("phase=full")).spec, tmp_path / "base")
    before = flatten(weights.load(base)[1])
    task = assemble.task(config("phase=full", init_from=base, data__form="pairs"))
    after = flatten(task.init(jax.random.key(0))[0])
    assert task.spec.images == 2 and after["head/up/kernel"].shape == (64, 32)
    changed = {name for name in after if name not in before or not np.array_equal(after[name], before[name])}
    assert {name.split("/")[0] for name in changed} == {"head", "embed"}
    kinds = after["embed/marks/type"]
    np.testing.assert_array_equal(kinds, before["embed/marks/type"][[0, 1, 1]])
    # `vtjax eval` measures no head that nothing has trained.
    assert task.fresh == "a head"
    assert assemble.task(config("phase=full", init_from=base)).fresh == ""


def test_a_shortened_decoder_costs_what_its_formulas_say_row_by_row() -> None:
    text = LMSpec.uniform(depth=3, width=16, heads=2, mlp=24, vocab=29, context=40)
    tower = ViTSpec.uniform(depth=1, width=12, heads=2, mlp=16, image_size=8, patch=4)
    base = VLMSpec(tower, BridgeSpec(hidden=20), text, 29)
    style = dataclasses.replace(
        STYLES["lavin"], inner=STYLES["lavin"].inner.edit(width=4), skip=STYLES["lavin"].skip.edit(width=8)
    )
    whole, _ = das.install(base, None, style, None)
    short, _ = das.remove(whole, None, [1])
    assert deployed.whole(short).decoder.blocks == base.decoder.blocks and deployed.gone(short.decoder) == (1,)
    tokens = jnp.asarray([7, 30])
    skip = jnp.asarray(bandit.mask((1,), 3))
    expected = [flops.macs(short, n) + das.adapter_cost(short.decoder, n)[1] for n in (7, 30)]
    np.testing.assert_allclose(deployed.decoder_macs(short, tokens, None), expected, rtol=1e-6)
    np.testing.assert_allclose(deployed.decoder_macs(whole, tokens, skip), expected, rtol=1e-6)


def test_a_shortened_fusion_encoder_costs_what_its_formulas_say() -> None:
    for spec, skips in ((FusionSpec.small(2, depth=1, classes=5), (0, 2)), (FusionSpec.small(1, ranks=True), (1,))):
        short = spec.skipping(skips)
        assert deployed.fusion_macs(short, 9) == flops.macs(short, 9)
        skip = jnp.asarray(bandit.mask(skips, spec.arms))
        for texts in (1, 3):
            found = deployed.fusion_macs(spec, 9, texts, skip)
            np.testing.assert_allclose(found, deployed.fusion_macs(short, 9, texts), rtol=1e-6)
        assert deployed.whole(short).blocks == spec.blocks


def test_published_counts_are_reproduced() -> None:
    for row in counts.counted():
        digits = len(str(row["theirs"]).partition(".")[2])
        assert round(row["ours"], digits) == row["theirs"], row


@pytest.mark.slow
@pytest.mark.parametrize(("streams", "form"), SLOW_FORMS)
def test_a_search_and_what_comes_of_it(streams: int, form: str, tmp_path: Path) -> None:
    """It trains what DAS trains, by two programs; the model without the chosen modules is the one that skips them."""
    shape = {**SHAPES[streams], "data__form": form, "batch_size": 4}
    trained("phase=full,steps=2", tmp_path / "base", **shape)
    shape["init_from"] = tmp_path / "base"
    executables = Executables()
    task, result = trained("", tmp_path / "search", executables, **shape)
    assert executables.compiled["step"] == 1 and task.after_step.loss._cache_size() == 1
    extra = checkpoint.load_extra(tmp_path / "search")
    assert (int(extra["updates"]), int(extra["poisoned"]), int(extra["skip"].sum())) == (5, 0, 1)
    before, after = (flatten(checkpoint.load_params(tmp_path / name)[1]) for name in ("base", "search"))
    moved = {name for name, value in before.items() if not np.array_equal(value, after[name])}
    allowed = ("pool/", "head/up", "head/norm", "head/down", "head/rank", "embed/marks/type", "embed/marks/first")
    assert moved and all(name.startswith(allowed) for name in moved)
    chosen = bandit.final(extra["preference"], 1).tolist()
    kept = {**shape, "init_from": tmp_path / "search", "das__preferences": tmp_path / "search", "das__keep": True}
    settings = config("phase=finetune", **kept)
    short, data = assemble.assemble(settings)
    assert short.summary["skips"] == chosen
    again = loop.evaluate(short, data, settings, jax.device_get(short.init(jax.random.key(0))[0]))
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-5) and again["top1"] == result["top1"]
    # A run's own list cannot be exchanged for another.
    trained("phase=finetune,steps=2", tmp_path / "short", **shape, das__remove="[0]")
    with pytest.raises(InputError, match="asks for a model without"):
        trained("phase=finetune,steps=2", tmp_path / "short", **shape, das__remove="[1]")
    told = loop.decisions(short, data.eval("eval"), settings, short.init(jax.random.key(0))[0])
    assert told["skipped"].sum(1).tolist() == [1] * data.eval_examples
    assert set(told["macs"].tolist()) == {float(deployed.fusion_macs(short.spec, *_sizes(data)))}


def _sizes(data: Any) -> tuple[int, int]:
    shape = data.draw("eval", 0)["input_ids"].shape
    return shape[-1], shape[1] if len(shape) == 3 else 1


def command(workdir: Path, **overrides: Any) -> list[str]:
    given = {**SHAPES[1], "checkpoint__every": 4, **overrides}
    named = {**SMALL, **{name.replace("__", "."): str(value) for name, value in given.items()}}
    words = [sys.executable, "-m", "vtjax", "run", f"--config={CONFIG}", f"--workdir={workdir}"]
    return [*words, *(f"--config.{leaf}={value}" for leaf, value in named.items())]


@pytest.mark.slow
def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command(straight), check=True, **quiet)
    process = subprocess.Popen(command(cut), **quiet)
    lines = cut / "metrics.jsonl"
    while process.poll() is None and (not lines.exists() or lines.read_text().count("\n") < 11):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (cut / "result.json").exists()
    subprocess.run(command(cut), check=True, **quiet)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load_extra(cut), checkpoint.load_extra(straight))
    results = [json.loads((folder / "result.json").read_text()) for folder in (straight, cut)]
    assert results[0]["params_sha256"] == results[1]["params_sha256"]


@pytest.mark.slow
def test_a_search_over_eight_devices_is_the_search_on_one(tmp_path: Path) -> None:
    """The same global batch: masks equal, preferences within rounding; of pairs, whose losses are of the order of 1."""
    made = {}
    for devices in (1, 8):
        env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        words = command(tmp_path / str(devices), data__form="pairs")
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        made[devices] = checkpoint.load_extra(tmp_path / str(devices))
    assert (made[1]["skip"] == made[8]["skip"]).all() and int(made[8]["updates"]) == 5
    assert np.abs(made[1]["preference"]).max() > 1e-5
    np.testing.assert_allclose(made[1]["preference"], made[8]["preference"], atol=1e-6)


@pytest.mark.parametrize("policy", bandit.POLICIES)
def test_micro_batches_draw_by_the_law_of_the_bandit(policy: str) -> None:
    r = np.array([0.4, -1.0, 1.5, 0.0], np.float32)
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = jax.jit(jax.vmap(lambda k: phases.own_subset(jnp.asarray(r), 2, k, policy, (0, 2, 3, 5), 6)))
    found = np.asarray(draw(keys))
    assert (found.sum(1) == 2).all() and not found[:, [1, 4]].any()
    np.testing.assert_allclose(found[:, [0, 2, 3, 5]].mean(0), bandit.inclusion(r, 2, policy), atol=0.015)


def test_phases_map_arms_to_layers() -> None:
    """Arms may be some of the layers."""
    made = phases.Search(
        bandit.Bandit(3, 1, search=10), 0, 10, lambda p, b, skip: np.float32(0), layers=(1, 4, 5), depth=6
    )
    assert made.mask([2]).tolist() == [False] * 5 + [True]
    found = phases.most_preferred(jnp.asarray([0.0, 2.0, 1.0]), 2, (1, 4, 5), 6)
    assert np.flatnonzero(found).tolist() == [4, 5]
