# SPDX-License-Identifier: Apache-2.0
"""The chain of `configs/all_five.py:tiny`: every step builds on the one before, is saved, loaded, and generates."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import vtjax
from experiments.all_five import main as five
from experiments.all_five import steps
from experiments.all_five import tables as five_tables
from experiments.das import deployed
from experiments.vlm import main as vlm
from vtjax import methods, weights
from vtjax.cli import assemble
from vtjax.cli import config as config_lib
from vtjax.errors import InputError
from vtjax.methods import das, dpn, ltmp
from vtjax.ops import cross_attention
from vtjax.train import loop
from vtjax.viz import tables

CONFIG = "configs/all_five.py"


def config_of(add, workdir, init_from="", **leaves):
    given = {"init_from": str(init_from), **{name: str(value) for name, value in leaves.items()}}
    config = config_lib.load_config(CONFIG, f"tiny,add={add}", given)
    config_lib.override(config, "workdir", str(workdir))
    return config


def trained(config):
    task, data = assemble.assemble(config)
    return task, loop.train(task, data, config, config.workdir)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Spec and parameters with all methods, of the steps' own surgeries; nothing is trained."""
    spec, params = base_of(tmp_path_factory.mktemp("five"))
    for add in ("dgmr", "ltmp", "dpn", "search"):
        spec, params = added(add, spec, params)
    return spec, params


def base_of(folder):
    config = config_of("base", folder / "base")
    spec, init = vlm.source(config)
    return spec, jax.jit(lambda key: init(key)[0])(jax.random.key(0))


def added(add, spec, params):
    config = config_of(add, "", "unread")
    after, convert = five.ADD[add](config, spec, lambda key: (params, {}, {}))
    key = jax.random.key(1)
    return after, five.completed(after, convert(params, key), key)


def prompts(spec):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 3, *spec.image_size, 3)).astype(np.float32)
    text = rng.integers(1, spec.image_token, (2, 6))
    parts = [np.full((2, 3), spec.image_token), text, np.full((2, 1), spec.router_token)]
    return np.concatenate(parts, axis=1).astype(np.int32), images


def says_what_it_reads(m):
    """Generation over the cache is greedy decoding of what the model says to the whole text."""
    ids, images = prompts(m.spec)
    new, _ = m.generate(m.params, ids, images, new_tokens=3)
    text = np.concatenate([ids, np.asarray(new)], axis=1)
    logits = np.asarray(jax.jit(m.apply)(m.params, text, images)[0])
    np.testing.assert_array_equal(logits[:, len(ids[0]) - 1 : -1].argmax(-1), new)


def test_all_of_them_at_once_build_skip_remove_are_saved_and_generate(whole, tmp_path):
    spec, params = whole
    assert five.present(spec) == ["dgmr", "ltmp", "dpn", "das"]
    gone = das.arms(spec)[-1]
    short, kept = das.remove(spec, params, [gone])
    weights.save(tmp_path / "model.safetensors", short, kept)
    m = vtjax.load(tmp_path / "model.safetensors")
    assert m.spec == short and not m.spec.decoder.blocks[gone].attn and f"block_{gone:02d}" not in m.params["decoder"]
    says_what_it_reads(m)
    ids, images = prompts(spec)
    skip = np.arange(spec.decoder.depth) == gone
    masked = jax.jit(lambda p: methods.build(spec).apply(p, ids, images, knobs={"skipped": skip})[0])(params)
    assert_allclose(jax.jit(m.apply)(m.params, ids, images)[0], masked, atol=1e-5)


def entering(memory):
    return memory, cross_attention.on_grid(memory, 16)


def test_a_merged_patch_is_what_its_holder_is(whole):
    spec, params = whole
    merging = {"merge_threshold": np.full(2, 0.2, np.float32), "prune_threshold": np.zeros(2, np.float32)}
    params = {**params, "tower": {**params["tower"], "ltmp": merging}}
    ids, images = prompts(spec)
    left, grid = jax.jit(lambda p: entering(methods.build(spec).enter(p, ids, images)[0]["memory"]))(params)
    holder, x = np.asarray(left.holder).reshape(2, 3, 16), np.asarray(left.x).reshape(2, 3, 16, -1)
    assert (np.asarray(grid.number) > 0).all() and (np.asarray(left.number) > 0).mean() < 0.9
    expected = [[x[b, i][holder[b, i]] for i in range(3)] for b in range(2)]
    np.testing.assert_array_equal(np.asarray(grid.x).reshape(2, 3, 16, -1), expected)


def test_what_the_tower_dropped_is_not_pooled_and_the_rest_lies_on_its_grid(whole):
    """A pruned patch is read by nobody, pooled or not; a merged one is pooled where it was."""
    spec, params = whole
    assert ltmp.reducers(spec.tower)
    pruning = {"merge_threshold": np.ones(2, np.float32), "prune_threshold": np.full(2, 0.06, np.float32)}
    params = {**params, "tower": {**params["tower"], "ltmp": pruning}}
    ids, images = prompts(spec)
    model, skip = methods.build(spec), np.zeros(spec.decoder.depth, bool)
    left, grid = jax.jit(lambda p: entering(model.enter(p, ids, images)[0]["memory"]))(params)
    live = np.asarray(grid.number) > 0
    assert 0 < live.mean() < 1 and grid.holder is None
    alive = (np.asarray(left.number) > 0).reshape(6, 16)
    for image, holder in enumerate(np.asarray(left.holder).reshape(6, 16)):
        assert set(holder[holder >= 0]) == set(np.flatnonzero(alive[image]))
    run = jax.jit(lambda p, choice: model.apply(p, ids, images, knobs={"skipped": skip, **choice})[1])
    aux = run(params, dpn.given(spec, jnp.full((2, 1), 2)))
    windows = live.reshape(2, 3, 2, 2, 2, 2).any((3, 5))
    assert dpn.decisions(aux, spec)["visual"][:, 0].tolist() == windows.sum((1, 2, 3)).tolist()
    # Also where the first cell of a window, in whose slot its tokens are pooled, was pruned.
    assert not live.reshape(2, 3, 2, 2, 2, 2)[:, :, :, 0, :, 0][windows].all()
    read = np.asarray(aux["tokens"].memory.number).reshape(2, 3, -1) > 0
    np.testing.assert_array_equal(read.sum(2), windows.sum((2, 3)))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Workdir, where `steps` looks for it, and result of every step."""
    root, before, found = tmp_path_factory.mktemp("five"), "", {}
    for add in five.STEPS:
        _, result = trained(config_of(add, root / f"{add}_0", before))
        before = root / f"{add}_0"
        found[add] = before, result
    return found


def test_what_a_model_has_is_not_added_again(whole, tmp_path):
    """An evaluation, and a run that trains on, take the model as it is."""
    spec, params = whole
    weights.save(tmp_path / "model.safetensors", spec, params)
    for add in ("base", "dgmr", "ltmp", "dpn", "search"):
        assert five.has(spec, add)
        task = five.build(config_of(add, tmp_path / "run", tmp_path / "model.safetensors"))
        assert task.spec.decoder == spec.decoder and task.spec.tower == spec.tower
    assert not five.has(spec, "das")


def test_adapters_of_another_width_are_what_the_spec_says(whole):
    spec, params = whole
    layer = das.arms(spec)[0]
    leaves = {"das.width": 6, "das.skip_width": 12}
    config = config_of("das", "", "unread", **leaves, **{"das.remove": f"[{layer}]"})
    short, convert = five.ADD["das"](config, spec, None)
    assert deployed.gone(short.decoder) == (layer,)  # layers are named, not arms
    with pytest.raises(InputError, match=r"must be among those that may be left out, .*, found 0"):
        five.ADD["das"](config_of("das", "", "unread", **leaves, **{"das.remove": "[0]"}), spec, None)
    own = convert(params, jax.random.key(0))["decoder"]["das"]
    style, searching = das.installed(short.decoder)
    assert not searching and (style.inner.width, style.skip.width) == (6, 12)
    shapes = {own[name][site]["down"]["kernel"].shape[1] for name in own for site in own[name]}
    assert shapes == {6, 12}


def test_leaves_without_effect_are_refused(tmp_path):
    for name, value in (("by", "greedy"), ("ramp", 4), ("keep", True), ("fixed_val_batch", True)):
        config = config_of("base", tmp_path / "run", **{f"das.{name}": value})
        with pytest.raises(InputError, match=f"config.das.{name} must be"):
            assemble.assemble(config)


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ({"dpn.quality": -1.0}, "config.dpn.quality must be 0 or more, found -1.0"),
        ({"dpn.quality_share": 0.0}, r"config.dpn.quality_share must be in \(0, 1\], found 0.0"),
        ({"ltmp.target": 2.0}, r"config.ltmp.target must be in \(0, 1\] and .*, found 2.0 and"),
        ({"dpn.budget": 1.5}, r"config.dpn.budget must be in \(0, 1\], a share of the dense work, found 1.5"),
    ],
)
def test_numbers_that_no_run_can_have_are_refused(leaves, message, tmp_path):
    with pytest.raises(InputError, match=message):
        five.check(config_of("base", tmp_path, **leaves))


def test_what_is_done_again_is_known_and_not_done_already(tmp_path, capsys):
    shared = f"--runs={tmp_path}", f"--out={tmp_path / 'steps.jsonl'}"
    assert steps.main(["control", "--again=random,dpn", *shared]) == 2
    assert capsys.readouterr().err == "--again must be of random, control for 'control', found 'dpn'\n"
    (tmp_path / "dpn_0").mkdir()
    (tmp_path / "dpn_0" / "result.json").write_text("{}")
    assert steps.main(["train", "--again=search,dpn", *shared]) == 2
    line = "--again=dpn needs a folder without a finished run, whose result would be recorded as new: "
    assert capsys.readouterr().err == f"{line}{tmp_path / 'dpn_0'}\n"
    assert not (tmp_path / "steps.jsonl").exists()


@pytest.mark.slow
def test_every_step_keeps_what_the_others_added(chain):
    assert [chain[add][1]["methods"] for add in five.STEPS] == [
        [], ["dgmr"], ["dgmr", "ltmp"], ["dgmr", "ltmp", "dpn"], *[["dgmr", "ltmp", "dpn", "das"]] * 2,
    ]  # fmt: skip
    dense, pruned, reduced = (chain[add][1] for add in ("base", "dgmr", "ltmp"))
    assert pruned["tower_macs"] < dense["tower_macs"] and reduced["tower_macs"] < pruned["tower_macs"]
    assert_allclose(reduced["tower_macs"] / pruned["tower_macs"], 0.8, atol=0.1)
    spec = json.loads((chain["das"][0] / "spec.json").read_text())
    assert sum(not block["attn"] for block in spec["decoder"]["blocks"]) == 1
    assert chain["das"][1]["decoder_macs"] < chain["search"][1]["decoder_macs"] + 1


@pytest.mark.slow
def test_the_last_run_of_the_chain_is_loaded_and_generates_what_it_reads(chain):
    m = vtjax.load(chain["das"][0])
    assert five.present(m.spec) == ["dgmr", "ltmp", "dpn", "das"]
    says_what_it_reads(m)


@pytest.mark.slow
def test_times_of_the_chain_have_the_models_whose_tokens_are_gone(chain, tmp_path):
    """Which say what the masked ones say, or the command fails."""
    words = "time", "--variant=tiny", "--batch=4", "--rounds=1", f"--runs={chain['das'][0].parent}"
    assert steps.main([*words, f"--out={tmp_path / 'steps.jsonl'}"]) == 0
    (found,) = tables.read_jsonl(tmp_path / "steps.jsonl")
    states = ("", ", tokens gone", ", counts fixed")
    forms = [f"{add}{state}" for add in ("ltmp", "dpn", "das") for state in states]
    assert list(found["time_ratio"]) == ["base", "dgmr", *forms] and found["time_ratio"]["base"] == 1.0
    assert all(ratio > 0 for ratio in found["time_ratio"].values())
    shown = five_tables.time([found]).splitlines()
    assert [line.split(" | ")[0][2:] for line in shown[4:7]] == [f"+ LTMP{state}" for state in states]


@pytest.mark.slow
def test_eight_devices_say_what_one_says(chain, tmp_path):
    """The last step's model, frames over eight devices: the same loss and answers."""
    alone = chain["das"][1]
    code = (
        "import sys, json; from vtjax.cli import assemble, config as c\n"
        "from vtjax.train import loop\n"
        f"config = c.load_config({CONFIG!r}, 'tiny,add=das', "
        f"{{'init_from': {str(chain['search'][0])!r}, 'mesh.context': '8', 'mesh.data': '1'}})\n"
        f"c.override(config, 'workdir', {str(tmp_path / 'run')!r})\n"
        "task, data = assemble.assemble(config)\n"
        "print(json.dumps(loop.train(task, data, config, config.workdir), default=float))"
    )
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "XLA_FLAGS": flags}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("loss", "decoder_macs", "tower_macs"):
        assert_allclose(found[name], alone[name], rtol=1e-5)


@pytest.mark.parametrize(
    ("add", "leaves", "message"),
    [
        ("dgmr", {}, "config.init_from must be the workdir of the step before 'dgmr', found ''"),
        ("das", {"after": "dpn"}, "config.init_from must be the workdir of a search"),
        ("search", {"after": "dpn", "das.skips": 3}, "dpn needs at least 2 layers after its last stage"),
        ("dpn", {"after": "base", "data.pack": 3}, "config.data.pack must be 1"),
        ("base", {"model.bridge.cross": "none"}, "must be a form of cross-attention"),
    ],
)
def test_a_chain_in_another_order_is_refused(whole, tmp_path, add, leaves, message):
    given = dict(leaves)
    if after := given.pop("after", ""):
        spec, params = base_of(tmp_path)
        for step in five.STEPS[1 : five.STEPS.index(after) + 1]:
            spec, params = added(step, spec, params)
        weights.save(tmp_path / "before.safetensors", spec, params)
        after = tmp_path / "before.safetensors"
    config = config_of(add, tmp_path / "run", after, **given)
    with pytest.raises(InputError, match=message):
        assemble.assemble(config)
