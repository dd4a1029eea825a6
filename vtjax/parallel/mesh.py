# SPDX-License-Identifier: Apache-2.0
"""The device mesh, and how host batches become global arrays on it.

Four axes: `data` (batch only), `fsdp` (batch and parameters), `context` (frames and rows of one sample, and
parameters), `tensor` (the widths inside a layer). The batch is split over `(data, fsdp)`. Axis types are `Auto`: the
partitioner fills in what the rules leave open. Where the devices lie in several slices, joined by a data centre
network, the data axis spans the slices and the others stay within one; unless there is a fifth axis, `slice`, over
which the frames of one sample lie before they lie over `context`: for videos that one slice does not hold.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vtjax.errors import InputError

AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")
DEFAULT = {"data": -1, "fsdp": 1, "context": 1, "tensor": 1}
"""All devices along the batch."""
WITH_SLICES = ("data", "fsdp", "slice", "context", "tensor")
"""The axes of a mesh whose `slice` is larger than 1; other meshes do without it."""


def make(config: Any, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over all devices of all processes (or over `devices`).

    Args:
      config: size per axis, a dict or ConfigDict as `DEFAULT`; one axis, not `slice`, may be -1, "all the rest".
        Absent axes have size 1. On devices of one slice `slice` splits it as if it were several.

    Raises:
      InputError: an unknown axis, a size that is neither positive nor -1, two axes of -1, a product that is not the
        number of devices, or a data axis (with `slice`: both) that does not divide over the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    for name in config:
        if name not in WITH_SLICES:
            raise InputError(f"mesh has no axis {name!r}, expected {', '.join(AXES)}, slice")
    if (over := int(config.get("slice", 1))) < 1:
        raise InputError(f"config.mesh.slice must be 1 or more, found {over}")
    axes = WITH_SLICES if over > 1 else AXES
    sizes = {name: int(config.get(name, 1)) for name in axes}
    asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise InputError(f"mesh sizes must be positive, with at most one -1 (all the rest), found {asked}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values() and len(devices) % fixed == 0:
        sizes = {name: len(devices) // fixed if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise InputError(
            f"mesh {asked} does not fit {len(devices)} devices, expected that many as product"
            + (f", so a multiple of {fixed} with -1" if -1 in sizes.values() else "")
        )
    slices = len({slice_of(device) for device in devices})
    if over > 1 and slices % over and slices > 1:
        raise InputError(f"config.mesh.slice must divide the {slices} slices, found {over}")
    outer = {**dict.fromkeys(axes, 1), "data": slices}
    if over > 1 and slices > 1:
        outer |= {"slice": over, "data": slices // over}
    if sizes["data"] % outer["data"]:
        several = f"the {outer['data']} slices" + (f" beside config.mesh.slice={over}" if over > 1 else "")
        raise InputError(f"config.mesh.data must be a multiple of {several}, found {sizes['data']}")
    # An axis may take part of a dimension of the torus: tensor=2 has to be possible on 4 x 4 x 4 chips.
    free = {"allow_split_physical_axes": True}
    try:
        if slices == 1:
            grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, **free)
        else:
            inner = {name: size // outer[name] for name, size in sizes.items()}
            grid = mesh_utils.create_hybrid_device_mesh(tuple(inner.values()), tuple(outer.values()), devices, **free)
    except (NotImplementedError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"mesh {asked} cannot be laid over these {len(devices)} devices: {reason}") from None
    return Mesh(grid, axes, axis_types=(AxisType.Auto,) * len(axes))


def slice_of(device: jax.Device) -> int:
    """Index of the slice (TPU chips with a fast network of their own) that a device lies in; 0 where there is one."""
    return (getattr(device, "slice_index", None) or 0) if device.platform == "tpu" else 0


def axes_size(mesh: Any, axes: Sequence[str]) -> int:
    """Devices along these axes."""
    return math.prod(mesh.shape[axis] for axis in axes)


def frame_axes(mesh: Any) -> tuple[str, ...]:
    """Over which the frames of one sample lie: `context`, and before it `slice` where the mesh has it."""
    return tuple(axis for axis in ("slice", "context") if axis in mesh.shape)


def batch_shards(mesh: Mesh) -> int:
    """Number of parts that the batch is split into."""
    return axes_size(mesh, BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First dimension over `(data, fsdp)`, the others whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def frame_sharding(mesh: Mesh) -> NamedSharding:
    """`[B, F, ...]`: samples over `(data, fsdp)`, the frames of each over `frame_axes`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, frame_axes(mesh)))


def device_sharding(mesh: Mesh) -> NamedSharding:
    """First dimension over all devices, one entry each."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put(value: Any, sharding: NamedSharding) -> jax.Array:
    """A host array on the devices, every process its own part. Nothing is sent between processes or compared."""
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Rows of a global batch that this process's devices hold, ascending. Processes that share rows (where the tensor
    axis spans them, or the batch has fewer parts than there are processes) each hold them all.

    Raises:
      InputError: the batch does not divide over the mesh.
    """
    return list(_positions(mesh, batch_size))


def local_frames(mesh: Mesh, frames: int) -> list[int]:
    """Places, of F = `frames` that divide over `frame_axes`, that this process's devices hold of a row, ascending."""
    each = frames // axes_size(mesh, frame_axes(mesh))
    return [place for index in _contexts(mesh) for place in range(index * each, (index + 1) * each)]


@functools.lru_cache(maxsize=8)
def _contexts(mesh: Mesh) -> tuple[int, ...]:
    """Positions along the frames, slice by slice, at which this process has a device."""
    here, axes = jax.process_index(), frame_axes(mesh)
    places = np.argwhere([[device.process_index == here] for device in mesh.devices.flat])[:, 0]
    along = dict(zip(mesh.axis_names, np.unravel_index(places, mesh.devices.shape), strict=True))
    found = np.ravel_multi_index([along[axis] for axis in axes], [mesh.shape[axis] for axis in axes])
    return tuple(sorted(set(found.tolist())))


@functools.lru_cache(maxsize=8)
def _positions(mesh: Mesh, batch_size: int) -> dict[int, int]:
    """Where this process holds which row of a global batch, in their order; asked for with every batch."""
    if batch_size % (shards := batch_shards(mesh)):
        raise InputError(f"a batch of {batch_size} does not divide over data x fsdp = {shards} devices")
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    rows = {row for place in places if place for row in range(*place[0].indices(batch_size))}
    return {row: position for position, row in enumerate(sorted(rows))}


def place(
    batch: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int | None = None, frames: Collection[str] = ()
) -> dict[str, jax.Array]:
    """Global arrays from this process's rows of a batch.

    Args:
      batch: host arrays `[b, ...]`, the rows `local_rows(mesh, batch_size)`. int64 becomes int32 (indices; JAX runs
        without 64-bit types).
      batch_size: rows of the global batch; None = those of all processes together, each row held by one.
      frames: names of arrays `[b, f, ...]` that hold frames of every row: of F in all the places
        `local_frames(mesh, F)`, so all of them where one process has whole samples.

    Returns:
      Arrays `[batch_size, ...]`, split over `(data, fsdp)`; those of frames, `[batch_size, F, ...]`, over `frame_axes`.

    Raises:
      InputError: the global batch or the frames do not divide over the mesh, or the arrays differ in their number of
        rows.
    """
    rows = {name: np.shape(value)[0] for name, value in batch.items()}
    if len(set(rows.values())) != 1:
        raise InputError(f"the arrays of a batch must have equally many rows, found {rows}")
    found = next(iter(rows.values()))
    total = found * jax.process_count() if batch_size is None else batch_size
    where = _positions(mesh, total)
    if len(where) != found:
        raise InputError(f"a batch of {total} has {len(where)} rows on this process, found {found}")

    def global_array(name: str, value: Any) -> jax.Array:
        local = np.asarray(value)
        local = local.astype(np.int32) if local.dtype == np.int64 else local
        shape, sharding = (total, *local.shape[1:]), batch_sharding(mesh)
        held, each = _contexts(mesh), 0
        if name in frames:
            each = _share(name, local.shape[1], held, mesh)
            many = each * axes_size(mesh, frame_axes(mesh))
            shape, sharding = (total, many, *local.shape[2:]), frame_sharding(mesh)

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(total)  # neighbours in the batch are neighbours here
            rows = local[where[start] : where[start] + stop - start]
            if name in frames:
                at = held.index(index[1].indices(shape[1])[0] // each) * each
                return rows[:, at : at + each]
            return rows[(slice(None), *index[1:])]

        return jax.make_array_from_callback(shape, sharding, part)

    return {name: global_array(name, value) for name, value in batch.items()}


def _share(name: str, count: int, held: tuple[int, ...], mesh: Mesh) -> int:
    """Frames of a row on each device, where this process has `count` of them at the positions `held`."""
    if count % len(held) or not count:
        axes = frame_axes(mesh)
        sizes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
        whole = len(held) == axes_size(mesh, axes)
        part = "" if whole else f" (of which {len(held)} positions are this process's)"
        raise InputError(f"{name} must hold a multiple of the mesh's {sizes} frames{part}, found {count}")
    return count // len(held)
