# SPDX-License-Identifier: Apache-2.0
"""Visual tokens in the place of a text's placeholders, by counting them: no shape depends on where they stand.

Letters: B batch, N tokens, M visual tokens of a sample, I images, D width.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def splice(
    x: Float[Array, "B N D"], placeholder: Bool[Array, "B N"], visual: Float[Array, "B M D"]
) -> Float[Array, "B N D"]:
    """x, where placeholder number m of a sample becomes its visual token m. In x's dtype; superfluous visual tokens are
    not looked at, placeholders beyond M get the last one."""
    index = jnp.clip(jnp.cumsum(placeholder, axis=1) - 1, 0, visual.shape[1] - 1)
    taken = jnp.take_along_axis(visual.astype(x.dtype), index[:, :, None], axis=1)
    return jnp.where(placeholder[:, :, None], taken, x)


def places(placeholder: Bool[Array, "B N"], images: int) -> Int[Array, "B I"]:
    """The slot of each image's only placeholder; 0 where a sample has fewer."""
    number = jnp.cumsum(placeholder, axis=1) * placeholder
    wanted = jnp.arange(1, images + 1)[:, None]
    return jnp.argmax(number[:, None] == wanted, axis=-1).astype(jnp.int32)
