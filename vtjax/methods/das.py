# SPDX-License-Identifier: Apache-2.0
"""DAS: a few whole layers are left out of a vision-language model, an adapter each in their place (arXiv 2309.01479).

`ops.bandit` says which, `models.adapters` and `models.fusion` what stands in. Here: how they are left out for good, and
which parameters are trained at what rate. Sources are sections of the DAS specification.
"""

from __future__ import annotations

import json
from typing import Any

import jax

from vtjax.errors import InputError
from vtjax.models.adapters import Style, init_attached
from vtjax.models.fusion import METHOD
from vtjax.models.segments import block_name
from vtjax.spec import FusionSpec, Lineage, ModelSpec, skip_list

WEIGHT_DECAY = 0.01


def install(spec: ModelSpec, params: Any, style: Style, key: jax.Array) -> Any:
    """The parameters of a ViT or decoder with the adapters of a search: inside of every block, and instead of it.

    Args:
      spec: of the model; nothing is removed yet.
      params: without adapters; not changed, its arrays are not copied.
      style: see `models.adapters.STYLES`.
      key: of their fresh weights.
    """
    own = init_attached(spec, style, key, search=True)
    if style.normed:
        for name, block in own.items():
            block["skip"]["norm_in"] = params[name]["norm1"]  # frozen with the rest of the layer
    return {**params, METHOD: own}


def remove(spec: ModelSpec, params: Any, skips: Any, parent: str = "") -> tuple[Any, Any]:
    """The model without these modules: their parameters are dropped, and so are the adapters inside of them and those
    that would stand in for kept ones (section 2.9).

    Args:
      spec: a `FusionSpec`; or a ViT's or decoder's, whose adapters are `models.adapters.attach`'s.
      params: with `params["das"]`; not changed, its arrays are not copied.
      skips: a list of arms, see `spec.skip_list`.
      parent: the model's `params_sha256`, for the lineage.

    Raises:
      InputError: no such list; a module that is gone already.
    """
    gone = skip_list(skips, spec.arms if isinstance(spec, FusionSpec) else spec.depth)
    for index in gone:
        if not spec.blocks[index].attn and not spec.blocks[index].ffn:
            raise InputError(f"skips must name modules that are there, found {index}, which is gone")
    step = Lineage(parent, "das.remove", json.dumps({"skips": gone}))
    if isinstance(spec, FusionSpec):
        after: Any = spec.skipping(gone)
    else:
        after = spec.edit(blocks={index: {"attn": False, "ffn": False, "reduce": None} for index in gone})
    after = after.edit(lineage=(*spec.lineage, step))
    params = jax.tree.map(lambda a: a, params)  # new dicts, the same arrays
    for index, block in enumerate(after.blocks):
        name, kept = block_name(index), block.attn or block.ffn
        if not kept:
            params.pop(name, None)
        own = params.get(METHOD, {}).get(name)
        if own is not None:
            params[METHOD][name] = {site: p for site, p in own.items() if (site == "skip") != kept}
    if METHOD in params:
        params[METHOD] = {name: own for name, own in params[METHOD].items() if own}
    return after, params


def groups(streams: int, head: float) -> dict[str, dict[str, Any]]:
    """What is trained of a fusion encoder, as `config.optim.groups` (sections 3.7 and 4): adapters, poolers, types of
    tokens, METER's first text token, the head. Everything else is frozen.

    Of two streams, what the release calls `cross_modal` has 5 times the rate: adapters inside of fusion layers and the
    poolers, not the adapters that stand in for layers. Biases do not decay; scales of norms, which are trained in
    adapters and the head only, do.

    Args:
      streams: of the model.
      head: factor of the head's rate: METER 50 (VQA), 10 (NLVR2), 5 (retrieval); ViLT 10.
    """
    cross = 5.0 if streams == 2 else 1.0
    trained = {
        "cross": (rf"{METHOD}/block_\d+/(?!skip/)|pool/", cross),
        "head": (r"head/(up|norm|down)/", head),
        "rest": (rf"{METHOD}/block_\d+/skip/|embed/marks/(type|first)$|head/rank/", 1.0),
    }
    table: dict[str, dict[str, Any]] = {}
    for name, (pattern, scale) in trained.items():
        stated = {"lr_scale": scale, "optional": True}
        table[name] = {"pattern": rf"^(?!.*/bias$)({pattern})", "weight_decay": WEIGHT_DECAY, **stated}
        table[f"{name}_bias"] = {"pattern": rf"^(?=.*/bias$)({pattern})", "weight_decay": 0.0, **stated}
    # Tried last: groups are tried in the order of their names.
    return table | {"unchanged": {"pattern": "", "frozen": True, "lr_scale": 0.0, "weight_decay": 0.0}}
