# SPDX-License-Identifier: Apache-2.0
"""The compiled parts of a run: initialisation, training step, evaluation step, each over a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
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
from vtjax.train.state import TrainState, flatten, merge, prune, split
from vtjax.train.task import Batch, Task


class Program:
    """A task on a mesh. Building it traces `task.init` abstractly and touches no device.

    `step` and `evaluate_step` are jitted once; knobs, the key and the step enter as arrays, so other values of them
    reuse the compilation.

    Args:
      config: needs `optim, steps, batch_size, accumulate, ema, seed`.

    Raises:
      InputError: bad optimiser settings, or a batch that does not divide.
    """

    def __init__(self, task: Task, config: Any, mesh: Mesh):
        optim.check_batch(config.batch_size, config.accumulate, mesh)
        if not 0.0 <= config.ema < 1.0:
            raise InputError(f"config.ema must be in [0, 1), 0 = off, found {config.ema}")
        self.task, self.mesh = task, mesh
        self._decay, self._accumulate, self._batch_size = config.ema, config.accumulate, config.batch_size
        # Different streams for initialisation and training; step s uses fold_in(key, s).
        self._init_key, self.key = jax.random.split(jax.random.key(config.seed))
        params, self._frozen_shapes, extra = jax.eval_shape(self._init, self._init_key)
        self.groups = {path: task.trainable(path) for path in flatten(params)}
        self.optimiser, self.schedule = optim.make(config.optim, config.steps, params, task.trainable)
        trained, _ = split(params, self.groups)
        opt, ema = jax.eval_shape(self._start, trained)
        step = jax.ShapeDtypeStruct((), jnp.int32)
        state = TrainState(step=step, params=params, opt=opt, ema=ema, extra=extra)
        self.shardings = rules.shardings(state, mesh)
        self.abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, self.shardings
        )
        whole = mesh_lib.replicated(mesh)
        self.step = jax.jit(self._step, donate_argnums=0, out_shardings=(self.shardings, whole))
        self.evaluate_step = jax.jit(self._evaluate, out_shardings=whole)

    def knobs(self) -> dict[str, jax.Array]:
        """The task's knobs as float32 scalars."""
        whole = mesh_lib.replicated(self.mesh)
        return {name: jax.device_put(np.float32(value), whole) for name, value in self.task.knobs.items()}

    def init(self) -> tuple[TrainState, Any]:
        """`(state, frozen)` at step 0, every array born in its sharding."""
        params, frozen, extra = self._place(("params", "frozen", "extra"))
        shardings = self.shardings
        start = jax.jit(self._start, out_shardings=(shardings.opt, shardings.ema))
        opt, ema = start(split(params, self.groups)[0])
        step = jax.device_put(np.int32(0), shardings.step)
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
            lambda x, a: jax.device_put(np.asarray(x, a.dtype), a.sharding), prune(params), self.abstract.params
        )

    def averaged(self, state: TrainState) -> Any:
        """The parameters that evaluation uses: with the moving average where the run has one."""
        return merge(state.params, state.ema) if self._decay else state.params

    def evaluate(
        self, params: Any, frozen: Any, extra: Any, batches: Iterable[Batch], stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Mean metrics over all valid examples, and their `count`; None where `stop()` became true on the way.

        Raises:
          InputError: there are no valid examples, or the task reports no "count".
        """
        knobs = self.knobs()
        totals: dict[str, clu_metrics.Average] = {}
        pending: list[Any] = []
        for batch in batches:
            pending.append(self.evaluate_step(params, frozen, extra, knobs, mesh_lib.place(batch, self.mesh)))
            if len(pending) > 1:  # one batch behind, so that the host does not queue the whole split on the device
                _add(totals, pending.pop(0))
            if stop():
                return None
        for sums in pending:
            _add(totals, sums)
        count = float(totals["count"].total) if "count" in totals else 0.0
        if not count:
            raise InputError("the evaluation saw no valid examples, expected a split with at least one")
        means = {name: float(average.compute()) for name, average in totals.items() if name != "count"}
        return {**means, "count": int(count)}

    def metrics(self, batch: Batch) -> list[str]:
        """Names of the metrics that an evaluation reports; `batch` lends its shapes, nothing is computed."""
        rows = {
            name: jax.ShapeDtypeStruct((self._batch_size, *x.shape[1:]), x.dtype)
            for name, x in {k: np.asarray(v) for k, v in batch.items()}.items()
        }
        knobs = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in self.task.knobs}
        state = self.abstract
        sums = jax.eval_shape(self._evaluate, state.params, self._frozen_shapes, state.extra, knobs, rows)
        return sorted(set(sums) - {"count"})

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
        values = iter(jax.jit(leaves, out_shardings=computed)(self._init_key) if computed else [])
        placed = [jax.device_put(loaded[i], s) if i in loaded else next(values) for i, s in enumerate(shardings)]
        return jax.tree.unflatten(structure, placed)

    def _start(self, trained: Any) -> tuple[Any, Any]:
        ema = jax.tree.map(jnp.copy, trained) if self._decay else {}
        return self.optimiser.init(trained), ema

    def _step(
        self, state: TrainState, frozen: Any, knobs: Mapping[str, Any], batch: Any, key: jax.Array, step: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update. `step` is the host's count: where a masked update left the state behind it, nothing trains on."""
        trained, untrained = split(state.params, self.groups)

        def loss(trained: Any, rows: Any, key: jax.Array) -> tuple[jax.Array, Any]:
            params = merge(trained, untrained)
            return self.task.loss(params, frozen, state.extra, knobs, rows, key, state.step)

        grad = jax.value_and_grad(loss, has_aux=True)
        (value, reported), grads = optim.accumulate(
            lambda rows, key: grad(trained, rows, key), batch, jax.random.fold_in(key, state.step), self._accumulate
        )
        norm = optax.tree.norm(grads)
        updates, opt = self.optimiser.update(grads, state.opt, trained)
        new = optax.apply_updates(trained, updates)
        ema = {}
        if self._decay:
            ema = jax.tree.map(lambda e, p: self._decay * e + (1.0 - self._decay) * p, state.ema, new)
        finite = jnp.isfinite(value) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates))
        good = finite & (state.step == step)
        changed = (state.step + 1, new, opt, ema)
        before = (state.step, trained, state.opt, state.ema)
        count, new, opt, ema = jax.tree.map(lambda a, b: jnp.where(good, a, b), changed, before)
        state = dataclasses.replace(state, step=count, params=merge(untrained, new), opt=opt, ema=ema)
        rate = jnp.asarray(self.schedule(step), jnp.float32)
        return state, {**reported, "loss": value, "grad_norm": norm, "lr": rate, "finite": finite}

    def _evaluate(self, params: Any, frozen: Any, extra: Any, knobs: Any, batch: Any) -> Mapping[str, jax.Array]:
        return self.task.evaluate(params, frozen, extra, knobs, batch)


def _add(totals: dict[str, clu_metrics.Average], sums: Any) -> None:
    sums = jax.device_get(sums)
    for name, value in sums.items():
        one = clu_metrics.Average(total=np.float64(value), count=np.float64(sums.get("count", 0)))
        totals[name] = totals[name].merge(one) if name in totals else one
