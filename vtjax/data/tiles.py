# SPDX-License-Identifier: Apache-2.0
"""Images cut into tiles for a tower that sees several of them: canvas, resize, padding, as transformers'
`MllamaImageProcessor` does it.

A canvas is rows x columns tiles; `canvases` lists those that the tower knows (`TiledViTSpec.aspect_ratios`), and the
number of one is its place there plus 1; 0 = no image. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from vtjax.data import transforms

Size = tuple[int, int]


class Tiled(NamedTuple):
    """An image as the tower takes it.

    Attributes:
      tiles: float32 `[T, h, w, 3]`, normalised, row by row of the canvas; zero where the image lacks the tile.
      aspect_ratio: the number of its canvas.
    """

    tiles: Float32[np.ndarray, "T h w 3"]
    aspect_ratio: int


def cut(
    image: UInt8[np.ndarray, "H W 3"],
    tile: Size,
    canvases: Sequence[Size],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    interpolation: str = "bilinear",
) -> Tiled:
    """An image resized to its best canvas, padded with black at the right and below, normalised, and cut.

    Args:
      image: one image.
      tile: size of a tile.
      canvases: those that the tower knows.
      mean, std: as for `transforms.normalise`.
      interpolation: one of `transforms.INTERPOLATIONS`.
    """
    size = image.shape[0], image.shape[1]
    number = canvas(size, tile, canvases)
    rows, columns = canvases[number - 1]
    new = fitted(size, (rows * tile[0], columns * tile[1]), tile)
    if new != size:
        image = np.asarray(Image.fromarray(image).resize(new[::-1], transforms.INTERPOLATIONS[interpolation]))
    whole = np.zeros((rows * tile[0], columns * tile[1], 3), np.uint8)
    whole[: new[0], : new[1]] = image
    cells = whole.reshape(rows, tile[0], columns, tile[1], 3).swapaxes(1, 2).reshape(-1, *tile, 3)
    tiles = np.zeros((max(math.prod(one) for one in canvases), *tile, 3), np.float32)
    tiles[: rows * columns] = transforms.normalise(cells, mean, std)
    return Tiled(tiles, number)


def canvas(size: Size, tile: Size, canvases: Sequence[Size]) -> int:
    """Number of the canvas on which an image of `size` is shown best: enlarged least, else shrunk least; of equal ones
    the smallest, then the first."""
    scales = [min(r * tile[0] / size[0], c * tile[1] / size[1]) for r, c in canvases]
    enlarging = [scale for scale in scales if scale >= 1]
    best = min(enlarging) if enlarging else max(scales)
    alike = [i for i, scale in enumerate(scales) if scale == best]
    return 1 + min(alike, key=lambda i: math.prod(canvases[i]))


def fitted(size: Size, within: Size, tile: Size) -> Size:
    """The size that an image gets on a canvas of `within` pixels: its aspect is kept, and no side is enlarged beyond
    the tile's."""
    target = [min(max(n, t), w) for n, t, w in zip(size, tile, within, strict=True)]
    scales = [t / n for t, n in zip(target, size, strict=True)]
    if scales[1] < scales[0]:
        return min(math.floor(size[0] * scales[1]) or 1, target[0]), target[1]
    return target[0], min(math.floor(size[1] * scales[0]) or 1, target[1])
