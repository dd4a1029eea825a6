# SPDX-License-Identifier: Apache-2.0
"""Charts of a selection of neurons: how much each pick adds, and which neurons are kept.

Letters: L layers, M neurons, K picks. Arguments count layers from 0, figures from 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vtjax.errors import InputError
from vtjax.viz.curves import COLORS, INK, MUTED, new_figure, quiet, set_title


def spectra(norms: Sequence[np.ndarray], width: int, title: str = "") -> Any:
    """Distance of every pick from the span of those before it, one line per layer, over (picks / width).

    Args:
      norms: `[K]` per layer, in pick order, of `ops.gram_schmidt.select_with_norms`; each over its first.
      width: picks of a round: it is full, and the next one starts anew, at 1, 2, ... on the axis.

    Returns:
      A matplotlib `Figure`.

    Raises:
      InputError: nothing to draw, or norms that are not finite.
    """
    if not norms or not all(len(values) and np.isfinite(values).all() for values in norms):
        raise InputError("norms must hold finite distances of at least one layer, found others")
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    depth = len(norms)
    # The palest end of the map would vanish on white.
    colors = colormaps["viridis"](np.linspace(0, 0.9, depth))
    figure = new_figure(8.2, 4.4)
    axes = figure.add_subplot()
    for layer, values in enumerate(norms):
        values = np.asarray(values, float)
        shown = np.where(values > 0, values / values[0], np.nan)
        axes.plot(np.arange(1, len(values) + 1) / width, shown, color=colors[layer], linewidth=1.2)
    axes.set_yscale("log")
    quiet(axes, "neurons kept, over the model width (r)")
    axes.set_ylabel("distance from those kept before,\nover the first one's", color=MUTED, fontsize=9)
    axes.margins(x=0.01)
    mapped = ScalarMappable(BoundaryNorm(np.arange(depth + 1) + 0.5, depth), ListedColormap(colors))
    bar = figure.colorbar(mapped, ax=axes, fraction=0.03, pad=0.02, aspect=24, ticks=sorted({1, depth}))
    bar.minorticks_off()
    bar.ax.tick_params(colors=MUTED, labelsize=8, length=0)
    bar.ax.set_title("layer", fontsize=8, color=MUTED, pad=4)
    bar.outline.set_visible(False)
    set_title(axes, title)
    return figure


def kept(lengths: Sequence[np.ndarray], picks: Sequence[np.ndarray], title: str = "") -> Any:
    """Which neurons are kept, layer by layer: they stand from the longest to the shortest, so that keeping by magnitude
    would colour the left part of every row and nothing else.

    Args:
      lengths: `[M]` per layer, of the neurons' input weights.
      picks: `[K]` per layer, indices of the kept neurons, in pick order.

    Returns:
      A matplotlib `Figure`.

    Raises:
      InputError: nothing to draw, other numbers of layers, or picks that are no neurons.
    """
    if not lengths or len(lengths) != len(picks):
        raise InputError(f"picks must hold {len(lengths)} layers, 1 or more, found {len(picks)}")
    depth, most = len(lengths), max(len(values) for values in lengths)
    sheet = np.full((depth, most), np.nan)
    shared = []
    for layer, (values, chosen) in enumerate(zip(lengths, picks, strict=True)):
        found = np.asarray(chosen)
        if not len(found) or found.min() < 0 or found.max() >= len(values):
            raise InputError(f"picks[{layer}] must be in 0..{len(values) - 1}, found {chosen}")
        order = np.argsort(-np.asarray(values, float), kind="stable")
        rank = np.empty(len(values), int)
        rank[order] = np.arange(len(values))
        sheet[layer, : len(values)] = 0.0
        sheet[layer, rank[found]] = 1.0
        shared.append(float((rank[found] < len(found)).mean()))
    from matplotlib.colors import ListedColormap

    figure = new_figure(8.2, 1.3 + 0.24 * depth)
    axes = figure.add_subplot()
    colors = ListedColormap(["#e3e8ec", COLORS[0]])
    # Where a layer has fewer neurons nothing is drawn. Without smoothing, single neurons stay visible.
    axes.imshow(np.ma.masked_invalid(sheet), aspect="auto", interpolation="none", cmap=colors, vmin=0, vmax=1)
    for layer, share in enumerate(shared):
        axes.text(most * 1.01, layer, f"{share:.0%}", va="center", fontsize=8, color=INK)
    axes.text(most * 1.01, -1.0, "as by magnitude", va="center", fontsize=8, color=MUTED)
    quiet(axes, "neurons, from the longest to the shortest (blue: kept)")
    axes.grid(False)
    axes.set_yticks(range(0, depth, max(1, depth // 12)), [str(i + 1) for i in range(0, depth, max(1, depth // 12))])
    axes.set_ylabel("layer", color=MUTED, fontsize=9)
    set_title(axes, title)
    return figure


def growth(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], base: Mapping[str, int], title: str = ""
) -> Any:
    """Seconds of a selection over each size, both logarithmic, with the slope of its last two points.

    Args:
      series: (sizes, seconds) by the size's letter, M, N or K, or what moves together, "N = K".
      base: what the other sizes are.

    Returns:
      A matplotlib `Figure`.

    Raises:
      InputError: nothing to draw.
    """
    if not series or any(len(sizes) < 2 for sizes, _ in series.values()):
        raise InputError("series must hold at least two sizes each, found fewer")
    figure = new_figure(8.2, 3.8)
    axes = figure.add_subplot()
    for number, (name, (sizes, seconds)) in enumerate(series.items()):
        x, y = np.asarray(sizes, float), np.asarray(seconds, float)
        slope = np.log(y[-1] / y[-2]) / np.log(x[-1] / x[-2])
        axes.plot(x, y, color=COLORS[number % len(COLORS)], marker="os^"[number % 3], markersize=5, label=name)
        axes.annotate(
            f"{name}: grows like {name.split()[0]}^{slope:.1f}",
            (x[-1], y[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=COLORS[number % len(COLORS)],
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:.0f}")
    quiet(axes, "size; the others are " + ", ".join(f"{name} = {size}" for name, size in base.items()))
    axes.margins(x=0.22)
    axes.set_ylabel("seconds", color=MUTED, fontsize=9)
    set_title(axes, title)
    return figure
