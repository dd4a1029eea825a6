# SPDX-License-Identifier: Apache-2.0
"""What is looked at before a run begins: its settings, and another config or a finished result in its workdir."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from vtjax import spec as spec_lib
from vtjax.errors import InputError
from vtjax.parallel import launch
from vtjax.train import log
from vtjax.train.task import Data, Task

# Leaves without influence on what is computed (`mesh`: but for the order of sums). `steps` is not among them: a longer
# run is another schedule.
FREE_LEAVES = ("workdir", "mesh", "log_every", "profile", "allow_config_change", "heartbeat_timeout")


def check_settings(config: Any, data: Data) -> None:
    """Raises `InputError` for settings that no run can have."""
    for name in ("steps", "log_every"):
        if config[name] < 1:
            raise InputError(f"config.{name} must be 1 or more, found {config[name]}")
    start, stop = config.profile
    if (start, stop) != (0, 0) and not 0 <= start < min(stop, config.steps):
        raise InputError(
            f"config.profile must be (start, stop) with 0 <= start < stop and start < config.steps={config.steps}, "
            f"or (0, 0) for none, found {config.profile}"
        )
    if not data.train_examples:
        raise InputError("config.data.train_split must name a split to train on, found no training examples")


def refuse_changes(folder: epath.Path, task: Task, config: Any) -> None:
    """Names every difference to the config and spec that the run in `folder` began with.

    Raises:
      InputError: there are some, and `config.allow_config_change` is off; or one of the files is damaged.
    """
    begun = (folder / "result.json").exists() or any((folder / "checkpoints").glob("[0-9]*"))
    if not begun or config.allow_config_change:
        return
    changes = config_changes(folder, config)
    if (folder / "spec.json").exists():
        # Through the class, so that a field that is newer than the file has its default there, too.
        # The lineage is a history, not a setting.
        began = spec_lib.from_dict(_read(folder / "spec.json"))
        old, new = (log.plain({**spec.to_dict(), "lineage": []}) for spec in (began, task.spec))
        changes |= spec_lib.diff(old, new, "spec")
    if changes:
        named = "; ".join(f"{name} was {old!r}, found {new!r}" for name, (old, new) in changes.items())
        raise InputError(
            f"{folder} was begun under another config: {named}; take another workdir or set "
            "config.allow_config_change (--config.allow_config_change=true)"
        )


def config_changes(folder: epath.Path, config: Any) -> dict[str, tuple[Any, Any]]:
    """Leaves that differ from the config of the run in `folder`, free ones left out; none where there is no run."""
    if not (folder / "config.json").exists():
        return {}
    changes = spec_lib.diff(_read(folder / "config.json"), log.plain(config))
    return {name: pair for name, pair in changes.items() if name.split(".")[0] not in FREE_LEAVES}


def check_shared(folder: epath.Path) -> None:
    """Raises `InputError` on all processes of a run where one of them does not see what process 0 writes into `folder`:
    the commonest mistake with several machines, which would show at the first checkpoint only, as a standstill."""
    if jax.process_count() == 1:
        return
    token = str(launch.from_first(secrets.randbelow(2**31)))
    file = folder / ".shared"
    log.write_text(file, token)
    launch.from_first(0)  # when all come here, it is written
    until, seen = time.monotonic() + 10, False  # a network file system may take a moment
    while not (seen := file.exists() and file.read_text() == token) and time.monotonic() < until:
        time.sleep(0.5)
    blind = np.flatnonzero(~multihost_utils.process_allgather(np.asarray(seen)).reshape(-1))
    if launch.first():
        file.unlink(missing_ok=True)
    if len(blind):
        raise InputError(
            f"workdir {folder} must be one folder that all processes share (a network file system, gs://...), but "
            f"process {', '.join(map(str, blind))} does not see what process 0 writes there"
        )


def finished(folder: epath.Path, steps: int) -> dict[str, Any] | None:
    """The result of a run that reached `steps`; raises `InputError` where the file is damaged."""
    path = folder / "result.json"
    result = _read(path) if path.exists() else {}
    return result if result.get("step") == steps else None


def _read(path: epath.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not text
        raise InputError(f"{path} must be JSON, as the run wrote it: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content
