# SPDX-License-Identifier: Apache-2.0
"""Merging and pruning of tokens: scores, the threshold masker, bipartite matching, merging, compaction, the budget.

Letters: B batch, N token slots, P prefix tokens (class token, distillation token, registers: never merged or pruned),
A and B the two halves of the bipartite split, D width, L layers, N0 original tokens.

The split is by parity of the slot, over all slots: A holds the patch tokens in even slots, B those in odd ones. After
a merge the slots are ordered prefix, A, B. Sources: LTMP spec sections 2 to 6; ToMe (Bolya et al. 2023) for matching.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vtjax.ops.tokens import Tokens

_HIGHEST = jax.lax.Precision.HIGHEST
_EPS = 1e-5  # of the release's softmax while it trains
_TINY = 1e-24  # squared norm below which a feature counts as zero: its cosines are 0, not NaN


class Match(NamedTuple):
    """What every token of A found in B.

    Attributes:
      similarity: float32 `[B, A]`, cosine with the most similar token of B; -inf where the token may not merge.
      partner: int32 `[B, A]`, that token's position in B (the first of equals).
    """

    similarity: Float[Array, "B A"]
    partner: Int[Array, "B A"]


def threshold_mask(
    values: Float[Array, "*B"], threshold: Float[Array, "*T"], tau: float | Float[Array, ""], *, exact: bool = True
) -> Float[Array, "*B"]:
    """1 where `values > threshold`, else 0; the gradient is that of sigmoid((values - threshold) / tau).

    The straight-through masker of LTMP (spec section 3): gradients reach values and threshold, and vanish where a value
    is infinite. float32, exactly 0 or 1.

    Args:
      exact: decide by the comparison itself. Otherwise by `sigmoid(...) > 0.5`, as the release does, which rounds to
        0.5 for values up to 1e-8 above the threshold.
    """
    values, threshold = values.astype(jnp.float32), threshold.astype(jnp.float32)
    soft = jax.nn.sigmoid((values - threshold) / tau)
    hard = (values > threshold if exact else soft > 0.5).astype(jnp.float32)
    return soft + jax.lax.stop_gradient(hard - soft)


def unit_features(features: Float[Array, "B N H d"]) -> Float[Array, "B N d"]:
    """Mean over heads, scaled to length 1 in float32; a zero feature stays zero. Spec section 2."""
    mean = features.astype(jnp.float32).mean(2)
    return mean * jax.lax.rsqrt(jnp.maximum((mean * mean).sum(-1, keepdims=True), _TINY))


def split(x: Array, prefix: int) -> tuple[Array, Array, Array]:
    """(prefix, A, B) of an array whose second axis is the slots."""
    patches = x[:, prefix:]
    return x[:, :prefix], patches[:, prefix % 2 :: 2], patches[:, 1 - prefix % 2 :: 2]


def match(
    unit: Float[Array, "B N d"],
    prefix: int,
    alive: Float[Array, "B N"] | None = None,
    *,
    hide_dead: bool = True,
) -> Match:
    """The most similar token of B for every token of A. Spec section 2.

    Cosines are products at highest precision, and at most 1: rounding would let identical tokens exceed a threshold of
    1, which is to mean "off" (spec section 12.6).

    Args:
      unit: `unit_features` of the tokens.
      alive: dead tokens take no part; None = all live.
      hide_dead: dead tokens of either half have similarity -inf. Otherwise 0, as in the release, where a threshold of
        at least 0 keeps them from merging.
    """
    _, a, b = split(unit, prefix)
    if b.shape[1] == 0 or a.shape[1] == 0:
        shape = (unit.shape[0], a.shape[1])
        return Match(jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32))
    if alive is not None:
        _, alive_a, alive_b = split(jax.lax.stop_gradient(alive), prefix)
        if not hide_dead:
            a, b = a * alive_a[..., None], b * alive_b[..., None]
    cosine = jnp.minimum(jnp.einsum("bid,bjd->bij", a, b, precision=_HIGHEST), 1.0)
    if alive is not None and hide_dead:
        pair = (alive_a > 0.5)[:, :, None] & (alive_b > 0.5)[:, None, :]
        cosine = jnp.where(pair, cosine, -jnp.inf)
    # By index, not by max: the gradient of a tie belongs to the token that is taken.
    index = _first_largest(jax.lax.stop_gradient(cosine))
    return Match(jnp.take_along_axis(cosine, index[..., None], -1)[..., 0], index)


def _first_largest(x: Float[Array, "B A M"]) -> Int[Array, "B A"]:
    """argmax over the last axis, as two reductions that XLA vectorises on CPUs: a quarter of argmax's time there."""
    last = x.shape[-1] - 1
    places = jnp.where(x == x.max(-1, keepdims=True), jnp.arange(last + 1, dtype=jnp.int32), last)
    return places.min(-1)


def merge(
    tokens: Tokens,
    importance: Float[Array, "B N"] | None,
    found: Match,
    merged: Float[Array, "B A"],
    prefix: int,
    *,
    attached: bool = False,
) -> tuple[Tokens, Float[Array, "B N"] | None]:
    """Merges tokens of A into the tokens of B that they found. Spec section 4, steps 4 to 7.

    Features become the size-weighted mean of what was joined, sizes their sum, importance their maximum. A merged
    token keeps its slot, dead (`alive` = 1 - merged), with its old features.

    Args:
      tokens: absent size, alive and source mean ones, ones and the identity.
      importance: float32, +inf where a token may not be pruned; None where nobody needs it.
      merged: in {0, 1}, 1 only for live tokens of A that found a live token of B.
      attached: features and sizes carry the gradient of `merged`, too. Otherwise it trains through `alive` only, as in
        the release: the loss then sees what a merge takes away, not what it leaves in the partner.

    Returns:
      Tokens in the order prefix, A, B, with every field set, and their importance.
    """
    batch, slots = tokens.x.shape[:2]
    size, alive, source = filled(tokens)
    hard = jax.lax.stop_gradient(merged)
    half_b = split(size, prefix)[2].shape[1]
    weight = merged if attached else hard

    size_p, size_a, size_b = split(size, prefix)
    x_p, x_a, x_b = split(tokens.x, prefix)
    x_b, new_size_b = _joined(x_a, weight * size_a, found.partner, x_b, size_b)

    alive_p, alive_a, alive_b = split(alive, prefix)
    # By selection: a product would change the gradients. What stays alive for sure carries none.
    alive_a = jnp.where(alive_a > 0.5, 1.0 - merged, alive_a)
    alive_p = jax.lax.stop_gradient(alive_p)

    if importance is not None:
        p, a, b = split(importance, prefix)
        joins = (found.partner[..., None] == jnp.arange(half_b)) & (hard[..., None] > 0.5)  # [B, A, B]
        received = jnp.where(joins, a[..., None], -jnp.inf)
        b = jnp.maximum(b, received.max(1)) if a.shape[1] else b
        importance = jnp.concatenate([p, a, b], 1)

    half_a = size_a.shape[1]
    into = prefix + half_a + found.partner
    stays = prefix + jnp.arange(half_a, dtype=jnp.int32)
    move_p = jnp.broadcast_to(jnp.arange(prefix, dtype=jnp.int32), (batch, prefix))
    move_a = jnp.where(hard > 0.5, into, stays)
    move_b = jnp.broadcast_to(prefix + half_a + jnp.arange(half_b, dtype=jnp.int32), (batch, half_b))
    move = _interleaved(move_p, move_a, move_b, prefix)
    return (
        Tokens(
            x=jnp.concatenate([x_p, x_a, x_b], 1),
            size=jnp.concatenate([size_p, size_a, new_size_b], 1),
            alive=jnp.concatenate([alive_p, alive_a, alive_b], 1),
            source=moved(source, move),
        ),
        importance,
    )


def _joined(
    x_a: Float[Array, "B A D"],
    given: Float[Array, "B A"],
    partner: Int[Array, "B A"],
    x_b: Float[Array, "B B2 D"],
    size_b: Float[Array, "B B2"],
) -> tuple[Float[Array, "B B2 D"], Float[Array, "B B2"]]:
    """Tokens of B, and their sizes, after each token of A gave so much of its size to its partner."""
    half_b = size_b.shape[1]
    size = size_b + _summed(given[..., None], partner, half_b)[..., 0]
    weighted = x_b.astype(jnp.float32) * size_b[..., None]
    joined = weighted + _summed(x_a.astype(jnp.float32) * given[..., None], partner, half_b)
    return (joined / size[..., None]).astype(x_b.dtype), size


def _interleaved(
    lead: Int[Array, "B P"], of_a: Int[Array, "B A"], of_b: Int[Array, "B B2"], prefix: int
) -> Int[Array, "B N"]:
    """Values of prefix, A and B in the order in which these stood; the inverse of `split`."""
    slots = lead.shape[1] + of_a.shape[1] + of_b.shape[1]
    order = jnp.concatenate(split(jnp.arange(slots, dtype=jnp.int32)[None], prefix), 1)[0]
    values = jnp.concatenate([lead, of_a, of_b], 1)
    return jnp.zeros_like(values).at[:, order].set(values, unique_indices=True)


def _summed(values: Float[Array, "B A D"], partner: Int[Array, "B A"], half_b: int) -> Float[Array, "B B2 D"]:
    """Sums over the tokens of A with the same partner. On CPUs by addition, a quarter of the time of a matrix product;
    elsewhere by a product with the assignment, at highest precision: atomic additions would not be reproducible."""
    added, multiplied = functools.partial(_added, half_b), functools.partial(_multiplied, half_b)
    return jax.lax.platform_dependent(values, partner, cpu=added, default=multiplied)


def _added(half_b: int, values: Float[Array, "B A D"], partner: Int[Array, "B A"]) -> Float[Array, "B B2 D"]:
    # Image by image: a scatter whose indices name the image is reduced over all devices where images lie on several.
    zeros = jnp.zeros((half_b, values.shape[2]), values.dtype)
    return jax.vmap(lambda v, p: zeros.at[p].add(v))(values, partner)


def _multiplied(half_b: int, values: Float[Array, "B A D"], partner: Int[Array, "B A"]) -> Float[Array, "B B2 D"]:
    joins = jax.nn.one_hot(partner, half_b, dtype=values.dtype)
    return jnp.einsum("bij,bid->bjd", joins, values, precision=_HIGHEST)


def prune(tokens: Tokens, keep: Float[Array, "B N"]) -> Tokens:
    """Live tokens with `keep` 0 die where they stand; dead ones stay dead. Spec section 4, step 8."""
    _, alive, source = filled(tokens)
    alive = jnp.where(alive > 0.5, keep, alive)
    return tokens.replace(alive=alive, source=moved(source, _where_alive(alive)))


def compact(
    tokens: Tokens, beside: Float[Array, "B N *D"] | None = None
) -> tuple[Tokens, Float[Array, "B N *D"] | None]:
    """Live tokens first, in their order; then the dead ones. What stands beside the tokens moves with them. Spec
    section 11.2."""
    size, alive, source = filled(tokens)
    live = jax.lax.stop_gradient(alive) > 0.5
    count = live.sum(1, keepdims=True)
    place = jnp.where(live, jnp.cumsum(live, 1) - 1, count + jnp.cumsum(~live, 1) - 1).astype(jnp.int32)
    order = _inverse(place)

    def take(x: Array) -> Array:
        return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), 1)

    out = Tokens(
        x=take(tokens.x),
        size=None if tokens.size is None else take(size),
        alive=take(alive),
        source=moved(source, place),
    )
    return out, None if beside is None else take(beside)


def filled(tokens: Tokens) -> tuple[Float[Array, "B N"], Float[Array, "B N"], Int[Array, "B N0"]]:
    """size, alive and source, with what absent ones stand for."""
    shape = tokens.x.shape[:2]
    ones = jnp.ones(shape, jnp.float32)
    slots = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    return (
        ones if tokens.size is None else tokens.size,
        ones if tokens.alive is None else tokens.alive,
        slots if tokens.source is None else tokens.source,
    )


def moved(source: Int[Array, "B N0"], place: Int[Array, "B N"]) -> Int[Array, "B N0"]:
    """`source` after slot i has moved to `place[i]` (-1: it died)."""
    return jnp.where(source < 0, -1, jnp.take_along_axis(place, jnp.maximum(source, 0), 1))


def _where_alive(alive: Float[Array, "B N"]) -> Int[Array, "B N"]:
    slots = jnp.arange(alive.shape[1], dtype=jnp.int32)
    return jnp.where(alive > 0.5, slots, -1)


def protect(
    importance: Float[Array, "B N"], prefix: int, alive: Float[Array, "B N"] | None, *, patch: bool = False
) -> Float[Array, "B N"]:
    """float32 importance with +inf for what may never be pruned: the prefix; without one, or where a `patch` has to
    stay, the most important patch, too, so that no image loses all that is pooled."""
    importance = importance.astype(jnp.float32)
    slots = jnp.arange(importance.shape[1])
    protected = slots < prefix
    if patch or not prefix:
        known = jnp.where(protected, -jnp.inf, importance)
        known = known if alive is None else jnp.where(alive > 0.5, known, -jnp.inf)
        protected = protected | (slots == jax.lax.stop_gradient(known).argmax(1, keepdims=True))
    return jnp.where(protected, jnp.inf, importance)


def budget(
    fractions: Float[Array, "L ..."], tokens: int, costs: Float[Array, "L 3"]
) -> tuple[Float[Array, "*B"], Float[Array, "L ..."]]:
    """MACs of the blocks over those of the dense model, `r` of spec section 6 with every block's own widths.

    Args:
      fractions: live tokens after each block over `tokens`; one number per layer, or per layer and image.
      tokens: N of the dense model.
      costs: per layer, MACs of attention's projections per token, of attention per pair of tokens, of the MLP per
        token. For equal blocks of width D: 4 D^2, 2 D, 8 D^2.

    Returns:
      r, and its part of every layer, `[L, ...]`.
    """
    costs = costs.reshape(*costs.shape, *(1,) * (fractions.ndim - 1))
    after = fractions * tokens
    before = jnp.concatenate([jnp.full_like(after[:1], tokens), after[:-1]])
    spent = costs[:, 0] * before + costs[:, 1] * before**2 + costs[:, 2] * after
    dense = (costs[:, 0] * tokens + costs[:, 1] * tokens**2 + costs[:, 2] * tokens).sum(0)
    share = spent / dense
    return share.sum(0), share


def unmerge(tokens: Tokens, grid: tuple[int, int], prefix: int) -> tuple[Float[Array, "B h w D"], Bool[Array, "B h w"]]:
    """The patch grid that was reduced, for dense heads: every patch has the features of the token that holds it.

    Args:
      tokens: with `source` where something was reduced.
      grid: rows and columns of patches, h x w = N0 - prefix.
      prefix: leading tokens, which are no patches.

    Returns:
      Features, and False where the patch was pruned (its features are 0 there).

    Raises:
      ValueError: a grid that is not the patches'.
    """
    source = filled(tokens)[2][:, prefix:]
    if source.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"grid must hold {source.shape[1]} patches, found {grid[0]} x {grid[1]}")
    valid = source >= 0
    x = jnp.take_along_axis(tokens.x, jnp.maximum(source, 0)[..., None], 1)
    x = jnp.where(valid[..., None], x, 0)
    return x.reshape(len(x), *grid, x.shape[-1]), valid.reshape(len(x), *grid)


def merge_top(
    tokens: Tokens,
    importance: Float[Array, "B N"] | None,
    unit: Float[Array, "B N d"],
    count: int,
    prefix: int,
    *,
    by_similarity: bool,
) -> tuple[Tokens, Float[Array, "B M"] | None]:
    """Merges the `count` most similar pairs and removes what was merged: ToMe's step, at a fixed rate.

    Args:
      count: at most half of the patch tokens, else it is lowered to that.
      by_similarity: the unmerged tokens of A stand in descending order of their similarity, else in their own order.

    Returns:
      Tokens `[B, N - count, ...]` in the order prefix, unmerged A, B, all live; and their importance.
    """
    found = match(unit, prefix)
    batch, half_a = found.similarity.shape
    count = min(count, (unit.shape[1] - prefix) // 2)
    rank = _ranks(found.similarity)
    chosen = rank < count
    # Those that merge in descending order; then the others, in that order or in their own.
    place = rank if by_similarity else jnp.where(chosen, rank, count + jnp.cumsum(~chosen, 1) - 1)
    order = _inverse(place)
    partner = jnp.take_along_axis(found.partner, order[:, :count], 1)

    size, _, source = filled(tokens)
    size_p, size_a, size_b = split(size, prefix)
    x_p, x_a, x_b = split(tokens.x, prefix)
    size_a = jnp.take_along_axis(size_a, order, 1)
    x_a = jnp.take_along_axis(x_a, order[..., None], 1)
    x_b, size_b = _joined(x_a[:, :count], size_a[:, :count], partner, x_b, size_b)
    if importance is not None:
        p, a, b = split(importance, prefix)
        a = jnp.take_along_axis(a, order, 1)
        b = jax.vmap(lambda b, p, a: b.at[p].max(a))(b, partner, a[:, :count])
        importance = jnp.concatenate([p, a[:, count:], b], 1)

    first_b = prefix + half_a - count
    into = jnp.where(chosen, first_b + found.partner, prefix + place - count)
    slot = jnp.arange(first_b + x_b.shape[1], dtype=jnp.int32)
    lead, tail = (jnp.broadcast_to(s, (batch, len(s))) for s in (slot[:prefix], slot[first_b:]))
    return (
        Tokens(
            x=jnp.concatenate([x_p, x_a[:, count:], x_b], 1),
            size=jnp.concatenate([size_p, size_a[:, count:], size_b], 1),
            source=moved(source, _interleaved(lead, into.astype(jnp.int32), tail, prefix)),
        ),
        importance,
    )


def prune_least(
    tokens: Tokens, importance: Float[Array, "B N"], count: int, prefix: int
) -> tuple[Tokens, Float[Array, "B M"]]:
    """Removes the `count` least important tokens, at a fixed rate; what stays is sorted by descending importance.

    Args:
      importance: of `protect`.
      count: at most half of the patch tokens, else it is lowered to that.
    """
    count = min(count, (tokens.x.shape[1] - prefix) // 2)
    order = _inverse(_ranks(importance))[:, : tokens.x.shape[1] - count]
    out, kept = _pick(tokens, importance, order)
    assert kept is not None
    return out, kept


def _ranks(scores: Float[Array, "B N"]) -> Int[Array, "B N"]:
    """Places in a stable descending order, by counting: a third of a sort's time on CPUs for hundreds of tokens."""
    slot = jnp.arange(scores.shape[1])
    mine, other = scores[:, :, None], scores[:, None, :]
    before = (other > mine) | ((other == mine) & (slot[None, :] < slot[:, None]))
    return before.sum(2, dtype=jnp.int32)


def _inverse(place: Int[Array, "B N"]) -> Int[Array, "B N"]:
    """The inverse of a permutation: which entry stands where. It needs no sort."""
    slots = jnp.broadcast_to(jnp.arange(place.shape[1], dtype=jnp.int32), place.shape)
    return jax.vmap(lambda p, s: jnp.zeros_like(s).at[p].set(s, unique_indices=True))(place, slots)


def _pick(
    tokens: Tokens, importance: Float[Array, "B N"] | None, order: Int[Array, "B M"]
) -> tuple[Tokens, Float[Array, "B M"] | None]:
    """The slots `order`, all live; the others are gone, and so is what only they held."""
    size, _, source = filled(tokens)
    slot = jnp.arange(order.shape[1], dtype=jnp.int32)
    place = jax.vmap(lambda o: jnp.full(size.shape[1], -1, jnp.int32).at[o].set(slot))(order)
    out = Tokens(
        x=jnp.take_along_axis(tokens.x, order[..., None], 1),
        size=None if tokens.size is None else jnp.take_along_axis(size, order, 1),
        source=moved(source, place),
    )
    return out, None if importance is None else jnp.take_along_axis(importance, order, 1)


def faithful_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    *,
    size: Float[Array, "B N"] | None = None,
    alive: Float[Array, "B N"] | None = None,
    want: tuple[str, ...] = (),
    training: bool = False,
) -> tuple[Float[Array, "B N H D"], dict[str, Array]]:
    """The release's masked attention, as `ops.attention.attention` otherwise. Spec section 2.

    The row maximum is over dead keys, too; while training 1e-5 is spread over all keys; importance is the mean over
    all rows, dead ones included.
    """
    precision = _HIGHEST
    scores = jnp.einsum("bnhd,bmhd->bhnm", q * q.shape[-1] ** -0.5, k, precision=precision)
    scores = scores.astype(jnp.float32)
    if size is not None:
        scores = scores + jnp.log(size)[:, None, None, :]
    share = masked_softmax(scores, alive, _EPS if training else 0.0)
    y = jnp.einsum("bhnm,bmhd->bnhd", share.astype(v.dtype), v, precision=precision)
    aux = {"importance": share.mean((1, 2))} if "importance" in want else {}
    if "lse" in want:
        raise ValueError("the faithful attention knows no lse")
    return y, aux


def masked_softmax(
    scores: Float[Array, "B H N M"], alive: Float[Array, "B M"] | None, eps: float
) -> Float[Array, "B H N M"]:
    """exp(scores - max) x alive, normalised; with `eps` > 0 it is spread over all keys. Spec section 2."""
    weight = jnp.exp(scores - scores.max(-1, keepdims=True))
    if alive is not None:
        weight = weight * alive[:, None, None, :]
    total = weight.sum(-1, keepdims=True)
    if eps:
        return (weight + eps / scores.shape[-1]) / (total + eps)
    return weight / total
