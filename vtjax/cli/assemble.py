# SPDX-License-Identifier: Apache-2.0
"""From a config to what it describes: the experiment's task and the data, all checked before any device is used."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from vtjax import paths
from vtjax.cli import config as config_lib
from vtjax.cli import decisions
from vtjax.cli.config import Config
from vtjax.errors import InputError
from vtjax.parallel import launch, mesh
from vtjax.train import log

READ_LATER = (
    # By the loop, once it runs.
    *("seed", "steps", "workdir", "profile", "log_every", "eval_every", "allow_config_change", "ema", "accumulate"),
    "heartbeat_timeout",
    *(f"mesh.{axis}" for axis in mesh.AXES),
    *(f"checkpoint.{name}" for name in ("every", "keep", "best")),
    *(f"optim.{name}" for name in ("name", "lr", "schedule", "warmup", "end_lr", "weight_decay", "b1", "b2")),
    *(f"optim.{name}" for name in ("momentum", "clip", "groups")),
    # By `vtjax eval` only.
    "data.weights_split",
    *(f"guard.{name}" for name in ("action", "bound", "amount")),
)


def join_processes(config: Config, args: argparse.Namespace) -> None:
    """Joins the processes of one run, and makes sure that they run the same thing; the first thing to do with JAX.

    Raises:
      InputError: they cannot be joined; or their configs or versions differ, by leaf.
    """
    if not launch.wanted(args.multihost):
        return
    launch.join(args.multihost, config.heartbeat_timeout, quiet=not args.debug)
    launch.agree("config", dict(config_lib.flatten(config, "config.")))
    launch.agree("versions", log.versions())


def task(config: Config) -> Any:
    """The experiment's `train.task.Task`: spec, weights and functions, on the host.

    Raises:
      InputError: numbers that no run can have, an unknown experiment, a spec that is not defined, missing weights.
    """
    return _build(config)[1]


def assemble(config: Config) -> tuple[Any, Any]:
    """(task, data) of a config, checked as far as that is possible without a device.

    Raises:
      InputError: as `task`; a missing set; data that do not fit the spec; a leaf that nothing reads.
    """
    module, built = _build(config)
    # Of what is loaded: the spec names its SHA-256. Files may differ between hosts.
    launch.agree("model", dict(config_lib.flatten({"spec": json.loads(built.spec.to_json())})), patience=900)
    data = module.data(config, built) if hasattr(module, "data") else image_data(config, built.spec)
    # A loaded model brings its own spec: the config's stands aside, unless the user has just set a part of it.
    aside = [n for n, _ in config_lib.flatten(config.model, "model.") if n not in config_lib.overridden(config)]
    config_lib.check_read(config, (*READ_LATER, *(aside if config.init_from else ())))
    check_effect(config)
    return built, data


def _build(config: Config) -> tuple[ModuleType, Any]:
    check_numbers(config)
    module = experiment(config.experiment)
    return module, module.build(config)


def check_effect(config: Config) -> None:
    """Raises `InputError` for an override of a leaf that the chosen optimiser, schedule or augmentation ignores."""
    from vtjax.data import augment
    from vtjax.train import optim

    choosers: dict[str, tuple[str, Mapping[str, tuple[str, ...]], tuple[str, ...]]] = {
        "optim.name": ("optim", optim.USED_BY, optim.OPTIMISERS),
        "optim.schedule": ("optim", {"end_lr": ("cosine", "linear")}, optim.SCHEDULES),
        "data.augment": ("data", augment.USED_BY, augment.GEOMETRIES),
    }
    leaves, given = dict(config_lib.flatten(config)), config_lib.overridden(config)
    for chooser, (group, used_by, known) in choosers.items():
        chosen = leaves[chooser]
        for leaf, users in used_by.items():
            if f"{group}.{leaf}" in given and chosen in known and chosen not in users:
                raise InputError(
                    f"config.{group}.{leaf} has no effect under config.{chooser}={chosen!r}, only under "
                    f"{' or '.join(map(repr, users))}: leave it out"
                )


def check_numbers(config: Config) -> None:
    """Raises `InputError` for a number that no run can have (negative batch, zero steps, ...)."""
    for name, least in (
        *(("steps", 1), ("batch_size", 1), ("accumulate", 1), ("log_every", 1), ("eval_every", 0), ("seed", 0)),
        *(("checkpoint.every", 1), ("checkpoint.keep", 1), ("optim.lr", 0), ("optim.warmup", 0), ("optim.clip", 0)),
        *(("data.workers", 0), ("data.prefetch", 0), ("heartbeat_timeout", 5)),
    ):
        if config[name] < least:
            raise InputError(f"config.{name} must be at least {least}, found {config[name]}")
    if config.optim.warmup >= config.steps:
        hint = ""
        if "steps" in config_lib.overridden(config) and config_lib.source(config):
            option = f"--config={config_lib.source(config)},steps={config.steps}"
            hint = f"; other leaves follow steps only as an option of the variant, as in {option}"
        raise InputError(
            f"config.optim.warmup must be in 0..{config.steps - 1} (config.steps={config.steps}), found "
            f"{config.optim.warmup}{hint}"
        )
    for name in ("ema", "optim.b1", "optim.b2", "optim.momentum"):
        if not 0 <= config[name] < 1:
            raise InputError(f"config.{name} must be in [0, 1), found {config[name]}")
    if "guard" in config:
        decisions.check_guard(config)
    if config.dtype not in ("float32", "bfloat16"):
        raise InputError(f"config.dtype must be 'float32' or 'bfloat16', found {config.dtype!r}")
    if config.batch_size % config.accumulate:
        raise InputError(
            f"config.batch_size must be a multiple of config.accumulate={config.accumulate}, found {config.batch_size}"
        )


def experiment(name: str) -> ModuleType:
    """The module `experiments/<name>/main.py`, of the present folder or of the checkout; it defines `build(config)`.

    Raises:
      InputError: no such experiment (the known ones are listed), or one that cannot be imported.
    """
    roots = [folder / "experiments" for folder in (Path.cwd(), config_lib.CHECKOUT)]
    found = [root / name / "main.py" for root in roots if (root / name / "main.py").is_file()]
    if not name.isidentifier() or not found:
        known = ", ".join(sorted({p.parent.name for root in roots for p in root.glob("*/main.py")})) or "none"
        raise InputError(f"config.experiment must be one of {known} (experiments/<name>/main.py), found {name!r}")
    path = found[0]
    module = config_lib.load_module(path, "experiment")
    if not hasattr(module, "build"):
        raise InputError(f"experiment {path} must define build(config), found none")
    return module


def image_data(config: Config, spec: Any) -> Any:
    """The data of `config.data` in the size, and with the preprocessing, that `spec` wants.

    Raises:
      InputError: a set that is missing or does not fit the spec's classes.
    """
    data = open_images(config, spec)
    if data.classes != spec.classes:
        raise InputError(
            f"config.model.classes must be {data.classes}, the number of classes of config.data.name="
            f"{config.data.name!r}, found {spec.classes}"
        )
    return data


def open_images(config: Config, spec: Any, *, more: Any = None) -> Any:
    """The same, whatever its classes; `more`: see `loader.from_config`.

    Raises:
      InputError: a set that is missing.
    """
    from vtjax.data import loader

    # Which rows are ours follows from the mesh: processes may share some. Alone, all of them are.
    several = jax.process_count() > 1
    rows = mesh.local_rows(mesh.make(config.mesh), config.batch_size) if several else None
    return loader.from_config(
        config.data,
        seed=config.seed,
        batch_size=config.batch_size,
        image_size=spec.image_size,
        preprocess=spec.preprocess,
        rows=rows,
        more=more,
    )


def check_workdir(workdir: str, *, exists: bool = False) -> str:
    """A workdir that can be used, unchanged; nothing is created.

    Args:
      workdir: a local folder or a URL such as `gs://...`.
      exists: it must hold a run already.

    Raises:
      InputError: empty, a file, not writable, or (with `exists`) absent.
    """
    if not workdir:
        raise InputError("a workdir is needed: --workdir=DIR (or config.workdir)")
    if paths.is_url(workdir):
        paths.check_url(workdir)
        return workdir
    path = Path(workdir)
    if exists and not path.exists():
        raise InputError(f"workdir {workdir} does not exist, expected the folder of a run")
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise InputError(f"workdir {workdir} must be a folder, found the file {existing}")
    if not exists and not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"workdir {workdir} must be writable, found {existing} without write permission")
    return workdir


def say(text: str) -> None:
    """A line for people."""
    print(text, file=sys.stderr, flush=True)
