# SPDX-License-Identifier: Apache-2.0
"""How many neurons each block keeps, for DGMR, where the paper gives all blocks the same number.

A block's cost falls with the neurons that it keeps. Two costs: how far the worst dropped neuron is from the span of the
kept ones (`by_norms`, from the weights alone), and how much the features change when this block alone is pruned
(`by_features`, on some images, without labels). `allocate` spends a total where it lowers the sum of the costs most.

A neuron costs the same MACs in every block (spec section 1.4), so equal totals are equal MACs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from vtjax.errors import InputError
from vtjax.methods import dgmr
from vtjax.models.segments import block_name
from vtjax.models.vit import Params
from vtjax.spec import ViTSpec


class Curve(NamedTuple):
    """What a block costs at some counts; between them the way is straight.

    Attributes:
      counts: int `[n]`, ascending; the first is the fewest that the block may keep, the last what it has.
      costs: float64 `[n]`, in any unit that the blocks share.
    """

    counts: np.ndarray
    costs: np.ndarray


def allocate(
    curves: Sequence[Curve | None], total: int, *, multiple: int = 1, limits: tuple[int, int] | None = None
) -> tuple[int, ...]:
    """Counts whose sum is `total` and whose costs are together as low as the curves' lower convex hulls allow.

    Steps go, one after the other, to the block where a neuron saves most; so a block whose curve is flat at first and
    steep later is judged by the mean slope up to there. Equal slopes go to the earlier block.

    Args:
      curves: one per block; None for a block without MLP, which gets 0.
      multiple: counts are multiples of it, as far as a block's own width is; `total` must be one, too.
      limits: the fewest and the most that a block gets, within what its curve spans. Costs of single blocks say little
        about what many cuts do together: where curves are concave, as measured ones are, only limits keep a block from
        losing everything for the sake of another.

    Returns:
      One count per block.

    Raises:
      InputError: a total that the blocks cannot have, or a curve that is none.
    """
    if multiple < 1:
        raise InputError(f"multiple must be 1 or more, found {multiple}")
    for layer, curve in enumerate(curves):
        if curve is not None and (len(curve.counts) != len(curve.costs) or not np.isfinite(curve.costs).all()):
            raise InputError(f"curves[{layer}] must hold a finite cost per count, found {curve.costs}")
        if curve is not None and (curve.counts[0] < 1 or (np.diff(curve.counts) < 1).any()):
            raise InputError(f"curves[{layer}].counts must ascend from 1 or more, found {curve.counts}")
    given = [curve if limits is None else _within(curve, *limits) for curve in curves if curve is not None]
    fewest = [min(-(-int(curve.counts[0]) // multiple) * multiple, int(curve.counts[-1])) for curve in given]
    most = sum(int(curve.counts[-1]) for curve in given)
    if not sum(fewest) <= total <= most:
        raise InputError(f"the total of kept neurons must be in {sum(fewest)}..{most}, found {total}")
    slopes = []  # (what one neuron saves, block, from, to), along the hull of every block
    for index, curve in enumerate(given):
        hull = _hull(curve)
        for first, last in zip(hull[:-1], hull[1:], strict=True):
            saved = (curve.costs[first] - curve.costs[last]) / (curve.counts[last] - curve.counts[first])
            slopes.append((-saved, index, int(curve.counts[first]), int(curve.counts[last])))
    kept, left = list(fewest), total - sum(fewest)
    for _, index, _, stop in sorted(slopes):
        top = int(given[index].counts[-1])
        more = max((top if stop == top else stop // multiple * multiple) - kept[index], 0)
        more = more if more <= left else left // multiple * multiple
        kept[index], left = kept[index] + more, left - more
    if left:
        raise InputError(f"the total of kept neurons must be reachable in multiples of {multiple}, found {left} over")
    result = iter(kept)
    return tuple(0 if curve is None else next(result) for curve in curves)


def by_norms(picks: dgmr.Picks) -> list[Curve | None]:
    """Curves from the residual norms of a full selection (`dgmr.choose` with every neuron kept).

    A pick saves the square of its residual norm, as a share of the sum over the block's picks. Where a new round starts
    the norms rise again; the hull averages over that.
    """
    curves: list[Curve | None] = []
    for pick in picks:
        if pick is None:
            curves.append(None)
            continue
        gains = np.square(np.asarray(pick.norms, np.float64))
        gains /= max(gains.sum(), np.finfo(np.float64).tiny)
        curves.append(Curve(np.arange(1, len(gains) + 1), np.maximum(1.0 - np.cumsum(gains), 0.0)))
    return curves


def by_features(
    spec: ViTSpec,
    params: Params,
    picks: dgmr.Picks,
    images: Float[np.ndarray, "n H W C"],
    apply: Callable[..., Any],
    *,
    point: str = "normed",
    grid: int = 4,
    weights: tuple[float, float] = (1.0, 1.0),
    batch: int = 32,
) -> list[Curve | None]:
    """Curves from what pruning one block alone does to the features: the distillation loss, without training.

    Pruned neurons are silenced (the rows of `down` set to 0), which is what their removal computes and compiles once.
    `grid` counts per block, evenly spaced on a log scale, and the full width.

    Args:
      picks: every neuron of every block, in pick order (`dgmr.choose`).
      images: normalised; some dozens are enough.
      apply: `ViT.apply` of the model.
      point, weights: of the features, and (w_class, w_patch).

    Raises:
      InputError: picks that leave neurons out; a model whose hidden activations are normed: silenced is not removed.
    """
    if spec.mlp_norm:
        raise InputError("sensitivities need MLPs without a norm on their hidden activations, found mlp_norm=True")
    if not len(images):
        raise InputError("sensitivities need at least one image, found none")

    @jax.jit
    def known(params: Params, images: Any) -> dgmr.Features:
        y, aux = apply(params, images)
        return dgmr.features(spec, y, aux, point)

    @jax.jit
    def cost(params: Params, images: Any, there: dgmr.Features) -> Any:
        whole, patch = dgmr.distances(known(params, images), there)
        return (weights[0] * whole + weights[1] * patch).sum()

    params = jax.tree.map(jnp.asarray, params)
    parts = [jnp.asarray(part) for part in np.array_split(images, -(-len(images) // batch))]
    there = [known(params, part) for part in parts]
    curves: list[Curve | None] = []
    for layer, (block, pick) in enumerate(zip(spec.blocks, picks, strict=True)):
        if pick is None:
            curves.append(None)
            continue
        order = np.asarray(pick.indices)
        if len(order) != block.mlp:
            raise InputError(f"picks[{layer}] must hold all {block.mlp} neurons, found {len(order)}")
        counts = np.unique(np.geomspace(max(1.0, block.mlp / 32), block.mlp, grid + 1).round().astype(int))
        name, costs = block_name(layer), []
        for count in counts[:-1]:
            mlp = params[name]["mlp"]
            silenced = {**mlp["down"], "kernel": mlp["down"]["kernel"].at[order[count:]].set(0.0)}
            changed = {**params, name: {**params[name], "mlp": {**mlp, "down": silenced}}}
            costs.append(sum(float(cost(changed, *each)) for each in zip(parts, there, strict=True)) / len(images))
        curves.append(Curve(counts, np.asarray([*costs, 0.0])))
    return curves


def _within(curve: Curve, low: int, high: int) -> Curve:
    """A curve between two counts, as far as it spans them."""
    low, high = (int(np.clip(limit, curve.counts[0], curve.counts[-1])) for limit in (low, high))
    counts = np.unique([low, *curve.counts[(curve.counts > low) & (curve.counts < high)], high])
    return Curve(counts, np.interp(counts, curve.counts, curve.costs))


def _hull(curve: Curve) -> list[int]:
    """Positions of the points of a curve's lower convex hull, ascending."""
    hull: list[int] = []
    x, y = curve.counts.astype(float), np.asarray(curve.costs, float)
    for i in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break  # b lies below the way from a to i
            hull.pop()
        hull.append(i)
    return hull
