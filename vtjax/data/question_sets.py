# SPDX-License-Identifier: Apache-2.0
"""Sets of questions as TFDS builders: prepared in the cache at the first use, read without TensorFlow.

One record is one image, encoded as PNG, with all of its questions.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from vtjax.data import marked_shapes, prepared
from vtjax.data.questions import Splits, read_prepared
from vtjax.errors import InputError, MissingExtraError

EASY_VQA_TYPES = ("color", "shape", "exists", "absent")
EASY_VQA_IMAGES = {"train": 4000, "test": 1000}


def open_easy_vqa() -> Splits:
    """easy-VQA 1.0 (Zhou 2019, MIT): one shape on a plain ground, 64 x 64; 38,575 questions about 4000 images in
    "train" and 9673 about 1000 in "test"; 13 answers. Copied from the package `easy-vqa` (extra `[vqa]`).

    The types are ours, by the words of the question: `color` and `shape` ask for one, `exists` and `absent` ask whether
    something is (is not) there.

    Raises:
      MissingExtraError: neither the package nor the prepared set is there.
    """
    return splits(prepared.prepare(_easy_vqa_builder()))


def open_marked_shapes(
    n: int = 4000, size: int = 64, seed: int = 0, cells: int = 0, mark: int = 1, objects: float = 1.0
) -> Splits:
    """`marked_shapes` with n images in "train" and n // 4 (at least one) in "val" and "test" each, 15 questions per
    image; images are `size` x `size`. `cells`, `mark`, `objects`: as in
    `marked_shapes.example`.

    Raises:
      InputError: a value out of range.
    """
    if n < 1 or size < marked_shapes.SMALLEST or seed < 0:
        raise InputError(
            f"marked_shapes needs n >= 1, size >= {marked_shapes.SMALLEST} and seed >= 0, "
            f"found n={n}, size={size}, seed={seed}"
        )
    if not 1 <= mark <= size // 16:
        raise InputError(f"marked_shapes needs mark in 1..{size // 16} for {size} pixels, found {mark}")
    if not 0.25 <= objects <= 1.0:
        raise InputError(f"marked_shapes needs objects in 0.25..1 of their usual size, found {objects}")
    if cells and cells < 8:
        raise InputError(f"marked_shapes needs cells = 0 (anywhere) or at least 8, found {cells}")
    return splits(prepared.prepare(_marked_shapes_builder(n, size, seed, cells, mark, objects)))


def splits(folder: str) -> Splits:
    """The splits of a prepared set of questions.

    Raises:
      InputError: features other than `image` and `questions` (`text`; `answer` and `type` with names).
    """
    info = prepared.info_of(folder)
    questions = dict(info.features).get("questions", {})
    labels = (questions[name] for name in ("answer", "type") if name in questions)
    named = [label for label in labels if hasattr(label, "names")]
    if "image" not in info.features or "text" not in questions or len(named) != 2:
        found = ", ".join(info.features)
        raise InputError(f"prepared set {folder} must have image and questions (text, answer, type), found {found}")
    return {split: functools.partial(read_prepared, folder, split) for split in info.splits}


def easy_vqa_type(text: str) -> str:
    """The type of one of easy-VQA's questions."""
    if re.match(r"what (is the )?color\b", text):
        return "color"
    if text.startswith("what "):
        return "shape"
    return "absent" if re.search(r"\b(not|no)\b", text) else "exists"


def easy_vqa_records(split: str) -> Iterator[dict[str, Any]]:
    """The records of a split as its package holds them: `image`, the path of a PNG; `id`; `questions`.

    Raises:
      MissingExtraError: the package is not installed.
      InputError: it is damaged, or of another version.
    """
    folder = _easy_vqa_folder() / split
    about: dict[int, list[dict[str, str]]] = {}
    try:
        for text, answer, image in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
            about.setdefault(image, []).append({"text": text, "answer": answer, "type": easy_vqa_type(text)})
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"package easy_vqa cannot be read ({reason}); install it again: pip install easy-vqa"
        ) from None
    if sorted(about) != list(range(EASY_VQA_IMAGES[split])):
        raise InputError(
            f"package easy_vqa must ask about {EASY_VQA_IMAGES[split]} images in {split!r}, found {len(about)}; "
            "install version 1.0"
        )
    for image in sorted(about):
        path = folder / "images" / f"{image}.png"
        yield {"image": str(path), "id": f"{split}/{image}", "questions": about[image]}


def _easy_vqa_folder() -> Path:
    # The package is not imported: it has nothing but paths, and these.
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise MissingExtraError("easy_vqa", "vqa", "data 'easy_vqa'")
    return Path(spec.origin).parent / "data"


def _say(name: str, images: int) -> None:
    print(f"preparing {name}, {images} images (once) ...", file=sys.stderr, flush=True)


def _features(answers: tuple[str, ...], types: tuple[str, ...], size: int) -> Any:
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
            "id": tfds.features.Text(),
            "questions": tfds.features.Sequence(
                {
                    "text": tfds.features.Text(),
                    "answer": tfds.features.ClassLabel(names=list(answers)),
                    "type": tfds.features.ClassLabel(names=list(types)),
                }
            ),
        }
    )


@functools.cache
def _easy_vqa_builder() -> Any:
    import tensorflow_datasets as tfds

    class EasyVQA(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """easy-VQA 1.0 (https://github.com/vzhou842/easy-VQA), from its Python package."""

        VERSION = tfds.core.Version("1.0.0")
        name = "easy_vqa"

        def _info(self) -> Any:
            # Read here, so that a prepared set can be opened without the package.
            answers = (_easy_vqa_folder() / "answers.txt").read_text(encoding="utf-8").split()
            return tfds.core.DatasetInfo(
                builder=self,
                description=type(self).__doc__,
                features=_features(tuple(sorted(answers)), EASY_VQA_TYPES, 64),
                disable_shuffling=True,  # by the number of the image
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            _say(self.name, sum(EASY_VQA_IMAGES.values()))
            return {split: self._generate_examples(split) for split in EASY_VQA_IMAGES}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
            yield from enumerate(easy_vqa_records(split))

    return EasyVQA


@functools.cache
def _marked_shapes_builder(n: int, size: int, seed: int, cells: int, mark: int, objects: float) -> Any:
    import tensorflow_datasets as tfds

    class MarkedShapes(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """Procedural scenes with questions of known difficulty (vtjax.data.marked_shapes)."""

        VERSION = tfds.core.Version("2.0.0")  # other questions than in 1.0.0
        # As before there were such options, where they are not used.
        more = f"_cells{cells}" * (cells > 0) + f"_mark{mark}" * (mark > 1)
        more += f"_objects{objects}" * (objects != 1)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=f"n{n}_size{size}_seed{seed}{more}")]
        name = "marked_shapes"

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description=type(self).__doc__,
                features=_features(marked_shapes.ANSWERS, marked_shapes.TYPES, size),
                disable_shuffling=True,  # the answers are balanced in this order
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            counts = {"train": n, "val": max(1, n // 4), "test": max(1, n // 4)}
            _say(self.name, sum(counts.values()))
            return {split: self._generate_examples(split, count) for split, count in counts.items()}

        def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
            for index in range(count):
                image, asked = marked_shapes.example(split, index, size, seed, cells, mark, objects)
                # Encoded, because an array would need TensorFlow.
                png = io.BytesIO()
                Image.fromarray(image).save(png, "PNG")
                png.seek(0)
                yield index, {"image": png, "id": f"{split}/{index}", "questions": [q._asdict() for q in asked]}

    return MarkedShapes
