# SPDX-License-Identifier: Apache-2.0
"""What a method contributes to the one training loop: a `Task`, and the `Data` it is trained on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from vtjax.spec import Spec

Batch = Mapping[str, np.ndarray]
"""Host arrays `[b, ...]`, this process's rows: `image`, `label`, `valid`, `index`, ..."""

Params = Any
"""Nested dict of arrays; names are an API (docs/parameter-names.md)."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A method, as the loop sees it. `init`, `loss`, `evaluate` and `decisions` are traced and pure.

    Attributes:
      spec: the model's spec; saved as `spec.json` and inside every checkpoint.
      init: `key -> (params, frozen, extra)`. Traced under jit, so every array is born in its sharding; it may be called
        more than once. Leaves that are concrete (loaded weights) are placed from the host, shard by shard, and never
        compiled into the program. `frozen` holds what the result does not contain (a teacher): sharded, never donated,
        not saved; its hash is recorded. `extra` is method state that is not trained by gradient (bandit preferences,
        counters): checkpointed, changed only by `after_step`. Use `{}` for an empty one. Empty dicts inside `params`
        are dropped.
      loss: `(params, frozen, extra, knobs, batch, key, step) -> (scalar, metrics)`: the mean over the rows of `batch`,
        and a flat dict of scalars. `batch` holds device arrays. With `accumulate = A` it sees 1/A of the batch (every
        A-th row) and its own key.
      evaluate: `(params, frozen, extra, knobs, batch) -> sums`: flat dict of scalar sums over the rows with
        `batch["valid"]`; `sums["count"]` is the number of these. The reported metric m is `sums[m] / sums["count"]`;
        one of a part of the examples is called `m@part` and divided by `sums["count@part"]`.
      trainable: parameter path (`block_00/attn/query/kernel`) -> name of its optimiser group, or None: untrained,
        without gradient or optimiser state, still saved. Usually `optim.group_of(config.optim)`.
      after_step: `(state, frozen, draw, step) -> state`, on the host after every step where a task has one;
        `draw(split, index)` gives a fresh validation batch as device arrays, `step` is `state.step` as a number.
        Reading a value of `state` waits for the device: what is not needed at every step should not be read at every
        step. It must be a pure function of its arguments, or a resumed run differs.
      begin: `params -> params`, on the host, once: before the first step of a fresh run, on the device arrays.
      finish: `(params, frozen, extra, knobs, draw) -> params`, on the host, once: after the last step and before its
        evaluation, on the parameters that evaluation uses (the moving average where there is one).
      knobs: config leaf -> value. They reach the compiled step as float32 arrays, so other values compile nothing new.
      summary: static facts for `result.json`, such as `macs_per_image` or where `frozen` comes from.
      conclusion: `extra -> facts`, on the host: what a run's last state says in `result.json`, in place of what the
        summary says under the same names. None where that is nothing.
      fresh: what `init` makes and only training gives a meaning, in words ("adapters"); `vtjax eval` then measures no
        parameters but those of a run. "" = nothing.
      bounds: path of a trained parameter -> (low, high) that it is clamped to after every step, or None.
      decisions: `(params, frozen, extra, knobs, batch) -> {name: array [b, ...]}`, traced: what a dynamic model decided
        for every row, and what that row cost (`macs`); see `vtjax eval --decisions`. None where nothing is decided.
      given: `params -> params` with what the config sets in place of what was learned; `vtjax eval` applies it to a
        run's. None where nothing can be set.
      frames: names of batch arrays `[b, F, ...]` with F frames of every row, which lie over the mesh's context axis.
      relax: `(params, amount) -> params` that decide less aggressively; amount 1 = the dense path. For `config.guard`.
    """

    spec: Spec
    init: Callable[[jax.Array], tuple[Params, Any, Any]]
    loss: Callable[..., tuple[jax.Array, Mapping[str, jax.Array]]]
    evaluate: Callable[..., Mapping[str, jax.Array]]
    trainable: Callable[[str], str | None]
    after_step: Callable[..., Any] | None = None
    begin: Callable[[Params], Params] | None = None
    finish: Callable[..., Params] | None = None
    knobs: Mapping[str, float] = dataclasses.field(default_factory=dict)
    summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    conclusion: Callable[[Any], Mapping[str, Any]] | None = None
    fresh: str = ""
    bounds: Callable[[str], tuple[float, float] | None] = lambda path: None
    decisions: Callable[..., Mapping[str, jax.Array]] | None = None
    relax: Callable[[Params, float], Params] | None = None
    given: Callable[[Params], Params] | None = None
    frames: tuple[str, ...] = ()


@runtime_checkable
class Data(Protocol):
    """Batches as a pure function of a seed and a position; what `vtjax.data.loader` builds and the loop consumes."""

    classes: int
    train_examples: int
    eval_examples: int

    def train(self, start_step: int) -> Iterator[Batch]:
        """Endless; the batch of step s depends on (seed, s) only. Its shapes are few: each compiles once."""

    def eval(self, split: str = "eval") -> Iterator[Batch]:
        """The split once; the last batch is padded (`valid` False). Equally many batches on every process."""

    def draw(self, split: str, index: int) -> Batch:
        """Validation batch number `index`, depending on (seed, split, index) only."""


def facts(task: Task, extra: Any) -> dict[str, Any]:
    """What a task says of a run beside its metrics: its summary, and what it concludes from the run's `extra`."""
    concluded = {} if task.conclusion is None else task.conclusion(jax.device_get(extra))
    return {**task.summary, **concluded}


@contextlib.contextmanager
def closing(batches: Iterator[Batch]) -> Iterator[None]:
    """Ends a generator's workers with the loop."""
    try:
        yield
    finally:
        if hasattr(batches, "close"):
            batches.close()


def first_examples(data: Data, split: str, count: int) -> dict[str, np.ndarray]:
    """The first `count` valid examples of a split of `data.eval`, fewer where it has not as many."""
    parts: list[Batch] = []
    found = 0
    batches = data.eval(split)
    with closing(batches):
        for batch in batches:
            parts.append({name: value[batch["valid"]] for name, value in batch.items()})
            found += len(parts[-1]["valid"])
            if found >= count:
                break
    return {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}
