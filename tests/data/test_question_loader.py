# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import common
from vtjax.cli import config as config_lib
from vtjax.data import marked_shapes, question_loader, transforms
from vtjax.data.conversation import PLAIN
from vtjax.data.question_loader import QuestionData, from_config, vocabulary
from vtjax.data.questions import Questions
from vtjax.data.stream import Batch
from vtjax.data.tokenizer import WordTokenizer
from vtjax.errors import InputError
from vtjax.train.task import Data


def shapes(split: str, n: int) -> Questions:
    """Marked shapes without a file; of image i only the first 2 + i % 8 questions, so that rows differ."""
    made = [marked_shapes.example(split, i, 48, 0) for i in range(n)]
    rows = [(q, i) for i, (_, asked) in enumerate(made) for q in asked[: 2 + i % 8]]
    return Questions(
        images=[image for image, _ in made],  # type: ignore[arg-type]
        texts=tuple(q.text for q, _ in rows),
        image=np.array([i for _, i in rows], np.int32),
        answer=np.array([marked_shapes.ANSWERS.index(q.answer) for q, _ in rows], np.int32),
        type=np.array([marked_shapes.TYPES.index(q.type) for q, _ in rows], np.int32),
        answers=marked_shapes.ANSWERS,
        types=marked_shapes.TYPES,
    )


TRAIN, TEST = shapes("train", 13), shapes("test", 6)
WORDS = vocabulary(TRAIN)


def make(train: Questions | None = TRAIN, **options: Any) -> QuestionData:
    defaults = {"seed": 3, "batch_size": 4, "image_size": (16, 16), "visual_tokens": 4, "prefetch": 0}
    return QuestionData(train, TEST, WORDS, template=PLAIN, **{**defaults, **options})


def take(batches: Iterable[Batch], n: int) -> list[Batch]:
    return list(itertools.islice(batches, n))


def assert_equal(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for k in x:
            assert x[k].dtype == y[k].dtype
            np.testing.assert_array_equal(x[k], y[k], err_msg=k)


FORMS = [{}, {"pack": 3, "buckets": 3}]


def test_what_a_batch_holds() -> None:
    data = make(pack=3)
    assert isinstance(data, Data) and data.classes == len(marked_shapes.ANSWERS)
    (batch,) = take(data.train(0), 1)
    (length,) = data.lengths
    kinds = {k: (v.shape, v.dtype.name) for k, v in batch.items()}
    assert kinds == {
        **{k: ((4, length), "int32") for k in ("input_ids", "positions", "segments", "labels")},
        "weights": ((4, length), "float32"),
        "learned": ((4, 6), "int32"),  # three answers of a word and its end
        "images": ((4, 16, 16, 3), "float32"),
        "valid": ((4,), "bool"),
        "index": ((4,), "int64"),
        **{k: ((4, 3), "int32") for k in ("question", "type", "answer")},
    }
    for row in range(4):
        asked = batch["question"][row][batch["question"][row] >= 0]
        (image,) = set(TRAIN.image[asked])
        expected = transforms.evaluate(TRAIN.images[image], (16, 16), 1.0, squash=True)
        np.testing.assert_array_equal(batch["images"][row], transforms.normalise(expected, (0.5,) * 3, (0.5,) * 3))
        for place, number in enumerate(asked):
            here = batch["segments"][row] == place + 1
            text = WORDS.decode(batch["input_ids"][row][here].tolist())
            answer = TRAIN.answers[TRAIN.answer[number]]
            assert text == " ".join(
                [*WORDS.decode(WORDS.encode(TRAIN.texts[number])).split(), "<answer>", answer, "<end>"]
            )
            assert batch["answer"][row, place] == TRAIN.answer[number]
            assert batch["type"][row, place] == TRAIN.type[number]
        assert (batch["type"][row][len(asked) :] == -1).all() and (batch["answer"][row][len(asked) :] == -1).all()
        assert (batch["input_ids"][row] == WORDS.image).sum() == 4
        slots = batch["learned"][row][batch["learned"][row] >= 0]
        np.testing.assert_array_equal(slots, np.flatnonzero(batch["weights"][row]))
        assert len(slots) == 2 * len(asked)
    assert next(make(pack=3, learned=9).train(0))["learned"].shape == (4, 9)


@pytest.mark.parametrize("form", FORMS, ids=["alone", "packed"])
def test_a_step_is_the_same_wherever_the_stream_starts(form: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(question_loader, "GROUP", 4)
    straight = take(make(**form, prefetch=0).train(0), 10)
    again = make(**form, prefetch=2)  # threads change nothing
    for start in (9, 4, 1, 3):
        assert_equal(take(again.train(start), 10 - start), straight[start:])
    take(again.train(10**9), 1)  # far along, at once
    (other,) = take(make(**form, seed=4).train(0), 1)
    assert (other["index"] != straight[0]["index"]).any()


@pytest.mark.parametrize("form", FORMS, ids=["alone", "packed"])
def test_the_global_batch_is_the_same_for_every_process_count(form: dict) -> None:
    whole, *parts = (make(**form, rows=rows) for rows in (None, range(2), range(2, 4)))
    for batches in (lambda d: take(d.train(2), 5), lambda d: list(d.eval()), lambda d: [d.draw("eval", 3)]):
        steps = zip(*(batches(part) for part in parts), strict=True)
        assert_equal([{k: np.concatenate([p[k] for p in step]) for k in step[0]} for step in steps], batches(whole))


@pytest.mark.parametrize("form", FORMS, ids=["alone", "packed"])
def test_an_epoch_is_every_row_once(form: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(question_loader, "GROUP", 5)
    data = make(**form)
    rows = data.train_examples
    # Stretches and epochs end together after rows batches of 4 rows: 4 epochs, or 5 of them.
    steps = rows * data._group
    index = np.concatenate([b["index"] for b in take(data.train(0), steps)])
    np.testing.assert_array_equal(np.bincount(index), np.full(rows, 4 * data._group))
    if data._group == 1:  # not sorted: epoch after epoch, each in an order of its own
        first, second = index[:rows], index[rows : 2 * rows]
        assert sorted(first) == sorted(second) == list(range(rows)) and (first != second).any()


@pytest.mark.parametrize("form", [*FORMS, {"pack": 15, "batch_size": 16}], ids=["alone", "packed", "one batch"])
def test_an_evaluation_asks_every_question_once(form: dict) -> None:
    data = make(**form)
    batches = list(data.eval())
    asked = np.concatenate([b["question"].ravel() for b in batches])
    assert sorted(asked[asked >= 0]) == list(range(len(TEST)))
    assert sum(b["valid"].sum() for b in batches) == data.eval_examples
    padding = [(b, r) for b in batches for r in np.flatnonzero(~b["valid"])]
    assert padding  # 27 questions, or 6 images, do not divide
    for batch, row in padding:
        assert batch["index"][row] == -1 and (batch["question"][row] == -1).all() and (batch["weights"][row] == 0).all()
        assert (batch["segments"][row] == -1).all() and (batch["images"][row] == 0).all()


def test_packed_and_alone_say_the_same() -> None:
    said: list[dict[int, tuple[str, str]]] = []
    for form in ({}, {"pack": 3, "buckets": 3}):
        found = {}
        for batch in make(**form).eval():
            for row, place in np.argwhere(batch["question"] >= 0):
                here = batch["segments"][row] == place + 1
                learned = here & (batch["weights"][row] > 0)
                text = WORDS.decode(batch["input_ids"][row][here].tolist())
                found[int(batch["question"][row, place])] = text, WORDS.decode(batch["labels"][row][learned].tolist())
        said.append(found)
    assert said[0] == said[1] and len(said[0]) == len(TEST)


def test_lengths_are_few_and_short_rows_come_together() -> None:
    data, plain = make(pack=15, buckets=3, batch_size=2), make(pack=15, batch_size=2)
    assert 1 < len(data.lengths) <= 3 and data.lengths[-1] == plain.lengths[0]
    batches = take(data.train(0), 30)
    assert {b["input_ids"].shape[1] for b in batches} == set(data.lengths)
    padding = [np.mean([(b["segments"] < 0).mean() for b in take(d.train(0), 30)]) for d in (plain, data)]
    assert padding[1] < 0.6 * padding[0]


def test_draws_are_fresh_and_repeatable() -> None:
    data = make(pack=3)
    count = data.eval_examples // 4
    rows = np.concatenate([data.draw("eval", i)["index"] for i in range(count)])
    assert len(set(rows.tolist())) == 4 * count
    assert_equal([data.draw("eval", 1)], [make(pack=3).draw("eval", 1)])
    assert (data.draw("eval", 0)["index"] != data.draw("eval", count)["index"]).any()
    with pytest.raises(InputError, match="split must be one of eval, train, found 'test'"):
        data.draw("test", 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pack": 0}, "config.data.pack must be at least 1, found 0"),
        ({"buckets": 0}, "config.data.buckets must be at least 1, found 0"),
        ({"limit": 12}, "a question must have at most 12 tokens with its image, found 1"),
        ({"visual_tokens": 0}, "visual_tokens must be at least 1, found 0"),
        ({"rows": [1, 0]}, "rows must ascend within 0..3"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"train": TRAIN.about(range(0))}, "a split must hold at least one question, found none"),
    ],
)
def test_bad_settings(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make(**options)
    assert "\n" not in str(caught.value)


def test_an_answer_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(InputError, match="answer must be made of tokens that the tokenizer knows"):
        QuestionData(
            None,
            TEST,
            WordTokenizer.build(["what shape"]),
            template=PLAIN,
            seed=0,
            batch_size=2,
            image_size=(16, 16),
            visual_tokens=4,
        )
    with pytest.raises(InputError, match="split must be one of eval, found 'train'"):
        make(train=None).train(0)


# --- config


def questions_config(**leaves: Any) -> Any:
    config = common.base()
    config.data = common.questions(**{"n": 8, "size": 48, "pack": 15, "buckets": 2, **leaves})
    return config_lib.Config(config.to_dict())


def test_from_config_reads_every_leaf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTJAX_CACHE", str(tmp_path))
    config = questions_config()
    sizes: dict[str, Any] = {"seed": 0, "batch_size": 2, "image_size": (48, 48), "visual_tokens": 9}
    data, tokenizer = from_config(config.data, **sizes)
    assert (data.train_examples, data.eval_examples) == (8, 2) and isinstance(tokenizer, WordTokenizer)
    assert take(data.train(0), 1)[0]["images"].shape == (2, 48, 48, 3)
    unread = [n for n, _ in config_lib.flatten(config, "") if n.startswith("data.") and n not in config._record.read]
    assert unread == ["data.weights_split"]  # which only `vtjax eval` reads
    for leaves, message in [
        ({"augment": "flip"}, "must leave augmentation at its defaults"),
        ({"repeats": 2}, "must leave augmentation at its defaults"),
        ({"workers": 1}, "config.data.workers must be 0 with questions"),
        ({"train_split": ""}, "must name the split whose words make the vocabulary"),
    ]:
        with pytest.raises(InputError, match=message):
            from_config(questions_config(**leaves).data, **sizes)
    fine, _ = from_config(questions_config(types=("fine",), pack=1).data, **sizes)
    assert (fine.train_examples, fine.eval_examples) == (32, 8)  # of both splits
    alone, _ = from_config(questions_config(train_split="").data, **sizes, tokenizer=tokenizer)
    assert alone.train_examples == 0 and len(list(alone.eval())) == 1


def test_leaves_of_other_sets_count_as_read(monkeypatch: pytest.MonkeyPatch) -> None:
    config = questions_config(name="easy_vqa")

    def opened(name: str, split: str) -> Questions:  # easy-VQA is given none of them
        return TEST

    monkeypatch.setattr(question_loader.questions, "open_questions", opened)
    assert question_loader.open_split(config.data, "train") is TEST
    assert {f"data.{name}" for name in ("n", "size", "cells", "mark", "objects")} <= config._record.read


def test_splits_may_be_edited_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTJAX_CACHE", str(tmp_path))
    seen: list[tuple[int, str]] = []

    def edit(asked: Questions, split: str) -> Questions:
        seen.append((len(asked), split))
        return asked.about(range(1)) if split == "train" else asked

    config = questions_config(types=("fine",)).data
    data, _ = from_config(config, seed=0, batch_size=1, image_size=(48, 48), visual_tokens=9, edit=edit)
    assert seen == [(32, "train"), (8, "test")] and (data.train_examples, data.eval_examples) == (1, 2)
