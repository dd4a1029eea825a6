# SPDX-License-Identifier: Apache-2.0
"""Pictures of experiments/vlm/README.md and of the notebook.

python -m experiments.vlm.figures     writes results/*.png, from the records and the run runs/vlm/easyvqa_0
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vtjax
from experiments.vlm import accuracy
from vtjax import answer
from vtjax.data.questions import Questions, open_questions
from vtjax.errors import InputError
from vtjax.models import build
from vtjax.ops import decoder_attention
from vtjax.viz import curves, questions
from vtjax.viz.tables import read_jsonl

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    """See the module's text."""
    records = [r for r in read_jsonl(RESULTS / "accuracy.jsonl") if r["kind"] == "easyvqa"]
    baselines = [r for r in read_jsonl(RESULTS / "data.jsonl") if r["kind"] == "baselines" and r["set"] == "easy_vqa"]
    blind = baselines[-1]["per_text"]
    model = vtjax.load(accuracy.folder(records[0]["name"]))
    test = open_questions("easy_vqa", "test")
    kinds = range(len(test.types))
    chosen = [some(test, kind, len(kinds))[kind] for kind in kinds]
    shown = [looked(model, test, place) for place in chosen]
    written = [
        curves.save(learned(records, blind), RESULTS / "learned.png"),
        curves.save(questions.looks(shown, "Where the answer looked, easyvqa"), RESULTS / "looks.png"),
    ]
    for path in written:
        print(f"{path.relative_to(RESULTS.parent)}: {path.stat().st_size // 1000} kB", file=sys.stderr)
    return 0


def some(asked: Questions, kind: int, count: int) -> list[int]:
    """Numbers of questions of a type, about images that are far apart."""
    places = np.flatnonzero(asked.type == kind)
    return [int(place) for place in places[:: max(1, len(places) // count)][:count]]


def looked(model: vtjax.Model, asked: Questions, place: int) -> tuple[np.ndarray, str, str, np.ndarray]:
    """A question of a split with what the model says, right or wrong, and where it looked: for `questions.looks`."""
    assert model.answer is not None
    image, text, right = asked.images[asked.image[place]], asked.texts[place], asked.answers[asked.answer[place]]
    said = model.answer(image, text)
    verdict = said if said == right else f"{said} (wrong: {right})"
    return image, text, verdict, attention(model, image, text)


def attention(model: vtjax.Model, image: Any, question: str) -> np.ndarray:
    """Weight of each patch where the first token of the answer is decided, `[h, w]`: the mean over heads and layers.

    Raises:
      InputError: visual tokens do not stand in the text, but are read by cross-attention; or are no patches alone.
    """
    spec: Any = model.spec
    if spec.bridge.cross is not None or spec.bridge.prefix:
        raise InputError(f"attention to patches needs a projector and no prefix, found {spec.bridge.kind}")
    made = answer.inputs(spec, image, question)
    weights = np.asarray(_weights(build(spec), model.params, made))[0]
    return weights[made["input_ids"][0] == spec.image_token].reshape(spec.grid)


@functools.partial(jax.jit, static_argnums=0)
def _weights(model: Any, params: Any, made: Mapping[str, Any]) -> jax.Array:
    _, aux = model.apply(params, **made, want=("queries", "keys"))
    alive = jnp.asarray(made["attention_mask"], jnp.float32)
    layers = [side for side in aux["blocks"] if side]
    each = [decoder_attention.weights(side["queries"], side["keys"], alive=alive) for side in layers]
    return jnp.mean(jnp.stack([layer[:, :, -1] for layer in each]), axis=(0, 2))


def learned(records: Sequence[Mapping[str, Any]], blind: float) -> Any:
    """Accuracy of each type on the test questions over the steps, every seed, beside the best blind answers'."""
    figure = curves.new_figure(6.4, 3.6)
    axes = figure.add_subplot()
    kinds = [kind for kind in records[0]["evaluations"] if kind != "top1"]
    for kind, color in zip(["top1", *kinds], [curves.INK, *curves.COLORS], strict=False):
        for number, r in enumerate(records):
            steps, values = r["evaluations"][kind]
            name = "all questions" if kind == "top1" else kind.partition("@")[2]
            width = 2.0 if kind == "top1" else 1.2
            axes.plot(steps, values, color=color, lw=width, alpha=0.85, label=name if not number else None)
    axes.axhline(blind, color=curves.MUTED, lw=1.0, ls="--", label="all, without looking")
    curves.quiet(axes, "step")
    curves.set_title(axes, f"Accuracy on easy-VQA's test questions, {len(records)} seed{'s' * (len(records) > 1)}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


if __name__ == "__main__":
    sys.exit(main())
