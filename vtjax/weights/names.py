# SPDX-License-Identifier: Apache-2.0
"""From our parameter tree to foreign arrays and back, by the tables of `weights.tables`.

Import splits what export joins, so that export is the inverse of import, bit for bit. Our names are an API:
`docs/parameter-names.md`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from vtjax.errors import InputError
from vtjax.spec import FusionSpec, LMSpec, Spec, TiledViTSpec, ViTSpec, VLMSpec, is_backbone
from vtjax.weights import fusion_names
from vtjax.weights.tables import TABLES, Row, Table

Params = dict[str, Any]
Shape = tuple[int, ...]

LISTED = 20
"""How many names of each kind of mistake an error message lists."""


def is_own(name: str) -> bool:
    """Whether a flat name is one of the backbone's in our naming; other names without "." belong to a method, which may
    act in a part of a multimodal model (`decoder/dpn/...`)."""
    top, _, rest = name.partition("/")
    return is_backbone(top) and (top not in ("tower", "decoder") or is_backbone(rest.partition("/")[0]))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested dict by "/"-joined name, in the tree's order."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Inverse of `flatten`."""
    tree: Params = {}
    for name, value in flat.items():
        *parents, leaf = name.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree


def shapes(spec: Spec) -> dict[str, Shape]:
    """Shape of every parameter of the backbone of `spec`, by our names; the same tree as the model's `init`."""
    if isinstance(spec, VLMSpec):
        parts = {"tower": shapes(spec.tower), "bridge": bridge_shapes(spec), "decoder": shapes(spec.decoder)}
        return {f"{part}/{name}": shape for part, found in parts.items() for name, shape in found.items()}
    if isinstance(spec, TiledViTSpec):
        return _tiled_shapes(spec)
    if isinstance(spec, FusionSpec):
        return fusion_names.shapes(spec, _vit_shapes(fusion_names.image_spec(spec)))
    return _lm_shapes(spec) if isinstance(spec, LMSpec) else _vit_shapes(spec)


def bridge_shapes(spec: VLMSpec) -> dict[str, Shape]:
    """Shape of every parameter of the bridge, by its name below `bridge/`."""
    bridge, d, e = spec.bridge, spec.decoder.width, spec.visual_width
    out: dict[str, Shape] = {}

    def dense(name: str, rows: int, columns: int, bias: bool = False) -> None:
        out[f"{name}/kernel"] = (rows, columns)
        if bias:
            out[f"{name}/bias"] = (columns,)

    if bridge.projector == "mlp":
        dense("projector/up", spec.tower_width, bridge.hidden, bridge.bias)
    if bridge.projector != "none":
        dense("projector/down", bridge.hidden or spec.tower_width, d, bridge.bias)
    if spec.adds_router_token:
        out["router_token"] = (d,)
    cross = bridge.cross
    for layer in () if cross is None else cross.layers:
        assert cross is not None
        b = f"block_{layer:02d}"
        if cross.inside:
            block = spec.decoder.blocks[layer]
            for name in ("key", "value"):
                dense(f"{b}/{name}", e, block.kv_heads * block.head_dim, True)
            if cross.form == "hyper":
                out[f"{b}/gate"] = (block.heads * block.head_dim,)
            continue
        inner = {"query": cross.heads, "key": cross.kv_heads, "value": cross.kv_heads}
        for number in (1, 2) if cross.mlp else (1,):
            out[f"{b}/gate{number}"] = (1,)
            out[f"{b}/norm{number}/scale"] = (d,)
            if cross.norm == "layernorm":
                out[f"{b}/norm{number}/bias"] = (d,)
        for name, heads in inner.items():
            dense(f"{b}/attn/{name}", d if name == "query" else e, heads * cross.head_dim)
        if cross.qk_norm:
            out |= {f"{b}/attn/{name}_norm/scale": (cross.head_dim,) for name in ("query", "key")}
        dense(f"{b}/attn/out", cross.heads * cross.head_dim, d)
        if cross.mlp:
            for name in ("up", "gate") if cross.activation == "swiglu" else ("up",):
                dense(f"{b}/mlp/{name}", d, cross.mlp)
            dense(f"{b}/mlp/down", cross.mlp, d)
    return out


def _lm_shapes(spec: LMSpec) -> dict[str, Shape]:
    d = spec.width
    out: dict[str, Shape] = {"embed/tokens": (spec.vocab + spec.extra, d)}
    lora = spec.lora

    def dense(name: str, rows: int, columns: int, bias: bool) -> None:
        out[f"{name}/kernel"] = (rows, columns)
        if bias:
            out[f"{name}/bias"] = (columns,)
        if lora is not None and name.split("/")[-1] in lora.sites and "/adapter/" not in name:
            out[f"{name}/lora_in/kernel"] = (rows, lora.rank)
            out[f"{name}/lora_out/kernel"] = (lora.rank, columns)

    for i, block in enumerate(spec.blocks):
        b, heads = f"block_{i:02d}", {"query": block.heads, "key": block.kv_heads, "value": block.kv_heads}
        if block.attn:
            out[f"{b}/norm1/scale"] = (d,)
            for name, count in heads.items():
                dense(f"{b}/attn/{name}", d, count * block.head_dim, spec.qkv_bias)
            if spec.qk_norm == "head":
                out |= {f"{b}/attn/{name}_norm/scale": (block.head_dim,) for name in ("query", "key")}
            dense(f"{b}/attn/out", block.heads * block.head_dim, d, spec.out_bias)
        if block.ffn:
            out[f"{b}/norm2/scale"] = (d,)
            for name in ("up", "gate"):
                dense(f"{b}/mlp/{name}", d, block.mlp, spec.mlp_bias)
            dense(f"{b}/mlp/down", block.mlp, d, spec.mlp_bias)
        if block.adapter and not block.attn and not block.ffn:
            dense(f"{b}/adapter/down", d, block.adapter, True)
            dense(f"{b}/adapter/up", block.adapter, d, True)
    out["norm/scale"] = (d,)
    if not spec.tied:
        out["head/kernel"] = (d, spec.vocab)
    return out


def _vit_shapes(spec: ViTSpec) -> dict[str, Shape]:
    d = spec.width
    out: dict[str, Shape] = {}

    def dense(name: str, rows: int, columns: int, bias: bool = True) -> None:
        out[f"{name}/kernel"] = (rows, columns)
        if bias:
            out[f"{name}/bias"] = (columns,)

    def norm(name: str, width: int) -> None:
        out[f"{name}/scale"] = (width,)
        if spec.norm == "layernorm":
            out[f"{name}/bias"] = (width,)

    dense("embed/patch", spec.patch**2 * spec.channels, d, spec.patch_bias)
    if spec.class_token:
        out["embed/class_token"] = (d,)
    if spec.distill_token:
        out["embed/distill_token"] = (d,)
    if spec.registers:
        out["embed/registers"] = (spec.registers, d)
    if spec.pos == "learned":
        out["embed/pos"] = (spec.pos_prefix + spec.grid[0] * spec.grid[1], d)
    if spec.norm_before:
        norm("norm_before", d)
    for i, block in enumerate(spec.blocks):
        b, inner = f"block_{i:02d}", block.heads * block.head_dim
        if block.attn:
            norm(f"{b}/norm1", d)
            for name, bias in (("query", True), ("key", spec.key_bias), ("value", True)):
                dense(f"{b}/attn/{name}", d, inner, spec.qkv_bias and bias)
            if spec.qk_norm != "none":
                norm(f"{b}/attn/query_norm", inner if spec.qk_norm == "full" else block.head_dim)
                norm(f"{b}/attn/key_norm", inner if spec.qk_norm == "full" else block.head_dim)
            dense(f"{b}/attn/out", inner, d, spec.out_bias)
        if block.ffn:
            norm(f"{b}/norm2", d)
            for name in ("up", "gate") if spec.activation == "swiglu" else ("up",):
                dense(f"{b}/mlp/{name}", d, block.mlp, spec.mlp_bias)
            if spec.mlp_norm:
                norm(f"{b}/mlp/norm", block.mlp)
            dense(f"{b}/mlp/down", block.mlp, d, spec.mlp_bias)
        for number, used in ((1, block.attn), (2, block.ffn)):
            if used and spec.layer_scale is not None:
                out[f"{b}/layer_scale{number}"] = (d,)
        if block.adapter and not block.attn and not block.ffn:
            dense(f"{b}/adapter/down", d, block.adapter)
            dense(f"{b}/adapter/up", block.adapter, d)
    if spec.norm_after:
        norm("norm", d)
    if spec.fc_norm:
        norm("fc_norm", d)
    if spec.pooling == "attention":
        out["pool/probe"] = (d,)
        for name in ("query", "key", "value", "out"):
            dense(f"pool/{name}", d, d)
        norm("pool/norm", d)
        dense("pool/mlp/up", d, spec.pool_mlp)
        dense("pool/mlp/down", spec.pool_mlp, d)
    if spec.classes:
        for name in ("head", "head_distill") if spec.distill_token else ("head",):
            dense(name, d, spec.classes, spec.head_bias)
    return out


def _tiled_shapes(spec: TiledViTSpec) -> dict[str, Shape]:
    out, table = _vit_shapes(spec.plain), (1 + len(spec.aspect_ratios), spec.tiles)
    out |= {"embed/pos_gate": (1,), "embed/tile_pos": (*table, spec.tile_tokens, spec.width)}
    for name in ("embed/tiles", "tiles"):
        out |= {f"{name}/table": (*table, spec.width), f"{name}/gate": (1,)}
    for i in range(spec.local, spec.depth):
        gates = {1: spec.blocks[i].attn, 2: spec.blocks[i].ffn}
        out |= {f"block_{i:02d}/gate{number}": (1,) for number, used in gates.items() if used}
    return out


def rows(spec: Spec, table: Table, prefix: str = "") -> list[Row]:
    """The table's rows for this spec, with full names on both sides; each of our names occurs exactly once.

    Raises:
      InputError: parameters of the spec that the table has no place for.
    """
    ours = shapes(spec)
    taken: set[str] = set()
    out = []

    def take(row: Row, at: str, stem: str) -> None:
        names = tuple(at + n for n in row.ours)
        if all(n in ours and n not in taken for n in names) and all(at + n in ours for n in row.needs.split()):
            taken.update(names)
            foreign = row.foreign[1:] if row.foreign.startswith("/") else f"{prefix}{stem}{row.foreign}"
            out.append(Row(names, foreign, row.kind))

    for row in table.top:
        take(row, "", "")
    for i in range(spec.depth):
        for row in table.block:
            take(row, f"block_{i:02d}/", f"{_stem(spec, table, i)}.")
    left = [n for n in ours if n not in taken]
    if left:
        raise InputError(f"this naming has no place for {listed(left)}, which the spec asks for")
    return out


def _stem(spec: Spec, table: Table, block: int) -> str:
    if isinstance(spec, TiledViTSpec) and block >= spec.local:
        return table.global_stem.format(block - spec.local)
    return table.stem.format(block)


def foreign_shapes(spec: Spec, table: Table, prefix: str = "") -> dict[str, Shape]:
    """Shape of every foreign array of `spec`."""
    ours = shapes(spec)
    return {
        row.foreign: _joined_shape([_outward_shape(ours[n], row.kind, spec) for n in row.ours])
        for row in rows(spec, table, prefix)
    }


def find_table(names: Iterable[str], candidates: Iterable[str] = TABLES) -> tuple[str, str]:
    """(table name, prefix) of a set of foreign names; the table with the most telling marks wins.

    Raises:
      InputError: the names are of none of the tables.
    """
    present = set(names)
    ordered = sorted(candidates, key=lambda n: (TABLES[n].marks == ("",), n != "timm_eva_split"))
    for name in ordered:
        table = TABLES[name]
        for prefix in table.prefixes:
            if prefix + table.anchor in present and any(mark in n for n in present for mark in table.marks):
                return name, prefix
    some = listed(sorted(present), 3)
    raise InputError(
        f"the names are neither vtjax's, timm's, Hugging Face's nor GGUF's, for a model that a spec describes: {some}"
    )


def to_ours(spec: Spec, tensors: Mapping[str, np.ndarray], table: Table, prefix: str, where: str) -> Params:
    """Our parameters from foreign arrays.

    Args:
      spec: the model.
      tensors: foreign arrays by name; only what is needed is read.
      table, prefix: their naming.
      where: the file, for the error line.

    Returns:
      Nested dict of float32 arrays of their own memory.

    Raises:
      InputError: one line with every missing, extra and mis-shaped name.
    """
    wanted = rows(spec, table, prefix)
    expected = foreign_shapes(spec, table, prefix)
    ignored = [re.compile(pattern) for pattern in table.ignored]

    def means_nothing(name: str) -> bool:
        return any(p.fullmatch(name) or p.fullmatch(name.removeprefix(prefix)) for p in ignored)

    found = {n: shape for n, shape in shapes_of(tensors).items() if n in expected or not means_nothing(n)}
    check(expected, found, where)
    ours = shapes(spec)
    flat: dict[str, np.ndarray] = {}
    for row in wanted:
        array = tensors[row.foreign]
        check_floating(row.foreign, array, where)
        start = 0
        for name in row.ours:
            size = _outward_shape(ours[name], row.kind, spec)[0]
            part = array[start : start + size] if len(row.ours) > 1 else array
            flat[name] = np.array(_inward(part, row.kind, ours[name]), np.float32, order="C")
            start += size
    return unflatten({name: flat[name] for name in ours})


def to_foreign(spec: Spec, params: Params, table: Table, prefix: str) -> dict[str, np.ndarray]:
    """Foreign arrays from our parameters; the inverse of `to_ours`.

    Raises:
      InputError: parameters that do not fit the spec, or that the table has no place for (a method's, for example).
    """
    flat = {name: np.asarray(a, np.float32) for name, a in flatten(params)}
    check(shapes(spec), {n: a.shape for n, a in flat.items()}, "the parameters")
    out = {}
    for row in rows(spec, table, prefix):
        parts = [_outward(flat[n], row.kind, spec) for n in row.ours]
        out[row.foreign] = np.ascontiguousarray(np.concatenate(parts) if len(parts) > 1 else parts[0])
    for name in table.fill:
        out[prefix + name] = np.zeros((1, spec.width), np.float32)
    return out


def with_pos_prefix(spec: ViTSpec, params: Params, count: int) -> tuple[ViTSpec, Params]:
    """The same function with a position embedding over the first `count` prefix tokens.

    Rows that go away are added to their tokens, as the model does; new rows are zero. Libraries differ: DINOv2 with
    registers has a row for the class token in Hugging Face and none in timm.
    """
    if count == spec.pos_prefix or spec.pos != "learned":
        return spec, params
    edited = spec.edit(pos_prefix=count)
    embed: dict[str, Any] = dict(params["embed"])
    pos, old = np.asarray(embed["pos"], np.float32), spec.pos_prefix
    zeros = np.zeros((max(count - old, 0), spec.width), np.float32)
    embed["pos"] = np.concatenate([pos[: min(count, old)], zeros, pos[old:]])
    singles = ["class_token"] * spec.class_token + ["distill_token"] * spec.distill_token
    for i in range(count, old):
        name = singles[i] if i < len(singles) else "registers"
        token = np.array(embed[name], np.float32)
        token[... if i < len(singles) else i - len(singles)] += pos[i]
        embed[name] = token
    return edited, {**params, "embed": embed}


def with_head_bias(spec: ViTSpec, params: Params, wanted: bool) -> tuple[ViTSpec, Params]:
    """The same function with or without a bias in the head, where it has none or a zero one (CLIP's projection has
    a zero bias in timm and none in Hugging Face)."""
    if not spec.classes or spec.head_bias == wanted or (not wanted and np.any(np.asarray(params["head"]["bias"]))):
        return spec, params
    head = {"kernel": params["head"]["kernel"]} | ({"bias": np.zeros(spec.classes, np.float32)} if wanted else {})
    return spec.edit(head_bias=wanted), {**params, "head": head}


def check(expected: Mapping[str, Shape], found: Mapping[str, Shape], where: str) -> None:
    """Raises one InputError line that lists every missing, extra and mis-shaped name."""
    missing = [n for n in expected if n not in found]
    extra = sorted(n for n in found if n not in expected)
    shaped = [
        f"{n} expected {list(expected[n])} found {list(found[n])}"
        for n in expected
        if n in found and tuple(found[n]) != tuple(expected[n])
    ]
    kinds = (("missing", missing), ("extra", extra), ("mis-shaped", shaped))
    faults = [f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds if names]
    if faults:
        raise InputError(f"{where} do not fit the spec; {'; '.join(faults)}")


def check_floating(name: str, array: np.ndarray, where: str) -> None:
    """Raises InputError where a weight does not hold floating-point numbers."""
    if array.dtype.kind != "f":
        raise InputError(f"{where}: {name} must hold floating-point numbers, found {array.dtype}")


def listed(names: list[str], limit: int = LISTED) -> str:
    """Names with commas, the first `limit` of them."""
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def shapes_of(tensors: Mapping[str, np.ndarray]) -> Mapping[str, Shape]:
    """Shapes without reading arrays that are still on disk."""
    known = getattr(tensors, "shapes", None)
    return known if known is not None else {n: a.shape for n, a in tensors.items()}


def _joined_shape(parts: list[Shape]) -> Shape:
    return (sum(p[0] for p in parts), *parts[0][1:]) if len(parts) > 1 else parts[0]


def _outward_shape(shape: Shape, kind: str, spec: Spec) -> Shape:
    if kind == "linear":
        return shape[::-1]
    if kind == "conv":
        return (shape[1], spec.channels, spec.patch, spec.patch)
    if kind == "rows":
        return (shape[0], math.prod(shape[1:]))
    return {"same": shape, "lead": (1, *shape), "token": (1, 1, *shape)}[kind]


def _outward(array: np.ndarray, kind: str, spec: Spec) -> np.ndarray:
    if kind == "linear":
        return array.T
    if kind == "conv":
        return array.reshape(spec.patch, spec.patch, spec.channels, -1).transpose(3, 2, 0, 1)
    return array.reshape(_outward_shape(array.shape, kind, spec))


def _inward(array: np.ndarray, kind: str, shape: Shape) -> np.ndarray:
    if kind == "linear":
        return array.T
    if kind == "conv":
        return array.transpose(2, 3, 1, 0).reshape(shape)
    return array.reshape(shape)
