# SPDX-License-Identifier: Apache-2.0
"""The language model of an `LMSpec`: embed, blocks, final norm, head; over a text, or token by token.

`LM` is a thin frozen dataclass around Linen modules; its parameters are one nested dict of float32 arrays.
Letters: B batch, N tokens, D width, V vocabulary, C cache slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vtjax.errors import InputError, check_choice
from vtjax.models import adapters as adapters_lib
from vtjax.models import cache as cache_lib
from vtjax.models import segments
from vtjax.models.cache import Cache
from vtjax.models.decoder import WANTS, DecoderBlock
from vtjax.models.layers import Adapter, Knobs, Norm, Reducer, identity
from vtjax.models.segments import block_name, call_module
from vtjax.ops import cross_attention
from vtjax.ops.cross_attention import Attend, Memory
from vtjax.ops.decoder_attention import IMPLEMENTATIONS
from vtjax.ops.linear import precision
from vtjax.ops.tokens import Lattice, Tokens
from vtjax.spec import CrossSpec, LMSpec

Params = dict[str, Any]
Ids = Int[Array | np.ndarray, "B N"]
Mask = Int[Array | np.ndarray, "B N"] | Bool[Array | np.ndarray, "B N"] | Float[Array | np.ndarray, "B N"]


@dataclasses.dataclass(frozen=True)
class LM:
    """A buildable model. Hashable, so it may be a static argument.

    Attributes:
      spec: what to build.
      dtype: compute dtype; parameters stay float32, norms, rotation and softmax are computed in float32.
      remat, scan: see `models.segments`.
      attention: implementation of `ops.decoder_attention.causal`.
      reducers: `(layer, reducer)` pairs: what acts between that layer and the next, and may shorten the sequence.
      adapters: `(layer, site, function)` triples, at most one per layer and site.
      constrain: applied to activations `[B,N,D]`; sharding is injected here.
      cross: cross-attention to the visual tokens that `apply` gets as `memory`. Its parameters are `cross` of its
        layers' blocks.
      attend: attention to visual tokens, `ops.cross_attention.attend` or a distributed form of it.

    Raises:
      InputError: a spec of another kind, an unknown remat policy or attention, or a reducer or adapter that would not
        act.
    """

    spec: LMSpec
    dtype: Any = jnp.float32
    remat: str = "none"
    scan: bool = False
    attention: str = "auto"
    reducers: tuple[tuple[int, Reducer], ...] = ()
    adapters: tuple[tuple[int, str, Adapter], ...] = ()
    constrain: Callable[[Array], Array] = identity
    cross: CrossSpec | None = None
    attend: Attend = cross_attention.attend

    def __post_init__(self) -> None:
        if not isinstance(self.spec, LMSpec):
            raise InputError(f"an LM is built from an LMSpec, found {type(self.spec).__name__}")
        segments.check(self.remat, self.scan)
        check_choice("attention", self.attention, IMPLEMENTATIONS)
        segments.check_slots(self.spec, self.reducers, self.adapters)

    def blocks(self) -> list[DecoderBlock]:
        """One module per layer, reducers and adapters in place."""
        # No depth and no history, so that equal blocks are equal modules.
        family = dataclasses.replace(self.spec, blocks=self.spec.blocks[:1], lineage=())
        reducers = dict(self.reducers)
        layers = () if self.cross is None else self.cross.layers
        cross = None if self.cross is None else dataclasses.replace(self.cross, layers=())
        return [
            DecoderBlock(
                family=family,
                spec=block,
                reducer=reducers.get(index),
                adapters=tuple((site, fn) for layer, site, fn in self.adapters if layer == index),
                dtype=self.dtype,
                implementation=self.attention,
                cross=cross if index in layers else None,
                attend=self.attend,
            )
            for index, block in enumerate(self.spec.blocks)
        ]

    def init(self, key: Array, visual_width: int = 0) -> Params:
        """Fresh float32 parameters; jit it. Equal blocks share one traced initialiser. `visual_width`: E of the visual
        tokens that cross-attention reads; without it none is initialised."""
        spec, (embed, blocks, head) = self.spec, jax.random.split(key, 3)
        # Logits of a tied head then begin at unit variance, and a token is not lost in what attention adds to it.
        scale = spec.width**-0.5
        params: Params = {"embed": {"tokens": scale * jax.random.normal(embed, (spec.ids, spec.width))}}
        one, memory = jnp.zeros((1, 1), jnp.int32), None
        if self.cross is not None and visual_width:
            memory = Memory(jnp.zeros((1, 1, visual_width), self.dtype), one, one, one, one)
        tokens = Tokens(jnp.zeros((1, 1, spec.width), self.dtype), memory=memory)
        params |= segments.init(self.blocks(), blocks, tokens)
        params["norm"] = {"scale": jnp.ones(spec.width)}
        if not spec.tied:
            params["head"] = {"kernel": scale * jax.random.normal(head, (spec.width, spec.vocab))}
        return params

    def apply(
        self,
        params: Params,
        input_ids: Ids | None = None,
        attention_mask: Mask | None = None,
        *,
        embeddings: Float[Array | np.ndarray, "B N D"] | None = None,
        positions: Ids | None = None,
        segments: Ids | None = None,
        memory: Memory | None = None,
        lattice: Lattice | None = None,
        knobs: Knobs | None = None,
        want: tuple[str, ...] = (),
        slots: Int[Array | np.ndarray, "B M"] | None = None,
    ) -> tuple[Float[Array, "B M V"], dict[str, Any]]:
        """Runs the model over whole texts.

        Args:
          params: as from `init` or `vtjax.load` (jax or numpy arrays), and the parameters of methods beside them.
          input_ids: token ids; None where `embeddings` are given.
          attention_mask: 1 for tokens, 0 for padding, which may lie on either side; None = no padding.
          embeddings: what enters the first block, in place of the embedding of ids (as `embed` gives it).
          positions: of every slot; None counts the tokens of `attention_mask` from 0.
          segments: packed texts: 0 = prefix of all of them, 1, 2, ... = one each, -1 = padding. A token sees the prefix
            and its own text before it; needs `positions`, which begin behind the prefix in every text.
          memory: visual tokens, for a model with `cross`; None = there are none.
          lattice: where images and routing tokens are, for reducers that ask; None = they are not known.
          knobs: traced arrays by name, `[L, ...]` or one scalar for all layers; they override method parameters of the
            same name.
          want: per-block outputs to return in `aux["blocks"][l]`: "tokens", from blocks with attention "keys",
            "values", "queries", and from blocks with cross-attention "cross_keys", "cross_values", "cross_lse".
          slots: `[B, M]`, whose logits are wanted, of those that leave the last block, or where a reducer says which
            slots those came from (`Tokens.source`), of those that entered; None = of all that leave. Where answers are
            short, those of the others are most of the memory of a training step.

        Returns:
          logits: float32, of the wanted slots, or of every slot that left the last block (M = N unless a reducer took
            some); padding's mean nothing, those of a wanted token that is gone are NaN.
          aux: `features [B,M,D]` (after the final norm), `tokens` (the Tokens that left the last block) and `blocks`
            (one dict per layer).

        Raises:
          InputError: ids outside the vocabulary, a mask other than 0 and 1 or without any token in a row (both where
            the values are known, which they are not inside `jit`), shapes that do not fit, both or neither of ids and
            embeddings, an unknown name in `want`, a block whose `reduce` names a reducer that the model was not given.
        """
        tokens = self.enter(params, input_ids, attention_mask, embeddings, positions, segments, memory, lattice)
        tokens, blocks = self._run(params, tokens, knobs, want)
        x = self._norm(params, tokens.x)
        aux = {"features": x, "tokens": tokens, "blocks": blocks}
        if slots is None:
            return self._logits(params, x), aux
        slots, gone = jnp.asarray(slots), None
        if tokens.source is not None:
            slots = jnp.take_along_axis(tokens.source, slots, axis=1)
            gone, slots = slots < 0, jnp.maximum(slots, 0)
        logits = self._logits(params, jnp.take_along_axis(x, slots[:, :, None], axis=1))
        return logits if gone is None else jnp.where(gone[:, :, None], jnp.nan, logits), aux

    def prefill(
        self,
        params: Params,
        input_ids: Ids | None = None,
        attention_mask: Mask | None = None,
        *,
        room: int,
        embeddings: Float[Array | np.ndarray, "B N D"] | None = None,
        positions: Ids | None = None,
        memory: Memory | None = None,
        lattice: Lattice | None = None,
        knobs: Knobs | None = None,
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Runs the model over prompts, to go on token by token.

        Args:
          room: how many tokens the cache takes after the prompt, 0 or more; `step` does not notice the end of it.
          Others as `apply`.

        Returns:
          The logits after the last token of every prompt, float32, and the cache.

        Raises:
          InputError: as `apply`, and where the prompt and the room are longer than the spec's context.
        """
        entered = self.enter(params, input_ids, attention_mask, embeddings, positions, None, memory, lattice)
        if room < 0 or entered.x.shape[1] + room > self.spec.context:
            raise InputError(
                f"prompt and new tokens must fit the model's context of {self.spec.context}, "
                f"found {entered.x.shape[1]} and {room} (padding counts)"
            )
        want = ("keys", "values", "cross_keys", "cross_values", "tokens")
        tokens, blocks = self._run(params, entered, knobs, want)
        stretches = [entered, *(blocks[layer]["tokens"] for layer, _ in sorted(self.reducers, key=lambda r: r[0]))]
        layers = {block_name(i): aux for i, aux in enumerate(blocks)}
        last = tokens.x[:, -1]
        if tokens.alive is not None:
            last = jnp.take_along_axis(tokens.x, cache_lib.last_live(tokens)[:, None, None], axis=1)[:, 0]
        cache, entering = cache_lib.start(stretches, layers, room), [entered, *(aux["tokens"] for aux in blocks[:-1])]
        routes = adapters_lib.routes(self.spec, self.adapters, params, entering)
        return self.logits(params, last), dataclasses.replace(cache, routes=routes)

    def step(
        self, params: Params, token: Int[Array, " B"], cache: Cache, *, knobs: Knobs | None = None
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Adds one token to every text: its logits, float32, and the cache with it. No reducer acts."""
        params = jax.tree.map(jnp.asarray, params)
        knobs = segments.method_knobs(params) | cache.routes | dict(knobs or {})
        segments.check_knobs(knobs, self.spec.depth)
        x = self.constrain(self.embed(params, token[:, None]))
        keys, values, number = dict(cache.keys), dict(cache.values), 0
        stretches = [stretch.grown() for stretch in cache.stretches]
        ends = {layer for layer, _ in self.reducers}
        for index, block in enumerate(self.blocks()):
            name, stretch = block_name(index), stretches[number]
            layer = cache.layer(name, stretch) if block.spec.attn else None
            memory = cache.memory[number] if cache.memory else None
            tokens = Tokens(x, position=stretch.position[:, None], memory=memory)
            arguments = tokens, segments.layer_knobs(knobs, index), (), layer, cache.cross.get(name)
            tokens, aux = call_module(block, params.get(name, {}), *arguments)
            x = self.constrain(tokens.x)
            if "cache" in aux:
                keys[name], values[name] = aux["cache"]
            number += index in ends
        advanced = tuple(stretch.advanced() for stretch in stretches)
        grown = dataclasses.replace(cache, keys=keys, values=values, stretches=advanced)
        return self.logits(params, x[:, 0]), grown

    def embed(self, params: Params, input_ids: Ids) -> Float[Array, "B N D"]:
        """Embedding of token ids, in the compute dtype."""
        return jnp.asarray(params["embed"]["tokens"])[jnp.asarray(input_ids)].astype(self.dtype)

    def enter(
        self,
        params: Params,
        input_ids: Any,
        attention_mask: Any,
        embeddings: Any,
        positions: Any,
        packed: Any = None,
        memory: Memory | None = None,
        lattice: Lattice | None = None,
    ) -> Tokens:
        """The tokens that enter the first block, checked; arguments and errors as of `apply`, whose `segments` are
        `packed`."""
        if (input_ids is None) == (embeddings is None):
            raise InputError("a language model takes input_ids or embeddings, found both or neither")
        if embeddings is None:
            check_ids(input_ids, self.spec.ids)
            x = self.embed(params, input_ids)
        else:
            x = jnp.asarray(embeddings).astype(self.dtype)
            if x.ndim != 3 or x.shape[2] != self.spec.width:
                raise InputError(f"embeddings must be [B, N, {self.spec.width}], found {list(x.shape)}")
        for name, value in (("attention_mask", attention_mask), ("positions", positions), ("segments", packed)):
            if value is not None and value.shape != x.shape[:2]:
                raise InputError(f"{name} must be {list(x.shape[:2])} as the tokens are, found {list(value.shape)}")
        if packed is not None and (positions is None or attention_mask is not None):
            raise InputError("segments need positions and take the place of attention_mask, found none or both")
        alive = None if packed is None else (jnp.asarray(packed) >= 0).astype(jnp.float32)
        if attention_mask is not None:
            check_mask(attention_mask)
            alive = jnp.asarray(attention_mask).astype(jnp.float32)
            if positions is None:
                positions = counted(alive)
        position, segment = (None if a is None else jnp.asarray(a) for a in (positions, packed))
        return Tokens(
            self.constrain(x), alive=alive, position=position, segment=segment, memory=memory, lattice=lattice
        )

    def _run(
        self, params: Params, tokens: Tokens, knobs: Knobs | None, want: tuple[str, ...]
    ) -> tuple[Tokens, list[dict[str, Any]]]:
        unknown = [want] if isinstance(want, str) else [w for w in want if w not in (*WANTS, "tokens")]
        if unknown:
            raise InputError(f"want must be a tuple of {', '.join((*WANTS, 'tokens'))}, found {unknown[0]!r}")
        segments.check_reducers(self.spec, self.reducers)
        params = jax.tree.map(jnp.asarray, params)
        return segments.run(
            self.blocks(),
            params,
            tokens,
            knobs=segments.method_knobs(params) | dict(knobs or {}),
            want=want,
            remat=self.remat,
            scan=self.scan,
            constrain=self.constrain,
        )

    def logits(self, params: Params, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits of tokens that left the last block, float32."""
        return self._logits(params, self._norm(params, x))

    def _norm(self, params: Params, x: Array) -> Array:
        return call_module(Norm("rmsnorm", self.spec.eps), params["norm"], x)

    def _logits(self, params: Params, x: Array) -> Array:
        if self.spec.tied:
            table, axis = jnp.asarray(params["embed"]["tokens"]), 1
        else:
            table, axis = jnp.asarray(params["head"]["kernel"]), 0
        contract = (((x.ndim - 1,), (axis,)), ((), ()))
        table = table.astype(x.dtype)
        return jax.lax.dot_general(x, table, contract, precision=precision(x), preferred_element_type=jnp.float32)


def counted(mask: Array) -> Int[Array, "B N"]:
    """Positions where none are given: the tokens of a mask, from 0."""
    return jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0).astype(jnp.int32)


def check_ids(ids: Any, vocab: int) -> None:
    """Raises InputError for ids that are not whole numbers `[B, N]`, or, where their values are known, not below
    `vocab`."""
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer) or 0 in ids.shape:
        raise InputError(f"input_ids must be whole numbers [B, N], found {ids.dtype} {list(ids.shape)}")
    if isinstance(ids, jax.core.Tracer):
        return
    low, high = int(np.min(ids)), int(np.max(ids))
    if low < 0 or high >= vocab:
        raise InputError(f"input_ids must be in 0..{vocab - 1} (the vocabulary), found {low if low < 0 else high}")


def check_mask(mask: Any) -> None:
    """Raises InputError, where the values are known, for a mask other than 0 and 1, or a row without a token."""
    if isinstance(mask, jax.core.Tracer):
        return
    values = np.asarray(mask)
    if values.ndim != 2:
        raise InputError(f"attention_mask must be [B, N], found {list(values.shape)}")
    if not np.isin(values, (0, 1)).all():
        raise InputError(f"attention_mask must be 0 or 1, found {values[~np.isin(values, (0, 1))][0]}")
    if not values.any(1).all():
        raise InputError(f"attention_mask must have a token in every row, found none in row {values.any(1).argmin()}")
