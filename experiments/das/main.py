# SPDX-License-Identifier: Apache-2.0
"""DAS in a multimodal model's decoder: a search for layers that a task does without, then fine-tuning without them.

Two runs, chained by `config.init_from` (spec section 2). The search trains adapters while layers are left out at
random, and learns from validation losses which of them to leave out for good; fine-tuning starts from the same model,
takes the `skips` most preferred ones out, and trains fresh adapters. What both have in common with other models is in
`phases`; a config with `data.form` is of a fusion encoder, whose functions `fusion` has.
Letters: B rows, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments.das import deployed, fusion, phases
from experiments.das.phases import style_of
from experiments.vlm import main as vlm
from vtjax.account import bench, flops
from vtjax.errors import InputError
from vtjax.methods import das
from vtjax.models.vlm import VLM
from vtjax.spec import VLMSpec
from vtjax.train import checkpoint
from vtjax.train.task import Data, Task

PHASES = ("search", "finetune")

Convert = Callable[[Any, jax.Array], Any]
"""`(parameters of what a run starts from, key) -> parameters`."""


def build(config: ConfigDict) -> Task:
    """The task of a phase.

    Raises:
      InputError: settings that are not defined, no preferences where they are needed, a model that was cut already, or
        as `experiments.vlm.main.build`.
    """
    if fusion.is_one(config):
        return fusion.build(config)
    phases.check(config, PHASES)
    phases.say_untrained(config)
    base, base_init = vlm.source(config)
    search = config.das.phase == "search"
    spec, convert = (to_search if search else to_finetune)(config, base)

    def init(key: jax.Array) -> Any:
        return convert(base_init(key)[0], jax.random.fold_in(key, 3))

    if search:
        return phases.search(config, spec, init, _model(config, spec), functools.partial(_summary, config))
    gone, depth = deployed.gone(spec.decoder), spec.decoder.depth
    # Where layers are gone already, the adapters are those of what the run starts from.
    fresh = "adapters" if not config.das.keep and spec is not base else ""
    return phases.finetune(config, spec, init, _model(config, spec), gone, depth, _summary(config, spec), fresh)


def data(config: ConfigDict, task: Task, **more: Any) -> Data:
    """The questions, and in a search with validation batches of `config.das.val_split`; `more` as of
    `experiments.vlm.main.data`.

    Raises:
      InputError: as `experiments.vlm.main.data`, or a validation split smaller than a batch.
    """
    open_data = fusion.data if fusion.is_one(config) else vlm.data
    return phases.with_validation(config, open_data(config, task, **more), lambda held: open_data(held, task, **more))


def batch_shapes(config: ConfigDict, task: Task, training: bool) -> Any:
    """As `experiments.vlm.main.batch_shapes`."""
    return (fusion if fusion.is_one(config) else vlm).batch_shapes(config, task, training)


def deploy(config: ConfigDict, task: Task, rows: Any, dense: Any) -> tuple[bench.Candidate, bench.Candidate]:
    """Both sides of `vtjax bench`, see `deployed`: the model, and the one with all layers and adapters alone."""
    return (deployed.fusion if fusion.is_one(config) else deployed.decoder)(config, task, rows, dense)


def to_search(config: ConfigDict, base: VLMSpec) -> tuple[VLMSpec, Convert]:
    """The spec of a search, and the way from the parameters of `base` to its."""
    return _begun(config) or _with_adapters(config, base)


def to_finetune(config: ConfigDict, base: VLMSpec) -> tuple[VLMSpec, Convert]:
    """The spec without the chosen layers, and the way from the parameters of `base` to its; where `base` lacks layers
    already, it stays as it is.

    Raises:
      InputError: as `phases.check_gone`, or no preferences where they are needed.
    """
    if (begun := _begun(config)) is not None:
        phases.check_gone(config, deployed.gone(begun[0].decoder), begun[0], config.workdir)
        return begun
    if das.is_installed(base.decoder) and not das.installed(base.decoder)[1]:  # a run of this phase, with its own
        if own := deployed.gone(base.decoder):
            phases.check_gone(config, own, base, config.init_from)
        return base, lambda params, key: params
    whole, convert = _with_adapters(config, base)
    gone = phases.chosen(config, whole)
    parent = whole.decoder.lineage[-1].parent
    spec, _ = das.remove(whole, None, gone, parent)
    return spec, lambda params, key: das.remove(whole, convert(params, key), gone)[1]


def _begun(config: ConfigDict) -> tuple[VLMSpec, Convert] | None:
    """Of a run that goes on: its checkpoint's spec says it all, whatever the run was put together from."""
    spec = checkpoint.begun(config.workdir)
    if spec is None:
        return None
    if not isinstance(spec, VLMSpec) or not das.is_installed(spec.decoder):
        raise InputError(f"{config.workdir!r} must hold a run of DAS in a decoder, found another one's checkpoint")

    def fresh(params: Any, key: jax.Array) -> Any:
        made = VLM(spec).init(key)
        return {**made, "decoder": das.added(spec.decoder, made["decoder"], key)}

    return spec, fresh


def _with_adapters(config: ConfigDict, base: VLMSpec) -> tuple[VLMSpec, Convert]:
    """With fresh adapters; or with those of a search, where `config.das.keep` says so."""
    style, parent = style_of(config), base.lineage[-1].parent if base.lineage else ""
    if not config.das.keep:
        beside = [name for name, group in config.optim.groups.items() if not group.frozen and name != "adapters"]
        if das.is_installed(base.decoder) and beside:
            raise InputError(
                f"config.init_from must be the model that a search began with, and config.das.preferences the search, "
                f"as it trains {beside[0]!r}, too; found {config.init_from!r}, which has adapters"
            )
        spec, _ = das.install(base, None, style, None, parent)
        return spec, lambda params, key: das.install(base, params, style, key)[1]
    if not das.is_installed(base.decoder) or das.installed(base.decoder) != (style, True):
        raise InputError(
            f"config.das.keep=True needs the adapters of a search of the same style and widths in "
            f"config.init_from={config.init_from!r}, found others"
        )
    return base, lambda params, key: params


def _model(config: ConfigDict, spec: VLMSpec) -> phases.Model:
    """What the phases know of a multimodal model and its questions."""
    model, types, balance = das.vlm(spec, **vlm.options(config)), vlm.types_of(config), vlm.answer_weights(config)

    def asked(params: Any, batch: Any, skip: Any, key: Any = None) -> vlm.Asked:
        knobs = {} if skip is None else {"skipped": skip}
        return vlm.asked(model, params, batch, knobs if key is None else {**knobs, **dropping(spec, key)})

    def loss(params: Any, batch: Any, skip: Any, key: Any) -> Any:
        found = asked(params, batch, skip, key)
        told = {"train_top1": found.right.sum() / jnp.maximum(found.asked.sum(), 1.0)}
        return vlm.mean_loss(found, batch, balance), told

    def decisions(params: Any, batch: Any, skip: Any) -> dict[str, jax.Array]:
        found = asked(params, batch, skip)
        spent = deployed.decoder_macs(spec, (batch["segments"] >= 0).sum(-1), skip)
        return {"question": batch["question"], "type": batch["type"], "correct": found.right, "macs": spent}

    return phases.Model(loss, lambda params, batch, skip: vlm.sums(asked(params, batch, skip), batch, types), decisions)


def dropping(spec: VLMSpec, key: jax.Array) -> dict[str, jax.Array]:
    """The knob of dropout in adapters, where they have any: a key for every layer, the same whether it is skipped."""
    style, _ = das.installed(spec.decoder)
    rates = (style.inner.dropout, style.skip.dropout)
    return {"adapter_key": jax.random.split(key, spec.decoder.depth)} if any(rates) else {}


def _summary(config: ConfigDict, spec: VLMSpec) -> dict[str, Any]:
    """Work of one prompt: of the model as it is without adapters (dense), and of this one (search: with all layers)."""
    tokens = spec.placeholders + flops.QUESTION
    count, work = das.adapter_cost(spec.decoder, tokens)
    return {
        "phase": config.das.phase,
        "layers": spec.decoder.depth,
        "skips": list(deployed.gone(spec.decoder)),
        "adapter_params": count,
        "macs_per_prompt": flops.macs(spec) + work,
        "dense_macs_per_prompt": flops.macs(deployed.whole(spec)),
        "init_from": config.init_from,
    }
