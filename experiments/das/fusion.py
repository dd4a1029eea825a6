# SPDX-License-Identifier: Apache-2.0
"""DAS in a fusion encoder, ViLT's or METER's: the same two phases, and the training of what they transfer.

`config.data.form` says what is learned (section 4 of the spec): "answers", with binary cross-entropy over all answers,
summed over them; "pairs", whether two images answer a question alike, with cross-entropy; "captions", the true one of
several for an image, with cross-entropy over their scores and `config.loss.match` x that of whether text and image
belong together, of which half of the rows see a false caption. Everything that is trained in a search is thrown away
after it, also heads and poolers: fine-tuning starts from what the search started from, and `config.das.preferences`
names the search.
Letters: b rows, C captions, K classes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import vtjax
from experiments.das import deployed, phases
from vtjax.account import fusion as counts
from vtjax.data import fusion_loader, question_loader
from vtjax.data.tokenizer import Tokenizer, WordTokenizer
from vtjax.errors import InputError, check_choice
from vtjax.methods import das
from vtjax.models.fusion import Fusion
from vtjax.parallel import mesh as mesh_lib
from vtjax.parallel import rules
from vtjax.spec import FusionSpec, Lineage, TextSpec
from vtjax.train import checkpoint
from vtjax.train.state import flatten, params_sha256
from vtjax.train.task import Data, Task
from vtjax.weights import tokenizer as tokenizers

PHASES = ("search", "finetune", "full")
"""The last one trains a model without adapters: what a transfer starts from, or is compared with."""

FAMILIES: dict[str, Callable[..., FusionSpec]] = {
    "meter": FusionSpec.meter,
    "vilt": FusionSpec.vilt,
    "small": FusionSpec.small,
}

Convert = Callable[[Any, jax.Array], Any]
"""`(parameters of what a run starts from, key) -> parameters`."""


def is_one(config: ConfigDict) -> bool:
    """Whether a config is of a fusion encoder."""
    return "form" in config.data


def build(config: ConfigDict) -> Task:
    """The task of a phase.

    Raises:
      InputError: settings that are not defined, no preferences where they are needed, a start of another kind or shape.
    """
    phases.check(config, PHASES)
    phases.say_untrained(config)
    check_choice("config.data.form", config.data.form, fusion_loader.FORMS)
    if config.loss.match < 0:
        raise InputError(f"config.loss.match must be 0 or more, found {config.loss.match}")
    base, base_init = source(config)
    phase = config.das.phase
    spec, convert = {"search": to_search, "finetune": to_finetune, "full": to_full}[phase](config, base)

    def init(key: jax.Array) -> Any:
        return convert(base_init(key), jax.random.fold_in(key, 3))

    model = _model(config, spec)
    if phase == "search":
        return phases.search(config, spec, init, model, functools.partial(_summary, config))
    made = phase == "finetune" and not config.das.keep and spec is not base
    # Without a start the whole model is, which `vtjax eval` refuses on its own.
    fresh = "adapters" if made else "a head" if config.init_from and _heads(spec) != _heads(base) else ""
    return phases.finetune(config, spec, init, model, spec.skips, spec.arms, _summary(config, spec), fresh)


def _heads(spec: FusionSpec) -> tuple[int, int, bool]:
    """What `head_of` decides."""
    return spec.classes, spec.images, spec.ranks


def source(config: ConfigDict) -> tuple[FusionSpec, Callable[[jax.Array], Any]]:
    """What a run starts from: the spec, and its parameters by a key.

    Raises:
      InputError: a start that is no fusion encoder, or that a search has changed already.
    """
    if (begun := checkpoint.begun(config.workdir)) is not None:
        dict(config.model.items())  # its leaves count as read, although the checkpoint says it all
        return _fused(begun, config.workdir), Fusion(_fused(begun, config.workdir)).init
    if not config.init_from:
        spec = described(config)
        return spec, Fusion(spec).init
    m = vtjax.load(config.init_from)
    spec = _fused(m.spec, config.init_from)
    if (
        [step.operation for step in das.history(spec)] == ["das.install"]
        and config.das.phase != "search"
        and not config.das.keep
    ):
        raise InputError(
            f"config.init_from must be what the search started from, and config.das.preferences its workdir, as the "
            f"search has trained heads, too (config.das.keep=True goes on with them); found {config.init_from!r}"
        )
    name = Path(config.init_from).name if Path(config.init_from).is_absolute() else config.init_from
    step = Lineage(params_sha256(m.params), "init_from", json.dumps({"source": name}))
    return spec.edit(lineage=(*spec.lineage, step)), lambda key: m.params


def _fused(spec: Any, where: str) -> FusionSpec:
    if not isinstance(spec, FusionSpec):
        raise InputError(f"{where!r} must hold a FusionSpec, found {type(spec).__name__}")
    return spec


def described(config: ConfigDict) -> FusionSpec:
    """The spec of the leaves of `config.model`, with adapters and the head of its task.

    Raises:
      InputError: no such family, a shape that is none; as `fusion_loader.open_rows` where the data say how many answers
        there are, or which words.
    """
    model, settings = config.model, config.das
    check_choice("config.model.family", model.family, FAMILIES)
    words = None
    if model.tokenizer == "words":
        train = question_loader.open_split(config.data, _named(config))
        words = question_loader.vocabulary(train, (fusion_loader.CLASS,))
    text = TextSpec("words", words.words, words.extra) if words else TextSpec(model.tokenizer)
    shape = {
        name: tuple(value) if isinstance(value, tuple) else value
        for name, value in model.items()
        if name not in ("family", "tokenizer", "remat", "classes")
    }
    if words:
        shape["vocab"] = words.vocabulary
    spec = FAMILIES[model.family](**shape, **head_of(config), text=text)
    # Questions are about the whole of an image.
    whole = dataclasses.replace(spec.image.preprocess, crop=1.0, squash=True)
    spec = spec.edit(image=spec.image.edit(preprocess=whole))
    wanted = {"inner": settings.width, "skip": settings.skip_width}
    return spec.edit(**{name: getattr(spec, name).edit(width=width) for name, width in wanted.items() if width})


def _named(config: ConfigDict) -> str:
    if not config.data.train_split:
        raise InputError("config.data.train_split must name the split whose words make the vocabulary, found none")
    split: str = config.data.train_split
    return split


def head_of(config: ConfigDict) -> dict[str, Any]:
    """The fields of the spec that the form of the task decides."""
    form, classes = config.data.form, config.model.classes
    if form == "answers" and not classes:
        classes = len(question_loader.open_split(config.data, _named(config)).answers)
    return {
        "classes": {"answers": classes, "pairs": 2, "captions": 0}[form],
        "images": 2 if form == "pairs" else 1,
        "ranks": form == "captions",
    }


def to_full(config: ConfigDict, base: FusionSpec) -> tuple[FusionSpec, Convert]:
    """Without adapters."""
    if checkpoint.begun(config.workdir) is not None:
        return base, lambda params, key: params
    spec = _fitted(config, base).without_adapters()
    return spec, lambda params, key: _completed(spec, {k: v for k, v in params.items() if k != das.METHOD}, key)


def to_search(config: ConfigDict, base: FusionSpec) -> tuple[FusionSpec, Convert]:
    """With adapters inside of every module, and in place of every arm: fresh ones, or with `config.das.keep` those that
    are there."""
    if checkpoint.begun(config.workdir) is not None:
        return base, lambda params, key: params
    if base.skips:
        raise InputError(f"a search needs all modules, found a model without {list(base.skips)}")
    wanted, parent = described(config), base.lineage[-1].parent if base.lineage else ""
    names = ("inner", "skip", "encoder_skip")
    for name in ("streams", "width", "depth", "fusion"):
        if (here := getattr(wanted, name)) != (there := getattr(base, name)):
            raise InputError(f"config.model must have {name} {there}, as config.init_from has, found {here}")
    if config.das.keep and any(getattr(base, name) != getattr(wanted, name) for name in names):
        raise InputError(
            f"config.das.keep=True needs the adapters of a search of the same widths in config.init_from="
            f"{config.init_from!r}, found others"
        )
    step = Lineage(parent, f"{das.METHOD}.install")
    spec = _fitted(config, base).edit(
        arms=wanted.arms, lineage=(*base.lineage, step), **{name: getattr(wanted, name) for name in names}
    )
    kept = config.das.keep

    def convert(params: Any, key: jax.Array) -> Any:
        return _completed(spec, params if kept else {k: v for k, v in params.items() if k != das.METHOD}, key)

    return spec, convert


def to_finetune(config: ConfigDict, base: FusionSpec) -> tuple[FusionSpec, Convert]:
    """Without the chosen modules; where `base` lacks some already, it stays as it is.

    Raises:
      InputError: as `to_search` and `phases.check_gone`, or no preferences where they are needed.
    """
    begun = checkpoint.begun(config.workdir) is not None
    if begun or base.skips:
        where = config.workdir if begun else config.init_from
        phases.check_gone(config, base.skips, base, where)
        return base, lambda params, key: params
    searched, convert = to_search(config, base)
    gone = phases.chosen(config, searched)
    spec, _ = das.remove(searched, None, gone, searched.lineage[-1].parent)
    return spec, lambda params, key: das.remove(searched, convert(params, key), gone)[1]


def _fitted(config: ConfigDict, base: FusionSpec) -> FusionSpec:
    """The model with the head of this task, which is fresh where it has another one."""
    return base.edit(**head_of(config))


def _completed(spec: FusionSpec, params: Any, key: jax.Array) -> Any:
    """The parameters of `spec`: those that fit, fresh ones elsewhere (adapters, another task's head). Of one image more
    the type is that of the first, as in the release."""
    marks = params["embed"]["marks"]
    wanted = [min(number, 1) for number in range(1 + spec.images)]
    if len(wanted) != len(marks["type"]):
        marks = {**marks, "type": marks["type"][np.asarray(wanted)]}
        params = {**params, "embed": {**params["embed"], "marks": marks}}
    own = flatten(params)

    def leaf(keys: Any, fresh: Any) -> Any:
        found = own.get(rules.path_of(keys))
        return fresh if found is None or found.shape != fresh.shape else found

    made = jax.tree_util.tree_map_with_path(leaf, Fusion(spec).init(key))
    return made if made[das.METHOD] else {k: v for k, v in made.items() if k != das.METHOD}


def _model(config: ConfigDict, spec: FusionSpec) -> phases.Model:
    """What the phases know of a fusion encoder and its task."""
    model = Fusion(spec, jnp.dtype(config.dtype), rules.constrain, config.model.remat)
    length, texts = config.data.length, 1 + config.data.false if spec.ranks else 1

    def said(params: Any, batch: Any, skip: Any, key: Any) -> tuple[jax.Array, jax.Array]:
        """Logits `[b, K]` (of captions their scores), and each row's loss `[b]`."""
        run = model.rank if spec.ranks else functools.partial(_logits, model)
        logits, match = run(params, batch["input_ids"], batch["images"], batch["mask"], skip=skip, key=key)
        label = jnp.maximum(batch["label"], 0)
        if config.data.form == "answers":
            return logits, answer_loss(logits, label)
        loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=-1)[:, 0]
        if spec.ranks and config.loss.match:
            loss = loss + config.loss.match * match_loss(match, key)
        return logits, loss

    def mean(params: Any, batch: Any, skip: Any, key: Any) -> Any:
        logits, loss = said(params, batch, skip, key)
        valid = batch["valid"].astype(jnp.float32)
        count = jnp.maximum(valid.sum(), 1.0)
        right = (logits.argmax(-1) == batch["label"]) * valid
        return (loss * valid).sum() / count, {"train_top1": right.sum() / count}

    def sums(params: Any, batch: Any, skip: Any) -> dict[str, jax.Array]:
        logits, loss = said(params, batch, skip, None)
        valid = batch["valid"].astype(jnp.float32)
        right = (logits.argmax(-1) == batch["label"]) * valid
        return {"count": valid.sum(), "top1": right.sum(), "loss": (loss * valid).sum()}

    def decisions(params: Any, batch: Any, skip: Any) -> dict[str, jax.Array]:
        logits, _ = said(params, batch, skip, None)
        spent = jnp.float32(deployed.fusion_macs(spec, length or batch["input_ids"].shape[-1], texts, skip))
        right = (logits.argmax(-1) == batch["label"]).astype(jnp.float32)
        return {"type": batch["type"], "correct": right, "macs": jnp.broadcast_to(spent, right.shape)}

    return phases.Model(mean, sums, decisions)


def _logits(model: Fusion, params: Any, ids: Any, images: Any, mask: Any, **how: Any) -> tuple[jax.Array, Any]:
    return model.apply(params, ids, images, mask, **how)[0], None


def answer_loss(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Binary cross-entropy over all answers, `[b]`: their sum, which is the release's mean times their number."""
    target = jax.nn.one_hot(label, logits.shape[-1])
    return -(target * jax.nn.log_sigmoid(logits) + (1.0 - target) * jax.nn.log_sigmoid(-logits)).sum(-1)


def match_loss(match: jax.Array, key: jax.Array | None) -> jax.Array:
    """Cross-entropy of whether text and image belong together, `[b]`: half of the rows look at the true caption, half
    at the first false one; by chance, without a key every other row. The release shows a false image in its place."""
    rows = len(match)
    true = jnp.arange(rows) % 2 == 0
    if key is not None:
        true = jax.random.permutation(jax.random.fold_in(key, 1), true)
    logits = jax.nn.log_softmax(jnp.where(true[:, None], match[:, 0], match[:, 1]))
    return -jnp.where(true, logits[:, 1], logits[:, 0])


def data(config: ConfigDict, task: Task, **more: Any) -> Data:
    """The texts and images, in the words of the task's model.

    Raises:
      InputError: as `fusion_loader.from_config`.
    """
    spec: Any = task.spec
    several = jax.process_count() > 1
    known = spec.text.words if spec.text is not None and spec.text.tokenizer == "words" else ()
    found = fusion_loader.from_config(
        config.data,
        seed=config.seed,
        batch_size=config.batch_size,
        image_size=spec.image.image_size,
        tokenizer=tokenizer_of(spec),
        known=known,
        preprocess=spec.image.preprocess,
        rows=mesh_lib.local_rows(mesh_lib.make(config.mesh), config.batch_size) if several else None,
    )
    if spec.classes and spec.classes < found.classes:
        raise InputError(f"the model must have {found.classes} classes, as config.data has, found {spec.classes}")
    if found.length > spec.positions:
        raise InputError(f"config.data.length must be {spec.positions} or less (the model's), found {found.length}")
    return found


def tokenizer_of(spec: FusionSpec) -> Tokenizer:
    """The tokenizer of a spec.

    Raises:
      InputError: the spec names none, or one that is not found.
    """
    if spec.text is None:
        raise InputError("it must be known how texts are written (FusionSpec.text), found a model that takes ids")
    if spec.text.tokenizer == "words":
        return WordTokenizer(spec.text.words, spec.text.control)
    return dataclasses.replace(tokenizers.load(spec.text.tokenizer), image=-1)


def batch_shapes(config: ConfigDict, task: Task, training: bool) -> Any:
    """For `vtjax aot`: the arrays of a global batch whose texts are as long as `config.data.length` says."""
    spec: Any = task.spec
    return fusion_loader.batch_shapes(config.data, batch_size=config.batch_size, image_size=spec.image.image_size)


def _summary(config: ConfigDict, spec: FusionSpec) -> dict[str, Any]:
    """Work of one row (a search: with all modules), and of the same model without adapters and with all modules."""
    texts = 1 + config.data.false if spec.ranks else 1
    length = config.data.length or counts.TEXT
    bare = deployed.whole(spec).without_adapters()
    return {
        "phase": config.das.phase,
        "form": config.data.form,
        "modules": spec.arms,
        "skips": list(spec.skips),
        "adapter_params": counts.updated(spec),
        "text_tokens": length,
        "macs_per_prompt": deployed.fusion_macs(spec, length, texts),
        "dense_macs_per_prompt": deployed.fusion_macs(bare, length, texts),
        "init_from": config.init_from,
    }
