# SPDX-License-Identifier: Apache-2.0
"""DPN: pooling experts in the decoder of a multimodal model, learned from questions; the method is `vtjax.methods.dpn`.

The loss is `L_answer + lam L_route` (spec section 3), and what the config adds to it: `distill` x the divergence from
the model without poolings, `quality` x the harm that each expert would do (ours). One question per row: experts are
chosen by the question. The dense model comes from `config.init_from`, or is put together as in `experiments.vlm`.
Letters: B rows, M stages, K experts, S the slice of the batch that all experts are tried on.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments.vlm import main as vlm
from vtjax.account import flops
from vtjax.errors import InputError, check_choice
from vtjax.methods import dpn
from vtjax.models.vlm import VLM
from vtjax.ops import losses
from vtjax.ops import pooling_experts as ops
from vtjax.spec import VLMSpec
from vtjax.train import optim
from vtjax.train.task import Task

MODES = ("adaptive", "random", "forced", "by_type", "off")
TRAINABLE = ("routers", "lora", "all")


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
    run = {"gate": settings.gate, "floor_at_eval": settings.floor_at_eval}
    if settings.mode == "random":
        run["mode"] = "random"
    model = dpn.vlm(spec, **given, **(run if settings.mode in ("adaptive", "random") else {"gate": "off"}))
    plain, teacher_lies = VLM(spec.unreduced(), **given), settings.trainable != "routers"
    types, stages = vlm.TYPES.get(config.data.name, ()), len(dpn.reducers(spec))
    path = (0,) * stages if settings.mode == "off" else tuple(settings.path)
    if settings.mode == "by_type" and len(path) != stages * len(types):
        raise InputError(
            f"config.dpn.path must hold {stages} experts for each of the types {', '.join(types) or '(none)'}, "
            f"found {path}"
        )
    group_of, balance = optim.group_of(config.optim), vlm.answer_weights(config)
    warmup, share, harm_only = (settings[name] for name in ("lam_warmup", "quality_share", "harm_only"))

    def init(key: jax.Array) -> tuple[Any, Any, Any]:
        params, _, _ = base_init(key)
        params = dpn.added(spec, params, jax.random.fold_in(key, 2))
        frozen = {"teacher": params} if settings.distill and teacher_lies else {}
        return params, frozen, {}

    def routing(key: jax.Array | None, batch: Any) -> Any:
        """The knobs by which experts are chosen; without a key as at inference."""
        if settings.mode in ("forced", "off"):
            return dpn.forced(spec, path)
        if settings.mode == "by_type":
            of_type = jnp.asarray(path, jnp.int32).reshape(len(types), stages)
            return dpn.given(spec, of_type[jnp.maximum(batch["type"][:, 0], 0)])
        if key is None and settings.mode == "random":
            key = jax.random.fold_in(jax.random.key(config.seed), jnp.maximum(batch["index"][0], 0))
        return {} if key is None else dpn.drawing(spec, key)

    def loss(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any, key: jax.Array, step: Any) -> Any:
        draw, pick = jax.random.split(key)
        found = vlm.asked(model, params, batch, routing(draw, batch))
        made = dpn.decisions(found.aux, spec)
        answer = vlm.mean_loss(found, batch, balance)
        warm = jnp.minimum(1.0, (step + 1) / max(warmup, 1))
        if settings.loss == "macs":
            route = over_budget(spec, batch, made, knobs["dpn.budget"])
        else:
            route = ops.route_loss(made["p"], made["routed"], knobs["dpn.tau"], form=settings.loss)
        total = answer + knobs["dpn.lam"] * warm * route
        told = {"answer": answer, "route": route, **shares(spec, batch, made)}
        told["train_top1"] = found.right.sum() / jnp.maximum(found.asked.sum(), 1.0)
        if settings.distill:
            there = jax.lax.stop_gradient(frozen["teacher"] if teacher_lies else params)
            known = jax.lax.stop_gradient(vlm.asked(plain, there, batch).logits)
            told["distill"] = divergence(known, found.logits, batch)
            total = total + knobs["dpn.distill"] * told["distill"]
        if settings.quality and settings.mode == "adaptive":
            told["harm"] = harm(params, batch, made, pick)
            total = total + knobs["dpn.quality"] * told["harm"]
        return total, {name: value.mean() for name, value in told.items()}

    def harm(params: Any, batch: Any, made: Any, key: jax.Array) -> jax.Array:
        """What the answers' loss would gain from each expert of one stage, weighed by its probability: the mean over a
        slice of the batch of sum_k p_k (L_k - L_identity), with the other stages as drawn. Its gradient in p compares
        experts on the same sample, which that of the gate does not."""
        rows = max(1, round(share * made["choice"].shape[0]))
        part = {name: value[:rows] for name, value in batch.items()}
        held, frozen = made["choice"][:rows], jax.lax.stop_gradient(params)
        stage = jax.random.randint(key, (), 0, stages)
        here = jnp.arange(stages) == stage

        def of(expert: int) -> jax.Array:
            choice = jnp.where(here[None], expert, held)
            return vlm.asked(model, frozen, part, dpn.given(spec, choice)).loss.sum(-1)

        harms = jnp.stack([of(expert) for expert in range(len(ops.WINDOWS))], axis=-1)
        harms = jax.lax.stop_gradient(harms - harms[:, :1])
        if harm_only:
            harms = jnp.maximum(harms, 0.0)
        p, weight = (made[name][:rows, stage] for name in ("p", "routed"))
        return ((p * harms).sum(-1) * weight).sum() / jnp.maximum(weight.sum(), 1.0)

    def evaluate(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any) -> dict[str, jax.Array]:
        found = vlm.asked(model, params, batch, routing(None, batch))
        return vlm.sums(found, batch, types, **shares(spec, batch, dpn.decisions(found.aux, spec)))

    def decisions(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any) -> dict[str, jax.Array]:
        found = vlm.asked(model, params, batch, routing(None, batch))
        made = dpn.decisions(found.aux, spec)
        spent = dpn.macs(spec, text_tokens(batch), made["live"])
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
    )


data = vlm.data
batch_shapes = vlm.batch_shapes


def installed(config: ConfigDict, base: VLMSpec) -> VLMSpec:
    """The spec with DPN in it; as it is where a run brings its own.

    Raises:
      InputError: settings of the config that are not those under which loaded routers were learned.
    """
    settings = config.dpn
    wanted = {name: settings[name] for name in ("pool", "temperature", "detach")} | {"least": settings.n_min}
    if not dpn.reducers(base):
        return dpn.install(
            base, None, jax.random.key(0), at=tuple(settings.at), router=settings.router, gate=settings.gate,
            floor_at_eval=settings.floor_at_eval, **wanted,
        )[0]  # fmt: skip
    layers = tuple(layer + 1 for layer, _ in dpn.reducers(base))
    found = {**dataclasses.asdict(dpn.reducers(base)[0][1]), "at": layers, "router": dpn.router_of(base)}
    wanted |= {"router": settings.router, **({"at": tuple(settings.at)} if settings.at else {})}
    for name, value in wanted.items():
        if found[name] != value:
            leaf = "n_min" if name == "least" else name
            raise InputError(
                f"config.dpn.{leaf} must be {found[name]!r}, under which the routers of config.init_from="
                f"{config.init_from!r} were learned, found {value!r}"
            )
    return base


def check(config: ConfigDict) -> None:
    """Raises InputError for numbers that no run can have."""
    settings = config.dpn
    for name, known in (
        ("mode", MODES),
        ("trainable", TRAINABLE),
        ("loss", (*ops.LOSSES, "macs")),
        ("gate", ops.GATES),
    ):
        check_choice(f"config.dpn.{name}", settings[name], known)
    most = max(ops.SCALES)
    if not 0.0 <= settings.tau < most:
        raise InputError(f"config.dpn.tau must be at least 0 and below {most:.0f} halvings, found {settings.tau}")
    if not 0.0 < settings.budget <= 1.0:
        raise InputError(f"config.dpn.budget must be in (0, 1], a share of the dense work, found {settings.budget}")
    for name in ("lam", "distill", "quality"):
        if not 0.0 <= settings[name] < float("inf"):
            raise InputError(f"config.dpn.{name} must be 0 or more, found {settings[name]}")
    if not 0.0 < settings.quality_share <= 1.0:
        raise InputError(f"config.dpn.quality_share must be in (0, 1], found {settings.quality_share}")
    if config.data.pack != 1:
        raise InputError(f"config.data.pack must be 1, as experts are chosen by the question, found {config.data.pack}")
    if settings.trainable == "lora" and not config.model.lora.rank:
        raise InputError("config.dpn.trainable='lora' needs config.model.lora.rank, found 0")
    if any(expert not in range(len(ops.WINDOWS)) for expert in settings.path):
        raise InputError(f"config.dpn.path must hold numbers of experts, 0..2, found {settings.path}")
    if (settings.mode in ("forced", "by_type")) != bool(settings.path):
        raise InputError(
            f"config.dpn.path belongs to mode='forced' and 'by_type', found {settings.path} for {settings.mode!r}"
        )


def trained(what: str, path: str) -> bool:
    """Whether `config.dpn.trainable` trains a parameter."""
    if path.endswith(f"/{dpn.NAME}/relax"):
        return False
    own = f"/{dpn.NAME}/" in path or path.endswith("/router_token")
    return own or what == "all" or (what == "lora" and "/lora_" in path)


def text_tokens(batch: Any) -> jax.Array:
    """Live tokens of every row, images included, `[B]` float32."""
    return (batch["segments"] >= 0).sum(-1, dtype=jnp.float32)


def shares(spec: VLMSpec, batch: Any, made: Any) -> dict[str, jax.Array]:
    """Per row: the decoder's MACs over those of the model that reads every patch and pools nothing, and mean halvings
    per stage."""
    start = text_tokens(batch)
    dense = dense_macs(spec, start)
    sigma = jnp.asarray(ops.SCALES)[made["choice"]].mean(-1)
    return {"mac_ratio": dpn.macs(spec, start, made["live"]) / jnp.maximum(dense, 1.0), "halvings": sigma}


def dense_macs(spec: VLMSpec, start: jax.Array) -> jax.Array:
    """Per row: MACs of the model that reads every patch and pools nothing, also where the bridge pools."""
    whole = start + math.prod(spec.tower.grid) - math.prod(spec.grid)
    return dpn.macs(spec, whole, jnp.repeat(whole[:, None], len(dpn.reducers(spec)), axis=1))


def over_budget(spec: VLMSpec, batch: Any, made: Any, budget: jax.Array) -> jax.Array:
    """By how much the work that routers are to be expected to take is above a share of the dense one, a mean over the
    batch. The release's hinge counts halvings, which save little where they come late (ours)."""
    start, routed = text_tokens(batch), made["routed"].any(-1).astype(jnp.float32)
    visual = ((batch["input_ids"] == spec.image_token) & (batch["segments"] >= 0)).sum(-1, dtype=jnp.float32)
    spent = dpn.expected_macs(spec, start - visual, visual, made["p"])
    dense = dense_macs(spec, start)
    ratio = (spent / jnp.maximum(dense, 1.0) * routed).sum() / jnp.maximum(routed.sum(), 1.0)
    return jnp.maximum(ratio - budget, 0.0)


def divergence(known: jax.Array, logits: jax.Array, batch: Any) -> jax.Array:
    """Kullback-Leibler divergence from the teacher's words, mean over the learned slots."""
    weight = (batch["learned"] >= 0).astype(jnp.float32)
    each = losses.divergence(known.reshape(-1, known.shape[-1]), logits.reshape(-1, logits.shape[-1]))
    return (each.reshape(weight.shape) * weight).sum() / jnp.maximum(weight.sum(), 1.0)


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
