# SPDX-License-Identifier: Apache-2.0
"""Charts of a selection show what they were given, and refuse what they cannot show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vtjax.errors import InputError
from vtjax.viz import selection


def test_spectra_are_relative_to_the_first_pick_and_to_the_width() -> None:
    axes = selection.spectra([np.array([4.0, 2.0, 1.0]), np.array([2.0, 2.0, 0.0])], 2, "title").axes[0]
    lines = [line.get_xydata() for line in axes.lines]
    np.testing.assert_allclose(lines[0], [[0.5, 1.0], [1.0, 0.5], [1.5, 0.25]])
    np.testing.assert_allclose(lines[1][:2], [[0.5, 1.0], [1.0, 1.0]])
    assert np.isnan(lines[1][2, 1])  # nothing is left to add, which a logarithm cannot show


def test_kept_neurons_stand_by_their_length() -> None:
    axes = selection.kept([np.array([1.0, 3.0, 2.0, 0.5])], [np.array([1, 3])]).axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array().filled(np.nan), [[1.0, 0.0, 0.0, 1.0]])
    assert "50%" in [text.get_text() for text in axes.texts]  # of the two longest one is kept


def test_layers_of_other_widths_leave_their_row_empty() -> None:
    axes = selection.kept([np.ones(4), np.ones(2)], [np.array([0]), np.array([1])]).axes[0]
    sheet = axes.images[0].get_array()
    assert sheet.mask[1].tolist() == [False, False, True, True]


def test_growth_names_the_power() -> None:
    axes = selection.growth({"M": ([1, 2, 4], [1.0, 2.0, 8.0])}, {"M": 2, "N": 3}).axes[0]
    assert [text.get_text() for text in axes.texts] == ["M: grows like M^2.0"]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: selection.spectra([], 2), "norms must hold finite distances of at least one layer"),
        (lambda: selection.spectra([np.array([1.0, np.nan])], 2), "norms must hold finite distances"),
        (lambda: selection.kept([np.ones(3)], []), "picks must hold 1 layers, 1 or more, found 0"),
        (lambda: selection.kept([np.ones(3)], [np.array([3])]), r"picks\[0\] must be in 0..2"),
        (lambda: selection.growth({"M": ([1], [1.0])}, {}), "series must hold at least two sizes each"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw()
