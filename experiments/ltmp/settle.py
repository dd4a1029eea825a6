# SPDX-License-Identifier: Apache-2.0
"""Meets a budget of MACs exactly: all thresholds move together, a little, until the mean cost is the target.

A penalty cannot do it. Where it balances the loss, the cost is above the target by (slope of the loss) / (2 lambda);
and a lambda that is large enough shakes the thresholds, because the cost of a batch differs from that of all images.
"""

from __future__ import annotations

from collections.abc import Callable


def amount(
    ratio: Callable[[float], float], target: float, *, within: float = 0.003, tries: int = 6
) -> tuple[float, float]:
    """How far to relax (see `ltmp.relaxed`; negative = tighten) so that `ratio` is `target`, and the ratio there.

    The secant method between known points; `ratio` grows with the amount, but may have steps.

    Args:
      within: largest relative miss that is good enough.
      tries: evaluations of `ratio` at most; the closest found is returned.
    """
    known = {0.0: ratio(0.0)}
    step = 0.1 if known[0.0] < target else -0.1
    for _ in range(tries - 1):
        best = min(known, key=lambda a: abs(known[a] - target))
        if abs(known[best] / target - 1.0) <= within:
            break
        below = max((a for a in known if known[a] < target), default=None)
        above = min((a for a in known if known[a] >= target), default=None)
        if below is None or above is None or below >= above:
            following = max(min(best + step, 1.0), -1.0)
            step *= 2
        else:
            part = (target - known[below]) / (known[above] - known[below])
            following = below + min(max(part, 0.1), 0.9) * (above - below)
        if following in known:
            break
        known[following] = ratio(following)
    best = min(known, key=lambda a: abs(known[a] - target))
    return best, known[best]
