# SPDX-License-Identifier: Apache-2.0
"""Plain ViT classification: cross entropy with label smoothing, mixed labels and stochastic depth.

The model is described by `config.model`, field by field, or is the one of `config.init_from` (a workdir, a weights file
or a named weight), whose class count and image size may be changed. Letters: B batch, K classes.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import vtjax
from vtjax import weights
from vtjax.account import flops
from vtjax.errors import InputError
from vtjax.models.vit import ViT
from vtjax.ops import attention, losses
from vtjax.parallel import rules
from vtjax.spec import Lineage, Preprocess, ViTSpec
from vtjax.train import checkpoint, optim
from vtjax.train.state import params_sha256
from vtjax.train.task import Task

HEADS = ("head", "head_distill")


def build(config: ConfigDict) -> Task:
    """The task of a config.

    Raises:
      InputError: a spec that is not defined, weights that are missing or mis-shaped, or optimiser groups that do not
        fit the model.
    """
    spec, params, fresh = source(config)
    options, drop_path, smoothing = execution(config)
    model = ViT(spec, **options)

    def init(key: jax.Array) -> tuple[Any, Any, Any]:
        if params is None:
            return model.init(key), {}, {}
        new = {name: tree for name, tree in model.init(key).items() if name in fresh} if fresh else {}
        return {**params, **new}, {}, {}

    def loss(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any, key: jax.Array, step: Any) -> Any:
        logits, _ = model.apply(params, batch["image"], key=key, drop_path=drop_path)
        per_image = losses.cross_entropy(
            logits,
            batch["label"],
            label_smoothing=knobs["loss.label_smoothing"],
            labels2=batch.get("label2"),
            lam=batch.get("lam"),
        )
        return per_image.mean(), {"train_top1": losses.top_k_correct(logits, batch["label"], 1).mean()}

    def evaluate(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any) -> dict[str, jax.Array]:
        return sums(model.apply(params, batch["image"])[0], batch)

    rows = flops.layers(spec)
    return Task(
        spec=spec,
        init=init,
        loss=loss,
        evaluate=evaluate,
        trainable=optim.group_of(config.optim),
        knobs={"loss.label_smoothing": smoothing},
        summary={
            "macs_per_image": sum(row.macs for row in rows),
            "params": sum(row.params for row in rows),
            "init_from": config.init_from,
            **({"init_from_sha256": parent} if (parent := parent_of(spec)) and config.init_from else {}),
        },
    )


def execution(config: ConfigDict) -> tuple[dict[str, Any], float, float]:
    """How a model is run: the options of `ViT`, the rate of stochastic depth, and the label smoothing.

    Raises:
      InputError: an unknown attention, or a number out of range.
    """
    if config.model.attention not in attention.IMPLEMENTATIONS:
        known = ", ".join(attention.IMPLEMENTATIONS)
        raise InputError(f"config.model.attention must be one of {known}, found {config.model.attention!r}")
    for name, value in (
        ("model.drop_path", config.model.drop_path),
        ("loss.label_smoothing", config.loss.label_smoothing),
    ):
        if not 0.0 <= value < 1.0:
            raise InputError(f"config.{name} must be in [0, 1), found {value}")
    return options(config), config.model.drop_path, config.loss.label_smoothing


def options(config: ConfigDict) -> dict[str, Any]:
    """The options of `ViT` alone."""
    found = {name: config.model[name] for name in ("remat", "scan", "attention")}
    return {**found, "dtype": jnp.dtype(config.dtype), "constrain": rules.constrain}


def sums(logits: jax.Array, batch: Any, **per_image: jax.Array) -> dict[str, jax.Array]:
    """What a classifier's `evaluate` reports of logits `[B, K]`: top1, top5, loss, and what else is given, `[B]`."""
    label = batch["label"]
    per_image = {
        "top1": losses.top_k_correct(logits, label, 1),
        "top5": losses.top_k_correct(logits, label, min(5, logits.shape[-1])),
        "loss": losses.cross_entropy(logits, label),
        **per_image,
    }
    return summed(per_image, batch["valid"])


def summed(per_image: Mapping[str, jax.Array], valid: jax.Array) -> dict[str, jax.Array]:
    """Sums of numbers `[B]` over the valid images, and their count."""
    sums = {name: jnp.where(valid, value, 0).sum(dtype=jnp.float32) for name, value in per_image.items()}
    return {**sums, "count": valid.sum(dtype=jnp.float32)}


def source(config: ConfigDict) -> tuple[ViTSpec, Any, tuple[str, ...]]:
    """The spec; its parameters where they are loaded, else None; and the parts of those that are to be initialised.

    A run that goes on in `config.workdir` has both in its checkpoint, so nothing else is read.
    """
    if not config.init_from:
        return described(config.model), None, ()
    size, classes = tuple(config.model.image_size), config.model.classes
    if (begun := checkpoint.begun(config.workdir)) is not None:
        return begun.edit(image_size=size, classes=classes), None, ()
    loaded = vtjax.load(config.init_from)
    spec, params = loaded.spec, loaded.params
    if not isinstance(spec, ViTSpec):
        raise InputError(f"config.init_from={config.init_from!r} must hold a ViTSpec, found {type(spec).__name__}")
    parent = params_sha256(params)
    edits: dict[str, Any] = {}
    if size != spec.image_size:
        print(f"image size {spec.image_size} -> {size}: position embeddings are resampled", file=sys.stderr)
        edits["image_size"] = [spec.image_size, size]
        spec, params = weights.resize(spec, params, image_size=size)
    fresh: tuple[str, ...] = ()
    if classes != spec.classes:
        edits["classes"] = [spec.classes, classes]
        was, spec = spec.classes, spec.edit(classes=classes)
        fresh = tuple(name for name in HEADS if name == "head" or spec.distill_token)
        params = {name: tree for name, tree in params.items() if name not in HEADS}
        print(f"classes {was} -> {spec.classes}: initialised, not loaded: {', '.join(fresh)}", file=sys.stderr)
    # The folder above is of one machine only.
    name = Path(config.init_from).name if Path(config.init_from).is_absolute() else config.init_from
    arguments = json.dumps({"source": name, **edits})
    step = Lineage(parent, "init_from", arguments, seed=config.seed if fresh else None)
    return spec.edit(lineage=(*spec.lineage, step)), params, fresh


def parent_of(spec: ViTSpec) -> str:
    """SHA-256 of the parameters that the model was begun from; "" where the spec does not tell."""
    return next((step.parent for step in reversed(spec.lineage) if step.operation == "init_from"), "")


def described(model: ConfigDict) -> ViTSpec:
    """The spec whose fields are the leaves of `config.model`."""
    fields = {f.name: model[f.name] for f in dataclasses.fields(ViTSpec) if f.name in model and f.name != "preprocess"}
    fields["preprocess"] = Preprocess(**model.preprocess)
    if fields.get("layer_scale") == 0.0:
        fields["layer_scale"] = None
    if fields["pos_prefix"] == -1:
        fields["pos_prefix"] = fields["class_token"] + fields["distill_token"] + fields["registers"]
    if fields["classes"] < 1:
        raise InputError(f"config.model.classes must be at least 1, found {fields['classes']}")
    if model.depth < 1:
        raise InputError(f"config.model.depth must be at least 1, found {model.depth}")
    if model.pos == "sincos2d" and model.width % 4:
        raise InputError(f"config.model.width must be a multiple of 4 for pos='sincos2d', found {model.width}")
    return ViTSpec.uniform(depth=model.depth, heads=model.heads, mlp=model.mlp or None, **fields)
