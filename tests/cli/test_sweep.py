# SPDX-License-Identifier: Apache-2.0
"""`vtjax sweep`: one compilation for traced values, the same results as single runs, going on after anything."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtjax.cli import sweep
from vtjax.errors import InputError
from vtjax.train.executables import Executables
from vtjax.viz import sweeps

ROOT = Path(__file__).resolve().parents[2]
TINY = f"--config={ROOT / 'configs' / 'vit.py'}:tiny,steps=4,batch_size=8"


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "sweep.jsonl").read_text().splitlines()]


def test_traced_values_share_one_compilation_and_change_nothing(vtjax, tmp_path, finished):
    grid = ["--grid=config.optim.lr=3e-3,1e-2", "--grid=config.seed=0,1"]
    every = ["--config.checkpoint.every=2"]
    done = vtjax("sweep", TINY, *grid, *every, f"--workdir={tmp_path}")
    assert done.code == 0, done.err
    result = done.json
    assert (result["points"], result["ran"], result["failed"], result["recorded"]) == (4, 4, 0, 4)
    assert result["compilations"] == 1 and result["compiled"]["evaluate"] == 1
    found = records(tmp_path)
    assert [r["config"] for r in found] == [{"optim.lr": lr, "seed": seed} for lr in (3e-3, 1e-2) for seed in (0, 1)]
    assert len({r["params_sha256"] for r in found}) == 4
    # The point that is the config itself is the run that `vtjax run` made of it, to the bit.
    alone = json.loads((finished / "result.json").read_text())
    assert found[0]["params_sha256"] == alone["params_sha256"] and found[0]["top1"] == alone["top1"]
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    again = vtjax("sweep", TINY, *grid, *every, f"--workdir={tmp_path}")
    assert (again.json["ran"], again.json["compilations"]) == (0, 0)
    assert records(tmp_path) == found


def test_shapes_compile_anew_failures_are_recorded_and_filled_later(vtjax, tmp_path):
    argv = [
        *("sweep", TINY, f"--workdir={tmp_path}", "--grid=config.model.mlp=32,64", "--grid=config.optim.lr=1e-3,1e38"),
        *("--config.model.depth=1", "--config.optim.warmup=0", "--config.optim.clip=0"),
    ]
    done = vtjax(*argv)
    assert done.code == 1
    assert (done.json["ran"], done.json["failed"], done.json["compilations"]) == (4, 2, 2)
    assert ["error" in r for r in records(tmp_path)] == [False, True, False, True]
    assert "expected finite ones" in records(tmp_path)[1]["error"] and "Traceback" not in done.err
    # One half by each of two machines; what is there stays.
    shutil.rmtree(tmp_path / "points" / "model.mlp=64,optim.lr=0.001")
    first = vtjax(*argv, "--shard=0/2")
    assert (first.code, first.json["ran"], first.json["recorded"]) == (0, 1, 4)
    second = vtjax(*argv, "--shard=1/2")
    assert (second.code, second.json["ran"], second.json["failed"]) == (1, 2, 2)  # failed points are tried again


def test_an_evaluation_of_every_point(vtjax, tmp_path, finished):
    argv = ["sweep", TINY, "--mode=eval", f"--config.init_from={finished}", f"--workdir={tmp_path}"]
    done = vtjax(*argv, "--grid=config.loss.label_smoothing=0.0,0.2", "--grid=config.data.eval_split=test,train")
    assert done.code == 0, done.err
    assert (done.json["ran"], done.json["compilations"]) == (4, 1)
    found = records(tmp_path)
    assert [r["split"] for r in found] == ["test", "train"] * 2
    assert found[0]["top1"] == json.loads((finished / "result.json").read_text())["top1"]
    more = vtjax(*argv, "--grid=config.loss.label_smoothing=0.0,0.2,0.3", "--grid=config.data.eval_split=test")
    assert (more.json["ran"], more.json["points"]) == (1, 3)
    assert len(records(tmp_path)) == 5  # those of the first grid, too


@pytest.mark.slow
def test_a_killed_sweep_goes_on_in_the_middle_of_a_point(tmp_path, vtjax):
    argv = [
        *("sweep", TINY.replace("steps=4", "steps=40"), f"--workdir={tmp_path}", "--grid=config.seed=0,1,2"),
        *("--config.checkpoint.every=10", "--config.log_every=1"),
    ]
    child = subprocess.Popen([sys.executable, "-m", "vtjax", *argv], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stderr is not None
    second = False
    for line in child.stderr:
        second = second or line.startswith("[2/3]")
        if second and line.startswith("step 25/"):
            os.kill(child.pid, signal.SIGKILL)
            break
    child.stderr.close()
    assert child.wait(timeout=60) == -signal.SIGKILL
    done = vtjax(*argv)
    assert done.code == 0 and (done.json["points"], done.json["ran"]) == (3, 2), done.err
    assert "[1/3] seed=0: finished before" in done.err and "resumed from" in done.err
    assert "(step 10 of 40)" in done.err or "(step 20 of 40)" in done.err
    assert [r["step"] for r in records(tmp_path)] == [40, 40, 40]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "a sweep needs at least one --grid"),
        (["--grid=optim.lr=1"], "--grid must be config.LEAF=VALUE,VALUE,..."),
        (["--grid=config.optim.lr="], "--grid must be config.LEAF=VALUE,VALUE,..."),
        (["--grid=config.optim.lr=1,,2"], "--grid must be config.LEAF=VALUE,VALUE,..."),
        (["--grid=config.profile=(0,1"], "--grid must be config.LEAF=VALUE,VALUE,..."),
        (["--grid=config.optim.learning_rate=1"], "config.optim.learning_rate does not exist; did you mean"),
        (["--grid=config.optim.lr=fast"], "config.optim.lr must be a float"),
        (["--grid=config.optim.lr=1e-3,0.001"], "the points of a sweep must differ, found optim.lr=0.001 twice"),
        (["--grid=config.seed=1", "--grid=config.seed=2"], "config.seed must be set once"),
        (["--grid=config.seed=1", "--config.seed=2"], "config.seed must be set once"),
        (["--grid=config.workdir=a,b"], "config.workdir cannot be swept"),
        (["--grid=config.batch_size=8,-8"], "point batch_size=-8: config.batch_size must be at least 1, found -8"),
        (["--grid=config.seed=1", "--shard=2/2"], "--shard must be I/N with I in 0..N-1, found '2/2'"),
        (["--grid=config.seed=1", "--shard=half"], "--shard must be I/N"),
    ],
)
def test_bad_grids_are_refused_before_anything_runs(vtjax, tmp_path, argv, message):
    done = vtjax("sweep", TINY, *argv, f"--workdir={tmp_path / 'w'}")
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1, done.err
    assert not (tmp_path / "w").exists()


def test_a_grid_of_tuples_and_long_names():
    assert sweep.parse_grid("config.model.image_size=(8, 8),(16,16)") == ("model.image_size", ["(8, 8)", "(16,16)"])
    points = sweep.build(f"{ROOT}/configs/vit.py:tiny", {}, [("model.image_size", ["(8,8)", "(16,16)"])])
    assert [name for name, _, _ in points] == ["model.image_size=8x8", "model.image_size=16x16"]
    long = sweep.build(f"{ROOT}/configs/vit.py:tiny", {}, [("init_from", ["a/" * 90, "a/" * 90 + "b"])])
    assert len({name for name, _, _ in long}) == 2 and all(len(name) <= 120 for name, _, _ in long)


def test_executables_are_shared_only_where_the_whole_program_is_the_same():
    shared, calls = Executables(), []

    def run(constant, x):
        fn = shared.share(jax.jit(lambda x: x + constant), "add")
        calls.append(fn(x))
        return fn(x)

    big = np.arange(5000, dtype=np.float32)
    other = big.copy()
    other[2500] += 1
    for constant in (big, big.copy(), other):
        np.testing.assert_array_equal(run(constant, jnp.ones(5000)), constant + 1)
    run(big, jnp.ones((1, 5000)))
    assert shared.compiled == {"add": 3} and shared.shared == {"add": 1}


def test_the_figure_of_a_sweep():
    records = [
        {"config": {"lr": lr, "seed": seed, "kind": kind}, "top1": lr * 10 + seed / 100 + (kind == "b")}
        for lr in (0.001, 0.1, 0.01)
        for seed in (0, 1)
        for kind in ("a", "b")
    ]
    (axes,) = sweeps.sweep(records, ["lr", "seed", "kind"], "top1").axes
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "lr"
    assert [line.get_label() for line in axes.lines] == ["kind a", "kind b"]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.015, 0.105, 1.005])
    assert "range of 2 seeds" in axes.get_title(loc="left")
    (names,) = sweeps.sweep([{"config": {"kind": k}, "top1": 1.0} for k in "ba"], ["kind"], "top1").axes
    assert [t.get_text() for t in names.get_xticklabels()] == ["b", "a"]


def test_a_sweep_under_another_config_is_refused(vtjax, tmp_path):
    argv = ["sweep", TINY, "--grid=config.seed=0", f"--workdir={tmp_path}"]
    assert vtjax(*argv).code == 0
    done = vtjax(*argv, "--config.optim.lr=0.5")
    assert done.code == 2 and "optim.lr was 0.003, found 0.5" in done.err and done.err.count("\n") == 1, done.err


def test_an_evaluation_needs_something_to_evaluate(vtjax, tmp_path):
    done = vtjax("sweep", TINY, "--mode=eval", "--grid=config.seed=0,1", f"--workdir={tmp_path / 'w'}")
    assert done.code == 2 and "point seed=0 needs config.init_from" in done.err
    assert not (tmp_path / "w").exists()


def test_a_point_that_another_process_runs_is_left_to_it(vtjax, tmp_path):
    folder = tmp_path / "points" / "seed=0" / "checkpoints"
    folder.mkdir(parents=True)
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    done = vtjax("sweep", TINY, "--grid=config.seed=0", f"--workdir={tmp_path}")
    os.close(lock)
    assert done.code == 0 and (done.json["ran"], done.json["failed"]) == (0, 0), done.err
    assert "seed=0 is left to its run" in done.err and not (folder.parent / "error.json").exists()


def test_host_callbacks_are_not_shared():
    shared, struct = Executables(), jax.ShapeDtypeStruct((), jnp.float32)

    def scale(factor):
        return jax.jit(lambda x: jax.pure_callback(lambda v: np.float32(factor * v), struct, x))

    for factor in (1.0, 2.0):
        assert float(shared.share(scale(factor), "call")(jnp.float32(3.0))) == 3.0 * factor
    assert shared.compiled == {"call": 2}


def test_a_missing_workdir_is_named(vtjax):
    done = vtjax("sweep", TINY, "--grid=config.seed=1")
    assert done.code == 2 and "--workdir" in done.err


def test_parse_shard_raises_input_error():
    with pytest.raises(InputError):
        sweep.parse_shard("-1/2")
