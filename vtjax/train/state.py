# SPDX-License-Identifier: Apache-2.0
"""The train state, the split of its parameters into trained and untrained, and the hash of a parameter tree."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import numpy as np
from jax.experimental import multihost_utils

from vtjax.parallel.rules import path_of


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes, and that a checkpoint holds.

    Attributes:
      step: int32 scalar array, finished steps.
      params: the whole model, trained and untrained.
      opt: optimiser state of the trained part only.
      ema: moving average of the trained part, or `{}`.
      extra: the method's own state.
    """

    step: Any
    params: Any
    opt: Any
    ema: Any
    extra: Any


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by path, sorted by path."""
    return dict(sorted((path_of(keys), leaf) for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]))


def split(params: Any, groups: Mapping[str, str | None]) -> tuple[Any, Any]:
    """(trained, untrained) nested dicts: where `groups[path]` names a group, and where it is None."""

    def pick(tree: Any, trained: bool, prefix: str) -> Any:
        out = {}
        for name, child in tree.items():
            path = f"{prefix}{name}"
            if isinstance(child, Mapping):
                if inner := pick(child, trained, f"{path}/"):
                    out[name] = inner
            elif (groups[path] is not None) == trained:
                out[name] = child
        return out

    return pick(params, True, ""), pick(params, False, "")


def merge(base: Any, over: Any) -> Any:
    """Nested dicts joined; `over` wins. The inverse of `split`."""
    out = dict(base)
    for name, child in over.items():
        out[name] = merge(out[name], child) if isinstance(child, Mapping) and name in out else child
    return out


def prune(tree: Any) -> Any:
    """The nested dict without empty dicts, as plain dicts."""
    out = {name: prune(child) if isinstance(child, Mapping) else child for name, child in tree.items()}
    return {name: child for name, child in out.items() if not (isinstance(child, Mapping) and not child)}


def params_sha256(params: Any) -> str:
    """Hash over sorted names, shapes, dtypes and bytes; the same for numpy and device arrays, on any sharding.

    In a run with several processes all of them must call it.
    """
    digest = hashlib.sha256()
    for path, leaf in flatten(params).items():
        value = _on_host(leaf)
        digest.update(f"{path} {value.shape} {value.dtype}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def host_copy(params: Any) -> Any:
    """The tree as numpy arrays, whole on every process. In a run with several processes all of them must call it."""
    return jax.tree.map(_on_host, params)


def _on_host(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)
