# SPDX-License-Identifier: Apache-2.0
"""DPN: pooling experts in the decoder of a multimodal model, learned from questions; the method is `vtjax.methods.dpn`.

The loss is `L_answer + lam L_route` (spec section 3), and what the config adds to it: `distill` x the divergence from
the model without poolings, `quality` x the harm that each expert would do (ours). One question per row: experts are
chosen by the question. The dense model comes from `config.init_from`, or is put together as in `experiments.vlm`.
Letters: B rows, M stages, K experts, S the slice of the batch that all experts are tried on.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.dpn.deploy import deploy
from experiments.vlm import main as vlm
from vtjax import answer
from vtjax.account import flops
from vtjax.errors import InputError, check_choice
from vtjax.methods import dpn, dpn_packed
from vtjax.models.vlm import VLM
from vtjax.ops import losses
from vtjax.ops import pooling_experts as ops
from vtjax.spec import VLMSpec
from vtjax.train import optim
from vtjax.train.task import Task

__all__ = ["build", "deploy"]

TOKENS = ("router", "answer")
MODES = ("adaptive", "random", "forced", "by_type", "off")
TRAINABLE = ("routers", "lora", "all")
LAYOUTS = ("lattice", "packed")
EXECS = ("masked", "switch", "staged")


def build(config: ConfigDict) -> Task:
    """The task of a config.

    Raises:
      InputError: settings that are not defined, rows of several questions, or as `experiments.vlm.main.build`.
    """
    settings = config.dpn
    check(config)
    base, base_init = vlm.source(config)
    spec = installed(config, base)
    given = vlm.options(config)
    model = dpn.vlm(spec, **given)
    plain, apart = VLM(spec.unreduced(), **given), settings.trainable != "routers"
    begin = teacher_init(config) if settings.distill else None
    types, stages = vlm.TYPES.get(config.data.name, ()), len(dpn.reducers(spec))
    path = tuple(settings.path)
    if settings.mode == "by_type" and len(path) != stages * len(types):
        raise InputError(
            f"config.dpn.path must hold {stages} experts for each of the types {', '.join(types) or '(none)'}, "
            f"found {path}"
        )
    learner = model
    if settings.layout == "packed":
        # In training only: the guard may take an evaluation to the dense path, for which cut rows have no room.
        known = {"forced": [path], "off": [(0,) * stages], "by_type": np.reshape(path, (-1, stages)).tolist()}
        learner = dpn_packed.vlm(spec, paths=known.get(settings.mode, ()), **given)
    group_of, balance = optim.group_of(config.optim), vlm.answer_weights(config)
    warmup, share, harm_only = (settings[name] for name in ("lam_warmup", "quality_share", "harm_only"))

    def init(key: jax.Array) -> tuple[Any, Any, Any]:
        params, _, _ = base_init(key)
        params = dpn.added(spec, params, jax.random.fold_in(key, 2))
        if begin is None:
            return params, {}, {}
        teacher = dpn.added(spec, begin(key)[0], jax.random.fold_in(key, 2))
        # Where only routers learn, the model is its own teacher, but for the token that they read.
        own = {name: teacher["bridge"][name] for name in ("router_token",) if name in teacher["bridge"]}
        return params, {"teacher": teacher if apart else own}, {}

    def routing(key: jax.Array | None, batch: Any) -> Any:
        """The knobs by which experts are chosen; without a key as at inference."""
        if settings.mode in ("forced", "off"):
            return {}  # the spec says which
        if settings.mode == "by_type":
            of_type = jnp.asarray(path, jnp.int32).reshape(len(types), stages)
            return dpn.given(spec, of_type[jnp.maximum(batch["type"][:, 0], 0)])
        if key is None and settings.mode == "random":
            return dpn.given(spec, drawn(spec, jax.random.key(config.seed), batch["index"]))
        return {} if key is None else dpn.drawing(spec, key)

    def loss(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any, key: jax.Array, step: Any) -> Any:
        draw, pick = jax.random.split(key)
        found = vlm.asked(learner, params, batch, routing(draw, batch))
        made = dpn.decisions(found.aux, spec)
        answer = vlm.mean_loss(found, batch, balance)
        warm = jnp.minimum(1.0, (step + 1) / max(warmup, 1))
        if settings.loss == "macs":
            route = over_budget(spec, batch, made, knobs["dpn.budget"])
        else:
            form, group = settings.loss, settings.route_group
            route = ops.route_loss(made["p"], made["routed"], knobs["dpn.tau"], form=form, group=group)
        # Where nobody asks a router, its loss would move the model through what it reads.
        total = answer + knobs["dpn.lam"] * warm * route if settings.mode in ("adaptive", "random") else answer
        told = {"answer": answer, "route": route, **shares(spec, batch, made)}
        told["train_top1"] = found.right.sum() / jnp.maximum(found.asked.sum(), 1.0)
        if settings.distill:
            there = frozen["teacher"] if apart else {**params, "bridge": {**params["bridge"], **frozen["teacher"]}}
            there = jax.lax.stop_gradient(there)
            known = jax.lax.stop_gradient(vlm.asked(plain, there, batch).logits)
            told["distill"] = divergence(known, found.logits, batch)
            total = total + knobs["dpn.distill"] * told["distill"]
        if settings.quality and settings.mode == "adaptive":
            told["harm"] = harm(model, params, batch, made, pick, share, harm_only)
            total = total + knobs["dpn.quality"] * told["harm"]
        return total, {name: value.mean() for name, value in told.items()}

    def evaluate(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any) -> dict[str, jax.Array]:
        found = vlm.asked(model, params, batch, routing(None, batch))
        return vlm.sums(found, batch, types, **shares(spec, batch, dpn.decisions(found.aux, spec)))

    def decisions(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any) -> dict[str, jax.Array]:
        found = vlm.asked(model, params, batch, routing(None, batch))
        made = dpn.decisions(found.aux, spec)
        spent = work(spec, made)
        names = ("choice", "p", "visual")
        asked = {"question": batch["question"][:, 0], "type": batch["type"][:, 0], "correct": found.right[:, 0]}
        ratio = shares(spec, batch, made)["mac_ratio"]
        return {**asked, **{name: made[name] for name in names}, "macs": spent, "mac_ratio": ratio}

    return Task(
        spec=spec,
        init=init,
        loss=loss,
        evaluate=evaluate,
        trainable=lambda path: group_of(path) if trained(settings.trainable, path) else None,
        knobs={f"dpn.{name}": settings[name] for name in ("tau", "budget", "lam", "distill", "quality")},
        summary=_summary(config, spec, path),
        decisions=decisions,
        relax=relaxed,
        fresh="routers" if settings.mode == "adaptive" and untaught(base) else "",
    )


def harm(model: VLM, params: Any, batch: Any, made: Any, key: jax.Array, share: float, only: bool) -> jax.Array:
    """What the answers' loss would gain from each expert of one stage, weighed by its probability: the mean over a
    slice of the batch of sum_k p_k (L_k - L_identity), with the other stages as drawn. Its gradient in p compares
    experts on the same sample, which that of the gate does not.

    Args:
      made: `dpn.decisions` of the batch.
      share: of the batch that all experts are tried on.
      only: count what an expert makes worse, not what it makes better.
    """
    rows, stages = max(1, round(share * made["choice"].shape[0])), made["choice"].shape[1]
    part = {name: value[:rows] for name, value in batch.items()}
    held, frozen = made["choice"][:rows], jax.lax.stop_gradient(params)
    stage = jax.random.randint(key, (), 0, stages)
    here = jnp.arange(stages) == stage

    def of(expert: int) -> jax.Array:
        choice = jnp.where(here[None], expert, held)
        return vlm.asked(model, frozen, part, dpn.given(model.spec, choice)).loss.sum(-1)

    harms = jnp.stack([of(expert) for expert in range(len(ops.WINDOWS))], axis=-1)
    harms = jax.lax.stop_gradient(harms - harms[:, :1])
    if only:
        harms = jnp.maximum(harms, 0.0)
    p, weight = (made[name][:rows, stage] for name in ("p", "routed"))
    return ((p * harms).sum(-1) * weight).sum() / jnp.maximum(weight.sum(), 1.0)


def teacher_init(config: ConfigDict) -> Any:
    """`init` of the model that the run started from, also where the run goes on: its own parameters are others then."""
    fresh = copy.deepcopy(config)
    fresh.workdir = ""
    return vlm.source(fresh)[1]


def drawn(spec: VLMSpec, key: jax.Array, index: jax.Array) -> jax.Array:
    """Experts of every row at random, `[B, M]`, by its number in the split: any that leaves enough tokens."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.maximum(index, 0))
    areas = jnp.asarray(ops.AREAS)
    count, choices = jnp.full(index.shape, math.prod(spec.grid)), []
    for stage, (_, reducer) in enumerate(dpn.reducers(spec)):
        open_ = ops.allowed(count, reducer.least)
        draw = jax.vmap(
            lambda k, row, s=stage: ops.sample(jax.random.fold_in(k, s), jnp.zeros((1, len(areas))), row[None])[0]
        )
        choices.append(draw(keys, open_))
        count = count // areas[choices[-1]]
    return jnp.stack(choices, axis=1)


data = vlm.data
batch_shapes = vlm.batch_shapes


def installed(config: ConfigDict, base: VLMSpec) -> VLMSpec:
    """The spec with DPN in it; as it is where a run brings its own.

    Raises:
      InputError: settings of the config that are not those under which loaded routers were learned.
    """
    settings = config.dpn
    wanted = {name: settings[name] for name in ("pool", "temperature", "detach")} | {"least": settings.n_min}
    # What a run is, its spec says, so that who loads it has the same model; but for experts by type of question.
    learns = settings.mode in ("adaptive", "random")
    run: dict[str, Any] = {
        "gate": settings.gate if learns else "off",
        "floor_at_eval": settings.floor_at_eval,
        "mode": "random" if settings.mode == "random" else "adaptive",
    }

    def settled(spec: VLMSpec) -> VLMSpec:
        dense = (0,) * len(dpn.reducers(spec))
        return dpn.settled(spec, path={"off": dense, "forced": tuple(settings.path)}.get(settings.mode, ()), **run)

    if not dpn.reducers(base):
        at, key, token = tuple(settings.at), jax.random.key(0), token_of(config, base)
        return settled(dpn.install(base, None, key, at=at, router=settings.router, token=token, **wanted)[0])
    layers = tuple(layer + 1 for layer, _ in dpn.reducers(base))
    found = {**dataclasses.asdict(dpn.reducers(base)[0][1]), "at": layers, "router": dpn.router_of(base)}
    found["token"] = "router" if base.adds_router_token else "answer"
    wanted |= {
        "router": settings.router,
        "token": settings.token,
        **({"at": tuple(settings.at)} if settings.at else {}),
    }
    for name, value in wanted.items():
        if found[name] != value:
            leaf = "n_min" if name == "least" else name
            raise InputError(
                f"config.dpn.{leaf} must be {found[name]!r}, under which the routers of config.init_from="
                f"{config.init_from!r} were learned, found {value!r}"
            )
    if found["reads"] != "router_token":
        raise InputError(
            f"config.init_from={config.init_from!r} must have routers that read their token, found reads="
            f"{found['reads']!r}: in training the last token is the answer's"
        )
    return settled(base)


def token_of(config: ConfigDict, base: VLMSpec) -> int:
    """The id that routers read; -1 = a token of their own.

    Raises:
      InputError: a template without one token in front of every answer.
    """
    if config.dpn.token == "router":
        return -1
    before = answer.template_of(base).turns["assistant"][0]
    ids = answer.tokenizer_of(base).encode(before)
    if len(ids) != 1:
        raise InputError(
            f"config.dpn.token='answer' needs a template with one token in front of an answer, found {before!r}, which "
            f"is {len(ids)}"
        )
    return ids[0]


def check(config: ConfigDict) -> None:
    """Raises InputError for numbers that no run can have."""
    settings = config.dpn
    for name, known in (
        ("token", TOKENS),
        ("mode", MODES),
        ("trainable", TRAINABLE),
        ("loss", (*ops.LOSSES, "macs")),
        ("gate", ops.GATES),
        ("layout", LAYOUTS),
        ("exec", EXECS),
    ):
        check_choice(f"config.dpn.{name}", settings[name], known)
    most = max(ops.SCALES)
    if not 0.0 <= settings.tau < most:
        raise InputError(f"config.dpn.tau must be at least 0 and below {most:.0f} halvings, found {settings.tau}")
    check_weights(config, ("lam", "distill", "quality"))
    rows, group = config.batch_size // max(config.accumulate, 1), settings.route_group
    if group < 0 or (group and (rows % group or settings.loss == "macs")):
        raise InputError(
            f"config.dpn.route_group must divide the {rows} rows of a step, or be 0, as for loss='macs', found {group}"
        )
    if settings.distill and not config.init_from:
        raise InputError("config.dpn.distill needs a model to learn from (config.init_from), found none")
    if config.data.pack != 1:
        raise InputError(f"config.data.pack must be 1, as experts are chosen by the question, found {config.data.pack}")
    if settings.lam_warmup < 0:
        raise InputError(f"config.dpn.lam_warmup must be 0 or more, found {settings.lam_warmup}")
    if settings.mode not in ("adaptive", "random"):
        for name, without in (("trainable", ("lora", "all")), ("quality", (0.0,))):
            if settings[name] not in without:
                raise InputError(
                    f"config.dpn.{name} must be {' or '.join(map(str, without))} where config.dpn.mode="
                    f"{settings.mode!r} asks no router, found {settings[name]}"
                )
    if settings.trainable == "lora" and not config.model.lora.rank:
        raise InputError("config.dpn.trainable='lora' needs config.model.lora.rank, found 0")
    if any(expert not in range(len(ops.WINDOWS)) for expert in settings.path):
        raise InputError(f"config.dpn.path must hold numbers of experts, 0..2, found {settings.path}")
    if (settings.mode in ("forced", "by_type")) != bool(settings.path):
        raise InputError(
            f"config.dpn.path belongs to mode='forced' and 'by_type', found {settings.path} for {settings.mode!r}"
        )


def untaught(spec: VLMSpec) -> bool:
    """Whether a model has no routers, or such as nobody has asked: of forced paths."""
    made = [reducer for _, reducer in dpn.reducers(spec)]
    return not made or any(reducer.mode == "forced" for reducer in made)


def check_weights(config: ConfigDict, weights: Sequence[str]) -> None:
    """Raises InputError for weights of the loss below 0, and shares outside of (0, 1]."""
    for name in weights:
        if not 0.0 <= config.dpn[name] < float("inf"):
            raise InputError(f"config.dpn.{name} must be 0 or more, found {config.dpn[name]}")
    for name, what in (("budget", ", a share of the dense work"), ("quality_share", "")):
        if not 0.0 < config.dpn[name] <= 1.0:
            raise InputError(f"config.dpn.{name} must be in (0, 1]{what}, found {config.dpn[name]}")


def trained(what: str, path: str) -> bool:
    """Whether `config.dpn.trainable` trains a parameter."""
    if path.endswith(f"/{dpn.NAME}/relax"):
        return False
    own = f"/{dpn.NAME}/" in path or path.endswith("/router_token")
    return own or what == "all" or (what == "lora" and "/lora_" in path)


def given_tokens(spec: VLMSpec, batch: Any) -> tuple[jax.Array, jax.Array]:
    """Tokens of every row that enter the decoder, and visual ones, in the text or read by it, `[B]` float32."""
    live = batch["segments"] >= 0
    images = ((batch["input_ids"] == spec.image_token) & live).sum(-1, dtype=jnp.float32)
    return live.sum(-1, dtype=jnp.float32), images * (spec.visual_tokens / spec.placeholders)


def work(spec: VLMSpec, made: Any) -> jax.Array:
    """Per row: the decoder's MACs with these decisions."""
    apart = {}
    if spec.bridge.cross is not None:
        apart["visual"] = jnp.concatenate([made["visual_before"][:, :1], made["visual"]], axis=1)
    return dpn.macs(spec, made["live_before"][:, 0], made["live"], **apart)


def shares(spec: VLMSpec, batch: Any, made: Any) -> dict[str, jax.Array]:
    """Per row: the decoder's MACs over those of the model that reads every patch and pools nothing, and mean halvings
    per stage."""
    sigma = jnp.asarray(ops.SCALES)[made["choice"]].mean(-1)
    return {"mac_ratio": work(spec, made) / jnp.maximum(dense_macs(spec, batch), 1.0), "halvings": sigma}


def dense_macs(spec: VLMSpec, batch: Any) -> jax.Array:
    """Per row: MACs of the model that reads every patch and pools nothing, also where the bridge pools."""
    tokens, visual = given_tokens(spec, batch)
    whole = visual * (math.prod(spec.tower.grid) / math.prod(spec.grid))
    stages = len(dpn.reducers(spec))
    if spec.bridge.cross is not None:
        return dpn.macs(spec, tokens, jnp.repeat(tokens[:, None], stages, 1), jnp.repeat(whole[:, None], stages + 1, 1))
    tokens = tokens + whole - visual
    return dpn.macs(spec, tokens, jnp.repeat(tokens[:, None], stages, axis=1))


def over_budget(spec: VLMSpec, batch: Any, made: Any, budget: jax.Array) -> jax.Array:
    """By how much the work that routers are to be expected to take is above a share of the dense one, a mean over the
    batch. The release's hinge counts halvings, which save little where they come late (ours)."""
    tokens, visual = given_tokens(spec, batch)
    text = tokens if spec.bridge.cross is not None else tokens - visual
    routed = made["routed"].any(-1).astype(jnp.float32)
    spent = dpn.expected_macs(spec, text, visual, made["p"])
    ratio = (spent / jnp.maximum(dense_macs(spec, batch), 1.0) * routed).sum() / jnp.maximum(routed.sum(), 1.0)
    return jnp.maximum(ratio - budget, 0.0)


def divergence(known: jax.Array, logits: jax.Array, batch: Any) -> jax.Array:
    """Kullback-Leibler divergence from the teacher's words, mean over the learned slots."""
    weight = (batch["learned"] >= 0).astype(jnp.float32)
    each = losses.divergence(known.reshape(-1, known.shape[-1]), logits.reshape(-1, logits.shape[-1]))
    return jnp.where(weight > 0, each.reshape(weight.shape), 0.0).sum() / jnp.maximum(weight.sum(), 1.0)


def relaxed(params: Any, amount: float) -> Any:
    """Parameters with which routers lean towards identity; 1 = the dense path."""
    decoder = params["decoder"]
    return {**params, "decoder": {**decoder, dpn.NAME: {**decoder[dpn.NAME], "relax": jnp.float32(amount)}}}


def _summary(config: ConfigDict, spec: VLMSpec, path: tuple[int, ...]) -> dict[str, Any]:
    stages = len(dpn.reducers(spec))
    forced = {"path": list(path)} if path else {}
    return {
        "dense_macs_per_prompt": dpn.path_macs(spec, (0,) * stages, flops.QUESTION),
        "least_macs_per_prompt": dpn.path_macs(spec, (2,) * stages, flops.QUESTION),
        "params": sum(row.params for row in flops.layers(spec)),
        "mode": config.dpn.mode,
        **forced,
        "trainable": config.dpn.trainable,
        "init_from": config.init_from,
        **({"stand_ins": list(spec.stand_ins)} if spec.stand_ins else {}),
    }
