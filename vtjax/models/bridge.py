# SPDX-License-Identifier: Apache-2.0
"""The projector from a tower's tokens to a decoder's width. Its parameter names are an API."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vtjax.models.layers import Dense
from vtjax.ops import linear
from vtjax.spec import BridgeSpec


class Projector(nn.Module):
    """Two layers with exact GELU between them (LLaVA), or one."""

    spec: BridgeSpec
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N E"]) -> Float[Array, "B N D"]:
        if self.spec.projector == "mlp":
            x = linear.gelu(Dense(self.spec.hidden, self.spec.bias, self.dtype, name="up")(x))
        return Dense(self.width, self.spec.bias, self.dtype, name="down")(x)
