# SPDX-License-Identifier: Apache-2.0
"""Bad input of every kind: exit code 2, one line on standard error that names it, nothing on standard output, nothing
created. Most of it in this process; tests/cli/test_processes.py does some of it in real ones."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vtjax import weights

ROOT = Path(__file__).resolve().parents[2]
VIT = f"{ROOT / 'configs' / 'vit.py'}"
TINY = f"--config={VIT}:tiny,steps=4,batch_size=8"
DIGITS = f"--config={VIT}:digits,steps=4"


def check(outcome, *parts: str) -> None:
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert outcome.err.endswith("\n") and outcome.err.count("\n") == 1, outcome.err
    for part in parts:
        assert part in outcome.err, (part, outcome.err)


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# Arguments of `vtjax run` -> parts of the one line.
RUN = {
    "unknown key": ([TINY, "--config.optim.learning_rate=1"], ["config.optim.learning_rate does not exist"]),
    "unknown key with a suggestion": ([TINY, "--config.optim.lrr=1"], ["did you mean config.optim.lr?"]),
    "group in place of a leaf": ([TINY, "--config.optim=1"], ["config.optim is a group"]),
    "override without a value": ([TINY, "--config.seed"], ["--config.seed needs a value"]),
    "wrong type": ([TINY, "--config.steps=many"], ["config.steps must be an int", "found 'many'"]),
    "tuple of the wrong length": (
        [TINY, "--config.model.image_size=96"],
        ["config.model.image_size must hold 2 values"],
    ),
    "missing config file": (["--config=no/such.py:tiny"], ["config file no/such.py does not exist"]),
    "config that is no Python file": ([f"--config={ROOT / 'Makefile'}"], ["Makefile", "must be a Python file"]),
    "unknown variant": ([f"--config={VIT}:tinny"], ["unknown variant of the config 'tinny'", "did you mean 'tiny'?"]),
    "unknown option of the variant": ([f"--config={VIT}:tiny,step=3"], ["unknown option of the config 'step'"]),
    "no config": ([], ["--config"]),
    "unknown option": ([TINY, "--work_dir=x"], ["--work_dir=x"]),
    "unknown experiment": ([TINY, "--config.experiment=vitt"], ["config.experiment must be one of", "vit", "'vitt'"]),
    "experiment that is a path": ([TINY, "--config.experiment=../vit"], ["config.experiment must be one of"]),
    "zero steps": ([TINY, "--config.steps=0"], ["config.steps must be at least 1, found 0"]),
    "negative batch": ([TINY, "--config.batch_size=-8"], ["config.batch_size must be at least 1, found -8"]),
    "negative seed": ([TINY, "--config.seed=-1"], ["config.seed must be at least 0"]),
    "batch that does not divide": ([TINY, "--config.accumulate=3"], ["config.batch_size must be a multiple of"]),
    "ema of one": ([TINY, "--config.ema=1"], ["config.ema must be in [0, 1), found 1.0"]),
    "unknown dtype": ([TINY, "--config.dtype=float16"], ["config.dtype must be 'float32' or 'bfloat16'"]),
    "unknown optimiser": ([TINY, "--config.optim.name=adam"], ["optim.name must be one of adamw", "'adam'"]),
    "warm-up beyond the end": (
        [TINY, "--config.optim.warmup=9"],
        ["config.optim.warmup must be in 0..3 (config.steps=4), found 9\n"],
    ),
    "steps below the derived warm-up": (
        [f"--config={VIT}:tiny,batch_size=8", "--config.steps=4"],
        ["config.optim.warmup must be in 0..3", "found 6; ", f"as in --config={VIT}:tiny,steps=4\n"],
    ),
    "crop scale without a crop": (
        [TINY, "--config.data.crop_scale=0.5,1"],
        ["config.data.crop_scale has no effect under config.data.augment='none', only under 'crop': leave it out"],
    ),
    "flip where it is always on": (
        [TINY, "--config.data.augment=flip", "--config.data.flip=false"],
        ["config.data.flip has no effect under config.data.augment='flip'"],
    ),
    "momentum under adamw": (
        [TINY, "--config.optim.momentum=0.5"],
        ["config.optim.momentum has no effect under config.optim.name='adamw', only under 'sgd'"],
    ),
    "second moment under sgd": (
        [TINY, "--config.optim.name=sgd", "--config.optim.b2=0.9"],
        ["config.optim.b2 has no effect under config.optim.name='sgd', only under 'adamw'"],
    ),
    "final rate under a constant one": (
        [TINY, "--config.optim.schedule=constant", "--config.optim.end_lr=0.1"],
        ["config.optim.end_lr has no effect under config.optim.schedule='constant'"],
    ),
    "unknown metric of the best": (
        [TINY, "--config.checkpoint.best=foo"],
        ["config.checkpoint.best must be a metric, loss, top1, top5, or '' for none, found 'foo'"],
    ),
    "no repeats": ([TINY, "--config.data.repeats=0"], ["config.data.repeats must be at least 1, found 0"]),
    "group without parameters": (
        [f"--config={VIT}:ti16", "--config.optim.groups.head.pattern=nothing$"],
        ["optim.groups.head.pattern 'nothing$' matches no parameter"],
    ),
    "mesh that does not fit": ([TINY, "--config.mesh.tensor=7"], ["mesh", "tensor=7"]),
    "unknown data set": ([TINY, "--config.data.name=digitz"], ["digitz"]),
    "data set that is not there": (
        [TINY, "--config.data.name=imagenet2012", "--config.data.eval_split=validation"],
        ["imagenet2012"],
    ),
    "folder that is not there": (
        [TINY, "--config.data.name=folder", "--config.data.path=no/such/folder"],
        ["no/such/folder"],
    ),
    "unknown split": ([TINY, "--config.data.eval_split=dev"], ["has no split 'dev'", "train, test"]),
    "unknown augmentation": ([TINY, "--config.data.augment=crops"], ["data.augment must be one of", "'crops'"]),
    "other number of classes": ([DIGITS, "--config.model.classes=7"], ["config.model.classes must be 10", "found 7"]),
    "no classes": ([TINY, "--config.model.classes=0"], ["config.model.classes must be at least 1, found 0"]),
    "width that heads do not divide": ([TINY, "--config.model.heads=5"], ["multiple of heads", "heads=5"]),
    "patch that does not divide": ([TINY, "--config.model.patch=5"], ["image_size", "multiple of patch=5"]),
    "width that positions do not divide": (
        [DIGITS, "--config.model.width=50", "--config.model.heads=5"],
        ["config.model.width must be a multiple of 4", "found 50"],
    ),
    "unknown pooling": ([TINY, "--config.model.pooling=max"], ["pooling must be one of", "'max'"]),
    "no layers": ([TINY, "--config.model.depth=0"], ["config.model.depth must be at least 1"]),
    "unknown remat policy": ([TINY, "--config.model.remat=all"], ["remat", "'all'"]),
    "scan without remat": ([TINY, "--config.model.scan=true"], ["scan", "remat"]),
    "unknown attention": ([TINY, "--config.model.attention=flash"], ["'flash'"]),
    "drop path of one": ([TINY, "--config.model.drop_path=1"], ["config.model.drop_path must be in [0, 1)"]),
    "smoothing of two": ([TINY, "--config.loss.label_smoothing=2"], ["config.loss.label_smoothing must be in [0, 1)"]),
    "missing weights": ([TINY, "--config.init_from=vit_ti16_augregg"], ["vit_ti16_augregg"]),
    "weights path that is not there": ([TINY, "--config.init_from=no/such.safetensors"], ["no/such.safetensors"]),
}


@pytest.mark.parametrize("case", RUN)
def test_run_refuses(case, vtjax, tmp_path, monkeypatch, shared_data):
    argv, parts = RUN[case]
    if "ti16" in "".join(argv) and "augregg" not in "".join(argv):
        shared_data("vit_ti16_augreg.safetensors")
        shared_data("nips17_224.tar")
    monkeypatch.chdir(tmp_path)
    workdir = tmp_path / "deep" / "workdir"
    check(vtjax("run", *argv, f"--workdir={workdir}"), *parts)
    assert tree(tmp_path) == []


def test_a_leaf_that_nobody_reads(vtjax, tmp_path):
    config = tmp_path / "my.py"
    lines = ["from configs import vit", "def get_config():", "  c = vit.get_config('tiny')"]
    for leaf, line in {
        "data.crop_size": "  c.data.crop_size = 8",
        "optim.warmup_steps": "  c.optim.warmup_steps = 8",
        "model.depht": "  c.model.depht = 8",
        "sedd": "  c.sedd = 1",
    }.items():
        config.write_text("\n".join([*lines, line, "  return c"]))
        check(vtjax("run", f"--config={config}", f"--workdir={tmp_path / 'w'}"), f"nothing reads config.{leaf} ")
    assert not (tmp_path / "w").exists()


def test_a_syntax_error_in_the_config(vtjax, tmp_path):
    config = tmp_path / "my.py"
    config.write_text("def get_config(:\n  pass\n")
    check(vtjax("run", f"--config={config}", f"--workdir={tmp_path / 'w'}"), "my.py, line 1: ")


def test_no_command_and_unknown_commands(vtjax):
    check(vtjax(), "COMMAND")
    check(vtjax("rum"), "'rum'", "'run'")


@pytest.mark.parametrize("command", ["run", "eval", "convert", "inspect"])
def test_debug_adds_the_traceback(command, vtjax):
    outcome = vtjax(command, "--debug", "--config=no/such.py", "no", "no")
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert "Traceback" not in vtjax(command, "--config=no/such.py", "no", "no").err


def test_the_workdir_must_be_a_writable_folder(vtjax, tmp_path):
    check(vtjax("run", TINY), "a workdir is needed")
    file = tmp_path / "file"
    file.write_text("mine")
    check(vtjax("run", TINY, f"--workdir={file}"), f"workdir {file} must be a folder")
    check(vtjax("run", TINY, f"--workdir={file / 'below'}"), "must be a folder, found the file")
    assert file.read_text() == "mine"
    if os.geteuid():  # root may write anywhere
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        check(vtjax("run", TINY, f"--workdir={locked / 'run'}"), "must be writable")


def test_a_run_does_not_go_on_under_another_config(vtjax, run_copy):
    before = tree(run_copy)
    check(vtjax("run", TINY, f"--workdir={run_copy}", "--config.checkpoint.every=2", "--config.seed=1"), "seed", "1")
    assert tree(run_copy) == before


def test_a_part_of_the_spec_cannot_be_set_beside_weights_that_bring_their_own(vtjax, finished, tmp_path):
    argv = [TINY, "--config.model.width=64", f"--config.init_from={finished}", f"--workdir={tmp_path / 'w'}"]
    check(vtjax("run", *argv), "nothing reads config.model.width")


def test_eval_refuses(vtjax, finished, tmp_path):
    check(vtjax("eval"), "--config=FILE.py:VARIANT or --workdir=DIR")
    check(vtjax("eval", TINY), "--workdir=DIR, or config.init_from")
    check(vtjax("eval", f"--workdir={tmp_path / 'no'}"), "does not exist")
    check(vtjax("eval", f"--workdir={tmp_path}"), "must hold a run")
    check(vtjax("eval", TINY, f"--workdir={tmp_path}"), "no checkpoint")
    check(vtjax("eval", f"--workdir={finished}", "--which=first"), "'first'")
    check(vtjax("eval", f"--workdir={finished}", "--config.data.eval_split=dev"), "has no split 'dev'")
    check(vtjax("eval", f"--workdir={finished}", "--config.batch_size=0"), "config.batch_size must be at least 1")
    assert tree(tmp_path) == []


def test_a_checkpoint_of_another_model(vtjax, finished):
    check(vtjax("eval", DIGITS, f"--workdir={finished}"), "holds another model", "image_size")


def test_a_corrupt_checkpoint(vtjax, run_copy):
    """The last one is skipped; with no whole one left, the command ends."""

    def spoil(step: str) -> None:
        for path in (run_copy / "checkpoints" / step).rglob("*"):
            if path.is_file() and path.stat().st_size > 100 and "manifest" not in path.name:
                path.write_bytes(path.read_bytes()[:50])

    spoil("4")
    assert vtjax("eval", f"--workdir={run_copy}").code == 0
    spoil("2")
    outcome = vtjax("eval", f"--workdir={run_copy}")
    assert (outcome.code, outcome.out) == (2, "")
    assert "no whole checkpoint" in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err
    shutil.rmtree(run_copy / "checkpoints")
    check(vtjax("eval", f"--workdir={run_copy}"), "no checkpoint")


def test_a_damaged_config_or_spec_of_a_run(vtjax, run_copy):
    (run_copy / "config.json").write_text("{")
    check(vtjax("eval", f"--workdir={run_copy}"), "config.json must be JSON")


def exported(finished: Path, path: Path) -> Path:
    import vtjax as face

    model = face.load(finished)
    return weights.save(path, model.spec, model.params)


def test_weights_that_do_not_fit(vtjax, finished, tmp_path):
    good = exported(finished, tmp_path / "good.safetensors")
    arrays = load_file(good)
    from safetensors import safe_open

    with safe_open(good, "numpy") as file:
        metadata = file.metadata()
    kernel = arrays["head/kernel"]
    for name, changed, part in [
        ("shape", {**arrays, "head/kernel": np.zeros((3, 4), np.float32)}, "head/kernel"),
        ("missing", {k: v for k, v in arrays.items() if k != "head/kernel"}, "head/kernel"),
        ("extra", {**arrays, "block_09/attn/out/kernel": kernel}, "block_09"),
    ]:
        path = tmp_path / f"{name}.safetensors"
        save_file(changed, path, metadata)
        check(vtjax("run", TINY, f"--config.init_from={path}", f"--workdir={tmp_path / 'w'}"), part)
        check(vtjax("eval", TINY, f"--config.init_from={path}"), part)
        check(vtjax("inspect", path), part)
        check(vtjax("convert", path, tmp_path / "out.safetensors"), part)
    (tmp_path / "torn.safetensors").write_bytes(good.read_bytes()[:1000])
    check(vtjax("inspect", tmp_path / "torn.safetensors"), "torn.safetensors")
    assert not (tmp_path / "w").exists() and not (tmp_path / "out.safetensors").exists()


def test_convert_refuses(vtjax, finished, tmp_path):
    good = exported(finished, tmp_path / "good.safetensors")
    before = tree(tmp_path)
    out = tmp_path / "out.safetensors"
    check(vtjax("convert", tmp_path / "no.safetensors", out), "no.safetensors")
    check(vtjax("convert", tmp_path, out), str(tmp_path))
    check(vtjax("convert", good, good), "are the same")
    check(vtjax("convert", good, out, "--layout=hff"), "'hff'")
    check(vtjax("convert", good, out, "--atol=-1"), "--atol")
    check(vtjax("convert", good, out, "--atol=x"), "--atol")
    check(vtjax("convert", good, out, f"--check={tmp_path / 'no.npz'}"), "no.npz")
    check(vtjax("convert", good, out, "--config.seed=1"), "convert takes no config")
    check(vtjax("convert", finished, out, "--spec=x.json"), "is a workdir")
    check(vtjax("convert", good), "DST")
    assert tree(tmp_path) == before


def test_inspect_refuses(vtjax, tmp_path):
    check(vtjax("inspect"), "CONFIG_OR_DIR")
    check(vtjax("inspect", "no_such_name"), "no_such_name")
    check(vtjax("inspect", f"{VIT}:tinny"), "'tinny'")
    check(vtjax("inspect", tmp_path / "no.json"), "no.json does not exist")
    (tmp_path / "spec.json").write_text('{"format": 2}')
    check(vtjax("inspect", tmp_path / "spec.json"), "spec format must be 1")
    check(vtjax("inspect", f"{VIT}:tiny", "no_such_name"), "no_such_name")
