# SPDX-License-Identifier: Apache-2.0
"""DGMR: prunes the MLPs of a model and distils the model it was; the method is `vtjax.methods.dgmr`.

The loss is `w_class x` mean squared difference of the class token `+ w_patch x` that of the patch tokens (spec section
2.1). Labels are read by the evaluation only.

A run starts from a dense model, which it prunes, or from a model that is pruned already (the workdir of such a run),
which it trains on. The dense model is the teacher: frozen, sharded like the student, and not part of the result.
Letters: B batch, L layers.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments.dgmr import images as images_lib
from experiments.dgmr import pairing
from experiments.vit import main as vit
from vtjax.account import bench, flops
from vtjax.errors import InputError
from vtjax.methods import dgmr, dgmr_refit
from vtjax.models.vit import ViT
from vtjax.spec import ViTSpec
from vtjax.train import optim
from vtjax.train.task import Data, Task


def build(config: ConfigDict) -> Task:
    """The task of a config.

    Raises:
      InputError: settings that are not defined, weights that are missing, or a teacher that the student was not cut
        from.
    """
    settings = config.dgmr
    pairing.check(config)
    pair = pairing.paired(config)
    spec, point = pair.spec, settings.point
    dgmr.check_point(spec, point)
    if settings.classifier and not spec.classes:
        raise InputError("config.dgmr.classifier must be false for a model without a head, found true")
    student, teacher = ViT(spec, **vit.options(config)), None
    if pair.teacher_spec is not None:
        teacher = ViT(pair.teacher_spec, **vit.options(config))
    if teacher is None and not settings.classifier:
        raise InputError(pairing.no_teacher(spec))
    optim.schedule(config.optim, config.steps)  # reads what is not common to all configs
    group_of, fixed = optim.group_of(config.optim), dgmr.untouched(spec, point)

    def init(key: jax.Array) -> tuple[Any, Any, Any]:
        if config.init_from or teacher is None:
            frozen = {} if pair.teacher is None else {"teacher": _as(pair.teacher, settings.teacher_dtype)}
            return student.init(key) if pair.params is None else pair.params, frozen, {}
        dense = teacher.init(key)
        params = dgmr.take(teacher.spec, dense, pairing.picks(config, teacher.spec, dense))
        return params, {"teacher": _as(dense, settings.teacher_dtype)}, {}

    def begin(params: Any) -> Any:
        if teacher is None:
            raise InputError(pairing.no_teacher(spec))
        return params

    def told(frozen: Any, batch: Any) -> dgmr.Features:
        """What the teacher says, from the batch where it is remembered."""
        if images_lib.WHOLE in batch:
            return dgmr.Features(batch[images_lib.WHOLE], batch[images_lib.PATCH])
        assert teacher is not None
        return dgmr.features(teacher.spec, *teacher.apply(frozen["teacher"], batch["image"]), point)

    def loss(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any, key: jax.Array, step: Any) -> Any:
        y, aux = student.apply(params, batch["image"], key=key, drop_path=config.model.drop_path)
        whole, patch = dgmr.distances(dgmr.features(spec, y, aux, point), told(frozen, batch))
        terms = {"class_mse": whole.mean(), "patch_mse": patch.mean()}
        return knobs["dgmr.w_class"] * terms["class_mse"] + knobs["dgmr.w_patch"] * terms["patch_mse"], terms

    def evaluate(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any) -> dict[str, jax.Array]:
        y, aux = student.apply(params, batch["image"])
        per_image: dict[str, jax.Array] = {}
        if teacher is not None:
            there, known = teacher.apply(frozen["teacher"], batch["image"])
            found = dgmr.features(spec, y, aux, point), dgmr.features(teacher.spec, there, known, point)
            whole, patch = dgmr.distances(*found)
            total = knobs["dgmr.w_class"] * whole + knobs["dgmr.w_patch"] * patch
            per_image |= {"feature_mse": total, "class_mse": whole, "patch_mse": patch}
            if settings.classifier:
                per_image["agreement"] = (y.argmax(-1) == there.argmax(-1)).astype(jnp.float32)
        if settings.classifier:
            return vit.sums(y, batch, **per_image)
        return vit.summed(per_image, batch["valid"])

    return Task(
        spec=spec,
        init=init,
        loss=loss,
        evaluate=evaluate,
        trainable=lambda path: None if path.split("/")[0] in fixed else group_of(path),
        knobs={"dgmr.w_class": settings.w_class, "dgmr.w_patch": settings.w_patch},
        summary=_summary(config, pair),
        begin=begin,
    )


def data(config: ConfigDict, task: Task) -> Data:
    """The images; with `config.dgmr.cache` the training images come with the teacher's features.

    Raises:
      InputError: as `images.opened` and `images.Remembered`; a cache without a teacher.
    """
    found = images_lib.opened(config, task.spec)
    if config.dgmr.images:
        told = f"{found.train_examples} training images, those of {config.dgmr.images} among them, drawn alike"
        print(told, file=sys.stderr)
    if not config.dgmr.cache:
        return found
    _, frozen, _ = task.init(jax.random.split(jax.random.key(config.seed))[0])
    if not frozen:
        raise InputError(pairing.no_teacher(task.spec))
    spec = dgmr.original(task.spec)
    assert spec is not None
    model = ViT(spec, **{**vit.options(config), "constrain": lambda x: x})

    def features(params: Any, images: Any) -> dgmr.Features:
        return dgmr.features(spec, *model.apply(params, images), config.dgmr.point)

    image = jax.ShapeDtypeStruct((1, *spec.image_size, spec.channels), jnp.float32)
    shapes = jax.eval_shape(features, frozen["teacher"], image)
    teacher = functools.partial(jax.jit(features), frozen["teacher"])
    numbers = sum(leaf.size for leaf in shapes)
    return images_lib.Remembered(found, teacher, numbers, config.dgmr.cache_gib)


def surgery(config: ConfigDict, spec: ViTSpec) -> ViTSpec:
    """The spec that pruning gives, of weights that are not here; for `vtjax inspect`.

    Where blocks are to keep different numbers of neurons, they are shown with the mean.
    """
    pairing.check(config)
    kept = dgmr.counts(spec, **pairing.extent(config))
    return spec.edit(blocks={layer: {"mlp": k} for layer, k in enumerate(kept) if k})


def deploy(config: ConfigDict, task: Task, images: Any, dense: Any) -> tuple[bench.Candidate, bench.Candidate]:
    """Both sides of `vtjax bench`: the pruned model, and the teacher or the model of `--dense`.

    Raises:
      InputError: neither is known.
    """
    params, frozen, _ = task.init(jax.random.key(config.seed))
    reduced = _candidate(config, "pruned", task.spec, params)
    if dense is not None:
        return reduced, _candidate(config, "--dense", dense.spec, dense.params)
    before = dgmr.original(task.spec)
    if not frozen or before is None:
        raise InputError(f"{pairing.no_teacher(task.spec)}; or give the baseline by --dense")
    return reduced, _candidate(config, "the teacher", before, frozen["teacher"])


def _candidate(config: ConfigDict, name: str, spec: ViTSpec, params: Any) -> bench.Candidate:
    model = ViT(spec, **vit.options(config))
    return bench.Candidate(name, lambda p, x: model.apply(p, x)[0], params, flops.macs(spec))


def _summary(config: ConfigDict, pair: pairing.Pair) -> dict[str, Any]:
    spec, before = pair.spec, dgmr.original(pair.spec)
    assert before is not None
    rows, dense = flops.layers(spec), flops.layers(before)
    parent = vit.parent_of(spec) if config.init_from else ""
    return {
        "macs_per_image": sum(row.macs for row in rows),
        "dense_macs_per_image": sum(row.macs for row in dense),
        "mac_ratio": sum(row.macs for row in rows) / sum(row.macs for row in dense),
        "params": sum(row.params for row in rows),
        "dense_params": sum(row.params for row in dense),
        "keep": dgmr.compact(dgmr.hidden(spec)),
        "method": dgmr.settings(spec)["method"],
        "allocation": dgmr.settings(spec).get("allocation", "uniform"),
        "refit": dgmr_refit.images_of(spec),
        "teacher": pair.source,
        "init_from": config.init_from,
        **({"init_from_sha256": parent} if parent else {}),
    }


def _as(params: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)
