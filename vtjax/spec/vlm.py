# SPDX-License-Identifier: Apache-2.0
"""The spec of a multimodal language model: a vision tower, a bridge, a decoder."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from vtjax.errors import InputError
from vtjax.spec import fields
from vtjax.spec.base import Lineage, ModelSpec
from vtjax.spec.lm import LMSpec
from vtjax.spec.tiled import TiledViTSpec
from vtjax.spec.vit import Preprocess, ViTSpec

FORMS = ("block", "hyper", "fused")
SEES = ("all", "before", "latest", "run")
TEMPLATES = ("plain", "smollm2", "vicuna", "llama3")


@dataclasses.dataclass(frozen=True)
class CrossSpec:
    """Gated cross-attention of a decoder's text to visual tokens, at some layers. A gate starts at 0.

    The published forms are settings: `mllama`, `hyper` and `flamingo` below make them.

    Attributes:
      layers: decoder layers, ascending.
      form: "block": a block before the decoder's block of that number, x + tanh(g) attention, x + tanh(g) MLP, each
        behind a norm. "hyper": inside that block's self-attention, whose queries and norm it shares: by the gate g of
        each channel, the context becomes (1 - sigmoid(g)) text + sigmoid(g) visual, before the output projection;
        keys turn by the place of their image in the text, and key and value projections have biases. "fused": as
        "hyper", with one softmax over visual and text keys in place of the gate.
      heads, kv_heads, head_dim: of the block form; the others have those of the decoder's block, found 0 here.
      sees: which images a row of text attends to: "all"; "before", those at or before it; "latest" of these; or "run",
        the latest run of images without text between them. A row that sees none gets 0.
      norm, eps: of the block form, before each branch.
      qk_norm: RMSNorm on every query and key head.
      mlp: hidden width of the block form's MLP; 0 = none.
      activation: of it, as in `ViTSpec`; it has no biases.
      mlp_everywhere: rows that see no image go through the MLP, too.
    """

    layers: tuple[int, ...]
    form: str
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    sees: str = "before"
    norm: str = "rmsnorm"
    eps: float = 1e-5
    qk_norm: bool = False
    mlp: int = 0
    activation: str = "swiglu"
    mlp_everywhere: bool = False

    @classmethod
    def mllama(cls, layers: tuple[int, ...], heads: int, kv_heads: int, head_dim: int, mlp: int) -> CrossSpec:
        """Llama 3.2 Vision: whole blocks, whose layers the decoder leaves empty (`attn=False, ffn=False`)."""
        return cls(layers, "block", heads, kv_heads, head_dim, sees="run", qk_norm=True, mlp=mlp)

    @classmethod
    def hyper(cls, layers: tuple[int, ...]) -> CrossSpec:
        """mPLUG-Owl3 (240728): hyper-attention."""
        return cls(layers, "hyper")

    @classmethod
    def fused(cls, layers: tuple[int, ...]) -> CrossSpec:
        """mPLUG-Owl3 (241101): hyper-attention without a gate."""
        return cls(layers, "fused")

    @property
    def inside(self) -> bool:
        """It is part of a self-attention, not a block of its own."""
        return self.form != "block"

    @classmethod
    def flamingo(cls, layers: tuple[int, ...], width: int, heads: int = 8, head_dim: int = 64) -> CrossSpec:
        """OpenFlamingo: LayerNorm, one image at a time, an MLP of four times the decoder's width with exact GELU."""
        form = {"sees": "latest", "norm": "layernorm", "activation": "gelu", "mlp_everywhere": True}
        return cls(layers, "block", heads, heads, head_dim, mlp=4 * width, **form)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        fields.choice(self, "form", FORMS)
        fields.choice(self, "sees", SEES)
        fields.choice(self, "norm", ("layernorm", "rmsnorm"))
        fields.choice(self, "activation", ("gelu", "gelu_tanh", "quick_gelu", "swiglu"))
        if list(self.layers) != sorted(set(self.layers)):
            raise InputError(f"CrossSpec.layers must ascend, found {self.layers}")
        if not 0 <= self.eps < math.inf:
            raise InputError(f"CrossSpec.eps must be 0 or more, found {self.eps}")
        own = (self.heads, self.kv_heads, self.head_dim)
        if self.inside:
            if any(own) or self.mlp or self.qk_norm:
                raise InputError(
                    f"CrossSpec.form={self.form!r} has no heads, qk_norm or mlp of its own, found {own}, {self.mlp}"
                )
            return
        if min(own) <= 0 or self.heads % self.kv_heads or self.mlp < 0:
            raise InputError(
                f"CrossSpec needs kv_heads that divide heads, head_dim > 0 and mlp >= 0, found {own}, {self.mlp}"
            )


@dataclasses.dataclass(frozen=True)
class BridgeSpec:
    """How the tower's tokens reach the decoder.

    Attributes:
      projector: to the decoder's width: "mlp" (two layers with exact GELU between them, LLaVA), "linear", or "none"
        (for cross-attention, which then reads the tower's width).
      hidden: width between the two layers.
      bias: the projector's layers have biases.
      prefix: the tower's class token and registers go along; False = patches only, as in LLaVA.
      pool: rows and columns of patches that become one visual token, their mean, in front of the projector; (1, 1) =
        every patch is one.
      cross: the decoder attends to the visual tokens. None = they take the place of placeholders in the text.
    """

    projector: str = "mlp"
    hidden: int = 0
    bias: bool = True
    prefix: bool = False
    pool: tuple[int, int] = (1, 1)
    cross: CrossSpec | None = None

    def __post_init__(self) -> None:
        fields.choice(self, "projector", ("mlp", "linear", "none"))
        if (self.projector == "mlp") != (self.hidden > 0):
            raise InputError(
                f"BridgeSpec.hidden is the width inside projector='mlp', found {self.hidden} for {self.projector!r}"
            )
        if len(self.pool) != 2 or min(self.pool) < 1 or (self.pool != (1, 1) and self.prefix):
            raise InputError(
                f"BridgeSpec.pool must be two numbers of patches, and (1, 1) with prefix=True, found {self.pool}"
            )

    @property
    def kind(self) -> str:
        """ "projector" or "cross"."""
        return "projector" if self.cross is None else "cross"


@dataclasses.dataclass(frozen=True)
class TextSpec:
    """How questions and answers are written.

    Attributes:
      tokenizer: "words" (`data.tokenizer.WordTokenizer`), or what `weights.tokenizer.load` takes: a name, a file.
      words, control: of the word tokenizer, in the order of their ids.
      template: what stands around the turns of a conversation, one of `TEMPLATES`.
    """

    tokenizer: str = "words"
    words: tuple[str, ...] = ()
    control: tuple[str, ...] = ()
    template: str = "plain"

    def __post_init__(self) -> None:
        fields.choice(self, "template", TEMPLATES)
        if (self.tokenizer == "words") != bool(self.words):
            raise InputError(
                f"TextSpec.words belong to tokenizer='words', found {len(self.words)} for {self.tokenizer!r}"
            )


@dataclasses.dataclass(frozen=True)
class VLMSpec(ModelSpec):
    """A multimodal language model: LLaVA, Llama 3.2 Vision, mPLUG-Owl3, OpenFlamingo, and small ones.

    Its parameters are `tower/...` and `decoder/...`, each as the model alone has them, and `bridge/...`.

    Attributes:
      tower: vision transformer; its `feature_layer` says which tokens are taken (None = after the final norm). Its head
        and what comes after that layer are kept and not computed. Or a tiled one, for a bridge with cross-attention.
      bridge: from its tokens to the decoder.
      decoder: language model.
      image_token: id of the placeholder in the text, one per visual token, or with cross-attention one per image. Where
        visual tokens take its place, it may lie outside the vocabulary.
      router_token: id of the token at the end of every question, which routers read (DPN). Behind the decoder's ids it
        is one more, whose embedding is the bridge's; else one that texts have anyway. -1 = there is none.
      text: how questions are written; None = the model is given ids.
      stand_ins: which parts stand in for others of about their shape: "tower: ViT for ConvNeXt", ...
      lineage: surgery history, oldest first; those of the parts are in the parts.
    """

    tower: ViTSpec | TiledViTSpec
    bridge: BridgeSpec
    decoder: LMSpec
    image_token: int
    router_token: int = -1
    text: TextSpec | None = None
    stand_ins: tuple[str, ...] = ()
    lineage: tuple[Lineage, ...] = ()

    def __post_init__(self) -> None:
        if self.router_token < -1 or (self.router_token >= 0 and self.router_token == self.image_token):
            raise InputError(
                f"VLMSpec.router_token must be -1 (none) or an id other than image_token={self.image_token}, "
                f"found {self.router_token}"
            )
        if self.image_token < 0 or (self.bridge.cross is not None and self.image_token >= self.decoder.ids):
            raise InputError(
                f"VLMSpec.image_token must be 0 or more, and below {self.decoder.ids} where the decoder reads "
                f"it, found {self.image_token}"
            )
        if isinstance(self.tower, TiledViTSpec) and self.bridge.cross is None:
            raise InputError("a TiledViTSpec needs BridgeSpec.cross, which leaves out tiles that an image lacks")
        rows, columns = self.tower.grid
        if rows % self.bridge.pool[0] or columns % self.bridge.pool[1]:
            raise InputError(f"BridgeSpec.pool must divide the grid {rows} x {columns}, found {self.bridge.pool}")
        if self.bridge.projector == "none" and self.bridge.cross is None and self.tower.width != self.decoder.width:
            raise InputError(
                f"BridgeSpec.projector='none' needs a tower of the decoder's width {self.decoder.width}, "
                f"found {self.tower.width}"
            )
        cross = self.bridge.cross
        if cross is not None and not cross.layers:
            raise InputError("CrossSpec.layers must name at least one layer, found none: no text would see an image")
        for layer in () if cross is None else cross.layers:
            if not 0 <= layer < self.decoder.depth:
                raise InputError(f"CrossSpec.layers must be in 0..{self.decoder.depth - 1}, found {layer}")
            if cross is not None and cross.inside and not self.decoder.blocks[layer].attn:
                raise InputError(
                    f"CrossSpec.form={cross.form!r} needs self-attention at layer {layer}, which was removed"
                )
        if cross is not None and cross.inside and self.visual_width != self.decoder.width:
            raise InputError(
                f"CrossSpec.form={cross.form!r} norms visual tokens as text, so they must be {self.decoder.width} "
                f"wide, found {self.visual_width}"
            )

    @property
    def blocks(self) -> tuple[Any, ...]:  # type: ignore[override]
        """The decoder's."""
        return self.decoder.blocks

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels, the tower's; of a tile where it has tiles."""
        return self.tower.image_size

    @property
    def preprocess(self) -> Preprocess:
        """The tower's."""
        return self.tower.preprocess

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of an image's (or tile's) visual tokens."""
        rows, columns = self.tower.grid
        return rows // self.bridge.pool[0], columns // self.bridge.pool[1]

    @property
    def visual_tokens(self) -> int:
        """T: tokens of one image that reach the decoder."""
        rows, columns = self.grid
        return self.tiles * (rows * columns + (self.tower.prefix if self.bridge.prefix else 0))

    @property
    def tiles(self) -> int:
        """Tiles that the tower sees of each image; 1 where it knows none."""
        return self.tower.tiles if isinstance(self.tower, TiledViTSpec) else 1

    @property
    def tower_width(self) -> int:
        """Width of the tokens that leave the tower."""
        return self.tower.output_width if isinstance(self.tower, TiledViTSpec) else self.tower.width

    @property
    def adds_router_token(self) -> bool:
        """Texts hold the router token because of the routers: it is no id of the decoder's."""
        return self.router_token >= self.decoder.ids

    @property
    def placeholders(self) -> int:
        """Tokens that stand for an image in the text."""
        return self.visual_tokens if self.bridge.cross is None else 1

    @property
    def visual_width(self) -> int:
        """E: width of the visual tokens that reach the decoder."""
        return self.tower_width if self.bridge.projector == "none" else self.decoder.width

    def unreduced(self) -> VLMSpec:
        """The same model without token reducers in tower and decoder."""
        return self.edit(tower=self.tower.unreduced(), decoder=self.decoder.unreduced())
