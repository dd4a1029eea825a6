# SPDX-License-Identifier: Apache-2.0
"""Optimisers with parameter groups by path regex, learning-rate schedules in steps, exact gradient accumulation."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vtjax.errors import InputError
from vtjax.parallel import mesh as mesh_lib
from vtjax.parallel.rules import constrain, path_of
from vtjax.train.state import flatten

DEFAULT_GROUP = "default"
OPTIMISERS = ("adamw", "sgd", "adafactor")
SCHEDULES = ("cosine", "linear", "constant")
USED_BY = {"b1": ("adamw",), "b2": ("adamw",), "momentum": ("sgd",)}  # setting -> the optimisers that look at it


def group_of(config: Any) -> Callable[[str], str | None]:
    """The `trainable` function of a `Task` from the table `config.groups`.

    A group is `{pattern, lr_scale, weight_decay, frozen, optional}`: `pattern` is a regex, searched in the path,
    groups are tried in the alphabetical order of their names (as ConfigDict keeps them), the first match counts, what
    none matches is in the group "default". `frozen` parameters are not trained. `optional`: may match nothing.

    Raises:
      InputError: a pattern that is not a regex.
    """
    table = []
    for name, group in sorted(config.get("groups", {}).items()):
        try:
            table.append((name, re.compile(group["pattern"]), bool(group.get("frozen", False))))
        except re.error as error:
            pattern = f"config.optim.groups.{name}.pattern {group['pattern']!r}"
            raise InputError(f"{pattern} is not a regex: {error}") from None

    def trainable(path: str) -> str | None:
        for name, pattern, frozen in table:
            if pattern.search(path):
                return None if frozen else name
        return DEFAULT_GROUP

    return trainable


def numbers(config: Any) -> dict[str, float]:
    """The continuous settings, by config leaf: they may enter a compiled step as arrays (see `make`). What is zero, or
    a group's factor of one, is left out: it leaves an operation out."""
    named = {name: float(config[name]) for name in ("lr", "end_lr", "weight_decay", "b1", "b2", "momentum", "clip")}
    for name, group in config.get("groups", {}).items():
        factor = float(group.get("lr_scale", 1.0))
        named[f"groups.{name}.lr_scale"] = 0.0 if factor == 1.0 else factor
        for leaf in ("weight_decay", "end_weight_decay"):
            named[f"groups.{name}.{leaf}"] = max(float(group.get(leaf, -1.0)), 0.0)
    return {f"optim.{name}": value for name, value in named.items() if value}


def schedule(config: Any, steps: int, traced: Mapping[str, Any] | None = None) -> optax.Schedule:
    """Learning rate as a function of the step 0 .. steps - 1.

    Linear from 0 over `warmup` steps to `lr`; then "cosine" or "linear" to `end_lr` at `steps`, or "constant". With the
    optional leaf `warmup_reaches_lr` the last step of the warm-up has `lr` already, as in `numpy.linspace(0, lr,
    warmup)` (DINO, DGMR); else the first one after it. `traced`: see `make`.

    Raises:
      InputError: an unknown schedule, or a warm-up that does not end before `steps`.
    """
    if config.schedule not in SCHEDULES:
        raise InputError(f"config.optim.schedule must be one of {', '.join(SCHEDULES)}, found {config.schedule!r}")
    if not 0 <= config.warmup < max(steps, 1):
        raise InputError(f"config.optim.warmup must be in 0..{steps - 1} (config.steps={steps}), found {config.warmup}")
    lr, end_lr = ((traced or {}).get(f"optim.{name}", config[name]) for name in ("lr", "end_lr"))
    rise = config.warmup - 1 if config.get("warmup_reaches_lr", False) else config.warmup
    if config.schedule == "constant":
        after: optax.Schedule = optax.constant_schedule(lr)
    elif config.schedule == "linear":
        after = optax.linear_schedule(lr, end_lr, steps - config.warmup)
    else:
        alpha = end_lr / lr if config.lr and config.end_lr else 0.0
        after = optax.cosine_decay_schedule(lr, steps - config.warmup, alpha)
    if not config.warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, lr, max(rise, 1)), after], [config.warmup])


def make(
    config: Any,
    steps: int,
    params: Any,
    trainable: Callable[[str], str | None],
    traced: Mapping[str, Any] | None = None,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser of the trained part of `params`, and its learning-rate schedule.

    In this order: clipping by global norm over all groups; adamw (eps 1e-8), sgd with momentum, or adafactor (factored
    second moment, decay 0.8, update clipped to RMS 1); decoupled weight decay; times the learning rate and the group's
    `lr_scale`. `config.weight_decay` acts on kernels only (paths that end in `kernel`), not on biases, norms,
    embeddings or a method's own parameters; a group that states a `weight_decay` of 0 or more applies it to all that it
    matches, and where it also states an `end_weight_decay` of 0 or more, the decay goes there by a half cosine.

    Args:
      config: `optim` of the config.
      params: the whole tree, arrays or abstract.
      trainable: path -> group or None, see `Task`.
      traced: arrays in place of the settings of `numbers`, by the same names, so that other values compile nothing new.

    Returns:
      A transformation of the trained part (nested dict, see `state.split`), and the schedule.

    Raises:
      InputError: an unknown optimiser or schedule, a bad number, or a group whose pattern matches no parameter.
    """
    groups = dict(config.get("groups", {}).items())
    paths = list(flatten(params))
    for name, group in groups.items():
        if not group.get("optional", False) and not any(re.search(group["pattern"], path) for path in paths):
            raise InputError(f"config.optim.groups.{name}.pattern {group['pattern']!r} matches no parameter")
    for name in ("lr", "weight_decay", "clip", "momentum", "end_lr"):
        if getattr(config, name) < 0:
            raise InputError(f"config.optim.{name} must be 0 or more, found {getattr(config, name)}")

    given = numbers(config) | dict(traced or {})

    def scale(path: str) -> Any:
        name = trainable(path)
        stated = float(groups.get(name or "", {}).get("lr_scale", 1.0))
        return given.get(f"optim.groups.{name}.lr_scale", stated)

    def decay(path: str) -> Any:
        name = trainable(path)
        stated = float(groups.get(name or "", {}).get("weight_decay", -1.0))
        if stated >= 0.0:
            return given.get(f"optim.groups.{name}.weight_decay", 0.0)
        return given.get("optim.weight_decay", 0.0) if path.split("/")[-1] == "kernel" else 0.0

    def end(path: str) -> Any:
        """Where the decay of a path goes to; None where it stays."""
        name = trainable(path)
        stated = [float(groups.get(name or "", {}).get(leaf, -1.0)) for leaf in ("weight_decay", "end_weight_decay")]
        return given.get(f"optim.groups.{name}.end_weight_decay", 0.0) if min(stated) >= 0.0 else None

    number = {name: given.get(f"optim.{name}", config[name]) for name in ("b1", "b2", "momentum", "clip")}
    if config.name == "adamw":
        direction = optax.scale_by_adam(b1=number["b1"], b2=number["b2"])
    elif config.name == "sgd":
        direction = optax.trace(decay=number["momentum"]) if config.momentum else optax.identity()
    elif config.name == "adafactor":
        direction = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    else:
        raise InputError(f"config.optim.name must be one of {', '.join(OPTIMISERS)}, found {config.name!r}")
    rate = schedule(config, steps, traced)
    clip = optax.clip_by_global_norm(number["clip"]) if config.clip else optax.identity()
    decays = _moving_decay(decay, end, steps) if any(end(path) is not None for path in paths) else _decay(decay)
    return optax.chain(clip, direction, decays, optax.scale_by_learning_rate(rate), _scale(scale)), rate


def accumulate(grad: Callable[[Any, jax.Array], Any], batch: Any, key: jax.Array, parts: int) -> Any:
    """Mean of `grad(micro_batch, key)` over `parts` micro-batches, one after the other (`lax.scan`).

    Micro-batch i holds the rows i, i + parts, ..., so that every device keeps the rows it has.

    Args:
      grad: returns a tree of arrays (loss, metrics, gradients), each a mean over rows.
      batch: arrays `[B, ...]`, B divisible by `parts`.
      key: split by `fold_in(key, i)`; used as it is where `parts` is 1.
    """
    if parts == 1:
        return grad(batch, key)
    micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), batch)

    def add(total: Any, part: tuple[Any, jax.Array]) -> tuple[Any, None]:
        rows, i = part
        return jax.tree.map(jnp.add, total, grad(jax.tree.map(constrain, rows), jax.random.fold_in(key, i))), None

    first = jax.eval_shape(grad, jax.tree.map(lambda x: x[0], micro), key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    total, _ = jax.lax.scan(add, zeros, (micro, jnp.arange(parts)))
    return jax.tree.map(lambda x: (x / parts).astype(x.dtype), total)


def check_batch(batch_size: int, parts: int, mesh: jax.sharding.Mesh) -> None:
    """Raises `InputError` unless the global batch divides into micro-batches, and these over the mesh."""
    shards = mesh_lib.batch_shards(mesh)
    if parts < 1 or batch_size < 1 or batch_size % (parts * shards):
        raise InputError(
            f"batch_size must be a multiple of accumulate x (data x fsdp) = {parts} x {shards}, found {batch_size}"
        )


def _decay(rate: Callable[[str], Any]) -> optax.GradientTransformation:
    def update(updates: Any, params: Any) -> Any:
        return _with_path(lambda path, u, p: u if _is(rate(path), 0.0) else u + rate(path) * p, updates, params)

    return optax.stateless(update)


def _moving_decay(start: Callable[[str], Any], end: Callable[[str], Any], steps: int) -> optax.GradientTransformation:
    """Decay at step j of J: `end + (start - end) (1 + cos(pi j / J)) / 2`, as in DINO."""

    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates: Any, state: optax.ScaleByScheduleState, params: Any) -> Any:
        left = (1.0 + jnp.cos(jnp.pi * state.count / steps)) / 2.0

        def rate(path: str) -> Any:
            first, last = start(path), end(path)
            return first if last is None else last + (first - last) * left

        updates, _ = _decay(rate).update(updates, optax.EmptyState(), params)
        return updates, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _scale(factor: Callable[[str], Any]) -> optax.GradientTransformation:
    def update(updates: Any, params: Any) -> Any:
        return _with_path(lambda path, u, p: u if _is(factor(path), 1.0) else u * factor(path), updates, params)

    return optax.stateless(update)


def _is(value: Any, number: float) -> bool:
    """Whether a setting is known, untraced, to have this value."""
    return isinstance(value, float) and value == number


def _with_path(fn: Callable[[str, Any, Any], Any], updates: Any, params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda keys, u, p: fn(path_of(keys), u, p), updates, params)
