# SPDX-License-Identifier: Apache-2.0
"""The LTMP experiment through the command line, on the tiny config: what is trained, recorded, compared, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.ltmp import deploy, settle, start
from vtjax.account import flops
from vtjax.cli import assemble, decisions, main
from vtjax.cli import config as config_lib
from vtjax.errors import InputError
from vtjax.methods import ltmp
from vtjax.models.vit import ViT
from vtjax.spec import ViTSpec
from vtjax.train import checkpoint
from vtjax.train.state import flatten

CONFIG = "configs/ltmp.py:tiny"


def vtjax(capsys: Any, *arguments: str) -> dict[str, Any]:
    """A command in this process; the JSON of its last line."""
    assert main.main(list(arguments)) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ltmp") / "run"
    assert main.main(["run", f"--config={CONFIG}", f"--workdir={folder}", "--config.ltmp.prune_threshold=0.055"]) == 0
    return folder


def first_params(**overrides: str) -> Any:
    task = assemble.task(config_lib.load_config(CONFIG, overrides=overrides))
    return jax.jit(lambda key: task.init(key)[0])(jax.random.split(jax.random.key(0), 2)[0])


def test_only_the_thresholds_change_and_stay_in_range(run: Path) -> None:
    _, params = checkpoint.load_params(run)
    before, after = flatten(first_params(**{"ltmp.prune_threshold": "0.055"})), flatten(params)
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {"ltmp/merge_threshold", "ltmp/prune_threshold"}
    for path in changed:
        assert ((after[path] >= 0) & (after[path] <= 1)).all()
    state = json.loads((run / "result.json").read_text())
    assert state["mac_ratio"] < 0.97 and state["dense_macs_per_image"] == 340416


def test_thresholds_are_clamped_after_every_step(tmp_path: Path, capsys: Any) -> None:
    vtjax(
        capsys,
        "run",
        f"--config={CONFIG},steps=2",
        f"--workdir={tmp_path}/run",
        "--config.optim.lr=1e6",
        "--config.optim.groups.prune.lr_scale=1.0",
    )
    _, params = checkpoint.load_params(tmp_path / "run")
    values = np.concatenate(list(params["ltmp"].values()))
    assert ((values >= 0.0) & (values <= 1.0)).all() and {0.0, 1.0} & set(values.tolist())


def test_a_third_group_trains_the_weights(tmp_path: Path, capsys: Any) -> None:
    vtjax(
        capsys,
        "run",
        f"--config={CONFIG},steps=2",
        f"--workdir={tmp_path}/run",
        "--config.optim.groups.weights.frozen=false",
        # Both start from one array, which a step may not be given twice to overwrite.
        *("--config.ema=0.9", "--config.ltmp.start=even"),
    )
    _, params = checkpoint.load_params(tmp_path / "run")
    before = flatten(first_params())
    changed = {path for path, value in flatten(params).items() if not np.array_equal(value, before[path])}
    assert "block_00/mlp/up/kernel" in changed and "head/kernel" in changed


def test_decisions_are_recorded_image_by_image(run: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "decisions.jsonl"
    result = vtjax(capsys, "eval", f"--workdir={run}", f"--decisions={file}")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(256))
    assert np.mean([row["correct"] for row in rows]) == pytest.approx(result["top1"])
    assert np.mean([row["macs"] for row in rows]) == pytest.approx(result["macs_per_image"], rel=1e-6)
    spec, _ = checkpoint.load_params(run)
    for row in rows[:20]:
        assert row["macs"] == pytest.approx(flops.macs(spec, [17, *row["kept"]]), rel=1e-6)
        lost = np.add(row["merged"], row["pruned"])
        assert list(lost) == list(-np.diff([17, *row["kept"]]))
    assert result["guard"] == "within" and result["drift"] < 0.25


def test_the_model_that_was_saved_is_loaded_with_its_reducers(run: Path, tmp_path: Path, capsys: Any) -> None:
    import vtjax as package

    model = package.load(run)
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    _, aux = jax.jit(model.apply)(model.params, images)
    assert all("decisions" in block for block in aux["blocks"])


def test_drift_is_found_and_guarded(run: Path, tmp_path: Path, capsys: Any) -> None:
    saved = json.loads((run / decisions.FILE).read_text())
    other = {**saved, "kept": (np.asarray(saved["kept"]) - 20).tolist()}
    (run / decisions.FILE).write_text(json.dumps(other))
    try:
        eval_ = ["eval", f"--workdir={run}"]
        warned = vtjax(capsys, *eval_, f"--decisions={tmp_path}/a.jsonl")
        assert (warned["guard"], warned["drift"], warned["drift_of"]) == ("warn", 1.0, "kept[0]")
        assert main.main([*eval_, f"--decisions={tmp_path}/a.jsonl"]) == 0
        assert "warning: decisions differ" in capsys.readouterr().err
        dense = vtjax(capsys, *eval_, "--config.guard.action=dense")
        assert dense["guard"] == "dense" and dense["mac_ratio"] == 1.0
        relaxed = vtjax(capsys, *eval_, "--config.guard.action=relax", f"--decisions={tmp_path}/b.jsonl")
        assert warned["mac_ratio"] < relaxed["mac_ratio"] < 1.0
        rows = [json.loads(line) for line in Path(tmp_path, "b.jsonl").read_text().splitlines()]
        assert np.mean([row["macs"] for row in rows]) == pytest.approx(relaxed["macs_per_image"], rel=1e-6)
    finally:
        (run / decisions.FILE).write_text(json.dumps(saved))


@pytest.mark.slow
def test_a_sweep_over_thresholds_compiles_once(tmp_path: Path, run: Path, capsys: Any) -> None:
    dense = tmp_path / "dense"
    vtjax(capsys, "run", "--config=configs/vit.py:tiny,steps=1", f"--workdir={dense}", "--config.optim.warmup=0")
    result = vtjax(
        capsys,
        "sweep",
        f"--config={CONFIG}",
        "--mode=eval",
        f"--config.init_from={dense}",
        "--grid=config.ltmp.merge_threshold=0.5,0.7,0.9,1.0",
        "--grid=config.ltmp.prune_threshold=0.0,0.04,0.06",
        f"--workdir={tmp_path}/sweep",
    )
    assert (result["points"], result["failed"], result["compilations"]) == (12, 0, 1)
    lines = [json.loads(line) for line in (tmp_path / "sweep" / "sweep.jsonl").read_text().splitlines()]
    spent = {tuple(line["config"].values()): line["mac_ratio"] for line in lines}
    assert spent[1.0, 0.0] == 1.0 and spent[0.5, 0.0] < spent[0.9, 0.0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"ltmp.target": "0.05"}, r"config.ltmp.target must be above 0.\d+, which the first block's attention"),
        ({"ltmp.target": "1.1"}, "at most 1, found 1.1"),
        ({"ltmp.budget_weight": "-1"}, "config.ltmp.budget_weight must be 0 or more, found -1"),
        ({"loss.label_smoothing": "1.5"}, r"config.loss.label_smoothing must be in \[0, 1\), found 1.5"),
        ({"loss.distill": "2"}, r"config.loss.distill must be in \[0, 1\], found 2"),
        ({"ltmp.tau": "0"}, "tau must be positive and finite, found 0"),
        ({"ltmp.variant": "tome"}, "variant must be one of ltmp, ltm, ltp, ltpm, found 'tome'"),
        ({"ltmp.form": "exact"}, "form must be one of consistent, faithful, found 'exact'"),
        ({"ltmp.budget": "sum"}, "config.ltmp.budget must be one of image, batch, found 'sum'"),
        ({"ltmp.measured": "x"}, "config.ltmp.measured must be one of deployed, masked"),
        ({"ltmp.start": "x"}, "config.ltmp.start must be one of authors, even"),
        ({"ltmp.slope": "2"}, r"config.ltmp.slope must be in \[-1, 1\], found 2"),
        ({"ltmp.prune_share": "-0.5"}, r"config.ltmp.prune_share must be in \[0, 1\], found -0.5"),
        ({"ltmp.start_images": "0"}, "config.ltmp.start_images must be at least 1, found 0"),
        ({"ltmp.settle_images": "-1"}, "config.ltmp.settle_images must be 0 or more, found -1"),
        ({"ltmp.merge_threshold": "1.5"}, r"merge_threshold must be finite and in \[0, 1\]"),
        ({"ltmp.merge_threshold": "nan"}, "config.ltmp.merge_threshold must be a float .*, found 'nan'"),
        (
            {"ltmp.start": "even", "ltmp.merge_threshold": "0.5"},
            "config.ltmp.start must be 'authors' where a threshold",
        ),
        ({"ltmp.form": "faithful", "ltmp.relative": "true"}, "faithful form compares plain importance"),
        ({"ltmp.form": "faithful", "ltmp.attached": "true"}, "faithful form trains through masks only"),
        ({"ltmp.form": "faithful", "model.registers": "2"}, "faithful form needs a class token as the only prefix"),
        ({"model.heads": "5"}, "heads"),
        ({"ltmp.deploy.form": "x"}, "config.ltmp.deploy.form must be one of packed, fixed, masked"),
        ({"ltmp.deploy.groups": "0"}, "config.ltmp.deploy.groups must be at least 1, found 0"),
        ({"guard.action": "stop"}, "config.guard.action must be one of off, warn, relax, dense, found 'stop'"),
        ({"guard.bound": "0"}, r"config.guard.bound must be in \(0, 1\], found 0"),
    ],
)
def test_bad_settings_get_one_line(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        assemble.task(config_lib.load_config(CONFIG, overrides=overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"ltmp.variant": "ltm"}, "config.ltmp.variant must be 'ltmp', under which the thresholds .* were learned"),
        ({"ltmp.tau": "0.5"}, "config.ltmp.tau must be 0.1, under which"),
        ({"ltmp.attached": "true"}, "config.ltmp.attached must be False, as the thresholds"),
        ({"model.image_size": "(32,32)"}, "config.model.image_size must be .*, for which the thresholds"),
    ],
)
def test_thresholds_learned_otherwise_are_refused(run: Path, overrides: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        assemble.task(config_lib.load_config(CONFIG, overrides={"init_from": str(run), **overrides}))


@pytest.mark.slow
def test_the_relative_form_trains(tmp_path: Path, capsys: Any) -> None:
    result = vtjax(
        capsys, "run", f"--config={CONFIG},steps=2", f"--workdir={tmp_path}/run", "--config.ltmp.relative=true"
    )
    assert result["step"] == 2 and np.isfinite(result["loss"])


def test_thresholds_that_are_given_replace_those_of_a_run(run: Path) -> None:
    def loaded(**overrides: str) -> Any:
        task = assemble.task(config_lib.load_config(CONFIG, overrides={"init_from": str(run), **overrides}))
        return task.init(jax.random.key(0))[0]["ltmp"]

    learned = checkpoint.load_params(run)[1]["ltmp"]
    given = loaded(**{"ltmp.merge_threshold": "0.7"})
    np.testing.assert_array_equal(given["merge_threshold"], np.full(2, 0.7, np.float32))
    np.testing.assert_array_equal(given["prune_threshold"], learned["prune_threshold"])


def test_where_learning_began_does_not_replace_what_was_learned(run: Path) -> None:
    """The run was started with a prune threshold, which its config keeps."""
    config = config_lib.of_workdir(str(run), {"init_from": str(run), "workdir": ""})
    assert config.ltmp.prune_threshold == 0.055 and deploy.replaced(config) == []
    learned = checkpoint.load_params(run)[1]["ltmp"]
    for name, values in assemble.task(config).init(jax.random.key(0))[0]["ltmp"].items():
        np.testing.assert_array_equal(values, learned[name])


def test_an_evaluation_takes_the_thresholds_that_are_given(run: Path, capsys: Any) -> None:
    off = ("--config.ltmp.merge_threshold=1.0", "--config.ltmp.prune_threshold=0.0")
    assert vtjax(capsys, "eval", f"--workdir={run}", *off)["mac_ratio"] == 1.0
    assert vtjax(capsys, "eval", f"--workdir={run}", off[0])["mac_ratio"] < 1.0


def test_another_dtype_than_the_thresholds_were_learned_in_is_said(run: Path, capsys: Any) -> None:
    spec = assemble.task(config_lib.load_config(CONFIG, overrides={"init_from": str(run)})).spec
    assert ltmp.learned_dtype(spec) == "float32" and "were learned in" not in capsys.readouterr().err
    assemble.task(config_lib.load_config(CONFIG, overrides={"init_from": str(run), "dtype": "bfloat16"}))
    assert "learned in float32, config.dtype is bfloat16" in capsys.readouterr().err
    other = assemble.task(config_lib.load_config(CONFIG, overrides={"dtype": "bfloat16"})).spec
    assert ltmp.learned_dtype(other) == "bfloat16"


def test_bare_weights_are_deployed_with_the_thresholds_that_learning_starts_from(run: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    assert main.main(["run", "--config=configs/vit.py:tiny,steps=1", f"--workdir={dense}"]) == 0
    config = config_lib.load_config(CONFIG, overrides={"init_from": str(dense), "ltmp.start": "even"})
    task = assemble.task(config)
    images = deploy.photographs(config, task.spec, "eval", 4)
    reduced, whole = deploy.deploy(config, task, images, None)
    started = reduced.params[ltmp.NAME]
    assert not np.array_equal(started["merge_threshold"], ltmp.starts("ltmp", 2)["merge_threshold"])
    assert 0.7 < reduced.macs(images) / whole.macs < 0.9  # the target is 0.8


def test_decisions_need_a_model_that_decides_and_a_folder(tmp_path: Path, run: Path, capsys: Any) -> None:
    assert main.main(["eval", f"--workdir={run}", f"--decisions={tmp_path}/no/file"]) == 2
    assert "--decisions must be a file in a folder that exists" in capsys.readouterr().err
    dense = tmp_path / "dense"
    vtjax(capsys, "run", "--config=configs/vit.py:tiny,steps=1", f"--workdir={dense}", "--config.optim.warmup=0")
    assert main.main(["eval", f"--workdir={dense}", f"--decisions={tmp_path}/file"]) == 2
    assert "--decisions needs a model that decides per image" in capsys.readouterr().err
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[1, 2]", '{"kept": []}', '{"macs": [1.0]}', '{"macs": [], "count": 0, "split": "train"}'),
        '{"macs": [1.0, NaN], "count": 2, "split": "train"}',
        '{"macs": [1.0], "kept": [[4], [4]], "count": 1, "split": "train"}',
        '{"macs": [1.0, 2.0], "kept": [[4], [4, 3]], "count": 2, "split": "train"}',
    ],
)
def test_a_damaged_calibration_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / decisions.FILE).write_text(content)
    with pytest.raises(InputError, match=f"{decisions.FILE} must"):
        decisions.load(str(tmp_path))


def test_drift_is_the_largest_kolmogorov_smirnov_distance() -> None:
    there = {"kept": np.array([[4, 1], [4, 2], [4, 3], [4, 4]]), "macs": np.arange(4.0)}
    here = {"kept": np.array([[4, 3], [4, 4], [4, 5], [4, 6]]), "macs": np.arange(4.0), "index": np.arange(4)}
    assert decisions.drift(here, there) == (0.5, "kept[1]")
    assert decisions.drift(there, there) == (0.0, "")
    with pytest.raises(InputError, match=r"must hold kept \[2\] per image, found \[3\]"):
        decisions.drift(here, {"kept": np.zeros((4, 3))})


def test_rates_spend_the_target() -> None:
    dense = ViTSpec.uniform(depth=12, width=192, heads=3, mlp=768, image_size=224, patch=16, classes=1000)
    spec, _ = ltmp.install(dense)
    for target in (0.45, 0.6, 0.8):
        for slope in (-0.5, 0.0, 1.0):
            removed = start.rates(spec, target, slope)
            tokens = np.rint(197 - np.concatenate([[0], np.cumsum(removed)])).astype(int).tolist()
            assert flops.macs(spec, tokens) / flops.macs(spec) == pytest.approx(target, abs=0.003)
    even = start.rates(spec, 0.8, 0.0)
    assert np.allclose(even, even[0])
    with_slope = start.rates(spec, 0.8, 0.5)
    assert np.allclose(np.diff(with_slope), np.diff(with_slope)[0])
    assert with_slope[0] == pytest.approx(3 * with_slope[-1])


@pytest.mark.parametrize("variant", ["ltmp", pytest.param("ltpm", marks=pytest.mark.slow)])
def test_even_thresholds_remove_what_the_rates_say(variant: str) -> None:
    dense = ViTSpec.uniform(depth=3, width=16, heads=2, mlp=32, image_size=24, patch=4, classes=4)
    spec, _ = ltmp.install(dense, variant=variant)
    fresh = jax.jit(ViT(dense).init)(jax.random.key(0))  # in which all tokens are alike, up to rounding
    params = jax.tree.map(lambda x: x + 0.2 * np.random.default_rng(x.size).normal(size=x.shape), fresh)
    images = np.asarray(jax.random.normal(jax.random.key(1), (10, 24, 24, 3)))
    thresholds = start.even(spec, params, images, 0.7, 0.4, 0.25, 0.2, batch=4)
    assert thresholds.keys() == ltmp.starts(variant, 3).keys()
    _, aux = jax.jit(ltmp.vit(spec).apply)({**params, ltmp.NAME: thresholds}, images)
    for name, part in (("merged", 1 - np.array([0.2, 0.4, 0.6])), ("pruned", np.array([0.2, 0.4, 0.6]))):
        alone = {"ltm": float(name == "merged"), "ltp": float(name == "pruned")}.get(variant)
        expected = start.rates(spec, 0.7, 0.25) * (part if alone is None else alone)
        found = [float(block["decisions"][name].sum()) for block in aux["blocks"]]
        # Tokens within rounding of a threshold may fall to either side of it in another program.
        assert np.abs(np.asarray(found) - 10 * expected).max() <= 2


@pytest.mark.parametrize("target", [0.2, 0.5, 0.9])
def test_settling_finds_the_target(target: float) -> None:
    calls = []

    def ratio(amount: float) -> float:
        calls.append(amount)
        return float(np.clip(0.5 + 0.6 * amount - 0.2 * amount**2, 0.0, 1.0))

    amount, reached = settle.amount(ratio, target, tries=12)
    assert reached == ratio(amount) == pytest.approx(target, rel=0.003) and len(calls) <= 13


def test_settling_gives_the_closest_where_a_step_is_in_the_way() -> None:
    assert settle.amount(lambda a: 0.4 if a < 0.05 else 0.7, 0.5)[1] == 0.4
