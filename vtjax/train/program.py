# SPDX-License-Identifier: Apache-2.0
"""The compiled parts of a run: initialisation, training step, evaluation step, each over a mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics as clu_metrics
from jax.sharding import Mesh

from vtjax.errors import InputError
from vtjax.parallel import mesh as mesh_lib
from vtjax.parallel import rules
from vtjax.train import optim
from vtjax.train.executables import Executables
from vtjax.train.preempt import StopRequest
from vtjax.train.state import TrainState, flatten, merge, prune, split
from vtjax.train.task import Batch, Task


class Program:
    """A task on a mesh. Building it traces `task.init` abstractly and touches no device.

    `step(state, frozen, knobs, batch, key, count, stop)` and `evaluate_step(params, frozen, extra, knobs, batch, stop)`
    are jitted once; knobs, key, count and `stop` enter as arrays, so other values of them reuse the compilation.
    `stop` is int32 `[devices]`, a number on every device of the mesh, or None; the largest is given back, so that all
    processes learn at the same step that one of them was asked to stop.

    Args:
      config: needs `optim, steps, batch_size, accumulate, ema, seed`.
      executables: shared with other programs of this process, see `Executables`; None = compiled for this one alone.

    Raises:
      InputError: bad optimiser settings, or a batch that does not divide.
    """

    def __init__(self, task: Task, config: Any, mesh: Mesh, executables: Executables | None = None):
        optim.check_batch(config.batch_size, config.accumulate, mesh)
        if not 0.0 <= config.ema < 1.0:
            raise InputError(f"config.ema must be in [0, 1), 0 = off, found {config.ema}")
        self.task, self.mesh = task, mesh
        self._accumulate, self._batch_size = config.accumulate, config.batch_size
        self._averages = bool(config.ema)
        # What may differ without another compilation: the task's knobs, and the continuous settings of the optimiser.
        self._numbers = {**optim.numbers(config.optim), **({"ema": config.ema} if config.ema else {}), **task.knobs}
        # Different streams for initialisation and training; step s uses fold_in(key, s).
        self._init_key, self.key = jax.random.split(jax.random.key(config.seed))
        params, self._frozen_shapes, extra = jax.eval_shape(self._init, self._init_key)
        self.groups = {path: task.trainable(path) for path in flatten(params)}
        self._optimiser = functools.partial(optim.make, config.optim, config.steps, params, task.trainable)
        optimiser, _ = self._optimiser()
        trained, _ = split(params, self.groups)
        self._start = functools.partial(_start, optimiser, self._averages)
        opt, ema = jax.eval_shape(self._start, trained)
        step = jax.ShapeDtypeStruct((), jnp.int32)
        state = TrainState(step=step, params=params, opt=opt, ema=ema, extra=extra)
        self.shardings = rules.shardings(state, mesh)
        self.abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, self.shardings
        )
        whole = mesh_lib.replicated(mesh)
        share = (lambda fn, name: fn) if executables is None else executables.share
        self._jit = lambda fn, name, **options: share(jax.jit(fn, **options), name)
        self.step = self._jit(self._step, "step", donate_argnums=0, out_shardings=(self.shardings, whole))
        self.evaluate_step = self._jit(self._evaluate, "evaluate", out_shardings=whole)
        self._decide_step = self._jit(self._decide, "decide", out_shardings=whole)

    def place(self, batch: Batch) -> dict[str, jax.Array]:
        """This process's rows of a global batch, on the mesh as the task lays them out; raises as `mesh.place`."""
        return mesh_lib.place(batch, self.mesh, self._batch_size, self.task.frames)

    def knobs(self) -> dict[str, jax.Array]:
        """The task's knobs and the optimiser's continuous settings, as float32 scalars."""
        whole = mesh_lib.replicated(self.mesh)
        return {name: mesh_lib.put(np.float32(value), whole) for name, value in self._numbers.items()}

    def abstract_arguments(self, kind: str, batch: Mapping[str, tuple[tuple[int, ...], Any]]) -> tuple[Any, ...]:
        """What `step` ("train") or `evaluate_step` ("eval") takes, as `jax.ShapeDtypeStruct`s with shardings; for
        `step.lower(...)` on a mesh whose devices need not exist.

        Args:
          batch: shape and dtype of the arrays of a global batch, see `data.loader.batch_shapes`.
        """
        whole = mesh_lib.replicated(self.mesh)
        rows, frames = mesh_lib.batch_sharding(self.mesh), mesh_lib.frame_sharding(self.mesh)

        def struct(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        frozen = jax.tree.map(
            lambda x, s: struct(x.shape, x.dtype, s),
            self._frozen_shapes,
            rules.shardings(self._frozen_shapes, self.mesh),
        )
        knobs = {name: struct((), jnp.float32, whole) for name in self._numbers}
        arrays = {
            name: struct(shape, dtype, frames if name in self.task.frames else rows)
            for name, (shape, dtype) in batch.items()
        }
        state, stop = self.abstract, struct((self.mesh.size,), jnp.int32, mesh_lib.device_sharding(self.mesh))
        if kind == "eval":
            return state.params, frozen, state.extra, knobs, arrays, stop
        key = jax.eval_shape(lambda: self.key)
        return state, frozen, knobs, arrays, struct(key.shape, key.dtype, whole), struct((), jnp.int32, whole), stop

    def init(self) -> tuple[TrainState, Any]:
        """`(state, frozen)` at step 0, every array born in its sharding."""
        params, frozen, extra = self._place(("params", "frozen", "extra"))
        shardings = self.shardings
        start = self._jit(self._start, "start", out_shardings=(shardings.opt, shardings.ema))
        opt, ema = start(split(params, self.groups)[0])
        step = mesh_lib.put(np.int32(0), shardings.step)
        return TrainState(step=step, params=params, opt=opt, ema=ema, extra=extra), frozen

    def init_frozen(self) -> Any:
        """`frozen` alone: what a resumed run needs beside its checkpoint."""
        return self._place(("frozen",))[0]

    def init_extra(self) -> Any:
        """`extra` alone: what an evaluation of bare parameters needs."""
        return self._place(("extra",))[0]

    def place_params(self, params: Any) -> Any:
        """Host or device arrays in their sharding; trained ones as float32.

        Raises:
          InputError: a parameter is missing, superfluous or of another shape, by name.
        """
        have, want = flatten(params), flatten(self.abstract.params)
        for path in sorted(have | want):
            found, expected = (tuple(x[path].shape) if path in x else "absent" for x in (have, want))
            if found != expected:
                raise InputError(f"parameter {path!r} is {found}, expected {expected}")
        return jax.tree.map(
            lambda x, a: mesh_lib.put(np.asarray(x, a.dtype), a.sharding), prune(params), self.abstract.params
        )

    def place_extra(self, extra: Any) -> Any:
        """The method's state, from host arrays."""
        return jax.tree.map(mesh_lib.put, extra, self.shardings.extra)

    def averaged(self, state: TrainState) -> Any:
        """The parameters that evaluation uses: with the moving average where the run has one."""
        return merge(state.params, state.ema) if self._averages else state.params

    def evaluate(
        self, params: Any, frozen: Any, extra: Any, batches: Iterable[Batch], stop: StopRequest | None = None
    ) -> dict[str, float] | None:
        """Mean metrics over all valid examples, and their `count`; None where `stop` was heard of on the way.

        Raises:
          InputError: there are no valid examples, or the task reports no "count".
        """
        knobs = self.knobs()
        totals: dict[str, clu_metrics.Average] = {}
        pending: list[Any] = []
        for batch in batches:
            flag = None if stop is None else stop.flag(self.mesh)
            placed = self.place(batch)
            pending.append(self.evaluate_step(params, frozen, extra, knobs, placed, flag))
            if len(pending) > 1:  # one batch behind, so that the host does not queue the whole split on the device
                _add(totals, pending.pop(0), stop)
            if stop is not None and stop.now:
                return None
        for sums in pending:
            _add(totals, sums, stop)
        count = float(totals["count"].total) if "count" in totals else 0.0
        if not count:
            raise InputError("the evaluation saw no valid examples, expected a split with at least one")
        # A sum over a part of the examples, `name@part`, is divided by `count@part`.
        sizes = {name: float(average.total) for name, average in totals.items() if name.startswith("count@")}
        means = {name: float(average.compute()) for name, average in totals.items() if name != "count"}
        means = {name: mean for name, mean in means.items() if name not in sizes}
        for name in means:
            if size := sizes.get(f"count@{name.partition('@')[2]}"):
                means[name] = float(totals[name].total) / size
        return {**means, "count": int(count)}

    def decide(self, params: Any, frozen: Any, extra: Any, batches: Iterable[Batch]) -> Iterator[dict[str, np.ndarray]]:
        """What the task decides, batch by batch, for the valid rows: its `decisions`, `index` and `label`."""
        knobs = self.knobs()
        for batch in batches:
            placed = self.place(batch)
            rows = jax.device_get(self._decide_step(params, frozen, extra, knobs, placed))
            valid = rows.pop("valid")
            yield {name: np.asarray(value)[valid] for name, value in rows.items()}

    def metrics(self, batch: Batch) -> list[str]:
        """Names of the metrics that an evaluation reports; `batch` lends its shapes, nothing is computed."""
        rows = {
            name: jax.ShapeDtypeStruct((self._batch_size, *x.shape[1:]), x.dtype)
            for name, x in {k: np.asarray(v) for k, v in batch.items()}.items()
        }
        knobs = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in self._numbers}
        state = self.abstract
        sums, _ = jax.eval_shape(self._evaluate, state.params, self._frozen_shapes, state.extra, knobs, rows)
        return sorted(name for name in sums if name.partition("@")[0] != "count")

    def _init(self, key: jax.Array) -> tuple[Any, Any, Any]:
        params, frozen, extra = self.task.init(key)
        params = prune(params)

        def master(keys: Any, x: Any) -> Any:
            floating = jnp.issubdtype(jnp.result_type(x), jnp.floating)
            if not floating or self.task.trainable(rules.path_of(keys)) is None:
                return x
            # A loaded array stays on the host.
            return x.astype(jnp.float32) if isinstance(x, jax.core.Tracer) else np.asarray(x, np.float32)

        return jax.tree_util.tree_map_with_path(master, params), frozen, extra

    def _place(self, parts: tuple[str, ...]) -> list[Any]:
        """Some of params, frozen, extra. What the key decides is computed in place; what is loaded is put in place."""
        layout = {
            "params": self.shardings.params,
            "frozen": rules.shardings(self._frozen_shapes, self.mesh),
            "extra": self.shardings.extra,
        }
        wanted = [layout[part] for part in parts]
        shardings, structure = jax.tree.flatten(wanted)
        loaded: dict[int, Any] = {}

        def leaves(key: jax.Array) -> list[Any]:
            tree = dict(zip(("params", "frozen", "extra"), self._init(key), strict=True))
            flat = jax.tree.leaves([tree[part] for part in parts])
            loaded.update({i: x for i, x in enumerate(flat) if not isinstance(x, jax.core.Tracer)})
            return [x for x in flat if isinstance(x, jax.core.Tracer)]

        jax.eval_shape(leaves, self._init_key)
        computed = [s for i, s in enumerate(shardings) if i not in loaded]
        made = self._jit(leaves, "init", out_shardings=computed)(self._init_key) if computed else []
        values = iter(made)
        placed = [mesh_lib.put(loaded[i], s) if i in loaded else next(values) for i, s in enumerate(shardings)]
        return jax.tree.unflatten(structure, placed)

    def _step(
        self,
        state: TrainState,
        frozen: Any,
        knobs: Mapping[str, Any],
        batch: Any,
        key: jax.Array,
        step: jax.Array,
        stop: jax.Array | None = None,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update. `step` is the host's count: where a masked update left the state behind it, nothing trains on."""
        optimiser, schedule = self._optimiser(knobs)
        trained, untrained = split(state.params, self.groups)

        def loss(trained: Any, rows: Any, key: jax.Array) -> tuple[jax.Array, Any]:
            params = merge(trained, untrained)
            return self.task.loss(params, frozen, state.extra, knobs, rows, key, state.step)

        grad = jax.value_and_grad(loss, has_aux=True)
        (value, reported), grads = optim.accumulate(
            lambda rows, key: grad(trained, rows, key), batch, jax.random.fold_in(key, state.step), self._accumulate
        )
        norm = optax.tree.norm(grads)
        updates, opt = optimiser.update(grads, state.opt, trained)
        new = _clamped(optax.apply_updates(trained, updates), self.task.bounds)
        ema = {}
        if self._averages:
            decay = knobs.get("ema", self._numbers["ema"])
            ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, state.ema, new)
        finite = jnp.isfinite(value) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates))
        good = finite & (state.step == step)
        changed = (state.step + 1, new, opt, ema)
        before = (state.step, trained, state.opt, state.ema)
        count, new, opt, ema = jax.tree.map(lambda a, b: jnp.where(good, a, b), changed, before)
        state = dataclasses.replace(state, step=count, params=merge(untrained, new), opt=opt, ema=ema)
        rate = jnp.asarray(schedule(step), jnp.float32)
        values = {**reported, "loss": value, "grad_norm": norm, "lr": rate, "finite": finite, "stop": _asked(stop)}
        return state, values

    def _evaluate(
        self, params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any, stop: jax.Array | None = None
    ) -> tuple[Mapping[str, jax.Array], jax.Array]:
        return self.task.evaluate(params, frozen, extra, knobs, batch), _asked(stop)

    def _decide(self, params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any) -> dict[str, jax.Array]:
        told = {name: batch[name] for name in ("index", "label", "valid") if name in batch}
        assert self.task.decisions is not None
        return {**told, **self.task.decisions(params, frozen, extra, knobs, batch)}


def _start(optimiser: optax.GradientTransformation, averages: bool, trained: Any) -> tuple[Any, Any]:
    return optimiser.init(trained), jax.tree.map(jnp.copy, trained) if averages else {}


def _clamped(trained: Any, bounds: Callable[[str], tuple[float, float] | None]) -> Any:
    def clamp(keys: Any, x: Any) -> Any:
        limits = bounds(rules.path_of(keys))
        return x if limits is None else jnp.clip(x, *limits)

    return jax.tree_util.tree_map_with_path(clamp, trained)


def _asked(stop: jax.Array | None) -> jax.Array:
    return jnp.int32(0) if stop is None else stop.max()


def _add(totals: dict[str, clu_metrics.Average], result: Any, stop: StopRequest | None) -> None:
    sums, asked = jax.device_get(result)
    if stop is not None:
        stop.hear(int(asked))
    for name, value in sums.items():
        one = clu_metrics.Average(total=np.float64(value), count=np.float64(sums.get("count", 0)))
        totals[name] = totals[name].merge(one) if name in totals else one
