# SPDX-License-Identifier: Apache-2.0
"""Model specs: frozen, JSON-able descriptions from which a model is rebuilt on any machine.

Surgery is always: edit the spec, map `params -> params`, rebuild (design, section 1). A spec is saved beside every
checkpoint as `spec.json` with `format: 1`. Standard library only.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from vtjax.errors import InputError

FORMAT = 1

NORMS = ("layernorm", "rmsnorm")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "swiglu")
POOLINGS = ("class", "mean", "attention", "none")
POSITIONS = ("learned", "sincos2d", "none")
QK_NORMS = ("none", "head", "full")


_BACKBONE = re.compile(r"embed|norm_before|block_\d+|norm|fc_norm|pool|head|head_distill")


def is_backbone(name: str) -> bool:
    """Whether a top-level name of a parameter tree is the model's own; all others are methods' (`params["ltmp"]`)."""
    return _BACKBONE.fullmatch(name) is not None


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
class Lineage:
    """One step of a model's history: what was done to which parent.

    `parent` is the parent's `params_sha256`; `arguments` is a JSON text, so that the spec stays hashable.
    """

    parent: str
    operation: str
    arguments: str = "{}"
    seed: int | None = None


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
class ViTSpec:
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
        fields = {"image_size": size, "patch": patch, "width": width, "blocks": [block] * depth, **rest}
        return _build(cls, _plain(fields), cls.__name__)

    def __post_init__(self) -> None:
        _choice(self, "pos", POSITIONS)
        _choice(self, "norm", NORMS)
        _choice(self, "norm_position", ("pre", "post"))
        _choice(self, "pooling", POOLINGS)
        _choice(self, "qk_norm", QK_NORMS)
        _choice(self, "activation", ACTIVATIONS)
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
        if not self.blocks:
            raise InputError("ViTSpec.blocks must hold at least one block, found none")
        for i, block in enumerate(self.blocks):
            if block.attn and (block.heads <= 0 or block.head_dim <= 0):
                raise InputError(
                    f"ViTSpec.blocks[{i}] needs heads and head_dim above 0, found {block.heads} and {block.head_dim}"
                )
            if block.ffn and block.mlp <= 0:
                raise InputError(f"ViTSpec.blocks[{i}].mlp must be positive (or set ffn=False), found {block.mlp}")
            if block.adapter < 0:
                raise InputError(f"ViTSpec.blocks[{i}].adapter must be 0 or more, found {block.adapter}")
            if block.adapter and (block.attn or block.ffn):
                raise InputError(
                    f"ViTSpec.blocks[{i}].adapter={block.adapter} stands in for a removed block, "
                    f"found attn={block.attn}, ffn={block.ffn}"
                )
            if block.reduce is not None and not block.attn:
                raise InputError(
                    f"ViTSpec.blocks[{i}].reduce={block.reduce!r} needs the block's attention, which was removed"
                )
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
    def depth(self) -> int:
        """Number of blocks L, removed ones included."""
        return len(self.blocks)

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

    def edit(self, **changes: Any) -> ViTSpec:
        """A copy with some fields replaced; `blocks` may be a mapping `{index: {field: value}}` or a function
        `(index, block) -> block`, which edits blocks in place of replacing them all.

        Raises:
          InputError: an unknown field, a block index out of range, or a combination that is not defined.
        """
        return _edit(self, changes)

    def unreduced(self) -> ViTSpec:
        """The same model without token reducers; what else was done to it stays, and so does its history."""
        return self.edit(blocks=lambda _, block: dataclasses.replace(block, reduce=None))

    def diff(self, other: ViTSpec) -> dict[str, tuple[Any, Any]]:
        """Fields that differ, by dotted name: `{"blocks[3].mlp": (1536, 384)}`; a missing side is None."""
        return diff(self.to_dict(), other.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, with `format` and `kind`."""
        return {"format": FORMAT, "kind": type(self).__name__, **_plain(self)}

    def to_json(self) -> str:
        """Indented JSON text, stable under a round trip."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @property
    def sha256(self) -> str:
        """Hash of the JSON form; equal specs have equal hashes on every machine."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


Spec = ViTSpec
"""Any model spec."""

KINDS: dict[str, type] = {"ViTSpec": ViTSpec}


def from_dict(data: Any) -> Spec:
    """Inverse of `to_dict`.

    Raises:
      InputError: unknown format or kind, unknown or missing field, or a field of the wrong type, by dotted name.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"a spec must be a JSON object, found {type(data).__name__}")
    fields = dict(data)
    if fields.pop("format", None) != FORMAT:
        raise InputError(f"spec format must be {FORMAT}, found {data.get('format')!r}")
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"spec kind must be one of {', '.join(KINDS)}, found {kind!r}")
    return _build(KINDS[kind], fields, kind)


def from_json(text: str) -> Spec:
    """Spec from JSON text; raises `InputError` as `from_dict`, and where the text is not JSON."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"a spec must be JSON text: {error}") from None
    return from_dict(data)


def diff(a: Any, b: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Leaves that differ between two JSON-able values, by dotted name; a missing side is None."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        pairs = [(f"{name}.{k}" if name else str(k), a.get(k), b.get(k)) for k in dict.fromkeys([*a, *b])]
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and name and _nested(a, b):
        longest = range(max(len(a), len(b)))
        pairs = [(f"{name}[{i}]", a[i] if i < len(a) else None, b[i] if i < len(b) else None) for i in longest]
    else:
        return {} if _plain(a) == _plain(b) else {name: (a, b)}
    return {k: v for label, x, y in pairs for k, v in diff(x, y, label).items()}


def _nested(*lists: Any) -> bool:
    return any(isinstance(x, Mapping) for values in lists for x in values)


def _choice(spec: Any, field: str, allowed: tuple[str, ...]) -> None:
    if getattr(spec, field) not in allowed:
        raise InputError(
            f"{type(spec).__name__}.{field} must be one of {', '.join(allowed)}, found {getattr(spec, field)!r}"
        )


def _known(cls: type, names: Iterable[str], where: str) -> None:
    known = [f.name for f in dataclasses.fields(cls)]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(f"{where} has no field {name!r}, expected one of {', '.join(known)}{hint}")


def _edit(spec: Any, changes: dict[str, Any]) -> Any:
    _known(type(spec), changes, type(spec).__name__)
    blocks = changes.get("blocks")
    if isinstance(blocks, Mapping):
        edited = list(spec.blocks)
        for index, fields in blocks.items():
            if not isinstance(index, int) or not -len(edited) <= index < len(edited):
                raise InputError(f"blocks[{index!r}] does not exist, expected an index below {len(edited)}")
            if not isinstance(fields, Mapping):
                raise InputError(f"blocks[{index}] must be edited by a mapping of fields, found {fields!r}")
            _known(type(edited[index]), fields, f"blocks[{index}]")
            edited[index] = dataclasses.replace(edited[index], **fields)
        changes = {**changes, "blocks": tuple(edited)}
    elif callable(blocks):
        changes = {**changes, "blocks": tuple(blocks(i, b) for i, b in enumerate(spec.blocks))}
    # By way of the JSON form, which checks the types of the new values.
    fields = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
    return _build(type(spec), _plain({**fields, **changes}), type(spec).__name__)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _build(cls: type, data: Mapping[str, Any], where: str) -> Any:
    if not isinstance(data, Mapping):
        raise InputError(f"{where} must be an object, found {type(data).__name__}")
    _known(cls, data, where)
    hints = typing.get_type_hints(cls)
    values = {k: _value(hints[k], v, f"{where}.{k}") for k, v in data.items()}
    for field in dataclasses.fields(cls):
        if field.name not in values and field.default is dataclasses.MISSING:
            raise InputError(f"{where} lacks the field {field.name!r}")
    return cls(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type, or an InputError that names the field."""
    args = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{where} must be a list, found {value!r}")
        if args[-1] is not Ellipsis and len(args) != len(value):
            raise InputError(f"{where} must hold {len(args)} values, found {len(value)}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(_value(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if args:  # X | None
        return None if value is None else _value(args[0], value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise InputError(f"{where} must be {hint.__name__}, found {value!r}")
    return value
