# SPDX-License-Identifier: Apache-2.0
"""Parameters and multiply-accumulates (MACs), counted from a spec; `walk` counts them from a traced function.

1 MAC = 2 FLOPs. A MAC is a multiply-accumulate of a matrix product or convolution; softmax, norms, activations, biases,
position embeddings and sums are not counted. The two counts are equal integers for every spec (tests/account).

A language model's work is that of one prompt up to the logits of its last token (`LM.prefill`), causal attention
counted as the full square, as papers do (DPN's and PyramidDrop's counts, which leave out the head); what is not
computed of its upper triangle is the clock's gain. A tiled tower's work is that of all its tiles, which it always
computes, and of the features that carry its mask.

Published figures follow other conventions; three that matter: LTMP counts as here (patch embedding and head included),
DGMR's "FLOPs" are 2 x parameters x tokens (no attention scores), and fvcore's "GFLOPs" are GMACs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vtjax.account.walk import Counts, walk
from vtjax.errors import InputError
from vtjax.spec import BlockSpec, CrossSpec, DecoderBlockSpec, FusionSpec, LMSpec, Spec, TiledViTSpec, ViTSpec, VLMSpec

__all__ = ["KINDS", "Counts", "Row", "by_kind", "layers", "macs", "walk"]

PROMPT = 512
"""Tokens of a language model's prompt where none are told."""

QUESTION = 64
"""Tokens of text beside one image, in a multimodal model's prompt where none are told."""

_MASK_FEATURES = 8  # `ops.attention.FILLED_FEATURES`, on every head of a tiled tower

KINDS = ("embed", "attention", "mlp", "norm", "pool", "bridge", "head", "adapter")


class Row(NamedTuple):
    """One layer: its path in the parameter tree, its kind (of `KINDS`), parameters, and MACs per image or prompt."""

    name: str
    kind: str
    params: int
    macs: int


def layers(spec: Spec, tokens: Sequence[int] | int | None = None) -> list[Row]:
    """Parameters and MACs per image, or per prompt of a language model, of every layer, in the order of execution.

    Args:
      spec: the model. A layer's row holds all parameters below its path: `block_00/attn` includes the qk-norm,
        `block_00/mlp` its inner norm. The layer scales count with their branch.
      tokens: tokens present after 0, 1, ..., L blocks' reducers, `[L + 1]`: block l attends over `tokens[l]` and its
        MLP sees `tokens[l + 1]`, but a language model's, whose reducers act between blocks, `tokens[l]`. One number =
        everywhere; None = `spec.tokens`, of a language model `PROMPT`, of a multimodal one those of one image and
        `QUESTION`. Parameters do not depend on it. Of a multimodal model, whose prompt has one image, they are those of
        the decoder; of a fusion encoder one number, those of the text (None = `fusion.TEXT`).

    Raises:
      InputError: `tokens` of the wrong length or below 1, or a removed block that changes the count.
    """
    if isinstance(spec, LMSpec):
        return _lm(spec, tokens)
    if isinstance(spec, VLMSpec):
        return _vlm(spec, tokens)
    if isinstance(spec, TiledViTSpec):
        return _tiled(spec, tokens)
    if isinstance(spec, FusionSpec):
        from vtjax.account import fusion  # it takes rows from here

        if isinstance(tokens, Sequence):
            raise InputError(f"tokens must be one number, those of the text, found {list(tokens)}")
        return fusion.layers(spec, tokens)
    n = _token_counts(spec, tokens)
    d, patches = spec.width, spec.grid[0] * spec.grid[1]
    pixels = spec.patch**2 * spec.channels
    prefix = spec.prefix * d
    pos = (spec.pos_prefix + patches) * d if spec.pos == "learned" else 0
    embed = _linear(pixels, d, spec.patch_bias) + prefix + pos
    rows = [Row("embed", "embed", embed, patches * pixels * d)]
    if spec.norm_before:
        rows.append(Row("norm_before", "norm", _norm(spec, d), 0))
    for index, block in enumerate(spec.blocks):
        rows.extend(_block(spec, block, f"block_{index:02d}", n[index], n[index + 1]))
    if spec.norm_after:
        rows.append(Row("norm", "norm", _norm(spec, d), 0))
    if spec.pooling == "attention":
        rows.append(_pool(spec, n[-1]))
    if spec.fc_norm:
        rows.append(Row("fc_norm", "norm", _norm(spec, d), 0))
    if spec.classes:
        read = n[-1] if spec.pooling == "none" else 1
        head = Row("head", "head", _linear(d, spec.classes, spec.head_bias), read * d * spec.classes)
        rows.append(head)
        if spec.distill_token:
            rows.append(head._replace(name="head_distill"))
    return rows


def macs(spec: Spec, tokens: Sequence[int] | int | None = None) -> int:
    """MACs of one forward pass over one image or prompt; `tokens` as in `layers`."""
    return sum(row.macs for row in layers(spec, tokens))


def by_kind(rows: Iterable[Row]) -> list[Row]:
    """One row per kind that occurs, in the order of `KINDS`; name and kind are the kind."""
    rows = list(rows)
    groups = {kind: [row for row in rows if row.kind == kind] for kind in KINDS}
    return [Row(k, k, sum(r.params for r in g), sum(r.macs for r in g)) for k, g in groups.items() if g]


def _token_counts(spec: ViTSpec, tokens: Sequence[int] | int | None) -> list[int]:
    counts = _checked(spec.tokens if tokens is None else tokens, spec.depth)
    for index, block in enumerate(spec.blocks):
        if not block.attn and counts[index] != counts[index + 1]:
            raise InputError(
                f"block {index} has no attention, so no reducer: tokens[{index + 1}] must be {counts[index]}, "
                f"found {counts[index + 1]}"
            )
    return counts


def _checked(tokens: Sequence[int] | int, depth: int) -> list[int]:
    counts = [tokens] * (depth + 1) if isinstance(tokens, int) else list(tokens)
    if len(counts) != depth + 1:
        raise InputError(f"tokens must hold {depth + 1} counts (before block 0, after each), found {len(counts)}")
    if any(isinstance(c, bool) or c != int(c) or c < 1 for c in counts):
        raise InputError(f"tokens must be whole numbers above 0, found {counts}")
    return [int(c) for c in counts]


def _lm(spec: LMSpec, tokens: Sequence[int] | int | None) -> list[Row]:
    d, n = spec.width, _checked(PROMPT if tokens is None else tokens, spec.depth)
    rows = [Row("embed", "embed", spec.ids * d, 0)]
    for index, block in enumerate(spec.blocks):
        rows.extend(_decoder_block(spec, block, f"block_{index:02d}", n[index]))
    return [*rows, Row("norm", "norm", d, 0), Row("head", "head", 0 if spec.tied else d * spec.vocab, d * spec.vocab)]


def _tiled(spec: TiledViTSpec, tokens: Sequence[int] | int | None) -> list[Row]:
    n, d, plain = spec.tokens, spec.width, spec.plain
    if set(counts := _checked(n if tokens is None else tokens, spec.depth)) != {n}:
        raise InputError(f"tokens must be those of all {spec.tiles} tiles, {n} everywhere, found {counts}")
    norm, table = _norm(plain, d), (1 + len(spec.aspect_ratios)) * spec.tiles * d
    tiles = Row("tiles", "embed", table + 1, 0)
    embed = layers(plain)[0]
    positions = table * spec.tile_tokens + 1
    rows = [
        Row("embed", "embed", embed.params + tiles.params + positions, spec.tiles * embed.macs),
        Row("norm_before", "norm", norm, 0),
    ]
    for index, block in enumerate(spec.blocks):
        if index == spec.local:
            rows += [Row("norm", "norm", norm, 0), tiles]
        gate, mask = int(index >= spec.local), 2 * n**2 * block.heads * _MASK_FEATURES
        more = {"attention": (gate, mask), "mlp": (gate, 0)}
        for row in _block(plain, block, f"block_{index:02d}", n, n):
            params, work = more.get(row.kind, (0, 0))
            rows.append(row._replace(params=row.params + params, macs=row.macs + work))
    return rows


def _vlm(spec: VLMSpec, tokens: Sequence[int] | int | None) -> list[Row]:
    """Tower, bridge, decoder. What the tower has beyond the layer whose tokens are taken is not computed."""
    n = _checked(spec.placeholders + QUESTION if tokens is None else tokens, spec.decoder.depth)
    tower, used, visual = spec.tower, spec.tower.depth, spec.visual_tokens
    if isinstance(tower, ViTSpec) and tower.feature_layer is not None:
        used = tower.feature_layer % tower.depth + 1
    unused = {f"block_{i:02d}" for i in range(used, tower.depth)} | {"pool", "fc_norm", "head", "head_distill"}
    rows = [
        row._replace(name=f"tower/{row.name}", macs=0 if row.name.split("/")[0] in unused else row.macs)
        for row in layers(tower)
    ]
    e, d, bridge = spec.tower_width, spec.decoder.width, spec.bridge
    widths = {"mlp": [(e, bridge.hidden), (bridge.hidden, d)], "linear": [(e, d)], "none": []}[bridge.projector]
    if widths:
        params = sum(_linear(a, b, bridge.bias) for a, b in widths)
        rows.append(Row("bridge/projector", "bridge", params, visual * sum(a * b for a, b in widths)))
    if spec.adds_router_token:
        rows.append(Row("bridge/router_token", "bridge", d, 0))
    for layer in () if bridge.cross is None else bridge.cross.layers:
        assert bridge.cross is not None
        rows.append(_cross(spec, bridge.cross, layer, n[layer], visual))
    return rows + [row._replace(name=f"decoder/{row.name}") for row in layers(spec.decoder, n)]


def _cross(spec: VLMSpec, cross: CrossSpec, layer: int, n: int, m: int) -> Row:
    """Cross-attention of n rows of text to m visual tokens."""
    d, e, name = spec.decoder.width, spec.visual_width, f"bridge/block_{layer:02d}"
    if cross.inside:
        block = spec.decoder.blocks[layer]
        inner, shared = block.heads * block.head_dim, block.kv_heads * block.head_dim
        gate = inner if cross.form == "hyper" else 0
        return Row(name, "bridge", 2 * _linear(e, shared) + gate, 2 * m * e * shared + 2 * n * m * inner)
    inner, shared = cross.heads * cross.head_dim, cross.kv_heads * cross.head_dim
    norm = (1 if cross.norm == "rmsnorm" else 2) * d
    ups = 2 if cross.activation == "swiglu" else 1
    attention, mlp = 2 * d * inner + 2 * e * shared, (ups + 1) * d * cross.mlp
    params = attention + mlp + (norm + 1) * (2 if cross.mlp else 1) + (2 * cross.head_dim if cross.qk_norm else 0)
    return Row(name, "bridge", params, 2 * n * d * inner + 2 * m * e * shared + 2 * n * m * inner + n * mlp)


def _decoder_block(spec: LMSpec, block: DecoderBlockSpec, name: str, n: int) -> list[Row]:
    d, rows = spec.width, []
    if block.attn:
        inner, shared = block.heads * block.head_dim, block.kv_heads * block.head_dim
        params = _linear(d, inner, spec.qkv_bias) + 2 * _linear(d, shared, spec.qkv_bias)
        params += _linear(inner, d, spec.out_bias) + (2 * block.head_dim if spec.qk_norm == "head" else 0)
        work = 2 * n * d * (inner + shared) + 2 * n**2 * inner
        shapes = {"query": (d, inner), "key": (d, shared), "value": (d, shared), "out": (inner, d)}
        low = _low_rank(spec, shapes)
        rows += [Row(f"{name}/norm1", "norm", d, 0), Row(f"{name}/attn", "attention", params + low, work + n * low)]
    if block.ffn:
        params = 2 * _linear(d, block.mlp, spec.mlp_bias) + _linear(block.mlp, d, spec.mlp_bias)
        low = _low_rank(spec, {"up": (d, block.mlp), "gate": (d, block.mlp), "down": (block.mlp, d)})
        work = 3 * n * d * block.mlp + n * low
        rows += [Row(f"{name}/norm2", "norm", d, 0), Row(f"{name}/mlp", "mlp", params + low, work)]
    return rows + _adapter(spec, block, name, n)


def _low_rank(spec: LMSpec, shapes: dict[str, tuple[int, int]]) -> int:
    """Parameters of the low-rank updates of these projections, and their MACs per token."""
    lora = spec.lora
    return 0 if lora is None else sum(lora.rank * (a + b) for site, (a, b) in shapes.items() if site in lora.sites)


def _adapter(spec: Spec, block: BlockSpec | DecoderBlockSpec, name: str, n: int) -> list[Row]:
    """What stands in for a removed block."""
    d, h = spec.width, block.adapter
    if not h or block.attn or block.ffn:
        return []
    return [Row(f"{name}/adapter", "adapter", _linear(d, h) + _linear(h, d), 2 * n * d * h)]


def _block(spec: ViTSpec, block: BlockSpec, name: str, entering: int, leaving: int) -> list[Row]:
    d, rows = spec.width, []
    scale = 0 if spec.layer_scale is None else d
    if block.attn:
        inner = block.heads * block.head_dim
        params = 2 * _linear(d, inner, spec.qkv_bias) + _linear(d, inner, spec.qkv_bias and spec.key_bias)
        params += _linear(inner, d, spec.out_bias) + scale
        if spec.qk_norm != "none":
            params += 2 * _norm(spec, block.head_dim if spec.qk_norm == "head" else inner)
        work = 4 * entering * d * inner + 2 * entering**2 * inner
        rows += [Row(f"{name}/norm1", "norm", _norm(spec, d), 0), Row(f"{name}/attn", "attention", params, work)]
    if block.ffn:
        params = _mlp(spec, block.mlp, spec.mlp_bias) + scale
        if spec.mlp_norm:
            params += _norm(spec, block.mlp)
        work = leaving * _mlp(spec, block.mlp, bias=False)
        rows += [Row(f"{name}/norm2", "norm", _norm(spec, d), 0), Row(f"{name}/mlp", "mlp", params, work)]
    return rows + _adapter(spec, block, name, entering)


def _pool(spec: ViTSpec, n: int) -> Row:
    """Attention pooling: one probe over n tokens, then an MLP on one vector."""
    d = spec.width
    params = d + 4 * _linear(d, d) + _norm(spec, d) + _mlp(spec, spec.pool_mlp, bias=True)
    work = 2 * d * d + 2 * n * d * d + 2 * n * d + _mlp(spec, spec.pool_mlp, bias=False)
    return Row("pool", "pool", params, work)


def _mlp(spec: ViTSpec, hidden: int, bias: bool) -> int:
    """Parameters of an MLP; without biases also its MACs per token."""
    ups = 2 if spec.activation == "swiglu" else 1
    return ups * _linear(spec.width, hidden, bias) + _linear(hidden, spec.width, bias)


def _linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + (outputs if bias else 0)


def _norm(spec: ViTSpec, width: int) -> int:
    return width if spec.norm == "rmsnorm" else 2 * width
