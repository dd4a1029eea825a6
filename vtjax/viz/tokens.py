# SPDX-License-Identifier: Apache-2.0
"""Figures of token reduction: where in the image it acts, its thresholds, what it costs and what it saves.

Letters: L layers, N0 original tokens, h and w rows and columns of patches, S seeds, T recorded steps, n images.
A reduction is `sources`, int `[L, N0]`: after each layer, the slot that holds each original token, -1 = pruned. The
first `prefix` tokens are no patches (class token), the others are the patches of `grid=(h, w)`, row by row. Tokens with
the same slot were merged. Arguments count layers from 0, figures from 1.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vtjax.errors import InputError
from vtjax.viz import curves as base
from vtjax.viz.curves import COLORS, INK, MUTED, new_figure, quiet, set_title

OUTLINES = (
    "#ffd21f",
    "#ff5fae",
    "#27c4ff",
    "#7be04b",
    "#ff8420",
    "#b78cff",
    "#ffffff",
    "#f2362f",
    "#00c9a0",
    "#2f63ff",
)
PRUNED, HATCH = "#1d262e", "#35424d"
MARKERS = "os^Dv"

# Inches, on a sheet of panels.
_WIDTH, _PANEL, _GAP, _CAPTION, _HEAD, _SWATCH = 8.8, 2.1, 0.13, 0.42, 0.3, 0.2
# A panel's picture has at least so many pixels, about twice what is shown, so that outlines are smooth.
_RASTER = 448


def layer_maps(
    image: np.ndarray,
    sources: np.ndarray,
    *,
    grid: tuple[int, int],
    prefix: int,
    layers: Sequence[int] | None = None,
    title: str = "",
) -> Any:
    """The photograph, and what is left of it after some layers.

    A token that stands alone shows its patch; a merged one the mean colour of its patches, which also share the colour
    of their outline; pruned patches are dark. A group keeps its outline colour from panel to panel, unless a group with
    the same one comes to lie beside it. Captions count tokens: left, merged away and pruned sum to all that there were.

    Args:
      image: float `[H, W, 3]` in [0, 1]; H and W multiples of h and w.
      sources: `[L, N0]`.
      layers: which; None = the first, the last and at most five between.

    Returns:
      A matplotlib `Figure`; see `save`.

    Raises:
      InputError: shapes that do not fit, values out of range, or a layer that is not there.
    """
    image = _image(image, grid)
    sources = _sources("sources", sources, grid, prefix)
    depth = len(sources)
    every = math.ceil(depth / 6)
    chosen = sorted({0, *range(depth - 1, -1, -every)}) if layers is None else list(layers)
    _check_layers(chosen, depth, "sources")
    columns = min(4, 1 + len(chosen))
    sheet = _Sheet(image, grid, prefix, math.ceil((1 + len(chosen)) / columns), columns, title)
    sheet.row(0, sources, chosen)
    return sheet.figure


def side_by_side(
    image: np.ndarray,
    methods: Mapping[str, np.ndarray],
    *,
    grid: tuple[int, int],
    prefix: int,
    layers: Sequence[int],
    title: str = "",
) -> Any:
    """One row per method: the photograph, then its panels of `layer_maps` for the same layers.

    Args:
      image: float `[H, W, 3]` in [0, 1]; H and W multiples of h and w.
      methods: `sources`, `[L, N0]`, by the name of the method.

    Returns:
      A matplotlib `Figure`.

    Raises:
      InputError: as `layer_maps`, or no method.
    """
    image = _image(image, grid)
    if not methods:
        raise InputError("methods must hold at least one reduction, found none")
    made = {name: _sources(f"methods[{name!r}]", value, grid, prefix) for name, value in methods.items()}
    for name, sources in made.items():
        _check_layers(layers, len(sources), f"methods[{name!r}]")
    columns = 1 + len(layers)
    sheet = _Sheet(image, grid, prefix, len(made), columns, title, _HEAD)
    for row, (name, sources) in enumerate(made.items()):
        sheet.row(row * columns, sources, layers, name)
    return sheet.figure


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
) -> Any:
    """Quality against cost, one line per method.

    Args:
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
    for i, (name, (x, y, low, high)) in enumerate((name, points.T) for name, points in made.items()):
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
            elinewidth=1.0,
            capsize=2.5,
            label=name,
            zorder=3,
        )
    quiet(axes, xlabel)
    axes.set_ylabel(ylabel, color=MUTED, fontsize=9)
    set_title(axes, title)
    # Quality rises with cost, so nothing is drawn at the lower right.
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right")
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


def save(figure: Any, path: str | os.PathLike[str], dpi: int = 110) -> Path:
    """As `curves.save`, in the 256 colours that suit the figure best: photographs take a third of the bytes."""
    from matplotlib.image import imread

    file = base.save(figure, path, dpi)
    pixels = np.rint(imread(file)[..., :3] * 255).astype(np.uint8)
    palette, index = _palette(pixels.reshape(-1, 3))
    height, width = pixels.shape[:2]
    # Every row of a PNG starts with its filter; 0 = none, which suits palettes.
    rows = np.pad(index.reshape(height, width), ((0, 0), (1, 0)))
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0),
        b"PLTE": palette.tobytes(),
        b"IDAT": zlib.compress(rows.tobytes(), 9),
        b"IEND": b"",
    }
    chunks = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts.items()]
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    temporary.replace(file)
    return file


class _Sheet:
    """A figure of places for panels, counted row by row, with the legend of the three states below.

    `head`: inches above each row for its name.
    """

    def __init__(
        self,
        image: np.ndarray,
        grid: tuple[int, int],
        prefix: int,
        rows: int,
        columns: int,
        title: str,
        head: float = 0.0,
    ) -> None:
        self.image, self.grid, self.prefix, self.columns, self.head = image, grid, prefix, columns, head
        self.panel = min(_PANEL, (_WIDTH - _GAP * (columns - 1)) / columns)
        self.high = self.panel * image.shape[0] / image.shape[1]
        self.width = columns * self.panel + (columns - 1) * _GAP
        self.top = 0.36 if title else 0.0
        self.step = head + _CAPTION + self.high + 0.14
        # The legend is one line where it has room, else one line per state.
        self.legend = self.top + rows * self.step
        self.wide = self.width > 7.5
        self.height = self.legend + 0.3 * (1 if self.wide else 3)
        self.factor = max(1, math.ceil(_RASTER / max(image.shape[:2])))
        self.thick = max(1, self.factor * max(image.shape[:2]) // 150)
        self.figure = new_figure(self.width, self.height)
        if title:
            self.figure.text(0, 1, title, ha="left", va="top", fontsize=14, fontweight="bold", color=INK)
        self._legend()

    def row(self, place: int, sources: np.ndarray, layers: Sequence[int], name: str = "") -> None:
        """The photograph at `place`, then one panel per layer."""
        tokens = sources.shape[1]
        below = "{} x {} patches".format(*self.grid) + (f", {self.prefix} prefix" if self.prefix else "")
        self._panel(place, self.image, "Photograph", f"{tokens} tokens", below)
        if name:
            down = self.top + place // self.columns * self.step
            self.figure.text(0, 1 - down / self.height, name, va="top", fontsize=11, fontweight="bold", color=INK)
        colours: dict[int, int] = {}
        for i, layer in enumerate(layers, 1):
            roots = _roots(sources[layer])
            colours = _outline_colours(roots, self.grid, self.prefix, colours)
            drawn = _raster(self.image, roots[self.prefix :], colours, self.grid, self.factor, self.thick)
            pruned = int((roots < 0).sum())
            left = len(np.unique(roots[roots >= 0]))
            below = f"{tokens - left - pruned} merged, {pruned} pruned"
            self._panel(place + i, drawn, f"Layer {layer + 1}", f"{left} left", below)

    def _axes(self, left: float, down: float, width: float, height: float) -> Any:
        """At inches from the upper left corner."""
        place = (left / self.width, 1 - (down + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(place)
        axes.axis("off")
        return axes

    def _panel(self, place: int, picture: np.ndarray, name: str, right: str, below: str) -> None:
        row, column = divmod(place, self.columns)
        down = self.top + row * self.step + self.head + _CAPTION
        axes = self._axes(column * (self.panel + _GAP), down, self.panel, self.high)
        axes.imshow(picture, aspect="auto")
        size = 8.5 * min(1.0, self.panel / 1.6)
        _beside(axes, name, (0, 1), (0, 15), INK, size, va="bottom", fontweight="bold")
        _beside(axes, right, (1, 1), (0, 15), INK, size, va="bottom", ha="right")
        _beside(axes, below, (0, 1), (0, 3), MUTED, size, va="bottom")

    def _legend(self) -> None:
        """Two patches from the middle of the image, drawn as the panels are."""
        high, wide = self.image.shape[0] // self.grid[0], self.image.shape[1] // self.grid[1]
        row, column = self.grid[0] // 2 * high, max(self.grid[1] // 2 - 1, 0) * wide
        crop = self.image[row : row + high, column : column + 2 * wide]
        count = crop.shape[1] // wide
        states = (
            (np.arange(count), {}, 0.0, "kept: the image"),
            (np.zeros(count, int), {0: 0}, 0.24, "merged: mean colour of the group, in its outline"),
            (np.full(count, -1), {}, 0.78, "pruned"),
        )
        for i, (roots, colours, along, text) in enumerate(states):
            left, down = (along * self.width, 0.0) if self.wide else (0.0, 0.3 * i)
            axes = self._axes(left, self.legend + down + 0.05, _SWATCH * count, _SWATCH)
            axes.imshow(_raster(crop, roots, colours, (1, count), self.factor, self.thick), aspect="auto")
            _beside(axes, text, (1, 0.5), (6, 0), INK, 9, va="center")


def _beside(
    axes: Any, text: str, at: tuple[float, float], shift: tuple[float, float], color: str, size: float, **options: Any
) -> None:
    """Text `shift` points from a place in the axes."""
    options |= {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(text, at, shift, color=color, fontsize=size, **options)


def _roots(slots: np.ndarray) -> np.ndarray:
    """`[N0]`, for each token the first one in the same slot: unlike slots, it does not change as tokens are moved."""
    _, first, inverse = np.unique(slots, return_index=True, return_inverse=True)
    return np.where(slots < 0, -1, first[inverse])


def _groups(roots: np.ndarray) -> dict[int, int]:
    """Root -> number of tokens, of those that stand for several, the largest first."""
    found, counts = np.unique(roots[roots >= 0], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {int(found[i]): int(counts[i]) for i in order if counts[i] > 1}


def _outline_colours(
    roots: np.ndarray, grid: tuple[int, int], prefix: int, before: Mapping[int, int]
) -> dict[int, int]:
    """Root -> index in OUTLINES: the one of `before`, else the one used least; never that of a group beside it."""
    patches = roots[prefix:].reshape(grid)
    beside: dict[int, set[int]] = {}
    for a, b in (
        (patches[:, :-1], patches[:, 1:]),
        (patches[:-1], patches[1:]),
        (patches[:-1, :-1], patches[1:, 1:]),
        (patches[:-1, 1:], patches[1:, :-1]),
    ):
        for one, other in zip(a.flat, b.flat, strict=True):
            beside.setdefault(int(one), set()).add(int(other))
            beside.setdefault(int(other), set()).add(int(one))
    colours: dict[int, int] = {}
    used = [0] * len(OUTLINES)
    for root in _groups(roots):
        taken = {colours[other] for other in beside.get(root, ()) if other != root and other in colours}
        free = [c for c in range(len(OUTLINES)) if c not in taken] or list(range(len(OUTLINES)))
        wanted = before.get(root)
        colours[root] = wanted if wanted in free else min(free, key=used.__getitem__)
        used[colours[root]] += 1
    return colours


def _raster(
    image: np.ndarray,
    roots: np.ndarray,
    colours: Mapping[int, int],
    grid: tuple[int, int],
    factor: int,
    thick: int,
) -> np.ndarray:
    """`[H * factor, W * factor, 3]`, the image with merged and pruned patches painted over.

    `roots`: of the patches. `colours`: root -> index in OUTLINES of every group. `thick`: pixels of an outline.
    """
    from matplotlib.colors import to_rgb

    (h, w), (height, width) = grid, image.shape[:2]
    means = image.reshape(h, height // h, w, width // w, 3).mean((1, 3)).reshape(-1, 3)
    drawn = image.astype(float).repeat(factor, 0).repeat(factor, 1)
    label = roots.reshape(h, w).repeat(height // h * factor, 0).repeat(width // w * factor, 1)
    border = _borders(label, thick)
    for root, colour in colours.items():
        inside = label == root
        if inside.any():
            drawn[inside] = means[roots == root].mean(0)
            drawn[inside & border] = to_rgb(OUTLINES[colour])
    drawn[label < 0] = to_rgb(PRUNED)
    row, column = np.indices(label.shape)
    drawn[(label < 0) & ((row + column) % 10 < 2)] = to_rgb(HATCH)
    return drawn


def _borders(label: np.ndarray, thick: int) -> np.ndarray:
    """Pixels from which a step of `thick`, in any of eight directions, leads to another label or out of the image."""
    padded = np.pad(label, thick, constant_values=-2)
    height, width = label.shape
    border = np.zeros(label.shape, bool)
    for dy in (0, thick, 2 * thick):
        for dx in (0, thick, 2 * thick):
            border |= padded[dy : dy + height, dx : dx + width] != label
    return border


def _palette(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 `[n, 3]` -> uint8 palette `[256 or fewer, 3]` and the index of each pixel: the box of colours with the
    largest squared error is cut at its mean, again and again."""
    packed = pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    found, inverse, counts = np.unique(packed, return_inverse=True, return_counts=True)
    rgb = np.stack([found >> 16, found >> 8 & 255, found & 255], 1)

    def box(members: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        mean = np.average(rgb[members], 0, counts[members])
        return members, mean, counts[members] @ (rgb[members] - mean) ** 2

    boxes = [box(np.arange(len(found)))]
    while len(boxes) < 256:
        worst = max(range(len(boxes)), key=lambda i: boxes[i][2].max())
        members, mean, error = boxes[worst]
        axis = int(error.argmax())
        above = rgb[members, axis] > mean[axis]
        if len(members) == 1:
            break
        boxes[worst] = box(members[above])
        boxes.append(box(members[~above]))
    index = np.empty(len(found), np.uint8)
    for i, (members, _, _) in enumerate(boxes):
        index[members] = i
    return np.rint([mean for _, mean, _ in boxes]).astype(np.uint8), index[inverse]


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


def _suptitle(figure: Any, title: str) -> None:
    if title:
        figure.suptitle(title, x=0.08, y=0.985, ha="left", fontsize=14, fontweight="bold", color=INK)


def _image(image: Any, grid: tuple[int, int]) -> np.ndarray:
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] != 3 or not np.issubdtype(image.dtype, np.floating):
        raise InputError(f"image must be floating point [H, W, 3], found {image.dtype} {list(image.shape)}")
    if not image.size or min(grid) < 1 or image.shape[0] % grid[0] or image.shape[1] % grid[1]:
        raise InputError(f"image must divide into {grid[0]} x {grid[1]} patches, found {list(image.shape)}")
    if not ((image >= 0) & (image <= 1)).all():
        raise InputError(f"image must be in [0, 1], found {image.min():g} to {image.max():g}")
    return image


def _sources(name: str, sources: Any, grid: tuple[int, int], prefix: int) -> np.ndarray:
    sources = np.asarray(sources)
    tokens = prefix + grid[0] * grid[1]
    if sources.ndim != 2 or len(sources) < 1 or sources.shape[1] != tokens:
        raise InputError(
            f"{name} must have shape [L, {tokens}] for {prefix} prefix tokens and {grid[0]} x {grid[1]} patches, "
            f"found {list(sources.shape)}"
        )
    if not np.issubdtype(sources.dtype, np.integer) or sources.min() < -1:
        raise InputError(f"{name} must be integers of -1 or more, found {sources.dtype} from {sources.min()}")
    return sources


def _check_layers(layers: Sequence[int], depth: int, name: str) -> None:
    if not len(layers) or not all(0 <= layer < depth for layer in layers):
        raise InputError(f"layers must name some of the {depth} of {name}, from 0, found {list(layers)}")


def _finite(name: str, values: Any, ranks: tuple[int, ...], form: str) -> np.ndarray:
    values = np.asarray(values, float)
    if values.ndim not in ranks or not values.size:
        raise InputError(f"{name} must have shape {form}, found {list(values.shape)}")
    if not np.isfinite(values).all():
        raise InputError(f"{name} must be finite, found {int((~np.isfinite(values)).sum())} values that are not")
    return values
