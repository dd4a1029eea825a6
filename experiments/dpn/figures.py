# SPDX-License-Identifier: Apache-2.0
"""Pictures of experiments/dpn/README.md and of the notebook.

python -m experiments.dpn.figures     writes results/*.png, from the records and, where they lie, runs/dpn
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vtjax
from experiments.dpn.tables import TYPES, by_arm, mean
from vtjax import answer
from vtjax.data import question_loader
from vtjax.data.questions import Questions
from vtjax.methods import dpn
from vtjax.ops import decoder_attention
from vtjax.ops.pooling_experts import WINDOWS
from vtjax.viz import curves, reduction, routing
from vtjax.viz.tables import read_jsonl

RESULTS = Path(__file__).resolve().parent / "results"
EXPERTS = tuple(f"{h} x {w}" for h, w in WINDOWS)


def main() -> int:
    """See the module's text."""
    records = read_jsonl(RESULTS / "accuracy.jsonl")
    written = [curves.save(tradeoff(records), RESULTS / "tradeoff.png")]
    shown = (("arms", "dpn"), ("arms", "st quality"), ("gentle", "routers of harm only, then all"))
    for kind, name in shown:
        if found := by_arm(records, kind).get(name):
            path = RESULTS / f"paths_{name.replace(' ', '_').replace('=', '_').replace(',', '')}.png"
            seeds = ", ".join(str(r["seed"]) for r in found)
            title = f"{name}: experts by type of question, seeds {seeds}"
            written.append(curves.save(paths(found, title), path))
    for path in written:
        print(f"{path.relative_to(RESULTS.parent)}: {path.stat().st_size // 1000} kB", file=sys.stderr)
    return 0


def tradeoff(records: list[dict[str, Any]]) -> Any:
    """What arms lose against work, in points below the model of their seed that they started from, so that arms of
    different seeds stand beside each other: the mean, the least and the most of the seeds."""
    start = {r["seed"]: r["top1"] for r in by_arm(records, "start").get("start", [])}
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for kind in ("arms", "tau", "routers", "relaxed", "gentle"):
        for name, found in by_arm(records, kind).items():
            lost = [100 * (r["top1"] - start[r["seed"]]) for r in found if r["seed"] in start]
            if lost and (line := _line(f"{kind}: {name}")) is not None:
                point = mean(found, "mac_ratio"), float(np.mean(lost)), min(lost), max(lost)
                lines.setdefault(line, []).append(point)
    return reduction.tradeoff(
        lines,
        dense=(1.0, 0.0) if start else None,
        title="Answers to procedural questions, beside the model as it was",
        xlabel="MACs of the decoder's blocks, relative to dense",
        ylabel="points",
    )


def _line(name: str) -> str | None:
    """The line of the picture that an arm lies on; None where it is on none: a model whose texts have a router token
    that it does not know, and that stands still, loses what it loses by the token."""
    for pattern, line in (
        (r"gentle: dense", "trained on, dense"),
        (r"gentle: static .*", "static paths"),
        (r"gentle: random", "random paths"),
        (r"gentle: routers, then all", "routers, then all"),
        (r"gentle: routers of harm only, then all", "routers of harm only, then all"),
        (r"(routers|relaxed): routers at the answer budget=\S+( at .*)?", "routers alone"),
        (r"arms: dpn", "as released"),
    ):
        if re.fullmatch(pattern, name):
            return line
    return None


def paths(found: Sequence[Mapping[str, Any]], title: str) -> Any:
    """The experts of an arm by type of question, over all seeds."""
    choice = np.concatenate([_digits(r["choice"]).reshape(len(r["type"]), -1) for r in found])
    kind = np.concatenate([_digits(r["type"]) for r in found])
    return routing.experts(
        {name: choice[kind == i] for i, name in enumerate(TYPES) if (kind == i).any()}, EXPERTS, title
    )


def _digits(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8) - ord("0")


def looked(model: vtjax.Model, asked: Questions, place: int) -> list[tuple[np.ndarray, str, str, np.ndarray]]:
    """Where the answer to a question looks before the first stage and after every one, for `questions.looks`; a pooled
    token's weight is spread over its window."""
    spec: Any = model.spec
    image, text, right = asked.images[asked.image[place]], asked.texts[place], asked.answers[asked.answer[place]]
    made: dict[str, Any] = answer.inputs(spec, image, text)
    logits, aux = jax.jit(lambda p: dpn.vlm(spec).apply(p, **made, want=("queries", "keys")))(model.params)
    told = dpn.decisions(aux, spec)
    choice = np.asarray(told["choice"])[0]
    first = answer.tokenizer_of(spec).decode([int(np.asarray(logits)[0, -1].argmax())])
    visual = made["input_ids"][0] == spec.image_token
    grid, window, shown = spec.grid, (1, 1), []
    for stage, layers in enumerate(dpn.stretches(spec)):
        if stage:
            height, width = WINDOWS[int(choice[stage - 1])]
            window = window[0] * height, window[1] * width
        alive = np.array(made["attention_mask"][0], np.float32)
        starts = np.zeros(grid, bool)
        starts[:: window[0], :: window[1]] = True
        alive[visual] = starts.ravel()
        each = [
            decoder_attention.weights(
                aux["blocks"][layer]["queries"], aux["blocks"][layer]["keys"], alive=jnp.asarray(alive[None])
            )[0, :, -1]
            for layer in layers
        ]
        weight = np.asarray(jnp.mean(jnp.stack(each), axis=(0, 1)))[visual].reshape(grid)
        spread = np.kron(weight[:: window[0], :: window[1]] / (window[0] * window[1]), np.ones(window))
        name = f"layers {layers.start + 1}-{layers.stop}: {int(starts.sum())} tokens"
        shown.append((image, f"{text} {name}", first if first == right else f"{first} (right: {right})", spread))
    return shown


def questions_of(config: Any) -> Questions:
    """The questions that a config measures."""
    found = question_loader.open_split(config.data, config.data.eval_split)
    return found.of_types(config.data.types) if config.data.types else found


if __name__ == "__main__":
    sys.exit(main())
