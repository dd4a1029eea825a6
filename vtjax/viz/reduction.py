# SPDX-License-Identifier: Apache-2.0
"""Charts of token reduction: its thresholds, what it costs and what it saves. Maps over an image are in `viz.tokens`.

Letters: L layers, S seeds, T recorded steps, n images. Arguments count layers from 0, figures from 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vtjax.errors import InputError
from vtjax.viz.curves import COLORS, INK, MUTED, new_figure, quiet, set_title

MARKERS = "os^Dv"


def thresholds(
    final: Mapping[str, np.ndarray],
    history: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    title: str = "",
) -> Any:
    """Learned thresholds per layer and, below, over training. Every name has its own column: scales differ.

    Args:
      final: `[L]` or `[S, L]` by name, such as "merge_threshold"; of several seeds, the mean and the shaded range.
      history: `(steps [T], values [T, L])` by name; one line per layer.

    Returns:
      A matplotlib `Figure`.

    Raises:
      InputError: nothing to draw, shapes that do not fit, or values that are not finite.
    """
    last = {name: _finite(f"final[{name!r}]", value, (1, 2), "[L] or [S, L]") for name, value in final.items()}
    over: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, (steps, values) in (history or {}).items():
        steps = _finite(f"steps of history[{name!r}]", steps, (1,), "[T]")
        values = _finite(f"history[{name!r}]", values, (2,), "[T, L]")
        if len(steps) != len(values):
            raise InputError(f"history[{name!r}] must have as many rows as steps, {len(steps)}, found {len(values)}")
        over[name] = steps, values
    names = list(dict.fromkeys([*last, *over]))
    if not names:
        raise InputError("thresholds must hold at least one name, found none")

    rows = bool(last) + bool(over)
    figure = new_figure(max(4.6 * len(names), 5.5), 2.9 * rows + 0.5)
    _suptitle(figure, title)
    top = 1 - (0.75 if title else 0.4) / figure.get_figheight()
    cells = figure.add_gridspec(rows, len(names), hspace=0.42, wspace=0.24, top=top, left=0.08, right=0.97, bottom=0.1)
    for column, name in enumerate(names):
        label = name.replace("_", " ")
        if name in last:
            axes = figure.add_subplot(cells[0, column])
            _by_layer(axes, np.atleast_2d(last[name]), COLORS[column % len(COLORS)])
            seeds = last[name].shape[0] if last[name].ndim == 2 else 1
            set_title(axes, label.capitalize())
            if seeds > 1:
                axes.set_title(f"mean and range of {seeds} seeds", loc="right", fontsize=8.5, color=MUTED)
        if name in over:
            axes = figure.add_subplot(cells[rows - 1, column])
            _over_steps(figure, axes, *over[name])
            set_title(axes, f"{label.capitalize()} in training")
    return figure


def tradeoff(
    curves: Mapping[str, Sequence[Sequence[float]] | np.ndarray],
    *,
    dense: tuple[float, float] | None = None,
    title: str = "",
    xlabel: str = "MACs per image, relative to dense",
    ylabel: str = "top-1",
    kinds: Mapping[str, str] | None = None,
) -> Any:
    """Quality against cost, one line per method.

    Args:
      kinds: method by name of a curve: curves of one method share a color, and the second is dashed. None = each curve
        is a method of its own.
      curves: rows of `(x, y, low, high)` by name, in any order; from low to high is the error bar.
      dense: `(x, y)` of the unreduced model: a star, and a dotted line at its height.

    Returns:
      A matplotlib `Figure`.

    Raises:
      InputError: no curve, rows of another form, values that are not finite, or a bar that leaves out its point.
    """
    if not curves:
        raise InputError("curves must hold at least one method, found none")
    made: dict[str, np.ndarray] = {}
    for name, rows in curves.items():
        points = _finite(f"curves[{name!r}]", rows, (2,), "[points, 4]")
        if points.shape[1] != 4:
            raise InputError(f"curves[{name!r}] must have shape [points, 4], found {list(points.shape)}")
        if not ((points[:, 2] <= points[:, 1]) & (points[:, 1] <= points[:, 3])).all():
            raise InputError(f"curves[{name!r}] must have low <= y <= high in every row, found a row without")
        made[name] = points[np.argsort(points[:, 0], kind="stable")]

    figure = new_figure(7.6, 4.8)
    axes = figure.add_subplot()
    if dense is not None:
        axes.axhline(dense[1], color=MUTED, linewidth=1.1, linestyle=":", zorder=1)
        axes.plot(*dense, "*", color=INK, markersize=13, linestyle="none", label="dense", zorder=4)
    known: list[str] = []
    for name, (x, y, low, high) in ((name, points.T) for name, points in made.items()):
        kind = kinds[name] if kinds else name
        again = kind in known
        known += [] if again else [kind]
        i = known.index(kind)
        axes.errorbar(
            x,
            y,
            np.stack([y - low, high - y]),
            color=COLORS[i % len(COLORS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=5.5,
            markeredgecolor="white",
            markeredgewidth=0.7,
            linewidth=1.8,
            linestyle="--" if again else "-",
            elinewidth=1.0,
            capsize=2.5,
            label=name,
            zorder=3,
        )
    quiet(axes, xlabel)
    axes.set_ylabel(ylabel, color=MUTED, fontsize=9)
    set_title(axes, title)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="best")
    return figure


def shares(counts: np.ndarray, tokens: int, title: str = "") -> Any:
    """How many tokens live on, layer by layer, and how much images differ in it.

    Args:
      counts: `[L, n]` live tokens after each layer, of n images.
      tokens: that there are before the first layer.

    Returns:
      A matplotlib `Figure`.

    Raises:
      InputError: another shape, or counts outside of [0, tokens].
    """
    counts = _finite("counts", counts, (2,), "[L, n]")
    if tokens < 1 or counts.min() < 0 or counts.max() > tokens:
        raise InputError(f"counts must be in [0, tokens={tokens}], found {counts.min():g} to {counts.max():g}")
    depth, images = counts.shape
    percent = 100.0 * np.concatenate([np.full((1, images), tokens), counts]) / tokens
    least, low, median, high, most = np.percentile(percent, [0, 10, 50, 90, 100], axis=1)

    figure = new_figure(7.6, 4.4)
    axes = figure.add_subplot()
    x = np.arange(depth + 1)
    axes.fill_between(x, least, most, color=COLORS[0], alpha=0.12, linewidth=0, label="least to most")
    axes.fill_between(x, low, high, color=COLORS[0], alpha=0.26, linewidth=0, label="10 % to 90 % of the images")
    axes.plot(x, median, color=COLORS[0], linewidth=2.0, marker="o", markersize=4, label="median")
    quiet(axes, "layer")
    _layer_ticks(axes, depth, "input")
    axes.set_xlim(-0.3, depth + 0.3 + 0.09 * depth)
    axes.set_ylim(0, 103)
    axes.yaxis.set_major_formatter("{x:.0f} %")
    axes.set_ylabel(f"live tokens, of {tokens}", color=MUTED, fontsize=9)
    axes.annotate(
        f"{np.median(counts[-1]):.0f} tokens",
        (depth, median[-1]),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        color=COLORS[0],
        fontsize=9,
        fontweight="bold",
    )
    set_title(axes, title or f"Live tokens, {images:,} image{'s' if images > 1 else ''}")
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower left")
    return figure


def _by_layer(axes: Any, values: np.ndarray, color: str) -> None:
    x = np.arange(1, values.shape[1] + 1)
    if len(values) > 1:
        axes.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.18, linewidth=0)
    axes.plot(x, values.mean(0), color=color, linewidth=1.8, marker="o", markersize=4.5)
    quiet(axes, "layer")
    axes.yaxis.set_major_formatter("{x:g}")
    _layer_ticks(axes, values.shape[1])


def _over_steps(figure: Any, axes: Any, steps: np.ndarray, values: np.ndarray) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    depth = values.shape[1]
    # The palest end of the map would vanish on white.
    colors = colormaps["viridis"](np.linspace(0, 0.9, depth))
    for layer in range(depth):
        axes.plot(steps, values[:, layer], color=colors[layer], linewidth=1.4)
    quiet(axes, "step")
    axes.margins(x=0.02)
    axes.yaxis.set_major_formatter("{x:g}")
    mapped = ScalarMappable(BoundaryNorm(np.arange(depth + 1) + 0.5, depth), ListedColormap(colors))
    bar = figure.colorbar(mapped, ax=axes, fraction=0.035, pad=0.04, aspect=24, ticks=[1, depth])
    bar.minorticks_off()
    bar.ax.tick_params(colors=MUTED, labelsize=8, length=0)
    bar.ax.set_title("layer", fontsize=8, color=MUTED, pad=4)
    bar.outline.set_visible(False)


def _layer_ticks(axes: Any, depth: int, start: str = "") -> None:
    """Layer numbers below the axes, so many as have room."""
    step = math.ceil(depth / 12)
    ticks = list(range(depth, 0, -step))
    axes.set_xticks(ticks + [0] * bool(start), [*map(str, ticks), start][: len(ticks) + bool(start)])


def _finite(name: str, values: Any, ranks: tuple[int, ...], form: str) -> np.ndarray:
    values = np.asarray(values, float)
    if values.ndim not in ranks or not values.size:
        raise InputError(f"{name} must have shape {form}, found {list(values.shape)}")
    if not np.isfinite(values).all():
        raise InputError(f"{name} must be finite, found {int((~np.isfinite(values)).sum())} values that are not")
    return values


def _suptitle(figure: Any, title: str) -> None:
    if title:
        figure.suptitle(title, x=0.08, y=0.985, ha="left", fontsize=14, fontweight="bold", color=INK)
