# SPDX-License-Identifier: Apache-2.0
"""Linen modules shared by the models. Their parameter names are an API (docs/parameter-names.md).

Letters: B batch, N tokens, D width, H heads, M hidden width. Parameters are float32; `dtype` is the compute dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from vtjax.ops import attention as attention_op
from vtjax.ops import linear, norms
from vtjax.ops.tokens import Tokens
from vtjax.spec import BlockSpec, LoRASpec, ViTSpec

Knobs = Mapping[str, Any]
Reducer = Callable[[Tokens, dict[str, Array], Knobs], tuple[Tokens, dict[str, Array]]]
Adapter = Callable[[Array, Knobs], Array]
DropPath = Callable[[Array, int], Array]
AttentionFn = Callable[..., tuple[Array, dict[str, Array]]]
"""`(q, k, v, *, size, alive, want) -> (y, statistics)`, with the meaning that `ops.attention.attention` gives them."""

ADAPTER_SITES = ("attn_in", "attn", "mlp_in", "mlp", "out", "skip", "instead")
"""Where an adapter acts: on the input of attention or MLP (its result replaces the normed input), parallel to attention
or MLP (it reads the residual stream, its result is added), after the block, in place of a removed block, or in place of
a block where the traced knob `skipped` says so (`segments.run`)."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": linear.gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "swiglu": jax.nn.silu,
}


def with_first(knobs: Knobs, tokens: Tokens) -> Knobs:
    """Knobs for adapters, of which some read the first token of a text: where that is, as `adapter_first` `[B]`."""
    first = tokens.first()
    return knobs if first is None else {**knobs, "adapter_first": first}


def identity(x: Array) -> Array:
    """What models do to activations where nothing is injected."""
    return x


class Dense(nn.Module):
    """A linear layer, kernel `[in, out]`, with a low-rank update beside it if `lora` says so; computes in `dtype`."""

    features: int
    bias: bool = True
    dtype: Any = jnp.float32
    init: Any = nn.initializers.xavier_uniform()
    lora: LoRASpec | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B M"]:
        kernel = self.param("kernel", self.init, (x.shape[-1], self.features))
        y = linear.matmul(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.lora is not None:
            inner = Dense(self.lora.rank, False, self.dtype, name="lora_in")(x)
            update = Dense(self.features, False, self.dtype, nn.initializers.zeros, name="lora_out")(inner)
            y = y + self.lora.alpha / self.lora.rank * update
        if not self.bias:
            return y
        return y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)


def at_site(lora: LoRASpec | None, site: str) -> LoRASpec | None:
    """`lora` where it acts on the projection `site`."""
    return lora if lora is not None and site in lora.sites else None


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis; statistics in float32, output in x's dtype."""

    kind: str
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        if self.kind == "rmsnorm":
            return norms.rms_norm(x, scale, self.eps)
        return norms.layer_norm(x, scale, self.param("bias", nn.initializers.zeros, (x.shape[-1],)), self.eps)


class Attention(nn.Module):
    """Self-attention of one block on the normed tokens.

    Returns `(y [B,N,D], aux)`; aux holds what `want` names: "importance", "lse" (see `ops.attention`), and "queries",
    "keys", "values" `[B,N,H,dh]`, after their norms, unscaled.
    """

    family: ViTSpec
    spec: BlockSpec
    dtype: Any = jnp.float32
    implementation: str | AttentionFn = "auto"

    @nn.compact
    def __call__(self, tokens: Tokens, want: tuple[str, ...] = ()) -> tuple[Float[Array, "B N D"], dict[str, Array]]:
        family, heads, head_dim = self.family, self.spec.heads, self.spec.head_dim
        x, d = tokens.x, tokens.x.shape[-1]

        def project(name: str, bias: bool) -> Array:
            return Dense(heads * head_dim, bias, self.dtype, name=name)(x)

        q, k = project("query", family.qkv_bias), project("key", family.qkv_bias and family.key_bias)
        v = project("value", family.qkv_bias)
        if family.qk_norm == "full":
            q = Norm(family.norm, family.eps, name="query_norm")(q)
            k = Norm(family.norm, family.eps, name="key_norm")(k)
        q, k, v = (a.reshape(*a.shape[:2], heads, head_dim) for a in (q, k, v))
        if family.qk_norm == "head":
            q = Norm(family.norm, family.eps, name="query_norm")(q)
            k = Norm(family.norm, family.eps, name="key_norm")(k)
        attend = self.implementation
        if isinstance(attend, str):
            attend = functools.partial(attention_op.attention, implementation=attend)
        statistics = tuple(w for w in want if w in attention_op.STATISTICS)
        y, aux = attend(q, k, v, size=tokens.size, alive=tokens.alive, want=statistics)
        aux |= {name: a for name, a in (("queries", q), ("keys", k), ("values", v)) if name in want}
        y = checkpoint_name(y.reshape(*y.shape[:2], heads * head_dim), "attention")
        return Dense(d, family.out_bias, self.dtype, name="out")(y), aux


class Mlp(nn.Module):
    """act(up x) -> down, or silu(gate x) * up x -> down for SwiGLU."""

    hidden: int
    activation: str
    bias: bool = True
    norm: str | None = None
    eps: float = 1e-6
    dtype: Any = jnp.float32
    lora: LoRASpec | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        act = ACTIVATIONS[self.activation]

        def project(name: str, width: int, x: Array) -> Array:
            return Dense(width, self.bias, self.dtype, lora=at_site(self.lora, name), name=name)(x)

        hidden = project("up", self.hidden, x)
        hidden = act(project("gate", self.hidden, x)) * hidden if self.activation == "swiglu" else act(hidden)
        if self.norm is not None:
            hidden = Norm(self.norm, self.eps, name="norm")(hidden)
        hidden = checkpoint_name(hidden, "mlp")
        return project("down", x.shape[-1], hidden)


class SkipAdapter(nn.Module):
    """Stands in for a removed block: up(relu(down x)), the up-projection starts at 0, so the block is the identity."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        hidden = nn.relu(Dense(self.hidden, True, self.dtype, name="down")(x))
        zeros = nn.initializers.zeros
        return Dense(x.shape[-1], True, self.dtype, zeros, name="up")(hidden)


class Block(nn.Module):
    """One transformer block, with slots for a reducer and for adapters.

    Attributes:
      family: what all blocks of the model share.
      spec: this block.
      reducer: called between attention and MLP as `reducer(tokens, aux, knobs) -> (tokens, decisions)`; its `wants`
        attribute, a tuple, names the attention outputs it reads. `aux` may alias traced arrays: do not mutate it.
      adapters: `(site, function)` pairs, `function(x, knobs) -> array`, sites as in `ADAPTER_SITES`.
      gated: each branch is multiplied by the tanh of a learned gate (the global blocks of Llama 3.2 Vision's tower).
    """

    family: ViTSpec
    spec: BlockSpec
    reducer: Reducer | None = None
    adapters: tuple[tuple[str, Adapter], ...] = ()
    dtype: Any = jnp.float32
    implementation: str | AttentionFn = "auto"
    gated: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        knobs: Knobs | None = None,
        want: tuple[str, ...] = (),
        drop_path: DropPath | None = None,
    ) -> tuple[Tokens, dict[str, Any]]:
        """Args:
          tokens: what the previous block left.
          knobs: layer l of the methods' parameters and of the traced knobs.
          want: names of attention outputs to return.
          drop_path: `(branch, 0 for attention or 1 for MLP) -> branch`, stochastic depth; None = none.

        Returns:
          The tokens, and aux: what was wanted, and the reducer's `decisions`.
        """
        family, spec, knobs = self.family, self.spec, knobs or {}
        adapters, drop = dict(self.adapters), drop_path or (lambda x, _: x)
        aux: dict[str, Any] = {}
        start = tokens.x

        def norm(name: str, x: Array) -> Array:
            return Norm(family.norm, family.eps, name=name)(x)

        def branch(number: int, x: Array, function: Callable[[Array], Array]) -> Array:
            """The residual branch `number`, with its norm before or after it, its input adapter and its scale."""
            post = family.norm_position == "post"
            inner = x if post else norm(f"norm{number}", x)
            site = "attn_in" if number == 1 else "mlp_in"
            inner = adapters[site](inner, knobs) if site in adapters else inner
            y = function(inner)
            y = norm(f"norm{number}", y) if post else y
            if family.layer_scale is not None:
                gamma = self.param(f"layer_scale{number}", nn.initializers.constant(family.layer_scale), (x.shape[-1],))
                y = y * gamma.astype(y.dtype)
            if self.gated:
                gate = self.param(f"gate{number}", nn.initializers.constant(math.pi / 4), (1,))
                y = y * jnp.tanh(gate).astype(y.dtype)
            y = drop(y, number - 1)
            parallel = "attn" if number == 1 else "mlp"
            return y + adapters[parallel](x, knobs) if parallel in adapters else y

        if spec.attn:
            reads = tuple(getattr(self.reducer, "wants", ()))

            def attend(inner: Array) -> Array:
                y, side = Attention(family, spec, self.dtype, self.implementation, name="attn")(
                    tokens.replace(x=inner), want=tuple(dict.fromkeys((*want, *reads)))
                )
                aux.update(side)
                return y

            tokens = tokens.replace(x=tokens.x + branch(1, tokens.x, attend))
        if self.reducer is not None:
            tokens, aux["decisions"] = self.reducer(tokens, aux, knobs)
        if spec.ffn:
            mlp = Mlp(
                spec.mlp,
                family.activation,
                bias=family.mlp_bias,
                norm=family.norm if family.mlp_norm else None,
                eps=family.eps,
                dtype=self.dtype,
                name="mlp",
            )
            tokens = tokens.replace(x=tokens.x + branch(2, tokens.x, mlp))
        if not spec.attn and not spec.ffn:
            if "skip" in adapters:
                tokens = tokens.replace(x=start + adapters["skip"](start, knobs))
            elif spec.adapter:
                tokens = tokens.replace(x=start + SkipAdapter(spec.adapter, self.dtype, name="adapter")(start))
        if "out" in adapters:
            tokens = tokens.replace(x=tokens.x + adapters["out"](tokens.x, knobs))
        return tokens, {k: v for k, v in aux.items() if k in want or k == "decisions"}


class Embed(nn.Module):
    """Patches, prefix tokens and positions: images `[B,H,W,C]` -> tokens `[B,N,D]`."""

    spec: ViTSpec
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B N D"]:
        spec, d = self.spec, self.spec.width
        rows, columns = spec.grid
        lecun = nn.initializers.lecun_normal()
        x = Dense(d, spec.patch_bias, self.dtype, lecun, name="patch")(patches(images.astype(self.dtype), spec.patch))

        small = nn.initializers.normal(0.02)
        prefix = []
        if spec.class_token:
            prefix.append(self.param("class_token", small, (d,))[None])
        if spec.distill_token:
            prefix.append(self.param("distill_token", small, (d,))[None])
        if spec.registers:
            prefix.append(self.param("registers", small, (spec.registers, d)))
        leading = jnp.concatenate([*prefix, jnp.zeros((0, d))]) if prefix else jnp.zeros((0, d))

        if spec.pos == "learned":
            pos = self.param("pos", small, (spec.pos_prefix + rows * columns, d))
            leading = leading.at[: spec.pos_prefix].add(pos[: spec.pos_prefix])
            x = x + pos[spec.pos_prefix :].astype(x.dtype)
        elif spec.pos == "sincos2d":
            x = x + jnp.asarray(sincos2d(rows, columns, d), x.dtype)
        leading = jnp.broadcast_to(leading.astype(x.dtype), (x.shape[0], *leading.shape))
        return jnp.concatenate([leading, x], axis=1)


def patches(images: Float[Array, "B H W C"], side: int) -> Float[Array, "B N P"]:
    """The pixels of each patch, row by row, ordered row, column, channel."""
    _, height, width, channels = images.shape
    x = images.reshape(-1, height // side, side, width // side, side, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height * width // side**2, side**2 * channels)


def sincos2d(rows: int, columns: int, width: int, temperature: float = 10_000.0) -> Any:
    """Fixed 2-D sine-cosine positions, numpy float32 `[rows * columns, width]`: sin x, cos x, sin y, cos y.

    Source: Chen, Xie & He 2021 (MoCo v3), as used by Beyer et al. 2022.

    Raises:
      ValueError: width is not a multiple of 4.
    """
    import numpy as np

    if width % 4:
        raise ValueError(f"sincos2d positions need a width that is a multiple of 4, found {width}")
    y, x = np.mgrid[:rows, :columns]
    omega = 1.0 / temperature ** (np.arange(width // 4) / max(width // 4 - 1, 1))
    y, x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1).astype(np.float32)


class AttentionPool(nn.Module):
    """A learned probe attends to all tokens; then an MLP with a residual (SigLIP, Zhai et al. 2022)."""

    spec: ViTSpec
    dtype: Any = jnp.float32
    implementation: str = "auto"

    @nn.compact
    def __call__(self, tokens: Tokens) -> Float[Array, "B D"]:
        spec, x = self.spec, tokens.x
        heads, d = spec.pool_heads, spec.width
        probe = self.param("probe", nn.initializers.normal(0.02), (d,)).astype(x.dtype)
        probe = jnp.broadcast_to(probe, (x.shape[0], 1, d))
        q = Dense(d, True, self.dtype, name="query")(probe)
        k = Dense(d, True, self.dtype, name="key")(x)
        v = Dense(d, True, self.dtype, name="value")(x)
        q, k, v = (a.reshape(*a.shape[:2], heads, d // heads) for a in (q, k, v))
        y, _ = attention_op.attention(
            q,
            k,
            v,
            size=tokens.size,
            alive=tokens.alive,
            implementation=self.implementation,
        )
        y = Dense(d, True, self.dtype, name="out")(y.reshape(*y.shape[:2], d))
        mlp = Mlp(spec.pool_mlp, spec.activation, dtype=self.dtype, name="mlp")
        return (y + mlp(Norm(spec.norm, spec.eps, name="norm")(y)))[:, 0]


class Head(nn.Module):
    """Linear head `[..., D] -> [..., classes]`, starting at 0; output in float32."""

    classes: int
    bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B K"]:
        zeros = nn.initializers.zeros
        y = x.astype(jnp.float32) if self.dtype == jnp.float32 else x
        kernel = self.param("kernel", zeros, (x.shape[-1], self.classes))
        y = jnp.matmul(
            y, kernel.astype(y.dtype), precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
        return y + self.param("bias", zeros, (self.classes,)) if self.bias else y
