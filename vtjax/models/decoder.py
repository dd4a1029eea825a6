# SPDX-License-Identifier: Apache-2.0
"""Linen modules of decoder-only language models. Their parameter names are an API (docs/parameter-names.md).

Letters: B batch, N tokens, C cache slots, D width, H query heads, K key and value heads, d head width. Parameters are
float32; `dtype` is the compute dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from vtjax.errors import InputError
from vtjax.models import cross_attention
from vtjax.models.cross_attention import CrossBlock, HyperAttention, Past
from vtjax.models.layers import Adapter, Dense, Knobs, Mlp, Norm, Reducer, SkipAdapter, at_site, with_first
from vtjax.ops import cross_attention as cross_op
from vtjax.ops import decoder_attention, rope
from vtjax.ops.tokens import Tokens
from vtjax.spec import CrossSpec, DecoderBlockSpec, LMSpec

WANTS = ("queries", "keys", "values", *cross_attention.WANTS)
"""Attention outputs that a caller may ask for: `[B, N, H or K, d]`, queries and keys after their rotation; and those of
`cross_attention.WANTS`."""

Mix = Callable[[Array, Array, Array], Array]
"""`(queries, context, lse) -> context`: `[B, N, H, d]`, before the output projection, and the log-sum-exp of the scores
`[B, N, H]`."""


class LayerCache(NamedTuple):
    """What one layer remembers, and where the new token goes.

    Attributes:
      keys, values: keys after their rotation.
      alive: slots that hold a token, the new one's included.
      slot: the new token's slot.
    """

    keys: Float[Array, "B K C d"]
    values: Float[Array, "B K C d"]
    alive: Bool[Array, "B C"]
    slot: Int[Array, ""]


class DecoderAttention(nn.Module):
    """Causal grouped-query self-attention of one block on the normed tokens.

    Without a cache over all tokens: `(y [B,N,D], aux)`, aux with what `want` names of `WANTS`. With one: a single new
    token `[B,1,D]`, over the cache with it; aux["cache"] is the pair of updated keys and values.
    """

    family: LMSpec
    spec: DecoderBlockSpec
    dtype: Any = jnp.float32
    implementation: str = "auto"

    @nn.compact
    def __call__(
        self, tokens: Tokens, want: tuple[str, ...] = (), cache: LayerCache | None = None, mix: Mix | None = None
    ) -> tuple[Float[Array, "B N D"], dict[str, Any]]:
        family, spec, x = self.family, self.spec, tokens.x
        position = jnp.arange(x.shape[1])[None] if tokens.position is None else tokens.position
        frequencies = family.frequencies(spec.head_dim)

        def project(name: str, heads: int) -> Array:
            lora = at_site(family.lora, name)
            y = Dense(heads * spec.head_dim, family.qkv_bias, self.dtype, lora=lora, name=name)(x)
            return y.reshape(*y.shape[:2], heads, spec.head_dim)

        def turned(name: str, y: Array) -> Array:
            if family.qk_norm == "head":
                y = Norm("rmsnorm", family.eps, name=f"{name}_norm")(y)
            return rope.rotate(y, jnp.broadcast_to(position, y.shape[:2]), frequencies)

        q, k = turned("query", project("query", spec.heads)), turned("key", project("key", spec.kv_heads))
        v = project("value", spec.kv_heads)
        if cache is None:
            given: dict[str, Any] = {"alive": tokens.alive, "segment": tokens.segment}
            y, lse = decoder_attention.causal(q, k, v, implementation=self.implementation, return_lse=True, **given)
            found = (("queries", q), ("keys", k), ("values", v))
            aux: dict[str, Any] = {name: a for name, a in found if name in want}
        else:
            keys, values = (
                jax.lax.dynamic_update_slice(old, new.swapaxes(1, 2).astype(old.dtype), (0, 0, cache.slot, 0))
                for old, new in ((cache.keys, k), (cache.values, v))
            )
            y, lse = decoder_attention.cached(q, keys, values, cache.alive, return_lse=True)
            aux = {"cache": (keys, values)}
        y = y if mix is None else mix(q, y, lse)
        y = checkpoint_name(y.reshape(*y.shape[:2], spec.heads * spec.head_dim), "attention")
        lora = at_site(family.lora, "out")
        return Dense(x.shape[-1], family.out_bias, self.dtype, lora=lora, name="out")(y), aux


class DecoderBlock(nn.Module):
    """One decoder block, with the slots of `layers.Block`; its reducer acts on what leaves the block.

    Attributes:
      family: what all blocks of the model share.
      spec: this block.
      reducer: called on the block's result as `reducer(tokens, aux, knobs) -> (tokens, decisions)`; it may return fewer
        slots. Its `wants` attribute, a tuple, names the attention outputs that it reads.
      adapters: `(site, function)` pairs, as in `layers.Block`.
      cross: what it has of visual tokens; None = nothing. Without `tokens.memory` it does not act.
      attend: attention to visual tokens, `ops.cross_attention.attend` or a distributed form of it.
    """

    family: LMSpec
    spec: DecoderBlockSpec
    reducer: Reducer | None = None
    adapters: tuple[tuple[str, Adapter], ...] = ()
    dtype: Any = jnp.float32
    implementation: str = "auto"
    cross: CrossSpec | None = None
    attend: cross_op.Attend = cross_op.attend

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        knobs: Knobs | None = None,
        want: tuple[str, ...] = (),
        cache: LayerCache | None = None,
        past: Past | None = None,
    ) -> tuple[Tokens, dict[str, Any]]:
        """Args:
          tokens: what the previous block left; `size` has no meaning here.
          knobs: layer l of the methods' parameters and of the traced knobs.
          want: names of attention outputs to return.
          cache: of the tokens before, for a single new token; the reducer does not act on that.
          past: keys and values of the visual tokens, where they are known; `tokens.memory` then has no `x`.

        Returns:
          The tokens, and aux: what was wanted, the reducer's `decisions`, and with a cache its update, `cache`.
        """
        if tokens.size is not None:
            raise InputError("decoder blocks take tokens without size (a merged token counts as one), found sizes")
        family, spec, knobs, adapters = self.family, self.spec, knobs or {}, dict(self.adapters)
        knobs = with_first(knobs, tokens) if adapters else knobs
        aux: dict[str, Any] = {}
        x, memory, cross = tokens.x, tokens.memory, self.cross
        norms = {name: Norm("rmsnorm", family.eps, name=name) for name in ("norm1", "norm2")}

        if cross is not None and memory is not None and cross.form == "block":
            x, side = CrossBlock(cross, self.attend, self.dtype, name="cross")(x, memory, past)
            aux.update(side)

        def branch(norm: str, site: str, x: Array, function: Callable[[Array], Array]) -> Array:
            inner = norms[norm](x)
            inner = adapters[f"{site}_in"](inner, knobs) if f"{site}_in" in adapters else inner
            y = function(inner)
            return y + adapters[site](x, knobs) if site in adapters else y

        if spec.attn:
            reads = tuple(getattr(self.reducer, "wants", ()))
            mix = None
            if cross is not None and memory is not None and cross.inside:
                # mPLUG-Owl3 shares the norm of the text with the visual tokens.
                visual = None if memory.x is None else norms["norm1"](memory.x)
                seen = dataclasses.replace(memory, x=visual)
                hyper = HyperAttention(cross.form, family, spec, self.attend, self.dtype, name="cross")

                def mix(q: Array, context: Array, lse: Array) -> Array:
                    y, side = hyper(q, context, lse, seen, past)
                    aux.update(side)
                    return y

            def attend(inner: Array) -> Array:
                module = DecoderAttention(family, spec, self.dtype, self.implementation, name="attn")
                y, side = module(tokens.replace(x=inner), tuple(dict.fromkeys((*want, *reads))), cache, mix)
                aux.update(side)
                return y

            x = x + branch("norm1", "attn", x, attend)
        if spec.ffn:
            mlp = Mlp(spec.mlp, "swiglu", bias=family.mlp_bias, dtype=self.dtype, lora=family.lora, name="mlp")
            x = x + branch("norm2", "mlp", x, mlp)
        if not spec.attn and not spec.ffn:
            if "skip" in adapters:
                x = x + adapters["skip"](x, knobs)
            elif spec.adapter:
                x = x + SkipAdapter(spec.adapter, self.dtype, name="adapter")(x)
        if "out" in adapters:
            x = x + adapters["out"](x, knobs)
        tokens = tokens.replace(x=x)
        if self.reducer is not None and cache is None:
            tokens, aux["decisions"] = self.reducer(tokens, aux, knobs)
            for name in ("alive", "position", "segment"):
                row = getattr(tokens, name)
                if row is not None and row.shape[1] != tokens.x.shape[1]:
                    raise InputError(
                        f"a reducer must leave {name} as long as its {tokens.x.shape[1]} tokens, found {row.shape[1]}"
                    )
        return tokens, {k: v for k, v in aux.items() if k in want or k in ("decisions", "cache")}
