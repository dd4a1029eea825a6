# SPDX-License-Identifier: Apache-2.0
"""Linen modules of fusion encoders. Their parameter names are an API (docs/parameter-names.md).

Letters: B batch, N tokens of a stream, M of the stream it attends to, D width, H heads, d head width.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vtjax.models.layers import Adapter, Dense, Knobs, Mlp, Norm
from vtjax.ops import attention as attention_op
from vtjax.ops.linear import precision
from vtjax.spec import BlockSpec, FusionSpec

SITES = ("self", "cross", "out")
"""Where an adapter acts in a post-norm layer: beside either attention, within the sum that is normed; or beside the
MLP, behind the layer's last norm."""


def dropped(x: Array, rate: float, key: Array | None, number: int) -> Array:
    """`x` with dropout, or `x` where there is no key."""
    if key is None or not rate:
        return x
    keep = jax.random.bernoulli(jax.random.fold_in(key, number), 1.0 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), 0)


def readable(alive: Float[Array, "B M"] | None) -> Float[Array, "B M"] | None:
    """Which keys are read. Where a row has none, all: so does BERT's mask of -10000 behave, and nothing is NaN."""
    return None if alive is None else jnp.where(alive.any(1, keepdims=True), alive, 1.0)


class PostAttention(nn.Module):
    """Attention of BERT: of one stream to itself or to another."""

    spec: BlockSpec
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        y: Float[Array, "B M D"],
        alive: Float[Array, "B M"] | None,
        key: Array | None = None,
    ) -> Float[Array, "B N D"]:
        """`alive`: 1 for keys that are read; None = all."""
        heads, head_dim = self.spec.heads, self.spec.head_dim

        def project(name: str, a: Array) -> Array:
            a = Dense(heads * head_dim, True, self.dtype, name=name)(a)
            return a.reshape(*a.shape[:2], heads, head_dim)

        q, k, v = project("query", x), project("key", y), project("value", y)
        alive = readable(alive)
        if key is None or not self.dropout:
            found, _ = attention_op.attention(q, k, v, alive=alive)
        else:
            found = _with_dropout(q, k, v, alive, self.dropout, key)
        return Dense(x.shape[-1], True, self.dtype, name="out")(found.reshape(*x.shape[:2], heads * head_dim))


def _with_dropout(q: Array, k: Array, v: Array, alive: Array | None, rate: float, key: Array) -> Array:
    """Attention whose weights are dropped, for training; no kernel does that."""
    scores = jnp.einsum("bnhd,bmhd->bhnm", q * q.shape[-1] ** -0.5, k, precision=precision(q)).astype(jnp.float32)
    if alive is not None:
        scores = jnp.where(alive[:, None, None] > 0.5, scores, -jnp.inf)
    weight = dropped(jax.nn.softmax(scores), rate, key, 0).astype(v.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", weight, v, precision=precision(q))


class PostLayer(nn.Module):
    """A post-norm layer of BERT or, with `cross`, a branch of a METER fusion layer (DAS spec, section 3.2):

    a = norm1(self(x) + x + u1(x)); b = norm2(cross(a, y) + a + u2(a)); norm3(mlp(b) + b) + u3(b). Without `cross`,
    b = a, and there is no norm2.

    Attributes:
      adapters: `(site, function)` pairs, `function(x, knobs) -> array`, sites as in `SITES`.
    """

    spec: BlockSpec
    eps: float
    cross: bool
    adapters: tuple[tuple[str, Adapter], ...] = ()
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        y: Float[Array, "B M D"] | None = None,
        alive: Float[Array, "B N"] | None = None,
        other_alive: Float[Array, "B M"] | None = None,
        knobs: Knobs | None = None,
        key: Array | None = None,
    ) -> Float[Array, "B N D"]:
        """Args:
        x: this stream.
        y: the other one, as it was before this layer; None without `cross`.
        alive, other_alive: 1 for tokens, 0 for padding, of x and of y; None = no padding.
        knobs: the parameters of the adapters.
        key: for dropout; None = none.
        """
        adapters, knobs = dict(self.adapters), knobs or {}

        def norm(number: int, a: Array) -> Array:
            return Norm("layernorm", self.eps, name=f"norm{number}")(a)

        def drop(a: Array, number: int) -> Array:
            return dropped(a, self.dropout, key, number)

        def beside(site: str, a: Array) -> Array | float:
            return adapters[site](a, knobs) if site in adapters else 0.0

        def attend(name: str, number: int, a: Array, b: Array, alive: Array | None) -> Array:
            inner = None if key is None else jax.random.fold_in(key, number)
            return PostAttention(self.spec, self.dropout, self.dtype, name=name)(a, b, alive, inner)

        a = norm(1, drop(attend("self", 10, x, x, alive), 1) + x + beside("self", x))
        if self.cross:
            assert y is not None
            a = norm(2, drop(attend("cross", 20, a, y, other_alive), 2) + a + beside("cross", a))
        mlp = Mlp(self.spec.mlp, "gelu", dtype=self.dtype, name="mlp")
        return norm(3, drop(mlp(a), 3) + a) + beside("out", a)


class TextEmbed(nn.Module):
    """Embedding of a text as in BERT: tokens, positions, the type that all of them have, norm."""

    spec: FusionSpec
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "B N"]) -> Float[Array, "B N D"]:
        spec, small = self.spec, nn.initializers.normal(0.02)
        tokens = self.param("tokens", small, (spec.vocab, spec.width))
        pos = self.param("pos", small, (spec.positions, spec.width))
        x = tokens[ids] + pos[: ids.shape[1]] + self.param("type", small, (spec.width,))
        return Norm("layernorm", spec.text_eps, name="norm")(x).astype(self.dtype)


class Marks(nn.Module):
    """What is known of a token's stream: `type [1 + I, D]`, added to text and image; and with two streams `text`,
    `image`, their projections, and `first [D]`, the trained vector that takes the place of the text's first token.

    Attributes:
      number: of the image, from 0.
    """

    spec: FusionSpec
    number: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, text: Float[Array, "B N D"], image: Float[Array, "B M E"]
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B M D"]]:
        spec, small = self.spec, nn.initializers.normal(0.02)
        if spec.streams == 2:
            first = self.param("first", small, (spec.width,)).astype(text.dtype)
            text = text.at[:, 0].set(first)
            text, image = (
                Dense(spec.width, True, self.dtype, name=n)(a) for n, a in (("text", text), ("image", image))
            )
        kinds = self.param("type", small, (1 + spec.images, spec.width)).astype(text.dtype)
        return text + kinds[0], image + kinds[1 + self.number]


class Pooler(nn.Module):
    """tanh of a linear map of a stream's first token."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B D"]:
        return jnp.tanh(Dense(x.shape[-1], True, self.dtype, name="dense")(x))


class FusionHead(nn.Module):
    """down(gelu(norm(up x))), to float32 logits."""

    hidden: int
    classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B K"]:
        hidden = Dense(self.hidden, True, self.dtype, name="up")(x)
        hidden = Norm("layernorm", 1e-5, name="norm")(hidden)
        return Dense(self.classes, True, self.dtype, name="down")(nn.gelu(hidden, approximate=False)).astype(
            jnp.float32
        )


class RankHead(nn.Module):
    """A score to rank pairs of text and image by, and logits of whether they belong together, float32."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B D"]) -> tuple[Float[Array, "B 1"], Float[Array, "B 2"]]:
        rank, match = (Dense(size, True, self.dtype, name=name)(x) for name, size in (("rank", 1), ("match", 2)))
        return rank.astype(jnp.float32), match.astype(jnp.float32)
