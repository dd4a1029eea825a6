# SPDX-License-Identifier: Apache-2.0
"""Which form of `partial_softmax.forward` and `backward` a device runs: chunks, or kernels made for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from vtjax.ops import partial_softmax, partial_softmax_gpu, partial_softmax_tpu

KERNELS = ("chunked", "tpu", "gpu")
_MODULES = {"tpu": partial_softmax_tpu, "gpu": partial_softmax_gpu}


def choose(kernel: str, mesh: Mesh | AbstractMesh, dtype: Any) -> str:
    """One of `KERNELS`; "auto" takes that of the platform of the mesh's devices, described ones included, and chunks
    for CPUs and for an abstract mesh of no known devices. What a kernel has no dtype for is done in chunks.

    Raises:
      ValueError: an unknown name.
    """
    if kernel not in ("auto", *KERNELS):
        raise ValueError(f"kernel must be one of auto, {', '.join(KERNELS)}, found {kernel!r}")
    if kernel == "auto":
        kernel = _platform(mesh)
    return kernel if kernel in _MODULES and dtype in _MODULES[kernel].DTYPES else "chunked"


def interpreted(kernel: str, mesh: Mesh | AbstractMesh) -> bool:
    """Whether it is a kernel of another device on CPUs, which is for tests. JAX interprets none under
    `shard_map(check_vma=True)`."""
    return kernel != "chunked" and _platform(mesh) == "cpu"


def local(kernel: str, mesh: Mesh | AbstractMesh) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`forward` and `backward`."""
    if kernel == "chunked":
        return partial_softmax.forward, partial_softmax.backward
    module, interpret = _MODULES[kernel], interpreted(kernel, mesh)
    return (
        functools.partial(module.forward, interpret=interpret),
        functools.partial(module.backward, interpret=interpret),
    )


def _platform(mesh: Mesh | AbstractMesh) -> str:
    """Such as "tpu", "gpu" or "cpu"; "" for an abstract mesh of no known devices."""
    device = mesh.abstract_mesh.abstract_device
    name = "" if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name
