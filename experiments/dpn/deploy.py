# SPDX-License-Identifier: Apache-2.0
"""Both sides of `vtjax bench`: the pooled model in the form that `config.dpn.exec` names, beside the same model without
poolings. "staged": tokens are gone, samples are regrouped by length on the host (`dpn_deploy.Staged`); "switch": one
program for one question at a time (`dpn_switch.Switch`); "masked": pooled tokens keep their slots, which saves nothing.
Prompts are the rows' questions up to the token that routers read: with `dpn.token=answer` a prefill whose logits are
those of the first word of the answer; with a router token of its own the template's token is yet to come.
Letters: B rows, S tokens, M stages.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.vlm import main as vlm
from vtjax.account import bench, flops
from vtjax.errors import InputError
from vtjax.methods import dpn, dpn_deploy, dpn_switch
from vtjax.models.vlm import VLM
from vtjax.spec import VLMSpec
from vtjax.train.task import Task

INPUTS = ("input_ids", "images", "segments")
NAMES = {
    "staged": "pooled, regrouped by length",
    "switch": "pooled, one program for all lengths",
    "masked": "pooled tokens masked",
}


def deploy(config: ConfigDict, task: Task, rows: Any, dense: Any) -> tuple[bench.Candidate, bench.Candidate]:
    """The model that pools, and that of `--dense` or itself without poolings. What the pooled one costs depends on the
    experts that its routers choose for the rows.

    Raises:
      InputError: a form that `methods.dpn_deploy` does not have, or a `--dense` that takes other prompts.
    """
    spec: Any = task.spec
    if spec.bridge.cross is not None:
        raise InputError("vtjax bench deploys DPN where visual tokens stand in the text, found cross-attention")
    if config.dpn.mode == "by_type":
        raise InputError("vtjax bench deploys what a model decides by itself, found config.dpn.mode='by_type'")
    params, _, _ = task.init(jax.random.key(config.seed))
    model = dpn.vlm(spec, **vlm.options(config))
    if model.tower_reducers:
        raise InputError("vtjax bench deploys DPN behind a tower that keeps its tokens, found one with reducers")
    form = config.dpn.exec
    forms: dict[str, Any] = {"staged": dpn_deploy.Staged(model), "switch": dpn_switch.Switch(model).prefill}
    whole_rows = jax.jit(functools.partial(masked, model))

    def pooled(params: Any, ids: Any, images: Any, segments: Any) -> dpn_deploy.Prefilled:
        given = np.asarray(ids)
        mask = prompt(spec, given, segments)
        if form == "masked":
            return whole_rows(params, given, images, mask)
        return forms[form](params, dpn_deploy.entered(model, params, given, images, mask))

    def spent(ids: Any, images: Any, segments: Any) -> float:
        texts = np.asarray(prompt(spec, np.asarray(ids), segments)).sum(1) - spec.visual_tokens
        choice = np.asarray(pooled(params, ids, images, segments).choice)
        each = [dpn.path_macs(spec, path, int(n)) for path, n in zip(choice.tolist(), texts, strict=True)]
        return float(np.mean(each)) + beside(spec, texts)

    before, held = spec.unreduced(), params
    if dense is not None:
        before, held = dense.spec, dense.params
        for field in ("image_size", "placeholders", "image_token", "router_token"):
            if (here := getattr(spec, field)) != (there := getattr(before, field, None)):
                raise InputError(f"--dense must have {field} {here}, as the model has, found {there}")
    whole = VLM(before, **vlm.options(config))

    def plain(params: Any, ids: Any, images: Any, segments: Any) -> jax.Array:
        mask = prompt(spec, ids, segments)
        return whole.apply(params, ids, images, mask, slots=last(mask))[0][:, 0]

    def all_of_it(ids: Any, images: Any, segments: Any) -> float:
        texts = np.asarray(prompt(spec, np.asarray(ids), segments)).sum(1) - spec.visual_tokens
        path = (0,) * len(dpn.reducers(spec))
        return float(np.mean([dpn.path_macs(spec, path, int(n)) for n in texts])) + beside(spec, texts)

    def inputs(batch: Any) -> tuple[Any, ...]:
        return tuple(batch[name] for name in INPUTS)

    name = "itself without poolings" if dense is None else "--dense"
    return (
        bench.Candidate(
            NAMES[form],
            lambda *given: pooled(*given).logits,
            params,
            spent,
            settings={"form": form},
            inputs=inputs,
            jit=False,
        ),
        bench.Candidate(name, plain, held, all_of_it, inputs=inputs),
    )


def masked(model: VLM, params: Any, ids: Any, images: Any, mask: Any) -> dpn_deploy.Prefilled:
    """The prefill in which pooled tokens keep their slots."""
    y, aux = model.apply(params, ids, images, mask, slots=last(mask))
    return dpn_deploy.Prefilled(y[:, 0], dpn.decisions(aux, model.spec)["choice"], None)


def last(mask: Any) -> jax.Array:
    """The slot of every row's last token, `[B, 1]`."""
    return mask.shape[1] - 1 - jnp.argmax(jnp.asarray(mask)[:, ::-1], axis=1)[:, None]


def prompt(spec: VLMSpec, ids: Any, segments: Any) -> Any:
    """1 for what stands before the answer: everything up to the last router token, `[B, S]` int32."""
    xp = np if isinstance(ids, np.ndarray) else jnp
    router = (ids == spec.router_token) & (xp.asarray(segments) >= 0)
    last = ids.shape[1] - 1 - xp.argmax(router[:, ::-1], axis=1)
    return ((xp.arange(ids.shape[1])[None] <= last[:, None]) & (xp.asarray(segments) >= 0)).astype(xp.int32)


def beside(spec: VLMSpec, texts: np.ndarray) -> float:
    """MACs of tower, projector and head, of a prompt of as many tokens as there are on average."""
    mean = round(float(texts.mean()))
    path = (0,) * len(dpn.reducers(spec))
    return flops.macs(spec.unreduced(), spec.visual_tokens + mean) - dpn.path_macs(spec, path, mean)
