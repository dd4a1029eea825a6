# SPDX-License-Identifier: Apache-2.0
"""Questions about images: next-token loss of the answers; accuracy counts answers that greedy decoding says whole.

The model is put together from a tower and a decoder, each described by `config.model` or loaded by name, and a fresh
bridge; or it is the one of `config.init_from`. Stages are chained runs whose optimiser groups say what is trained.
Letters: B rows, S tokens, Q questions of a row, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

import vtjax
from experiments.vit import main as vit
from vtjax import answer
from vtjax.account import bench, flops
from vtjax.data import conversation, marked_shapes, needle, question_loader, question_sets
from vtjax.data.tokenizer import WordTokenizer, split
from vtjax.errors import InputError, check_choice
from vtjax.models import lora
from vtjax.models.vlm import VLM
from vtjax.ops import packing
from vtjax.parallel import mesh as mesh_lib
from vtjax.parallel import rules
from vtjax.spec import (
    BridgeSpec,
    CrossSpec,
    Lineage,
    LMSpec,
    LoRASpec,
    Preprocess,
    TextSpec,
    TiledViTSpec,
    ViTSpec,
    VLMSpec,
)
from vtjax.train import checkpoint, optim
from vtjax.train.state import params_sha256
from vtjax.train.task import Data, Task
from vtjax.weights import resample
from vtjax.weights import tokenizer as tokenizers

TYPES = {"easy_vqa": question_sets.EASY_VQA_TYPES, "marked_shapes": marked_shapes.TYPES, "needle": needle.TYPES}


def build(config: ConfigDict, **more: Any) -> Task:
    """The task of a config; `more` are further options of `VLM`.

    Raises:
      InputError: a spec that is not defined, weights that are missing or of another kind, or optimiser groups that do
        not fit the model.
    """
    spec, init = source(config)
    model = VLM(spec, **options(config), **more)
    types, balance = types_of(config), answer_weights(config)

    def loss(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any, key: jax.Array, step: Any) -> Any:
        found = asked(model, params, batch)
        return mean_loss(found, batch, balance), {"train_top1": found.right.sum() / jnp.maximum(found.asked.sum(), 1.0)}

    def evaluate(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any) -> dict[str, jax.Array]:
        return sums(asked(model, params, batch), batch, types)

    rows = flops.layers(spec)
    return Task(
        spec=spec,
        init=init,
        loss=loss,
        evaluate=evaluate,
        trainable=optim.group_of(config.optim),
        summary={
            "macs_per_prompt": sum(row.macs for row in rows),
            "params": sum(row.params for row in rows),
            "init_from": config.init_from,
            **({"stand_ins": list(spec.stand_ins)} if spec.stand_ins else {}),
        },
    )


def types_of(config: ConfigDict) -> tuple[str, ...]:
    """The types of the questions of a set, where they are known."""
    found = TYPES.get(config.data.name, ())
    # With one camera nobody asks which one it is.
    return found if config.data.get("cameras", 2) > 1 else tuple(name for name in found if name != "camera")


class Asked(NamedTuple):
    """What a model says to the questions of a batch.

    Attributes:
      asked: 1 for a question, 0 for none.
      loss: summed over the tokens of the answer, in nats.
      right: 1 where greedy decoding says the whole answer and ends.
      logits: of the learned slots.
      aux: of the model.
    """

    asked: Float[jax.Array, "B Q"]
    loss: Float[jax.Array, "B Q"]
    right: Float[jax.Array, "B Q"]
    logits: Float[jax.Array, "B M V"]
    aux: Any


def asked(model: VLM, params: Any, batch: Any, knobs: Any = None) -> Asked:
    """The answers of a model to a batch of the question loader, read off one forward pass."""
    slots = jnp.maximum(batch["learned"], 0)
    labels, weights, segments = (
        jnp.take_along_axis(batch[name], slots, axis=1) for name in ("labels", "weights", "segments")
    )
    text = {name: batch[name] for name in ("positions", "segments")}
    text |= {name: batch[name] for name in ("image_number", "image_interval") if name in batch}  # of videos
    logits, aux = model.apply(params, batch["input_ids"], batch["images"], slots=slots, knobs=knobs, **text)
    loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, :, None], axis=-1)[:, :, 0]
    wrong = (logits.argmax(-1) != labels).astype(jnp.float32)
    weights, count = weights * (batch["learned"] >= 0), batch["question"].shape[1]
    # Slots that do not count may be of tokens that are gone, whose logits are NaN.
    counted = (jnp.where(weights > 0, x, 0.0) * weights for x in (loss, wrong))
    losses, mistakes = (packing.per_question(x, segments, count) for x in counted)
    asked = (batch["question"] >= 0).astype(jnp.float32)
    return Asked(asked, losses, (mistakes == 0) * asked, logits, aux)


def mean_loss(found: Asked, batch: Any, balance: jax.Array | None = None) -> jax.Array:
    """The mean over the questions of a batch, each weighted by its answer where `balance` says so."""
    weight = found.asked if balance is None else found.asked * balance[batch["answer"]]
    return (found.loss * weight).sum() / jnp.maximum(found.asked.sum(), 1.0)


def sums(found: Asked, batch: Any, types: tuple[str, ...], **per_row: jax.Array) -> dict[str, jax.Array]:
    """What an evaluation adds up: questions, right answers and loss, by type, too; and `per_row` `[B]` once per
    question."""
    valid = found.asked * batch["valid"][:, None]
    right = found.right * valid
    total = {"count": valid.sum(), "top1": right.sum(), "loss": (found.loss * valid).sum()}
    total |= {name: (value[:, None] * valid).sum() for name, value in per_row.items()}
    kinds = {name: packing.per_type(x, batch["type"], len(types)) for name, x in (("count", valid), ("top1", right))}
    return total | {f"{name}@{kind}": x[i] for name, x in kinds.items() for i, kind in enumerate(types)}


def answer_weights(config: ConfigDict) -> jax.Array | None:
    """`[A]`: how much a training question weighs by its answer, `frequency ** -config.loss.balance`, 1 on average; None
    where all weigh the same.

    Raises:
      InputError: a balance below 0, or one without questions to count.
    """
    if (power := config.loss.balance) < 0 or (power and not (config.data.name and config.data.train_split)):
        raise InputError(f"config.loss.balance must be at least 0, and 0 without training questions, found {power}")
    if not power:
        return None
    train = question_loader.open_split(config.data, config.data.train_split)
    count = np.bincount(train.answer, minlength=len(train.answers))
    weight = np.maximum(count, 1.0) ** -power
    return jnp.asarray(weight * count.sum() / (weight * count).sum(), jnp.float32)


def options(config: ConfigDict) -> dict[str, Any]:
    """The options of `VLM`."""
    found = {name: config.model[name] for name in ("remat", "scan", "attention")}
    return {**found, "dtype": jnp.dtype(config.dtype), "constrain": rules.constrain}


def data(config: ConfigDict, task: Task, **more: Any) -> Data:
    """The questions, in the words of the task's model; `more` are further options of `question_loader.from_config`.

    Raises:
      InputError: a model that does not say how texts are written; as `question_loader.from_config`.
    """
    spec: Any = task.spec
    if spec.text is not None and spec.text.tokenizer == "words":
        answers = question_loader.open_split(config.data, config.data.eval_split).answers
        if missing := sorted({word for text in answers for word in split(text)} - set(spec.text.words)):
            raise InputError(
                f"the model must know the words of the answers of config.data.name={config.data.name!r}, found no "
                f"{missing[0]!r}: it learned those of another set (config.init_from={config.init_from!r})"
            )
    several = jax.process_count() > 1
    found, _ = question_loader.from_config(
        config.data,
        seed=config.seed,
        batch_size=config.batch_size,
        image_size=spec.image_size,
        visual_tokens=spec.placeholders,
        router=spec.router_token if spec.adds_router_token else -1,
        tokenizer=answer.tokenizer_of(spec),
        template=answer.template_of(spec),
        preprocess=spec.preprocess,
        rows=mesh_lib.local_rows(mesh_lib.make(config.mesh), config.batch_size) if several else None,
        **more,
    )
    return found


def batch_shapes(config: ConfigDict, task: Task, training: bool) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """For `vtjax aot`: the arrays of a global batch whose rows are as long as `config.data.limit` says."""
    return question_loader.batch_shapes(config.data, batch_size=config.batch_size, image_size=task.spec.image_size)


def deploy(config: ConfigDict, task: Task, rows: Any, dense: Any) -> tuple[bench.Candidate, bench.Candidate]:
    """Both sides of `vtjax bench`, a forward pass over rows of questions: the model, and that of `--dense` or itself
    without token reducers. MACs are those of one image and the row's tokens, with logits for all of them.

    Raises:
      InputError: a `--dense` that takes other ids or images.
    """
    params, _, _ = task.init(jax.random.key(config.seed))
    length = rows["input_ids"].shape[1]

    def candidate(name: str, spec: VLMSpec, params: Any) -> bench.Candidate:
        model = VLM(spec, **options(config))

        def apply(p: Any, ids: Any, images: Any, positions: Any, segments: Any) -> jax.Array:
            return model.apply(p, ids, images, positions=positions, segments=segments)[0]

        inputs = ("input_ids", "images", "positions", "segments")
        macs = flops.macs(spec, length) + (length - 1) * spec.decoder.width * spec.decoder.vocab
        return bench.Candidate(name, apply, params, macs, inputs=lambda batch: tuple(batch[n] for n in inputs))

    before, held = (task.spec, params) if dense is None else (_multimodal(dense.spec, "--dense"), dense.params)
    for field in ("image_size", "placeholders", "image_token"):
        if (here := getattr(task.spec, field)) != (there := getattr(before, field)):
            raise InputError(f"--dense must have {field} {here}, as the model has, found {there}")
    return candidate("the model", task.spec, params), candidate("itself" if dense is None else "--dense", before, held)


def source(config: ConfigDict) -> tuple[VLMSpec, Any]:
    """The spec, and `init` of the task. A run that goes on in `config.workdir` has both in its checkpoint: what it was
    put together from need not exist any more."""
    rank, alpha, sites = (config.model.lora[name] for name in ("rank", "alpha", "sites"))
    updates = LoRASpec(rank, alpha, tuple(sites)) if rank else None
    if not config.init_from:
        return _with_updates(config, *composed(config), updates)
    if (begun := checkpoint.begun(config.workdir)) is not None:
        spec = _multimodal(begun, config.workdir)
        return spec, lambda key: (VLM(spec).init(key), {}, {})
    m = vtjax.load(config.init_from)
    spec = _multimodal(m.spec, config.init_from)
    if (pool := tuple(config.model.bridge.pool)) != (1, 1):
        spec = spec.edit(bridge=dataclasses.replace(spec.bridge, pool=pool))
    if spec.text is None and config.model.text.tokenizer not in ("none", "words"):
        spec = spec.edit(text=written(config)[0])
    name = Path(config.init_from).name if Path(config.init_from).is_absolute() else config.init_from
    step = Lineage(params_sha256(m.params), "init_from", json.dumps({"source": name}))
    return _with_updates(config, spec.edit(lineage=(*spec.lineage, step)), m.params, updates)


def _with_updates(
    config: ConfigDict, spec: VLMSpec, loaded: Mapping[str, Any], updates: LoRASpec | None
) -> tuple[VLMSpec, Any]:
    """Adds the decoder's low-rank updates, or merges those that are there and not wanted."""
    present = spec.decoder.lora
    if present is not None and updates is None:
        decoder, merged = lora.merge(spec.decoder, loaded["decoder"])
        print(f"merged the low-rank updates of {config.init_from} into the decoder's weights", file=sys.stderr)
        spec, loaded = spec.edit(decoder=decoder), {**loaded, "decoder": merged}
    if updates is not None and present is not None and updates != present:
        raise InputError(
            f"config.model.lora must be that of {config.init_from!r}, {present}, or have rank 0 to merge it"
        )
    plain = spec
    if updates is not None and present is None:
        spec = spec.edit(decoder=lora.install(spec.decoder, updates))

    def init(key: jax.Array) -> tuple[Any, Any, Any]:
        made = {} if set(loaded) == {"tower", "bridge", "decoder"} else VLM(plain).init(key)
        params = {**made, **loaded}
        if spec is not plain:
            params["decoder"] = lora.add(spec.decoder, params["decoder"], jax.random.fold_in(key, 1))
        return params, {}, {}

    return spec, init


def _multimodal(spec: Any, where: str) -> VLMSpec:
    if not isinstance(spec, VLMSpec):
        raise InputError(f"{where!r} must hold a VLMSpec, found {type(spec).__name__}")
    return spec


def composed(config: ConfigDict) -> tuple[VLMSpec, dict[str, Any]]:
    """The spec of a tower, a bridge and a decoder, and the parameters of those that are loaded by name. A run that goes
    on does without these.

    Raises:
      InputError: a part of another kind, a set of questions that is missing, or a spec that is not defined.
    """
    model, loaded, begun = config.model, {}, checkpoint.begun(config.workdir)
    parts: dict[str, Any] = {}
    for part, kind in (("tower", ViTSpec), ("decoder", LMSpec)):
        if not (name := model[part].get("name", "")):
            continue
        size = tuple(model[part].get("image_size", ()))
        if begun is not None:
            parts[part] = getattr(_multimodal(begun, config.workdir), part)
            continue
        m = vtjax.load(name)
        if not isinstance(m.spec, kind):
            raise InputError(
                f"config.model.{part}.name={name!r} must hold a {kind.__name__}, found {type(m.spec).__name__}"
            )
        parts[part], loaded[part] = m.spec, m.params
        if isinstance(m.spec, ViTSpec) and size:
            parts[part], loaded[part] = resample.resize(m.spec, m.params, size)
    text, words = written(config)
    if "tower" not in parts:
        parts["tower"] = described(model.tower)
    # Questions are about the whole of an image.
    whole = dataclasses.replace(parts["tower"].preprocess, crop=1.0, squash=True)
    parts["tower"] = parts["tower"].edit(preprocess=whole)
    if isinstance(parts["tower"], ViTSpec):
        parts["tower"] = parts["tower"].edit(feature_layer=model.tower.feature_layer or None)
    if "decoder" not in parts:
        fields = {name: value for name, value in model.decoder.items() if name not in ("name", "empty")}
        if words is not None:
            fields |= {"vocab": words.vocabulary, "eos": tuple(words.encode(conversation.PLAIN.end))}
        elif not fields["vocab"] and text is not None:
            found = tokenizers.load(text.tokenizer)
            end = found.encode(conversation.TEMPLATES[text.template].end)
            fields |= {"vocab": found.vocabulary, "eos": tuple(end)}
        parts["decoder"] = LMSpec.uniform(**fields).edit(
            blocks={layer: {"attn": False, "ffn": False} for layer in model.decoder.empty}
        )
    image_token = model.image_token
    if words is not None and image_token == -1:
        image_token = words.image
    return (
        VLMSpec(
            tower=parts["tower"],
            bridge=bridge(config, parts["decoder"]),
            decoder=parts["decoder"],
            image_token=parts["decoder"].ids if image_token == -1 else image_token,
            text=text,
            stand_ins=tuple(model.stand_ins),
        ),
        loaded,
    )


def described(tower: ConfigDict) -> ViTSpec | TiledViTSpec:
    """The spec of a tower whose fields are the leaves of `config.model.tower`; that of tiles has the leaf `tiles`."""
    fields = {name: value for name, value in tower.items() if name not in ("feature_layer", "name")}
    if "tiles" in tower:
        return TiledViTSpec.uniform(**{**fields, "preprocess": Preprocess(**tower.preprocess)})
    return vit.described(ConfigDict({**fields, "classes": 1, "pooling": "none"})).edit(classes=0)


def bridge(config: ConfigDict, decoder: LMSpec) -> BridgeSpec:
    """The bridge that `config.model.bridge` describes."""
    wanted = config.model.bridge
    layers, heads, kv_heads, head_dim, mlp = (
        wanted[name] for name in ("layers", "heads", "kv_heads", "head_dim", "mlp")
    )
    forms: dict[str, Any] = {
        "none": lambda: None,
        "hyper": lambda: CrossSpec.hyper(tuple(layers)),
        "fused": lambda: CrossSpec.fused(tuple(layers)),
        "flamingo": lambda: CrossSpec.flamingo(tuple(layers), decoder.width, heads, head_dim),
        "mllama": lambda: CrossSpec.mllama(tuple(layers), heads, kv_heads, head_dim, mlp),
    }
    check_choice("config.model.bridge.cross", wanted.cross, forms)
    return BridgeSpec(
        projector=wanted.projector,
        hidden=decoder.width if wanted.projector == "mlp" else 0,
        bias=wanted.bias,
        prefix=wanted.prefix,
        pool=tuple(wanted.pool),
        cross=forms[wanted.cross](),
    )


def written(config: ConfigDict) -> tuple[TextSpec | None, WordTokenizer | None]:
    """How texts are written, and the word tokenizer where it is one: of the words of the training split."""
    text = config.model.text
    if text.tokenizer == "none":
        return None, None
    if text.tokenizer != "words":
        return TextSpec(tokenizer=text.tokenizer, template=text.template), None
    if not config.data.train_split:
        raise InputError("config.data.train_split must name the split whose words make the vocabulary, found none")
    words = question_loader.vocabulary(question_loader.open_split(config.data, config.data.train_split))
    assert isinstance(words, WordTokenizer)
    return TextSpec("words", words.words, words.extra, text.template), words
