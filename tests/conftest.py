# SPDX-License-Identifier: Apache-2.0
"""One machine for all tests: one CPU device, checked shapes, a throw-away cache, no network.

Child processes inherit the environment set here, not the shape checks nor the socket guard.
"""

from __future__ import annotations

import atexit
import gc
import ipaddress
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little: LLVM at -O0 halves their time, and leaves XLA's own passes as they are; fusions
# emitted without MLIR, and one module instead of up to 32, halve it again.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "agg"

_cache = tempfile.mkdtemp(prefix="vtjax-tests-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ["VTJAX_CACHE"] = _cache

# Tests build the same programs again and again, in this process, its workers and its children: they share compilations.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(_cache, "compilations")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

_folders = os.environ.get("VTJAX_DATA", str(ROOT / "data")).split(os.pathsep)
_shared = str(ROOT.parent / "shared" / "data")
if os.path.isdir(_shared) and _shared not in _folders:
    _folders.append(_shared)
os.environ["VTJAX_DATA"] = os.pathsep.join(_folders)

# Tracing makes many objects and little that goes in circles: 700 new ones are no reason to look for it.
gc.set_threshold(50_000, 20, 20)

if any(name.split(".")[0] == "vtjax" for name in sys.modules):
    raise RuntimeError("vtjax was imported before its shape checks were installed")

from jaxtyping import install_import_hook  # noqa: E402

import tests.typecheck  # noqa: E402, F401  (the hook looks it up by name)

install_import_hook("vtjax", "tests.typecheck.check")


class NetworkError(AssertionError):
    """A test tried to leave the machine."""


def _local(family: int, address: Any) -> bool:
    if family not in (socket.AF_INET, socket.AF_INET6):
        return True
    host = address[0]
    if host in ("", "localhost"):
        return True
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return host == socket.gethostname()
    return ip.is_loopback or ip.is_unspecified


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(self: socket.socket, address: Any) -> Any:
        if not _local(self.family, address):
            raise NetworkError(f"a test tried to connect to {address!r}; tests use no network")
        return method(self, address)

    return guarded


socket.socket.connect = _guarded(socket.socket.connect)  # type: ignore[method-assign]
socket.socket.connect_ex = _guarded(socket.socket.connect_ex)  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """`shared_data(name)`: the path of a data file along VTJAX_DATA; skips the test where it is missing."""
    from vtjax import paths

    def find(name: str) -> Path:
        found = paths.find(name)
        if found is None:
            pytest.skip(f"needs the data file {name!r}, which is not on VTJAX_DATA ({os.environ['VTJAX_DATA']})")
        return found

    return find
