# SPDX-License-Identifier: Apache-2.0
"""The spec of a decoder-only language model."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from vtjax.errors import InputError
from vtjax.spec import fields
from vtjax.spec.base import Lineage, ModelSpec, check_blocks

ROPE_SCALINGS = ("linear", "llama3")


@dataclasses.dataclass(frozen=True)
class DecoderBlockSpec:
    """One decoder block. Blocks are never renumbered: a removed one stays, with `attn=False, ffn=False`.

    Attributes:
      heads: query heads H; the head width is `head_dim`, and H * head_dim may differ from the model width.
      kv_heads: key and value heads K, a divisor of H; each serves H / K neighbouring query heads.
      head_dim: width of one head, even (rotary positions turn pairs).
      mlp: hidden width of the SwiGLU MLP.
      attn: False removes the attention (and its norm).
      ffn: False removes the MLP (and its norm).
      adapter: hidden width of the adapter that stands in for a removed block (attn=False, ffn=False); 0 = none.
      reduce: name of the token reducer between this block and the next, which may shorten the sequence; None = none.
    """

    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    attn: bool = True
    ffn: bool = True
    adapter: int = 0
    reduce: str | None = None


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched to a longer context than the model was first trained on.

    Attributes:
      kind: "linear" (all divided by `factor`) or "llama3" (long wavelengths divided by `factor`, short ones kept).
      factor: 1 or more.
      low, high: llama3 only: wavelengths above `context / low` are stretched, below `context / high` kept, and those
        between are blended.
      context: llama3 only: tokens of the first training.
    """

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    context: int = 8192

    def __post_init__(self) -> None:
        fields.choice(self, "kind", ROPE_SCALINGS)
        if not 1 <= self.factor < math.inf:
            raise InputError(f"RopeScaling.factor must be 1 or more, found {self.factor}")
        if not 0 < self.low < self.high < math.inf or self.context <= 0:
            raise InputError(
                f"RopeScaling needs 0 < low < high and a context above 0, found {self.low}, {self.high}, {self.context}"
            )

    def scaled(self, frequency: float) -> float:
        """A rotary frequency, in radians per position, stretched."""
        if self.kind == "linear":
            return frequency / self.factor
        turns = frequency * self.context / (2 * math.pi)
        kept = min(max((turns - self.low) / (self.high - self.low), 0.0), 1.0)
        return frequency * (kept + (1.0 - kept) / self.factor)


LORA_SITES = ("query", "key", "value", "out", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoRASpec:
    """Low-rank updates beside the projections of every block (Hu et al. 2021): x W + (alpha / rank) (x A) B, B from 0.

    Attributes:
      rank: of the product A B.
      alpha: scale, times the rank.
      sites: which projections, of `LORA_SITES`.
    """

    rank: int
    alpha: float
    sites: tuple[str, ...] = LORA_SITES

    def __post_init__(self) -> None:
        if self.rank <= 0 or not math.isfinite(self.alpha):
            raise InputError(f"LoRASpec needs a rank above 0 and a finite alpha, found {self.rank} and {self.alpha}")
        if not self.sites or set(self.sites) - set(LORA_SITES):
            raise InputError(f"LoRASpec.sites must be some of {', '.join(LORA_SITES)}, found {', '.join(self.sites)}")


@dataclasses.dataclass(frozen=True)
class LMSpec(ModelSpec):
    """A decoder of the Llama family: Llama 2 and 3, SmolLM, Qwen2, Qwen3.

    RMSNorm before each branch and after the last block, rotary positions (half-split), grouped-query causal attention,
    SwiGLU.

    Attributes:
      vocab: V, rows of the embedding; a tokenizer may use fewer.
      extra: further rows of the embedding, of tokens that are read and never said; only where the head is not tied.
      width: D, the width of the residual stream.
      blocks: one `DecoderBlockSpec` per layer.
      context: positions that the model was trained for; generation refuses to go beyond.
      eps: of all norms.
      rope_base: base of the rotary frequencies.
      rope_scaling: how they are stretched; None = not at all.
      qkv_bias, out_bias, mlp_bias: biases of the projections; Qwen2 has query, key and value biases only.
      qk_norm: "none" or "head" (RMSNorm of every query and key head before the rotation, Qwen3).
      tied: the head is the transposed embedding; else it has a kernel of its own.
      eos: token ids that end a generated text; may be empty.
      lora: low-rank updates beside the projections; None = none. `models.lora` adds and merges them.
      lineage: surgery history, oldest first.
    """

    vocab: int
    width: int
    blocks: tuple[DecoderBlockSpec, ...]
    context: int = 2048
    eps: float = 1e-6
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = "none"
    tied: bool = True
    eos: tuple[int, ...] = ()
    lora: LoRASpec | None = None
    extra: int = 0
    lineage: tuple[Lineage, ...] = ()

    @property
    def ids(self) -> int:
        """How many token ids can be read."""
        return self.vocab + self.extra

    @classmethod
    def uniform(
        cls,
        *,
        depth: int,
        width: int,
        heads: int,
        mlp: int,
        vocab: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        **rest: Any,
    ) -> LMSpec:
        """A spec with `depth` equal blocks; `kv_heads` defaults to `heads`, `head_dim` to width / heads."""
        if head_dim is None and (heads <= 0 or width % heads):
            raise InputError(f"width must be a multiple of heads, found width={width}, heads={heads}")
        block = {
            "heads": heads,
            "kv_heads": heads if kv_heads is None else kv_heads,
            "head_dim": width // heads if head_dim is None else head_dim,
            "mlp": mlp,
        }
        # By way of the JSON form, which checks the types: the values may come from a config.
        values = {"vocab": vocab, "width": width, "blocks": [block] * depth, **rest}
        return fields.build(cls, fields.plain(values), cls.__name__)

    def __post_init__(self) -> None:
        fields.choice(self, "qk_norm", ("none", "head"))
        for name in ("vocab", "width", "context"):
            if getattr(self, name) <= 0:
                raise InputError(f"LMSpec.{name} must be positive, found {getattr(self, name)}")
        if self.extra < 0 or (self.extra and self.tied):
            raise InputError(f"LMSpec.extra must be 0 or more, and 0 for a tied head, found {self.extra}")
        check_blocks(self)
        for i, block in enumerate(self.blocks):
            if block.attn and (block.kv_heads <= 0 or block.heads % block.kv_heads):
                raise InputError(f"LMSpec.blocks[{i}].kv_heads must divide heads={block.heads}, found {block.kv_heads}")
            if block.attn and block.head_dim % 2:
                raise InputError(f"LMSpec.blocks[{i}].head_dim must be even, found {block.head_dim}")
        if not 0 <= self.eps < math.inf:
            raise InputError(f"LMSpec.eps must be 0 or more, found {self.eps}")
        if not 0 < self.rope_base < math.inf:
            raise InputError(f"LMSpec.rope_base must be positive, found {self.rope_base}")
        if not all(0 <= token < self.vocab for token in self.eos):
            raise InputError(f"LMSpec.eos must hold token ids below vocab={self.vocab}, found {self.eos}")

    def frequencies(self, head_dim: int) -> tuple[float, ...]:
        """Rotary frequency of each of the `head_dim / 2` pairs, in radians per position, scaling included."""
        plain = [self.rope_base ** (-2 * i / head_dim) for i in range(head_dim // 2)]
        return tuple(plain if self.rope_scaling is None else map(self.rope_scaling.scaled, plain))
