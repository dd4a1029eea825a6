# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vtjax.errors import InputError
from vtjax.viz import curves, questions

SAMPLES = {
    name: [(np.full((8, 8, 3), 40 * i, np.uint8), "what is on the other side of it, if there is one?", "nothing")] * 2
    for i, name in enumerate(("coarse", "fine"))
}


def test_a_sheet_says_all_of_it(tmp_path: Path) -> None:
    figure = questions.sheet(SAMPLES, "some questions")
    said = [text.get_text().replace("\n", " ") for axes in figure.axes for text in axes.texts]
    assert said.count("what is on the other side of it, if there is one?") == said.count("nothing") == 4
    assert [axes.get_ylabel() for axes in figure.axes] == ["coarse", "", "fine", ""]
    with Image.open(curves.save(figure, tmp_path / "sheet.png", dpi=50)) as image:
        assert min(image.size) > 100


@pytest.mark.parametrize("samples", [{}, {"a": []}, {"a": SAMPLES["fine"], "b": SAMPLES["fine"][:1]}])
def test_sheets_that_cannot_be_drawn(samples: dict) -> None:
    with pytest.raises(InputError, match="equally many of each type, at least one"):
        questions.sheet(samples)


def test_where_an_answer_looked_is_lit(tmp_path: Path) -> None:
    image, weights = np.full((8, 8, 3), 200, np.uint8), np.array([[0.0, 0.5], [0.25, 0.0]])
    figure = questions.looks([(image, "what is it?", "nothing", weights)] * 2, "looks")
    above, below = figure.axes[0].images[0].get_array(), figure.axes[1].images[0].get_array()
    assert (above == 200).all()
    assert below[0, 4, 0] == pytest.approx(200 / 255) and below[7, 7, 0] == pytest.approx(0.12 * 200 / 255)
    assert below[0, 0, 0] < below[4, 0, 0] < below[0, 4, 0]
    assert [text.get_text() for text in figure.axes[1].texts] == ["what is it?", "nothing"]
    curves.save(figure, tmp_path / "looks.png", dpi=50)
    with pytest.raises(InputError, match="at least one image, found none"):
        questions.looks([])
