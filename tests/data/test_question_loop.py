# SPDX-License-Identifier: Apache-2.0
"""Questions through the one training loop, with a decoder of one layer that sees an image as one feature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tests.data.test_question_loader import TEST, WORDS, make
from tests.train import toy
from vtjax.ops import losses, packing
from vtjax.train import loop, optim
from vtjax.train.task import Task

WIDTH, PACK = 16, 9


def decoder(config: Any, vocabulary: int, image: int) -> Task:
    def init(key: jax.Array) -> tuple[Any, Any, Any]:
        keys = jax.random.split(key, 4)
        heights = {"embed": vocabulary, "place": 256, "visual": 16 * 16 * 3, "mix": WIDTH}
        made = zip(keys, heights.items(), strict=True)
        return {name: {"kernel": 0.1 * jax.random.normal(key, (n, WIDTH))} for key, (name, n) in made}, {}, {}

    def logits(params: Any, batch: Any) -> jax.Array:
        kernels = {name: leaf["kernel"] for name, leaf in params.items()}
        seen = (batch["images"].reshape(len(batch["images"]), -1) @ kernels["visual"])[:, None]
        x = jnp.where((batch["input_ids"] == image)[..., None], seen, kernels["embed"][batch["input_ids"]])
        x += kernels["place"][batch["positions"]]
        mask = packing.attention_mask(batch["segments"])
        share = jax.nn.softmax(jnp.where(mask, x @ x.swapaxes(1, 2), -1e9))
        return (x + jnp.tanh(share @ x @ kernels["mix"])) @ kernels["embed"].T

    def per_question(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        found = logits(params, batch)
        flat = found.reshape(-1, vocabulary), batch["labels"].reshape(-1)
        shape, weights = batch["labels"].shape, batch["weights"]
        loss = losses.cross_entropy(*flat).reshape(shape) * weights
        wrong = ~losses.top_k_correct(*flat, 1).reshape(shape) * weights
        return tuple(packing.per_question(v, batch["segments"], PACK) for v in (loss, wrong))  # type: ignore[return-value]

    def loss(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any, key: Any, step: Any) -> Any:
        asked = batch["question"] >= 0
        return per_question(params, batch)[0].sum() / asked.sum(), {}

    def evaluate(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any) -> dict[str, jax.Array]:
        asked = batch["question"] >= 0
        lost, wrong = per_question(params, batch)
        right = ((wrong == 0) & asked).astype(jnp.float32)
        shares = packing.per_type(asked.astype(jnp.float32), batch["type"], len(TEST.types))
        kinds = {f"share_{name}": share for name, share in zip(TEST.types, shares, strict=True)}
        return {"loss": (lost * asked).sum(), "top1": right.sum(), "count": asked.sum(), **kinds}

    return Task(toy.SPEC, init, loss, evaluate, optim.group_of(config.optim))


def test_a_run_over_two_row_lengths_counts_every_question(tmp_path: Path) -> None:
    data = make(pack=PACK, buckets=2, batch_size=4)
    assert len(data.lengths) == 2
    config = toy.config(steps=6, batch_size=4)
    result = loop.train(decoder(config, WORDS.vocabulary, WORDS.image), data, config, tmp_path)
    assert result["count"] == len(TEST) and result["step"] == 6
    assert 0 <= result["top1"] <= 1 and result["loss"] > 0
    for number, name in enumerate(TEST.types):
        assert abs(result[f"share_{name}"] - (TEST.type == number).mean()) < 1e-6
