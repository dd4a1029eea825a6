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
