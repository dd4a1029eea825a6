# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from vtjax.errors import InputError
from vtjax.parallel import mesh as mesh_lib


def test_one_device_by_default_and_axes_are_auto() -> None:
    mesh = mesh_lib.make(mesh_lib.DEFAULT)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_one_slice_is_no_axis() -> None:
    mesh = mesh_lib.make({"slice": 1})
    assert mesh.axis_names == mesh_lib.AXES and mesh_lib.frame_axes(mesh) == ("context",)


def test_absent_axes_have_size_one() -> None:
    assert dict(mesh_lib.make({"fsdp": -1}).shape) == {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"data": 3}, "mesh data=3, fsdp=1, context=1, tensor=1 does not fit 1 devices, expected that many as product"),
        ({"data": -1, "fsdp": 2}, "mesh data=-1, fsdp=2, context=1, tensor=1 does not fit 1 devices"),
        ({"data": -1, "tensor": -1}, "with at most one -1 (all the rest), found data=-1, fsdp=1, context=1, tensor=-1"),
        ({"context": 2}, "mesh data=1, fsdp=1, context=2, tensor=1 does not fit 1 devices"),
        ({"data": 0}, "mesh sizes must be positive"),
        ({"data": -2}, "mesh sizes must be positive"),
        ({"model": 2}, "mesh has no axis 'model', expected data, fsdp, context, tensor, slice"),
        ({"slice": 2}, "mesh data=1, fsdp=1, slice=2, context=1, tensor=1 does not fit 1 devices"),
        ({"slice": -1}, "config.mesh.slice must be 1 or more, found -1"),
    ],
)
def test_bad_meshes_say_so_in_one_line(config: dict[str, int], message: str) -> None:
    with pytest.raises(InputError) as caught:
        mesh_lib.make(config)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_place_keeps_values_and_narrows_indices() -> None:
    mesh = mesh_lib.make({"data": -1})
    batch = {
        "image": np.arange(6, dtype=np.float32).reshape(2, 3),
        "index": np.array([5, 7]),
        "valid": np.ones(2, bool),
    }
    placed = mesh_lib.place(batch, mesh)
    assert {name: value.dtype for name, value in placed.items()} == {
        "image": "float32",
        "index": "int32",
        "valid": "bool",
    }
    for name, value in batch.items():
        np.testing.assert_array_equal(placed[name], value)
        assert placed[name].sharding == mesh_lib.batch_sharding(mesh)


def test_place_refuses_ragged_batches() -> None:
    with pytest.raises(InputError, match="equally many rows, found .'a': 2, 'b': 3."):
        mesh_lib.place({"a": np.zeros(2), "b": np.zeros(3)}, mesh_lib.make({"data": -1}))


def test_devices_may_be_given() -> None:
    mesh = mesh_lib.make({"data": -1}, jax.devices()[:1])
    assert mesh.devices.size == 1 and mesh_lib.batch_shards(mesh) == 1
