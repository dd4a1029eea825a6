# SPDX-License-Identifier: Apache-2.0
"""The questions that the multimodal models are trained on: what answering blindly reaches, and what a batch costs.

    python -m experiments.vlm.data baselines    majority answer, best answer per text, of each set and type
    python -m experiments.vlm.data batches      padding, tokens per question and time, packed and in several lengths
    python -m experiments.vlm.data figure       results/questions_SET.png: some questions of each type

The first two append to results/data.jsonl. easy-VQA needs the package `easy-vqa` (extra `[vqa]`).
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from configs import common
from vtjax.account import record
from vtjax.data import question_loader
from vtjax.data.questions import Questions, baselines, open_questions
from vtjax.errors import InputError
from vtjax.viz import curves, questions

RESULTS = Path(__file__).resolve().parent / "results"
RECORDS = RESULTS / "data.jsonl"
SETS = ("easy_vqa", "marked_shapes")
FORMS = ((1, 1), (8, 1), (8, 3), (24, 1), (24, 4))  # (pack, buckets)
BATCH, VISUAL, STEPS = 32, 64, 100  # 64 x 64 pixels in patches of 8


def blind(name: str) -> dict[str, Any]:
    """Sizes of a set, and its baselines on "test"."""
    train, test = open_questions(name, "train"), open_questions(name, "test")
    return {
        "kind": "baselines",
        "set": name,
        "images": {"train": len(train.images), "test": len(test.images)},
        "train_questions": len(train),
        "texts": len(set(train.texts)),
        "new_texts": len(set(test.texts) - set(train.texts)),
        "answers": len(train.answers),
        "vocabulary": question_loader.vocabulary(train).vocabulary,
        **baselines(train, test),
    }


def batches(name: str, pack: int, buckets: int) -> dict[str, Any]:
    """Of the first `STEPS` training batches: the share of padding, slots per question, and the time of each."""
    config = common.questions(name=name, pack=pack, buckets=buckets, prefetch=0)
    sizes: dict[str, Any] = {"batch_size": BATCH, "image_size": (64, 64), "visual_tokens": VISUAL}
    data, _ = question_loader.from_config(config, seed=0, **sizes)
    for split in data.draw("train", 0), *data.eval("train"):  # decodes every image once
        del split
    slots = padding = asked = 0
    seconds = []
    stream = data.train(0)
    for _ in range(STEPS):
        start = time.perf_counter()
        batch = next(stream)
        seconds.append(time.perf_counter() - start)
        slots += batch["segments"].size
        padding += int((batch["segments"] < 0).sum())
        asked += int((batch["question"] >= 0).sum())
    p10, median, p90 = np.percentile(seconds, (10, 50, 90))
    return {
        "kind": "batches",
        "set": name,
        "seed": 0,
        "pack": pack,
        "buckets": buckets,
        "batch_size": BATCH,
        "visual_tokens": VISUAL,
        "rows": data.train_examples,
        "lengths": data.lengths,
        "padding": padding / slots,
        "slots_per_question": slots / asked,
        "questions_per_batch": asked / STEPS,
        "batch_s": {"median": median, "p10": p10, "p90": p90},
    }


def figure(name: str, columns: int = 5) -> Path:
    """Draws questions about different images, each with another answer where there is one."""
    found = open_questions(name, "train[:400]")
    samples = {kind: _some(found, number, columns) for number, kind in enumerate(found.types)}
    title = f"{name}: questions of each type"
    return curves.save(questions.sheet(samples, title), RESULTS / f"questions_{name}.png")


def _some(found: Questions, kind: int, count: int) -> list[tuple[np.ndarray, str, str]]:
    of_kind = np.flatnonzero(found.type == kind)
    chosen: list[int] = []
    for fresh in (lambda i: found.answer[i] not in found.answer[chosen], lambda i: True):
        for i in of_kind.tolist():
            if len(chosen) < count and found.image[i] not in found.image[chosen] and fresh(i):
                chosen.append(i)
    return [(found.images[int(found.image[i])], found.texts[i], found.answers[found.answer[i]]) for i in chosen]


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("baselines", "batches", "figure"))
    what = parser.parse_args().what
    try:
        if what == "figure":
            for name in SETS:
                print(figure(name).name, file=sys.stderr)
            return 0
        found = (
            (blind(name) for name in SETS)
            if what == "baselines"
            else (batches(name, *form) for name, form in itertools.product(SETS, FORMS))
        )
        for fields in found:
            kept = record.write(RECORDS, fields)
            print({k: v for k, v in kept.items() if k in fields}, file=sys.stderr)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
