# SPDX-License-Identifier: Apache-2.0
"""The device mesh, and how host batches become global arrays on it.

Three axes: `data` (batch only), `fsdp` (batch and parameters), `tensor` (the widths inside a layer). The batch is split
over `(data, fsdp)`. Axis types are `Auto`: the partitioner fills in what the rules leave open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vtjax.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make(config: Any, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over all devices of all processes (or over `devices`).

    Args:
      config: size per axis, a dict or ConfigDict as `{"data": -1, "fsdp": 1, "tensor": 1}`; one axis may be -1, "all
        the rest". Absent axes have size 1.

    Raises:
      InputError: an unknown axis, a size that is neither positive nor -1, two axes of -1, or a product that is not the
        number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    for name in config:
        if name not in AXES:
            raise InputError(f"mesh has no axis {name!r}, expected {', '.join(AXES)}")
    sizes = {name: int(config.get(name, 1)) for name in AXES}
    asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise InputError(f"mesh sizes must be positive, with at most one -1 (all the rest), found {asked}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values() and len(devices) % fixed == 0:
        sizes = {name: len(devices) // fixed if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise InputError(f"mesh {asked} does not fit {len(devices)} devices, expected that many as product")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Number of parts that the batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First dimension over `(data, fsdp)`, the others whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays from this process's rows of a batch.

    Args:
      batch: host arrays `[b, ...]`, the contiguous rows `p * b .. (p + 1) * b` of process p. int64 becomes int32
        (indices; JAX runs without 64-bit types).

    Returns:
      Arrays `[b * processes, ...]`, split over `(data, fsdp)`.

    Raises:
      InputError: the global batch does not divide over the mesh, or the arrays differ in their number of rows.
    """
    sharding, shards = batch_sharding(mesh), batch_shards(mesh)
    rows = {name: np.shape(value)[0] for name, value in batch.items()}
    if len(set(rows.values())) != 1:
        raise InputError(f"the arrays of a batch must have equally many rows, found {rows}")
    total = next(iter(rows.values())) * jax.process_count()
    if total % shards:
        raise InputError(f"a batch of {total} does not divide over data x fsdp = {shards} devices")

    def put(value: Any) -> jax.Array:
        local = np.asarray(value)
        local = local.astype(np.int32) if local.dtype == np.int64 else local
        return jax.make_array_from_process_local_data(sharding, local, (total, *local.shape[1:]))

    return {name: put(value) for name, value in batch.items()}
