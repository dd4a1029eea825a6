# SPDX-License-Identifier: Apache-2.0
"""The tokens pytree that blocks hand on.

Letters: B batch, N token slots, N0 original tokens, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens and what is known about them. Absent fields mean the undiminished case and cost nothing.

    Attributes:
      x: `[B, N, D]` features.
      size: `[B, N]` float32, how many original tokens a token stands for; None = all 1.
      alive: `[B, N]` float32 in {0, 1}, carries gradient; None = all 1. Dead slots stay dead.
      source: `[B, N0]` int32, the slot that holds each original token, -1 = pruned; None = slot i holds token i.
    """

    x: Float[Array, "B N D"]
    size: Float[Array, "B N"] | None = None
    alive: Float[Array, "B N"] | None = None
    source: Int[Array, "B N0"] | None = None

    def replace(self, **fields: Any) -> Tokens:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **fields)

    def weights(self) -> Float[Array, "B N"] | None:
        """float32 weight of each slot in a mean over original tokens: size where alive; None = all 1."""
        if self.size is None and self.alive is None:
            return None
        ones = jnp.ones(self.x.shape[:2], jnp.float32)
        return (ones if self.size is None else self.size) * (ones if self.alive is None else self.alive)


jax.tree_util.register_dataclass(Tokens, data_fields=["x", "size", "alive", "source"], meta_fields=[])
