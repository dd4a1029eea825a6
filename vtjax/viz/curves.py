# SPDX-License-Identifier: Apache-2.0
"""Figures of runs, drawn from `metrics.jsonl`. No pyplot: nothing global, no window, no backend to choose."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vtjax.errors import InputError, MissingExtraError
from vtjax.viz.tables import read_jsonl

INK, MUTED, GRID = "#22303c", "#6b7a86", "#e3e8ec"
GOOD, BAD = "#1b7f5c", "#c2413a"
COLORS = ("#1f5fa8", "#d9822b", "#1b7f5c", "#8e4fa8", "#c2413a", "#4f6d7a")

Series = tuple[np.ndarray, np.ndarray]

LOSSES = {"loss": "training", "eval/loss": "test"}
ACCURACIES = {"train_top1": "training", "eval/top1": "test"}


def series(path: str | os.PathLike[str]) -> dict[str, Series]:
    """`(steps, values)` of every number in a `metrics.jsonl` (or in the one of a workdir), by name.

    Values that are not finite are left out.

    Raises:
      InputError: no such file, or no line in it.
    """
    file = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
    found: dict[str, list[tuple[int, float]]] = {}
    for line in read_jsonl(file):
        for name, value in line.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if name != "step" and "step" in line and number and math.isfinite(value):
                found.setdefault(name, []).append((line["step"], float(value)))
    if not found:
        raise InputError(f"{file} holds no metrics")
    return {name: (np.array([p[0] for p in v]), np.array([p[1] for p in v])) for name, v in found.items()}


def training(runs: Mapping[str, Mapping[str, Series]]) -> Any:
    """Loss and accuracy of one or several runs over the steps, and a table of what they reached.

    Args:
      runs: `series(...)` by the name that the legend shows.

    Returns:
      A matplotlib `Figure`; see `save`.
    """
    figure = new_figure(9.0, 3.7 + 0.24 * len(runs))
    grid = figure.add_gridspec(2, 2, height_ratios=[3.1, 0.35 + 0.26 * len(runs)], hspace=0.34, wspace=0.2)
    loss, accuracy = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    several = len(runs) > 1
    for color, (name, metrics) in zip(itertools.cycle(COLORS), runs.items(), strict=False):
        _curves(loss, metrics, LOSSES, color, name if several else "")
        _curves(accuracy, metrics, ACCURACIES, color, name if several else "", percent=True)
    _finish(loss, "Loss", "step")
    _finish(accuracy, "Accuracy", "step", percent=True)
    below = figure.add_subplot(grid[1, :])
    _table(
        below, ("run", "steps", "loss", "test loss", "test top-1", "best top-1"), [_reached(*r) for r in runs.items()]
    )
    return figure


def report(
    metrics: Mapping[str, Series],
    images: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    predictions: Sequence[int] | np.ndarray,
    names: Sequence[str] | None = None,
    title: str = "",
    note: str = "",
    show: int = 24,
) -> Any:
    """One page on a trained classifier: curves, confusion matrix, and test images with what the model said.

    Args:
      metrics: `series(...)` of the run.
      images: `[n, H, W]` or `[n, H, W, C]` test images, any range; all of the test split, for the confusion matrix.
      labels, predictions: `[n]` class indices.
      names: of the classes; None = their numbers.
      title: of the page.
      note: one or two lines below the title, for example why the curves lie as they do.
      show: how many images to show: the mistakes first (at most half), then spread evenly over the split.

    Raises:
      InputError: counts of images, labels and predictions that differ, or none at all.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if not len(images) or not len(images) == len(labels) == len(predictions):
        raise InputError(
            "a report needs as many images as labels and predictions, at least 1, found "
            f"{len(images)}, {len(labels)}, {len(predictions)}"
        )
    classes = int(max(labels.max(), predictions.max())) + 1
    classes = max(classes, len(names or ()))
    names = list(names) if names is not None else [str(i) for i in range(classes)]

    figure = new_figure(10.0, 8.0)
    if title:
        figure.suptitle(title, x=0.125, y=0.97, ha="left", fontsize=14, fontweight="bold", color=INK)
    if note:
        figure.text(0.125, 0.94, note, ha="left", va="top", fontsize=9, color=MUTED, linespacing=1.35)
    top = 0.86 if note else 0.9 if title else 0.95
    grid = figure.add_gridspec(2, 2, height_ratios=[1.0, 1.35], hspace=0.3, wspace=0.2, top=top)
    loss, accuracy = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    _curves(loss, metrics, LOSSES, COLORS[0], "")
    _curves(accuracy, metrics, ACCURACIES, COLORS[0], "", percent=True)
    _finish(loss, "Loss", "step")
    _finish(accuracy, "Accuracy", "step", percent=True)
    matrix = np.zeros((classes, classes), int)
    np.add.at(matrix, (labels, predictions), 1)
    _confusion(figure.add_subplot(grid[1, 0]), matrix, names)
    _gallery(figure, grid[1, 1], np.asarray(images), labels, predictions, names, show)
    return figure


def save(figure: Any, path: str | os.PathLike[str], dpi: int = 110) -> Path:
    """Writes a PNG, whole or not at all, without a date in it: equal figures give equal files."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    figure.savefig(
        temporary,
        format="png",
        dpi=dpi,
        bbox_inches="tight",
        pad_inches=0.15,
        metadata={"Software": None},
        pil_kwargs={"optimize": True},
    )
    temporary.replace(file)
    return file


def new_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "viz", "drawing figures") from None
    return Figure(figsize=(width, height), facecolor="white")


def _curves(
    axes: Any, metrics: Mapping[str, Series], wanted: Mapping[str, str], color: str, run: str, percent: bool = False
) -> None:
    """Training thin and pale behind its running mean, test strong with its points; of one run or of several."""
    scale = 100.0 if percent else 1.0
    for name, label in wanted.items():
        if name not in metrics:
            continue
        steps, values = metrics[name]
        values = values * scale
        label = f"{run}, {label}" if run else label
        if label.endswith("training"):
            axes.plot(steps, values, color=color, alpha=0.16, linewidth=0.8)
            axes.plot(steps, _running_mean(values), color=color, alpha=0.55, linewidth=1.4, label=label)
        else:
            strong = color if run else COLORS[1]
            marker = {"marker": "o", "markersize": 3.6} if len(steps) <= 40 else {}
            axes.plot(steps, values, color=strong, linewidth=2.0, label=label, **marker)
            if percent and not run:
                _mark_last(axes, float(steps[-1]), float(values[-1]), strong)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a 25th of the run, at least 5 points; the window shrinks at the ends."""
    half = max(len(values) // 50, 2)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    return (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)


def _mark_last(axes: Any, step: float, value: float, color: str) -> None:
    axes.annotate(
        f"{value:.1f} %",
        (step, value),
        xytext=(-4, -16),
        textcoords="offset points",
        ha="right",
        color=color,
        fontsize=11,
        fontweight="bold",
    )


def set_title(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)


def quiet(axes: Any, xlabel: str = "") -> None:
    """Axes that leave the stage to the data: a pale grid, no frame but the bottom, no tick marks."""
    if xlabel:
        axes.set_xlabel(xlabel, color=MUTED, fontsize=9)
    axes.tick_params(which="both", colors=MUTED, labelsize=9, length=0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def _finish(axes: Any, title: str, xlabel: str, percent: bool = False) -> None:
    set_title(axes, title)
    quiet(axes, xlabel)
    axes.margins(x=0.02)
    if percent:
        axes.yaxis.set_major_formatter("{x:.0f} %")
        axes.set_ylim(top=101.5)
    else:
        axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right" if percent else "upper right")
    else:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=MUTED, fontsize=9)


def _reached(name: str, metrics: Mapping[str, Series]) -> tuple[str, ...]:
    """The row of a run in the table below its curves."""

    def last(metric: str, form: str) -> str:
        return form.format(metrics[metric][1][-1]) if metric in metrics else ""

    steps = max(int(s[-1]) for s, _ in metrics.values())
    best = f"{metrics['eval/top1'][1].max():.2%}" if "eval/top1" in metrics else ""
    return name, f"{steps:,}", last("loss", "{:.4f}"), last("eval/loss", "{:.4f}"), last("eval/top1", "{:.2%}"), best


def _table(axes: Any, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    axes.axis("off")
    widths = [0.3] + [0.7 / (len(header) - 1)] * (len(header) - 1)
    table = axes.table([list(r) for r in rows], colLabels=list(header), colWidths=widths, loc="upper center")
    table.auto_set_font_size(False)
    table.set_fontsize(9.5)
    table.scale(1, 1.35)
    for (line, column), cell in table.get_celld().items():
        cell.visible_edges = "B"
        cell.set_edgecolor(GRID)
        cell.set_text_props(
            color=MUTED if line == 0 else INK,
            ha="left" if column == 0 else "right",
            fontweight="bold" if line and column in (0, 4) else "normal",
        )


def _confusion(axes: Any, matrix: np.ndarray, names: Sequence[str]) -> None:
    """Rows: true class. Right answers and mistakes have their own colours, so that single mistakes can be seen."""
    from matplotlib.colors import to_rgb

    count = len(matrix)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    diagonal = np.eye(count, dtype=bool)
    # Mistakes are few: the darkest red is the largest of them.
    worst = max(share[~diagonal].max(initial=0.0), 1e-9)
    depth = np.where(diagonal, 0.15 + 0.7 * share, np.where(share > 0, 0.25 + 0.6 * share / worst, 0.0))
    ink = np.where(diagonal[..., None], to_rgb(COLORS[0]), to_rgb(BAD))
    axes.imshow(1.0 - depth[..., None] * (1.0 - ink))
    if count <= 20:
        for (row, column), value in np.ndenumerate(matrix):
            if value:
                pale = depth[row, column] < 0.5
                axes.text(column, row, value, ha="center", va="center", fontsize=8, color=INK if pale else "white")
        axes.set_xticks(range(count), names)
        axes.set_yticks(range(count), names)
    set_title(axes, f"Confusion, {int(matrix.sum()):,} test images")
    axes.set_anchor("NW")
    axes.set_xlabel("predicted", color=MUTED, fontsize=9)
    axes.set_ylabel("true", color=MUTED, fontsize=9)
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    for spine in axes.spines.values():
        spine.set_color(GRID)


def _gallery(
    figure: Any,
    place: Any,
    images: np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray,
    names: Sequence[str],
    show: int,
) -> None:
    wrong = np.flatnonzero(labels != predictions)
    right = np.flatnonzero(labels == predictions)
    mistakes = wrong[: show // 2]
    rest = right[np.linspace(0, len(right) - 1, min(show - len(mistakes), len(right))).astype(int)]
    chosen = [*mistakes, *rest]
    columns = math.ceil(math.sqrt(len(chosen) * 1.4))
    rows = math.ceil(len(chosen) / columns)
    frame = figure.add_subplot(place)
    frame.axis("off")
    set_title(frame, f"What it says: {len(wrong)} of {len(labels):,} wrong")
    # The empty first row keeps the captions of the first images clear of the title.
    body = place.subgridspec(2, 1, height_ratios=[0.05, 1.0], hspace=0.04)[1]
    inner = body.subgridspec(rows, columns, hspace=0.5, wspace=0.12)
    for position, index in enumerate(chosen):
        axes = figure.add_subplot(inner[position // columns, position % columns])
        axes.imshow(_unit(images[index]), cmap="gray_r", interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        mistake = labels[index] != predictions[index]
        said = names[predictions[index]]
        axes.set_title(
            f"{said} (is {names[labels[index]]})" if mistake else said,
            fontsize=8.5,
            pad=2.5,
            color=BAD if mistake else GOOD,
            fontweight="bold" if mistake else "normal",
        )
        for spine in axes.spines.values():
            spine.set_color(BAD if mistake else GRID)
            spine.set_linewidth(1.4 if mistake else 0.8)


def _unit(image: np.ndarray) -> np.ndarray:
    """Scaled to [0, 1]; a last axis of one channel is dropped."""
    image = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
    low, high = float(image.min()), float(image.max())
    return (image - low) / (high - low) if high > low else np.zeros_like(image, dtype=float)
