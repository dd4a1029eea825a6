# SPDX-License-Identifier: Apache-2.0
"""What is looked at before a run begins: its settings, and another config or a finished result in its workdir."""

from __future__ import annotations

import json
from typing import Any

from etils import epath

from vtjax import spec as spec_lib
from vtjax.errors import InputError
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
    if not begun or not (folder / "config.json").exists() or config.allow_config_change:
        return
    changes = spec_lib.diff(_read(folder / "config.json"), log.plain(config))
    changes = {name: pair for name, pair in changes.items() if name.split(".")[0] not in FREE_LEAVES}
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
