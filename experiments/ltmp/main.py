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

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.ltmp import settle, start
from experiments.ltmp.deploy import check as check_deploy
from experiments.ltmp.deploy import deploy, layers, photographs, replaced
from experiments.vit import main as vit
from vtjax.account import flops
from vtjax.errors import InputError, check_choice
from vtjax.methods import dgmr, ltmp
from vtjax.models.vit import ViT
from vtjax.ops import losses, token_reduction
from vtjax.parallel import mesh
from vtjax.spec import ViTSpec
from vtjax.train import optim
from vtjax.train.state import host_copy, params_sha256
from vtjax.train.task import Task

__all__ = ["build", "deploy"]

BUDGETS = ("image", "batch")
MEASURED = ("deployed", "masked")
STARTS = ("authors", "even")


def build(config: ConfigDict) -> Task:
    """The task of a config.

    Raises:
      InputError: settings that are not defined, weights that are missing, or thresholds that were learned otherwise.
    """
    spec, params, thresholds, fresh = source(config)
    options, drop_path, smoothing = vit.execution(config)
    model = ltmp.vit(spec, training=True, **options)
    measured = ltmp.vit(spec if config.ltmp.measured == "masked" else ltmp.consistent(spec), **options)
    # The model that thresholds are learned for, which other surgery may have made cheaper before.
    undiminished, distill = ViT(spec.unreduced(), **options), config.loss.distill
    unpruned = dgmr.original(spec)
    whole = float(flops.macs(unpruned)) if unpruned is not None else 0.0
    # As floats: JAX would take whole numbers of this size for int32.
    blocks, dense = ltmp.dense_macs(spec), float(flops.macs(spec))
    check(config, spec, ltmp.floor(spec) if config.ltmp.budget == "batch" else _whole(ltmp.floor(spec), blocks, dense))
    costs = jnp.asarray(ltmp.costs(spec))

    def init(key: jax.Array) -> tuple[Any, Any, Any]:
        new = model.init(key) if params is None or fresh else {}
        kept = new if params is None else {**params, **{name: new[name] for name in fresh}}
        return given({**kept, ltmp.NAME: kept.get(ltmp.NAME, thresholds)}), {}, {}

    def given(params: Any) -> Any:
        return {**params, ltmp.NAME: {**params[ltmp.NAME], **{name: thresholds[name] for name in replaced(config)}}}

    def begin(params: Any) -> Any:
        return {**params, ltmp.NAME: _start(config, spec, params)}

    def shares(aux: Any) -> jax.Array:
        """MACs of every image over the dense model's, [B]."""
        fractions = ltmp.alive_fractions(aux, spec.tokens)
        return _whole(token_reduction.budget(fractions, spec.tokens, costs)[0], blocks, dense)

    def loss(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any, key: jax.Array, step: Any) -> Any:
        logits, aux = model.apply(params, batch["image"], key=key, drop_path=drop_path)
        smooth = knobs["loss.label_smoothing"]
        entropy = losses.cross_entropy(logits, batch["label"], label_smoothing=smooth).mean()
        task = entropy
        if distill:
            teacher = jax.lax.stop_gradient(undiminished.apply(params, batch["image"])[0])
            task = (1 - distill) * entropy + distill * losses.divergence(teacher, logits).mean()
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
        return task + knobs["ltmp.budget_weight"] * miss**2, metrics

    @jax.jit
    def cost(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        # Sums, which every process of a run can read, whichever holds the rows.
        return jnp.where(batch["valid"], shares(measured.apply(params, batch["image"])[1]), 0).sum(), batch[
            "valid"
        ].sum()

    def finish(params: Any, frozen: Any, extra: Any, knobs: Any, draw: Any) -> Any:
        batches = [draw("train", index) for index in range(-(-config.ltmp.settle_images // config.batch_size))]

        def ratio(amount: float) -> float:
            moved = {**params, ltmp.NAME: ltmp.relaxed(params[ltmp.NAME], amount)}
            spent, count = np.sum([jax.device_get(cost(moved, batch)) for batch in batches], 0)
            return float(spent / count)

        amount, reached = settle.amount(ratio, config.ltmp.target)
        print(
            f"settled: thresholds {-amount:+.2%} of the way to their ends, {reached:.4f} of the MACs", file=sys.stderr
        )
        if abs(reached / config.ltmp.target - 1) > 0.02:
            print(
                f"warning: {reached:.4f} of the MACs is the closest to config.ltmp.target={config.ltmp.target} that "
                "thresholds which move together came; train for more steps, or start with config.ltmp.start=even",
                file=sys.stderr,
            )
        return {**params, ltmp.NAME: ltmp.relaxed(params[ltmp.NAME], amount)}

    def evaluate(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any) -> dict[str, jax.Array]:
        logits, aux = measured.apply(params, batch["image"])
        share = shares(aux)
        both = {"unpruned_mac_ratio": share * (dense / whole)} if whole else {}
        return vit.sums(logits, batch, mac_ratio=share, macs_per_image=share * dense, **both)

    def decisions(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any) -> dict[str, jax.Array]:
        logits, aux = measured.apply(params, batch["image"])
        right = losses.top_k_correct(logits, batch["label"], 1).astype(jnp.int32)
        said = logits.argmax(-1).astype(jnp.int32)
        return {"predicted": said, "correct": right, **layers(aux, spec), "macs": shares(aux) * dense}

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
            "dense_macs_per_image": int(dense),
            **({"unpruned_macs_per_image": int(whole)} if whole else {}),
            "params": sum(row.params for row in flops.layers(spec)),
            "init_from": config.init_from,
            **({"init_from_sha256": parent} if (parent := vit.parent_of(spec)) and config.init_from else {}),
        },
        begin=begin if config.ltmp.start == "even" and ltmp.NAME not in (params or {}) else None,
        finish=finish if config.ltmp.settle_images else None,
        bounds=lambda path: (0.0, 1.0) if path.startswith(f"{ltmp.NAME}/") else None,
        decisions=decisions,
        given=given,
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
    given = [None if settings[name] == -1.0 else settings[name] for name in ("merge_threshold", "prune_threshold")]
    if settings.start == "even" and given != [None, None]:
        raise InputError(f"config.ltmp.start must be 'authors' where a threshold is given, found {settings.start!r}")
    if not ltmp.reducers(spec):
        spec, thresholds = ltmp.install(
            spec,
            variant=settings.variant,
            form=settings.form,
            tau=settings.tau,
            prune_tau=settings.prune_tau,
            similarity=settings.similarity,
            relative=settings.relative,
            attached=settings.attached,
            merge_threshold=given[0],
            prune_threshold=given[1],
            dtype=config.dtype,
            parent="" if params is None else params_sha256(params),
        )
        return spec, params, thresholds, fresh
    found = ltmp.reducers(spec)[0][1]
    for name in ("variant", "form", "tau", "prune_tau", "similarity"):
        if (there := getattr(found, name, None)) != settings[name]:
            raise InputError(
                f"config.ltmp.{name} must be {there!r}, under which the thresholds of config.init_from="
                f"{config.init_from!r} were learned, found {settings[name]!r}"
            )
    for name in ("relative", "attached"):
        if (there := bool(getattr(found, name, 0))) != settings[name]:
            raise InputError(
                f"config.ltmp.{name} must be {there}, as the thresholds of config.init_from={config.init_from!r} were "
                f"learned, found {settings[name]}"
            )
    if (there := ltmp.learned_dtype(spec)) != config.dtype:
        print(
            f"the thresholds of config.init_from={config.init_from!r} were learned in {there}, config.dtype is "
            f"{config.dtype}: tokens near a threshold may be decided otherwise",
            file=sys.stderr,
        )
    resized = json.loads(spec.lineage[-1].arguments).get("image_size") if params is not None else None
    if resized and ltmp.prunes(settings.variant) and not settings.relative:
        raise InputError(
            f"config.model.image_size must be {tuple(resized[0])}, for which the thresholds of config.init_from="
            f"{config.init_from!r} were learned (importance is a share among all tokens; learn with "
            f"config.ltmp.relative=true to change it), found {tuple(resized[1])}"
        )
    thresholds = ltmp.starts(settings.variant, spec.depth, *given)
    if params is not None:
        for name in thresholds:
            ltmp.check_thresholds(name, params.get(ltmp.NAME, {}).get(name, np.zeros(0)), spec.depth)
    return spec, params, thresholds, fresh


def check(config: ConfigDict, spec: ViTSpec, floor: float) -> None:
    """Raises InputError for numbers that no run can have; `floor` is the least reachable ratio."""
    settings = config.ltmp
    for name, known in (("budget", BUDGETS), ("measured", MEASURED), ("start", STARTS)):
        check_choice(f"config.ltmp.{name}", settings[name], known)
    if not floor < settings.target <= 1.0:
        raise InputError(
            f"config.ltmp.target must be above {floor:.3f}, which the first block's attention and the protected tokens "
            f"cost, and at most 1, found {settings.target}"
        )
    if not 0.0 <= settings.prune_share <= 1.0:
        raise InputError(f"config.ltmp.prune_share must be in [0, 1], found {settings.prune_share}")
    if not -1.0 <= settings.slope <= 1.0:
        raise InputError(f"config.ltmp.slope must be in [-1, 1], found {settings.slope}")
    if not -1.0 <= settings.share_slope <= 1.0:
        raise InputError(f"config.ltmp.share_slope must be in [-1, 1], found {settings.share_slope}")
    if settings.settle_images < 0:
        raise InputError(f"config.ltmp.settle_images must be 0 or more, found {settings.settle_images}")
    if settings.start_images < 1:
        raise InputError(f"config.ltmp.start_images must be at least 1, found {settings.start_images}")
    if not 0.0 <= config.loss.distill <= 1.0:
        raise InputError(f"config.loss.distill must be in [0, 1], found {config.loss.distill}")
    if not 0.0 <= settings.budget_weight < np.inf:
        raise InputError(f"config.ltmp.budget_weight must be 0 or more, found {settings.budget_weight}")
    check_deploy(config)
    if not spec.classes:
        raise InputError("ltmp learns from labels, expected a model with a head, found none")


_starts: dict[str, dict[str, np.ndarray]] = {}  # the points of a sweep differ in seeds, too, and these start alike


def _start(config: ConfigDict, spec: ViTSpec, params: Any) -> dict[str, np.ndarray]:
    settings = config.ltmp
    numbers = (settings.target, settings.prune_share, settings.slope, settings.share_slope)
    key = f"{spec.sha256} {params_sha256(params)} {numbers} {settings.start_images} {config.data}"
    if key not in _starts:
        print("thresholds to start from, block by block ...", file=sys.stderr)
        images = photographs(config, spec, "train", settings.start_images)
        # Every process of a run does the same, on a device of its own.
        params = host_copy(params)
        with jax.set_mesh(mesh.make({}, jax.local_devices()[:1])):
            _starts[key] = start.even(spec, params, images, *numbers)
    return dict(_starts[key])


def _whole(share: Any, blocks: float, dense: float) -> Any:
    """A share of the blocks' MACs as one of the whole model's: patches, pooling and head cost what they did."""
    return (share * blocks + (dense - blocks)) / dense
