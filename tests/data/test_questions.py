# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vtjax.data import marked_shapes, prepared, question_sets, sources
from vtjax.data.questions import Cached, Questions, baselines, open_questions
from vtjax.errors import InputError, MissingExtraError

needs_easy_vqa = pytest.mark.skipif(
    importlib.util.find_spec("easy_vqa") is None, reason="needs the package 'easy-vqa' (pip install 'vtjax[vqa]')"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and nothing of this machine on the search path."""
    monkeypatch.setenv("VTJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VTJAX_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "cache"


def columns(*rows: tuple[str, str, str, int]) -> Questions:
    """Questions from (text, answer, type, image)."""
    answers, types = ("no", "one", "two", "yes"), ("count", "exists")
    return Questions(
        images=[np.full((4, 4, 3), i, np.uint8) for i in range(1 + max(r[3] for r in rows))],  # type: ignore[arg-type]
        texts=tuple(r[0] for r in rows),
        image=np.array([r[3] for r in rows], np.int32),
        answer=np.array([answers.index(r[1]) for r in rows], np.int32),
        type=np.array([types.index(r[2]) for r in rows], np.int32),
        answers=answers,
        types=types,
    )


def refused(*args: Any, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        open_questions(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- easy-VQA


def package(split: str) -> Questions:
    """easy-VQA as its package has it, without the images."""
    records = list(question_sets.easy_vqa_records(split))
    rows = [(q, number) for number, record in enumerate(records) for q in record["questions"]]
    answers = tuple(sorted({q["answer"] for q, _ in rows}))
    types = question_sets.EASY_VQA_TYPES
    return Questions(
        images=[np.zeros((1, 1, 3), np.uint8)] * len(records),  # type: ignore[arg-type]
        texts=tuple(q["text"] for q, _ in rows),
        image=np.array([number for _, number in rows], np.int32),
        answer=np.array([answers.index(q["answer"]) for q, _ in rows], np.int32),
        type=np.array([types.index(q["type"]) for q, _ in rows], np.int32),
        answers=answers,
        types=types,
    )


@needs_easy_vqa
def test_easy_vqa_and_what_answering_blindly_reaches() -> None:
    train, test = package("train"), package("test")
    assert (len(train.images), len(train), len(test.images), len(test)) == (4000, 38575, 1000, 9673)
    assert len(train.answers) == 13 and train.answers == test.answers
    blind = baselines(train, test)
    assert (blind["majority_answer"], blind["questions"]) == ("yes", 9673)
    assert f"{blind['majority']:.3f} {blind['per_text']:.3f}" == "0.373 0.670"
    assert sum(found["questions"] for found in blind["types"].values()) == 9673
    yes_or_no = {train.answers[a] for a in train.answer[np.isin(train.type, (2, 3))]}
    assert yes_or_no == {"yes", "no"} and np.isin(train.type, (2, 3)).sum() == 28407
    assert len({train.answers[a] for a in train.answer[train.type == 0]}) == 8  # colours
    assert {train.answers[a] for a in train.answer[train.type == 1]} == {"circle", "rectangle", "triangle"}


@pytest.mark.parametrize(
    ("text", "type"),
    [
        ("what color is the shape?", "color"),
        ("what is the color of the triangle?", "color"),
        ("what is the blue shape?", "shape"),
        ("what shape does the image contain?", "shape"),
        ("is a teal shape present?", "exists"),
        ("is no teal shape present?", "absent"),
        ("does the image not contain a circle?", "absent"),
    ],
)
def test_types_of_easy_vqa(text: str, type: str) -> None:
    assert question_sets.easy_vqa_type(text) == type


@pytest.mark.slow
@needs_easy_vqa
def test_easy_vqa_prepared_is_its_package(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "test"):
        found, expected = open_questions("easy_vqa", split), package(split)
        assert (found.texts, found.answers, found.types) == (expected.texts, expected.answers, expected.types)
        for name in ("image", "answer", "type"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        record = list(question_sets.easy_vqa_records(split))[17]
        image = sources.decode(Path(record["image"]).read_bytes(), "")
        np.testing.assert_array_equal(found.images[17], image)
    question_sets._easy_vqa_builder.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert len(open_questions("easy_vqa", "test[:3]").images) == 3  # the prepared set needs no package


def test_easy_vqa_that_is_missing_or_damaged(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question_sets._easy_vqa_builder.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(question_sets.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(MissingExtraError, match=r"data 'easy_vqa' needs .* pip install 'vtjax\[vqa\]'"):
            open_questions("easy_vqa", "train")
    monkeypatch.setattr(question_sets, "_easy_vqa_folder", lambda: tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(InputError, match=r"package easy_vqa cannot be read \(.*questions.json"):
        next(question_sets.easy_vqa_records("train"))
    (tmp_path / "train" / "questions.json").write_text('[["is it?", "yes", 0]]')
    with pytest.raises(InputError, match="must ask about 4000 images in 'train', found 1; install version 1.0"):
        next(question_sets.easy_vqa_records("train"))


# --- marked shapes


def test_marked_shapes_are_balanced_also_given_the_text() -> None:
    count = 96  # whole cycles of every form
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(count):
        made = marked_shapes.scene("train", index, 0)
        asked = [marked_shapes.ask(made, *about) for about in marked_shapes._asked("train", index, 0)]
        assert Counter(q.type for q in asked) == {"coarse": 3, "object": 3, "relation": 2, "fine": 4, "list": 3}
        assert len({q.text for q in asked}) == len(asked) == marked_shapes.QUESTIONS
        for q in asked:
            given[q.text][q.answer] += 1
    for text, found in given.items():
        form, about = next(
            (name, f)
            for name, f in marked_shapes.FORMS.items()
            if re.fullmatch(f.text.replace("{}", r"\w+")[:-1] + r"\?", text)
        )
        assert set(found) <= set(about.answers), text
        if about.type in ("coarse", "fine"):
            assert len({*found.values()}) == 1 and set(found) == set(about.answers), (text, found)
        # A wish that contradicts another one is given up: rare.
        elif about.type == "object":
            share = count * marked_shapes.TIMES[form] / marked_shapes.OBJECTS / len(about.answers)
            assert max(abs(n - share) for n in found.values()) <= share / 3, (text, found)
    for answers in (marked_shapes.SIDES, marked_shapes.HEIGHTS):
        found = sum((n for text, n in given.items() if f"{answers[0]} or {answers[1]}" in text), Counter())
        assert abs(found[answers[0]] - found[answers[1]]) <= 8, found


def test_marks_of_a_scene_do_not_follow_from_each_other() -> None:
    """Two objects' marks go together in all sixteen ways, and no mark tells of the other."""
    pairs = Counter(tuple(marked_shapes.scene("train", i, 0).marks[:2].tolist()) for i in range(128))
    assert len(pairs) == 16 and max(pairs.values()) < 25


def test_lists_say_what_the_questions_about_one_object_say() -> None:
    for index in range(5):
        made = marked_shapes.scene("val", index, 0)
        for listed, form in (("shapes", "its_shape"), ("sides", "its_side"), ("marks", "mark")):
            said = [marked_shapes.ask(made, form, (number,)).answer for number in range(marked_shapes.OBJECTS)]
            words = marked_shapes.ask(made, listed, ()).answer.split()
            assert words[::2] == list(marked_shapes.COLOURS) and words[1::2] == said


def test_a_scene_is_drawn_as_it_is_told() -> None:
    colours = np.array(list(marked_shapes.COLOURS.values()))
    for index in range(6):
        made = marked_shapes.scene("val", index, 3)
        image = marked_shapes.draw(made, 64)
        area = [(image == colour).all(-1).sum() for colour in colours]
        assert int(np.argmax(area)) == made.large and min(area) > 20
        for number, colour in enumerate(colours):
            inside = (image == colour).all(-1)
            assert abs(np.argwhere(inside).mean(0) / 64 - made.centres[number]).max() < 0.03
            top, left = (int(round(c * 64)) - 1 for c in made.centres[number])
            black = (image[top : top + 3, left : left + 3] == 0).all(-1)
            mark = tuple(marked_shapes.MARKS.values())[made.marks[number]]
            np.testing.assert_array_equal(black, np.array(mark, bool))
        # No object covers another one: black pixels are those of the marks.
        marks = [np.sum(tuple(marked_shapes.MARKS.values())[m]) for m in made.marks]
        assert (image == 0).all(-1).sum() == sum(marks)


def test_marked_shapes_depend_on_split_index_and_seed_only() -> None:
    image, asked = marked_shapes.example("train", 5, 64, 0)
    again, same = marked_shapes.example("train", 5, 64, 0)
    np.testing.assert_array_equal(image, again)
    assert asked == same
    for other in [("val", 5, 64, 0), ("train", 6, 64, 0), ("train", 5, 64, 1)]:
        assert (marked_shapes.example(*other)[0] != image).any()  # type: ignore[arg-type]
    assert marked_shapes.example("train", 5, 128, 0)[1] == asked  # the size changes the drawing only


def test_marked_shapes_as_a_prepared_set(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = (open_questions("marked_shapes", split, n=8, size=48) for split in ("train", "val"))
    assert (len(train.images), len(train), len(val.images)) == (8, 120, 2)
    assert train.answers == val.answers == marked_shapes.ANSWERS and train.types == marked_shapes.TYPES
    for index in (0, 7):
        image, asked = marked_shapes.example("train", index, 48, 0)
        np.testing.assert_array_equal(train.images[index], image)
        rows = np.flatnonzero(train.image == index)
        found = [(train.texts[i], train.answers[train.answer[i]], train.types[train.type[i]]) for i in rows]
        assert found == [tuple(q) for q in asked]
    part = open_questions("marked_shapes", "train[2:-50%]", n=8, size=48)
    assert len(part.images) == 2 and part.texts == train.texts[30:60] and part.image.tolist() == [0] * 15 + [1] * 15
    np.testing.assert_array_equal(part.images[1], train.images[3])
    assert [p.name for p in (cache / "tfds").iterdir()] == ["marked_shapes"]
    assert capsys.readouterr().out == "" and "tensorflow" not in sys.modules
    # By its TFDS name, as a set that somebody else has prepared.
    assert open_questions("marked_shapes/n8_size48_seed0:2.0.0", "val").texts == val.texts
    with pytest.raises(InputError, match="must have an image and a class label, found "):
        sources.open_source("marked_shapes", "train")


@pytest.mark.parametrize(
    ("name", "split", "options", "message"),
    [
        ("easy_vq", "train", {}, "unknown data 'easy_vq', expected one of easy_vqa, marked_shapes, needle, a TFDS set"),
        ("marked_shapes", "train", {"m": 8}, "have no option 'm', expected n, size, seed"),
        (
            "marked_shapes",
            "train",
            {"size": 47},
            "needs n >= 1, size >= 48 and seed >= 0, found n=4000, size=47, seed=0",
        ),
        ("marked_shapes", "tst", {"n": 4}, "have no split 'tst', expected train, val, test; did you mean 'test'?"),
        ("marked_shapes", "val[1:]", {"n": 4}, "split 'val[1:]' of questions 'marked_shapes' is empty"),
        ("marked_shapes", "val[x]", {"n": 4}, "must be NAME or NAME[FROM:TO]"),
    ],
)
def test_bad_names_splits_and_options(name: str, split: str, options: dict, message: str, cache: Path) -> None:
    assert message in refused(name, split, **options)


def test_a_set_without_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "info_of", lambda folder: SimpleNamespace(features={"image": None, "label": None}))
    with pytest.raises(
        InputError, match=r"set x must have image and questions \(text, answer, type\), found image, label"
    ):
        question_sets.splits("x")


# --- questions in general


def test_baselines_by_hand() -> None:
    train = columns(
        ("is it red?", "yes", "exists", 0),
        ("is it red?", "yes", "exists", 0),
        ("is it red?", "no", "exists", 1),
        ("how many?", "one", "count", 1),
        ("how many?", "two", "count", 1),
        ("how few?", "two", "count", 1),
    )
    test = columns(
        ("is it red?", "yes", "exists", 0),
        ("is it blue?", "yes", "exists", 0),
        ("how many?", "two", "count", 1),
        ("how many?", "one", "count", 1),
    )
    # two and yes are equally frequent: two comes first; "how many?" is a tie too, broken by all of train: two.
    found = baselines(train, test)
    assert (found["majority"], found["majority_answer"]) == (0.25, "two")
    assert found["per_text"] == 0.5
    assert found["types"]["exists"] == {"majority": 1.0, "per_text": 0.5, "majority_answer": "yes", "questions": 2}
    assert found["types"]["count"]["majority"] == 0.5
    with pytest.raises(InputError, match="must have the same answers and types"):
        baselines(train, package_of_two())
    with pytest.raises(InputError, match="must hold questions, found 6 and 0"):
        baselines(train, test.about(range(0)))


def package_of_two() -> Questions:
    one = np.zeros(1, np.int32)
    images: Any = [np.zeros((4, 4, 3), np.uint8)]
    return Questions(images, ("a?",), one, one, one, ("b",), ("c",))


def test_questions_that_do_not_fit_together() -> None:
    good = columns(("is it red?", "yes", "exists", 0), ("is it red?", "no", "exists", 1))
    for change, message in [
        ({"image": np.array([1, 0], np.int32)}, "image must ascend"),
        ({"answer": np.array([0, 4], np.int32)}, r"answer must be in 0..3, found 0..4"),
        ({"texts": ("a?",)}, "image must hold 1 numbers, one per question, found 2"),
    ]:
        fields = {f: getattr(good, f) for f in Questions.__dataclass_fields__}
        with pytest.raises(InputError, match=message):
            Questions(**{**fields, **change})


def test_images_are_read_once_if_small() -> None:
    read: list[int] = []

    class Counted:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> np.ndarray:
            read.append(index)
            return np.full((2, 2, 3), index, np.uint8)

    kept = Cached(Counted())
    assert [int(kept[i][0, 0, 0]) for i in (2, 2, 1, 2)] == [2, 2, 1, 2] and read == [2, 1]


def test_marks_may_be_larger_and_lie_within_one_patch() -> None:
    """With 16 cells at 128 pixels no mark crosses the edge of a patch of 8 x 8; answers are true as before."""
    for index in range(12):
        made = marked_shapes.scene("train", index, 0, 16)
        np.testing.assert_allclose(made.centres * 16 % 1, 0.5)
        image, asked = marked_shapes.example("train", index, 128, 0, 16, 2)
        by_patch = (image == 0).all(-1).reshape(16, 8, 16, 8).any((1, 3))
        cells = {tuple(cell) for cell in np.floor(made.centres * 16).astype(int).tolist()}
        assert {tuple(cell) for cell in np.argwhere(by_patch).tolist()} == cells and len(cells) == marked_shapes.OBJECTS
        again = [marked_shapes.ask(made, *about) for about in marked_shapes._asked("train", index, 0)]
        assert asked == again
    dots = marked_shapes.draw(made, 128) == 0
    assert (image == 0).all(-1).sum() == 4 * dots.all(-1).sum()
    small = marked_shapes.scene("train", index, 0, 16, 0.5)
    covered = [(marked_shapes.draw(small, 128, 1, scale) != small.ground).any(-1).mean() for scale in (1.0, 0.5)]
    assert 3.3 < covered[0] / covered[1] < 4.4
    whole, part = (open_questions("marked_shapes", "train", n=8, size=48) for _ in range(2))
    part = part.of_types(("fine",))
    assert len(part) == 32 and set(part.type) == {3} and len(part.images) == 8
    assert part.texts == tuple(t for t, kind in zip(whole.texts, whole.type, strict=True) if kind == 3)
    with pytest.raises(InputError, match="must be one of coarse, object, relation, fine, list, found 'hard'"):
        whole.of_types(("hard",))
    for option in ({"cells": 4}, {"mark": 0}, {"mark": 9, "size": 128}, {"objects": 2.0}):
        with pytest.raises(InputError, match=f"marked_shapes needs {next(iter(option))}"):
            open_questions("marked_shapes", "train", **option)
