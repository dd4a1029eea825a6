# SPDX-License-Identifier: Apache-2.0
"""Thresholds to start learning from: every block removes the same number of tokens, on average over some images.

The release starts with thresholds that remove nothing, and lets the budget pull. Which blocks then give in first is a
matter of chance: a block where more tokens stand near its threshold is pulled harder. Here the start meets the budget
already, evenly over the blocks, as fixed-rate merging does; so what is left to learn is where tokens are worth most.

Letters: L layers, n images.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from vtjax.account import flops
from vtjax.methods import ltmp
from vtjax.models import segments
from vtjax.models.vit import ViT
from vtjax.ops import token_reduction
from vtjax.ops.tokens import Tokens
from vtjax.spec import ViTSpec


def rates(spec: ViTSpec, target: float, slope: float) -> np.ndarray:
    """Tokens `[L]`, not necessarily whole numbers, that the blocks remove to spend `target` of the dense MACs.

    They fall linearly, from `1 + slope` times their mean in the first block to `1 - slope` times in the last.
    """
    layers = [layer for layer, _ in ltmp.reducers(spec)]
    shape = np.zeros(spec.depth)
    shape[layers] = np.linspace(1.0 + slope, 1.0 - slope, len(layers))
    prefix = max(spec.prefix, 1)
    dense, rest = float(flops.macs(spec)), float(flops.macs(spec)) - ltmp.dense_macs(spec)
    costs = ltmp.costs(spec).astype(np.float64)

    def removed(mean: float) -> tuple[float, np.ndarray]:
        before, total, out = float(spec.tokens), rest, []
        for layer in range(spec.depth):
            out.append(min(mean * shape[layer], (before - prefix) / 2))
            total += costs[layer] @ np.asarray([before, before * before, before - out[-1]])
            before -= out[-1]
        return total / dense, np.asarray(out)

    low, high = 0.0, float(spec.tokens)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if removed(middle)[0] > target else (low, middle)
    return removed(high)[1]


def even(
    spec: ViTSpec,
    params: Any,
    images: np.ndarray,
    target: float,
    prune_share: float,
    slope: float,
    share_slope: float = 0.0,
    batch: int = 32,
) -> dict[str, np.ndarray]:
    """`params["ltmp"]` with which every block removes as many tokens of an average image as `rates` says.

    Block after block, a threshold is the quantile of the scores that the images have there, under the thresholds before
    it; so an image with more alike tokens loses more.

    Args:
      images: float32 `[n, H, W, C]`, normalised; some dozens are enough.
      slope: of the rates.
      prune_share: part of the removed tokens that is pruned, where the variant does both; in [0, 1].
      share_slope: it rises linearly, from `prune_share - share_slope` in the first block to their sum in the last,
        within [0, 1].
    """
    made = ltmp.reducers(spec)[0][1]
    assert isinstance(made, ltmp.Ltmp)
    shares = np.full(spec.depth, float(ltmp.prunes(made.variant)))
    if ltmp.merges(made.variant) and ltmp.prunes(made.variant):
        shares = np.clip(prune_share + share_slope * np.linspace(-1.0, 1.0, spec.depth), 0.0, 1.0)
    model = ltmp.vit(ltmp.consistent(spec))
    removed = rates(spec, target, slope)

    off = {"merge_threshold": 1.0, "prune_threshold": 0.0}
    thresholds = {name: np.full(spec.depth, off[name], np.float32) for name in ltmp.starts(made.variant, spec.depth)}
    parts = [images[first : first + batch] for first in range(0, len(images), batch)]
    states = [_embedded(model, params, part) for part in parts]
    reducing = dict(ltmp.reducers(spec))
    for layer, block in enumerate(model.blocks()):
        share, mine = shares[layer], params.get(segments.block_name(layer), {})

        def run(state: Tokens, block: Any = block, mine: Any = mine, layer: int = layer) -> tuple[Tokens, Any]:
            return _advanced(block, mine, state, {name: value[layer] for name, value in thresholds.items()})

        steps = [("merge_threshold", "best_similarity", 1.0 - share), ("prune_threshold", "prune_score", share)]
        for threshold, score, weight in reversed(steps) if made.variant == "ltpm" else steps:
            if layer not in reducing or threshold not in thresholds or not weight:
                continue
            found = [run(state)[1]["decisions"] for state in states]
            scores = np.concatenate([np.asarray(_candidates(decisions, score)).ravel() for decisions in found])
            finite = np.sort(scores[np.isfinite(scores)])
            if not len(finite):  # nothing that could be merged or pruned
                continue
            count = max(min(round(weight * removed[layer] * len(images)), len(finite) - 1), 0)
            # A merge takes what lies above its threshold, a prune what lies at or below it.
            cut = len(finite) - count if threshold == "merge_threshold" else count
            # Between two scores, not on one: which side that would fall to is a matter of rounding.
            value = finite[max(cut - 1, 0) : cut + 1].mean()
            thresholds[threshold][layer] = np.clip(value, 0.0, 1.0) if count else thresholds[threshold][layer]
        states = [run(state)[0] for state in states]
    return thresholds


@functools.partial(jax.jit, static_argnums=0)
def _embedded(model: ViT, params: Any, images: Any) -> Tokens:
    return _full(model.embed(params, images))


@functools.partial(jax.jit, static_argnums=0)
def _advanced(block: Any, params: Any, tokens: Tokens, knobs: Any) -> tuple[Tokens, dict[str, Any]]:
    """One block: the tokens that leave it, and its aux. Equal blocks are compiled once."""
    tokens, aux = segments.call_module(block, params, tokens, knobs)
    return _full(tokens), aux


def _full(tokens: Tokens) -> Tokens:
    """With every field set, so that the first block's tokens compile nothing of their own."""
    return Tokens(tokens.x, *token_reduction.filled(tokens))


def _candidates(decisions: Any, score: str) -> Any:
    if score == "best_similarity":
        return decisions[score]
    return np.where(np.asarray(decisions["prune_alive"]) > 0.5, decisions[score], np.inf)
