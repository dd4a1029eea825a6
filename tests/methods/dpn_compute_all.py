# SPDX-License-Identifier: Apache-2.0
"""The compute-all oracle of DPN (spec section 8.3): every stage makes the poolings of all experts out of all grids that
can be there, pads them, and selects; tokens really move, and nothing of `vtjax.methods` or `vtjax.ops` is called but
the decoder's plain blocks. Differentiable.

Letters: B batch, S slots, D width, K experts, M stages, V vocabulary.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vtjax.models import segments
from vtjax.models.vlm import VLM
from vtjax.ops.tokens import Tokens

WINDOWS = ((1, 1), (1, 2), (2, 2))


class Found(NamedTuple):
    """Logits `[B, S, V]` with the text at the front, `p [B, M, K]`, experts `[B, M]`, and the tokens of the image that
    are left `[B]`."""

    logits: Any
    p: Any
    choice: Any
    left: Any


def compute_all(spec: Any, at: tuple[int, ...], params: Any, given: Any, choice: Any, gate: str, pool: str) -> Found:
    """Args:
    given: `ids`, `mask` (numpy) and images of texts with one image and one router token each.
    choice: experts `[B, M]`; None = the likeliest.
    """
    (ids, mask, images), plain = given, VLM(spec.unreduced())
    decoder = {name: tree for name, tree in params["decoder"].items() if name != "dpn"}
    order = np.argsort(mask == 0, axis=1, kind="stable")
    front, whole = np.take_along_axis(ids, order, 1), spec.visual_tokens
    start, asks = (front == spec.image_token).argmax(1), (front == spec.router_token).argmax(1) - whole
    entered, _ = plain.enter(params, ids, images)
    x = jnp.take_along_axis(entered["embeddings"], order[:, :, None], axis=1)
    rows, shapes, state = np.arange(len(ids)), [spec.grid], jnp.zeros(len(ids), int)
    told = []
    for stage, layers in enumerate(itertools.starmap(range, itertools.pairwise((0, *at, spec.decoder.depth)))):
        # What fills a row lies behind all that is real: causality hides it.
        x = segments.run(plain.lm.blocks(), decoder, Tokens(x), layers=layers)[0].x
        left = jnp.asarray([r * c for r, c in shapes])[state]
        if stage == len(at):
            break
        p = probabilities(params["decoder"]["dpn"][f"block_{layers[-1]:02d}"]["router"], x[rows, asks + left])
        k = p.argmax(-1) if choice is None else choice[:, stage]
        taken = p[rows, k]
        scale = {"prob": taken, "st": taken / jax.lax.stop_gradient(taken), "off": jnp.ones_like(taken)}[gate]
        after = sorted({(r // h, c // w) for (r, c), (h, w) in itertools.product(shapes, WINDOWS)})
        inside = jnp.take_along_axis(x, (start[:, None] + np.arange(whole))[:, :, None], axis=1)
        every, leads = [], []
        for (r, c), (h, w) in itertools.product(shapes, WINDOWS):
            every.append(pooled(inside[:, : r * c], (r, c), (h, w), pool))
            leads.append(after.index((r // h, c // w)))
        pick = len(WINDOWS) * state + k
        made = jnp.stack([jnp.pad(a, ((0, 0), (0, whole - a.shape[1]), (0, 0))) for a in every], 1)[rows, pick]
        now = jnp.asarray([r * c for r, c in after])[jnp.asarray(leads)[pick]]
        x = replaced(x, start, left, scale[:, None, None] * made, now)
        state, shapes = jnp.asarray(leads)[pick], after
        told.append((p, k))
    logits = plain.lm.logits(params["decoder"], x)
    return Found(logits, *(jnp.stack(a, 1) for a in zip(*told, strict=True)), left)


def probabilities(router: Any, state: Any) -> Any:
    """softmax(W2 gelu(W1 LayerNorm(x)) / 10), spec section 2.5."""
    x = (state - state.mean(-1, keepdims=True)) / jnp.sqrt(state.var(-1, keepdims=True) + 1e-5)
    x = x * router["norm"]["scale"] + router["norm"]["bias"]
    x = jnp.matmul(x, router["hidden"]["kernel"], precision="highest")
    x = x * jax.scipy.stats.norm.cdf(x)
    return jax.nn.softmax(jnp.matmul(x, router["score"]["kernel"], precision="highest") / 10)


def pooled(cells: Any, grid: tuple[int, int], window: tuple[int, int], pool: str) -> Any:
    """`[B, n', D]` of `[B, n, D]`, row by row."""
    (r, c), (h, w) = grid, window
    cells = cells.reshape(len(cells), r // h, h, c // w, w, -1)
    made = cells.max((2, 4)) if pool == "max" else cells.mean((2, 4))
    return made.reshape(len(cells), (r // h) * (c // w), -1)


def replaced(x: Any, start: Any, left: Any, made: Any, now: Any) -> Any:
    """Rows in which `now` tokens stand in place of `left` ones from `start`, and what is behind them has moved up."""
    slot, start, left, now = np.arange(x.shape[1])[None], start[:, None], left[:, None], now[:, None]
    behind = jnp.minimum(slot + left - now, x.shape[1] - 1)
    at = jnp.where(slot < start, slot, jnp.where(slot < start + now, x.shape[1] + slot - start, behind))
    return jnp.take_along_axis(jnp.concatenate([x, made], axis=1), at[:, :, None], axis=1)
