# SPDX-License-Identifier: Apache-2.0
"""Losses and counts per example, in float32.

Letters: B batch, K classes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def cross_entropy(
    logits: Float[Array, "B K"],
    labels: Int[Array, " B"],
    *,
    label_smoothing: Float[Array, ""] | float = 0.0,
    labels2: Int[Array, " B"] | None = None,
    lam: Float[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """Cross entropy against a smoothed, possibly mixed target.

    The target is `(1 - s) (lam onehot(labels) + (1 - lam) onehot(labels2)) + s / K`, with s = `label_smoothing`.

    Args:
      logits: any float dtype; computed in float32.
      labels: class indices.
      label_smoothing: s in [0, 1); may be traced.
      labels2, lam: second label and the weight of the first (mixup, cutmix); both or neither.
    """
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))

    def picked(y: Int[Array, " B"]) -> Float[Array, " B"]:
        return jnp.take_along_axis(logp, y[:, None], axis=-1)[:, 0]

    hit = picked(labels)
    if labels2 is not None and lam is not None:
        hit = lam * hit + (1.0 - lam) * picked(labels2)
    return -(1.0 - label_smoothing) * hit - label_smoothing * logp.mean(-1)


def divergence(teacher: Float[Array, "B K"], student: Float[Array, "B K"]) -> Float[Array, " B"]:
    """Kullback-Leibler divergence of the student's distribution from the teacher's, in float32; 0 where they agree."""
    known, said = (jax.nn.log_softmax(logits.astype(jnp.float32)) for logits in (teacher, student))
    return (jnp.exp(known) * (known - said)).sum(-1)


def top_k_correct(logits: Float[Array, "B K"], labels: Int[Array, " B"], k: int) -> Bool[Array, " B"]:
    """True where fewer than `k` classes rank before the label; a tie goes to the lower class index, as in argmax.

    A row with a non-finite label logit is never correct.
    """
    logits = logits.astype(jnp.float32)
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    index = jnp.arange(logits.shape[-1])
    before = (logits > own) | ((logits == own) & (index < labels[:, None]))
    return (before.sum(-1) < k) & jnp.isfinite(own[:, 0])
