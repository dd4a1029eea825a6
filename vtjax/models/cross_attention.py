# SPDX-License-Identifier: Apache-2.0
"""Linen modules by which a decoder's text attends to visual tokens (`CrossSpec`). Their parameter names are an API.

Letters: B batch, N tokens, M visual tokens, D width, H query heads, K key and value heads, d head width.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from vtjax.models.layers import Dense, Mlp, Norm
from vtjax.ops import partial_softmax, rope
from vtjax.ops.cross_attention import Attend, Memory
from vtjax.ops.partial_softmax import Part
from vtjax.spec import CrossSpec, DecoderBlockSpec, LMSpec

WANTS = ("cross_keys", "cross_values", "cross_lse")
"""What a caller may ask for: keys (normed, turned) and values `[B, M, K, d]`; log-sum-exp of the scores `[B, N, H]`."""

Past = tuple[Array, Array]
"""Keys and values of the visual tokens, known from before."""


class CrossBlock(nn.Module):
    """The block form: x + tanh(gate1) attention(norm1 x) + tanh(gate2) mlp(norm2 ...); a gate of 0 changes nothing."""

    spec: CrossSpec
    attend: Attend
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], memory: Memory, past: Past | None = None
    ) -> tuple[Float[Array, "B N D"], dict[str, Array]]:
        """`x` with what it sees, and aux with all of `WANTS`."""
        spec = self.spec

        def gated(number: int, y: Array) -> Array:
            gate = self.param(f"gate{number}", nn.initializers.zeros, (1,))
            return x + jnp.tanh(gate).astype(y.dtype) * y

        inner = Norm(spec.norm, spec.eps, name="norm1")(x)
        y, aux = CrossAttention(spec, self.attend, self.dtype, name="attn")(inner, memory, past)
        x = gated(1, y)
        if spec.mlp:
            inner = Norm(spec.norm, spec.eps, name="norm2")(x)
            y = Mlp(spec.mlp, spec.activation, bias=False, dtype=self.dtype, name="mlp")(inner)
            x = gated(2, y if spec.mlp_everywhere else jnp.where(memory.seeing()[:, :, None], y, 0))
        return x, aux


class CrossAttention(nn.Module):
    """Attention of the block form on normed tokens, with projections of its own."""

    spec: CrossSpec
    attend: Attend
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], memory: Memory, past: Past | None
    ) -> tuple[Float[Array, "B N D"], dict[str, Array]]:
        spec = self.spec

        def project(name: str, x: Array, heads: int) -> Array:
            y = Dense(heads * spec.head_dim, False, self.dtype, name=name)(x)
            y = y.reshape(*y.shape[:2], heads, spec.head_dim)
            return Norm("rmsnorm", spec.eps, name=f"{name}_norm")(y) if spec.qk_norm and name != "value" else y

        q = project("query", x, spec.heads)
        if past is None:
            assert memory.x is not None
            past = project("key", memory.x, spec.kv_heads), project("value", memory.x, spec.kv_heads)
        k, v = past
        y, lse = self.attend(q, k, v, low=memory.low, high=memory.high, number=memory.number)
        y = checkpoint_name(y.reshape(*y.shape[:2], spec.heads * spec.head_dim), "attention")
        y = Dense(x.shape[-1], False, self.dtype, name="out")(y)
        return y, {"cross_keys": k, "cross_values": v, "cross_lse": lse}


class HyperAttention(nn.Module):
    """The hyper and fused forms: within a self-attention, mix what its queries find in the visual tokens into what they
    found in the text, by a gate or as one softmax over both. Rows that see no image keep the latter."""

    form: str
    family: LMSpec
    spec: DecoderBlockSpec
    attend: Attend
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        q: Float[Array, "B N H d"],
        context: Float[Array, "B N H d"],
        text: Float[Array, "B N H"],
        memory: Memory,
        past: Past | None = None,
    ) -> tuple[Float[Array, "B N H d"], dict[str, Array]]:
        """Args:
        q: turned queries of the self-attention.
        context, text: what they found in the text, and the log-sum-exp of their scores.
        memory: visual tokens, normed as the text is.
        """
        spec = self.spec

        def project(name: str, x: Array) -> Array:
            y = Dense(spec.kv_heads * spec.head_dim, True, self.dtype, name=name)(x)
            return y.reshape(*y.shape[:2], spec.kv_heads, spec.head_dim)

        if past is None:
            assert memory.x is not None
            frequencies = self.family.frequencies(spec.head_dim)
            past = rope.rotate(project("key", memory.x), memory.position, frequencies), project("value", memory.x)
        k, v = past
        y, lse = self.attend(q, k, v, low=memory.low, high=memory.high, number=memory.number)
        found = {"cross_keys": k, "cross_values": v, "cross_lse": lse}
        if self.form == "fused":
            both = partial_softmax.merge(Part(context, text.astype(lse.dtype)), Part(y, lse))
            return both.o.astype(y.dtype), found
        gate = self.param("gate", nn.initializers.zeros, (spec.heads * spec.head_dim,)).reshape(q.shape[2:])
        share = jnp.where(memory.seeing()[:, :, None, None], jax.nn.sigmoid(gate), 0).astype(y.dtype)
        return context + share * (y - context), found
