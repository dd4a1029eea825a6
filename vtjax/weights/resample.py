# SPDX-License-Identifier: Apache-2.0
"""Position embeddings at other resolutions, in numpy.

Two conventions exist. timm (`resample_abs_pos_embed`) uses bicubic with antialiasing, which in PyTorch means Keys'
kernel with a = -0.5, widened by the scale when shrinking, and weights that are renormalised at the border. Hugging
Face's `interpolate_pos_encoding` is bicubic without antialiasing: a = -0.75, four taps, the border repeated (its DINOv2
with registers is the exception: it does as timm does).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float

from vtjax.errors import InputError
from vtjax.spec import ViTSpec
from vtjax.weights.names import Params

METHODS = ("timm", "hf")


def matrix(old: int, new: int, method: str = "timm") -> Float[np.ndarray, "new old"]:
    """Weights of a bicubic resize of one axis: `resized = matrix @ original`, pixel centres at half-integers.

    Source: Keys 1981; the conventions of `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)` with
    (`method="timm"`) and without (`method="hf"`) `antialias=True`. float64.
    """
    scale = old / new
    out = np.zeros((new, old))
    if method == "hf":
        for i in range(new):
            centre = (i + 0.5) * scale - 0.5
            left = math.floor(centre)
            for tap in range(left - 1, left + 3):
                out[i, min(max(tap, 0), old - 1)] += _keys(centre - tap, -0.75)
        return out
    stretch = max(scale, 1.0)
    for i in range(new):
        centre = (i + 0.5) * scale
        start = max(int(centre - 2 * stretch + 0.5), 0)
        stop = min(int(centre + 2 * stretch + 0.5), old)
        taps = np.arange(start, stop)
        out[i, start:stop] = [_keys((t + 0.5 - centre) / stretch, -0.5) for t in taps]
    return out / out.sum(1, keepdims=True)


def position_embedding(
    pos: Float[np.ndarray, "N D"], prefix: int, old: tuple[int, int], new: tuple[int, int], method: str = "timm"
) -> Float[np.ndarray, "M D"]:
    """Position embedding of another grid.

    Args:
      pos: rows for `prefix` leading tokens, then the patches of the old grid, row by row.
      prefix: rows that are copied.
      old, new: (rows, columns) of patches.
      method: "timm" or "hf".

    Returns:
      float32 `[prefix + new[0] * new[1], D]`; `pos` itself where the grids are equal.
    """
    if old == new:
        return pos
    grid = pos[prefix:].astype(np.float64).reshape(*old, -1)
    grid = np.einsum(
        "ip,jq,pqd->ijd", matrix(old[0], new[0], method), matrix(old[1], new[1], method), grid, optimize=True
    )
    return np.concatenate([pos[:prefix], grid.reshape(new[0] * new[1], -1).astype(np.float32)])


def resize(
    spec: ViTSpec, params: Params, image_size: int | tuple[int, int], *, method: str = "timm"
) -> tuple[ViTSpec, Params]:
    """The same model at another resolution: resamples `embed/pos`, everything else is shared with `params`.

    Args:
      spec, params: the model.
      image_size: (height, width) in pixels, or one number for a square; multiples of the patch.
      method: "timm" (bicubic, antialiased; the default for every model) or "hf" (what transformers does for vit, deit,
        dinov2, clip and siglip under `interpolate_pos_encoding=True`).

    Raises:
      InputError: an unknown method, or a size that is no multiple of the patch.
    """
    if method not in METHODS:
        raise InputError(f"resize method must be one of {', '.join(METHODS)}, found {method!r}")
    size = (image_size, image_size) if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))
    resized = spec.edit(image_size=size)
    if spec.pos != "learned" or resized.grid == spec.grid:
        return resized, params
    embed: dict[str, Any] = dict(params["embed"])
    pos = np.asarray(embed["pos"], np.float32)
    embed["pos"] = position_embedding(pos, spec.pos_prefix, spec.grid, resized.grid, method)
    return resized, {**params, "embed": embed}


def _keys(x: float, a: float) -> float:
    x = abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0
