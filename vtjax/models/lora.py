# SPDX-License-Identifier: Apache-2.0
"""Low-rank updates of a decoder (`LoRASpec`): added to a model that has none, merged into the weights at the end.

`x W + (alpha / rank) (x A) B` beside every named projection: A is `<projection>/lora_in/kernel [in, rank]`, B is
`<projection>/lora_out/kernel [rank, out]` and starts at 0, so that the model is the same at first. In training, the
group of the pattern `/lora_` holds all of them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vtjax.errors import InputError
from vtjax.models.segments import block_name
from vtjax.spec import Lineage, LMSpec, LoRASpec

_MLP = ("gate", "up", "down")


def install(spec: LMSpec, lora: LoRASpec, parent: str = "") -> LMSpec:
    """The spec of the model with updates; `add` maps the parameters.

    Args:
      parent: the model's `params_sha256`, for the lineage.

    Raises:
      InputError: the model has updates already.
    """
    if spec.lora is not None:
        raise InputError("a model gets low-rank updates once, found some; merge them first")
    step = Lineage(parent, "lora.install", json.dumps(dataclasses.asdict(lora)))
    return spec.edit(lora=lora, lineage=(*spec.lineage, step))


def add(spec: LMSpec, params: Any, key: Array) -> Any:
    """The parameters with updates that change nothing yet.

    Args:
      spec: with updates.
      params: without them; not changed.
      key: of the random A, normal with a deviation of in ** -0.5.
    """
    assert spec.lora is not None
    params = jax.tree.map(lambda a: a, params)  # new dicts, the same arrays
    for number, dense in enumerate(_updated(spec, params)):
        rows, columns = dense["kernel"].shape
        inner = jax.random.normal(jax.random.fold_in(key, number), (rows, spec.lora.rank)) * rows**-0.5
        dense |= {"lora_in": {"kernel": inner}, "lora_out": {"kernel": jnp.zeros((spec.lora.rank, columns))}}
    return params


def merge(spec: LMSpec, params: Any, parent: str = "") -> tuple[LMSpec, Any]:
    """The same function without updates: they are in the weights. numpy float32, computed in float64.

    Raises:
      InputError: the model has no updates.
    """
    if spec.lora is None:
        raise InputError("only low-rank updates can be merged, found a model without")
    params, scale = jax.tree.map(lambda a: a, params), spec.lora.alpha / spec.lora.rank
    for dense in _updated(spec, params):
        a, b = (np.asarray(dense.pop(name)["kernel"], np.float64) for name in ("lora_in", "lora_out"))
        dense["kernel"] = (np.asarray(dense["kernel"], np.float64) + scale * a @ b).astype(np.float32)
    return spec.edit(lora=None, lineage=(*spec.lineage, Lineage(parent, "lora.merge"))), params


def _updated(spec: LMSpec, params: Any) -> Iterator[Any]:
    """The parameters of every projection that the spec's updates act on, in the order of the layers."""
    assert spec.lora is not None
    for index, block in enumerate(spec.blocks):
        for site in spec.lora.sites:
            if block.ffn if site in _MLP else block.attn:
                yield params[block_name(index)]["mlp" if site in _MLP else "attn"][site]
