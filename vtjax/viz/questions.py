# SPDX-License-Identifier: Apache-2.0
"""Images with the questions that are asked about them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vtjax.errors import InputError
from vtjax.viz.curves import GRID, INK, MUTED, new_figure

_PANEL, _WIDE = 1.75, 24  # inches of a panel, characters of a line below it


def sheet(samples: Mapping[str, Sequence[tuple[np.ndarray, str, str]]], title: str = "") -> Any:
    """One row per type of question; below each image what is asked, and the answer.

    Args:
      samples: (image uint8 `[H, W, 3]`, question, answer) by the name of the type, equally many for each.

    Returns:
      A matplotlib `Figure`; see `curves.save`.

    Raises:
      InputError: nothing to draw, or rows of different lengths.
    """
    counts = {len(row) for row in samples.values()}
    if len(counts) != 1 or 0 in counts:
        raise InputError(f"samples must hold equally many of each type, at least one, found {sorted(counts)}")
    rows, columns = len(samples), counts.pop()
    figure = new_figure(0.3 + 1.1 * _PANEL * columns, 0.4 + 1.55 * _PANEL * rows)
    grid = figure.add_gridspec(rows, columns, hspace=0.55, wspace=0.1)
    for place, (name, row) in enumerate(samples.items()):
        for column, (image, question, answer) in enumerate(row):
            axes = _panel(figure.add_subplot(grid[place, column]), image)
            if not column:
                axes.set_ylabel(name, color=MUTED, fontsize=10)
            _below(axes, question, answer)
    if title:
        figure.suptitle(title, x=0.125, y=0.92, ha="left", fontsize=12, fontweight="bold", color=INK)
    return figure


def looks(samples: Sequence[tuple[np.ndarray, str, str, np.ndarray]], title: str = "") -> Any:
    """Images, and below each where an answer looked: patches that it read little of are dark.

    Args:
      samples: (image uint8 `[H, W, 3]`, question, answer, weight of each patch, float `[h, w]`); each map is scaled by
        its largest weight.

    Returns:
      A matplotlib `Figure`; see `curves.save`.

    Raises:
      InputError: nothing to draw.
    """
    if not samples:
        raise InputError("samples must hold at least one image, found none")
    columns = len(samples)
    figure = new_figure(0.3 + 1.1 * _PANEL * columns, 0.5 + 2.75 * _PANEL)
    grid = figure.add_gridspec(2, columns, hspace=0.06, wspace=0.1, top=0.88, bottom=0.2)
    for column, (image, question, answer, weights) in enumerate(samples):
        height, width = image.shape[:2]
        share = np.asarray(weights, np.float32) / max(float(np.max(weights)), 1e-9)
        wide = np.kron(share, np.ones((-(-height // share.shape[0]), -(-width // share.shape[1]))))[:height, :width]
        lit = image / 255.0 * (0.12 + 0.88 * wide[:, :, None])
        _panel(figure.add_subplot(grid[0, column]), image)
        _below(_panel(figure.add_subplot(grid[1, column]), lit), question, answer)
    if title:
        figure.suptitle(title, x=0.125, y=0.96, ha="left", fontsize=12, fontweight="bold", color=INK)
    return figure


def _panel(axes: Any, image: np.ndarray) -> Any:
    axes.imshow(image, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(GRID)
    return axes


def _below(axes: Any, question: str, answer: str) -> None:
    place = {"transform": axes.transAxes, "ha": "center", "va": "top", "linespacing": 1.25}
    lines = textwrap.wrap(question, _WIDE)
    axes.text(0.5, -0.04, "\n".join(lines), fontsize=8, color=INK, **place)
    axes.text(0.5, -0.06 - 0.1 * len(lines), answer, fontsize=8.5, color=INK, fontweight="bold", **place)
