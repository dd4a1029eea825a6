# SPDX-License-Identifier: Apache-2.0
"""What the specs of all models share: history, JSON form, edits."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from typing import Any, TypeVar

from vtjax.errors import InputError
from vtjax.spec import fields

FORMAT = 1

S = TypeVar("S", bound="ModelSpec")

_BACKBONE = re.compile(r"embed|norm_before|block_\d+|norm|tiles|fc_norm|pool|head|head_distill|tower|bridge|decoder")


def is_backbone(name: str) -> bool:
    """Whether a top-level name of a parameter tree is the model's own; all others are methods' (`params["ltmp"]`)."""
    return _BACKBONE.fullmatch(name) is not None


@dataclasses.dataclass(frozen=True)
class Lineage:
    """One step of a model's history: what was done to which parent.

    `parent` is the parent's `params_sha256`; `arguments` is a JSON text, so that the spec stays hashable.
    """

    parent: str
    operation: str
    arguments: str = "{}"
    seed: int | None = None


class ModelSpec:
    """Methods of every spec: a frozen dataclass with one block spec per layer in `blocks`, and a `lineage`.

    Block specs have the fields `heads`, `head_dim`, `mlp`, `attn`, `ffn`, `adapter` and `reduce`, with one meaning in
    all models. Blocks are never renumbered: a removed one stays, with `attn=False, ffn=False`.
    """

    blocks: tuple[Any, ...]
    lineage: tuple[Lineage, ...]

    @property
    def depth(self) -> int:
        """Number of blocks L, removed ones included."""
        return len(self.blocks)

    def edit(self: S, **changes: Any) -> S:
        """A copy with some fields replaced; `blocks` may be a mapping `{index: {field: value}}` or a function
        `(index, block) -> block`, which edits blocks in place of replacing them all.

        Raises:
          InputError: an unknown field, a block index out of range, or a combination that is not defined.
        """
        return fields.edit(self, changes)

    def unreduced(self: S) -> S:
        """The same model without token reducers; what else was done to it stays, and so does its history."""
        return self.edit(blocks=lambda _, block: dataclasses.replace(block, reduce=None))

    def diff(self, other: ModelSpec) -> dict[str, tuple[Any, Any]]:
        """Fields that differ, by dotted name: `{"blocks[3].mlp": (1536, 384)}`; a missing side is None."""
        return fields.diff(self.to_dict(), other.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, with `format` and `kind`."""
        return {"format": FORMAT, "kind": type(self).__name__, **fields.plain(self)}

    def to_json(self) -> str:
        """Indented JSON text, stable under a round trip."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @property
    def sha256(self) -> str:
        """Hash of the JSON form; equal specs have equal hashes on every machine."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def check_blocks(spec: ModelSpec) -> None:
    """Raises InputError for blocks that no model can have."""
    kind = type(spec).__name__
    if not spec.blocks:
        raise InputError(f"{kind}.blocks must hold at least one block, found none")
    for i, block in enumerate(spec.blocks):
        at = f"{kind}.blocks[{i}]"
        if block.attn and (block.heads <= 0 or block.head_dim <= 0):
            raise InputError(f"{at} needs heads and head_dim above 0, found {block.heads} and {block.head_dim}")
        if block.ffn and block.mlp <= 0:
            raise InputError(f"{at}.mlp must be positive (or set ffn=False), found {block.mlp}")
        if block.adapter < 0:
            raise InputError(f"{at}.adapter must be 0 or more, found {block.adapter}")
        if block.adapter and (block.attn or block.ffn):
            raise InputError(
                f"{at}.adapter={block.adapter} stands in for a removed block, found attn={block.attn}, ffn={block.ffn}"
            )
        if block.reduce is not None and not block.attn:
            raise InputError(f"{at}.reduce={block.reduce!r} needs the block's attention, which was removed")
