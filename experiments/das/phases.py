# SPDX-License-Identifier: Apache-2.0
"""DAS's two phases, whatever model is searched: what happens between steps, and the tasks (spec section 2).

A phase needs four functions of a model, `Model`; of which the decoder's are in `main`, those of fusion encoders in
`fusion`. The method is `vtjax.methods.das`, the bandit `vtjax.ops.bandit`. Of several micro-batches in a step
(`config.accumulate`) each skips what it draws for itself, while `config.das.every` counts steps.
Letters: b rows, n arms, L layers (modules), of which the arms are all or some, m skipped ones.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from ml_collections import ConfigDict

from vtjax import paths
from vtjax.errors import InputError, check_choice
from vtjax.methods import das
from vtjax.models.adapters import STYLES, Style
from vtjax.ops import bandit
from vtjax.ops.bandit import Bandit, State
from vtjax.spec import FusionSpec, Spec, skip_list
from vtjax.train import checkpoint, optim
from vtjax.train.task import Batch, Data, Task

BY = ("bandit", "greedy")
_RANDOM = 2  # its stream of random numbers; the bandit's are 0 and 1


@dataclasses.dataclass(frozen=True)
class Model:
    """What a phase knows of a model and its data. All are traced; `skip` `[L]` is None where modules are gone for good.

    Attributes:
      loss: `(params, batch, skip, key) -> (scalar, metrics)`, a mean over rows; key None = no dropout.
      sums: `(params, batch, skip) -> sums`, see `Task.evaluate`.
      decisions: `(params, batch, skip) -> rows`, see `Task.decisions`; with `macs` `[b]`.
    """

    loss: Callable[[Any, Any, Any, Any], tuple[jax.Array, dict[str, jax.Array]]]
    sums: Callable[[Any, Any, Any], dict[str, jax.Array]]
    decisions: Callable[[Any, Any, Any], dict[str, jax.Array]]


def search(
    config: ConfigDict,
    spec: Spec,
    init: Callable[[jax.Array], Any],
    model: Model,
    summarise: Callable[[Any], dict[str, Any]],
) -> Task:
    """The task of a search.

    Args:
      init: `key -> parameters`, those of all adapters included.
      summarise: `spec -> Task.summary`, with `macs_per_prompt`.

    Raises:
      InputError: settings that no search can have, or preferences of another one that do not fit.
    """
    settings, group_of, (layers, depth) = config.das, optim.group_of(config.optim), arms_of(spec)
    before = preferences(settings.preferences, spec) if settings.preferences else None

    @jax.jit
    def validation(params: Any, batch: Any, skip: Any) -> jax.Array:
        return model.loss(params, batch, skip, None)[0]

    after_step = Search(
        bandit_of(config, len(layers)), config.seed, config.steps, validation, settings.ramp, settings.fixed_val_batch,
        settings.greedy_batches if settings.by == "greedy" else 0, layers, depth,
    )  # fmt: skip

    def loss(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any, key: jax.Array, step: Any) -> Any:
        r, skip = extra["preference"], extra["skip"]
        if config.accumulate > 1:
            skip = own_subset(r, skip.sum(), jax.random.fold_in(key, 2), settings.policy, layers, depth)
        value, told = model.loss(params, batch, skip, key)
        told |= {"updates": extra["updates"], "preference_most": r.max(), "preference_least": r.min()}
        return value, {name: jnp.float32(value) for name, value in told.items()}

    def preferred(extra: Any) -> jax.Array:
        return most_preferred(extra["preference"], settings.skips, layers, depth)

    def evaluate(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any) -> dict[str, jax.Array]:
        return model.sums(params, batch, preferred(extra))

    def decisions(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any) -> dict[str, jax.Array]:
        skip = preferred(extra)
        return _skipped(model.decisions(params, batch, skip), skip)

    def finish(params: Any, frozen: Any, extra: Any, knobs: Any, draw: Callable[[str, int], Any]) -> Any:
        report(after_step, params, np.asarray(jax.device_get(extra["preference"])), before, draw)
        return params

    def conclusion(extra: Any) -> dict[str, Any]:
        """With the work of what is evaluated: all but the layers that would be left out."""
        told = after_step.conclusion(extra)
        short, _ = das.remove(spec, None, told["skips"])
        moved = {} if before is None else drift(after_step, before, np.asarray(extra["preference"]))
        return {**told, **moved, "macs_per_prompt": summarise(short)["macs_per_prompt"]}

    return Task(
        spec=spec,
        init=lambda key: (init(key), {}, after_step.start(before)),
        loss=loss,
        evaluate=evaluate,
        trainable=trained(group_of),
        after_step=after_step,
        finish=finish,
        decisions=decisions,
        summary=summarise(spec),
        conclusion=conclusion,
        fresh="adapters" if not settings.keep else "preferences" if before is None else "",
    )


def finetune(
    config: ConfigDict,
    spec: Spec,
    init: Callable[[jax.Array], Any],
    model: Model,
    gone: tuple[int, ...],
    depth: int,
    summary: dict[str, Any],
    fresh: str,
) -> Task:
    """The task of fine-tuning without some modules, or of any training in which nothing is searched; `fresh`: as of
    `Task`."""

    def loss(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any, key: jax.Array, step: Any) -> Any:
        return model.loss(params, batch, None, key)

    def evaluate(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any) -> dict[str, jax.Array]:
        return model.sums(params, batch, None)

    def decisions(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any) -> dict[str, jax.Array]:
        return _skipped(model.decisions(params, batch, None), jnp.asarray(bandit.mask(gone, depth)))

    return Task(
        spec=spec,
        init=lambda key: (init(key), {}, {}),
        loss=loss,
        evaluate=evaluate,
        trainable=trained(optim.group_of(config.optim)),
        decisions=decisions,
        summary=summary,
        fresh=fresh,
    )


def _skipped(made: dict[str, jax.Array], skip: jax.Array) -> dict[str, jax.Array]:
    """With what every row skipped, `[b, L]`."""
    return {**made, "skipped": jnp.broadcast_to(skip, (len(made["macs"]), len(skip)))}


class WithValidation:
    """`data`, whose batches "val" are those of a split of `held`.

    Args:
      batch_size: rows of a batch.
      leaf: the config's leaf that names the split, and what it names.

    Raises:
      InputError: a split that has fewer rows than a batch: candidates would be compared on padding.
    """

    def __init__(self, data: Data, held: Data, split: str, batch_size: int, leaf: str):
        self.classes, self.train_examples, self.eval_examples = data.classes, data.train_examples, data.eval_examples
        self.train, self.eval, self._data, self._held, self._split = data.train, data.eval, data, held, split
        rows = held.train_examples if split == "train" else held.eval_examples
        if rows < batch_size:
            raise InputError(f"{leaf} must have a batch of rows, config.batch_size={batch_size}, found {rows}")

    def draw(self, split: str, index: int) -> Batch:
        """As `Data.draw`."""
        return self._held.draw(self._split, index) if split == "val" else self._data.draw(split, index)


def with_validation(config: ConfigDict, found: Data, open_held: Callable[[ConfigDict], Data]) -> Data:
    """The data of a phase: in a search with validation batches of `config.das.val_split`.

    Args:
      open_held: opens the data of a config whose evaluation split is that one.

    Raises:
      InputError: as `WithValidation`.
    """
    if config.das.phase != "search":
        return found
    if not config.das.val_split:
        leaf = f"config.data.train_split={config.data.train_split!r}"
        return WithValidation(found, found, "train", config.batch_size, leaf)
    held = ConfigDict(config.to_dict())
    held.data.update(train_split="", eval_split=config.das.val_split)
    leaf = f"config.das.val_split={config.das.val_split!r}"
    return WithValidation(found, open_held(held), "eval", config.batch_size, leaf)


def check(config: ConfigDict, phases: tuple[str, ...]) -> None:
    """Raises InputError for settings that no run can have."""
    # All of them, also those of the other phase.
    settings = {name: config.das[name] for name in config.das}
    known = {"phase": phases, "by": BY, "style": STYLES, "policy": bandit.POLICIES}
    for name, choices in known.items():
        if name in settings:
            check_choice(f"config.das.{name}", settings[name], choices)
    for name, least in (("width", 0), ("skip_width", 0), ("ramp", 0), ("warmup", 0), ("greedy_batches", 1)):
        if settings[name] < least:
            raise InputError(f"config.das.{name} must be {least} or more, found {settings[name]}")
    if (where := settings["preferences"]) and not paths.is_workdir(where):
        raise InputError(f"config.das.preferences must be the workdir of a search, found {where!r}, which is none")
    if settings["phase"] == "finetune" and settings["remove"] != "search" and settings["preferences"]:
        raise InputError(
            f"config.das.preferences must be empty where config.das.remove={settings['remove']!r} says which layers "
            f"go, found {settings['preferences']!r}"
        )


def say_untrained(config: ConfigDict) -> None:
    """Says that a run has nothing to start from."""
    if not config.init_from and config.das.phase != "full" and checkpoint.begun(config.workdir) is None:
        print("config.init_from is empty: adapters go into a model that nothing has trained", file=sys.stderr)


def style_of(config: ConfigDict) -> Style:
    """The adapters of a decoder's config."""
    found, settings = STYLES[config.das.style], config.das
    inner, skip = (
        spec.edit(width=width) if width else spec
        for spec, width in ((found.inner, settings.width), (found.skip, settings.skip_width))
    )
    return dataclasses.replace(found, inner=inner, skip=skip)


def bandit_of(config: ConfigDict, arms: int) -> Bandit:
    """The bandit of a config; progress is counted in steps, and the search ends with the run.

    Raises:
      InputError: settings that no search can have, or by which it would never learn; a ramp on which too few arms are
        skipped at an update for the candidates to differ.
    """
    names = ("skips", "candidates", "every", "rate", "warmup", "policy")
    settings = {name: config.das[name] for name in names}
    if config.das.by == "greedy":
        settings["candidates"] = 0  # preferences stay: all subsets are equally likely
    if settings["candidates"] and settings["skips"] and settings["warmup"] >= config.steps:
        raise InputError(
            f"config.das.warmup must be below config.steps={config.steps}, or no update is ever due "
            f"(config.das.candidates=0 wants none), found {settings['warmup']}"
        )
    try:
        made = Bandit(arms=arms, search=config.steps, **settings)
    except ValueError as error:
        raise InputError(f"config.das: {error}") from None
    if made.learns and (ramp := config.das.ramp):
        # From the first update that can be due.
        calls = range(max(math.ceil(made.warmup) + 1, made.every), config.steps + 1)
        try:
            for m in sorted({bandit.ramped(made.skips, call, ramp) for call in calls}):
                bandit.check_subsets(arms, m, made.candidates)
        except ValueError as error:
            raise InputError(f"config.das.ramp={ramp}: {error}") from None
    return made


def arms_of(spec: Any) -> tuple[tuple[int, ...], int]:
    """The layer (module) that each arm is, and how many layers there are; of a decoder with its tower, or a fusion
    encoder."""
    if isinstance(spec, FusionSpec):
        return tuple(range(spec.arms)), spec.arms
    return das.arms(spec), spec.decoder.depth


def chosen(config: ConfigDict, spec: Any) -> tuple[int, ...]:
    """The layers that fine-tuning does without, from 0, ascending: those of `config.das.remove`.

    Raises:
      InputError: a list that is none, or names a layer that is no arm; no preferences, or those of another model.
    """
    wanted, m, (layers, depth) = config.das.remove, config.das.skips, arms_of(spec)
    if wanted not in ("search", "random"):
        try:
            named = skip_list(wanted, depth)
        except InputError as error:
            raise InputError(f"config.das.remove, layers counted from 0: {error}") from None
        if other := [layer for layer in named if layer not in layers]:
            raise InputError(
                f"config.das.remove, layers counted from 0, must be among those that may be left out, {list(layers)}, "
                f"found {other[0]}"
            )
        return named
    if not 0 <= m <= len(layers):
        raise InputError(f"config.das.skips must be in 0..{len(layers)} (the arms), found {m}")
    if wanted == "random":
        preference = np.random.default_rng([config.seed, _RANDOM]).normal(size=len(layers))
    elif m:
        preference = preferences(config.das.preferences or config.init_from, spec)
    else:
        return ()
    return tuple(sorted(layers[arm] for arm in bandit.final(preference, m).tolist()))


def check_gone(config: ConfigDict, gone: tuple[int, ...], spec: Any, where: str) -> None:
    """Of a model that lacks layers already.

    Args:
      gone: these layers.
      where: whose model it is: `config.workdir`, of a run that goes on, or `config.init_from`.

    Raises:
      InputError: `config.das.remove` or `config.das.preferences` ask for others.
    """
    wanted, told = config.das.remove, config.das.preferences
    # What a run that goes on was begun from may have changed, or be gone.
    if wanted == "search" and not told or wanted in ("search", "random") and where == config.workdir:
        return
    if (asked := list(chosen(config, spec))) != list(gone):
        named = f"config.das.remove={wanted!r}" if wanted != "search" else f"config.das.preferences={told!r}"
        raise InputError(
            f"{named} asks for a model without {asked}, but that of {where!r} is without {list(gone)} already"
        )


def preferences(workdir: str, spec: Any) -> Float[np.ndarray, " n"]:
    """What a search over the arms of such a model has learned.

    Raises:
      InputError: no workdir of a search, one of another model, or preferences that are not finite.
    """
    extra = checkpoint.load_extra(workdir) if paths.is_workdir(workdir) else {}
    if "preference" not in extra:
        raise InputError(
            "which layers go a search says: config.das.preferences must be its workdir (config.das.remove='random' "
            f"and '[1, 2]' need none), found {workdir!r}"
        )
    # Of the same arms in the same order.
    here, there = _described(spec), _described(checkpoint.begun(workdir))
    if here != there:
        raise InputError(f"the preferences in {workdir} must be of {here}, found those of {there}")
    found = np.asarray(extra["preference"])
    if found.shape != (len(arms_of(spec)[0]),) or not np.isfinite(found).all():
        raise InputError(f"the preferences in {workdir} must be finite, one for each arm of {here}, found {found}")
    return found


def _described(spec: Any) -> str:
    if isinstance(spec, FusionSpec):
        return f"a fusion encoder of {spec.streams} stream{'s' * (spec.streams > 1)} and {spec.arms} modules"
    layers, depth = arms_of(spec)
    which = "all may" if len(layers) == depth else f"{list(layers)} may"
    return f"a decoder of {depth} layers, of which {which} be left out"


@dataclasses.dataclass(frozen=True)
class Search:
    """What happens between two steps of a search (`Task.after_step`): the step is counted, the preferences are updated
    where that is due, and the next step's layers are drawn. All of it follows from the state and the seed.

    Attributes:
      bandit: its settings.
      seed, steps: of the run.
      loss: compiled, `(params, batch, skip) -> scalar`.
      ramp: training steps after half of which m is reached (LLaVA); 0 = m at once.
      fixed: all updates see the same validation batch, as in the release; else each has a fresh one.
      greedy: batches by which layers are chosen greedily after the last step; 0 = the bandit has chosen.
      layers: the layer that each arm is; () = arm i is layer i.
      depth: L; 0 = as many as there are arms.
    """

    bandit: Bandit
    seed: int
    steps: int
    loss: Callable[[Any, Any, Bool[np.ndarray, " L"]], Float[jax.Array, ""]]
    ramp: int = 0
    fixed: bool = False
    greedy: int = 0
    layers: tuple[int, ...] = ()
    depth: int = 0
    _known: dict[int, State] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)
    """After the last step, by its number: so that the device is waited for at updates only."""

    def start(self, preference: Float[np.ndarray, " n"] | None) -> dict[str, np.ndarray]:
        """`TrainState.extra` before the first step."""
        state = self.bandit.start()
        if preference is not None:
            state = state._replace(preference=np.asarray(preference, np.float32))
        return self._extra(state, 0)

    def __call__(self, state: Any, frozen: Any, draw: Callable[[str, int], Any], done: int) -> Any:
        if (known := self._known.pop(done - 1, None)) is None:  # the first step of this process
            told = jax.device_get(state.extra)
            known = State(*(told[name] for name in State._fields))
        known, due = bandit.tick(self.bandit, known, done - 1)
        if due:
            subsets = bandit.candidates(self.bandit, known, self.seed, self._count(done))
            batch = draw("val", 0 if self.fixed else int(known.updates))
            losses = [self.loss(state.params, batch, self.mask(subset)) for subset in subsets]
            known = bandit.update(self.bandit, known, subsets, np.asarray(jax.device_get(losses), np.float64))
        if self.greedy and done == self.steps:
            known = known._replace(preference=self._greedy(state.params, draw))
        self._known.clear()
        self._known[done] = known
        return dataclasses.replace(state, extra=self._extra(known, done))

    def mask(self, arms: Any) -> Bool[np.ndarray, " L"]:
        """True at the layers of some arms."""
        named = np.asarray(arms, np.int64)
        return bandit.mask(np.asarray(self.layers)[named] if self.layers else named, self.depth or self.bandit.arms)

    def left_out(self, preference: Float[np.ndarray, " n"]) -> list[int]:
        """The layers that the search would leave out, from 0."""
        return np.flatnonzero(self.mask(bandit.final(preference, self.bandit.skips))).tolist()

    def conclusion(self, extra: Any) -> dict[str, Any]:
        """What the search has found (`Task.conclusion`): `skips`, layers from 0 as everywhere; `preference` of every
        arm; how many `updates` there were, and how many of them changed nothing (`flat`) or had no finite loss
        (`poisoned`)."""
        preference = np.asarray(extra["preference"])
        counts = {name: int(extra[name]) for name in ("updates", "flat", "poisoned")}
        return {"skips": self.left_out(preference), "preference": preference.tolist(), **counts}

    def _greedy(self, params: Any, draw: Callable[[str, int], Any]) -> Float[np.ndarray, " n"]:
        """Preferences in the order in which layers are taken out greedily, the first one's the largest."""
        batches = [draw("val", index) for index in range(self.greedy)]

        def loss(skip: Bool[np.ndarray, " n"]) -> float:
            layers = self.mask(np.flatnonzero(skip))
            return float(np.mean(jax.device_get([self.loss(params, batch, layers) for batch in batches])))

        order = das.greedy(loss, self.bandit.arms, self.bandit.skips)
        preference = np.zeros(self.bandit.arms, np.float32)
        preference[list(order)] = np.arange(len(order), 0, -1)
        return preference

    def _extra(self, state: State, step: int) -> dict[str, np.ndarray]:
        subset = bandit.step_subset(self.bandit, state, self.seed, step, self._count(step + 1))
        return {**state._asdict(), "skip": self.mask(subset)}

    def _count(self, call: int) -> int:
        """m of the `call`-th training step, from 1."""
        return bandit.ramped(self.bandit.skips, call, self.ramp)


def own_subset(
    preference: Float[jax.Array, " n"],
    count: Any,
    key: jax.Array,
    policy: str,
    layers: tuple[int, ...],
    depth: int,
) -> Bool[jax.Array, " L"]:
    """The layers of a fresh draw, traced, by the law of `bandit.draw`; `count` of them."""
    noise = (
        jax.random.gumbel(key, preference.shape)
        if policy == "race"
        else jnp.log(jax.random.uniform(key, preference.shape, minval=1e-38))
    )
    place = jnp.argsort(jnp.argsort(-(jax.nn.log_sigmoid(preference) + noise)))
    return jnp.zeros(depth, bool).at[jnp.asarray(layers)].set(place < count)


def most_preferred(
    preference: Float[jax.Array, " n"], m: int, layers: tuple[int, ...] = (), depth: int = 0
) -> Bool[jax.Array, " L"]:
    """True at the layers of `bandit.final`; `layers` and `depth` as of `Search`."""
    order = jnp.argsort(preference, stable=True)[len(preference) - m :]
    here = jnp.asarray(layers, order.dtype)[order] if layers else order
    return jnp.zeros(depth or len(preference), bool).at[here].set(True)


def trained(group_of: Callable[[str], str | None]) -> Callable[[str], str | None]:
    """The groups of a config; copies of frozen norms stay frozen."""
    return lambda path: None if path.endswith("/norm_in/scale") else group_of(path)


def report(
    search: Search,
    params: Any,
    after: Float[np.ndarray, " n"],
    before: Float[np.ndarray, " n"] | None,
    draw: Callable[[str, int], Any],
) -> dict[str, Any]:
    """Says which layers a search leaves out; and where it began from the preferences of another one, how far the data
    have moved them (`drift`), and the validation losses without the layers of either."""
    m = search.bandit.skips
    found: dict[str, Any] = {"skips": search.left_out(after)}
    if before is not None:
        batch = draw("val", search.steps)
        losses = [float(search.loss(params, batch, search.mask(bandit.final(r, m)))) for r in (before, after)]
        found |= {**drift(search, before, after), "loss_before": losses[0], "loss": losses[1]}
    if jax.process_index() == 0:
        print("  ".join(f"{name} {value}" for name, value in found.items()), file=sys.stderr)
    return found


def drift(search: Search, before: Float[np.ndarray, " n"], after: Float[np.ndarray, " n"]) -> dict[str, Any]:
    """How far a search has moved the preferences that it began from: the layers that they would leave out,
    `skips_before`, and the rank correlation of both (ties share their mean rank; None where all are tied)."""
    from scipy.stats import rankdata  # jax has scipy

    ranks = np.stack([rankdata(r) for r in (before, after)])
    flat = bool((ranks.std(1) == 0).any())
    return {
        "skips_before": search.left_out(before),
        "rank_correlation": None if flat else float(np.corrcoef(ranks)[0, 1]),
    }
