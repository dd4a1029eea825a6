# SPDX-License-Identifier: Apache-2.0
"""Who is distilled into whom: a dense model and what pruning makes of it, or a model that was pruned before and the one
that it was."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

import vtjax
from experiments.dgmr import images as images_lib
from experiments.vit import main as vit
from vtjax import weights
from vtjax.errors import InputError, check_choice
from vtjax.methods import dgmr, dgmr_budget, dgmr_refit
from vtjax.models.vit import ViT
from vtjax.ops import gram_schmidt
from vtjax.parallel import mesh as mesh_lib
from vtjax.spec import ViTSpec
from vtjax.train.state import params_sha256
from vtjax.train.task import first_examples

ALLOCATIONS = ("uniform", "spectrum", "sensitivity")


class Pair(NamedTuple):
    """Student and teacher.

    Attributes:
      spec: of the student.
      params: of the student; None where a checkpoint has them, or where they come of random weights.
      teacher_spec: None where no teacher was found.
      teacher: its parameters; None where there is no teacher, or where its weights are random.
      source: where the teacher came from.
    """

    spec: ViTSpec
    params: Any
    teacher_spec: ViTSpec | None
    teacher: Any
    source: str


def paired(config: ConfigDict) -> Pair:
    """Student and teacher of a config.

    Raises:
      InputError: a model whose blocks reduce tokens, another head, or as `prune` and `find_teacher`.
    """
    if not config.init_from:
        spec = described(config.model)
        if config.dgmr.teacher:
            raise InputError("config.dgmr.teacher needs config.init_from, a model that was pruned, found none")
        for leaf, plain in (("allocation", "uniform"), ("indices", ""), ("refit", 0)):
            if config.dgmr[leaf] != plain:
                raise InputError(
                    f"config.dgmr.{leaf} must be {plain!r} for random weights (config.init_from is empty), "
                    f"found {config.dgmr[leaf]!r}"
                )
        return Pair(_edited(config, spec, dgmr.counts(spec, **extent(config))), None, spec, None, "random weights")
    spec, params, fresh = vit.source(config)
    taken = [i for i, block in enumerate(spec.blocks) if block.reduce is not None]
    if taken:
        raise InputError(
            f"config.init_from={config.init_from!r} must hold a model that reduces no tokens (prune first, then learn "
            f"thresholds), found blocks[{taken[0]}].reduce={spec.blocks[taken[0]].reduce!r}"
        )
    if fresh:
        raise InputError(f"config.model.classes must be those of the teacher's head, found {spec.classes}")
    if dgmr.original(spec) is None and params is not None:
        if config.dgmr.teacher:
            raise InputError(
                f"config.dgmr.teacher must be empty where config.init_from={config.init_from!r} is dense, and so the "
                f"teacher, found {config.dgmr.teacher!r}"
            )
        print(f"pruning the MLPs of {config.init_from} by {_method(config)} ...", file=sys.stderr)
        chosen = picks(config, spec, params)
        edited = _edited(config, spec, dgmr.widths(chosen), chosen, parent=params_sha256(params))
        student = _refitted(config, edited, dgmr.take(spec, params, chosen), spec, params)
        return Pair(*student, spec, params, config.init_from)
    _check_same(config, spec)
    return find_teacher(config, spec, params)


def find_teacher(config: ConfigDict, spec: ViTSpec, params: Any) -> Pair:
    """The pair of a student that was pruned before: the teacher is `config.dgmr.teacher`, else what the run or the
    student's lineage names, if it is there. An evaluation can do without.

    Raises:
      InputError: a named teacher that cannot be loaded, or is not the model that the student was cut from.
    """
    first = next(i for i, step in enumerate(spec.lineage) if step.operation == dgmr.PRUNE)
    history = spec.lineage[: first + 1]
    parents = {step.parent for step in history if step.parent}
    begun = [json.loads(step.arguments).get("source", "") for step in history if step.operation == "init_from"]
    named = config.dgmr.teacher
    for place in [named] if named else dict.fromkeys([config.init_from, *reversed(begun)]):
        try:
            loaded = vtjax.load(place)
            _check_teacher(place, loaded, parents)
            return Pair(spec, params, *_resized(place, loaded, spec), _short(place))
        except InputError:
            if named:
                raise
    print(f"no teacher: {no_teacher(spec)}", file=sys.stderr)
    return Pair(spec, params, None, None, "")


def _check_teacher(place: str, loaded: vtjax.Model, parents: set[str]) -> None:
    if dgmr.original(loaded.spec) is not None:
        raise InputError(f"config.dgmr.teacher must be a model that was not pruned, found {place!r}")
    found = params_sha256(loaded.params)
    if parents and found not in parents:
        raise InputError(
            f"config.dgmr.teacher={place!r} must be the model that the student was cut from, with SHA-256 "
            f"{' or '.join(sorted(parents))}, found {found}"
        )


def _resized(place: str, loaded: vtjax.Model, spec: ViTSpec) -> tuple[ViTSpec, Any]:
    """The teacher for images of the student's size."""
    before = dgmr.original(spec)
    assert before is not None
    found, params = loaded.spec, loaded.params
    if found.image_size != spec.image_size:
        found, params = weights.resize(found, params, image_size=spec.image_size)
    if differ := {name: pair for name, pair in before.diff(found).items() if not name.startswith("lineage")}:
        name, (expected, there) = next(iter(differ.items()))
        raise InputError(
            f"config.dgmr.teacher={place!r} must have {name}={expected!r}, as the student, found {there!r}"
        )
    return found, params


def picks(config: ConfigDict, spec: ViTSpec, params: Any) -> list[Any]:
    """The neurons that a dense model keeps."""
    settings = config.dgmr
    if settings.indices:
        return dgmr.given(spec, params, _read(settings.indices))
    how = {"method": settings.method, "score": settings.score, "form": settings.form, "seed": config.seed}
    if jax.device_count() > 1 and jax.process_count() == 1:
        how["mesh"] = mesh_lib.make(config.mesh)
    kept = dgmr.counts(spec, **extent(config))
    if settings.allocation != "uniform":
        kept = allocated(config, spec, params, kept, how)
    return dgmr.choose(spec, params, kept, **how)


def allocated(
    config: ConfigDict, spec: ViTSpec, params: Any, kept: tuple[int, ...], how: dict[str, Any]
) -> tuple[int, ...]:
    """Counts of the same sum as `kept`, and so of equal MACs, where they save most; see `methods.dgmr_budget`."""
    settings = config.dgmr
    whole = dgmr.counts(spec, keep=dgmr.hidden(spec))
    everything = dgmr.choose(spec, params, whole, **how)
    if settings.allocation == "spectrum":
        curves = dgmr_budget.by_norms(everything)
    else:
        images = _training_images(config, spec, "sensitivity_images")
        print(f"what pruning one block does to the features of {len(images)} images ...", file=sys.stderr)
        both = settings.w_class, settings.w_patch
        apply = ViT(spec, **{**vit.options(config), "constrain": lambda x: x}).apply
        curves = dgmr_budget.by_features(spec, params, everything, images, apply, point=settings.point, weights=both)
    even = sum(kept) / sum(k > 0 for k in kept)
    low, high = (round(limit * even) for limit in settings.limits)
    return dgmr_budget.allocate(curves, sum(kept), multiple=settings.multiple, limits=(max(low, 1), high))


def _refitted(config: ConfigDict, spec: ViTSpec, params: Any, dense_spec: ViTSpec, dense: Any) -> tuple[ViTSpec, Any]:
    """The student after `config.dgmr.refit`."""
    if count := config.dgmr.refit:
        images = _training_images(config, dense_spec, "refit")
        if len(images) < count:
            raise InputError(f"config.dgmr.refit must be at most {len(images)}, the training images, found {count}")

        def tell(layer: int) -> None:
            print(f"output weights of block {layer} on {count} images ...", file=sys.stderr)

        spec, params = dgmr_refit.refit(
            spec, params, dense_spec, dense, images, progress=tell, parent=params_sha256(params)
        )
    return spec, params


def _training_images(config: ConfigDict, spec: ViTSpec, leaf: str) -> np.ndarray:
    """The first of the training images, those of `config.dgmr.images` among them, normalised, without augmentation."""
    if jax.process_count() > 1:
        raise InputError(
            f"config.dgmr.{leaf} looks at images in one process, found {jax.process_count()}: prune in one, and start "
            "from its workdir by config.init_from"
        )
    return first_examples(images_lib.opened(config, spec), "train", config.dgmr[leaf])["image"]


def _edited(config: ConfigDict, spec: ViTSpec, kept: Any, picks: Any = (), parent: str = "") -> ViTSpec:
    how = {"method": _method(config), "score": config.dgmr.score, "allocation": config.dgmr.allocation}
    how |= {"seed": config.seed, "parent": parent}
    return dgmr.edit(spec, kept, picks, **how)


def _method(config: ConfigDict) -> str:
    return "indices" if config.dgmr.indices else config.dgmr.method


def extent(config: ConfigDict) -> dict[str, Any]:
    """How far is pruned, as `dgmr.counts` takes it."""
    keep = tuple(config.dgmr.keep)
    if not keep:
        return {"ratio": config.dgmr.ratio}
    return {"keep": keep[0] if len(keep) == 1 else list(keep)}


def _check_same(config: ConfigDict, spec: ViTSpec) -> None:
    """Raises InputError where the config describes another pruning than the one that was made."""
    made, before = dgmr.settings(spec), dgmr.original(spec)
    assert before is not None
    where = f"of config.init_from={config.init_from!r}"
    if made["method"] != "indices" and config.dgmr.indices:
        raise InputError(
            f"config.dgmr.indices must be empty, as the neurons {where} were selected by {made['method']!r}, "
            f"found {config.dgmr.indices!r}"
        )
    if made["method"] != _method(config):
        raise InputError(
            f"config.dgmr.method must be {made['method']!r}, by which the neurons {where} were selected, "
            f"found {_method(config)!r}"
        )
    made = {"allocation": "uniform"} | made
    for leaf in ("score", "allocation"):
        if leaf in made and made[leaf] != config.dgmr[leaf]:
            raise InputError(
                f"config.dgmr.{leaf} must be {made[leaf]!r}, with which the neurons {where} were selected, "
                f"found {config.dgmr[leaf]!r}"
            )
    fitted = dgmr_refit.images_of(spec)
    if config.dgmr.refit not in (0, fitted):
        raise InputError(
            f"config.dgmr.refit must be 0 or as when the model {where} was pruned, {fitted}, found {config.dgmr.refit}"
        )
    if config.dgmr.indices:
        if dgmr.digest(_read(config.dgmr.indices)) != made["indices_sha256"]:
            raise InputError(f"config.dgmr.indices must name the neurons {where}, found others")
        return
    wanted = dgmr.counts(before, **extent(config))
    if sum(made["keep"]) != sum(wanted) or (config.dgmr.allocation == "uniform" and tuple(made["keep"]) != wanted):
        raise InputError(
            f"config.dgmr.ratio (or keep) must give the neurons {where}, {made['keep']}, found {list(wanted)}"
        )


def check(config: ConfigDict) -> None:
    """Raises InputError for settings that no run can have."""
    settings = config.dgmr
    for name, known in (
        ("method", dgmr.METHODS[:-1]),
        ("score", dgmr.SCORES),
        ("form", gram_schmidt.FORMS),
        ("allocation", ALLOCATIONS),
        ("point", dgmr.POINTS),
        ("teacher_dtype", ("float32", "bfloat16")),
    ):
        check_choice(f"config.dgmr.{name}", settings[name], known)
    # Files are looked at before anything is selected.
    if settings.indices and config.init_from:
        _read(settings.indices)
    if settings.images:
        images_lib.unlabelled(settings.images)
    for name, least in (
        ("w_class", 0.0),
        ("w_patch", 0.0),
        ("cache_gib", 0.0),
        ("multiple", 1),
        ("sensitivity_images", 1),
        ("refit", 0),
    ):
        if not least <= settings[name] < math.inf:
            raise InputError(f"config.dgmr.{name} must be at least {least}, found {settings[name]}")
    if not settings.w_class + settings.w_patch:
        raise InputError("config.dgmr.w_class and w_patch must not both be 0")
    low, high = settings.limits
    if not 0.0 <= low <= 1.0 <= high < math.inf:
        raise InputError(f"config.dgmr.limits must be (low, high) with 0 <= low <= 1 <= high, found {settings.limits}")
    if not 0.0 <= config.model.drop_path < 1.0:
        raise InputError(f"config.model.drop_path must be in [0, 1), found {config.model.drop_path}")


def described(model: ConfigDict) -> ViTSpec:
    """As `vit.described`, where a model may also have no head (`classes=0`)."""
    if model.classes:
        return vit.described(model)
    with_head = ConfigDict(model.to_dict())
    with_head.classes = 1
    return vit.described(with_head).edit(classes=0)


def _short(place: str) -> str:
    """A name that is not of this machine only."""
    return Path(place).name if Path(place).is_absolute() else place


def _read(path: str) -> Any:
    """Indices per block, of a JSON file; whether they fit a model is not looked at."""
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        raise InputError(
            f"config.dgmr.indices must be a JSON file, found {path!r}: {(error.strerror or str(error)).lower()}"
        ) from None
    except ValueError as error:
        raise InputError(f"config.dgmr.indices must be a JSON file with a list of neurons per block: {error}") from None
    if not isinstance(found, list) or not all(each is None or isinstance(each, list) for each in found):
        raise InputError(
            f"config.dgmr.indices must be a JSON file with a list of neurons per block, found {str(found):.60}"
        )
    for layer, each in enumerate(found):
        if not all(isinstance(neuron, int) for neuron in each or []):
            raise InputError(f"config.dgmr.indices must hold whole numbers, found {str(each):.60} for block {layer}")
    return found


def no_teacher(spec: ViTSpec) -> str:
    before = next((step.parent for step in spec.lineage if step.operation == dgmr.PRUNE), "")
    told = f", with SHA-256 {before}" if before else ""
    return f"config.dgmr.teacher must name the model that the student was cut from{told}, found none"
