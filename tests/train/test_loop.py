# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.train import toy
from vtjax.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, InputError, NonFiniteError, Preempted
from vtjax.spec import from_json
from vtjax.train import checkpoint, log, loop, workdir
from vtjax.train.state import params_sha256


class Stop(Exception):
    """A kill, as far as the run can tell."""


class Interrupted(toy.Data):
    """Ends the process's run where batch `last` is asked for."""

    def __init__(self, config: Any, last: int, how: Any = Stop):
        super().__init__(config)
        self.last, self.how = last, how

    def train(self, start_step: int) -> Iterator[Any]:
        for step, batch in enumerate(super().train(start_step), start_step):
            if step == self.last:
                if not isinstance(self.how, signal.Signals):
                    raise self.how
                os.kill(os.getpid(), self.how)
            yield batch


def run(config: Any, folder: Path, data: Any = None, **task: Any) -> dict[str, Any]:
    return loop.train(toy.task(config, **task), data or toy.Data(config), config, folder)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """An uninterrupted run with everything that has state: moving average, evaluations, accumulation."""
    folder = tmp_path_factory.mktemp("straight")
    return run(full(), folder), folder


def full() -> Any:
    return toy.config(ema=0.9, eval_every=5, accumulate=2, checkpoint__every=4)


def test_a_run_leaves_its_files(straight: Any) -> None:
    result, folder = straight
    assert json.loads((folder / "result.json").read_text()) == result
    assert json.loads((folder / "config.json").read_text()) == log.plain(full())
    assert from_json((folder / "spec.json").read_text()) == toy.SPEC
    assert [line["step"] for line in lines(folder)] == list(range(1, 11))
    assert {"loss", "top1", "lr", "grad_norm"} <= set(lines(folder)[0])
    assert [line["step"] for line in lines(folder) if "eval/top1" in line] == [5, 10]
    assert result["step"] == 10 and result["count"] == 21 and 0 <= result["top1"] <= 1
    assert result["best_top1"] >= result["top1"]
    assert result["versions"]["jax"] == jax.__version__
    spec, params = checkpoint.load_params(folder, ema=False)
    assert spec == toy.SPEC
    assert params_sha256(params) == result["params_sha256"]
    assert not list(folder.glob(".*.tmp"))


def test_the_evaluation_uses_the_moving_average(straight: Any) -> None:
    result, folder = straight
    config = full()
    _, averaged = checkpoint.load_params(folder)
    assert params_sha256(averaged) == result["ema_sha256"]
    values = loop.evaluate(toy.task(config), toy.Data(config), config, averaged)
    assert values == {name: result[name] for name in ("loss", "top1", "count")}


@pytest.mark.parametrize("last", [3, 4, 5, 8, 9])
def test_ten_steps_are_four_and_a_kill_and_six(straight: Any, tmp_path: Path, last: int) -> None:
    result, folder = straight
    with pytest.raises(Stop):
        run(full(), tmp_path, Interrupted(full(), last))
    resumed = run(full(), tmp_path)
    for name in ("params_sha256", "ema_sha256", "top1", "loss", "best_step", "best_top1"):
        assert resumed[name] == result[name], name
    assert (tmp_path / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("number", "code", "last"),
    [(signal.SIGTERM, 75, 3), (signal.SIGTERM, 75, 5), (signal.SIGTERM, 75, 8), (signal.SIGINT, 130, 3)],
)
def test_a_signal_saves_at_once_and_the_next_start_goes_on(
    straight: Any, tmp_path: Path, number: signal.Signals, code: int, last: int, capfd: Any
) -> None:
    result, folder = straight
    before = signal.getsignal(number)
    with pytest.raises(Preempted) as caught:
        run(full(), tmp_path, Interrupted(full(), last, number))
    assert caught.value.code == code and code in (EXIT_PREEMPTED, EXIT_INTERRUPTED)
    assert signal.getsignal(number) == before
    said = capfd.readouterr().err
    assert f"{number.name}: saved {tmp_path}/checkpoints/{last}; the same command resumes (exit code {code})" in said
    assert ("a second one ends at once" in said) == (number == signal.SIGINT)
    assert checkpoint.load_meta(tmp_path)["step"] == last
    assert run(full(), tmp_path)["params_sha256"] == result["params_sha256"]
    assert f"resumed from {tmp_path}/checkpoints/{last} (step {last} of 10)" in capfd.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_a_second_sigint_ends_at_once(tmp_path: Path) -> None:
    workers = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist's ignore it
    before = signal.getsignal(signal.SIGINT)

    def twice(state: Any, frozen: Any, draw: Any, step: int) -> Any:
        """In the main thread, so that nothing happens between the two."""
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            while signal.getsignal(signal.SIGINT) != before:  # two signals at once are one
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        return state

    try:
        with pytest.raises(KeyboardInterrupt):
            run(toy.config(checkpoint__every=100), tmp_path, after_step=twice)
        assert signal.getsignal(signal.SIGINT) == before
    finally:
        signal.signal(signal.SIGINT, workers)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_sigterm_in_an_evaluation_leaves_it_to_the_next_start(straight: Any, tmp_path: Path) -> None:
    result, folder = straight

    class Data(toy.Data):
        def eval(self, split: str = "eval") -> Iterator[Any]:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().eval(split)

    for step in (5, 10):
        with pytest.raises(Preempted):
            run(full(), tmp_path, Data(full()))
        assert checkpoint.load_meta(tmp_path)["step"] == step
        # The owed evaluation first, then on to the next one.
        if step == 5:
            with pytest.raises(Preempted):
                run(full(), tmp_path, Interrupted(full(), 5, signal.SIGTERM))
    resumed = run(full(), tmp_path)
    for name in ("params_sha256", "ema_sha256", "top1", "loss", "best_step", "best_top1"):
        assert resumed[name] == result[name], name
    assert (tmp_path / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_a_finished_run_keeps_its_result(straight: Any, capsys: Any) -> None:
    result, folder = straight
    before = (folder / "result.json").read_bytes()
    assert run(full(), folder, Interrupted(full(), 0)) == result
    assert (folder / "result.json").read_bytes() == before
    assert "is finished (step 10)" in capsys.readouterr().err


def test_a_lost_result_is_made_again_from_the_last_checkpoint(straight: Any, tmp_path: Path) -> None:
    result, folder = straight
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "result.json").unlink()
    again = run(full(), tmp_path / "copy", Interrupted(full(), 0))
    for name in ("params_sha256", "top1", "loss", "count", "best_step"):
        assert again[name] == result[name]


def test_changes_of_the_config_are_named_and_refused(straight: Any, tmp_path: Path) -> None:
    config = toy.config(steps=4)
    run(config, tmp_path)
    changed = toy.config(steps=6, optim__lr=0.1, data__name="digits", log_every=2, workdir="elsewhere")
    with pytest.raises(InputError) as caught:
        run(changed, tmp_path)
    message = str(caught.value)
    for part in ("steps was 4, found 6", "optim.lr was 0.05, found 0.1", "data.name was 'procedural', found 'digits'"):
        assert part in message
    assert "log_every" not in message and "workdir was" not in message and "\n" not in message
    assert message.endswith("(--config.allow_config_change=true)")
    assert run(toy.config(steps=4, log_every=3, profile=(2, 3)), tmp_path)["step"] == 4

    changed.allow_config_change = True
    result = run(changed, tmp_path)
    assert result["step"] == 6
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["lr"] == 0.1
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 6]
    shorter = toy.config(steps=3, allow_config_change=True)
    with pytest.raises(InputError, match="steps must be 6 or more, where .* stands, found 3"):
        run(shorter, tmp_path)


def test_another_spec_is_named_and_refused(tmp_path: Path) -> None:
    config = toy.config(steps=2)
    run(config, tmp_path)
    with pytest.raises(InputError, match="spec.classes was 3, found 5"):
        run(config, tmp_path, spec=toy.SPEC.edit(classes=5))


def test_another_model_under_the_same_config_is_named(tmp_path: Path) -> None:
    config = toy.config(steps=2)
    run(config, tmp_path)
    (tmp_path / "result.json").unlink()
    with pytest.raises(InputError, match=r"does not fit: params/block_00/mlp/up/bias is \(8,\) there, expected \(9,\)"):
        run(config, tmp_path, hidden=9)


def test_another_teacher_is_refused(tmp_path: Path) -> None:
    config = toy.config(steps=4)
    with pytest.raises(Stop):
        run(config, tmp_path, Interrupted(config, 3), teacher=True)
    assert not (tmp_path / "checkpoints" / "2" / "frozen").exists()
    with pytest.raises(InputError, match="the frozen arrays have SHA-256 None, expected [0-9a-f]{64}"):
        run(config, tmp_path)
    assert len(run(config, tmp_path, teacher=True)["frozen_sha256"]) == 64


@pytest.mark.parametrize("poison", [3, 4, 9])
def test_a_step_that_is_not_finite_stops_the_run_one_step_later(tmp_path: Path, poison: int) -> None:
    config = toy.config(checkpoint__every=4)
    seen = []

    class Data(toy.Data):
        def train(self, start_step: int) -> Iterator[Any]:
            for step, batch in enumerate(super().train(start_step)):
                seen.append(step)
                yield batch

    last = 4 if poison == 4 else 0 if poison == 3 else 8
    where = f"{tmp_path}/checkpoints/{last}" if last else "none"
    with pytest.raises(NonFiniteError) as caught:
        run(config, tmp_path, Data(config, poison=poison))
    assert str(caught.value).startswith(f"step {poison + 1} has loss nan and gradient norm nan, expected finite ones")
    assert str(caught.value).endswith(f"last good checkpoint: {where}")
    assert max(seen) <= poison + 2  # the batch that is fetched ahead
    assert not (tmp_path / "result.json").exists()
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [s for s in (4, 8) if s <= poison]
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, poison + 1))


def test_an_update_that_alone_is_not_finite_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        NonFiniteError, match=r"step 1 has loss \d.*, but the optimiser's update is not; the update was"
    ):
        run(toy.config(optim__lr=1e38, optim__weight_decay=1e38), tmp_path)


def test_after_step_changes_the_state_and_draws_validation_batches(tmp_path: Path) -> None:
    config = toy.config(steps=6)
    drawn = []

    def after_step(state: Any, frozen: Any, draw: Any, step: int) -> Any:
        assert step == int(state.step)
        batch = draw("eval", int(state.step))
        drawn.append(np.asarray(batch["image"])[0, 0])
        return dataclasses.replace(state, extra={"counter": state.extra["counter"] + int(state.step)})

    with pytest.raises(Stop):
        run(config, tmp_path, Interrupted(config, 3), after_step=after_step)
    run(config, tmp_path, after_step=after_step)
    assert int(checkpoint.load_extra(tmp_path)["counter"]) == 1 + 2 + 3 + 4 + 5 + 6
    expected = [toy.Data(config).draw("eval", i)["image"][0, 0] for i in (1, 2, 3, 3, 4, 5, 6)]
    assert drawn == expected or drawn == expected[:2] + expected[3:]


def test_knobs_reach_the_loss(tmp_path: Path) -> None:
    config = toy.config(steps=1)
    hot = run(config, tmp_path / "hot", knobs={"temperature": 2.0})
    cold = run(config, tmp_path / "cold", knobs={"temperature": 1.0})
    assert hot["params_sha256"] != cold["params_sha256"]


def test_a_profile_is_written(tmp_path: Path) -> None:
    run(toy.config(steps=4, profile=(1, 3)), tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


PROFILE = "config.profile must be (start, stop) with 0 <= start < stop and start < config.steps=10, or (0, 0) for none"


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ({"steps": 0}, "config.steps must be 1 or more, found 0"),
        ({"log_every": 0}, "config.log_every must be 1 or more, found 0"),
        ({"profile": (5, 3)}, f"{PROFILE}, found (5, 3)"),
        ({"profile": (-1, 3)}, f"{PROFILE}, found (-1, 3)"),
        ({"profile": (10, 12)}, f"{PROFILE}, found (10, 12)"),
        ({"checkpoint__keep": 0}, "config.checkpoint.keep must be 1 or more, found 0"),
        ({"accumulate": 3}, "batch_size must be a multiple of accumulate x (data x fsdp) = 3 x 1, found 8"),
        (
            {"mesh__data": 5},
            "mesh data=5, fsdp=1, context=1, tensor=1 does not fit 1 devices, expected that many as product",
        ),
    ],
)
def test_bad_settings_leave_nothing_behind(tmp_path: Path, leaves: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        run(toy.config(**leaves), tmp_path / "new")
    assert str(caught.value) == message
    assert not (tmp_path / "new").exists()


def test_without_training_examples_nothing_begins(tmp_path: Path) -> None:
    data = toy.Data(full())
    data.train_examples = 0
    with pytest.raises(InputError, match="data.train_split must name a split to train on"):
        run(full(), tmp_path / "new", data)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("name", "text"), [("config.json", "{"), ("result.json", "[]"), ("spec.json", "\udcff")])
def test_a_damaged_file_of_a_run_is_named(straight: Any, tmp_path: Path, name: str, text: str) -> None:
    shutil.copytree(straight[1], tmp_path / "copy")
    (tmp_path / "copy" / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=rf"{name} must (be JSON|hold a JSON object)"):
        run(full(), tmp_path / "copy")


def test_a_spec_field_newer_than_the_run_is_no_change(straight: Any, tmp_path: Path) -> None:
    shutil.copytree(straight[1], tmp_path / "copy")
    spec = json.loads((tmp_path / "copy" / "spec.json").read_text())
    assert spec.pop("registers") == 0
    (tmp_path / "copy" / "spec.json").write_text(json.dumps(spec))
    assert run(full(), tmp_path / "copy")["step"] == 10


def test_a_second_run_in_the_same_workdir_is_refused(tmp_path: Path) -> None:
    config = full()

    class Meanwhile(toy.Data):
        def train(self, start_step: int) -> Any:
            with pytest.raises(InputError, match=f"another run is at work in {tmp_path}"):
                run(config, tmp_path)
            yield from super().train(start_step)

    assert run(config, tmp_path, Meanwhile(config))["step"] == 10


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    (tmp_path / ".spec.json.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        run(full(), tmp_path)
    assert caught.value.filename == str(tmp_path / "spec.json")


def test_a_save_that_fails_is_one_line_and_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def full_disk(self: Any, *args: Any) -> None:
        raise ValueError("RESOURCE_EXHAUSTED:\n No space left on device")

    config = full()
    with pytest.raises(Stop):
        run(config, tmp_path, Interrupted(config, 7))
    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.CheckpointManager.check_for_errors", full_disk)
        line = r"checkpoint .*/checkpoints/8 could not be written: RESOURCE_EXHAUSTED: No space left on device"
        with pytest.raises(OSError, match=line):
            run(config, tmp_path)
    capsys.readouterr()
    assert run(config, tmp_path)["step"] == 10
    assert "(step 5 of 10)" in capsys.readouterr().err


def test_lines_drop_what_lies_beyond_and_what_is_torn(tmp_path: Path) -> None:
    path = log.absolute(tmp_path / "metrics.jsonl")
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2}\n{"step": 4}\n{"step": 6}\n{"step": 7, "lo')
    again = log.Lines(path, 4)
    assert path.read_text() == '{"step": 1, "loss": 3}\n{"step": 2}\n{"step": 4}\n'
    again.write(4, {"eval/top1": 0.5})
    again.write(5, {"loss": float("nan"), "n": np.int64(3), "x": np.float32(0.5)})
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert kept[2:] == [{"step": 4, "eval/top1": 0.5}, {"step": 5, "loss": "nan", "n": 3, "x": 0.5}]


def test_lines_are_the_same_where_files_cannot_be_appended_to(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(log, "is_local", lambda path: False)  # as on gs://
    path = log.absolute(tmp_path / "metrics.jsonl")
    written = log.Lines(path, 0)
    for step in (1, 2):
        written.write(step, {"loss": 1.0})
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 1.0}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_progress_line_is_rewritten_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        progress = log.Progress(100, 32, stream)
        for step in (1, 2, 3):
            progress.done()
            progress.show(step, {"loss": 1.25, "lr": 0.1})
        progress.say("kept")
        progress.close()
    assert plain.getvalue().count("\n") == 4
    first, second = plain.getvalue().splitlines()[:2]
    assert first.startswith("step 1/100  loss 1.25  - images/s  - left  memory ") and first.endswith(" GiB")
    assert re.match(r"step 2/100  loss 1.25  \d+ images/s  \d+:\d\d:\d\d left  memory ", second)
    assert terminal.getvalue().count("\n") == 1 and terminal.getvalue().count("\r") == 4


@pytest.mark.parametrize("eval_every", [0, 3])
def test_throughput_counts_finished_steps(tmp_path: Path, eval_every: int) -> None:
    """Data that give 8 images per 0.05 s, at most, with compilations and evaluations between."""
    config = toy.config(steps=7, eval_every=eval_every, checkpoint__every=100)
    result = run(config, tmp_path, toy.Data(config, delay=0.05))
    assert 20 < result["images_per_s"] < 165


def test_throughput_of_one_step_is_unknown(tmp_path: Path) -> None:
    result = run(toy.config(steps=1), tmp_path)
    assert "images_per_s" not in result and "images_per_s" not in json.loads((tmp_path / "result.json").read_text())


def test_the_clock_of_the_progress(monkeypatch: Any) -> None:
    now = 0.0
    monkeypatch.setattr(log.time, "perf_counter", lambda: now)
    progress = log.Progress(100, 32, io.StringIO())

    def after(seconds: float) -> Any:
        nonlocal now
        now += seconds
        return progress

    after(60).done()
    assert progress.images_per_s is None
    after(2).done()
    assert progress.images_per_s == 16
    after(0).pause()
    after(60).resume()
    assert progress.images_per_s == 16
    after(6).done()
    assert progress.images_per_s == 8


def test_a_run_speaks_before_it_compiles_after_its_first_step_and_in_evaluations(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(log, "SAY_EVERY", -1.0)
    config = toy.config(log_every=4)
    run(config, tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["83 parameters: blocks 56, head 27", "compiling the training step ..."]
    assert [line.split()[1] for line in said if re.match(r"step \d+/", line)] == ["1/10", "4/10", "8/10", "10/10"]
    assert [line.split(",")[0] for line in said if line.startswith("evaluated ")] == [
        f"evaluated {done} of 21" for done in (8, 16, 21)
    ]
    assert [line["step"] for line in lines(tmp_path)] == [4, 8, 10]


def test_the_table_of_parameters_is_for_debugging(caplog: Any) -> None:
    params = {"embed": {"kernel": np.zeros((4, 2))}, "block_00": {"x": np.zeros(3)}, "block_01": {"x": np.zeros(3)}}
    assert log.parameters(params) == "14 parameters: embed 8, blocks 6"
    caplog.set_level(logging.DEBUG, "vtjax")
    assert "| block_01/x" in log.parameters(params)


def test_the_free_leaves_are_those_without_influence() -> None:
    assert set(workdir.FREE_LEAVES) == {
        "workdir",
        "mesh",
        "log_every",
        "profile",
        "allow_config_change",
        "heartbeat_timeout",
    }
