# SPDX-License-Identifier: Apache-2.0
"""The spec of a vision tower that sees an image as several tiles."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from vtjax.errors import InputError
from vtjax.spec import fields
from vtjax.spec.base import Lineage, ModelSpec, check_blocks
from vtjax.spec.vit import ACTIVATIONS, BlockSpec, Preprocess, ViTSpec

MULTIPLE = 8
"""Every tile's tokens are filled up to a multiple of it."""

TILE_PREPROCESS = Preprocess(crop=1.0, interpolation="bilinear")


@dataclasses.dataclass(frozen=True)
class TiledViTSpec(ModelSpec):
    """The tower of Llama 3.2 Vision: local blocks and gated global blocks over the tokens of all tiles of an image.

    A tile's tokens are a class token and its patches row by row. An image is laid on a canvas of rows x columns tiles,
    by the number of its aspect ratio (`aspect_ratios`, from 1; 0 = no image). All of `tiles` tiles are always computed:
    what an image lacks is filled up, and the tokens of the image attend to the filling, as in the original.

    Source: transformers' `MllamaVisionModel`.

    Attributes:
      image_size: (height, width) of a tile in pixels, multiples of `patch`.
      patch: patch side in pixels.
      width: D, the width of the residual stream.
      blocks: one `BlockSpec` per layer, local ones first.
      tiles: most tiles of an image.
      global_blocks: how many of the last blocks are global: after the norm and another embedding of the tiles, each
        branch times the tanh of its gate.
      features: local layers, ascending; the tokens that enter them stand beside those of the last block in the output
        (the number of local layers: what leaves the last of them).
      channels: input channels.
      eps: of all norms (LayerNorm).
      activation: of the MLPs, as in `ViTSpec`.
      preprocess: normalisation and interpolation that the weights expect.
      lineage: surgery history, oldest first.
    """

    image_size: tuple[int, int]
    patch: int
    width: int
    blocks: tuple[BlockSpec, ...]
    tiles: int
    global_blocks: int
    features: tuple[int, ...] = ()
    channels: int = 3
    eps: float = 1e-5
    activation: str = "gelu"
    preprocess: Preprocess = TILE_PREPROCESS
    lineage: tuple[Lineage, ...] = ()

    @classmethod
    def uniform(
        cls,
        *,
        depth: int,
        global_blocks: int,
        width: int,
        heads: int,
        mlp: int | None = None,
        image_size: int | tuple[int, int] = 560,
        patch: int = 14,
        tiles: int = 4,
        **rest: Any,
    ) -> TiledViTSpec:
        """A spec with `depth` equal local blocks and `global_blocks` global ones; defaults as `ViTSpec.uniform`'s."""
        if heads <= 0 or width % heads:
            raise InputError(f"width must be a multiple of heads, found width={width}, heads={heads}")
        size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        block = {"heads": heads, "head_dim": width // heads, "mlp": 4 * width if mlp is None else mlp}
        values = {"image_size": size, "patch": patch, "width": width, "blocks": [block] * (depth + global_blocks)}
        values |= {"tiles": tiles, "global_blocks": global_blocks, **rest}
        return fields.build(cls, fields.plain(values), cls.__name__)

    def __post_init__(self) -> None:
        fields.choice(self, "activation", ACTIVATIONS)
        for name in ("patch", "width", "channels", "tiles"):
            if getattr(self, name) <= 0:
                raise InputError(f"TiledViTSpec.{name} must be positive, found {getattr(self, name)}")
        for side in self.image_size:
            if side <= 0 or side % self.patch:
                raise InputError(
                    f"TiledViTSpec.image_size must be a positive multiple of patch={self.patch}, "
                    f"found {self.image_size}"
                )
        check_blocks(self)
        if not 1 <= self.global_blocks < self.depth:
            raise InputError(
                f"TiledViTSpec.global_blocks must be at least 1 and leave a local one of {self.depth}, "
                f"found {self.global_blocks}"
            )
        if list(self.features) != sorted(set(self.features)) or not set(self.features) <= set(range(self.local + 1)):
            raise InputError(
                f"TiledViTSpec.features must ascend within 0..{self.local} (the local layers), found {self.features}"
            )
        if not 0 <= self.eps < math.inf:
            raise InputError(f"TiledViTSpec.eps must be 0 or more, found {self.eps}")
        if any(block.reduce is not None for block in self.blocks):
            raise InputError("TiledViTSpec.blocks must not reduce tokens, whose places are those of the tiles")

    @property
    def plain(self) -> ViTSpec:
        """The ViT whose class token, patches, norms and blocks these are, for one tile and without the gates."""
        return ViTSpec(
            image_size=self.image_size,
            patch=self.patch,
            width=self.width,
            blocks=self.blocks,
            channels=self.channels,
            patch_bias=False,
            eps=self.eps,
            norm_before=True,
            pooling="none",
            qkv_bias=False,
            out_bias=False,
            activation=self.activation,
        )

    @property
    def local(self) -> int:
        """How many blocks are local: those before the global ones."""
        return self.depth - self.global_blocks

    @property
    def aspect_ratios(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of every canvas; number n, from 1, is at place n - 1."""
        return aspect_ratios(self.tiles)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of a tile's patches."""
        return self.image_size[0] // self.patch, self.image_size[1] // self.patch

    @property
    def prefix(self) -> int:
        """Leading tokens of a tile that are not patches."""
        return 1

    @property
    def tile_tokens(self) -> int:
        """Tokens of one tile that leave the tower."""
        return self.prefix + self.grid[0] * self.grid[1]

    @property
    def padded_tokens(self) -> int:
        """Tokens of one tile inside the tower."""
        return -(-self.tile_tokens // MULTIPLE) * MULTIPLE

    @property
    def tokens(self) -> int:
        """N: tokens that the blocks see."""
        return self.tiles * self.padded_tokens

    @property
    def output_width(self) -> int:
        """Width of the tokens that leave the tower."""
        return self.width * (1 + len(self.features))


def aspect_ratios(tiles: int) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of every canvas of at most `tiles` tiles, in the order of their numbers."""
    sides = range(1, tiles + 1)
    return tuple((rows, columns) for rows in sides for columns in sides if rows * columns <= tiles)
