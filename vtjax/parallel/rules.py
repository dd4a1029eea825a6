# SPDX-License-Identifier: Apache-2.0
"""Sharding as a table: an ordered list of (regex over the path, PartitionSpec); the first match counts.

The table speaks of parameter paths (`block_00/attn/query/kernel`). Patterns are searched, not anchored at the start, so
optimiser moments and averages (`opt/0/mu/block_00/attn/query/kernel`) are laid out like the parameters they mirror.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vtjax.errors import InputError
from vtjax.parallel.mesh import BATCH_AXES, axes_size

logger = logging.getLogger(__name__)

Rules = Sequence[tuple[str, P]]

# Kernels are [in, out]. Layers that widen are split by output over `tensor`, layers that narrow by input, so that a
# pair of them (query/key/value and out, up/gate and down) needs one reduction. The other dimension lies over `fsdp`,
# and over `context`, whose devices would hold the same otherwise.
_ALL = ("fsdp", "context")
DEFAULT: Rules = (
    (r"(^|/)(query|key|value|up|gate)/kernel$", P(_ALL, "tensor")),
    (r"(^|/)(query|key|value|up|gate)/bias$", P("tensor")),
    (r"(^|/)mlp/norm/(scale|bias)$", P("tensor")),
    (r"(^|/)(out|down)/kernel$", P("tensor", _ALL)),
    (r"(^|/)head(_distill)?/kernel$", P(_ALL, "tensor")),
    (r"(^|/)head(_distill)?/bias$", P("tensor")),
    (r"(^|/)embed/patch/kernel$", P(None, _ALL)),
    # By rows over both: split by columns over fsdp, a lookup would replicate what the batch splits over it.
    (r"(^|/)embed/tokens$", P(("tensor", *_ALL))),
    (r"(^|/)embed/(pos|registers)$", P(None, _ALL)),
    # An image looks up a row as large as itself, which would travel over whatever axis images lie along.
    (r"(^|/)embed/tile_pos$", P(None, None, None, "tensor")),
    (r"(^|/)tiles/table$", P(None, None, "tensor")),
    (r"(^|/)kernel$", P(_ALL)),
    (r"", P()),
)


def path_of(keys: Sequence[Any]) -> str:
    """`block_00/attn/query/kernel` from a pytree key path."""
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def shardings(tree: Any, mesh: Mesh | AbstractMesh, rules: Rules = DEFAULT) -> Any:
    """A NamedSharding for every leaf.

    A dimension that its mesh axes do not divide is split over the largest of them that does, or stays whole (logged,
    once per rule). So does an array with fewer dimensions than its rule names, such as a factored second moment.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s: parameters, or a whole train state.

    Raises:
      InputError: a rule names an axis that the mesh lacks, or no rule matches a path.
    """
    for pattern, spec in rules:
        for axis in _axes(spec):
            if axis not in mesh.shape:
                raise InputError(f"sharding rule {pattern!r} names the axis {axis!r}, expected {', '.join(mesh.shape)}")
    fallen: dict[str, list[str]] = {}

    def one(keys: Sequence[Any], leaf: Any) -> NamedSharding:
        path = path_of(keys)
        rule = next(((pattern, spec) for pattern, spec in rules if re.search(pattern, path)), None)
        if rule is None:
            raise InputError(f"no sharding rule matches {path!r}, expected a last rule that matches everything")
        spec, dropped = _fit(rule[1], leaf.shape, mesh)
        if dropped:
            fallen.setdefault(rule[0], []).append(f"{path} {tuple(leaf.shape)}")
        return NamedSharding(mesh, spec)

    out = jax.tree_util.tree_map_with_path(one, tree)
    for pattern, paths in fallen.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        logger.warning(
            "sharding rule %r does not divide %s%s over %s: less split", pattern, paths[0], more, dict(mesh.shape)
        )
    return out


def constrain(x: jax.Array) -> jax.Array:
    """`x` with its first dimension pinned to the batch axes of the ambient mesh (`jax.set_mesh`), and the rows of
    `[B, N, D]` to its context axis.

    Without it the partitioner may replicate activations. The identity where there is no mesh, inside a `shard_map` over
    the batch axes, and where the batch does not divide; rows that do not divide are left open.
    """
    mesh = ambient(BATCH_AXES)
    if mesh is None or x.ndim == 0 or x.shape[0] % axes_size(mesh, BATCH_AXES):
        return x
    free: list[Any] = [P.UNCONSTRAINED] * (x.ndim - 1)
    devices = mesh.shape.get("context", 1)
    if x.ndim == 3 and devices > 1 and x.shape[1] % devices == 0 and ambient((*BATCH_AXES, "context")) is not None:
        free[0] = "context"
    return jax.lax.with_sharding_constraint(x, P(BATCH_AXES, *free))


def ambient(axes: Sequence[str]) -> Any:
    """The ambient mesh where the partitioner has all of these axes in its hands; else None."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh if all(types.get(axis) == AxisType.Auto for axis in axes) else None


def _axes(spec: P) -> list[str]:
    return [axis for entry in spec if entry is not None for axis in (entry if isinstance(entry, tuple) else (entry,))]


def _fit(spec: P, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> tuple[P, bool]:
    """The part of `spec` that `shape` allows, and whether a dimension had to stay whole for want of divisibility."""
    if len(spec) > len(shape):
        return P(), False
    wanted = [_present(entry, mesh) for entry in spec]
    entries = [_dividing(size, entry, mesh) for size, entry in zip(shape, wanted, strict=False)]
    return P(*entries), entries != wanted


def _present(entry: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Of several axes those that have devices, or the first."""
    if not isinstance(entry, tuple):
        return entry
    axes = tuple(axis for axis in entry if mesh.shape[axis] > 1) or entry[:1]
    return axes if len(axes) > 1 else axes[0]


def _dividing(size: int, entry: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The entry where its axes divide `size`; of several axes else the largest one that does; else None."""
    axes = entry if isinstance(entry, tuple) else (entry,)
    if entry is None or size % axes_size(mesh, axes) == 0:
        return entry
    fitting = [axis for axis in axes if size % mesh.shape[axis] == 0 and mesh.shape[axis] > 1]
    return max(fitting, key=lambda axis: mesh.shape[axis]) if len(axes) > 1 and fitting else None
