# SPDX-License-Identifier: Apache-2.0
"""Dynamic pooling experts on a lattice: which expert, what it makes of the visual tokens, what routing costs.

Nothing moves. A pooled token lies in the top left slot of its window on the image's original grid, and the others are
dead; so text keeps its slots, and the live ones in their order are the shortened sequence (spec sections 2 and 8.1).
Windows are (height, width); an expert's *cost scale* is log2 of its area.

Letters: B batch, N slots, D width, K experts, M stages, H x W the image's grid. A state (a, b) `[B, 2]` says how often
a sample's grid was halved in height and width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vtjax.ops.norms import layer_norm

WINDOWS = ((1, 1), (1, 2), (2, 2))
"""Height and width of what each expert makes one token of."""
AREAS = tuple(height * width for height, width in WINDOWS)
SCALES = tuple(math.log2(area) for area in AREAS)
"""sigma of each expert: how often it halves the tokens (spec section 3)."""
POOLS = ("max", "avg", "dwconv")
GATES = ("prob", "st", "off")

_EXACT = jax.lax.Precision.HIGHEST


def scores(x: Float[Array, "B D"], router: Mapping[str, Any], temperature: float) -> Float[Array, "B K"]:
    """log softmax(z / T), z = W2 gelu(W1 LayerNorm(x)), or z = W2 x without `norm` and `hidden`. Float32.

    Source: spec section 2.5.
    """
    x = x.astype(jnp.float32)
    if "hidden" in router:
        x = layer_norm(x, router["norm"]["scale"], router["norm"]["bias"], 1e-5)
        x = jax.nn.gelu(jnp.matmul(x, router["hidden"]["kernel"], precision=_EXACT), approximate=False)
    z = jnp.matmul(x, router["score"]["kernel"], precision=_EXACT)
    return jax.nn.log_softmax(z.astype(jnp.float32) / temperature)


def allowed(count: Int[Array, " B"], least: int) -> Bool[Array, "B K"]:
    """Which experts leave at least `least` of `count` tokens; identity is always allowed (spec section 9, item 5)."""
    areas = jnp.asarray(AREAS)
    return (count[:, None] >= least * areas[None]) | (areas == 1)


def sample(key: Array, logp: Float[Array, "B K"], open_: Bool[Array, "B K"]) -> Int[Array, " B"]:
    """One draw per sample from p restricted to the open experts (spec section 2.6)."""
    return jax.random.categorical(key, jnp.where(open_, logp, -jnp.inf)).astype(jnp.int32)


def likeliest(logp: Float[Array, "B K"], open_: Bool[Array, "B K"]) -> Int[Array, " B"]:
    """The likeliest of the open experts; of equal ones the first, which compresses least."""
    return jnp.where(open_, logp, -jnp.inf).argmax(-1).astype(jnp.int32)


def gate(logp: Float[Array, "B K"], choice: Int[Array, " B"], kind: str) -> Float[Array, " B"]:
    """What pooled tokens are multiplied by: p of the choice ("prob"), p / stop_gradient(p), which is 1 and carries the
    gradient of log p ("st", ours; of log p, as p underflows), or 1 ("off"). Float32."""
    of = jnp.take_along_axis(logp, choice[:, None], axis=1)[:, 0]
    if kind == "off":
        return jnp.ones_like(of)
    return jnp.exp(of - jax.lax.stop_gradient(of) if kind == "st" else of)


def route_loss(
    p: Float[Array, "B M K"],
    routed: Bool[Array, "B M"],
    tau: Float[Array, ""] | float,
    *,
    form: str = "argmax_global",
    group: int = 0,
) -> Float[Array, ""]:
    """max(0, tau - mean of sigma), the hinge that asks for `tau` halvings per stage on average over the batch.

    `form`: "argmax_global" takes sigma_k p_k of the likeliest expert over all routed pairs (the release);
    "argmax_per_stage" has a hinge per stage, and their mean; "expected" takes sum_k sigma_k p_k, which has no dead
    ends. `group`: rows of the batch that share a hinge, of which the mean is taken (the release: those of one device);
    0 = all of them. 0 where nothing was routed. Source: spec section 3; section 7, Q3.

    Raises:
      ValueError: groups that do not divide the batch.
    """
    rows, stages = routed.shape
    if group < 0 or (group and rows % group):
        raise ValueError(f"group must divide the batch of {rows}, found {group}")
    sigma = jnp.asarray(SCALES, jnp.float32)
    if form == "expected":
        value = (sigma * p).sum(-1)
    else:
        best = p.argmax(-1, keepdims=True)
        value = (sigma[best] * jnp.take_along_axis(p, best, axis=-1))[..., 0]
    value, weight = (a.reshape(-1, group or rows, stages) for a in (value, routed.astype(jnp.float32)))
    axis = 1 if form == "argmax_per_stage" else (1, 2)
    count = weight.sum(axis)
    hinge = jnp.maximum(tau - (value * weight).sum(axis) / jnp.maximum(count, 1.0), 0.0) * (count > 0)
    return hinge.sum() / jnp.maximum((count > 0).sum(), 1)


LOSSES = ("argmax_global", "argmax_per_stage", "expected")


def pool(
    x: Float[Array, "B N D"],
    valid: Bool[Array, "B N"],
    place: Int[Array, "B N"],
    halved: Int[Array, "B 2"],
    choice: Int[Array, " B"],
    grid: tuple[int, int],
    *,
    most: int,
    kind: str = "max",
    filters: Mapping[str, Any] | None = None,
    source: Int[Array, "B N0"] | None = None,
) -> tuple[Float[Array, "B N D"], Bool[Array, "B N"], Int[Array, "B 2"]]:
    """Every sample's images pooled by its expert, in place. Slots of text stay as they are.

    Args:
      x: tokens; an image's visual ones lie in one run, row by row.
      valid: live visual tokens. Cells that are not valid (LTMP took them) enter no pool.
      place: place of a slot's visual token in its image's grid, -1 = text.
      halved: the state before.
      choice: number of the window, of 1 x 1, 1 x 2 and 2 x 2.
      grid: (H, W), multiples of every window to come.
      most: the largest a or b that `halved` can hold: stages before this one.
      kind: of `POOLS`; "dwconv" weighs every cell of the window by `filters[HxW] [area, D]`, its own filter per
        channel.
      source: the slot of every slot that entered the decoder, in their order, -1 = gone, where tokens were moved
        together; None = none was.

    Returns:
      The tokens, which of them are valid now, and the state after.
    """
    a, b = halved[:, 0], halved[:, 1]
    wide, tall = jnp.asarray([w for _, w in WINDOWS])[choice] > 1, jnp.asarray([h for h, _ in WINDOWS])[choice] > 1

    if source is not None:
        origin = jnp.argsort(source < 0, axis=1, stable=True)[:, : x.shape[1]]

    def shifted(array: Array, unit: int, times: Array) -> Array:
        """The slot `unit * 2^times` further on. What wraps around lands in slots that die."""
        if source is not None:
            there, slots = origin + unit * 2 ** times[:, None], source.shape[1]
            at = jnp.where(there < slots, jnp.take_along_axis(source, jnp.minimum(there, slots - 1), axis=1), -1)
            at = at.reshape(*at.shape, *[1] * (array.ndim - 2))
            return jnp.where(at >= 0, jnp.take_along_axis(array, jnp.maximum(at, 0), axis=1), 0)
        found = jnp.roll(array, -unit, axis=1)
        for number in range(1, most + 1):
            here = (times == number).reshape(-1, *[1] * (array.ndim - 1))
            found = jnp.where(here, jnp.roll(array, -unit * 2**number, axis=1), found)
        return found

    def both(found: tuple[Array, Array], unit: int, times: Array, on: Array) -> tuple[Array, Array]:
        """Values and weights with those of the neighbour, where `on`."""
        value, weight = found
        other, beside = shifted(value, unit, times), shifted(weight, unit, times)
        if kind == "max":
            joined = jnp.where(
                (beside > 0)[..., None], jnp.where((weight > 0)[..., None], jnp.maximum(value, other), other), value
            )
        else:
            total = jnp.maximum(weight + beside, 1.0)[..., None].astype(value.dtype)
            mine, its = (w[..., None].astype(value.dtype) for w in (weight, beside))
            joined = (mine * value + its * other) / total
        return jnp.where(on[:, None, None], joined, value), jnp.where(on[:, None], weight + beside, weight)

    found = x, valid.astype(jnp.float32)
    if kind == "dwconv":
        assert filters is not None
        found = _filtered(x, valid, shifted, a, b, grid[1], choice, filters)
    else:
        found = both(both(found, 1, b, wide), grid[1], a, tall)
    after = jnp.stack([a + tall, b + wide], axis=1)
    row, column = place // grid[1], place % grid[1]
    corner = (row % 2 ** after[:, :1] == 0) & (column % 2 ** after[:, 1:] == 0) & (place >= 0)
    live = corner & (found[1] > 0)
    return jnp.where(live[..., None], found[0].astype(x.dtype), x), live, after


def _filtered(
    x: Array,
    valid: Array,
    shifted: Any,
    a: Array,
    b: Array,
    columns: int,
    choice: Array,
    filters: Mapping[str, Any],
) -> tuple[Array, Array]:
    """A depthwise convolution with the window as its stride; cells that are not valid count as 0."""
    cell = jnp.where(valid[..., None], x, 0)
    weight = valid.astype(jnp.float32)
    right = shifted(cell, 1, b), shifted(weight, 1, b)
    cells = [
        (cell, weight),
        right,
        *((shifted(v, columns, a), shifted(w, columns, a)) for v, w in ((cell, weight), right)),
    ]
    value = x
    for number, (height, width) in enumerate(WINDOWS):
        if height * width == 1:
            continue
        used = [cells[2 * i + j] for i in range(height) for j in range(width)]
        filter_ = filters[f"{height}x{width}"].astype(x.dtype)
        here = choice == number
        made = sum(v * filter_[i] for i, (v, _) in enumerate(used))
        value = jnp.where(here[:, None, None], made, value)
        weight = jnp.where(here[:, None], sum(w for _, w in used), weight)
    return value, weight
