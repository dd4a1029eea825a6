# SPDX-License-Identifier: Apache-2.0
"""What the tests of all runners share. A test module says which one it is about: `METHOD = "ltmp"`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conformance import __main__ as conformance
from vtjax import paths

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def file(request):
    """The recorded file: along VTJAX_DATA, else where the workplace keeps it."""
    name = f"{request.module.METHOD}.npz"
    found = paths.find(name) or ROOT.parent / "shared" / "vectors" / name
    if not found.exists():
        pytest.skip(f"needs the recorded arrays {name}, which are neither on VTJAX_DATA nor at {found}")
    return found


@pytest.fixture(scope="module")
def whole(file):
    """The arrays of the recorded file."""
    return read(file)


@pytest.fixture(scope="module")
def recorded(request):
    """Those of them that lie in tests/oracle; all, where none do."""
    path = ROOT / "tests" / "oracle" / f"{request.module.METHOD}.npz"
    return read(path if path.exists() else request.getfixturevalue("file"))


def read(path):
    """All arrays of a file by name."""
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.fixture
def replay(request, tmp_path, monkeypatch, capsys):
    """`replay(arrays or path)` -> (exit code, the line of JSON)."""

    def run(arrays):
        path = arrays
        if isinstance(arrays, dict):
            path = tmp_path / "arrays.npz"
            np.savez(path, **arrays)
        monkeypatch.setattr(sys, "argv", ["conformance", request.module.METHOD, str(path)])
        code = conformance.main()
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    return run
