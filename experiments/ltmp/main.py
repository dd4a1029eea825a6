# SPDX-License-Identifier: Apache-2.0
"""LTMP: learns two thresholds per block under a budget of MACs; the method is `vtjax.methods.ltmp`.

The loss is `cross entropy + budget_weight x (r - target)^2` (spec section 6). Two budgets:

* "image" (the default): r is the mean over images of what each costs, in MACs of the whole model over the dense one's.
  That is what deployment costs, so a target that is reached in training is reached there.
* "batch" (as the release): r is the cost of the batch's mean token counts, in the blocks alone. It lies below the mean
  of the costs (E[n^2] >= E[n]^2), and patches and head come on top.

Letters: B batch, L layers, K classes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.vit import main as vit
from vtjax.account import flops
from vtjax.errors import InputError
from vtjax.methods import ltmp
from vtjax.ops import losses, token_reduction
from vtjax.spec import ViTSpec
from vtjax.train import optim
from vtjax.train.state import params_sha256
from vtjax.train.task import Task

BUDGETS = ("image", "batch")
MEASURED = ("deployed", "masked")


def build(config: ConfigDict) -> Task:
    """The task of a config.

    Raises:
      InputError: settings that are not defined, weights that are missing, or thresholds that were learned otherwise.
    """
    spec, params, thresholds, fresh = source(config)
    options, drop_path, smoothing = vit.execution(config)
    model = ltmp.vit(spec, training=True, **options)
    measured = ltmp.vit(spec if config.ltmp.measured == "masked" else ltmp.consistent(spec), **options)
    blocks, dense = ltmp.dense_macs(spec), flops.macs(spec)
    check(config, spec, ltmp.floor(spec) if config.ltmp.budget == "batch" else _whole(ltmp.floor(spec), blocks, dense))
    costs = jnp.asarray(ltmp.costs(spec))

    def init(key: jax.Array) -> tuple[Any, Any, Any]:
        new = model.init(key) if params is None or fresh else {}
        kept = new if params is None else {**params, **{name: new[name] for name in fresh}}
        return {**kept, ltmp.NAME: kept.get(ltmp.NAME, thresholds)}, {}, {}

    def shares(aux: Any) -> jax.Array:
        """MACs of every image over the dense model's, [B]."""
        fractions = ltmp.alive_fractions(aux, spec.tokens)
        return _whole(token_reduction.budget(fractions, spec.tokens, costs)[0], blocks, dense)

    def loss(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any, key: jax.Array, step: Any) -> Any:
        logits, aux = model.apply(params, batch["image"], key=key, drop_path=drop_path)
        smooth = knobs["loss.label_smoothing"]
        entropy = losses.cross_entropy(logits, batch["label"], label_smoothing=smooth).mean()
        if config.ltmp.budget == "image":
            ratio = shares(aux).mean()
        else:
            fractions = ltmp.alive_fractions(aux, spec.tokens).mean(1)
            ratio = token_reduction.budget(fractions, spec.tokens, costs)[0]
        miss = ratio - knobs["ltmp.target"]
        metrics = {"ce": entropy, "mac_ratio": ratio}
        metrics["train_top1"] = losses.top_k_correct(logits, batch["label"], 1).mean()
        for name, values in params[ltmp.NAME].items():
            metrics |= {f"{name}_{layer:02d}": values[layer] for layer in range(spec.depth)}
        return entropy + knobs["ltmp.budget_weight"] * miss**2, metrics

    def evaluate(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any) -> dict[str, jax.Array]:
        logits, aux = measured.apply(params, batch["image"])
        valid, share = batch["valid"], shares(aux)
        per_image = {
            "top1": losses.top_k_correct(logits, batch["label"], 1),
            "top5": losses.top_k_correct(logits, batch["label"], min(5, spec.classes)),
            "loss": losses.cross_entropy(logits, batch["label"]),
            "mac_ratio": share,
            "macs_per_image": share * dense,
        }
        sums = {name: jnp.where(valid, value, 0).sum(dtype=jnp.float32) for name, value in per_image.items()}
        return {**sums, "count": valid.sum(dtype=jnp.float32)}

    def decisions(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any) -> dict[str, jax.Array]:
        logits, aux = measured.apply(params, batch["image"])
        made = [block.get("decisions", {}) for block in aux["blocks"]]
        zeros = jnp.zeros(logits.shape[:1])
        layers = {
            name: jnp.stack([m.get(name, zeros) for m in made], 1).astype(jnp.int32) for name in ("merged", "pruned")
        }
        kept = jnp.round(ltmp.alive_fractions(aux, spec.tokens).T * spec.tokens).astype(jnp.int32)
        right = losses.top_k_correct(logits, batch["label"], 1).astype(jnp.int32)
        said = logits.argmax(-1).astype(jnp.int32)
        return {"predicted": said, "correct": right, "kept": kept, **layers, "macs": shares(aux) * dense}

    return Task(
        spec=spec,
        init=init,
        loss=loss,
        evaluate=evaluate,
        trainable=optim.group_of(config.optim),
        knobs={
            "loss.label_smoothing": smoothing,
            "ltmp.target": config.ltmp.target,
            "ltmp.budget_weight": config.ltmp.budget_weight,
        },
        summary={
            "target": config.ltmp.target,
            "dense_macs_per_image": dense,
            "params": sum(row.params for row in flops.layers(spec)),
            "init_from": config.init_from,
            **({"init_from_sha256": parent} if (parent := vit.parent_of(spec)) and config.init_from else {}),
        },
        bounds=lambda path: (0.0, 1.0) if path.startswith(f"{ltmp.NAME}/") else None,
        decisions=decisions,
        relax=lambda params, amount: {**params, ltmp.NAME: ltmp.relaxed(params[ltmp.NAME], amount)},
    )


def source(config: ConfigDict) -> tuple[ViTSpec, Any, dict[str, np.ndarray], tuple[str, ...]]:
    """The spec with LTMP in it; the loaded parameters, else None; the thresholds to start from where these bring none;
    and the parts of the model that are to be initialised.

    Raises:
      InputError: thresholds that were learned under other settings, or for another number of tokens.
    """
    settings = config.ltmp
    spec, params, fresh = vit.source(config)
    starts = [None if settings[name] == -1.0 else settings[name] for name in ("merge_threshold", "prune_threshold")]
    if not ltmp.reducers(spec):
        spec, thresholds = ltmp.install(
            spec,
            variant=settings.variant,
            form=settings.form,
            tau=settings.tau,
            similarity=settings.similarity,
            relative=settings.relative,
            merge_threshold=starts[0],
            prune_threshold=starts[1],
            parent="" if params is None else params_sha256(params),
        )
        return spec, params, thresholds, fresh
    found = ltmp.reducers(spec)[0][1]
    for name in ("variant", "form", "tau", "similarity"):
        if (there := getattr(found, name, None)) != settings[name]:
            raise InputError(
                f"config.ltmp.{name} must be {there!r}, under which the thresholds of config.init_from="
                f"{config.init_from!r} were learned, found {settings[name]!r}"
            )
    if bool(getattr(found, "relative", 0)) != settings.relative:
        raise InputError(
            f"config.ltmp.relative must be {not settings.relative}, as the thresholds were learned, found "
            f"{settings.relative}"
        )
    thresholds = ltmp.starts(settings.variant, spec.depth)
    if params is not None:
        for name in thresholds:
            ltmp.check_thresholds(name, params.get(ltmp.NAME, {}).get(name, np.zeros(0)), spec.depth)
    return spec, params, thresholds, fresh


def check(config: ConfigDict, spec: ViTSpec, floor: float) -> None:
    """Raises InputError for numbers that no run can have; `floor` is the least reachable ratio."""
    settings = config.ltmp
    for name, known in (("budget", BUDGETS), ("measured", MEASURED)):
        if settings[name] not in known:
            raise InputError(f"config.ltmp.{name} must be one of {', '.join(known)}, found {settings[name]!r}")
    if not floor < settings.target <= 1.0:
        raise InputError(
            f"config.ltmp.target must be above {floor:.3f}, which the first block's attention and the protected tokens "
            f"cost, and at most 1, found {settings.target}"
        )
    if not 0.0 <= settings.budget_weight < np.inf:
        raise InputError(f"config.ltmp.budget_weight must be 0 or more, found {settings.budget_weight}")
    if not spec.classes:
        raise InputError("ltmp learns from labels, expected a model with a head, found none")


def _whole(share: Any, blocks: float, dense: float) -> Any:
    """A share of the blocks' MACs as one of the whole model's: patches, pooling and head cost what they did."""
    return (share * blocks + (dense - blocks)) / dense
