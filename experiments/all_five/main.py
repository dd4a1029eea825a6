# SPDX-License-Identifier: Apache-2.0
"""All five methods in one multimodal model, one after the other: every run adds one to the model it starts from.

    base     trained dense; attention to the frames is distributed over `config.mesh.context` devices (LV-XAttn), in
             this and in every later step
    dgmr     neurons of the tower's MLPs that repeat each other are gone; all weights are trained on
    ltmp     the tower's tokens are merged and pruned by thresholds, under a budget of its MACs
    dpn      a router after some decoder layers pools the visual tokens of later ones, under a budget of the decoder's
    search   adapters, and a bandit that looks for layers of the decoder to leave out (DAS)
    das      these are gone, an adapter in the place of each; fresh adapters alone are trained

What a step adds stays: the spec names it, and the loss keeps its budget as long as weights are trained.
Letters: B rows, F frames of a video, S stages of DPN, L layers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.das import deployed, phases
from experiments.dpn import main as dpn_task
from experiments.ltmp import settle
from experiments.lvxattn import main as lvxattn
from experiments.vlm import main as vlm
from vtjax import methods
from vtjax.account import flops
from vtjax.errors import InputError, check_choice
from vtjax.methods import das, dgmr, dpn, ltmp
from vtjax.models.vlm import VLM
from vtjax.ops import token_reduction
from vtjax.spec import ViTSpec, VLMSpec
from vtjax.train import checkpoint, optim
from vtjax.train.state import params_sha256
from vtjax.train.task import Data, Task

STEPS = ("base", "dgmr", "ltmp", "dpn", "search", "das")

Convert = Callable[[Any, jax.Array], Any]
"""`(parameters of what a run starts from, key) -> parameters`."""


def build(config: ConfigDict) -> Task:
    """The task of a step.

    Raises:
      InputError: a step without what comes before it, settings of a method that are not defined for the model, or as
        `experiments.vlm.main.build`.
    """
    check(config)
    base, base_init = vlm.source(config)
    if base.bridge.cross is None:
        raise InputError("config.model.bridge.cross must be a form of cross-attention (LV-XAttn), found 'none'")
    begun = checkpoint.begun(config.workdir) is not None
    there = has(base, config.add)
    spec, convert = (_unchanged if begun or there else ADD[config.add])(config, base, base_init)
    if there and config.add == "das":
        phases.check_gone(config, deployed.gone(base.decoder), base, config.workdir if begun else config.init_from)
    model = methods.build(spec, **lvxattn.options(config))
    types, balance, group_of = vlm.types_of(config), vlm.answer_weights(config), optim.group_of(config.optim)
    searching = config.add == "search"
    routes = bool(dpn.reducers(spec)) and config.add not in ("search", "das")  # experts are drawn, routers learn
    learns_routes = routes and config.dpn.quality > 0

    def init(key: jax.Array) -> tuple[Any, Any, Any]:
        params = completed(spec, convert(base_init(key)[0], key), jax.random.fold_in(key, 3))
        return params, {}, search.start(before) if search else {}

    def knobs_of(key: jax.Array | None, extra: Any) -> dict[str, Any]:
        """How layers are skipped, and with a key how experts are drawn; without one as at inference."""
        found: dict[str, Any] = {}
        if searching:
            found["skipped"] = extra["skip"]
        if key is not None and routes:
            found |= dpn.drawing(spec, key)
        return found

    def loss(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any, key: jax.Array, step: Any) -> Any:
        found = vlm.asked(model, params, batch, knobs_of(key, extra))
        total = answer = vlm.mean_loss(found, batch, balance)
        told = {"answer": answer, "train_top1": found.right.sum() / jnp.maximum(found.asked.sum(), 1.0)}
        if model.tower_reducers:
            told["tower_ratio"] = tower_ratio(model, found.aux).mean()
            total = total + knobs["ltmp.budget_weight"] * (told["tower_ratio"] - knobs["ltmp.target"]) ** 2
        if dpn.reducers(spec):
            told["over_budget"] = over_budget(model, batch, found.aux, knobs["dpn.budget"])
            total = total + knobs["dpn.lam"] * told["over_budget"]
        if learns_routes:
            made, pick = dpn.decisions(found.aux, spec), jax.random.fold_in(key, 1)
            told["harm"] = dpn_task.harm(model, params, batch, made, pick, config.dpn.quality_share, False)
            total = total + knobs["dpn.quality"] * told["harm"]
        return total, told

    def evaluate(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any) -> dict[str, jax.Array]:
        if searching:
            extra = {"skip": phases.most_preferred(extra["preference"], config.das.skips, *phases.arms_of(spec))}
        found = vlm.asked(model, params, batch, knobs_of(None, extra))
        return vlm.sums(found, batch, types, **work(model, batch, found.aux))

    def decisions(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any) -> dict[str, jax.Array]:
        found = vlm.asked(model, params, batch, knobs_of(None, extra))
        spent = work(model, batch, found.aux)
        made = {"question": batch["question"][:, 0], "type": batch["type"][:, 0], "correct": found.right[:, 0]}
        if dpn.reducers(spec):
            chosen = dpn.decisions(found.aux, spec)
            made |= {name: chosen[name] for name in ("choice", "p", "visual")}
        return {**made, **spent, "macs": spent["tower_macs"] + spent["decoder_macs"]}

    @jax.jit
    def validation(params: Any, batch: Any, skip: Any) -> jax.Array:
        return vlm.mean_loss(vlm.asked(model, params, batch, {"skipped": skip}), batch, balance)

    @jax.jit
    def measured(params: Any, batch: Any) -> jax.Array:
        return tower_ratio(model, vlm.asked(model, params, batch).aux).mean()

    def settled(params: Any, frozen: Any, extra: Any, knobs: Any, draw: Any) -> Any:
        """The thresholds of the tower, moved together until its MACs are the target's."""
        batches = [draw("train", index) for index in range(SETTLE)]

        def ratio(amount: float) -> float:
            moved = with_relaxed_tower(params, amount)
            return float(np.mean([jax.device_get(measured(moved, batch)) for batch in batches]))

        amount, reached = settle.amount(ratio, config.ltmp.target)
        if jax.process_index() == 0:
            print(f"settled: thresholds {-amount:+.2%} of the way, {reached:.4f} of the tower's MACs", file=sys.stderr)
        return with_relaxed_tower(params, amount)

    search, before = None, None
    if searching:
        before = phases.preferences(config.das.preferences, spec) if config.das.preferences else None
        layers, depth = phases.arms_of(spec)
        search = phases.Search(
            phases.bandit_of(config, len(layers)), config.seed, config.steps, validation, layers=layers, depth=depth
        )

    def trainable(path: str) -> str | None:
        return None if path.endswith(f"/{dpn.NAME}/relax") else phases.trained(group_of)(path)

    return Task(
        spec=spec,
        init=init,
        loss=loss,
        evaluate=evaluate,
        trainable=trainable,
        after_step=search,
        finish=settled if config.add == "ltmp" else None,
        knobs={
            "ltmp.target": config.ltmp.target,
            "ltmp.budget_weight": config.ltmp.budget_weight,
            "dpn.budget": config.dpn.budget,
            "dpn.lam": config.dpn.lam,
            "dpn.quality": config.dpn.quality,
        },
        bounds=lambda path: (0.0, 1.0) if path.startswith(f"tower/{ltmp.NAME}/") else None,
        decisions=None if searching else decisions,
        relax=relaxed,
        summary={"add": config.add, "methods": present(spec)},
        conclusion=None if search is None else search.conclusion,
        fresh="" if begun or has(base, config.add) else FRESH.get(config.add, ""),
        frames=lvxattn.OVER,
    )


SETTLE = 8  # batches
FRESH = {"dpn": "routers", "search": "adapters", "das": "adapters"}
"""What a step adds that says nothing before it is trained."""

FIXED = {"by": "bandit", "ramp": 0, "fixed_val_batch": False, "keep": False}
"""Leaves of DAS that have one value in this experiment."""


def check(config: ConfigDict) -> None:
    """Raises InputError for settings that no run can have."""
    check_choice("config.add", config.add, STEPS)
    check_choice("config.dpn.token", config.dpn.token, dpn_task.TOKENS)
    dpn_task.check_weights(config, ("lam", "quality"))
    if not 0 < config.ltmp.target <= 1 or config.ltmp.budget_weight < 0:
        raise InputError(
            f"config.ltmp.target must be in (0, 1] and config.ltmp.budget_weight 0 or more, found "
            f"{config.ltmp.target} and {config.ltmp.budget_weight}"
        )
    # The leaves of all steps are read, so that one set of overrides serves the whole chain.
    for name in ("dgmr", "ltmp", "dpn"):
        _ = {leaf: config[name][leaf] for leaf in config[name]}
    phases.check(config, ("search", "finetune"))
    for name, only in FIXED.items():
        if (found := config.das[name]) != only:
            raise InputError(
                f"config.das.{name} must be {only!r} here (experiments/das has the others), found {found!r}"
            )
    if config.add != "base" and not config.init_from:
        raise InputError(f"config.init_from must be the workdir of the step before {config.add!r}, found ''")
    if config.add != "base" and config.data.pack != 1:
        raise InputError(f"config.data.pack must be 1, as experts are chosen by the question, found {config.data.pack}")


def has(spec: VLMSpec, add: str) -> bool:
    """Whether a model has what a step adds; it is then trained on, or evaluated."""
    if add in ("search", "das"):
        return das.is_installed(spec.decoder) and (add == "das") == bool(deployed.gone(spec.decoder))
    return {
        "base": True,
        "dgmr": any(step.operation.startswith("dgmr.") for step in spec.tower.lineage),
        "ltmp": spec.tower != spec.tower.unreduced(),
        "dpn": bool(dpn.reducers(spec)),
    }[add]


def present(spec: VLMSpec) -> list[str]:
    """The methods that a spec names, but for LV-XAttn, which is a matter of the mesh."""
    there = [name for name in ("dgmr", "ltmp", "dpn") if has(spec, name)]
    return [*there, "das"] if das.is_installed(spec.decoder) else there


def _unchanged(config: ConfigDict, base: VLMSpec, init: Any) -> tuple[VLMSpec, Convert]:
    return base, lambda params, key: params


def _with_dgmr(config: ConfigDict, base: VLMSpec, init: Any) -> tuple[VLMSpec, Convert]:
    params = init(jax.random.key(config.seed))[0]
    parent = params_sha256(params["tower"])
    tower, pruned = dgmr.prune(
        plain(base.tower),
        params["tower"],
        keep=config.dgmr.keep,
        score=config.dgmr.score,
        seed=config.seed,
        parent=parent,
    )
    return base.edit(tower=tower), lambda params, key: {**params, "tower": pruned}


def _with_ltmp(config: ConfigDict, base: VLMSpec, init: Any) -> tuple[VLMSpec, Convert]:
    settings, tower = config.ltmp, plain(base.tower)
    if tower.pooling == "none":
        # The decoder reads tokens, whatever the tower would pool.
        tower = tower.edit(pooling="mean")
    merge, prune = (None if (value := settings[f"{name}_threshold"]) == -1.0 else value for name in ("merge", "prune"))
    reduced, thresholds = ltmp.install(
        tower,
        variant=settings.variant,
        tau=settings.tau,
        similarity=settings.similarity,
        merge_threshold=merge,
        prune_threshold=prune,
        dtype=config.dtype,
    )

    def convert(params: Any, key: jax.Array) -> Any:
        return {**params, "tower": {**params["tower"], ltmp.NAME: thresholds}}

    return base.edit(tower=reduced), convert


def _with_dpn(config: ConfigDict, base: VLMSpec, init: Any) -> tuple[VLMSpec, Convert]:
    settings = config.dpn
    options = {name: settings[name] for name in ("pool", "router", "temperature", "gate")}
    options |= {"at": tuple(settings.at), "token": dpn_task.token_of(config, base)}
    spec, _ = dpn.install(base, None, jax.random.key(0), least=settings.n_min, **options)
    return spec, lambda params, key: params


def _with_search(config: ConfigDict, base: VLMSpec, init: Any) -> tuple[VLMSpec, Convert]:
    style, arms = phases.style_of(config), das.arms(base)
    # Any choice of the search must leave a model that is defined.
    worst = arms[len(arms) - config.das.skips :] if config.das.skips <= len(arms) else ()
    dpn.reducers(das.remove(base, None, worst)[0])
    spec, _ = das.install(base, None, style, None)
    return spec, lambda params, key: das.install(base, params, style, key)[1]


def _with_das(config: ConfigDict, base: VLMSpec, init: Any) -> tuple[VLMSpec, Convert]:
    if not das.is_installed(base.decoder):
        raise InputError(f"config.init_from must be the workdir of a search, found {config.init_from!r}")
    style, gone = phases.style_of(config), phases.chosen(config, base)
    spec, _ = das.remove(das.install(base, None, style, None)[0], None, gone)

    def convert(params: Any, key: jax.Array) -> Any:
        made, fresh = das.install(base, params, style, key)  # those of the search are not kept, as in the release
        return das.remove(made, fresh, gone)[1]

    return spec, convert


ADD = {
    "dgmr": _with_dgmr,
    "ltmp": _with_ltmp,
    "dpn": _with_dpn,
    "search": _with_search,
    "das": _with_das,
}


def completed(spec: VLMSpec, params: Any, key: jax.Array) -> Any:
    """The parameters with fresh ones of the methods that the spec names and that have none: those of a run that goes
    on, before its checkpoint is read."""
    made = ltmp.reducers(plain(spec.tower))
    if made and ltmp.NAME not in params["tower"]:
        starts = ltmp.starts(made[0][1].variant, spec.tower.depth)
        params = {**params, "tower": {**params["tower"], ltmp.NAME: starts}}
    if dpn.reducers(spec):
        params = dpn.added(spec, params, key)
    if das.is_installed(spec.decoder):
        params = {**params, "decoder": das.added(spec.decoder, params["decoder"], key)}
    return params


def relaxed(params: Any, amount: float) -> Any:
    """Parameters that decide less aggressively in tower and decoder; 1 = neither merges, prunes nor pools."""
    if ltmp.NAME in params["tower"]:
        params = with_relaxed_tower(params, amount)
    return dpn_task.relaxed(params, amount) if dpn.NAME in params["decoder"] else params


def with_relaxed_tower(params: Any, amount: float) -> Any:
    """Parameters whose tower merges and prunes less, see `ltmp.relaxed`."""
    tower = params["tower"]
    return {**params, "tower": {**tower, ltmp.NAME: ltmp.relaxed(tower[ltmp.NAME], amount)}}


def plain(tower: Any) -> ViTSpec:
    """A tower without tiles.

    Raises:
      InputError: one with tiles, which neither DGMR nor LTMP covers.
    """
    if not isinstance(tower, ViTSpec):
        raise InputError(f"the tower must be a ViTSpec, which DGMR and LTMP know, found a {type(tower).__name__}")
    return tower


def tower_ratio(model: VLM, aux: Any) -> jax.Array:
    """MACs of the tower's blocks over those of the same tower without reducers, per frame `[B F]`."""
    spec = plain(model.tower.spec)
    fractions = ltmp.alive_fractions({"blocks": aux["tower"]}, spec.tokens)
    return token_reduction.budget(fractions, spec.tokens, jnp.asarray(ltmp.costs(spec)))[0]


def over_budget(model: VLM, batch: Any, aux: Any, budget: jax.Array) -> jax.Array:
    """By how much the decoder's expected MACs are above a share of those without pooling, which reads what the tower
    left throughout: a hinge on the batch's mean."""
    spec, made = model.spec, dpn.decisions(aux, model.spec)
    tokens, left = (batch["segments"] >= 0).sum(-1, dtype=jnp.float32), entering(model, batch, aux)
    stages = made["p"].shape[1]
    text = jnp.repeat(tokens[:, None], stages, 1)
    dense = dpn.macs(spec, tokens, text, jnp.repeat(left, stages + 1, 1))
    # Poolings begin from the whole grid; before the first stage what the tower left is read.
    grid = made["visual_before"][:, 0]
    found, first = dpn.costs(spec), dpn.stretches(spec)[0]
    read, pair = found[first.start : first.stop, 2:].sum(0)
    spared = (read + pair * tokens) * (grid - left[:, 0])
    spent = dpn.expected_macs(spec, tokens, grid, made["p"]) - spared
    return jnp.maximum((spent / jnp.maximum(dense, 1.0)).mean() - budget, 0.0)


def entering(model: VLM, batch: Any, aux: Any) -> jax.Array:
    """Visual tokens that the tower left of all frames of a row's video, `[B, 1]` float32."""
    frames = batch["image_number"] > 0
    if not model.tower_reducers:
        return math.prod(model.spec.grid) * frames.sum(-1, keepdims=True, dtype=jnp.float32)
    prefix = plain(model.tower.spec).prefix
    alive = (aux["tower"][-1]["decisions"]["alive"][:, prefix:] > 0.5).sum(-1, dtype=jnp.float32)
    left = model.frames.split(alive[:, None], len(frames))[:, : frames.shape[1], 0]
    return (left * frames).sum(-1, keepdims=True)


def work(model: VLM, batch: Any, aux: Any) -> dict[str, jax.Array]:
    """MACs of every row `[B]`, of live tokens: of the tower for all frames of its video, and of the decoder with its
    cross-attention and adapters. Projector, routers and head are not counted."""
    spec, tower = model.spec, plain(model.tower.spec)
    frames = batch["image_number"] > 0
    dense = flops.macs(tower)
    each = jnp.full(frames.shape, float(dense))
    if model.tower_reducers:
        ratio = model.frames.split(tower_ratio(model, aux), len(frames))[:, : frames.shape[1]]
        blocks = ltmp.dense_macs(tower)
        each = dense - blocks + blocks * ratio
    tokens = (batch["segments"] >= 0).sum(-1, dtype=jnp.float32)
    visual = entering(model, batch, aux)
    if dpn.reducers(spec):
        visual = jnp.concatenate([visual, dpn.decisions(aux, spec)["visual"]], axis=1)
    text = jnp.repeat(tokens[:, None], visual.shape[1] - 1, 1)
    decoder = dpn.macs(spec, tokens, text, visual)
    if das.is_installed(spec.decoder):
        decoder = decoder + das.adapter_cost(spec.decoder, 1)[1] * tokens
    return {"tower_macs": (each * frames).sum(-1), "decoder_macs": decoder, "visual": visual[:, -1]}


def data(config: ConfigDict, task: Task) -> Data:
    """The questions, in a search with validation batches.

    Raises:
      InputError: as `experiments.vlm.main.data` and `experiments.das.phases.with_validation`.
    """
    return phases.with_validation(config, lvxattn.data(config, task), lambda held: lvxattn.data(held, task))


batch_shapes = lvxattn.batch_shapes
deploy = lvxattn.deploy
