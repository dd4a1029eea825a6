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
            axes = figure.add_subplot(grid[place, column])
            axes.imshow(image, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_color(GRID)
            if not column:
                axes.set_ylabel(name, color=MUTED, fontsize=10)
            below = {"transform": axes.transAxes, "ha": "center", "va": "top", "linespacing": 1.25}
            lines = textwrap.wrap(question, _WIDE)
            axes.text(0.5, -0.04, "\n".join(lines), fontsize=8, color=INK, **below)
            axes.text(0.5, -0.06 - 0.1 * len(lines), answer, fontsize=8.5, color=INK, fontweight="bold", **below)
    if title:
        figure.suptitle(title, x=0.125, y=0.92, ha="left", fontsize=12, fontweight="bold", color=INK)
    return figure
