# SPDX-License-Identifier: Apache-2.0
"""Parameter counts of a spec or of a tree of arrays, concrete or abstract."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from vtjax.account import flops
from vtjax.spec import ModelSpec


class Group(NamedTuple):
    """Parameters of one kind below one top-level name. Equal neighbouring blocks share a row: `block_00..11`."""

    name: str
    kind: str
    arrays: int
    params: int
    share: float
    mbytes: float


def count(model: Any) -> int:
    """Number of parameters of a spec (from its formulas) or of a tree of arrays or `ShapeDtypeStruct`s."""
    if isinstance(model, ModelSpec):
        return sum(row.params for row in flops.layers(model))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model))


def table(tree: Any) -> list[Group]:
    """Rows per top-level name and kind, in the order of execution; `viz.tables.text` formats them for people.

    Kinds are those of `flops.KINDS`, and "method" for what no backbone owns. `share` is in [0, 1]; 1 MB = 10^6 bytes,
    in the arrays' own dtype. A multimodal model's rows are those of its parts.
    """
    if {"tower", "bridge", "decoder"} <= set(tree):
        total = count(tree)
        return [
            row._replace(
                name=f"{part}/{row.name}",
                kind="bridge" if part == "bridge" else row.kind,
                share=row.params / max(total, 1),
            )
            for part in tree
            for row in table(tree[part])
        ]
    tops: dict[str, dict[str, list[Any]]] = {}
    for path, leaf in sorted(_leaves(tree), key=lambda item: _order(item[0])):
        tops.setdefault(path.split("/")[0], {}).setdefault(kind_of(path), []).append(leaf)
    total = count(tree)
    rows = []
    for _, members in itertools.groupby(tops.items(), key=lambda item: _signature(*item)):
        names, kinds = zip(*members, strict=True)
        name = names[0] if len(names) == 1 else f"{names[0]}..{names[-1].removeprefix('block_')}"
        for kind in kinds[0]:
            leaves = [leaf for block in kinds for leaf in block[kind]]
            size = count(leaves)
            nbytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
            rows.append(Group(name, kind, len(leaves), size, size / max(total, 1), nbytes / 1e6))
    return rows


def kind_of(path: str) -> str:
    """Kind of a parameter by its path (`block_00/attn/out/kernel`), as in the rows of `flops.layers`."""
    top, *rest = path.split("/")
    if _BLOCK.fullmatch(top):
        return _BLOCK_KINDS.get(rest[0], "method") if rest else "method"
    return _TOP_KINDS.get(top, "method")


_BLOCK = re.compile(r"block_(\d+)")

# In the order of execution.
_TOP_KINDS = {
    "embed": "embed",
    "projector": "bridge",
    "router_token": "bridge",
    "norm_before": "norm",
    "norm": "norm",
    "tiles": "embed",
    "pool": "pool",
    "fc_norm": "norm",
    "head": "head",
    "head_distill": "head",
}
_BLOCK_KINDS = {
    "norm1": "norm",
    "attn": "attention",
    "layer_scale1": "attention",
    "gate1": "attention",
    "key": "attention",  # these three: of hyper-attention
    "value": "attention",
    "gate": "attention",
    "gate2": "mlp",
    "norm2": "norm",
    "mlp": "mlp",
    "layer_scale2": "mlp",
    "adapter": "adapter",
}


def _leaves(tree: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, (*prefix, str(key)))
    else:
        yield "/".join(prefix), tree


def _order(path: str) -> tuple[int, int, int]:
    """Before the blocks, the blocks by number, after them, methods last (in their own order: the sort is stable)."""
    top = path.split("/")[0]
    block = _BLOCK.fullmatch(top)
    tops = list(_TOP_KINDS)
    place = 3 if block else tops.index(top) if top in tops[:3] else 3 + tops.index(top) if top in tops else 99
    kind = kind_of(path)
    return place, int(block[1]) if block else 0, flops.KINDS.index(kind) if kind in flops.KINDS else 99


def _signature(name: str, kinds: Mapping[str, list[Any]]) -> Any:
    """Equal for neighbouring blocks with equal arrays; unique for everything else."""
    if not _BLOCK.fullmatch(name):
        return name
    return tuple((kind, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)) for kind, leaves in kinds.items())
