# SPDX-License-Identifier: Apache-2.0
"""tiny through the whole command line: run, run again, eval, inspect, convert, chain; and what each leaves behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import vtjax as face
from vtjax import spec as spec_lib

ROOT = Path(__file__).resolve().parents[2]
VIT = f"{ROOT / 'configs' / 'vit.py'}"
TINY = f"--config={VIT}:tiny,steps=4,batch_size=8"


def test_run_leaves_what_the_design_lists(finished):
    assert {p.name for p in finished.iterdir()} >= {
        "config.json",
        "spec.json",
        "metrics.jsonl",
        "checkpoints",
        "result.json",
    }
    result = json.loads((finished / "result.json").read_text())
    assert result["step"] == 4
    assert result["count"] == 256
    assert 0.0 <= result["top1"] <= result["top5"] <= 1.0
    assert result["macs_per_image"] == 340_416
    assert result["params"] == 19_626
    assert len(result["params_sha256"]) == 64
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4 and all("step" in line for line in lines)
    assert spec_lib.from_json((finished / "spec.json").read_text()).classes == 10
    assert json.loads((finished / "config.json").read_text())["experiment"] == "vit"


def test_a_finished_run_keeps_its_result(vtjax, run_copy):
    before = {p: p.read_bytes() for p in run_copy.rglob("*") if p.is_file()}
    outcome = vtjax("run", TINY, f"--workdir={run_copy}", "--config.checkpoint.every=2")
    assert outcome.code == 0
    assert outcome.json == json.loads((run_copy / "result.json").read_text())
    assert "finished" in outcome.err
    assert {p: p.read_bytes() for p in run_copy.rglob("*") if p.is_file()} == before


def test_a_second_start_resumes_and_says_from_where(vtjax, run_copy, finished):
    """Without its result and its last checkpoint the run is one that was killed after step 2."""
    (run_copy / "result.json").unlink()
    shutil.rmtree(run_copy / "checkpoints" / "4")
    outcome = vtjax("run", TINY, f"--workdir={run_copy}", "--config.checkpoint.every=2")
    assert outcome.code == 0
    assert str(run_copy / "checkpoints" / "2") in outcome.err
    first = json.loads((finished / "result.json").read_text())
    assert outcome.json["params_sha256"] == first["params_sha256"]
    assert outcome.json["top1"] == first["top1"]


@pytest.mark.parametrize("batch_size", [8, 100, 300])  # divides the split, does not, is larger than it
def test_eval_counts_every_example_once(batch_size, vtjax, finished):
    first = json.loads((finished / "result.json").read_text())
    outcome = vtjax("eval", f"--workdir={finished}", f"--config.batch_size={batch_size}")
    assert outcome.code == 0
    assert outcome.out.count("\n") == 1
    result = outcome.json
    assert result["count"] == 256
    assert result["top1"] == first["top1"] and result["top5"] == first["top5"]
    assert result["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert result["params"] == 19_626  # the whole summary of the task, whatever it holds
    assert result["macs_per_image"] == 340_416
    assert all(not isinstance(v, dict | list) for v in result.values())
    assert "256" in outcome.err  # progress, for people


def test_eval_agrees_with_the_config_given_and_takes_weights_too(vtjax, finished, tmp_path):
    first = json.loads((finished / "result.json").read_text())
    assert vtjax("eval", TINY, f"--workdir={finished}").json["top1"] == first["top1"]
    assert vtjax("eval", f"--workdir={finished}", "--which=best").json["top1"] == first["best_top1"]
    assert vtjax("eval", TINY, f"--config.init_from={finished}").json["top1"] == first["top1"]
    exported = tmp_path / "tiny.safetensors"
    outcome = vtjax("convert", finished, exported)
    assert outcome.code == 0
    assert outcome.json["params"] == 19_626 and outcome.json["src"] == str(finished)
    assert vtjax("eval", TINY, f"--config.init_from={exported}").json["top1"] == first["top1"]
    a, b = face.load(finished), face.load(exported)
    assert a.spec == b.spec
    np.testing.assert_array_equal(a.params["head"]["kernel"], b.params["head"]["kernel"])
    timm = tmp_path / "timm"
    assert vtjax("convert", exported, timm, "--layout=timm").code == 0
    assert {"config.json", "model.safetensors"} <= {p.name for p in timm.iterdir()}


def test_convert_replays_recorded_outputs(vtjax, finished, tmp_path):
    model = face.load(finished)
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    logits = np.asarray(jax.jit(model.apply)(model.params, images)[0])
    np.savez(tmp_path / "good.npz", images=images, logits=logits)
    np.savez(tmp_path / "bad.npz", images=images, logits=logits + 0.5)
    out = tmp_path / "out.safetensors"
    missed = vtjax("convert", finished, out, f"--check={tmp_path / 'bad.npz'}")
    assert missed.code == 1
    assert missed.json["max_abs_diff"] == pytest.approx(0.5, rel=1e-3)
    assert not out.exists()
    assert vtjax("convert", finished, out, f"--check={tmp_path / 'bad.npz'}", "--atol=0.6").code == 0
    outcome = vtjax("convert", finished, out, f"--check={tmp_path / 'good.npz'}", "--overwrite")
    assert (outcome.code, outcome.json["passed"]) == (0, True)
    assert outcome.json["max_abs_diff"] < 1e-5


def test_inspect_one_model_in_every_form(vtjax, finished, tmp_path):
    exported = tmp_path / "tiny.safetensors"
    assert vtjax("convert", finished, exported).code == 0
    results = [vtjax("inspect", t) for t in (finished, exported, finished / "spec.json", f"{VIT}:tiny")]
    for outcome in results:
        assert outcome.code == 0
        assert (outcome.json["params"], outcome.json["macs_per_image"]) == (19_626, 340_416)
        assert "blocks[0..1]" in outcome.err and "block_00..01" in outcome.err
        kinds = outcome.json["kinds"]
        assert sum(k["params"] for k in kinds.values()) == 19_626
        assert sum(k["macs"] for k in kinds.values()) == 340_416
        assert sum(k["macs_share"] for k in kinds.values()) == pytest.approx(1.0)
        assert spec_lib.from_dict(outcome.json["spec"]) == face.load(finished).spec


def test_inspect_needs_no_weights_where_the_registry_has_the_spec(vtjax, tmp_path, monkeypatch):
    monkeypatch.setenv("VTJAX_DATA", str(tmp_path))
    monkeypatch.setenv("VTJAX_CACHE", str(tmp_path))
    for target in (f"{VIT}:ti16", "vit_ti16_augreg"):
        outcome = vtjax("inspect", target)
        assert (outcome.code, outcome.json["params"], outcome.json["macs_per_image"]) == (0, 5_717_416, 1_253_683_200)
        assert "the weights 'vit_ti16_augreg' were not found along VTJAX_DATA" in outcome.err
    other = vtjax("inspect", f"{VIT}:ti16", "--config.model.classes=10")
    assert other.json["params"] == 5_717_416 - 990 * (192 + 1)
    assert vtjax("inspect", "dinov2_s14").code == 2  # only its config.json tells
    assert list(tmp_path.iterdir()) == []


def test_inspect_the_difference_of_two(vtjax, finished):
    outcome = vtjax("inspect", finished, f"{VIT}:tiny", "--config.model.mlp=32", "--config.model.width=32")
    assert outcome.code == 0
    assert outcome.json["spec_diff"] == {"blocks[0].mlp": [64, 32], "blocks[1].mlp": [64, 32]}
    assert outcome.json["params"] == [19_626, 19_626 - 2 * (2 * 32 * 32 + 32)]
    assert "blocks[1].mlp" in outcome.err
    same = vtjax("inspect", finished, f"{VIT}:tiny")
    assert same.json["spec_diff"] == {} and "equal specs" in same.err


def test_a_chained_run_starts_from_the_other_run_s_model(vtjax, finished, tmp_path):
    """Another number of classes gets a new head, which is said; the rest is the first run's, to the bit at lr 0."""
    config = tmp_path / "six.py"
    config.write_text(
        "from configs import vit\n"
        "def get_config():\n"
        "  c = vit.get_config('tiny,steps=1,batch_size=8')\n"
        "  c.data.classes = c.model.classes = 6\n"
        "  return c\n"
    )
    chained = tmp_path / "chained"
    argv = [f"--config={config}", f"--config.init_from={finished}", f"--workdir={chained}", "--config.optim.lr=0"]
    outcome = vtjax("run", *argv)
    assert outcome.code == 0, outcome.err
    assert "classes 10 -> 6: initialised, not loaded: head" in outcome.err
    old, new = face.load(finished), face.load(chained)
    arguments = json.dumps({"source": "finished", "classes": [10, 6]})
    parent = json.loads((finished / "result.json").read_text())["params_sha256"]
    step = spec_lib.Lineage(parent, "init_from", arguments, seed=0)
    assert new.spec == old.spec.edit(classes=6, lineage=(step,))
    assert outcome.json["init_from_sha256"] == parent
    assert new.params["head"]["kernel"].shape == (32, 6)
    np.testing.assert_array_equal(
        new.params["block_01"]["mlp"]["up"]["kernel"], old.params["block_01"]["mlp"]["up"]["kernel"]
    )
    assert outcome.json["init_from"] == str(finished)


def test_a_chained_run_resumes_without_what_it_started_from(vtjax, finished, tmp_path):
    source, workdir = shutil.copytree(finished, tmp_path / "source"), tmp_path / "chained"
    argv = [TINY, f"--config.init_from={source}", f"--workdir={workdir}", "--config.checkpoint.every=2"]
    first = vtjax("run", *argv).json
    source.rename(tmp_path / "moved")
    assert vtjax("run", *argv).json == first  # finished
    (workdir / "result.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "4")
    outcome = vtjax("run", *argv)
    assert outcome.code == 0, outcome.err
    for name in ("params_sha256", "spec_sha256", "init_from", "init_from_sha256", "top1"):
        assert outcome.json[name] == first[name], name
    refused = vtjax("run", *argv, "--config.model.classes=7")
    assert refused.code == 2 and "config.model.classes must be 10" in refused.err
    shutil.rmtree(workdir / "checkpoints")  # begins anew, from what is no longer there
    assert vtjax("run", *argv).code == 2


def test_eval_of_a_source_does_not_look_into_a_workdir(vtjax, finished):
    """A config may name its workdir; without --workdir, `init_from` is what is measured."""
    first = json.loads((finished / "result.json").read_text())
    outcome = vtjax("eval", TINY, f"--config.init_from={finished}", f"--config.workdir={finished}")
    assert outcome.json["top1"] == first["top1"] and outcome.json["loss"] == pytest.approx(first["loss"], rel=1e-5)


def test_print_config_is_the_resolved_config(vtjax):
    outcome = vtjax("run", TINY, "--print_config", "--config.optim.lr=1")
    assert outcome.code == 0
    assert (outcome.json["steps"], outcome.json["optim"]["lr"]) == (4, 1.0)


def test_a_frozen_group_stays_as_it_is(vtjax, finished, tmp_path):
    config = tmp_path / "probe.py"
    config.write_text(
        "from configs import common, vit\n"
        "def get_config():\n"
        "  c = vit.get_config('tiny,steps=2,batch_size=8')\n"
        "  c.optim.groups = {'backbone': common.group('^(embed|block_|norm)', frozen=True)}\n"
        "  return c\n"
    )
    workdir = tmp_path / "probe"
    assert vtjax("run", f"--config={config}", f"--config.init_from={finished}", f"--workdir={workdir}").code == 0
    old, new = face.load(finished).params, face.load(workdir).params
    np.testing.assert_array_equal(new["embed"]["patch"]["kernel"], old["embed"]["patch"]["kernel"])
    assert np.abs(new["head"]["kernel"] - old["head"]["kernel"]).max() > 0


def test_help_is_quick_and_imports_no_jax(vtjax):
    code = (
        "import sys, vtjax.cli.main as m\n"
        "for argv in ([], ['run'], ['eval'], ['convert'], ['inspect']):\n"
        "  try: m.main([*argv, '--help'])\n"
        "  except SystemExit as error: assert not error.code\n"
        "assert not {'jax', 'flax', 'numpy'} & set(sys.modules), 'help imports too much'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "--config.LEAF" in done.stdout and "CONFIG_OR_DIR" in done.stdout
