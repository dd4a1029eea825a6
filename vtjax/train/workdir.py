# SPDX-License-Identifier: Apache-2.0
"""What a run finds in its workdir before it begins: another config, a finished result."""

from __future__ import annotations

import json
from typing import Any

from etils import epath

from vtjax import spec as spec_lib
from vtjax.errors import InputError
from vtjax.train import log
from vtjax.train.task import Task

# Leaves without influence on what is computed. `steps` is not among them: a longer run is another schedule.
FREE_LEAVES = ("workdir", "log_every", "profile", "allow_config_change")


def refuse_changes(folder: epath.Path, task: Task, config: Any) -> None:
    """Names every difference to the config and spec that the run in `folder` began with."""
    begun = (folder / "result.json").exists() or any((folder / "checkpoints").glob("[0-9]*"))
    if not begun or not (folder / "config.json").exists() or config.allow_config_change:
        return
    changes = spec_lib.diff(json.loads((folder / "config.json").read_text()), log.plain(config))
    changes = {name: pair for name, pair in changes.items() if name.split(".")[0] not in FREE_LEAVES}
    if (folder / "spec.json").exists():
        began = json.loads((folder / "spec.json").read_text())
        changes |= spec_lib.diff(began, log.plain(task.spec.to_dict()), "spec")
    if changes:
        named = "; ".join(f"{name} was {old!r}, found {new!r}" for name, (old, new) in changes.items())
        raise InputError(
            f"{folder} was begun under another config: {named}; take another workdir or set allow_config_change=True"
        )


def finished(folder: epath.Path, steps: int) -> dict[str, Any] | None:
    """The result of a run that reached `steps`."""
    path = folder / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    return result if result.get("step") == steps else None
