# SPDX-License-Identifier: Apache-2.0
"""The forms in which learned thresholds are deployed, as `vtjax bench` and the figures time them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vtjax import paths
from vtjax.account import bench, flops
from vtjax.cli import config as config_lib
from vtjax.data import loader
from vtjax.errors import InputError
from vtjax.methods import ltmp, ltmp_deploy
from vtjax.models.vit import ViT
from vtjax.spec import ViTSpec
from vtjax.train.task import Task, closing

FORMS = ("packed", "fixed", "masked")
IMAGES = 256  # of a calibration that has to be made first


def check(config: ConfigDict) -> None:
    """Raises InputError for a form that is not known, or numbers that no deployment can have."""
    form = config.ltmp.deploy
    if form.form not in FORMS:
        raise InputError(f"config.ltmp.deploy.form must be one of {', '.join(FORMS)}, found {form.form!r}")
    for name, least in (("together", 1), ("groups", 1), ("choices", 0)):
        if form[name] < least:
            raise InputError(f"config.ltmp.deploy.{name} must be at least {least}, found {form[name]}")


def deploy(config: ConfigDict, task: Task, images: Any, dense: Any) -> tuple[bench.Candidate, bench.Candidate]:
    """Both sides of `vtjax bench`: the model in the form of `config.ltmp.deploy`, calibrated on training images, and
    the dense one (`--dense`, else its own weights without the thresholds)."""
    params, _, _ = task.init(jax.random.key(config.seed))
    params = params if task.begin is None else task.begin(params)
    counts = calibration(config, task.spec, params)
    reduced = candidate(config, task.spec, params, counts, images.shape[0])
    if dense is not None:
        work = flops.macs(dense.spec)
        return reduced, bench.Candidate("--dense", lambda p, x: dense.apply(p, x)[0], dense.params, work)
    return reduced, undiminished(config, task.spec, params)


def undiminished(config: ConfigDict, spec: ViTSpec, params: Any) -> bench.Candidate:
    """The model with its thresholds taken out."""
    before = bench.undone(spec)
    model = ViT(before, **_options(config))
    return bench.Candidate("itself", lambda p, x: model.apply(p, x)[0], backbone(params), flops.macs(before))


def candidate(
    config: ConfigDict, spec: ViTSpec, params: Any, counts: Mapping[str, np.ndarray], batch: int
) -> bench.Candidate:
    """The reduced side; `counts` as from `calibration`. The adaptive forms also tell what `Deployed.apply` tells."""
    form, options = config.ltmp.deploy.form, _options(config)
    if form == "fixed":
        fixed = ltmp_deploy.fixed(spec, counts["merged"], counts["pruned"])
        options["attention"] = ltmp_deploy.without_gradient(options["attention"])
        short = ltmp.vit(fixed, **options)
        work = flops.macs(fixed, ltmp.fixed_tokens(fixed))
        return bench.Candidate("fixed counts", lambda p, x: short.apply(p, x)[0], backbone(params), work)
    if form == "masked":
        masked = ltmp.vit(ltmp.consistent(spec), **options)
        return bench.Candidate("masked", lambda p, x: masked.apply(p, x)[0], params, flops.macs(spec))
    model = packed(config, spec, counts["kept"], batch)
    count = counter(config, spec)

    def macs(x: Any) -> float:
        return float(macs_of(spec, count(params, x)["kept"]).mean())

    settings = {
        "sizes": sum(map(len, itertools.chain(*model.sizes.slots, model.sizes.rows))),
        "together": model.together,
        "groups": len(ltmp_deploy.groups_of(model.together, model.groups)),
        "calibration_images": len(counts["kept"]),
    }

    def tell(made: Any) -> dict[str, float]:
        spent = macs_of_sizes(spec, *(made[1][name] for name in ("slots", "rows", "overflow")))
        return {"macs_of_sizes": float(spent.mean()), "overflow_rate": float(np.mean(made[1]["overflow"]))}

    return bench.Candidate(form, model.apply, params, macs, settings, tell=tell)


def packed(config: ConfigDict, spec: ViTSpec, kept: np.ndarray, batch: int) -> ltmp_deploy.Deployed:
    """The adaptive model for batches of a size, from the live tokens `[n, L]` of calibration images."""
    form = config.ltmp.deploy
    how = {"groups": form.groups, "together": min(form.together, batch)}
    known = ltmp_deploy.calibrate(kept, spec, batch=batch, choices=form.choices, **how)
    return ltmp_deploy.Deployed(spec, known, **how, **_options(config))


def macs_of(spec: ViTSpec, kept: Any) -> np.ndarray:
    """MACs `[n]` of images with so many live tokens after each block, `[n, L]`."""
    return np.asarray([flops.macs(spec, [spec.tokens, *(int(k) for k in row)]) for row in np.asarray(kept)], float)


def macs_of_sizes(spec: ViTSpec, slots: Any, rows: Any, overflow: Any) -> np.ndarray:
    """MACs `[n]` of images that were run with so many slots and rows, `[n, L]`, and those again that overflowed."""
    costs = ltmp.costs(spec).astype(np.float64)
    k, r = np.asarray(slots, np.float64), np.asarray(rows, np.float64)
    spent = (costs[:, 0] * k + costs[:, 1] * k * k + costs[:, 2] * r).sum(1)
    return spent + flops.macs(spec) - ltmp.dense_macs(spec) + np.asarray(overflow) * flops.macs(spec)


def calibration(config: ConfigDict, spec: ViTSpec, params: Any) -> dict[str, np.ndarray]:
    """`kept`, `merged`, `pruned` `[n, L]` of training images: those of the run that `config.init_from` names, else
    found now."""
    same = not replaced(config) and not (config.ltmp.form == "faithful" and config.ltmp.measured == "masked")
    if same and paths.is_workdir(config.init_from):
        from vtjax.cli import decisions

        if (saved := decisions.load(config.init_from)) is not None:
            found = {name: np.asarray(saved.get(name, [])) for name in ("kept", "merged", "pruned")}
            for name, values in found.items():
                if values.shape != (saved["count"], spec.depth):
                    expected = [saved["count"], spec.depth]
                    raise InputError(
                        f"{decisions.FILE} of config.init_from={config.init_from!r} must hold {name} {expected}, found "
                        f"{list(values.shape)}"
                    )
            return found
    return counted(config, spec, params, photographs(config, spec, "train", IMAGES))


def replaced(config: ConfigDict) -> list[str]:
    """Thresholds that an override sets in place of learned ones. A run's own config only says where learning began."""
    names = ("merge_threshold", "prune_threshold")
    return [name for name in names if f"ltmp.{name}" in config_lib.overridden(config) and config.ltmp[name] != -1.0]


def photographs(config: ConfigDict, spec: Any, split: str, count: int) -> np.ndarray:
    """The first `count` images of "train" or "eval", normalised, without augmentation; fewer where there are not so
    many."""
    data = loader.from_config(
        config.data, seed=config.seed, batch_size=count, image_size=spec.image_size, preprocess=spec.preprocess
    )
    batches = data.eval(split)
    with closing(batches):
        batch = next(batches)
    return batch["image"][batch["valid"]]


def counted(config: ConfigDict, spec: ViTSpec, params: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    """`kept`, `merged`, `pruned` `[n, L]` of images, exact."""
    run = counter(config, spec)
    parts = [run(params, images[first : first + 32]) for first in range(0, len(images), 32)]
    return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}


def counter(config: ConfigDict, spec: ViTSpec) -> Any:
    """Jitted `(params, images) -> {kept, merged, pruned: [B, L]}`, by the masked model, which is quick to compile."""
    model = ltmp.vit(ltmp.consistent(spec), **_options(config))
    return jax.jit(lambda params, images: layers(model.apply(params, images)[1], spec))


def layers(aux: Mapping[str, Any], spec: ViTSpec) -> dict[str, jax.Array]:
    """int32 `kept`, `merged`, `pruned` `[B, L]` of a model's aux; a block that does not reduce keeps what came."""
    kept = jnp.round(ltmp.alive_fractions(aux, spec.tokens).T * spec.tokens)
    made = [block.get("decisions", {}) for block in aux["blocks"]]
    zeros = jnp.zeros(kept.shape[:1])
    rows = {name: jnp.stack([m.get(name, zeros) for m in made], 1) for name in ("merged", "pruned")}
    return {name: value.astype(jnp.int32) for name, value in {"kept": kept, **rows}.items()}


def _options(config: ConfigDict) -> dict[str, Any]:
    return {"dtype": jnp.dtype(config.dtype), "attention": config.model.attention}


def backbone(params: Any) -> Any:
    """Without the thresholds."""
    return {name: tree for name, tree in params.items() if name != ltmp.NAME}
