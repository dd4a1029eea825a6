# SPDX-License-Identifier: Apache-2.0
"""Tiles against those of transformers' image processor, recorded by tests/oracle/record_tiles.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vtjax.data import tiles
from vtjax.spec.tiled import aspect_ratios

with np.load(Path(__file__).with_name("oracle_tiles.npz")) as _file:
    ORACLE = {name: _file[name] for name in _file.files}
MEAN, STD = (tuple(row) for row in ORACLE["mean_std"].tolist())
CANVASES = aspect_ratios(4)
NAMES = [name.partition(":")[2] for name in ORACLE if name.startswith("source:")]


def test_canvases_and_sizes_are_those_of_transformers() -> None:
    assert CANVASES == ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))
    for height, width, rows, columns, *new in ORACLE["sizes"].tolist():
        number = tiles.canvas((height, width), (560, 560), CANVASES)
        assert CANVASES[number - 1] == (rows, columns), (height, width)
        assert tiles.fitted((height, width), (rows * 560, columns * 560), (560, 560)) == tuple(new), (height, width)


@pytest.mark.parametrize("name", NAMES)
def test_pixels_are_those_of_transformers(name: str) -> None:
    """Equal bytes: both resize with Pillow."""
    expected = ORACLE[f"pixels:{name}"]
    made = tiles.cut(ORACLE[f"source:{name}"], (12, 12), CANVASES, MEAN, STD)
    assert made.aspect_ratio == ORACLE["ratio"][NAMES.index(name)] and made.tiles.shape == (4, 12, 12, 3)
    found = np.round((made.tiles[: len(expected)] * STD + MEAN) * 255)
    np.testing.assert_array_equal(found, expected)
    assert not made.tiles[len(expected) :].any()


def test_normalisation_is_that_of_transformers() -> None:
    made = tiles.cut(ORACLE["source:small"], (12, 12), CANVASES, MEAN, STD)
    np.testing.assert_allclose(made.tiles, ORACLE["normalised"], atol=1e-6)
