# SPDX-License-Identifier: Apache-2.0
"""The spec of an encoder that fuses a text and an image: ViLT's single stream, METER's two."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from vtjax.errors import InputError
from vtjax.spec import fields
from vtjax.spec.adapter import AdapterSpec, skip_list
from vtjax.spec.base import Lineage, ModelSpec, check_blocks
from vtjax.spec.vit import BlockSpec, ViTSpec
from vtjax.spec.vlm import TextSpec


@dataclasses.dataclass(frozen=True)
class FusionSpec(ModelSpec):
    """A vision-language encoder with a head, and DAS's adapters.

    One stream (ViLT): pre-norm blocks over text and patches. Two streams (METER): a text encoder, an image tower, and
    post-norm fusion layers in which each stream attends to itself and to the other one.

    `blocks` are the *modules* that may be skipped, in DAS's order of arms. One stream: the blocks. Two: the text
    branches of all fusion layers, their image branches, then the layers of the text encoder. A skipped one stays in
    the spec with `attn=False, ffn=False` (attention to the other stream goes with it), `adapter` its stand-in's width.

    Attributes:
      streams: 1 or 2.
      width: D, of all streams.
      blocks: one per module.
      image: of two streams the tower, which is never skipped. Of one stream how patches become tokens, and what the
        blocks have in common (norms, biases, activation); its own blocks are not there.
      vocab: V, rows of the token embedding.
      positions: longest text.
      fusion: of two streams, the number of fusion layers F.
      arms: how many modules, from the first, a search may skip: 2 F keeps to the fusion layers ("DAS-Fusion"); 0 = all
        of them ("DAS-Global").
      eps: of the norms of fusion layers.
      text_eps: of those of the text's embedding and encoder.
      inner: adapters inside of kept blocks and fusion layers, not of the text encoder; None = none.
      skip: what stands in for a skipped block or fusion layer; None = nothing, which leaves the identity.
      encoder_skip: the same for layers of the text encoder.
      dropout: rate in post-norm layers while training, on attention weights and on what each sublayer adds.
      classes: outputs of the head; 0 = no head.
      images: that go with one text. Each is fused with it in a pass of its own, and the head reads all pooled vectors.
      ranks: in place of classes a head that gives texts and images a score to rank pairs by (`head/rank`), and says
        whether they belong together (`head/match`).
      text: how texts become ids; None = the model is given ids.
      lineage: surgery history, oldest first.
    """

    streams: int
    width: int
    blocks: tuple[BlockSpec, ...]
    image: ViTSpec
    vocab: int
    positions: int = 40
    fusion: int = 0
    arms: int = 0
    eps: float = 1e-12
    text_eps: float = 1e-12
    inner: AdapterSpec | None = None
    skip: AdapterSpec | None = None
    encoder_skip: AdapterSpec | None = None
    dropout: float = 0.1
    classes: int = 0
    images: int = 1
    ranks: bool = False
    text: TextSpec | None = None
    lineage: tuple[Lineage, ...] = ()

    def __post_init__(self) -> None:
        if self.streams not in (1, 2):
            raise InputError(f"FusionSpec.streams must be 1 or 2, found {self.streams}")
        for name in ("width", "vocab", "positions"):
            if getattr(self, name) <= 0:
                raise InputError(f"FusionSpec.{name} must be positive, found {getattr(self, name)}")
        check_blocks(self)
        if self.streams == 1 and self.fusion:
            raise InputError(f"FusionSpec.fusion is of two streams, found {self.fusion} with one")
        if self.streams == 2 and not 0 < 2 * self.fusion <= self.depth:
            raise InputError(
                f"FusionSpec.fusion must be in 1..{self.depth // 2} (half the blocks), found {self.fusion}"
            )
        if not 0 <= self.arms <= self.depth:
            raise InputError(f"FusionSpec.arms must be in 0..{self.depth} (the blocks), found {self.arms}")
        if self.arms == 0:
            object.__setattr__(self, "arms", self.depth)
        if self.streams == 1 and self.image.width != self.width:
            raise InputError(f"FusionSpec.image must be {self.width} wide as the stream is, found {self.image.width}")
        if self.image.pooling != "none" or self.image.classes:
            raise InputError(
                "FusionSpec.image must give all tokens, without pooling and head, "
                f"found pooling={self.image.pooling!r}, classes={self.image.classes}"
            )
        norms = (self.image.norm_position, self.image.norm_before, self.image.norm_after)
        if self.streams == 1 and norms != ("pre", False, True):
            raise InputError(
                "FusionSpec.image of one stream must have norms before the branches and after the last block, found "
                f"norm_position={norms[0]!r}, norm_before={norms[1]}, norm_after={norms[2]}"
            )
        for name in ("eps", "text_eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"FusionSpec.{name} must be 0 or more, found {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"FusionSpec.dropout must be in [0, 1), found {self.dropout}")
        if self.classes < 0:
            raise InputError(f"FusionSpec.classes must be 0 or more, found {self.classes}")
        if self.images < 1:
            raise InputError(f"FusionSpec.images must be 1 or more, found {self.images}")
        if self.ranks and (self.classes or self.images > 1):
            raise InputError(
                f"FusionSpec.ranks is of one image and without classes, found images={self.images}, "
                f"classes={self.classes}"
            )
        for name in ("inner", "skip", "encoder_skip"):
            adapter = getattr(self, name)
            if adapter is not None and adapter.form != "bottleneck":
                raise InputError(f"FusionSpec.{name} must be a bottleneck, found form={adapter.form!r}")
        for index, block in enumerate(self.blocks):
            self._check_block(index, block)

    def _check_block(self, index: int, block: BlockSpec) -> None:
        at = f"FusionSpec.blocks[{index}]"
        if block.reduce is not None:
            raise InputError(f"{at}.reduce is not defined for fusion encoders, found {block.reduce!r}")
        if block.attn != block.ffn:
            raise InputError(f"{at} is kept or skipped as a whole, found attn={block.attn}, ffn={block.ffn}")
        stand_in = self.stand_in(index)
        expected = 0 if block.attn or stand_in is None else stand_in.width
        if block.adapter != expected:
            raise InputError(f"{at}.adapter must be {expected} (its stand-in's width), found {block.adapter}")

    def stand_in(self, index: int) -> AdapterSpec | None:
        """What stands in for module `index` where it is skipped."""
        return self.encoder_skip if self.streams == 2 and index >= 2 * self.fusion else self.skip

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of an image, in pixels."""
        return self.image.image_size

    @property
    def tokens(self) -> int:
        """Tokens of one image, M."""
        return self.image.tokens

    @property
    def pooled(self) -> int:
        """Width of what the head reads."""
        return self.images * self.streams * self.width

    @property
    def skips(self) -> tuple[int, ...]:
        """The modules that are gone."""
        return tuple(index for index, block in enumerate(self.blocks) if not block.attn)

    def skipping(self, skips: Any) -> FusionSpec:
        """The spec in which, beside those that are gone, these modules are skipped for good.

        Args:
          skips: a list of arms, see `skip_list`.

        Raises:
          InputError: no such list, or an arm beyond those of the search.
        """
        gone = skip_list(skips, self.arms)
        widths = {i: 0 if (adapter := self.stand_in(i)) is None else adapter.width for i in gone}
        return self.edit(blocks={i: {"attn": False, "ffn": False, "adapter": width} for i, width in widths.items()})

    def without_adapters(self) -> FusionSpec:
        """The model that the adapters were added to; only where nothing is skipped."""
        return self.edit(inner=None, skip=None, encoder_skip=None)

    @classmethod
    def meter(cls, image_size: int = 384, *, everywhere: bool = False, classes: int = 3129, **rest: Any) -> FusionSpec:
        """METER with CLIP-ViT-B/16 and RoBERTa-base, six fusion layers, DAS's adapters (DAS spec, sections 3 and 4).

        Args:
          image_size: 384, or 288 for NLVR2.
          everywhere: layers of the text encoder are arms, too ("DAS-Global").
          rest: other fields by name.
        """
        tower = ViTSpec.uniform(
            depth=12,
            width=768,
            heads=12,
            image_size=image_size,
            patch=16,
            patch_bias=False,
            norm_before=True,
            eps=1e-5,
            activation="quick_gelu",
            pooling="none",
        )
        adapter = AdapterSpec("bottleneck", 96, norm="in")
        values: dict[str, Any] = {
            "streams": 2,
            "width": 768,
            "blocks": [{"heads": 12, "head_dim": 64, "mlp": 3072}] * 24,
            "image": tower,
            "vocab": 50265,
            "positions": 512,
            "fusion": 6,
            "arms": 24 if everywhere else 12,
            "text_eps": 1e-5,
            "inner": adapter,
            "skip": adapter.edit(width=288),
            "encoder_skip": adapter.edit(width=192) if everywhere else None,
            "classes": classes,
            **rest,
        }
        return _checked(values)

    @classmethod
    def vilt(cls, image_size: int | tuple[int, int] = 384, *, classes: int = 3129, **rest: Any) -> FusionSpec:
        """ViLT-B/32 with DAS's adapters (DAS spec, sections 3 and 4). Images are brought to one size; the release
        keeps their aspect, pads, and samples patches. Other fields by name."""
        image = ViTSpec.uniform(depth=1, width=768, heads=12, image_size=image_size, patch=32, pooling="none")
        adapter = AdapterSpec("bottleneck", 96, norm="in")
        values: dict[str, Any] = {
            "streams": 1,
            "width": 768,
            "blocks": [{"heads": 12, "head_dim": 64, "mlp": 3072}] * 12,
            "image": image,
            "vocab": 30522,
            "inner": adapter,
            "skip": adapter.edit(width=192),
            "classes": classes,
            **rest,
        }
        return _checked(values)

    @classmethod
    def small(
        cls,
        streams: int,
        *,
        depth: int = 4,
        width: int = 32,
        heads: int = 2,
        image_size: int | tuple[int, int] = 32,
        patch: int = 8,
        **rest: Any,
    ) -> FusionSpec:
        """A model for one CPU: `depth` blocks, or `depth` fusion layers over as many layers of a text encoder and of a
        tower. Other fields by name."""
        if heads <= 0 or width % heads:
            raise InputError(f"width must be a multiple of heads, found width={width}, heads={heads}")
        image = ViTSpec.uniform(
            depth=depth if streams == 2 else 1,
            width=width,
            heads=heads,
            image_size=image_size,
            patch=patch,
            pooling="none",
        )
        block = {"heads": heads, "head_dim": width // heads, "mlp": 4 * width}
        inner = AdapterSpec("bottleneck", max(width // 8, 1), norm="in")
        values: dict[str, Any] = {
            "streams": streams,
            "width": width,
            "blocks": [block] * (depth if streams == 1 else 3 * depth),
            "image": image,
            "vocab": 128,
            "fusion": depth if streams == 2 else 0,
            "inner": inner,
            "skip": inner.edit(width=(streams + 1) * inner.width),
            "encoder_skip": inner.edit(width=2 * inner.width) if streams == 2 else None,
            **rest,
        }
        return _checked(values)


def _checked(values: dict[str, Any]) -> FusionSpec:
    """By way of the JSON form, which checks the types: the values may come from a config."""
    spec: FusionSpec = fields.build(FusionSpec, fields.plain(values), FusionSpec.__name__)
    return spec
