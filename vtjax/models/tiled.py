# SPDX-License-Identifier: Apache-2.0
"""The tower of a `TiledViTSpec`: embed, local blocks, global blocks, and the tokens of some layers side by side.

Letters: B images, t tiles that are given, T tiles of the spec, N tokens of a tile, D width, E width of the output.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vtjax.errors import InputError
from vtjax.models import segments
from vtjax.models.layers import Block, Dense, Norm, identity, patches
from vtjax.models.segments import block_name, call_module
from vtjax.ops import attention
from vtjax.ops.tokens import Tokens
from vtjax.spec import TiledViTSpec

Params = dict[str, Any]
Images = Float[Array | np.ndarray, "B H W C"] | Float[Array | np.ndarray, "B t H W C"]
Ratio = Int[Array | np.ndarray, " B"]


@dataclasses.dataclass(frozen=True)
class TiledViT:
    """A buildable model. Hashable, so it may be a static argument.

    Attributes:
      spec: what to build.
      dtype: compute dtype; parameters stay float32, norms and softmax are computed in float32.
      remat, scan: see `models.segments`.
      constrain: applied to activations `[B,T*N,D]`; sharding is injected here.

    Raises:
      InputError: another spec, or an unknown remat policy.
    """

    spec: TiledViTSpec
    dtype: Any = jnp.float32
    remat: str = "none"
    scan: bool = False
    constrain: Callable[[Array], Array] = identity

    def __post_init__(self) -> None:
        if not isinstance(self.spec, TiledViTSpec):
            raise InputError(f"a TiledViT is built from a TiledViTSpec, found {type(self.spec).__name__}")
        segments.check(self.remat, self.scan)

    def blocks(self) -> list[Block]:
        """One module per layer, local ones first."""
        family = dataclasses.replace(self.spec.plain, blocks=self.spec.blocks[:1])
        return [
            Block(family, block, dtype=self.dtype, implementation=attention.filled, gated=index >= self.spec.local)
            for index, block in enumerate(self.spec.blocks)
        ]

    def init(self, key: Array) -> Params:
        """Fresh float32 parameters; jit it. Equal blocks share one traced initialiser."""
        spec, keys = self.spec, jax.random.split(key, 4)
        images = jnp.zeros((1, spec.tiles, *spec.image_size, spec.channels))
        one, ratio = jnp.zeros((1, 1, spec.width), self.dtype), jnp.ones(1, jnp.int32)
        return {
            "embed": TiledEmbed(spec, self.dtype).init(keys[0], images, ratio)["params"],
            **segments.init(self.blocks(), keys[1], Tokens(one, alive=jnp.ones((1, 1)))),
            **{name: self._norm.init(keys[2], one)["params"] for name in ("norm_before", "norm")},
            "tiles": TileEmbed(spec).init(keys[3], jnp.zeros((1, spec.tiles, 1, spec.width)), ratio)["params"],
        }

    def apply(
        self, params: Params, images: Images, aspect_ratio: Ratio | None = None
    ) -> tuple[Float[Array, "B M E"], dict[str, Any]]:
        """Runs the model.

        Args:
          params: as from `init` or `vtjax.load` (jax or numpy arrays).
          images: float32, already normalised: the t <= T first tiles of each image, row by row of its canvas, or images
            of one tile.
          aspect_ratio: number of each image's canvas in `spec.aspect_ratios`, from 1; 0 = no image, whose tokens mean
            nothing. None = one tile each.

        Returns:
          y: tokens `[B, T*N, E]` in the compute dtype, tile by tile: those of the last block, then, feature by feature,
            those that enter the layers `spec.features`.
          aux: `features` (y) and `tokens` (the same as Tokens, `alive` 0 for tiles that an image lacks).

        Raises:
          InputError: images of another size, more tiles than the spec's, or aspect ratios that do not fit them (where
            the values are known, which they are not inside `jit`).
        """
        spec = self.spec
        images = images[:, None] if images.ndim == 4 else images
        check_tiles(spec, images.shape, aspect_ratio)
        params, images = jax.tree.map(jnp.asarray, (params, images))
        b, given = images.shape[:2]
        ratio = jnp.ones(b, jnp.int32) if aspect_ratio is None else jnp.asarray(aspect_ratio)
        images = jnp.pad(images, ((0, 0), (0, spec.tiles - given), *[(0, 0)] * 3))
        x = call_module(TiledEmbed(spec, self.dtype), params["embed"], images, ratio)
        x = call_module(self._norm, params["norm_before"], x)

        count = jnp.asarray([0, *map(math.prod, spec.aspect_ratios)])[ratio]
        place, token = jnp.arange(spec.tiles)[None, :, None], jnp.arange(spec.padded_tokens)
        # Without any tile, as with no image, softmax would have nothing to divide by.
        alive = (place < jnp.maximum(count, 1)[:, None, None]) & (token < spec.tile_tokens)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, spec.padded_tokens - spec.tile_tokens), (0, 0)))
        tokens = Tokens(
            self.constrain(x.reshape(b, spec.tokens, spec.width)), alive=alive.reshape(b, -1).astype(jnp.float32)
        )
        entering = tokens.x
        tokens, blocks = self._run(params, tokens, 0, spec.local, tuple(i - 1 for i in spec.features if i))
        kept = [blocks[i - 1]["tokens"].x if i else entering for i in spec.features]

        x = call_module(self._norm, params["norm"], tokens.x)
        x = call_module(TileEmbed(spec), params["tiles"], self._by_tile(x), ratio)
        tokens, _ = self._run(params, tokens.replace(x=x.reshape(tokens.x.shape)), spec.local, spec.depth)
        y = self._by_tile(tokens.x)[:, :, : spec.tile_tokens]
        if kept:
            together = self._by_tile(jnp.stack(kept, -1))[:, :, : spec.tile_tokens]
            y = jnp.concatenate([y, together.reshape(*y.shape[:3], -1)], -1)
        live = jnp.broadcast_to(place < count[:, None, None], y.shape[:3]).reshape(b, -1).astype(jnp.float32)
        y = y.reshape(b, -1, spec.output_width)
        return y, {"features": y, "tokens": Tokens(y, alive=live)}

    def _run(
        self, params: Params, tokens: Tokens, start: int, stop: int, keep: tuple[int, ...] = ()
    ) -> tuple[Tokens, list[dict[str, Any]]]:
        """Blocks `start` to `stop`."""
        own = {block_name(i - start): params.get(block_name(i), {}) for i in range(start, stop)}
        options: dict[str, Any] = {"remat": self.remat, "scan": self.scan, "constrain": self.constrain}
        return segments.run(self.blocks()[start:stop], own, tokens, keep=keep, **options)

    def _by_tile(self, x: Array) -> Array:
        return x.reshape(len(x), self.spec.tiles, self.spec.padded_tokens, *x.shape[2:])

    @property
    def _norm(self) -> Norm:
        return Norm("layernorm", self.spec.eps)


def check_tiles(spec: TiledViTSpec, shape: tuple[int, ...], aspect_ratio: Any) -> None:
    """Raises InputError for images of `shape` `[..., t, H, W, C]`, and aspect ratios `[...]`, that do not fit."""
    size = (*spec.image_size, spec.channels)
    if len(shape) < 4 or tuple(shape[-3:]) != size:
        raise InputError(f"images must be [..., tiles, {', '.join(map(str, size))}], found {list(shape)}")
    *lead, given = shape[:-3]
    if not 1 <= given <= spec.tiles:
        raise InputError(f"images must have 1..{spec.tiles} tiles, found {given}")
    if aspect_ratio is None:
        if given > 1:
            raise InputError(f"images of several tiles need aspect_ratio {lead}, found none for {given} tiles")
        return
    if list(aspect_ratio.shape) != lead:
        raise InputError(f"aspect_ratio must be {lead}, found {list(aspect_ratio.shape)}")
    if isinstance(aspect_ratio, jax.core.Tracer):
        return
    numbers, most = np.asarray(aspect_ratio), len(spec.aspect_ratios)
    if (wrong := numbers[(numbers < 0) | (numbers > most)]).size:
        raise InputError(f"aspect_ratio must be in 0..{most} (0 = no image), found {wrong[0]}")
    for number in np.unique(numbers[numbers > 0]):
        rows, columns = spec.aspect_ratios[number - 1]
        if rows * columns > given:
            raise InputError(f"aspect_ratio {number} has {rows} x {columns} tiles, found images of {given}")


class TileEmbed(nn.Module):
    """Adds to all tokens of a tile the row of its place and of the image's aspect ratio, times the tanh of a gate."""

    spec: TiledViTSpec

    @nn.compact
    def __call__(self, x: Float[Array, "B T N D"], ratio: Int[Array, " B"]) -> Float[Array, "B T N D"]:
        spec = self.spec
        shape = (1 + len(spec.aspect_ratios), spec.tiles, spec.width)
        table = self.param("table", nn.initializers.normal(0.02), shape)
        gate = self.param("gate", nn.initializers.zeros, (1,))
        return x + (jnp.tanh(gate) * table[ratio][:, :, None]).astype(x.dtype)


class TiledEmbed(nn.Module):
    """Patches, class token and positions: images `[B,T,H,W,C]` -> tokens `[B,T,N,D]`. One gate goes from positions
    that all tiles share to those of the tile in its aspect ratio."""

    spec: TiledViTSpec
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B T H W C"], ratio: Int[Array, " B"]) -> Float[Array, "B T N D"]:
        spec, d = self.spec, self.spec.width
        b, tiles = images.shape[:2]
        x = patches(images.astype(self.dtype).reshape(-1, *images.shape[2:]), spec.patch)
        x = Dense(d, False, self.dtype, nn.initializers.lecun_normal(), name="patch")(x)
        x = TileEmbed(spec, name="tiles")(x.reshape(b, tiles, -1, d), ratio)
        small = nn.initializers.normal(d**-0.5)
        first = self.param("class_token", small, (d,)).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (b, tiles, 1, d)), x], axis=2)
        pos = self.param("pos", small, (spec.tile_tokens, d))
        gate = jnp.tanh(self.param("pos_gate", nn.initializers.zeros, (1,)))
        shape = (1 + len(spec.aspect_ratios), spec.tiles, spec.tile_tokens, d)
        own = self.param("tile_pos", nn.initializers.normal(0.02), shape)
        return x + ((1 - gate) * pos + gate * own[ratio]).astype(x.dtype)
