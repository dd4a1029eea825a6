# SPDX-License-Identifier: Apache-2.0
"""Figures: what is drawn is what was recorded."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vtjax.errors import InputError, MissingExtraError
from vtjax.viz import curves


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    lines = [{"step": t, "loss": 2.0 / t, "train_top1": 1 - 1 / t, "finite": True} for t in range(10, 110, 10)]
    for line in lines[4::5]:
        line |= {"eval/loss": 1.0 / line["step"], "eval/top1": 0.5 + line["step"] / 250, "eval/note": "text"}
    lines[2]["loss"] = float("nan")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def texts(figure) -> list[str]:
    from matplotlib.table import Cell
    from matplotlib.text import Text

    cells = [cell.get_text().get_text() for cell in figure.findobj(Cell)]
    return cells + [t.get_text() for t in figure.findobj(Text)]


def test_series_of_a_workdir(workdir: Path) -> None:
    metrics = curves.series(workdir)
    assert sorted(metrics) == ["eval/loss", "eval/top1", "loss", "train_top1"]
    np.testing.assert_array_equal(metrics["eval/top1"][0], [50, 100])
    np.testing.assert_allclose(metrics["eval/top1"][1], [0.7, 0.9])
    assert 30 not in metrics["loss"][0] and len(metrics["loss"][0]) == 9


def test_series_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="metrics.jsonl does not exist"):
        curves.series(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="holds no metrics"):
        curves.series(tmp_path)


def test_training_draws_the_recorded_points_and_what_was_reached(workdir: Path, tmp_path: Path) -> None:
    metrics = curves.series(workdir)
    figure = curves.training({"one": metrics, "two": {"loss": metrics["loss"]}})
    loss, accuracy = figure.axes[:2]
    drawn = {line.get_label(): line.get_xydata() for line in (*loss.lines, *accuracy.lines)}
    np.testing.assert_allclose(drawn["one, test"], np.stack([[50, 100], [70.0, 90.0]], 1))
    assert {"one, training", "two, training"} <= set(drawn)
    seen = texts(figure)
    assert {"one", "two", "90.00%", "100", "0.0200"} <= set(seen)

    first = curves.save(figure, tmp_path / "deep" / "a.png")
    second = curves.save(
        curves.training({"one": metrics, "two": {"loss": metrics["loss"]}}), tmp_path / "deep" / "b.png"
    )
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size < 200_000
    assert sorted(f.name for f in first.parent.iterdir()) == ["a.png", "b.png"]
    with Image.open(first) as image:
        assert image.format == "PNG" and image.width > 600


def test_report_counts_and_shows_mistakes_first(workdir: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 4
    predictions = labels.copy()
    predictions[[7, 21]] = [0, 2]
    images = rng.random((40, 8, 8, 1))
    figure = curves.report(
        curves.series(workdir), images, labels, predictions, names=list("abcd"), title="A title", show=12
    )
    seen = texts(figure)
    assert "Confusion, 40 test images" in seen and "A title" in seen
    assert "What it says: 2 of 40 wrong" in seen
    assert "a (is d)" in seen and "c (is b)" in seen and "90.0 %" in seen
    shown = [axes for axes in figure.axes if axes.images][1:]
    assert len(shown) == 12
    np.testing.assert_allclose(shown[0].images[0].get_array(), curves._unit(images[7]))
    matrix = next(axes for axes in figure.axes if axes.get_title(loc="left").startswith("Confusion"))
    entries = sorted(int(t.get_text()) for t in matrix.texts)
    assert entries == [1, 1, 9, 9, 10, 10]
    assert curves.save(figure, tmp_path / "r.png").stat().st_size < 200_000


@pytest.mark.parametrize("right", [True, False])
def test_report_of_one_class_and_of_nothing_but_mistakes(workdir: Path, right: bool) -> None:
    predictions = np.zeros(3, int) if right else np.array([1, 2, 1])
    figure = curves.report({}, np.zeros((3, 4, 4)), np.zeros(3, int), predictions)
    assert f"What it says: {0 if right else 3} of 3 wrong" in texts(figure)
    assert "not recorded" in texts(figure)


def test_report_refuses_uneven_inputs() -> None:
    with pytest.raises(InputError, match="found 3, 2, 2"):
        curves.report({}, np.zeros((3, 4, 4)), [0, 0], [0, 0])
    with pytest.raises(InputError, match="found 0, 0, 0"):
        curves.report({}, np.zeros((0, 4, 4)), [], [])


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(MissingExtraError, match=r"pip install 'vtjax\[viz\]'"):
        curves.training({})
