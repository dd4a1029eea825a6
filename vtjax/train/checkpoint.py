# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: asynchronous, atomic, verified, restorable on any device count.

    DIR/checkpoints/<step>/{params,opt,ema,extra,meta}/    one orbax item each; empty ones are left out
    DIR/checkpoints/<step>/manifest.json                   metrics, the SHA-256 of every file above and of itself

Orbax writes into a temporary folder and renames it. Then the manifest is written, also by rename; a checkpoint without
one was not finished. Orbax itself does not notice every flipped bit, so reading starts with the manifest; what does not
agree with it is skipped with a warning, and the checkpoint before it is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import math
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vtjax import spec as spec_lib
from vtjax.errors import BusyError, InputError
from vtjax.parallel import launch
from vtjax.parallel import mesh as mesh_lib
from vtjax.train import log
from vtjax.train.state import TrainState, flatten, merge

FORMAT = 1
MANIFEST = "manifest.json"
ITEMS = ("params", "opt", "ema", "extra")

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Checkpoints:
    """The checkpoints of one run. All processes call every method, in the same order.

    Until it is closed no other run may open the folder: it would take a save that is on its way for one that was
    killed. (The lock ends with the process; where the file system has none, as on `gs://`, nothing is locked.)

    Attributes:
      folder: `DIR/checkpoints`, made where it is missing.
      keep: how many of the last ones stay.
      best: metric whose best checkpoint stays too; "" for none. A name that ends in "loss" is minimised, others are
        maximised.

    Raises:
      InputError: `keep` out of range, or another run at work in the folder.
    """

    folder: epath.Path
    keep: int
    best: str

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise InputError(f"config.checkpoint.keep must be 1 or more, found {self.keep}")
        self._finisher: threading.Thread | None = None
        self._error: Exception | None = None
        self._lock: int | None = None
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.folder)
            for path in _unfinished(self.folder):
                path.rmtree()
            newest = next((step for step, _ in _valid(self.folder, set_aside=True)), -1)
        else:
            newest = -1
        # Process 0 looks, so that all restore the same one.
        self.latest = launch.from_first(newest)
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=True, max_to_keep=None)
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        self.metrics = {step: _metrics(self.path(step)) for step in self._manager.all_steps()}

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON part: format, step, spec, config, versions, frozen_sha256."""
        return _read_meta(self.path(step))

    def path(self, step: int) -> epath.Path:
        """Folder of one checkpoint."""
        return self.folder / str(step)

    def save(self, state: TrainState, step: int, meta: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Starts writing; returns as soon as the arrays are copied, so that the step may donate them.

        Args:
          meta: spec, config, versions; JSON-able.
          metrics: of this very state; empty where it was not evaluated.
        """
        self.wait()
        items = {name: getattr(state, name) for name in ITEMS}
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items() if jax.tree.leaves(tree)}
        record = log.plain({"format": FORMAT, "step": step, **meta})
        try:
            self._manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(record), **args), force=True)
        except Exception as error:
            raise self._failure(step, error) from error
        self.metrics[step] = dict(metrics)
        self._finisher = threading.Thread(target=self._finish, args=(step,), name="checkpoint-manifest")
        self._finisher.start()

    def annotate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics that became known after the save."""
        self.metrics[step] = dict(metrics)
        if jax.process_index() == 0:
            _write_manifest(self.path(step), _read_manifest(self.path(step))["files"], metrics)

    def wait(self) -> None:
        """Returns when the last save is on disk with its manifest; then removes what need not be kept.

        Raises:
          OSError: the save failed (a full disk, a lost bucket); the checkpoints before it stand.
        """
        if self._finisher is not None:
            self._finisher.join()
            self._finisher = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        last = sorted(self.metrics)[-self.keep :]
        for step in [s for s in self.metrics if s not in last and s != best_step(self.metrics, self.best)]:
            self._manager.delete(step)
            del self.metrics[step]

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state of one checkpoint, every array created in the sharding that `abstract` gives it.

        Args:
          abstract: `jax.ShapeDtypeStruct`s with shardings.

        Raises:
          InputError: a saved array is missing, superfluous, or of another shape, by name.
        """
        args = {}
        for name in ITEMS:
            tree = getattr(abstract, name)
            _same_tree(self.path(step) / name, tree, name)
            if jax.tree.leaves(tree):
                args[name] = ocp.args.StandardRestore(tree)
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        parts = {name: restored[name] if name in args else getattr(abstract, name) for name in ITEMS}
        return TrainState(step=mesh_lib.put(np.int32(step), abstract.step.sharding), **parts)

    def close(self) -> None:
        """Waits for the last save, and frees the threads."""
        try:
            self.wait()
        finally:
            # After a failed save orbax raises here again, what `wait` or `save` has already said.
            with contextlib.suppress(Exception):
                self._manager.close()
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _failure(self, step: int, error: Exception) -> OSError:
        reason = " ".join(str(error).split())
        return OSError(f"checkpoint {self.path(step)} could not be written: {reason}")

    def _finish(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            if jax.process_index() == 0:
                files = {name: _digest(self.path(step) / name) for name in _files(self.path(step))}
                _write_manifest(self.path(step), files, self.metrics[step])
            self.latest = step
        except Exception as error:
            self._error = self._failure(step, error)


def load_params(path: str | os.PathLike[str], which: str = "last", ema: bool = True) -> tuple[spec_lib.Spec, Any]:
    """Spec and parameters, on the host, knowing nothing about the run or the devices that wrote them.

    Args:
      path: a workdir, its `checkpoints` folder, or one step's folder.
      which: "last", or "best" by the metric of `config.checkpoint.best`. Ignored for a step's folder.
      ema: the moving average where the run has one, as evaluation uses it.

    Returns:
      `(spec, params)`; params is a nested dict of numpy arrays.

    Raises:
      InputError: no checkpoint, none that is whole, or `which` unknown. Damaged ones are skipped with a warning.
    """
    folder = _find(path, which)
    meta = _read_meta(folder)
    params = _read_arrays(folder / "params")
    if ema and (folder / "ema").exists():
        params = merge(params, _read_arrays(folder / "ema"))
    return spec_lib.from_dict(meta["spec"]), params


def load_meta(path: str | os.PathLike[str], which: str = "last") -> dict[str, Any]:
    """The JSON part of the checkpoint that `load_params` would read: step, spec, config, versions."""
    return _read_meta(_find(path, which))


def begun(workdir: str | os.PathLike[str]) -> spec_lib.Spec | None:
    """The spec of the run that a start in `workdir` goes on with; None where it begins anew.

    A resumed run has its parameters in the checkpoint, so what it was begun from need not exist any more.
    """
    root = log.absolute(workdir) / "checkpoints"
    if not os.fspath(workdir) or not root.exists():
        return None
    newest = next((path for _, path in _valid(root, set_aside=False)), None)
    return None if newest is None else spec_lib.from_dict(_read_meta(newest)["spec"])


def load_extra(path: str | os.PathLike[str], which: str = "last") -> Any:
    """The method state of the checkpoint that `load_params` would read; `{}` where the method has none."""
    folder = _find(path, which)
    return _read_arrays(folder / "extra") if (folder / "extra").exists() else {}


def best_step(metrics: Mapping[int, Mapping[str, float]], name: str) -> int | None:
    """The step with the best metric `name` (smallest for "...loss"), the later one of equals; None without any."""
    sign = -1.0 if name.endswith("loss") else 1.0
    known = [
        (sign * values[name], step) for step, values in metrics.items() if math.isfinite(values.get(name, math.nan))
    ]
    return max(known)[1] if known else None


def _find(path: str | os.PathLike[str], which: str) -> epath.Path:
    """Folder of the checkpoint that is meant, verified."""
    if which not in ("last", "best"):
        raise InputError(f"which must be 'last' or 'best', found {which!r}")
    folder = log.absolute(path)
    if (folder / "meta").exists() or (folder / MANIFEST).exists():
        if problem := damage(folder):
            raise InputError(f"checkpoint {folder} is damaged: {problem}")
        return folder
    root = folder / "checkpoints" if (folder / "checkpoints").exists() else folder
    if not root.exists() or not _steps(root):
        raise InputError(f"no checkpoint in {folder}, expected a workdir, its checkpoints folder or a step's")
    _unfinished(root)
    whole = _valid(root, set_aside=False)
    if which == "last":
        found = next(whole, None)
    else:
        known = dict(whole)
        name = _read_meta(known[max(known)])["config"]["checkpoint"]["best"] if known else ""
        step = best_step({s: _metrics(p) for s, p in known.items()}, name)
        if known and step is None:
            raise InputError(f"no checkpoint in {root} holds the metric {name!r} (config.checkpoint.best)")
        found = None if step is None else (step, known[step])
    if found is None:
        raise InputError(f"no whole checkpoint in {root}, found only damaged ones: {', '.join(map(str, _steps(root)))}")
    return found[1]


def _lock(folder: epath.Path) -> int | None:
    """An exclusive lock on a local folder: the descriptor that holds it."""
    if not log.is_local(folder):
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise BusyError(f"another run is at work in {folder.parent}; wait for it, or take another workdir") from None
    except OSError:  # a file system without locks
        pass
    return descriptor


def _steps(root: epath.Path) -> list[int]:
    return sorted((int(p.name) for p in _children(root) if p.name.isdigit()), reverse=True)


def _valid(root: epath.Path, set_aside: bool) -> Iterator[tuple[int, epath.Path]]:
    """Whole checkpoints, newest first. The others are named in a warning and, on request, renamed out of the way."""
    for step in _steps(root):
        path = root / str(step)
        problem = damage(path)
        if not problem:
            yield step, path
            continue
        logger.warning("checkpoint %s is skipped: %s", path, problem)
        if set_aside and not log.is_local(path) and not (path / MANIFEST).exists():
            path.rmtree()  # what a killed save left: an object store has neither temporary folders nor cheap renames
        elif set_aside:
            target = root / f"damaged-{step}"
            if target.exists():
                target.rmtree()
            path.rename(target)


def _children(folder: epath.Path) -> list[epath.Path]:
    """What a folder holds; an object store has no empty folders, so there one that was made need not exist."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _unfinished(root: epath.Path) -> list[epath.Path]:
    """Temporary folders that a killed save left behind, named in a warning."""
    paths = [p for p in _children(root) if ".orbax-checkpoint-tmp" in p.name]
    for path in paths:
        logger.warning("checkpoint %s is skipped: it was never finished", path)
    return paths


def _write_manifest(path: epath.Path, files: Mapping[str, str], metrics: Mapping[str, float]) -> None:
    content = log.plain({"format": FORMAT, "metrics": metrics, "files": files})
    log.write_json(path / MANIFEST, {**content, "sha256": _seal(content)})


def _read_manifest(path: epath.Path) -> dict[str, Any]:
    """Raises OSError or ValueError."""
    content = json.loads((path / MANIFEST).read_text())
    if not isinstance(content, dict) or content.pop("sha256", None) != _seal(content):
        raise ValueError("not what was written")
    return content


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def damage(path: epath.Path) -> str:
    """What is wrong with a checkpoint folder, by file name; "" where every byte is as it was written."""
    try:
        listed = _read_manifest(path)["files"]
    except FileNotFoundError:
        return "it was never finished (no manifest)"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} is not readable ({error})"
    for name, expected in listed.items():
        if not (path / name).exists():
            return f"{name} is missing"
        if _digest(path / name) != expected:
            return f"{name} is not what was written"
    return ""


def _files(path: epath.Path, prefix: str = "") -> list[str]:
    out: list[str] = []
    for child in sorted(path.iterdir(), key=lambda p: p.name):
        name = f"{prefix}{child.name}"
        out += _files(child, f"{name}/") if child.is_dir() else [name] if child.name != MANIFEST else []
    return out


def _digest(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
        if log.is_local(path):
            os.fsync(file.fileno())
    return digest.hexdigest()


def _metrics(path: epath.Path) -> dict[str, float]:
    """Metrics beside a checkpoint; none where its manifest cannot be read."""
    try:
        return _read_manifest(path)["metrics"]
    except (OSError, ValueError):
        return {}


def _read_meta(path: epath.Path) -> dict[str, Any]:
    return ocp.JsonCheckpointHandler().restore(path / "meta")


def _saved(path: epath.Path) -> Any:
    """Shapes and dtypes of one item."""
    return ocp.PyTreeCheckpointHandler().metadata(path).tree


def _read_arrays(path: epath.Path) -> Any:
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), _saved(path))
    return ocp.PyTreeCheckpointHandler().restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def _same_tree(path: epath.Path, tree: Any, item: str) -> None:
    want = {name: tuple(leaf.shape) for name, leaf in flatten(tree).items()}
    have = {name: tuple(leaf.shape) for name, leaf in flatten(_saved(path)).items()} if path.exists() else {}
    for name in sorted(want | have):
        if want.get(name) != have.get(name):
            raise InputError(
                f"checkpoint {path.parent} does not fit: {item}/{name} is {have.get(name, 'absent')} there, "
                f"expected {want.get(name, 'absent')}"
            )
