# SPDX-License-Identifier: Apache-2.0
"""What DAS stands beside, and what its search is disturbed by, as far as neither is an experiment of its own.

Prompts that are trained in place of adapters; MLPs of the decoder made narrower by DGMR's selection; weights rounded to
eight bits. Answers that are wrong at random, and validation questions with few of the answers.
Letters: B rows, S tokens, P prompt tokens, D width of the decoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.vlm import main as vlm
from vtjax.data.questions import Questions
from vtjax.models.segments import block_name
from vtjax.models.vlm import VLM
from vtjax.ops import gram_schmidt
from vtjax.spec import VLMSpec
from vtjax.train import optim
from vtjax.train.task import Task

PROMPT = "prompt"
"""Parameters `params["prompt"]["rows"] [P, D]`."""


@dataclasses.dataclass(frozen=True)
class Prompted:
    """A multimodal model whose decoder reads P trained embeddings before all else; every question of a row sees them.

    Attributes:
      model: which it is without them.
    """

    model: VLM

    def apply(
        self, params: Any, input_ids: Any, images: Any, *, positions: Any, segments: Any, slots: Any, knobs: Any = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """As `VLM.apply`, of which the experiment asks for this much."""
        own = jnp.asarray(params[PROMPT]["rows"])
        entered, _ = self.model.enter(params, input_ids, images, positions=positions, segments=segments)
        x, count = entered["embeddings"], len(own)

        def behind(first: Any, rest: Any) -> jax.Array:
            return jnp.concatenate([jnp.broadcast_to(first, (len(x), *first.shape)).astype(rest.dtype), rest], axis=1)

        text = {"positions": behind(jnp.arange(count), positions + count), "slots": slots + count}
        text |= {"embeddings": behind(own, x), "segments": behind(jnp.zeros(count, jnp.int32), segments)}
        return self.model.lm.apply(self.model.decoder_params(params), knobs=knobs, **text)


def prompted(config: ConfigDict, count: int) -> tuple[Task, Prompted]:
    """Prompt tuning of the model of `config.init_from`: P = `count` embeddings, and what else the config's groups
    say (`configs/das.py`, arm=prompt)."""
    spec, base_init = vlm.source(config)
    model, types = Prompted(VLM(spec, **vlm.options(config))), vlm.types_of(config)
    shape = (count, spec.decoder.width)

    def init(key: jax.Array) -> Any:
        # As large as the embeddings of words when they are fresh.
        rows = jax.random.normal(jax.random.fold_in(key, 3), shape) / spec.decoder.width**0.5
        return {**base_init(key)[0], PROMPT: {"rows": rows}}, {}, {}

    def loss(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any, key: jax.Array, step: Any) -> Any:
        return vlm.mean_loss(vlm.asked(model, params, batch), batch), {}  # type: ignore[arg-type]

    def evaluate(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any) -> dict[str, jax.Array]:
        return vlm.sums(vlm.asked(model, params, batch), batch, types)  # type: ignore[arg-type]

    task = Task(spec=spec, init=init, loss=loss, evaluate=evaluate, trainable=optim.group_of(config.optim))
    return task, model


def narrower(spec: VLMSpec, params: Any, keep: int) -> tuple[VLMSpec, Any]:
    """The model with `keep` neurons in every MLP of its decoder, those that DGMR's Gram-Schmidt picks; without its
    distillation: what is trained afterwards are adapters."""
    decoder = dict(params["decoder"])
    for index in range(spec.decoder.depth):
        block = dict(decoder[block_name(index)])
        into = [np.asarray(block["mlp"][name]["kernel"]).T for name in ("gate", "up")]
        picks = np.asarray(gram_schmidt.select(gram_schmidt.scores(np.concatenate(into), "concat"), keep))
        mlp = {name: {"kernel": block["mlp"][name]["kernel"][:, picks]} for name in ("gate", "up")}
        block["mlp"] = {**mlp, "down": {"kernel": block["mlp"]["down"]["kernel"][picks]}}
        decoder[block_name(index)] = block
    thin = spec.decoder.edit(blocks={index: {"mlp": keep} for index in range(spec.decoder.depth)})
    return spec.edit(decoder=thin), {**params, "decoder": decoder}


def int8(params: Any, trained: Callable[[str], Any]) -> Any:
    """The parameters with every matrix that was not trained rounded to 8 bits, symmetrically and with one scale per
    output channel (per row of an embedding), and read back as float32: what rounding does to answers, not to time."""

    def rounded(path: Any, a: Any) -> Any:
        name = "/".join(str(key.key) for key in path)
        if np.ndim(a) < 2 or trained(name) is not None:
            return a
        w = np.asarray(a, np.float32)
        over: tuple[int, ...] = (0,) if name.endswith("kernel") else (w.ndim - 1,)
        if name.endswith("out/kernel"):
            over = tuple(range(w.ndim - 1))  # heads and their channels are summed over
        scale = np.maximum(np.abs(w).max(over, keepdims=True), 1e-30) / 127
        return np.round(w / scale) * scale

    return jax.tree_util.tree_map_with_path(rounded, params)


Edit = Callable[[Questions, str], Questions]
"""What becomes of a split of this name."""


def noisy(share: float, seed: int) -> Edit:
    """A share of the answers of training splits is wrong: another one of those that questions of the type have."""

    def edit(asked: Questions, split: str) -> Questions:
        if not split.startswith("train"):
            return asked
        rng, answer = np.random.default_rng([seed, len(asked)]), asked.answer.copy()
        known = {kind: np.unique(asked.answer[asked.type == kind]) for kind in np.unique(asked.type).tolist()}
        for place in np.flatnonzero(rng.random(len(asked)) < share):
            others = known[int(asked.type[place])]
            answer[place] = rng.choice(others[others != answer[place]])
        return dataclasses.replace(asked, answer=answer)

    return edit


def biased(held: str, answers: tuple[str, ...]) -> Edit:
    """The split `held` has only questions with these answers."""

    def edit(asked: Questions, split: str) -> Questions:
        if split != held:
            return asked
        kept = np.flatnonzero(np.isin(asked.answer, [asked.answers.index(text) for text in answers]))
        columns = {name: getattr(asked, name)[kept] for name in ("image", "answer", "type")}
        return dataclasses.replace(asked, texts=tuple(asked.texts[i] for i in kept), **columns)

    return edit
