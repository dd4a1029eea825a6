# SPDX-License-Identifier: Apache-2.0
"""DAS: a few whole layers are left out of a vision-language model, an adapter each in their place (arXiv 2309.01479).

`ops.bandit` says which, `models.adapters` and `models.fusion` what stands in.

    install(spec, params, style, key)  -> a model for the search: adapters inside of every layer, and instead of it
    vlm(spec)                          -> its model; the traced knob `skipped [L]` leaves layers out, at no cost
    remove(spec, params, skips)        -> the model without these layers: nothing of them is left but their stand-ins

A part of a multimodal model has its history, and its adapters, in the part: `spec.decoder`, `params["decoder"]["das"]`.
Sources are sections of the DAS specification.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool

from vtjax.errors import InputError, check_choice
from vtjax.methods import slots
from vtjax.models.adapters import STYLES, Style, attach, init_attached
from vtjax.models.fusion import METHOD
from vtjax.models.layers import Adapter
from vtjax.models.segments import block_name
from vtjax.models.vlm import VLM
from vtjax.spec import AdapterSpec, FusionSpec, Lineage, ModelSpec, VLMSpec, skip_list

WEIGHT_DECAY = 0.01


def arms(spec: Any) -> tuple[int, ...]:
    """The layers that a search may leave out: of a model with adapters those of its search; of a ViT or decoder all; of
    a multimodal model the decoder's whole layers after which nothing is pooled, and in which the text does not read
    visual tokens (ours: neither is defined by the paper, whose models have neither)."""
    if isinstance(spec, VLMSpec):
        if is_installed(spec.decoder):
            return arms(spec.decoder)
        reading = () if spec.bridge.cross is None else spec.bridge.cross.layers
        return tuple(
            index
            for index, block in enumerate(spec.decoder.blocks)
            if block.attn and block.ffn and block.reduce is None and index not in reading
        )
    made = [step for step in spec.lineage if step.operation == f"{METHOD}.install"]
    told = json.loads(made[-1].arguments).get("arms") if made else None
    return tuple(range(spec.depth)) if told is None else tuple(told)


def install(
    spec: Any,
    params: Any,
    style: Style | str,
    key: jax.Array | None,
    parent: str = "",
    among: tuple[int, ...] | None = None,
) -> tuple[Any, Any]:
    """The model with fresh adapters for a search: inside of every layer, and instead of every arm. Others that were
    there are dropped.

    Args:
      spec: of a ViT, a decoder, or a multimodal model, whose decoder gets them; nothing is removed from it.
      params: not changed, its arrays are not copied; None = none yet (see `added`).
      style: one of `models.adapters.STYLES`, or its name.
      key: of their fresh weights; None where there are no parameters.
      parent: the model's `params_sha256`, for the lineage.
      among: the arms, ascending; None = `arms(spec)`.

    Raises:
      InputError: no arms; an arm that is not whole, or after which a reducer acts; a name that no style has.
    """
    if isinstance(style, str):
        check_choice("style", style, STYLES)
        style = STYLES[style]
    if isinstance(spec, VLMSpec):
        # A search anew may have lost nothing, so it has the arms of the one before.
        among = arms(spec) if among is None else among
        inner, own = install(spec.decoder, None if params is None else params["decoder"], style, key, parent, among)
        return spec.edit(decoder=inner), None if params is None else {**params, "decoder": own}
    among = arms(spec) if among is None else among
    if not among:
        raise InputError("a search needs layers that may be left out, found none")
    for index in among:
        block = spec.blocks[index]
        if not (block.attn and block.ffn) or block.reduce is not None:
            raise InputError(
                f"a search needs all layers whole and without reducers, found attn={block.attn}, ffn={block.ffn}, "
                f"reduce={block.reduce!r} at layer {index}"
            )
    told = {} if len(among) == spec.depth else {"arms": list(among)}
    arguments = json.dumps({"style": dataclasses.asdict(style), **told})
    after = spec.edit(lineage=(*spec.lineage, Lineage(parent, f"{METHOD}.install", arguments)))
    if params is None:
        return after, None
    assert key is not None
    return after, added(after, {name: tree for name, tree in params.items() if name != METHOD}, key)


def added(spec: ModelSpec, params: Mapping[str, Any], key: jax.Array) -> dict[str, Any]:
    """The parameters of an installed ViT or decoder with fresh adapters, where they have none."""
    if METHOD in params:
        return dict(params)
    style, search = installed(spec)
    own = init_attached(spec, style, key, search, arms(spec))
    for name, block in own.items():
        if style.normed and "skip" in block and name in params:
            block["skip"]["norm_in"] = params[name]["norm1"]  # frozen with the rest of the layer
    return {**params, METHOD: own}


def history(spec: Any) -> list[Lineage]:
    """What DAS has done to a model, the oldest first."""
    return [step for step in spec.lineage if step.operation.startswith(f"{METHOD}.")]


def is_installed(spec: ModelSpec) -> bool:
    """Whether a ViT or decoder has adapters."""
    return any(step.operation == f"{METHOD}.install" for step in spec.lineage)


def installed(spec: ModelSpec) -> tuple[Style, bool]:
    """The style of a ViT's or decoder's adapters, and whether kept layers have a stand-in, too (a search).

    Raises:
      InputError: there are none.
    """
    steps = history(spec)
    made = [step for step in steps if step.operation == f"{METHOD}.install"]
    if not made:
        raise InputError("the model must have adapters (methods.das.install), found none in its history")
    told = json.loads(made[-1].arguments)["style"]
    inner, skip = (AdapterSpec.from_dict(told[name]) for name in ("inner", "skip"))
    return Style(inner, tuple(told["sites"]), skip, told["normed"]), steps[-1] is made[-1]


def attached(spec: ModelSpec) -> tuple[tuple[int, str, Adapter], ...]:
    """The adapters of a ViT or decoder, as its model takes them; () where it has none."""
    if not is_installed(spec):
        return ()
    style, search = installed(spec)
    return attach(spec, style, getattr(spec, "eps", 1e-6), search, arms(spec))


def vlm(spec: VLMSpec, **options: Any) -> VLM:
    """The model of a multimodal spec, with the adapters of its decoder and whatever else it names; `options` as of
    `VLM`."""
    return VLM(spec, **{**slots(spec), **options})


def adapter_cost(spec: ModelSpec, tokens: int) -> tuple[int, int]:
    """Parameters of the adapters of a ViT or decoder, without frozen copies of norms, and their MACs, layers being as
    `spec` has them."""
    own = [(site, adapter.spec) for _, site, adapter in attached(spec)]  # type: ignore[attr-defined]
    width: int = spec.width  # type: ignore[attr-defined]
    work = sum(adapter.macs(width, tokens) for site, adapter in own if site != "instead")
    return sum(adapter.params(width) for _, adapter in own), work


def remove(spec: Any, params: Any, skips: Any, parent: str = "") -> tuple[Any, Any]:
    """The model without these modules: their parameters are dropped, and so are the adapters inside of them and those
    that would stand in for kept ones (section 2.9).

    Args:
      spec: a `FusionSpec`; or a ViT's or decoder's, whose adapters are `models.adapters.attach`'s; or a multimodal
        one, whose decoder it is then.
      params: with `params["das"]`; not changed, its arrays are not copied; None = none yet.
      skips: a list of arms, see `spec.skip_list`.
      parent: the model's `params_sha256`, for the lineage.

    Raises:
      InputError: no such list; a module that is gone already, or that is no arm; a model that has been shortened
        already, whose kept modules have no stand-ins any more.
    """
    if isinstance(spec, VLMSpec):
        _check_arms(spec, skip_list(skips, spec.decoder.depth))
        inner, own = remove(spec.decoder, None if params is None else params["decoder"], skips, parent)
        return spec.edit(decoder=inner), None if params is None else {**params, "decoder": own}
    gone = skip_list(skips, spec.arms if isinstance(spec, FusionSpec) else spec.depth)
    for index in gone:
        if not spec.blocks[index].attn and not spec.blocks[index].ffn:
            raise InputError(f"skips must name modules that are there, found {index}, which is gone")
    if not isinstance(spec, FusionSpec):
        _check_arms(spec, gone)
    steps = history(spec)
    if gone and steps and steps[-1].operation == f"{METHOD}.remove":
        before = json.loads(steps[-1].arguments)["skips"]
        raise InputError(
            f"a model that was shortened by {before} has no adapters to stand in for other modules: shorten that of "
            f"the search by all of them, found {list(gone)} more"
        )
    step = Lineage(parent, f"{METHOD}.remove", json.dumps({"skips": gone}))
    if isinstance(spec, FusionSpec):
        after: Any = spec.skipping(gone)
        if not gone:  # nothing is left to stand in for
            after = after.edit(skip=None, encoder_skip=None)
    else:
        after = spec.edit(blocks={index: {"attn": False, "ffn": False, "reduce": None} for index in gone})
    after = after.edit(lineage=(*spec.lineage, step))
    if params is None:
        return after, None
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


def _check_arms(spec: Any, gone: tuple[int, ...]) -> None:
    possible = arms(spec)
    for index in gone:
        if index not in possible and (spec.blocks[index].attn or spec.blocks[index].ffn):
            raise InputError(f"skips must be among the layers that may be left out, {possible}, found {index}")


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


def greedy(loss: Callable[[Bool[np.ndarray, " n"]], float], arms: int, m: int) -> tuple[int, ...]:
    """m modules, one after the other: each is the one whose removal, beside those before it, hurts least (the baseline
    of section 6). Of equal ones the lower index.

    Args:
      loss: of a mask, True at what is skipped; asked for n + (n - 1) + ... of them. NaN counts as infinite.

    Raises:
      InputError: no removal has a loss that is a number.
    """
    gone = np.zeros(arms, bool)
    order: list[int] = []
    for _ in range(m):
        left = [arm for arm in range(arms) if not gone[arm]]
        losses = np.asarray([loss(gone | (np.arange(arms) == arm)) for arm in left], np.float64)
        if np.isnan(losses).all():
            raise InputError(f"a greedy choice needs losses that are numbers, found NaN without any of the arms {left}")
        # To NumPy NaN is the least of all.
        order.append(left[int(np.argmin(np.where(np.isnan(losses), np.inf, losses)))])
        gone[order[-1]] = True
    return tuple(order)
