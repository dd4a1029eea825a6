# SPDX-License-Identifier: Apache-2.0
"""Rows in which several questions share a prefix (the image): who attends to whom, and sums per question.

Letters: B rows, S tokens, Q questions of a row, T types. `segments` int `[B, S]`: 0 = prefix, 1..Q = question, -1 =
padding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attention_mask(segments: Int[Array, "B S"]) -> Bool[Array, "B S S"]:
    """True where query (second axis) attends to key (third axis): to the prefix and to its own question, up to itself.

    Padding attends to itself only, so that no softmax is empty. A row with one question and no padding is plain causal
    attention.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    place = jnp.arange(segments.shape[1])
    causal = place[:, None] >= place[None, :]
    itself = place[:, None] == place[None, :]
    return (causal & (query >= 0) & ((key == 0) | (key == query))) | itself


def per_question(values: Float[Array, "B S"], segments: Int[Array, "B S"], questions: int) -> Float[Array, "B Q"]:
    """Sums of `values` over the tokens of each question, float32; prefix and padding count nowhere.

    With `values` = weight * cross entropy it is each question's loss; with weight * (argmax differs from the label) it
    is 0 exactly where greedy decoding says the whole answer and ends.
    """
    member = jax.nn.one_hot(segments - 1, questions, dtype=jnp.float32)
    return jnp.einsum("bs,bsq->bq", values.astype(jnp.float32), member, precision=jax.lax.Precision.HIGHEST)


def per_type(values: Float[Array, "B Q"], type: Int[Array, "B Q"], types: int) -> Float[Array, " T"]:
    """Sums of `values` over the questions of each type, float32; T = `types`, and -1 marks no question.

    Of ones it is the number of questions of each type, by which a sum becomes a mean.
    """
    member = jax.nn.one_hot(type, types, dtype=jnp.float32)
    return jnp.einsum("bq,bqt->t", values.astype(jnp.float32), member, precision=jax.lax.Precision.HIGHEST)
