# SPDX-License-Identifier: Apache-2.0
"""One file per paper: spec edit, parameter map, what goes into the model's slots, and the pieces of a loss."""

from __future__ import annotations

from typing import Any

from vtjax import models
from vtjax.errors import InputError
from vtjax.spec import LMSpec, Spec, TiledViTSpec, ViTSpec, VLMSpec


def build(spec: Spec, **options: Any) -> Any:
    """The model of a spec with the reducers that its blocks name (`BlockSpec.reduce`, `<method>:...`), and the adapters
    that its history does (DAS).

    Raises:
      InputError: a reducer of no method here.
    """
    if isinstance(spec, VLMSpec):
        return models.build(spec, **slots(spec), **options)
    names = {block.reduce.partition(":")[0] for block in spec.blocks if block.reduce is not None}
    if isinstance(spec, ViTSpec | LMSpec):
        from vtjax.methods import das

        options = {"adapters": das.attached(spec), **options}
    if not names:
        return models.build(spec, **options)
    if names != {"ltmp"}:
        raise InputError(f"blocks reduce by {', '.join(sorted(names))}, expected one of: ltmp")
    from vtjax.methods import ltmp

    return ltmp.vit(spec, **options)


def slots(spec: VLMSpec) -> dict[str, Any]:
    """What the methods put into the slots of a multimodal model, as options of `VLM`.

    Raises:
      InputError: a reducer of no method here.
    """
    from vtjax.methods import das, dpn

    named = {block.reduce.partition(":")[0] for block in spec.decoder.blocks if block.reduce is not None}
    if named - {"dpn"}:
        raise InputError(f"the decoder's blocks reduce by {', '.join(sorted(named))}, expected one of: dpn")
    made = {"reducers": dpn.reducers(spec), "adapters": das.attached(spec.decoder)}
    if isinstance(spec.tower, TiledViTSpec):
        return made
    tower = build(spec.tower)
    return {**made, "tower_reducers": tower.reducers, "tower_adapters": tower.adapters}
