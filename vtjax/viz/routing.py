# SPDX-License-Identifier: Apache-2.0
"""Which experts were taken, by stage and kind of sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vtjax.errors import InputError
from vtjax.viz.curves import COLORS, INK, MUTED, new_figure, quiet


def experts(choices: Mapping[str, np.ndarray], names: Sequence[str], title: str = "") -> Any:
    """One panel per stage: for every kind of sample the share of each expert, as one bar.

    Args:
      choices: int `[samples, stages]` by kind, numbers of experts.
      names: of the experts.

    Returns:
      A matplotlib `Figure`; see `curves.save`.

    Raises:
      InputError: no samples, different numbers of stages, or an expert without a name.
    """
    stages = {np.shape(rows)[1:] for rows in choices.values()}
    if len(stages) != 1 or any(not len(rows) for rows in choices.values()) or len(found := stages.pop()) != 1:
        raise InputError(
            f"choices must be [samples, stages] for every kind, found {[*map(np.shape, choices.values())]}"
        )
    highest = max(int(np.max(rows)) for rows in choices.values())
    if highest >= len(names):
        raise InputError(f"names must hold all experts, found {len(names)} for expert {highest}")
    (count,) = found
    figure = new_figure(1.2 + 2.5 * count, 1.1 + 0.42 * len(choices))
    grid = figure.add_gridspec(1, count, wspace=0.08, top=0.78, bottom=0.3)
    for stage in range(count):
        axes = figure.add_subplot(grid[0, stage])
        left = np.zeros(len(choices))
        for expert, name in enumerate(names):
            share = np.array([float(np.mean(np.asarray(rows)[:, stage] == expert)) for rows in choices.values()])
            axes.barh(range(len(choices)), share, left=left, color=COLORS[expert], height=0.72, label=name)
            for place, (width, start) in enumerate(zip(share, left, strict=True)):
                if width >= 0.12:
                    text = f"{100 * width:.0f}"
                    axes.text(start + width / 2, place, text, ha="center", va="center", fontsize=8, color="white")
            left = left + share
        quiet(axes, "share of questions, %")
        axes.grid(False)
        axes.set_xlim(0, 1)
        axes.set_ylim(len(choices) - 0.4, -0.6)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
        axes.set_yticks(range(len(choices)), list(choices) if not stage else [])
        axes.tick_params(axis="y", colors=MUTED, labelsize=9)
        axes.set_title(f"stage {stage + 1}", loc="left", fontsize=10, color=INK)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(names), frameon=False, fontsize=8.5, labelcolor=INK)
    if title:
        figure.suptitle(title, x=0.125, y=0.98, ha="left", fontsize=11, fontweight="bold", color=INK)
    return figure
