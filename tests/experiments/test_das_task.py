# SPDX-License-Identifier: Apache-2.0
"""The experiment on DAS: search and fine-tuning as chained runs, what they change, cadence, resumption, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import vtjax as package
from configs import common
from experiments.das import phases, tables
from experiments.das import search as scripts
from vtjax.cli import assemble, main
from vtjax.cli import config as config_lib
from vtjax.errors import InputError
from vtjax.methods import das
from vtjax.ops import bandit
from vtjax.train import checkpoint, loop
from vtjax.train.executables import Executables
from vtjax.train.state import flatten
from vtjax.weights import store

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/das.py:tiny"
STEPS = 24
# One evaluation, short rows: tests compile much and compute little.
SMALL = {"data.pack": "2", "data.n": "16", "batch_size": "4", "checkpoint.best": "", "log_every": "1"}


def vtjax(capsys: Any, *arguments: str) -> dict[str, Any]:
    """A command in this process; the JSON of its last line."""
    assert main.main(list(arguments)) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def options(**overrides: Any) -> list[str]:
    named = {name.replace("__", "."): str(value) for name, value in overrides.items()}
    return [f"--config.{name}={value}" for name, value in {**SMALL, **named}.items()]


def config(name: str = CONFIG, **overrides: Any) -> config_lib.Config:
    named = {name.replace("__", "."): str(value) for name, value in overrides.items()}
    return config_lib.load_config(name, overrides={**SMALL, **named})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model without adapters, of the shape of `tiny`."""
    folder = tmp_path_factory.mktemp("base") / "run"
    shape = {"model__decoder__depth": 4, "model__tower__depth": 1}
    assert main.main(["run", "--config=configs/vlm.py:tiny,steps=2", *options(**shape), f"--workdir={folder}"]) == 0
    return folder


def search(base: Path, workdir: Path, **overrides: Any) -> dict[str, Any]:
    settings = config(f"{CONFIG},steps={STEPS}", init_from=base, workdir=workdir, **overrides)
    task, data = assemble.assemble(settings)
    return loop.train(task, data, settings, workdir)


@pytest.fixture(scope="module")
def found(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search from it."""
    folder = tmp_path_factory.mktemp("search") / "run"
    search(base, folder)
    return folder


def extra_of(folder: Path) -> Any:
    return checkpoint.load_extra(folder)


def test_a_search_trains_adapters_and_learns_preferences_and_nothing_else(base: Path, found: Path) -> None:
    before, after = (flatten(checkpoint.load_params(folder)[1]) for folder in (base, found))
    assert all((value == after[name]).all() for name, value in before.items())
    added = after.keys() - before.keys()
    assert added and all(name.startswith("decoder/das/") for name in added)
    for block in ("block_00", "block_03"):
        copied, norm = after[f"decoder/das/{block}/skip/norm_in/scale"], before[f"decoder/{block}/norm1/scale"]
        np.testing.assert_array_equal(copied, norm)
    moved = {name for name in added if name.endswith("up/kernel") and np.abs(after[name]).max() > 0}
    assert len(moved) == 8  # up-projections start at 0: inside of four layers, and instead of them
    extra = extra_of(found)
    # Warm-up 6 of 24 steps, then at once and every 4: after the steps 6, 10, 14, 18, 22, counted from 0.
    assert (int(extra["updates"]), int(extra["since"])) == (5, 1)
    assert np.abs(extra["preference"]).max() > 0 and np.isfinite(extra["preference"]).all()
    assert extra["skip"].sum() == 1
    lines = [json.loads(line) for line in (found / "metrics.jsonl").read_text().splitlines()]
    told = [line["updates"] for line in lines if "updates" in line]  # as the step found it
    assert [step for step in range(1, STEPS) if told[step] > told[step - 1]] == [7, 11, 15, 19, 23]


def test_the_result_of_a_search_says_what_it_found(found: Path) -> None:
    result, extra = json.loads((found / "result.json").read_text()), extra_of(found)
    assert result["skips"] == bandit.final(extra["preference"], 1).tolist() and len(result["skips"]) == 1
    assert result["preference"] == [float(r) for r in extra["preference"]]
    assert (result["updates"], result["flat"], result["poisoned"]) == (5, 0, 0)


@pytest.mark.parametrize(
    ("name", "leaves", "fresh"),
    [
        ("search", {}, "adapters"),
        ("search", {"das__keep": True}, "preferences"),
        ("finetune", {}, "adapters"),
        ("finetune", {"das__skips": 0}, "adapters"),
    ],
)
def test_what_only_training_gives_a_meaning_is_not_measured(
    found: Path, capsys: Any, name: str, leaves: dict[str, Any], fresh: str
) -> None:
    """An evaluation of a search that is named as a start would have other adapters or preferences than the search."""
    assert main.main(["eval", f"--config={CONFIG},phase={name}", *options(init_from=found, **leaves)]) == 2
    says = f"eval would measure fresh {fresh}, which no run has trained: --workdir=DIR names the run, found"
    assert says in (error := capsys.readouterr().err) and len(error.strip().splitlines()) == 1


def test_a_list_of_layers_and_a_search_are_not_both_asked(base: Path, found: Path) -> None:
    with pytest.raises(InputError, match=r"preferences must be empty where config.das.remove='\[1\]' says which"):
        assemble.task(config(f"{CONFIG},phase=finetune", init_from=base, das__remove="[1]", das__preferences=found))


def test_what_a_run_has_trained_is_measured_wherever_it_is_named(found: Path) -> None:
    for leaves in ({"das__preferences": found}, {"das__remove": "[1]"}):
        name = "search" if "das__preferences" in leaves else "finetune"
        assert assemble.task(config(f"{CONFIG},phase={name}", init_from=found, das__keep=True, **leaves)).fresh == ""


@pytest.mark.slow
def test_fine_tuning_does_without_what_the_search_prefers(base: Path, found: Path, tmp_path: Path, capsys: Any) -> None:
    skips = bandit.final(extra_of(found)["preference"], 1).tolist()
    run = [f"--config={CONFIG},steps=2,phase=finetune", *options(init_from=found), f"--workdir={tmp_path}/short"]
    result = vtjax(capsys, "run", *run)
    assert result["skips"] == skips and result["macs_per_prompt"] < result["dense_macs_per_prompt"]
    spec, params = checkpoint.load_params(tmp_path / "short")
    assert [i for i, block in enumerate(spec.decoder.blocks) if not block.attn] == skips
    assert f"block_0{skips[0]}" not in params["decoder"]
    assert {tuple(own) for own in params["decoder"]["das"].values()} == {("attn_in",), ("skip",)}
    kept, start = (flatten(tree) for tree in (params, checkpoint.load_params(base)[1]))
    assert all((start[name] == value).all() for name, value in kept.items() if "/das/" not in name)
    again = vtjax(capsys, "eval", f"--workdir={tmp_path}/short")
    assert again["top1"] == result["top1"] and again["loss"] == pytest.approx(result["loss"], rel=1e-5)
    rows = tmp_path / "rows.jsonl"
    vtjax(capsys, "eval", f"--workdir={tmp_path}/short", f"--decisions={rows}")
    made = [json.loads(line) for line in rows.read_text().splitlines()]
    assert all(np.flatnonzero(row["skipped"]).tolist() == skips and row["macs"] > 0 for row in made)
    sizes = ["--batch=4", "--images=4", "--rounds=1", "--calls=1"]
    timed = vtjax(capsys, "bench", f"--workdir={tmp_path}/short", *sizes)
    assert timed["reduced"]["macs_agree"] and timed["dense"]["macs_agree"] and timed["mac_ratio"] > 1
    m = package.load(tmp_path / "short")
    assert das.is_installed(m.spec.decoder)
    assert isinstance(m.answer("experiments/vlm/circle.png", "shape of the large one?", new_tokens=2), str)
    # The search's adapters are thrown away, or kept.
    learned = checkpoint.load_params(found)[1]["decoder"]["das"]
    for keep in (False, True):
        task = assemble.task(config(f"{CONFIG},phase=finetune", init_from=found, das__keep=keep))
        own = task.init(jax.random.key(0))[0]["decoder"]["das"][f"block_0{skips[0]}"]["skip"]
        assert np.array_equal(own["up"]["kernel"], learned[f"block_0{skips[0]}"]["skip"]["up"]["kernel"]) == keep


def test_which_layers_are_left_out_can_be_said_otherwise(base: Path) -> None:
    def skips(**overrides: Any) -> list[int]:
        task = assemble.task(config(f"{CONFIG},phase=finetune", init_from=base, **overrides))
        return task.summary["skips"]

    assert skips(das__remove="[2, 0]") == [0, 2] and skips(das__remove="[]") == [] and skips(das__skips=0) == []
    drawn = [skips(das__remove="random", das__skips=2, seed=seed) for seed in range(8)]
    assert all(len(s) == 2 for s in drawn) and len(set(map(tuple, drawn))) > 2
    assert drawn[0] == skips(das__remove="random", das__skips=2, seed=0)


def test_a_run_that_left_nothing_out_is_evaluated_as_it_is(base: Path, tmp_path: Path) -> None:
    """Also where a bridge was trained, which forbids a search's workdir as a start."""
    run = f"{CONFIG},phase=finetune"
    made = assemble.task(config(run, init_from=base, das__skips=0))
    params = made.init(jax.random.key(3))[0]
    store.save(tmp_path / "run.safetensors", made.spec, params)
    values = config(run, init_from=tmp_path / "run.safetensors", das__skips=0).to_dict()
    values["optim"]["groups"]["bridge"] = common.group("^bridge/")
    again = assemble.task(config_lib.from_dict(values, "test"))
    assert again.spec.decoder == made.spec.decoder and not again.fresh
    jax.tree.map(np.testing.assert_array_equal, again.init(jax.random.key(0))[0], params)


@pytest.mark.slow
def test_two_programs_are_compiled_for_a_hundred_steps(base: Path, tmp_path: Path) -> None:
    settings = config(f"{CONFIG},steps=100", init_from=base, workdir=tmp_path, das__skips=2, das__every=10)
    task, data = assemble.assemble(settings)
    executables = Executables()
    loop.train(task, data, settings, tmp_path, executables)
    extra = extra_of(tmp_path)
    assert executables.compiled["step"] == 1 and task.after_step.loss._cache_size() == 1  # type: ignore
    assert int(extra["updates"]) == 8 and int(extra["poisoned"]) == 0  # after the steps 25, 35, ..., 95


class Cut(Exception):
    """What ends a run in the middle."""


@pytest.mark.slow
def test_a_search_that_was_cut_off_goes_on_as_if_it_had_not(base: Path, found: Path, tmp_path: Path) -> None:
    settings = config(f"{CONFIG},steps={STEPS}", init_from=base, workdir=tmp_path, checkpoint__every=7)
    task, data = assemble.assemble(settings)

    def cut(state: Any, frozen: Any, draw: Any, step: int) -> Any:
        if step == 12:
            raise Cut
        return task.after_step(state, frozen, draw, step)

    with pytest.raises(Cut):
        loop.train(dataclasses.replace(task, after_step=cut), data, settings, tmp_path)
    resumed = search(base, tmp_path, checkpoint__every=7)
    assert resumed["params_sha256"] == json.loads((found / "result.json").read_text())["params_sha256"]
    jax.tree.map(np.testing.assert_array_equal, extra_of(tmp_path), extra_of(found))


@pytest.mark.slow
def test_a_search_that_was_composed_is_started_again(tmp_path: Path, capsys: Any) -> None:
    """Without a run that it starts from: its result stands; without result and last checkpoint it is made again."""
    run = [f"--config={CONFIG},steps=4", *options(das__warmup=1, das__every=1, checkpoint__every=2)]
    first = vtjax(capsys, "run", *run, f"--workdir={tmp_path}/run")
    assert vtjax(capsys, "run", *run, f"--workdir={tmp_path}/run") == first
    (tmp_path / "run/result.json").unlink()
    for last in (tmp_path / "run/checkpoints").glob("*4*"):
        shutil.rmtree(last)
    again = vtjax(capsys, "run", *run, f"--workdir={tmp_path}/run")
    assert (again["step"], again["params_sha256"]) == (4, first["params_sha256"])


def test_a_composed_run_goes_on_with_the_spec_of_its_checkpoint(tmp_path: Path) -> None:
    """Also without layers; and other layers than those that are gone cannot be asked for."""
    leaves = {"workdir": tmp_path, "das__remove": "[2]"}
    settings = config(f"{CONFIG},phase=finetune,steps=1", **leaves)
    task, data = assemble.assemble(settings)
    loop.train(task, data, settings, tmp_path)
    again = assemble.task(config(f"{CONFIG},phase=finetune,steps=1", **leaves))
    shapes = [flatten(jax.eval_shape(t.init, jax.random.key(0))[0]) for t in (task, again)]
    assert again.spec == task.spec and again.summary["skips"] == [2]
    assert {k: v.shape for k, v in shapes[0].items()} == {k: v.shape for k, v in shapes[1].items()}
    named = assemble.task(config(f"{CONFIG},phase=finetune", init_from=tmp_path))
    assert named.summary["skips"] == [2] and named.fresh == ""
    for start in ("workdir", "init_from"):
        with pytest.raises(
            InputError, match=r"config.das.remove='\[0\]' asks .* without \[0\], .* \[2\] already"
        ) as told:
            assemble.task(config(f"{CONFIG},phase=finetune", **{start: tmp_path, "das__remove": "[0]"}))
        assert "\n" not in str(told.value)


def test_validation_batches_are_fresh_and_disjoint_or_always_the_same(base: Path) -> None:
    settings = config(init_from=base)
    task, data = assemble.assemble(settings)
    drawn = [set(data.draw("val", index)["index"].tolist()) for index in range(4)]
    assert not set.intersection(*drawn[:2]) and not drawn[2] & drawn[3]
    asked = []

    def draw(split: str, index: int) -> None:
        asked.append((split, index))

    for fixed in (False, True):
        made = phases.Search(
            bandit.Bandit(4, 1, every=2, warmup=0, search=10),
            0,
            10,
            lambda p, b, skip: np.float32(skip[0]),
            fixed=fixed,
        )
        state = dataclasses.make_dataclass("State", ["params", "extra"])(None, made.start(None))
        for step in range(1, 7):
            # What lies on the device is read at the first step only.
            here = state.extra if step == 1 else None
            state = made(dataclasses.replace(state, extra=here), None, draw, step)
    assert asked == [("val", 0), ("val", 1), ("val", 2)] + [("val", 0)] * 3
    # A layer that costs something is preferred less.
    assert state.extra["preference"][0] == state.extra["preference"].min() < 0


def test_a_ramp_and_the_greedy_choice() -> None:
    price = np.array([0.4, 0.1, 0.3, 0.2])
    made = phases.Search(
        bandit.Bandit(4, 2, candidates=0, search=4), 0, 4, lambda p, b, skip: np.float32(price[skip].sum()), greedy=1
    )
    state = dataclasses.make_dataclass("State", ["params", "extra"])(None, made.start(None))
    counts = [int(state.extra["skip"].sum())]
    for step in range(1, 5):
        state = made(state, None, lambda split, index: None, step)
        counts.append(int(state.extra["skip"].sum()))
    assert counts == [2, 2, 2, 2, 2] and bandit.final(state.extra["preference"], 2).tolist() == [3, 1]
    slow = dataclasses.replace(made, ramp=12)
    assert [int(slow._extra(slow.bandit.start(), step)["skip"].sum()) for step in (0, 1, 2, 4, 9)] == [1, 1, 2, 2, 2]


@pytest.mark.slow
def test_a_search_begins_with_what_another_one_learned_and_says_how_far_it_moved(
    base: Path, found: Path, tmp_path: Path, capsys: Any
) -> None:
    task = assemble.task(config(init_from=base, das__preferences=found))
    extra = task.init(jax.random.key(0))[2]
    np.testing.assert_array_equal(extra["preference"], extra_of(found)["preference"])
    assert int(extra["updates"]) == 0
    made = phases.Search(bandit.Bandit(4, 1, search=10), 0, 10, lambda p, b, skip: np.float32(skip[0] + 1))
    before, after = np.array([3, 2, 1, 0], np.float32), np.array([0, 2, 1, 3], np.float32)
    told = phases.report(made, None, after, before, lambda split, index: None)
    assert (told["skips_before"], told["skips"], told["loss_before"], told["loss"]) == ([0], [3], 2.0, 1.0)
    assert told["rank_correlation"] == pytest.approx(-0.8) and "skips [3]" in capsys.readouterr().err
    # Ties share their rank, and where all are tied nothing can be said.
    assert phases.drift(made, np.zeros(4, np.float32), after)["rank_correlation"] is None
    assert phases.drift(made, np.array([1.0, 1, 0, 0]), np.array([2.0, 2, 1, 1]))["rank_correlation"] == pytest.approx(
        1.0
    )
    # `result.json` has it.
    assert task.conclusion is not None and task.conclusion(extra)["rank_correlation"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "overrides", "says"),
    [
        ("search", {"das__phase": "both"}, "config.das.phase must be one of search, finetune, found 'both'"),
        ("search", {"das__by": "chance"}, "config.das.by must be one of bandit, greedy, found 'chance'"),
        ("search", {"das__style": "meter"}, "config.das.style must be one of vilt, lavin, llama, llava, found 'meter'"),
        ("search", {"das__skips": 5}, r"config.das: skips must be in 0..4 \(the arms\), found 5"),
        ("search", {"das__skips": -1}, r"config.das: skips must be in 0..4 \(the arms\), found -1"),
        ("search", {"das__warmup": 30}, "config.das.warmup must be below config.steps=30, or no update is ever due"),
        ("search", {"das__every": -1}, "config.das: every must be 1 step or more, found -1"),
        ("search", {"das__every": 0}, "config.das: every must be 1 step or more, found 0"),
        ("search", {"das__candidates": 1}, "config.das: one candidate is its own baseline"),
        ("search", {"das__candidates": 5}, "config.das: 5 candidates need as many subsets, found 4 of 1 of 4 arms"),
        ("search", {"das__ramp": -1}, "config.das.ramp must be 0 or more, found -1"),
        (
            "search",
            {"das__skips": 2, "das__candidates": 5, "das__ramp": 60},
            "config.das.ramp=60: 5 candidates need as many subsets, found 4 of 1 of 4 arms",
        ),
        ("search", {"das__preferences": "nowhere"}, "must be the workdir of a search, found 'nowhere'"),
        ("search", {"das__style": "lavin", "das__width": 3}, "AdapterSpec.groups must divide width=3, found 2"),
        ("finetune", {"das__remove": "[4]"}, "skips must be in 0..3, found 4"),
        (
            "finetune",
            {"das__remove": "[1]", "das__preferences": "configs"},
            "preferences must be the workdir of a search",
        ),
        ("finetune", {"das__remove": "[1, 1]"}, "skips must name each module once, found 1 twice"),
        ("finetune", {"das__remove": "some"}, "skips must be a list of modules, found 'some'"),
        ("finetune", {}, "which layers go a search says: config.das.preferences must be its workdir"),
        ("finetune", {"das__keep": True, "das__skips": 0}, "config.das.keep=True needs the adapters of a search"),
    ],
)
def test_what_cannot_be_built_is_one_line(name: str, overrides: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        assemble.task(config(f"{CONFIG},phase={name}", **overrides))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_arms_beside_it_are_the_plain_experiment(base: Path) -> None:
    task = assemble.task(config(f"{CONFIG},arm=lora", init_from=base))
    shapes = flatten(jax.eval_shape(task.init, jax.random.key(0))[0])
    assert {path for path in shapes if task.trainable(path)} == {path for path in shapes if "/lora_" in path} != set()
    assert assemble.task(config(f"{CONFIG},arm=full", init_from=base)).trainable("decoder/norm/scale")


@pytest.mark.slow
def test_a_search_over_eight_devices_is_the_search_on_one(base: Path, tmp_path: Path) -> None:
    """The same global batch: masks equal, preferences within rounding."""
    made = {}
    for devices in (1, 8):
        folder = tmp_path / str(devices)
        flags = f"--xla_force_host_platform_device_count={devices}"
        command = [sys.executable, "-m", "vtjax", "run", f"--config={CONFIG},steps={STEPS}", f"--workdir={folder}"]
        command += options(init_from=base, batch_size=8)
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        made[devices] = extra_of(folder)
    assert (made[1]["skip"] == made[8]["skip"]).all() and int(made[8]["updates"]) == 5
    np.testing.assert_allclose(made[1]["preference"], made[8]["preference"], atol=1e-6)


def test_a_table_has_a_value_under_each_header() -> None:
    record = {"kind": "whole", "steps": 200, "candidate_passes": 57, "compilations": 2, "date": "2026-01-01"}
    record |= {"hardware": {"cpu": "any", "cores": 2, "devices": {}}, "versions": {"jax": "0"}}
    made = tables.whole([{**record, "seconds": {"search": 60.0, "finetune": 30.0}}]).splitlines()
    assert [len(line.split("|")) for line in made[:3]] == [8, 8, 8]
    assert [value.strip() for value in made[2].split("|")[1:-1]] == ["200", "57", "2", "60", "30", "2.00"]


def test_a_difference_says_its_interval_over_seeds_from_three_seeds_on() -> None:
    def runs(*right: int) -> list[dict[str, Any]]:
        return [{"seed": seed, "correct": "1" * n + "0" * (100 - n)} for seed, n in enumerate(right)]

    # Differences of 1, 2 and 3 points: a deviation of 1, and t of 2 degrees of freedom 4.303.
    assert tables.difference(runs(51, 52, 53), runs(50, 50, 50, 50)).startswith("+2.0 [")
    assert tables.difference(runs(51, 52, 53), runs(50, 50, 50, 50)).endswith("], t ± 2.5")
    assert tables.difference(runs(51, 53), runs(50, 50)) == "+2.0 (by seed +1.0, +3.0)"
    assert tables.difference(runs(51), runs(50)).endswith("]")
    # A draw by chance that is counted twice makes nothing more certain.
    one = tables.difference(runs(51, 52, 53), runs(50, 50, 50))
    assert one == tables.difference(runs(51, 52, 53), runs(50, 50, 50), runs(50, 50, 50))


def test_planted_redundancy_is_found() -> None:
    found = [scripts.planted(scripts.EASY, 200, policy, seed)[200] for policy in bandit.POLICIES for seed in range(3)]
    assert sum(sorted(places) == [0, 1, 2, 3] for places in found) >= 5


@pytest.mark.slow
def test_layers_that_do_nothing_are_found_in_a_real_model() -> None:
    found = [scripts.toy(seed, 100) for seed in range(3)]
    assert [r["hits"]["100"] for r in found] == [2, 2, 2] and {r["compilations"] for r in found} == {1}
    for r in found:
        assert sorted(np.argsort(r["loss_alone"])[:2].tolist()) == r["idle"] and max(r["loss_alone"]) > 1e-3


@pytest.mark.slow
def test_chance_is_chance() -> None:
    for policy in bandit.POLICIES:
        assert scripts.null_record("null", 20, policy)["chi2"] < 31  # 11 degrees of freedom: the 0.999 quantile
