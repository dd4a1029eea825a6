# SPDX-License-Identifier: Apache-2.0
"""The one training loop. A method contributes a `Task`; nothing here knows one.

A step s is counted from 1, when it is done: dispatch s, fetch the batch of s + 1, look at the metrics of s - 1. So the
host is a step ahead of the device, and a step that is not finite stops the run one step later; the compiled step has
masked it and the one after it. Where s is evaluated, saved or the last, its own metrics are looked at first, so that no
bad state is evaluated or saved; and so where it is the first of the process, from which on throughput is counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from vtjax.errors import InputError, NonFiniteError, Preempted
from vtjax.parallel import mesh as mesh_lib
from vtjax.train import log
from vtjax.train import workdir as workdir_lib
from vtjax.train.checkpoint import Checkpoints, best_step
from vtjax.train.executables import Executables
from vtjax.train.preempt import StopRequest
from vtjax.train.program import Program
from vtjax.train.state import params_sha256, split
from vtjax.train.task import Batch, Data, Task, closing, facts

SIGNS = ("finite", "stop")  # what a step reports to the loop, not to the log


def train(
    task: Task, data: Data, config: Any, workdir: str | os.PathLike[str], executables: Executables | None = None
) -> dict[str, Any]:
    """Trains and evaluates, or resumes; returns the content of `result.json`.

    Writes `config.json, spec.json, metrics.jsonl, checkpoints/, result.json` into `workdir`; progress goes to stderr. A
    finished run returns its result at once. `config.init_from` is only recorded: `task.init` has applied it, and a
    checkpoint in `workdir` goes before it.

    Args:
      config: needs `experiment, seed, steps, batch_size, init_from, mesh, optim, accumulate, ema, log_every,
        eval_every, checkpoint, profile, allow_config_change`.
      executables: compiled programs that several runs of this process share.

    Raises:
      InputError: bad settings; a config or spec other than the one that the run began with, unless
        `config.allow_config_change`; a checkpoint that does not fit.
      NonFiniteError: a loss, gradient or update that is not finite.
      Preempted: SIGTERM or SIGINT arrived; the state is saved. Its code is `errors.EXIT_PREEMPTED` or
        `errors.EXIT_INTERRUPTED`. A second SIGINT raises KeyboardInterrupt.
    """
    folder = log.absolute(workdir)
    with StopRequest() as stop:
        workdir_lib.check_settings(config, data)
        workdir_lib.check_shared(folder)
        workdir_lib.refuse_changes(folder, task, config)
        if (result := workdir_lib.finished(folder, config.steps)) is not None:
            print(f"{folder} is finished (step {config.steps}); its result stands", file=sys.stderr)
            return result
        program = Program(task, config, mesh_lib.make(config.mesh), executables)
        with jax.set_mesh(program.mesh), contextlib.ExitStack() as stack:
            _check_best(program, data, config.checkpoint.best)
            run = _Run(program, data, config, folder, stop, stack)
            run.loop()
            return run.result()


def evaluate(
    task: Task, data: Data, config: Any, params: Any, extra: Any = None, executables: Executables | None = None
) -> dict[str, float]:
    """Metrics of `params` on the evaluation split: every valid example counts once, at any batch size or device count.

    Args:
      params: nested dict of host or device arrays.
      extra: the method's state; what `task.init` gives where None.
      executables: as of `train`.

    Returns:
      Mean metrics and `count`.

    Raises:
      InputError: params that do not fit the task's model, by name; no valid example.
    """
    program = Program(task, config, mesh_lib.make(config.mesh), executables)
    with jax.set_mesh(program.mesh):
        params = program.place_params(params)
        extra = program.init_extra() if extra is None else program.place_extra(extra)
        return program.evaluate(params, program.init_frozen(), extra, data.eval("eval")) or {}


def decisions(
    task: Task,
    batches: Iterable[Batch],
    config: Any,
    params: Any,
    extra: Any = None,
    executables: Executables | None = None,
) -> dict[str, np.ndarray]:
    """`task.decisions` for every valid row of the batches, concatenated: `{name: [n, ...]}` with `index` and `label`.

    Raises:
      InputError: a task that decides nothing; params that do not fit its model, by name.
    """
    if task.decisions is None:
        raise InputError(f"experiment {config.experiment!r} decides nothing per image, expected one that does")
    program = Program(task, config, mesh_lib.make(config.mesh), executables)
    with jax.set_mesh(program.mesh):
        params = program.place_params(params)
        extra = program.init_extra() if extra is None else program.place_extra(extra)
        parts = list(program.decide(params, program.init_frozen(), extra, batches))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class _Run:
    """This process's part of a run: from the step where it starts or resumes to the last."""

    def __init__(
        self,
        program: Program,
        data: Data,
        config: Any,
        folder: epath.Path,
        stop: StopRequest,
        stack: contextlib.ExitStack,
    ):
        self.program, self.data, self.config, self.folder, self.stop = program, data, config, folder, stop
        self.began = time.time()
        self.checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep, config.checkpoint.best)
        stack.callback(self.checkpoints.close)
        self.saved = self.checkpoints.latest
        self.start = max(self.saved, 0)
        if self.start > config.steps:
            raise InputError(f"config.steps must be {self.start} or more, where {folder} stands, found {config.steps}")
        if self.saved < 0:
            self.state, self.frozen = program.init()
            if program.task.begin is not None:
                self._replace(program.task.begin(self.state.params))
        else:
            self.state, self.frozen = self.checkpoints.restore(self.saved, program.abstract), program.init_frozen()
        self.meta = {
            "spec": program.task.spec.to_dict(),
            "config": log.plain(config),
            "versions": log.versions(),
            "frozen_sha256": params_sha256(self.frozen) if jax.tree.leaves(self.frozen) else "",
        }
        self._check_frozen()
        log.write_json(folder / "config.json", self.meta["config"])
        log.write_text(folder / "spec.json", program.task.spec.to_json())
        self.values = self.checkpoints.metrics.get(self.saved, {})
        self.lines = log.Lines(folder / "metrics.jsonl", self.start)
        self.board = log.TensorBoard(folder)
        self.progress = log.Progress(config.steps, config.batch_size)
        stack.callback(self.progress.close)
        if self.saved < 0:
            self.progress.say(log.parameters(self.state.params))
        else:
            self.progress.say(f"resumed from {self.checkpoints.path(self.saved)} (step {self.saved} of {config.steps})")
        if (over := program.mesh.shape["context"]) > 1 and not program.task.frames:
            self.progress.say(
                f"config.mesh.context={over} lays the frames of videos over devices, which this task has none of: "
                "beside holding parameters, devices along that axis repeat each other's work"
            )

    def loop(self) -> None:
        """Runs to the last step, which is evaluated and saved."""
        config, program = self.config, self.program
        after_step = program.task.after_step
        knobs = program.knobs()
        # A signal during an evaluation saves at once, and leaves the evaluation to the next start.
        if self.saved > 0 and self._evaluates(self.saved) and not self.values:
            if not self._evaluate(self.saved):
                self._leave()
            self.checkpoints.annotate(self.saved, self.values)
        pending: tuple[int, Any] | None = None
        batches, first = self.data.train(self.start), self.start + 1
        with closing(batches), log.Profile(config.profile, self.folder / "profile") as profile:
            batch = self._next(batches) if first <= config.steps else None
            for step in range(first, config.steps + 1):
                if self.stop.now:
                    self._stop(step - 1, pending)
                if step == first:
                    self.progress.say("compiling the training step ...")
                profile.before(step - 1)
                count = np.int32(step - 1)
                flag = self.stop.flag(program.mesh)
                self.state, metrics = program.step(self.state, self.frozen, knobs, batch, program.key, count, flag)
                profile.after(step - 1, self.state.step)
                if step == first:
                    self._settle(step, metrics)
                batch = self._next(batches) if step < config.steps else None
                if pending is not None:
                    self._settle(*pending)
                pending = (step, metrics) if step > first else None
                ends = self._evaluates(step) or self._saves(step)
                if pending is not None and ends:
                    self._settle(*pending)
                    pending = None
                if after_step is not None:
                    state = after_step(self.state, self.frozen, self._draw, step)
                    self.state = jax.device_put(state, program.shardings)
                if step == config.steps and program.task.finish is not None:
                    self._finish(program.task.finish, knobs)
                if ends:
                    self._boundary(step)
                    self.progress.resume()
        self.checkpoints.wait()

    def result(self) -> dict[str, Any]:
        """Writes `result.json` and returns it."""
        config, task, best = self.config, self.program.task, self.config.checkpoint.best
        top = best_step(self.checkpoints.metrics, best)
        hashes = {"frozen_sha256": self.meta["frozen_sha256"]} if self.meta["frozen_sha256"] else {}
        if config.ema:
            hashes["ema_sha256"] = params_sha256(self.state.ema)
        result = {
            "experiment": config.experiment,
            "seed": config.seed,
            "step": config.steps,
            "init_from": config.init_from,
            **facts(task, self.state.extra),
            **self.values,
            **({} if top is None else {"best_step": top, f"best_{best}": self.checkpoints.metrics[top][best]}),
            "params_sha256": params_sha256(self.state.params),
            **hashes,
            "spec_sha256": task.spec.sha256,
            **({"images_per_s": round(speed, 2)} if (speed := self.progress.images_per_s) else {}),
            "seconds": round(time.time() - self.began, 2),
            "memory_gib": round(log.memory_gib(), 3),
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "versions": self.meta["versions"],
        }
        log.write_json(self.folder / "result.json", result)
        return log.plain(result)

    def _finish(self, finish: Callable[..., Any], knobs: Any) -> None:
        """The last touch of the host, on what will be evaluated."""
        self.progress.pause()
        averaged = self.program.averaged(self.state)
        self._replace(finish(averaged, self.frozen, self.state.extra, knobs, self._draw))

    def _replace(self, params: Any) -> None:
        """Other parameters, and with them their moving average."""
        # A copy: the step is given both to overwrite.
        ema = jax.tree.map(jnp.copy, split(params, self.program.groups)[0]) if self.config.ema else self.state.ema
        changed = dataclasses.replace(self.state, params=params, ema=ema)
        self.state = jax.device_put(changed, self.program.shardings)

    def _boundary(self, step: int) -> None:
        """Evaluates and saves a state whose metrics are known to be good."""
        whole = True
        self.values = {}
        if self._evaluates(step):
            whole = self._evaluate(step)
        improved = best_step({**self.checkpoints.metrics, step: self.values}, self.config.checkpoint.best) == step
        if self._saves(step) or improved or not whole:
            self._save(step)
        if not whole:
            self._leave()

    def _evaluate(self, step: int) -> bool:
        """Evaluates into `values` and the log; False where a signal broke it off."""
        self.progress.pause()
        params, extra = self.program.averaged(self.state), self.state.extra
        say = functools.partial(self.progress.say, keep=False)
        batches = log.watched(self.data.eval("eval"), self.data.eval_examples, say)
        values = self.program.evaluate(params, self.frozen, extra, batches, self.stop)
        if values is None:
            return False
        self.values = values
        self._write(step, {f"eval/{name}": value for name, value in values.items()})
        self.progress.say(f"step {step} evaluation: " + "  ".join(f"{k} {v:.6g}" for k, v in values.items()))
        return True

    def _save(self, step: int) -> None:
        self.progress.pause()
        self.checkpoints.save(self.state, step, self.meta, self.values)
        self.saved = step

    def _settle(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Looks at the metrics of a step: stops where they are not finite, logs them where it is time."""
        self.stop.hear(int(metrics["stop"]))
        if not bool(metrics["finite"]):
            self.checkpoints.wait()
            good = self.checkpoints.path(self.checkpoints.latest) if self.checkpoints.latest >= 0 else "none"
            values = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
            update = ", but the optimiser's update is not" if np.isfinite(list(values.values())).all() else ""
            raise NonFiniteError(
                f"step {step} has loss {values['loss']} and gradient norm {values['grad_norm']}, "
                f"expected finite ones{update}; the update was masked, nothing trained on it; "
                f"last good checkpoint: {good}"
            )
        self.progress.done()
        logged = step % self.config.log_every == 0 or step == self.config.steps
        if logged or step == self.start + 1:
            values = {name: float(value) for name, value in jax.device_get(metrics).items() if name not in SIGNS}
            if logged:
                self._write(step, values)
            self.progress.show(step, values)

    def _write(self, step: int, values: dict[str, float]) -> None:
        self.lines.write(step, values)
        self.board.write(step, values)

    def _stop(self, step: int, pending: tuple[int, Any] | None) -> NoReturn:
        """A signal between two steps: saves what is new, and leaves."""
        if pending is not None:
            self._settle(*pending)
        if step > self.start and step != self.saved:
            self._save(step)
        self._leave()

    def _leave(self) -> NoReturn:
        self.checkpoints.wait()
        where = self.checkpoints.path(self.saved) if self.saved >= 0 else "nothing yet"
        code = self.stop.exit_code
        self.progress.say(f"{self.stop.name}: saved {where}; the same command resumes (exit code {code})")
        raise Preempted(code)

    def _check_frozen(self) -> None:
        if self.saved < 0 or self.config.allow_config_change:
            return
        began, now = self.checkpoints.meta(self.saved)["frozen_sha256"], self.meta["frozen_sha256"]
        if began != now:
            raise InputError(f"the frozen arrays have SHA-256 {now or None}, expected {began or None} as at the start")

    def _evaluates(self, step: int) -> bool:
        every = self.config.eval_every
        return step == self.config.steps or bool(every and step % every == 0)

    def _saves(self, step: int) -> bool:
        every = self.config.checkpoint.every
        return step == self.config.steps or bool(every and step % every == 0)

    def _next(self, batches: Iterator[Batch]) -> dict[str, jax.Array]:
        return self.program.place(next(batches))

    def _draw(self, split: str, index: int) -> dict[str, jax.Array]:
        return self.program.place(self.data.draw(split, index))


def _check_best(program: Program, data: Data, best: str) -> None:
    if best and best not in (known := program.metrics(data.draw("eval", 0))):
        raise InputError(f"config.checkpoint.best must be a metric, {', '.join(known)}, or '' for none, found {best!r}")
