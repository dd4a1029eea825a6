# SPDX-License-Identifier: Apache-2.0
"""Attention of text to visual tokens, and which row of the text sees which images.

Letters: B batch, N rows of the text, M visual tokens, H query heads, K key and value heads (a divisor of H), D head
width, E width of the visual tokens, I images.

One form of mask says it all: a row sees the images `low .. high`, a visual token has the number of its image, counted
from 1 in its sample; 0 is padding. A row that sees nothing gives 0, with a log-sum-exp of -inf and no gradients.
(Hugging Face's Llama 3.2 Vision lets such rows attend to everything evenly.) Scores and statistics are float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vtjax.ops import linear, partial_softmax

SAVED = ("cross_attention_o", "cross_attention_lse")
"""What a layer has to keep for its backward pass, by `checkpoint_name`. With `save_only_these_names(*SAVED)` around a
distributed form queries, keys and values are projected again, and the attention is not done again (spec section 2)."""

Attend = Callable[..., tuple[Array, Array]]
"""`(q, k, v, *, low, high, number) -> (y, lse)` with the meaning that `attend` gives them; a distributed form takes its
place."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """What the rows of a text may look at. Rows and visual tokens may come in any order.

    Attributes:
      x: `[B, M, E]` visual tokens; None where keys and values are known (a cache).
      number: `[B, M]` int32, the image of each, from 1; 0 = padding.
      position: `[B, M]` int32, place of that image in the text.
      low, high: `[B, N]` int32: the images that a row sees, first to last; high < low = none.
      holder: `[B, P]` int32, where a tower has merged and pruned: for every patch of the images the place of the token
        that holds it, among those of its image; -1 = pruned. None = each is its own.
    """

    x: Float[Array, "B M E"] | None
    number: Int[Array, "B M"]
    position: Int[Array, "B M"]
    low: Int[Array, "B N"]
    high: Int[Array, "B N"]
    holder: Int[Array, "B P"] | None = None

    def seeing(self) -> Bool[Array, "B N"]:
        """Which rows see an image."""
        return self.high >= self.low


jax.tree_util.register_dataclass(
    Memory, data_fields=["x", "number", "position", "low", "high", "holder"], meta_fields=[]
)


def on_grid(memory: Memory, patches: int) -> Memory:
    """The visual tokens as the patches of their images, of so many each: a merged patch has what its holder has, a
    pruned one is padding. Image by image, so that nothing moves between devices that hold images."""
    if memory.holder is None:
        return memory
    assert memory.x is not None
    images = memory.holder.shape[1] // patches
    x, number, position, holder = (
        a.reshape(len(a), images, -1, *a.shape[2:]) for a in (memory.x, memory.number, memory.position, memory.holder)
    )
    x = jnp.take_along_axis(x, jnp.maximum(holder, 0)[..., None], axis=2)
    number = jnp.where(holder >= 0, number.max(2, keepdims=True), 0)
    position = jnp.broadcast_to(position.max(2, keepdims=True), holder.shape)
    x, number, position = (a.reshape(len(a), images * patches, *a.shape[3:]) for a in (x, number, position))
    return dataclasses.replace(memory, x=x, number=number, position=position, holder=None)


def attend(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M K D"],
    v: Float[Array, "B M K D"],
    *,
    low: Int[Array, "B N"],
    high: Int[Array, "B N"],
    number: Int[Array, "B M"],
) -> tuple[Float[Array, "B N H D"], Float[Array, "B N H"]]:
    """Softmax attention, scaled by D ** -0.5, on this device.

    Args:
      q, k, v: float32 or bfloat16 (or float64); query heads h K / H .. share key head floor(h K / H).
      low, high: the images that a row sees.
      number: the image of each key, from 1; padding (0) is never read, whatever it holds.

    Returns:
      y in q's dtype, and the natural log-sum-exp of the scores, float32 (float64), -inf where a row sees nothing.
    """
    b, n, heads, d = q.shape
    kv_heads = k.shape[2]
    k, v = (partial_softmax.without_padding(number, x) for x in (k, v))
    grouped = (q * d**-0.5).reshape(b, n, kv_heads, heads // kv_heads, d)
    precision, dtype = linear.precision(q), partial_softmax.statistics(q)
    scores = jnp.einsum("bnkgd,bmkd->bkgnm", grouped, k, precision=precision, preferred_element_type=dtype)
    seen = partial_softmax.seen(low, high, number)[:, None, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    largest = partial_softmax.finite(jax.lax.stop_gradient(scores.max(-1, initial=-jnp.inf)))
    weight = jnp.exp(scores - largest[..., None])
    y = jnp.einsum("bkgnm,bmkd->bkgnd", weight.astype(v.dtype), v, precision=precision, preferred_element_type=dtype)
    y, lse = partial_softmax.normalised(y, largest, weight.sum(-1))
    y = y.transpose(0, 3, 1, 2, 4).reshape(b, n, heads, d)
    return y.astype(q.dtype), lse.transpose(0, 3, 1, 2).reshape(b, n, heads)


def interval(placeholder: Bool[Array, "B N"], sees: str) -> tuple[Int[Array, "B N"], Int[Array, "B N"]]:
    """`low, high` of every row, from where the images stand in the text.

    Args:
      placeholder: True at the one token that stands for an image.
      sees: "all" images of the sample; "before": those at or before the row; "latest": the last one of these; "run":
        of these the last ones that follow each other without text between them (Llama 3.2 Vision).
    """
    count = jnp.cumsum(placeholder, axis=1, dtype=jnp.int32)
    if sees == "all":
        return jnp.ones_like(count), jnp.broadcast_to(count[:, -1:], count.shape)
    if sees == "before":
        return jnp.ones_like(count), count
    if sees == "latest":
        return jnp.maximum(count, 1), count
    begins = placeholder & ~jnp.pad(placeholder, ((0, 0), (1, 0)))[:, :-1]
    first = jax.lax.cummax(jnp.where(begins, count, 0), axis=1)
    return jnp.maximum(first, 1), count


@jax.custom_vjp
def in_turn(x: Array, y: Array) -> tuple[Array, Array]:
    """`(x, y)` as they are, for a layer that reads `y` and hands it on to the next: in the backward pass what the layer
    adds to the gradient of `y` is added before the layers in front of it begin.

    Without it XLA adds the parts of all layers at once and keeps them until then: copies of `y` by the dozen, next to
    which what recomputation saves is little (experiments/lvxattn, "Memory"). Only where the gradient of `y` is wanted:
    it is computed then, needed or not.
    """
    return x, y


def _in_turn_back(_: None, gradients: tuple[Array, Array]) -> tuple[Array, Array]:
    return jax.lax.optimization_barrier(gradients)


in_turn.defvjp(lambda x, y: ((x, y), None), _in_turn_back)
