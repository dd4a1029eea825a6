# SPDX-License-Identifier: Apache-2.0
"""DPN for one question at a time: one compiled prefill in which the length decides at every stage which body runs, and
answers over caches that are as short as the path (spec section 8.4).

Letters: S slots, T slots of text, M stages, V vocabulary, C slots of a segment's cache, K key and value heads, d head
width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from vtjax.errors import InputError
from vtjax.methods import dpn
from vtjax.methods.dpn import Dpn
from vtjax.methods.dpn_deploy import (
    Grid,
    Prefilled,
    Rows,
    check_room,
    finish,
    grids,
    pooled,
    route,
    run_layers,
    stage_knobs,
)
from vtjax.models import cache as cache_lib
from vtjax.models import generate as generate_lib
from vtjax.models.cache import Cache
from vtjax.models.segments import block_name
from vtjax.models.vlm import VLM
from vtjax.ops.pooling_experts import AREAS, WINDOWS


@dataclasses.dataclass(frozen=True)
class Switch:
    """One program for one question, `switch(params, rows) -> Prefilled`; jit it, or call `prefill` or `generate`.

    Every body slices its own static length, and what leaves it is padded to the longest; so is the cache that the
    program returns, which `prefill` then cuts to what the path left. It is not to be vmapped: a switch then runs all
    its bodies.

    Attributes:
      model: of `dpn.vlm`, whose spec brings the routers.
      keep: room for this many new tokens in a cache; None = no cache.

    Raises:
      InputError: more than one question.
    """

    model: VLM
    keep: int | None = None

    def __call__(self, params: Any, rows: Rows) -> Prefilled:
        if len(rows.x) != 1:
            raise InputError(f"Switch takes one question at a time (Staged takes several), found {len(rows.x)}")
        spec = self.model.spec
        made, segments = dpn.reducers(spec), dpn.stretches(spec)
        known, given = grids(spec.grid, len(made)), dict(self.model.reducers)
        slots, choices, lengths = rows.asks.shape[1], [], []
        kept: dict[str, tuple[Array, Array]] = {}
        # Number of the grid among those of its segment.
        state: Any = jnp.int32(0)
        for stage, layers in enumerate(segments):
            here = known[stage]
            counts = sorted({r * c for r, c in here}, reverse=True)
            length = jnp.asarray([counts.index(r * c) for r, c in here])[state]
            n = jnp.asarray([r * c for r, c in here])[state]
            bodies = [functools.partial(self._body, params, rows, layers, count) for count in counts]
            x, held = jax.lax.switch(length, bodies, rows.x) if len(bodies) > 1 else bodies[0](rows.x)
            rows = rows._replace(x=x)
            kept |= held
            lengths.append(rows.text + n)
            if stage == len(made):
                break
            layer = made[stage][0]
            reducer: Any = given[layer]
            own = stage_knobs(params, layer)
            # `n` is traced here: the slots behind the grid are found by it.
            choice, scale = route(reducer, own, rows, n)
            choices.append(choice)
            after = known[stage + 1]
            most = slots + after[0][0] * after[0][1]
            pools, next_ = [], []
            for grid in here:
                for expert, (h, w) in enumerate(WINDOWS):
                    pools.append(functools.partial(self._pool, reducer, own, grid, expert, slots, most))
                    next_.append(after.index((grid[0] // h, grid[1] // w)))
            number = state * len(WINDOWS) + choice[0]
            rows = rows._replace(x=jax.lax.switch(number, pools, rows, scale))
            state = jnp.asarray(next_)[number]
        logits = finish(self.model, params, rows, jnp.asarray([r * c for r, c in known[-1]])[state])
        longest = [slots + here[0][0] * here[0][1] for here in known]
        cache = None if self.keep is None else self._cache(kept, lengths, longest)
        return Prefilled(logits, jnp.stack(choices, axis=1), cache)

    def prefill(self, params: Any, rows: Rows) -> Prefilled:
        """The program, jitted, and its caches cut on the host to the tokens that the path left and their room."""
        done = _run(self, params, rows)
        if done.cache is None:
            return done._replace(choice=np.asarray(done.choice))
        assert self.keep is not None
        choice = np.asarray(done.choice)
        areas = np.array(AREAS)
        left = self.model.spec.visual_tokens // np.cumprod([1, *areas[choice[0]]])
        return done._replace(choice=choice, cache=self._cut(done.cache, rows.asks.shape[1] + self.keep + left))

    def generate(self, params: Any, rows: Rows, new_tokens: int) -> tuple[Array, Array, np.ndarray]:
        """Continues the question greedily: tokens, counts (as `models.generate.generate`), and the experts. One program
        for all paths prefills; the one that goes on is compiled per path, as short as its caches.

        Raises:
          InputError: more than one question, or a cache without room for so many tokens.
        """
        check_room("Switch", self.keep, new_tokens)
        done = self.prefill(params, rows)
        assert done.cache is not None
        model = self.model
        tokens, count = generate_lib.go_on(model.lm, model.decoder_params(params), done.logits, done.cache, new_tokens)
        return tokens, count, np.asarray(done.choice)

    def _body(self, params: Any, rows: Rows, layers: range, count: int, x: Array) -> tuple[Array, Any]:
        """A segment at one length."""
        slots = rows.asks.shape[1] + count
        out, held = run_layers(
            self.model, params, rows._replace(x=x[:, :slots]), count, layers, keep=self.keep is not None
        )
        fill = x.shape[1] - slots
        return jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, fill), *((0, 0),) * (a.ndim - 2))), (out.x, held))

    @staticmethod
    def _pool(
        reducer: Dpn, held: Any, grid: Grid, expert: int, slots: int, most: int, rows: Rows, scale: Array
    ) -> Array:
        cut = rows._replace(x=rows.x[:, : slots + grid[0] * grid[1]])
        x = pooled(reducer, held, cut, scale, grid, expert).x
        return jnp.pad(x, ((0, 0), (0, most - x.shape[1]), (0, 0)))

    def _cache(
        self, kept: dict[str, tuple[Array, Array]], lengths: Sequence[Int[Array, " B"]], longest: Sequence[int]
    ) -> Cache:
        """Every segment's keys and values, padded to what the longest path leaves, and room: the next token comes right
        behind the last one."""
        room = self.keep
        assert room is not None

        def padded(a: Array) -> Array:
            return jnp.pad(a.swapaxes(1, 2), ((0, 0), (0, 0), (0, room), (0, 0)))

        keys, values = ({name: padded(held[number]) for name, held in kept.items()} for number in (0, 1))
        stretches = [
            cache_lib.Stretch(jnp.arange(slots + room)[None] < n[:, None], n[0].astype(jnp.int32), n.astype(jnp.int32))
            for n, slots in zip(lengths, longest, strict=True)
        ]
        return Cache(keys, values, tuple(stretches), {})

    def _cut(self, cache: Cache, slots: Int[np.ndarray, " M1"]) -> Cache:
        of = {
            name: int(n)
            for layers, n in zip(dpn.stretches(self.model.spec), slots, strict=True)
            for name in _names(layers)
        }
        keys, values = ({name: a[:, :, : of[name]] for name, a in held.items()} for held in (cache.keys, cache.values))
        stretches = tuple(
            dataclasses.replace(stretch, alive=stretch.alive[:, : int(n)])
            for stretch, n in zip(cache.stretches, slots, strict=True)
        )
        return dataclasses.replace(cache, keys=keys, values=values, stretches=stretches)


def _names(layers: range) -> list[str]:
    return [block_name(layer) for layer in layers]


@functools.partial(jax.jit, static_argnums=0)
def _run(switch: Switch, params: Any, rows: Rows) -> Prefilled:
    return switch(params, rows)
