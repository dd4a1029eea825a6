# SPDX-License-Identifier: Apache-2.0
"""Parameters and MACs of fusion encoders, module by module (DAS spec, section 5). Conventions as in `flops`."""

from __future__ import annotations

from vtjax.account import flops
from vtjax.account.flops import Row
from vtjax.errors import InputError
from vtjax.spec import AdapterSpec, BlockSpec, FusionSpec

TEXT = 40
"""Tokens of the text where none are told, as the DAS release counts."""


def layers(spec: FusionSpec, text: int | None = None) -> list[Row]:
    """Rows of all layers, in the order of execution, for one text and its images.

    A row holds the parameters below its path. Adapters are `das/block_00/self`, ...: of kept modules those inside, of
    removed ones what stands in; in a model with all modules, what would stand in is not computed and has parameters.

    Args:
      text: tokens of the text, `TEXT` where none are told.

    Raises:
      InputError: a text without tokens, or longer than the model takes.
    """
    n = TEXT if text is None else text
    if isinstance(n, bool) or not 0 < n <= spec.positions:
        raise InputError(f"tokens must be those of the text, 1..{spec.positions}, found {n}")
    d, m, rows = spec.width, spec.image.tokens, []
    rows.append(Row("embed/text", "embed", (spec.vocab + spec.positions + 3) * d, 0))
    passes: list[Row] = []  # once per image
    if spec.streams == 1:
        passes += [row._replace(name="embed/image") for row in flops.layers(spec.image) if row.kind == "embed"]
        passes.append(Row("embed/marks", "embed", (1 + spec.images) * d, 0))
        for index in range(spec.depth):
            passes += module(spec, index, n + m, 0)
        passes.append(Row("norm", "norm", 2 * d, 0))
    else:
        for index in range(2 * spec.fusion, spec.depth):
            rows += module(spec, index, n, 0)
        passes += [row._replace(name=f"tower/{row.name}") for row in flops.layers(spec.image)]
        e = spec.image.width
        own = (1 + spec.images) * d + d + (d + 1) * d + (e + 1) * d
        passes.append(Row("embed/marks", "embed", own, (n * d + m * e) * d))
        for layer in range(spec.fusion):
            passes += module(spec, layer, n, m) + module(spec, spec.fusion + layer, m, n)
    passes += [Row(f"pool/{name}", "pool", (d + 1) * d, d * d) for name in ("text", "image")[: spec.streams]]
    rows += [row._replace(macs=spec.images * row.macs) for row in passes]
    if spec.classes:
        pooled, hidden = spec.pooled, 2 * d
        params = (pooled + 1) * hidden + 2 * hidden + (hidden + 1) * spec.classes
        rows.append(Row("head", "head", params, pooled * hidden + hidden * spec.classes))
    if spec.ranks:
        rows.append(Row("head", "head", 3 * (spec.pooled + 1), 3 * spec.pooled))
    return rows


def module(spec: FusionSpec, index: int, n: int, m: int) -> list[Row]:
    """Module `index` on n tokens that attend to m others (0 = to none), its adapters included."""
    d, block, name, stand_in = spec.width, spec.blocks[index], f"block_{index:02d}", spec.stand_in(index)

    def adapter(site: str, found: AdapterSpec | None, runs: bool) -> list[Row]:
        if found is None:
            return []
        return [Row(f"das/{name}/{site}", "adapter", found.params(d), found.macs(d, n) if runs else 0)]

    if not block.attn:
        return adapter("skip", stand_in, True)
    if spec.streams == 1:
        one = spec.image.edit(blocks=(block,))
        rows = [
            row._replace(name=row.name.replace("block_00", name))
            for row in flops.layers(one, n)
            if row.name.startswith("block_00")
        ]
        sites: tuple[str, ...] = ("attn", "mlp")
    else:
        cross = index < 2 * spec.fusion
        rows = _post_layer(d, block, name, n, m if cross else 0, cross)
        sites = ("self", "cross", "out") if cross else ()
    for site in sites:
        rows += adapter(site, spec.inner, True)
    if index < spec.arms and not spec.skips:
        rows += adapter("skip", stand_in, False)
    return rows


def _post_layer(d: int, block: BlockSpec, name: str, n: int, m: int, cross: bool) -> list[Row]:
    inner = block.heads * block.head_dim
    params = 3 * (d + 1) * inner + (inner + 1) * d
    rows = [Row(f"{name}/self", "attention", params, 4 * n * d * inner + 2 * n * n * inner)]
    if cross:
        rows.append(Row(f"{name}/cross", "attention", params, 2 * (n + m) * d * inner + 2 * n * m * inner))
    rows += [Row(f"{name}/norm{number}", "norm", 2 * d, 0) for number in ((1, 2, 3) if cross else (1, 3))]
    mlp = (d + 1) * block.mlp + (block.mlp + 1) * d
    return [*rows, Row(f"{name}/mlp", "mlp", mlp, 2 * n * d * block.mlp)]


def additional(spec: FusionSpec, text: int | None = None) -> int:
    """MACs that adapters and skipping add to the model that they were added to; negative = cheaper."""
    original = spec.edit(
        inner=None,
        skip=None,
        encoder_skip=None,
        blocks=lambda _, block: BlockSpec(block.heads, block.head_dim, block.mlp),
    )
    return sum(row.macs for row in layers(spec, text)) - sum(row.macs for row in layers(original, text))


def updated(spec: FusionSpec) -> int:
    """Adapter parameters of the fine-tuned model as published counts have them: the norms of adapters left out, heads
    and poolers too, and of the adapters that stand in only those of skipped modules."""
    total = 0
    for index, block in enumerate(spec.blocks):
        stand_in = spec.stand_in(index)
        if block.attn and spec.inner is not None:
            sites = 2 if spec.streams == 1 else 3 if index < 2 * spec.fusion else 0
            total += sites * spec.inner.params(spec.width, norm=False)
        elif not block.attn and stand_in is not None:
            total += stand_in.params(spec.width, norm=False)
    return total
