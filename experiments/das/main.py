# SPDX-License-Identifier: Apache-2.0
"""DAS in a multimodal model's decoder: a search for layers that a task does without, then fine-tuning without them.

Two runs, chained by `config.init_from` (spec section 2). The search trains adapters while layers are left out at
random, and learns from validation losses which of them to leave out for good; fine-tuning starts from the same model,
takes the `skips` most preferred ones out, and trains fresh adapters. The method is `vtjax.methods.das`, the bandit
`vtjax.ops.bandit`. A step's micro-batches (`config.accumulate`) share what it skips.
Letters: B rows, L layers = arms, m skipped ones.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from ml_collections import ConfigDict

from experiments.vlm import main as vlm
from vtjax import paths
from vtjax.account import flops
from vtjax.errors import InputError, check_choice
from vtjax.methods import das
from vtjax.models.adapters import STYLES, Style
from vtjax.ops import bandit
from vtjax.ops.bandit import Bandit, State
from vtjax.spec import VLMSpec, skip_list
from vtjax.train import checkpoint, optim
from vtjax.train.task import Batch, Data, Task

PHASES = ("search", "finetune")
BY = ("bandit", "greedy")
_RANDOM = 2  # its stream of random numbers; the bandit's are 0 and 1


def build(config: ConfigDict) -> Task:
    """The task of a phase.

    Raises:
      InputError: settings that are not defined, no preferences where they are needed, a model that was cut already, or
        as `experiments.vlm.main.build`.
    """
    check(config)
    base, base_init = vlm.source(config)
    search = config.das.phase == "search"
    spec, convert = (to_search if search else to_finetune)(config, base)

    def init(key: jax.Array) -> Any:
        return convert(base_init(key)[0], jax.random.fold_in(key, 3))

    return (_search if search else _finetune)(config, spec, init)


def data(config: ConfigDict, task: Task) -> Data:
    """The questions, and in a search with validation batches of `config.das.val_split`.

    Raises:
      InputError: as `experiments.vlm.main.data`.
    """
    found = vlm.data(config, task)
    if config.das.phase != "search":
        return found
    if not config.das.val_split:
        return WithValidation(found, found, "train")
    held = ConfigDict(config.to_dict())
    held.data.update(train_split="", eval_split=config.das.val_split)
    return WithValidation(found, vlm.data(held, task), "eval")


batch_shapes = vlm.batch_shapes


class WithValidation:
    """`data`, whose batches "val" are those of a split of `held`."""

    def __init__(self, data: Data, held: Data, split: str):
        self.classes, self.train_examples, self.eval_examples = data.classes, data.train_examples, data.eval_examples
        self.train, self.eval, self._data, self._held, self._split = data.train, data.eval, data, held, split

    def draw(self, split: str, index: int) -> Batch:
        """As `Data.draw`."""
        return self._held.draw(self._split, index) if split == "val" else self._data.draw(split, index)


def check(config: ConfigDict) -> None:
    """Raises InputError for settings that no run can have."""
    # All of them, also those of the other phase.
    settings = {name: config.das[name] for name in config.das}
    for name, known in (("phase", PHASES), ("by", BY), ("style", STYLES), ("policy", bandit.POLICIES)):
        check_choice(f"config.das.{name}", settings[name], known)
    for name, least in (("width", 0), ("skip_width", 0), ("ramp", 0), ("warmup", 0), ("greedy_batches", 1)):
        if settings[name] < least:
            raise InputError(f"config.das.{name} must be {least} or more, found {settings[name]}")
    if (where := settings["preferences"]) and not paths.is_workdir(where):
        raise InputError(f"config.das.preferences must be the workdir of a search, found {where!r}")


def style_of(config: ConfigDict) -> Style:
    """The adapters of a config."""
    found, settings = STYLES[config.das.style], config.das
    inner, skip = (
        spec.edit(width=width) if width else spec
        for spec, width in ((found.inner, settings.width), (found.skip, settings.skip_width))
    )
    return dataclasses.replace(found, inner=inner, skip=skip)


def bandit_of(config: ConfigDict, arms: int) -> Bandit:
    """The bandit of a config; progress is counted in steps, and the search ends with the run.

    Raises:
      InputError: settings that no search can have.
    """
    names = ("skips", "candidates", "every", "rate", "warmup", "policy")
    settings = {name: config.das[name] for name in names}
    if config.das.by == "greedy":
        settings["candidates"] = 0  # preferences stay: all subsets are equally likely
    try:
        return Bandit(arms=arms, search=config.steps, **settings)
    except ValueError as error:
        raise InputError(f"config.das: {error}") from None


Convert = Callable[[Any, jax.Array], Any]
"""`(parameters of what a run starts from, key) -> parameters`."""


def to_search(config: ConfigDict, base: VLMSpec) -> tuple[VLMSpec, Convert]:
    """The spec of a search, and the way from the parameters of `base` to its."""
    return _begun(config, base) or _with_adapters(config, base)


def to_finetune(config: ConfigDict, base: VLMSpec) -> tuple[VLMSpec, Convert]:
    """The spec without the chosen layers, and the way from the parameters of `base` to its; where `base` lacks layers
    already, it stays as it is."""
    if (begun := _begun(config, base)) is not None:
        return begun
    if das.is_installed(base.decoder) and _gone(base):  # a run brings its own
        return base, lambda params, key: params
    whole, convert = _with_adapters(config, base)
    gone = chosen(config, base.decoder.depth)
    parent = whole.decoder.lineage[-1].parent
    spec, _ = das.remove(whole, None, gone, parent)
    return spec, lambda params, key: das.remove(whole, convert(params, key), gone)[1]


def _begun(config: ConfigDict, base: VLMSpec) -> tuple[VLMSpec, Convert] | None:
    """Of a run that goes on: its spec says it all."""
    if checkpoint.begun(config.workdir) is None:
        return None
    return base, lambda params, key: {**params, "decoder": das.added(base.decoder, params["decoder"], key)}


def _with_adapters(config: ConfigDict, base: VLMSpec) -> tuple[VLMSpec, Convert]:
    """With fresh adapters; or with those of a search, where `config.das.keep` says so."""
    style, parent = style_of(config), base.lineage[-1].parent if base.lineage else ""
    if not config.das.keep:
        spec, _ = das.install(base, None, style, None, parent)
        return spec, lambda params, key: das.install(base, params, style, key)[1]
    if not das.is_installed(base.decoder) or das.installed(base.decoder) != (style, True):
        raise InputError(
            f"config.das.keep=True needs the adapters of a search of the same style and widths in "
            f"config.init_from={config.init_from!r}, found others"
        )
    return base, lambda params, key: params


def chosen(config: ConfigDict, arms: int) -> tuple[int, ...]:
    """The layers that fine-tuning does without: those of `config.das.remove`.

    Raises:
      InputError: a list that is none, or no preferences.
    """
    wanted, m = config.das.remove, config.das.skips
    if wanted not in ("search", "random"):
        return skip_list(wanted, arms)
    if not 0 <= m <= arms:
        raise InputError(f"config.das.skips must be in 0..{arms} (the layers), found {m}")
    if wanted == "random":
        preference = np.random.default_rng([config.seed, _RANDOM]).normal(size=arms)
    elif m:
        preference = preferences(config.das.preferences or config.init_from, arms)
    else:
        return ()
    return tuple(sorted(bandit.final(preference, m).tolist()))


def preferences(workdir: str, arms: int) -> Float[np.ndarray, " L"]:
    """What a search has learned.

    Raises:
      InputError: no run of a search, or one of another depth.
    """
    if not paths.is_workdir(workdir):
        raise InputError(
            f"layers are chosen by a search: config.init_from or config.das.preferences must be its workdir, found "
            f"{workdir!r} (config.das.remove='random' and '[1, 2]' need none)"
        )
    extra = checkpoint.load_extra(workdir)
    if "preference" not in extra:
        raise InputError(f"{workdir} must be the workdir of a search, found a run without preferences")
    if (found := np.asarray(extra["preference"])).shape != (arms,):
        raise InputError(f"the preferences in {workdir} must be those of {arms} layers, found {found.size}")
    return found


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
    """

    bandit: Bandit
    seed: int
    steps: int
    loss: Callable[[Any, Any, Bool[np.ndarray, " L"]], Float[jax.Array, ""]]
    ramp: int = 0
    fixed: bool = False
    greedy: int = 0

    def start(self, preference: Float[np.ndarray, " L"] | None) -> dict[str, np.ndarray]:
        """`TrainState.extra` before the first step."""
        state = self.bandit.start()
        if preference is not None:
            state = state._replace(preference=np.asarray(preference, np.float32))
        return self._extra(state, 0)

    def __call__(self, state: Any, frozen: Any, draw: Callable[[str, int], Any]) -> Any:
        done = int(state.step)
        told = jax.device_get(state.extra)
        known, due = bandit.tick(self.bandit, State(*(told[name] for name in State._fields)), done - 1)
        if due:
            subsets = bandit.candidates(self.bandit, known, self.seed, self._count(done))
            batch = draw("val", 0 if self.fixed else int(known.updates))
            losses = [self.loss(state.params, batch, self._mask(subset)) for subset in subsets]
            known = bandit.update(self.bandit, known, subsets, np.asarray(jax.device_get(losses), np.float64))
        if self.greedy and done == self.steps:
            known = known._replace(preference=self._greedy(state.params, draw))
        return dataclasses.replace(state, extra=self._extra(known, done))

    def _greedy(self, params: Any, draw: Callable[[str, int], Any]) -> Float[np.ndarray, " L"]:
        """Preferences in the order in which layers are taken out greedily, the first one's the largest."""
        batches = [draw("val", index) for index in range(self.greedy)]

        def loss(skip: Bool[np.ndarray, " L"]) -> float:
            return float(np.mean(jax.device_get([self.loss(params, batch, skip) for batch in batches])))

        order = das.greedy(loss, self.bandit.arms, self.bandit.skips)
        preference = np.zeros(self.bandit.arms, np.float32)
        preference[list(order)] = np.arange(len(order), 0, -1)
        return preference

    def _extra(self, state: State, step: int) -> dict[str, np.ndarray]:
        subset = bandit.step_subset(self.bandit, state, self.seed, step, self._count(step + 1))
        return {**state._asdict(), "skip": self._mask(subset)}

    def _count(self, call: int) -> int:
        """m of the `call`-th training step, from 1."""
        return bandit.ramped(self.bandit.skips, call, self.ramp)

    def _mask(self, subset: Any) -> Bool[np.ndarray, " L"]:
        return bandit.mask(subset, self.bandit.arms)


def _search(config: ConfigDict, spec: VLMSpec, init: Callable[[jax.Array], Any]) -> Task:
    settings, arms, balance = config.das, spec.decoder.depth, vlm.answer_weights(config)
    model, types, group_of = das.vlm(spec, **vlm.options(config)), vlm.types_of(config), optim.group_of(config.optim)
    before = preferences(settings.preferences, arms) if settings.preferences else None

    @jax.jit
    def validation(params: Any, batch: Any, skip: Any) -> jax.Array:
        return vlm.mean_loss(vlm.asked(model, params, batch, {"skipped": skip}), batch, balance)

    after_step = Search(
        bandit_of(config, arms), config.seed, config.steps, validation, settings.ramp, settings.fixed_val_batch,
        settings.greedy_batches if settings.by == "greedy" else 0,
    )  # fmt: skip

    def loss(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any, key: jax.Array, step: Any) -> Any:
        found = vlm.asked(model, params, batch, {"skipped": extra["skip"], **dropping(spec, key)})
        r = extra["preference"]
        told = {"updates": extra["updates"], "preference_most": r.max(), "preference_least": r.min()}
        return vlm.mean_loss(found, batch, balance), {name: jnp.float32(value) for name, value in told.items()}

    def evaluate(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any) -> dict[str, jax.Array]:
        skip = most_preferred(extra["preference"], settings.skips)
        return vlm.sums(vlm.asked(model, params, batch, {"skipped": skip}), batch, types)

    def finish(params: Any, frozen: Any, extra: Any, knobs: Any, draw: Callable[[str, int], Any]) -> Any:
        report(after_step, params, np.asarray(jax.device_get(extra["preference"])), before, draw)
        return params

    return Task(
        spec=spec,
        init=lambda key: (init(key), {}, after_step.start(before)),
        loss=loss,
        evaluate=evaluate,
        trainable=trained(group_of),
        after_step=after_step,
        finish=finish,
        summary=_summary(config, spec, ()),
    )


def _finetune(config: ConfigDict, spec: VLMSpec, init: Callable[[jax.Array], Any]) -> Task:
    model, types, balance = das.vlm(spec, **vlm.options(config)), vlm.types_of(config), vlm.answer_weights(config)

    def loss(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any, key: jax.Array, step: Any) -> Any:
        found = vlm.asked(model, params, batch, dropping(spec, key))
        told = {"train_top1": found.right.sum() / jnp.maximum(found.asked.sum(), 1.0)}
        return vlm.mean_loss(found, batch, balance), told

    def evaluate(params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any) -> dict[str, jax.Array]:
        return vlm.sums(vlm.asked(model, params, batch), batch, types)

    return Task(
        spec=spec,
        init=lambda key: (init(key), {}, {}),
        loss=loss,
        evaluate=evaluate,
        trainable=trained(optim.group_of(config.optim)),
        summary=_summary(config, spec, _gone(spec)),
    )


def dropping(spec: VLMSpec, key: jax.Array) -> dict[str, jax.Array]:
    """The knob of dropout in adapters, where they have any: a key for every layer, the same whether it is skipped."""
    style, _ = das.installed(spec.decoder)
    rates = (style.inner.dropout, style.skip.dropout)
    return {"adapter_key": jax.random.split(key, spec.decoder.depth)} if any(rates) else {}


def most_preferred(preference: Float[jax.Array, " L"], m: int) -> Bool[jax.Array, " L"]:
    """True at the arms of `bandit.final`."""
    order = jnp.argsort(preference, stable=True)
    return jnp.zeros(len(preference), bool).at[order[len(preference) - m :]].set(True)


def trained(group_of: Callable[[str], str | None]) -> Callable[[str], str | None]:
    """The groups of a config; copies of frozen norms stay frozen."""
    return lambda path: None if path.endswith("/norm_in/scale") else group_of(path)


def report(
    search: Search,
    params: Any,
    after: Float[np.ndarray, " L"],
    before: Float[np.ndarray, " L"] | None,
    draw: Callable[[str, int], Any],
) -> dict[str, Any]:
    """Says which layers a search leaves out; and where it began from the preferences of another one, how far the data
    have moved them: the rank correlation of both, and the validation losses without the layers of either."""
    m = search.bandit.skips
    found: dict[str, Any] = {"skips": sorted(bandit.final(after, m).tolist())}
    if before is not None:
        old = sorted(bandit.final(before, m).tolist())
        ranks = [np.argsort(np.argsort(r, kind="stable")).astype(np.float64) for r in (before, after)]
        batch = draw("val", search.steps)
        losses = [float(search.loss(params, batch, bandit.mask(tuple(s), len(after)))) for s in (old, found["skips"])]
        found |= {"skips_before": old, "rank_correlation": float(np.asarray(np.corrcoef(np.stack(ranks)))[0, 1])}
        found |= {"loss_before": losses[0], "loss": losses[1]}
    if jax.process_index() == 0:
        print("  ".join(f"{name} {value}" for name, value in found.items()), file=sys.stderr)
    return found


def _summary(config: ConfigDict, spec: VLMSpec, gone: tuple[int, ...]) -> dict[str, Any]:
    """Work of one prompt: of the model as it is without adapters (dense), and of this one (search: with all layers)."""
    tokens = spec.placeholders + flops.QUESTION
    count, work = das.adapter_cost(spec.decoder, tokens)
    whole = spec.edit(decoder=spec.decoder.edit(blocks=(_whole(spec),) * spec.decoder.depth)) if gone else spec
    return {
        "phase": config.das.phase,
        "layers": spec.decoder.depth,
        "skips": list(gone),
        "adapter_params": count,
        "macs_per_prompt": flops.macs(spec) + work,
        "dense_macs_per_prompt": flops.macs(whole),
        "init_from": config.init_from,
    }


def _gone(spec: VLMSpec) -> tuple[int, ...]:
    """The decoder's layers that were taken out."""
    return tuple(index for index, block in enumerate(spec.decoder.blocks) if not block.attn and not block.ffn)


def _whole(spec: VLMSpec) -> Any:
    """A block of the decoder that is there."""
    return next((block for block in spec.decoder.blocks if block.attn and block.ffn), spec.decoder.blocks[0])
