# SPDX-License-Identifier: Apache-2.0
"""DPN where pooled tokens are gone: prefill in which time and cache shrink with them (spec section 8.4).

    dpn_switch.Switch(model, ...)  one compiled program for one question: the length decides which body runs
    Staged(model, ...)             a batch: after every stage the host puts samples of one length together

Both compute what the masked model (`dpn.vlm`) computes at inference, up to rounding. Samples have one image each; text
goes to the front of its row, as [prefix | grid | rest | filling].
Letters: B batch, S slots, T slots of text, n visual tokens, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vtjax.errors import InputError
from vtjax.methods import dpn
from vtjax.methods.dpn import Dpn
from vtjax.models import cache as cache_lib
from vtjax.models import generate as generate_lib
from vtjax.models import segments
from vtjax.models.cache import Cache
from vtjax.models.segments import block_name
from vtjax.models.vlm import VLM
from vtjax.ops.pooling_experts import WINDOWS
from vtjax.ops.tokens import Tokens

ROUND = 16  # slots of text are a multiple of it, so that few lengths are compiled

Grid = tuple[int, int]


class Rows(NamedTuple):
    """Samples of one length, text at the front.

    Attributes:
      x: `[b, T + n, D]`.
      text: live slots of text.
      start: first slot of the grid.
      asks: which slots of text behind the grid routers read.
    """

    x: Float[Array, "b S D"]
    text: Int[Array, " b"]
    start: Int[Array, " b"]
    asks: Bool[Array, "b T"]


class Prefilled(NamedTuple):
    """What a prefill leaves.

    Attributes:
      logits: after the last token of every sample, float32.
      choice: experts taken.
      cache: to go on from; None where it was not wanted.
    """

    logits: Float[Array, "B V"]
    choice: Int[Array | np.ndarray, "B M"]
    cache: Cache | None


def entered(model: VLM, params: Any, ids: Any, images: Any, mask: Any = None) -> Rows:
    """The tokens that enter the decoder, moved to the front. Jitted; `ids` and `mask` are known on the host.

    Raises:
      InputError: a sample with other than one image, without a router token, or with one before its image (where
        routers read it); a tower that drops tokens; a bridge of cross-attention.
    """
    if model.tower_reducers:
        raise InputError("deployment takes a tower that keeps its tokens, found one with reducers")
    spec, ids = model.spec, np.asarray(ids)
    if spec.bridge.cross is not None:
        raise InputError("deployment takes visual tokens that stand in the text, found a bridge of cross-attention")
    live = np.ones(ids.shape, bool) if mask is None else np.asarray(mask) > 0
    reads = {getattr(reducer, "reads", "") for _, reducer in model.reducers}
    place = _layout(spec, ids, live, reads == {"last_prompt"})
    x = _moved(model, params, jnp.asarray(ids), images, jnp.asarray(place.order))
    return Rows(x, *(jnp.asarray(a) for a in (place.text, place.start, place.asks)))


@functools.partial(jax.jit, static_argnums=0)
def _moved(model: VLM, params: Any, ids: Array, images: Any, order: Array) -> Float[Array, "B S D"]:
    known, _ = model.enter(params, ids, images)
    return jnp.take_along_axis(known["embeddings"], order[:, :, None], axis=1)


class _Layout(NamedTuple):
    order: np.ndarray
    text: np.ndarray
    start: np.ndarray
    asks: np.ndarray


def _layout(spec: Any, ids: np.ndarray, live: np.ndarray, reads_last: bool) -> _Layout:
    """Where everything goes; `reads_last`: routers read the last token, not the router token."""
    n = spec.visual_tokens
    image, router = (ids == spec.image_token) & live, (ids == spec.router_token) & live
    for row in range(len(ids)):
        if image[row].sum() != n:
            raise InputError(f"deployment takes one image per sample, {n} placeholders, found {image[row].sum()}")
        if not reads_last and (not router[row].any() or router[row].argmax() < image[row].argmax()):
            raise InputError(f"every sample needs a router token behind its image, found none in sample {row}")
        if np.diff(np.flatnonzero(image[row][live[row]])).max(initial=1) != 1:
            raise InputError(f"the placeholders of an image must follow each other, found a gap in sample {row}")
        if live[row][::-1].argmax() == image[row][::-1].argmax():
            raise InputError(f"every sample needs text behind its image, found none in sample {row}")
    text = live.sum(1) - n
    slots = -(-int(text.max()) // ROUND) * ROUND
    order = np.argsort(~live, axis=1, kind="stable")
    order = np.pad(order, ((0, 0), (0, max(slots + n - order.shape[1], 0))))[:, : slots + n]
    front = np.take_along_axis(image, order, 1)
    start = front.argmax(1).astype(np.int32)
    asks = np.zeros((len(ids), slots), bool)
    if reads_last:
        asks[np.arange(len(ids)), text - 1 - start] = True
        return _Layout(order, text.astype(np.int32), start, asks)
    for row in range(len(ids)):
        behind = np.flatnonzero(np.take(router[row], order[row]))
        asks[row, behind[behind < text[row] + n] - start[row] - n] = True
    return _Layout(order, text.astype(np.int32), start, asks)


def run_layers(
    model: VLM, params: Any, rows: Rows, n: int, layers: range, keep: bool
) -> tuple[Rows, dict[str, tuple[Array, Array]]]:
    """A segment over rows of one length; with `keep` the keys and values of its layers, too."""
    lm = dataclasses.replace(model.lm, reducers=())
    slot = jnp.arange(rows.x.shape[1])[None]
    tokens = Tokens(rows.x, alive=(slot < rows.text[:, None] + n).astype(jnp.float32))
    want = ("keys", "values") if keep else ()
    decoder = jax.tree.map(jnp.asarray, params["decoder"])
    tokens, aux = segments.run(
        lm.blocks(), decoder, tokens, layers=layers, want=want, remat="none", constrain=model.constrain
    )
    held = {
        block_name(layer): (found["keys"], found["values"]) for layer, found in zip(layers, aux, strict=True) if found
    }
    return rows._replace(x=tokens.x), held


def route(
    reducer: Dpn, held: Mapping[str, Any], rows: Rows, n: int | Array, given: Array | None = None
) -> tuple[Array, Array]:
    """Experts of the samples, which have n visual tokens now, and what their tokens are multiplied by; `held`: of the
    stage (`stage_knobs`); `given`: decided elsewhere."""
    slot = rows.start[:, None] + n + jnp.arange(rows.asks.shape[1])
    states = jnp.take_along_axis(rows.x, jnp.minimum(slot, rows.x.shape[1] - 1)[:, :, None], axis=1)
    weight = rows.asks / rows.asks.sum(1, keepdims=True)
    exact = jax.lax.Precision.HIGHEST
    state = jnp.einsum("bt,btd->bd", weight, states.astype(jnp.float32), precision=exact)
    knobs = dict(held) if given is None else {**held, "choice": given}
    _, choice, scale = reducer.decide(state, jnp.full(len(state), n), jnp.ones(len(state), bool), knobs)
    return choice, scale


def stage_knobs(params: Any, layer: int) -> dict[str, Any]:
    """What the stage after a layer has of the method's parameters."""
    own = params["decoder"][dpn.NAME]
    return {"relax": own["relax"], **own[block_name(layer)]}


def pooled(reducer: Dpn, held: Mapping[str, Any], rows: Rows, scale: Array, grid: Grid, expert: int) -> Rows:
    """Rows whose grid has gone through one expert."""
    (h, w), (rows_, columns) = WINDOWS[expert], grid
    n, b = rows_ * columns, len(rows.x)
    inside = rows.start[:, None] + jnp.arange(n)
    cells = jnp.take_along_axis(rows.x, inside[:, :, None], axis=1).reshape(b, rows_ // h, h, columns // w, w, -1)
    if reducer.pool == "dwconv" and h * w > 1:
        filters = held["filters"][f"{h}x{w}"].reshape(h, w, -1).astype(cells.dtype)
        made = (cells * filters[None, None, :, None]).sum((2, 4))
    else:
        made = cells.max((2, 4)) if reducer.pool == "max" else cells.mean((2, 4), dtype=cells.dtype)
    left = n // (h * w)
    made = dpn.scaled(made.reshape(b, left, -1), scale)
    slot, start = jnp.arange(rows.x.shape[1] - n + left)[None], rows.start[:, None]
    both = jnp.concatenate([rows.x, made], axis=1)
    at = jnp.where(slot < start, slot, jnp.where(slot < start + left, rows.x.shape[1] + slot - start, slot + n - left))
    return rows._replace(x=jnp.take_along_axis(both, at[:, :, None], axis=1))


def finish(model: VLM, params: Any, rows: Rows, n: int | Array) -> Float[Array, "b V"]:
    """Logits after the last token of every sample."""
    last = jnp.take_along_axis(rows.x, (rows.text + n - 1)[:, None, None], axis=1)[:, 0]
    return model.lm.logits(params["decoder"], last)


def grids(grid: Grid, stages: int) -> list[list[Grid]]:
    """Grids that can be there in each segment, from the largest (spec section 2.4)."""
    found = [[grid]]
    for _ in range(stages):
        after = {(r // h, c // w) for r, c in found[-1] for h, w in WINDOWS}
        found.append(sorted(after, key=lambda g: (-g[0] * g[1], g)))
    return found


class Staged:
    """A batch, stage by stage: `staged(params, rows) -> Prefilled`.

    Programs are compiled per (segment, length, batch), and poolings per (stage, grid, expert, batch), where batches are
    filled up to a power of two; one small array comes to the host per stage and length. Every segment's cache is as
    long as its longest sample.

    Args:
      model: of `dpn.vlm`.
      keep: room for this many new tokens in a cache; None = no cache.
    """

    def __init__(self, model: VLM, keep: int | None = None):
        self.model, self.keep = model, keep
        spec = model.spec
        self._made: list[Any] = [dict(model.reducers)[layer] for layer, _ in dpn.reducers(spec)]
        self._layers = [layer for layer, _ in dpn.reducers(spec)]
        self._segments = dpn.stretches(spec)
        self._run = jax.jit(self._segment, static_argnums=(2, 3))
        self._pool = jax.jit(self._pooled, static_argnums=(2, 3, 4))
        self._end = jax.jit(lambda params, rows, n: finish(model, params, rows, n), static_argnums=2)

    def _segment(self, params: Any, rows: Rows, stage: int, n: int, given: Any = None) -> Any:
        rows, held = run_layers(self.model, params, rows, n, self._segments[stage], self.keep is not None)
        if stage == len(self._made):
            return rows, held, None, None
        own = stage_knobs(params, self._layers[stage])
        return rows, held, *route(self._made[stage], own, rows, n, given)

    def _pooled(self, params: Any, given: Any, stage: int, grid: Grid, expert: int) -> Rows:
        rows, scale, index = given
        own = stage_knobs(params, self._layers[stage])
        part = jax.tree.map(lambda a: a[index], rows)
        return pooled(self._made[stage], own, part, scale[index], grid, expert)

    def __call__(self, params: Any, rows: Rows, given: Int[np.ndarray, "B M"] | None = None) -> Prefilled:
        """Prefills; `given`: experts that were decided elsewhere."""
        spec, total = self.model.spec, len(rows.x)
        grid_of = np.array([spec.grid] * total)
        choice = np.zeros((total, len(self._made)), np.int32)
        groups = [(np.arange(total), _filled(rows, total))]
        kept: list[list[Any]] = []
        logits: Any = None
        for stage in range(len(self._segments)):
            held_here, waiting = [], []
            for members, group in groups:
                n = int(grid_of[members[0]].prod())
                told = None if given is None or stage == len(self._made) else given[_power(members), stage]
                group, held, experts, scale = self._run(params, group, stage, n, told)
                if self.keep is not None:
                    held_here.append((members, group.x.shape[1], group.text + n, held))
                waiting.append((members, group, experts, scale, n))
            kept.append(held_here)
            if stage == len(self._made):
                found = [(members, self._end(params, group, n)[: len(members)]) for members, group, _, _, n in waiting]
                logits = _put_back(found, total)
                break
            parts: dict[int, list[tuple[np.ndarray, Rows]]] = {}
            for members, group, experts, scale, _ in waiting:
                taken = np.asarray(experts)[: len(members)]
                choice[members, stage] = taken
                kinds = {(tuple(g), int(k)) for g, k in zip(grid_of[members].tolist(), taken, strict=True)}
                for grid, expert in sorted(kinds):
                    own = np.flatnonzero((grid_of[members] == grid).all(1) & (taken == expert))
                    index, count = _power(own), len(own)
                    made = self._pool(params, (group, scale, index), stage, grid, expert)
                    h, w = WINDOWS[expert]
                    left = grid[0] * grid[1] // (h * w)
                    grid_of[members[own]] = grid[0] // h, grid[1] // w
                    parts.setdefault(left, []).append((members[own], jax.tree.map(lambda a, c=count: a[:c], made)))
            groups = []
            for _, found in sorted(parts.items()):
                members = np.concatenate([m for m, _ in found])
                joined = (
                    found[0][1]
                    if len(found) == 1
                    else jax.tree.map(lambda *a: jnp.concatenate(a), *(r for _, r in found))
                )
                groups.append((members, _filled(joined, len(members))))
        cache = None if self.keep is None else self._cache(kept, total)
        return Prefilled(logits, choice, cache)

    def _cache(self, kept: Sequence[Sequence[Any]], total: int) -> Cache:
        """Every segment's own keys and values, as long as its longest sample, and room behind them."""
        assert self.keep is not None
        keys: dict[str, Array] = {}
        values: dict[str, Array] = {}
        stretches = []
        for held_here in kept:
            slots = max(rows_slots for _, rows_slots, _, _ in held_here)
            length = np.zeros(total, np.int32)
            for members, _, tokens, _ in held_here:
                length[members] = np.asarray(tokens)[: len(members)]
            for name in held_here[0][3]:
                for number, target in ((0, keys), (1, values)):
                    found = [
                        (
                            members,
                            jnp.pad(
                                held[name][number][: len(members)],
                                ((0, 0), (0, slots + self.keep - held[name][number].shape[1]), (0, 0), (0, 0)),
                            ),
                        )
                        for members, _, _, held in held_here
                    ]
                    target[name] = _put_back(found, total).swapaxes(1, 2)
            alive = np.arange(slots + self.keep)[None] < length[:, None]
            stretches.append(cache_lib.Stretch(jnp.asarray(alive), jnp.int32(slots), jnp.asarray(length)))
        return Cache(keys, values, tuple(stretches), {})

    def generate(self, params: Any, rows: Rows, new_tokens: int) -> tuple[Array, Array, np.ndarray]:
        """Continues every sample greedily over the short caches: tokens, counts (as `models.generate.generate`), and
        the experts.

        Raises:
          InputError: the cache has no room for so many tokens.
        """
        check_room("Staged", self.keep, new_tokens)
        done = self(params, rows)
        assert done.cache is not None
        model = self.model.lm
        tokens, count = generate_lib.go_on(
            model, self.model.decoder_params(params), done.logits, done.cache, new_tokens
        )
        return tokens, count, np.asarray(done.choice)


def check_room(form: str, keep: int | None, new_tokens: int) -> None:
    """Raises InputError for a cache that has no room for so many tokens."""
    if keep is None or keep < new_tokens - 1:
        raise InputError(f"{form} needs keep={new_tokens - 1} or more for {new_tokens} new tokens, found {keep}")


def cache_bytes(cache: Cache) -> int:
    """Memory of keys and values."""
    return sum(a.size * a.dtype.itemsize for a in (*cache.keys.values(), *cache.values.values()))


def _power(index: np.ndarray) -> np.ndarray:
    """Rows of a batch, the first repeated up to a power of two."""
    size = 1 << (len(index) - 1).bit_length()
    return np.concatenate([index, np.repeat(index[:1], size - len(index))])


def _filled(rows: Rows, count: int) -> Rows:
    index = _power(np.arange(count))
    return rows if len(index) == len(rows.x) else jax.tree.map(lambda a: a[index], rows)


def _put_back(found: Sequence[tuple[np.ndarray, Array]], total: int) -> Array:
    """Rows of several groups in the order of the samples."""
    order = np.argsort(np.concatenate([members for members, _ in found]))
    joined = found[0][1] if len(found) == 1 else jnp.concatenate([values for _, values in found])
    assert len(order) == total
    return joined[order]
