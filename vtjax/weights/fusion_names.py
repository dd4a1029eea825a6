# SPDX-License-Identifier: Apache-2.0
"""Shapes of a fusion encoder's own parameters, by our names."""

from __future__ import annotations

import dataclasses

from vtjax.spec import FusionSpec, ViTSpec

Shape = tuple[int, ...]


def shapes(spec: FusionSpec, image: dict[str, Shape]) -> dict[str, Shape]:
    """Shape of every parameter but the adapters', which are a method's.

    Args:
      image: those of `image_spec`, of one stream the ViT with these blocks, of two the tower.
    """
    d, e = spec.width, spec.image.width
    out: dict[str, Shape] = {}

    def dense(name: str, rows: int, columns: int) -> None:
        out[f"{name}/kernel"], out[f"{name}/bias"] = (rows, columns), (columns,)

    def norm(name: str, width: int) -> None:
        out[f"{name}/scale"] = out[f"{name}/bias"] = (width,)

    out |= {"embed/text/tokens": (spec.vocab, d), "embed/text/pos": (spec.positions, d), "embed/text/type": (d,)}
    norm("embed/text/norm", d)
    out["embed/marks/type"] = (1 + spec.images, d)
    if spec.streams == 1:
        out |= {name.replace("embed/", "embed/image/", 1): shape for name, shape in image.items()}
    else:
        out |= {f"tower/{name}": shape for name, shape in image.items()}
        out["embed/marks/first"] = (d,)
        dense("embed/marks/text", d, d)
        dense("embed/marks/image", e, d)
        for index, block in enumerate(spec.blocks):
            if not block.attn:
                continue
            b, inner, cross = f"block_{index:02d}", block.heads * block.head_dim, index < 2 * spec.fusion
            for part in ("self", "cross") if cross else ("self",):
                for name in ("query", "key", "value"):
                    dense(f"{b}/{part}/{name}", d, inner)
                dense(f"{b}/{part}/out", inner, d)
            for number in (1, 2, 3) if cross else (1, 3):
                norm(f"{b}/norm{number}", d)
            dense(f"{b}/mlp/up", d, block.mlp)
            dense(f"{b}/mlp/down", block.mlp, d)
    for name in ("text", "image")[: spec.streams]:
        dense(f"pool/{name}/dense", d, d)
    if spec.classes:
        dense("head/up", spec.pooled, 2 * d)
        norm("head/norm", 2 * d)
        dense("head/down", 2 * d, spec.classes)
    if spec.ranks:
        dense("head/rank", spec.pooled, 1)
        dense("head/match", spec.pooled, 2)
    return out


def image_spec(spec: FusionSpec) -> ViTSpec:
    """The ViT that a fusion encoder holds: of one stream with the joint blocks, without stand-ins."""
    if spec.streams == 2:
        return spec.image
    image: ViTSpec = spec.image.edit(blocks=tuple(dataclasses.replace(block, adapter=0) for block in spec.blocks))
    return image
