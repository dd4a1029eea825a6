# SPDX-License-Identifier: Apache-2.0
"""The figure of a sweep: a metric against what was swept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vtjax.viz.curves import COLORS, INK, new_figure, quiet, set_title

SEED = "seed"


def sweep(records: Sequence[Mapping[str, Any]], leaves: Sequence[str], metric: str) -> Any:
    """`metric` over the first leaf that is not the seed; one line for every combination of the others. Seeds are
    averaged, their range is shaded.

    Args:
      records: each with `config`, the value of every leaf, and `metric`.

    Returns:
      A matplotlib `Figure`.
    """
    others = [leaf for leaf in leaves if leaf != SEED] or [SEED]
    across, rest = others[0], others[1:]
    values = list(dict.fromkeys(_plain(r["config"][across]) for r in records))
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    values = sorted(values) if numeric else values
    groups: dict[tuple[Any, ...], dict[Any, list[float]]] = {}
    for record in records:
        key = tuple(_plain(record["config"][leaf]) for leaf in rest)
        groups.setdefault(key, {}).setdefault(_plain(record["config"][across]), []).append(float(record[metric]))

    made = new_figure(7.0, 4.4)
    axes = made.add_subplot()
    # Names and uneven numbers stand at equal distances; numbers over more than a decade on a logarithmic axis.
    spread = numeric and values[0] > 0 and values[-1] >= 8 * values[0]
    place = {v: v if numeric else i for i, v in enumerate(values)}
    for i, (key, by_value) in enumerate(groups.items()):
        known = [v for v in values if v in by_value]
        x = np.array([place[v] for v in known], float)
        low, mean, high = (np.array([f(by_value[v]) for v in known]) for f in (np.min, np.mean, np.max))
        color = COLORS[i % len(COLORS)]
        label = ", ".join(f"{leaf} {value}" for leaf, value in zip(rest, key, strict=True))
        axes.plot(x, mean, marker="o", markersize=4.5, linewidth=1.8, color=color, label=label or None)
        if (high > low).any():
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    if spread:
        axes.set_xscale("log")
    axes.set_xticks([place[v] for v in values], [_text(v) for v in values])
    axes.minorticks_off()
    seeds = len({r["config"].get(SEED) for r in records})
    set_title(axes, metric + (f", mean and range of {seeds} seeds" if seeds > 1 and across != SEED else ""))
    quiet(axes, across)
    if rest:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return made


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
