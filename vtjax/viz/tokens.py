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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vtjax.errors import InputError
from vtjax.viz import curves as base
from vtjax.viz.curves import INK, MUTED, new_figure

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
_WIDTH, _PANEL, _GAP, _CAPTION, _HEAD, _SWATCH = 8.8, 2.1, 0.13, 0.42, 0.26, 0.2
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


def save(figure: Any, path: str | os.PathLike[str], dpi: int = 110) -> Path:
    """As `curves.save`, in the 256 colours that suit the figure best: photographs take a third of the bytes."""
    from PIL import Image

    file = base.save(figure, path, dpi)
    temporary = file.with_name(f".{file.name}.tmp")
    with Image.open(file) as picture:
        picture.convert("RGB").quantize(256).save(temporary, format="png", optimize=True)
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
        self.step = head + _CAPTION + self.high + (0.22 if head else 0.14)
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
        states: tuple[tuple[np.ndarray, dict[int, int], float, str], ...] = (
            (np.arange(count), {}, 0.0, "kept: the image"),
            (np.zeros(count, int), {0: 0}, 0.24, "merged: mean colour, one outline colour per group"),
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
