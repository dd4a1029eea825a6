# SPDX-License-Identifier: Apache-2.0
"""The spec of a vision transformer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from vtjax.errors import InputError
from vtjax.spec import fields
from vtjax.spec.base import Lineage, ModelSpec, check_blocks

NORMS = ("layernorm", "rmsnorm")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "swiglu")
POOLINGS = ("class", "mean", "attention", "none")
POSITIONS = ("learned", "sincos2d", "none")
QK_NORMS = ("none", "head", "full")


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One transformer block. Blocks are never renumbered: a removed one stays, with `attn=False, ffn=False`.

    Attributes:
      heads: attention heads H; the head width is `head_dim`.
      head_dim: width of one head; H * head_dim may differ from the model width.
      mlp: hidden width of the MLP (of the product, for SwiGLU).
      attn: False removes the attention (and its norm).
      ffn: False removes the MLP (and its norm).
      adapter: hidden width of the adapter that stands in for a removed block (attn=False, ffn=False); 0 = none.
      reduce: name of the token reducer between attention and MLP; None = none.
    """

    heads: int
    head_dim: int
    mlp: int
    attn: bool = True
    ffn: bool = True
    adapter: int = 0
    reduce: str | None = None


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How an image becomes the model's input: resize, centre crop, normalise.

    Attributes:
      crop: share of the resized side that the crop keeps, in (0, 1]; the side is `floor(size / crop)`, as in timm.
      interpolation: of the resize.
      mean, std: per channel, for pixel values in [0, 1].
      squash: resize both sides to their target, whatever the image's aspect; else the shorter side, keeping it.
    """

    crop: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    squash: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise InputError(f"Preprocess.crop must be in (0, 1], found {self.crop}")
        if not all(0 < s < math.inf for s in self.std):
            raise InputError(f"Preprocess.std must be positive, found {self.std}")


@dataclasses.dataclass(frozen=True)
class ViTSpec(ModelSpec):
    """A vision transformer: plain ViT, DeiT, AugReg, DINOv2, CLIP, SigLIP, EVA-CLIP, InternViT.

    Token order: class token, distillation token, registers, then patches row by row.

    Attributes:
      image_size: (height, width) in pixels, multiples of `patch`.
      patch: patch side in pixels.
      width: D, the width of the residual stream.
      blocks: one `BlockSpec` per layer.
      channels: input channels.
      patch_bias: the patch embedding has a bias.
      class_token, distill_token: extra leading tokens. With `distill_token` there are two heads, whose mean is the
        output (DeiT).
      registers: number of register tokens.
      pos: "learned", "sincos2d" (fixed) or "none".
      pos_prefix: how many leading prefix tokens the position embedding covers (1 for ViT and CLIP, 2 for distilled
        DeiT, 0 for DINOv2 with registers in timm).
      norm, eps: "layernorm" or "rmsnorm", and its epsilon.
      norm_position: "pre" (x + f(norm(x))) or "post" (x + norm(f(x)), EVA-CLIP-E+).
      norm_before: norm on the embedded tokens before the first block (CLIP).
      norm_after: norm on all tokens after the last block; absent where `fc_norm` takes its place.
      fc_norm: norm on the pooled vector.
      pooling: "class", "mean" (patch tokens only), "attention" (learned probe, SigLIP) or "none".
      pool_mlp: hidden width of the attention pooling's MLP.
      pool_heads: heads of the attention pooling; 0 = those of the first block when the spec is first made, so that a
        later edit of the blocks leaves the pooling alone.
      qkv_bias, key_bias: biases of the projections; EVA has query and value biases but no key bias.
      qk_norm: "none", "head" (per head) or "full" (over all heads, InternViT).
      out_bias: the attention's output projection has a bias.
      mlp_bias: the MLP has biases.
      mlp_norm: norm on the hidden activations (EVA-02).
      activation: "gelu" (exact), "gelu_tanh", "quick_gelu" or "swiglu" (silu(gate) * up).
      layer_scale: initial value of the per-channel branch scales; None = no scales.
      feature_layer: `aux["features"]` are the tokens that leave this block (Python index, -2 = second to last),
        without the final norm; None = after the final norm.
      classes: outputs of the head; 0 = no head.
      head_bias: the head has a bias (CLIP's projection has none).
      preprocess: the evaluation preprocessing that the weights expect.
      lineage: surgery history, oldest first.
    """

    image_size: tuple[int, int]
    patch: int
    width: int
    blocks: tuple[BlockSpec, ...]
    channels: int = 3
    patch_bias: bool = True
    class_token: bool = True
    distill_token: bool = False
    registers: int = 0
    pos: str = "learned"
    pos_prefix: int = 1
    norm: str = "layernorm"
    eps: float = 1e-6
    norm_position: str = "pre"
    norm_before: bool = False
    norm_after: bool = True
    fc_norm: bool = False
    pooling: str = "class"
    pool_mlp: int = 0
    pool_heads: int = 0
    qkv_bias: bool = True
    key_bias: bool = True
    qk_norm: str = "none"
    out_bias: bool = True
    mlp_bias: bool = True
    mlp_norm: bool = False
    activation: str = "gelu"
    layer_scale: float | None = None
    feature_layer: int | None = None
    classes: int = 0
    head_bias: bool = True
    preprocess: Preprocess = Preprocess()
    lineage: tuple[Lineage, ...] = ()

    @classmethod
    def uniform(
        cls,
        *,
        depth: int,
        width: int,
        heads: int,
        mlp: int | None = None,
        image_size: int | tuple[int, int] = 224,
        patch: int = 16,
        **rest: Any,
    ) -> ViTSpec:
        """A spec with `depth` equal blocks; `mlp` defaults to 4 x width, a single `image_size` to a square."""
        if heads <= 0 or width % heads:
            raise InputError(f"width must be a multiple of heads, found width={width}, heads={heads}")
        size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        block = {"heads": heads, "head_dim": width // heads, "mlp": 4 * width if mlp is None else mlp}
        # By way of the JSON form, which checks the types: the values may come from a config.
        values = {"image_size": size, "patch": patch, "width": width, "blocks": [block] * depth, **rest}
        return fields.build(cls, fields.plain(values), cls.__name__)

    def __post_init__(self) -> None:
        fields.choice(self, "pos", POSITIONS)
        fields.choice(self, "norm", NORMS)
        fields.choice(self, "norm_position", ("pre", "post"))
        fields.choice(self, "pooling", POOLINGS)
        fields.choice(self, "qk_norm", QK_NORMS)
        fields.choice(self, "activation", ACTIVATIONS)
        for name in ("patch", "width", "channels"):
            if getattr(self, name) <= 0:
                raise InputError(f"ViTSpec.{name} must be positive, found {getattr(self, name)}")
        if len(self.image_size) != 2:
            raise InputError(f"ViTSpec.image_size must be (height, width), found {self.image_size}")
        for side in self.image_size:
            if side <= 0 or side % self.patch:
                raise InputError(
                    f"ViTSpec.image_size must be a positive multiple of patch={self.patch}, found {self.image_size}"
                )
        check_blocks(self)
        if self.registers < 0 or self.classes < 0:
            raise InputError(
                f"ViTSpec.registers and classes must be 0 or more, found {self.registers} and {self.classes}"
            )
        if self.pos != "none" and not 0 <= self.pos_prefix <= self.prefix:
            raise InputError(
                f"ViTSpec.pos_prefix must be in 0..{self.prefix} (the prefix tokens), found {self.pos_prefix}"
            )
        if self.pos == "sincos2d" and self.width % 4:
            raise InputError(f"ViTSpec.pos='sincos2d' needs a width that is a multiple of 4, found {self.width}")
        if self.pooling == "class" and not self.class_token:
            raise InputError("ViTSpec.pooling='class' needs class_token=True, found False")
        if self.distill_token and not self.class_token:
            raise InputError("ViTSpec.distill_token needs class_token=True, found False")
        if self.distill_token and self.classes and self.pooling == "none":
            raise InputError("ViTSpec.distill_token has a head for a pooled vector, found pooling='none'")
        if not 0 <= self.eps < math.inf:
            raise InputError(f"ViTSpec.eps must be 0 or more, found {self.eps}")
        if self.layer_scale is not None and not math.isfinite(self.layer_scale):
            raise InputError(f"ViTSpec.layer_scale must be finite, found {self.layer_scale}")
        if self.pooling == "attention":
            self._check_attention_pool()
        if self.feature_layer is not None and not -self.depth <= self.feature_layer < self.depth:
            raise InputError(
                f"ViTSpec.feature_layer must be in [-{self.depth}, {self.depth}), found {self.feature_layer}"
            )

    def _check_attention_pool(self) -> None:
        if self.pool_mlp <= 0:
            raise InputError(f"ViTSpec.pooling='attention' needs pool_mlp > 0, found {self.pool_mlp}")
        if self.pool_heads == 0:
            object.__setattr__(self, "pool_heads", self.blocks[0].heads)
        if self.pool_heads <= 0 or self.width % self.pool_heads:
            raise InputError(f"ViTSpec.pool_heads must divide width={self.width}, found {self.pool_heads}")

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.image_size[0] // self.patch, self.image_size[1] // self.patch

    @property
    def prefix(self) -> int:
        """Number of leading tokens that are not patches."""
        return int(self.class_token) + int(self.distill_token) + self.registers

    @property
    def tokens(self) -> int:
        """N: prefix tokens and patches."""
        return self.prefix + self.grid[0] * self.grid[1]
