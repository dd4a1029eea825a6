# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.train import toy
from vtjax.errors import InputError
from vtjax.train import checkpoint, loop
from vtjax.train.state import params_sha256


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Six steps with checkpoints 2, 4 and 6 and all four parts."""
    folder = tmp_path_factory.mktemp("run")
    config = settings()
    return loop.train(toy.task(config), toy.Data(config), config, folder), folder


def settings() -> Any:
    return toy.config(steps=6, ema=0.9, checkpoint__keep=3, eval_every=2)


def again(folder: Path) -> dict[str, Any]:
    (folder / "result.json").unlink(missing_ok=True)
    return loop.train(toy.task(settings()), toy.Data(settings()), settings(), folder)


def files(folder: Path) -> list[str]:
    root = folder / "checkpoints" / "6"
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_every_flipped_bit_in_every_file_is_noticed(run: Any, tmp_path: Path) -> None:
    shutil.copytree(run[1], tmp_path / "run")
    step = checkpoint.log.absolute(tmp_path / "run" / "checkpoints" / "6")
    assert checkpoint.damage(step) == ""
    names = files(run[1])
    assert {name.split("/")[0] for name in names} >= {"params", "opt", "ema", "extra", "meta", "manifest.json"}
    for name in names:
        path = Path(step / name)
        content = path.read_bytes()
        if not content:
            continue
        for spoil in (flip, truncate, Path.unlink):
            spoil(path)
            assert name in checkpoint.damage(step) or "manifest" in checkpoint.damage(step), (name, spoil)
            path.write_bytes(content)
    assert checkpoint.damage(step) == ""


@pytest.mark.parametrize("part", ["params", "opt", "ema", "extra", "meta", "manifest.json"])
@pytest.mark.parametrize("spoil", [flip, truncate])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    run: Any, tmp_path: Path, part: str, spoil: Any, caplog: pytest.LogCaptureFixture
) -> None:
    result, folder = run
    shutil.copytree(folder, tmp_path / "run")
    root = tmp_path / "run" / "checkpoints"
    target = root / "6" / part
    if target.is_dir():
        target = max((p for p in target.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    spoil(target)

    with caplog.at_level(logging.WARNING):
        assert checkpoint.load_meta(tmp_path / "run")["step"] == 4
    assert f"checkpoint {root}/6 is skipped: " in caplog.text
    if part != "manifest.json":
        assert f"{target.relative_to(root / '6')} is not what was written" in caplog.text
    with pytest.raises(InputError, match="checkpoints/6 is damaged"):
        checkpoint.load_params(root / "6")

    if spoil is flip:
        assert again(tmp_path / "run")["params_sha256"] == result["params_sha256"]
        assert (root / "damaged-6").is_dir() and checkpoint.damage(checkpoint.log.absolute(root / "6")) == ""


def test_without_any_whole_checkpoint_the_run_begins_again(run: Any, tmp_path: Path, caplog: Any) -> None:
    result, folder = run
    shutil.copytree(folder, tmp_path / "run")
    for step in (2, 4, 6):
        flip(tmp_path / "run" / "checkpoints" / str(step) / "meta" / "metadata")
    with pytest.raises(InputError, match="found only damaged ones: 6, 4, 2"):
        checkpoint.load_params(tmp_path / "run")
    assert again(tmp_path / "run")["params_sha256"] == result["params_sha256"]
    for step in (2, 4, 6):
        assert f"checkpoints/{step} is skipped" in caplog.text


def test_what_a_killed_save_leaves_behind_is_skipped(run: Any, tmp_path: Path, caplog: Any) -> None:
    result, folder = run
    shutil.copytree(folder, tmp_path / "run")
    root = tmp_path / "run" / "checkpoints"
    (root / "6").rename(root / "6.orbax-checkpoint-tmp")
    (root / "4" / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert checkpoint.load_meta(tmp_path / "run")["step"] == 2
    assert "6.orbax-checkpoint-tmp is skipped: it was never finished" in caplog.text
    assert "checkpoints/4 is skipped: it was never finished (no manifest)" in caplog.text
    assert again(tmp_path / "run")["params_sha256"] == result["params_sha256"]
    assert not (root / "6.orbax-checkpoint-tmp").exists()


def test_load_params_knows_nothing_but_the_path(run: Any) -> None:
    result, folder = run
    code = (
        "import sys; from vtjax.train.checkpoint import load_params; from vtjax.train.state import params_sha256\n"
        "spec, params = load_params(sys.argv[1], ema=False); print(spec.classes, params_sha256(params))"
    )
    out = subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True, text=True).stdout
    assert out.split() == ["3", result["params_sha256"]]


def test_paths_that_load(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result, folder = run
    monkeypatch.chdir(folder)
    paths = [folder, folder / "checkpoints", folder / "checkpoints" / "6", str(folder), "checkpoints/6"]
    assert {params_sha256(checkpoint.load_params(path, ema=False)[1]) for path in paths} == {result["params_sha256"]}
    leaf = checkpoint.load_params(folder)[1]["head"]["kernel"]
    assert isinstance(leaf, np.ndarray) and leaf.dtype == np.float32


def test_paths_that_do_not_load(tmp_path: Path, run: Any) -> None:
    with pytest.raises(InputError, match="no checkpoint in .*nowhere, expected a workdir, its checkpoints folder"):
        checkpoint.load_params(tmp_path / "nowhere")
    with pytest.raises(InputError, match="which must be 'last' or 'best', found 'first'"):
        checkpoint.load_params(run[1], "first")


def test_the_meta_part(run: Any) -> None:
    meta = checkpoint.load_meta(run[1])
    assert meta["format"] == 1 and meta["step"] == 6
    assert meta["spec"] == json.loads((run[1] / "spec.json").read_text())
    assert meta["config"] == json.loads((run[1] / "config.json").read_text())
    assert meta["versions"]["jax"] == jax.__version__


def test_best_is_by_metric() -> None:
    assert checkpoint.best_step({2: {"loss": math.nan}, 4: {"loss": 0.5}}, "loss") == 4
    assert checkpoint.best_step({2: {"loss": math.nan}}, "loss") is None
    metrics: dict[int, dict[str, float]] = {
        1: {"top1": 0.5, "loss": 1.0},
        2: {},
        3: {"top1": 0.7, "loss": 0.2},
        4: {"top1": 0.7, "loss": 3.0},
    }
    assert checkpoint.best_step(metrics, "top1") == 4
    assert checkpoint.best_step(metrics, "loss") == 3
    assert checkpoint.best_step(metrics, "") is None
    assert checkpoint.best_step({}, "top1") is None


def test_the_last_k_and_the_best_are_kept(tmp_path: Path) -> None:
    """Validation accuracy is made to rise to step 4 and to fall again."""
    config = toy.config(steps=10, eval_every=1, checkpoint__every=3, checkpoint__keep=1)

    def evaluate(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any) -> Any:
        count = batch["valid"].sum()
        return {"top1": count * (10.0 - (extra["counter"] - 4.0) ** 2), "count": count}

    def after_step(state: Any, frozen: Any, draw: Any, step: int) -> Any:
        return state.replace(extra={"counter": state.extra["counter"] + 1})

    task = toy.task(config, evaluate=evaluate, after_step=after_step)
    result = loop.train(task, toy.Data(config), config, tmp_path)
    assert result["best_step"] == 4 and result["best_top1"] == 10.0
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "4"]
    assert checkpoint.load_meta(tmp_path, "best")["step"] == 4
    assert checkpoint.load_meta(tmp_path, "last")["step"] == 10
    assert int(checkpoint.load_extra(tmp_path, "best")["counter"]) == 4


def test_an_unknown_best_metric_is_named_before_the_first_step(tmp_path: Path) -> None:
    config = toy.config(steps=2, checkpoint__best="miou")
    line = "^config.checkpoint.best must be a metric, loss, top1, or '' for none, found 'miou'$"
    with pytest.raises(InputError, match=line):
        loop.train(toy.task(config), toy.Data(config), config, tmp_path)
    assert not list(tmp_path.iterdir())
    config = toy.config(steps=2, checkpoint__best="")
    loop.train(toy.task(config), toy.Data(config), config, tmp_path)
    with pytest.raises(InputError, match="holds the metric ''"):
        checkpoint.load_params(tmp_path, "best")
