# SPDX-License-Identifier: Apache-2.0
"""The experiment on DPN: runs, insertion into a trained model, what trains, terms of the loss, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vtjax as package
from experiments.dpn import main as experiment
from experiments.vlm import main as vlm
from vtjax import weights
from vtjax.cli import assemble, main
from vtjax.cli import config as config_lib
from vtjax.errors import InputError
from vtjax.methods import dpn
from vtjax.models.vlm import VLM
from vtjax.train import checkpoint
from vtjax.train.state import flatten

CONFIG = "configs/dpn.py:tiny,steps=4"
AT = (1, 2, 3)  # in five layers, as few as three stages need, instead of eight


def vtjax(capsys: Any, *arguments: str) -> dict[str, Any]:
    """A command in this process; the JSON of its last line."""
    assert main.main(list(arguments)) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def config(name: str = CONFIG, **overrides: Any) -> config_lib.Config:
    return config_lib.load_config(name, overrides={k.replace("__", "."): str(v) for k, v in overrides.items()})


def inserted(dense: Path, **overrides: Any) -> config_lib.Config:
    return config(init_from=dense, dpn__at=AT, **overrides)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model without poolings, of the shape of `tiny` with five layers."""
    folder = tmp_path_factory.mktemp("dense") / "run"
    shape = ["data.size=64", "data.pack=1", "model.decoder.depth=5", "model.tower.depth=1", "model.tower.patch=8"]
    options = [f"--config.{leaf}" for leaf in (*shape, "model.tower.image_size=(64, 64)")]
    assert main.main(["run", "--config=configs/vlm.py:tiny,steps=2", *options, f"--workdir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def one(dense: Path) -> tuple[Any, Any, Any, Any]:
    """(config, task, parameters, a batch) of DPN put into it."""
    settings = inserted(dense, dpn__quality=1.0, dpn__distill=1.0, dpn__trainable="routers")
    task, data = assemble.assemble(settings)
    params = jax.tree.map(jnp.asarray, task.init(jax.random.key(0))[0])
    return settings, task, params, {name: jnp.asarray(a) for name, a in next(data.eval()).items()}


def test_a_run_and_its_decisions(dense: Path, tmp_path: Path, capsys: Any) -> None:
    workdir, file = tmp_path / "run", tmp_path / "decisions.jsonl"
    result = vtjax(
        capsys,
        *("run", f"--config={CONFIG}", f"--config.init_from={dense}", f"--config.dpn.at={AT}", f"--workdir={workdir}"),
    )
    assert 0.3 < result["mac_ratio"] <= 1 and 0 <= result["halvings"] <= 2 and result["count"] == 120
    assert result["dense_macs_per_prompt"] > result["least_macs_per_prompt"] > 0
    again = vtjax(capsys, "eval", f"--workdir={workdir}", f"--decisions={file}")
    assert again["top1"] == result["top1"] and again["mac_ratio"] == pytest.approx(result["mac_ratio"], rel=1e-6)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(row["question"] for row in rows) == list(range(120)) and np.shape(rows[0]["p"]) == (3, 3)
    assert np.mean([row["correct"] for row in rows]) == pytest.approx(again["top1"])
    for row in rows:
        left = [64 // 2 ** sum((0, 1, 2)[k] for k in row["choice"][: stage + 1]) for stage in range(3)]
        assert row["visual"] == left and row["choice"] == np.argmax(row["p"], 1).tolist()
    m = package.load(workdir)
    assert dpn.reducers(m.spec) and m.spec.lineage[-1].operation == "dpn.install"
    assert isinstance(m.answer("experiments/vlm/circle.png", "shape of the large one?", new_tokens=2), str)
    spec, params = checkpoint.load_params(workdir)
    task, data = assemble.assemble(config(init_from=workdir))
    leaning = jax.tree.map(jnp.asarray, task.relax(params, 1.0))
    sums = jax.jit(lambda p, b: task.evaluate(p, {}, {}, {}, b))(leaning, next(data.eval()))
    assert float(sums["mac_ratio"] / sums["count"]) == 1.0
    assert spec.edit(lineage=()) == task.spec.edit(lineage=())
    # An evaluation of a model that DPN is only put into would measure routers that nobody trained.
    fresh = [assemble.task(config(init_from=dense, dpn__at=AT, dpn__mode=mode)).fresh for mode in ("adaptive", "off")]
    assert fresh == ["routers", ""] and not task.fresh


def test_put_into_a_trained_model_it_says_what_that_says(dense: Path, one: Any) -> None:
    """Identity with a gate of one, on the same ids; and the arm without pooling."""
    settings, task, params, batch = one
    plain = VLM(task.spec.unreduced())
    expected = jax.jit(lambda p, b: vlm.asked(plain, p, b).logits)(params, batch)
    model = dpn.vlm(task.spec, gate="st")
    y = jax.jit(lambda p, b: vlm.asked(model, p, b, dpn.forced(task.spec, (0, 0, 0))).logits)(params, batch)
    np.testing.assert_array_equal(y, expected)
    kept = flatten(checkpoint.load_params(dense)[1])
    here = flatten(params)
    assert all((np.asarray(here[name]) == np.asarray(value)).all() for name, value in kept.items())
    added = here.keys() - kept.keys()
    assert all("/dpn/" in name or name == "bridge/router_token" for name in added) and len(added) == 14


@pytest.mark.parametrize("what", experiment.TRAINABLE)
def test_what_is_trained(what: str, dense: Path) -> None:
    more = {"model__lora__rank": 2} if what == "lora" else {}
    settings = inserted(dense, dpn__trainable=what, **more)
    task = assemble.task(settings)
    groups = {name: task.trainable(name) for name in flatten(jax.eval_shape(task.init, jax.random.key(0))[0])}
    assert groups["decoder/dpn/relax"] is None
    del groups["decoder/dpn/relax"]
    routers = {name for name in groups if "/dpn/" in name or name.endswith("router_token")}
    assert all(groups[name] == "dpn" for name in routers) and len(routers) == 13
    others = {name for name, group in groups.items() if group is not None and name not in routers}
    assert others == {
        "routers": set(),
        "lora": {name for name in groups if "/lora_" in name},
        "all": groups.keys() - routers,
    }[what] and (what == "routers" or others)


def test_the_terms_of_the_loss(one: Any) -> None:
    settings, task, params, batch = one
    frozen = {"teacher": {"router_token": params["bridge"]["router_token"] + 0.1}}
    knobs = {f"dpn.{name}": jnp.float32(settings.dpn[name]) for name in ("tau", "budget", "lam", "distill", "quality")}
    key = jax.random.key(3)

    @jax.jit
    def slope(routers: Any, knobs: Any, batch: Any) -> Any:
        def of(routers: Any) -> Any:
            held = {**params, "decoder": {**params["decoder"], "dpn": routers}}
            return task.loss(held, frozen, {}, knobs, batch, key, 0)

        return jax.value_and_grad(of, has_aux=True)(routers)

    routers = params["decoder"]["dpn"]
    (total, told), whole = slope(routers, knobs, batch)
    parts = told["answer"] + 1e-3 * told["route"] + told["distill"] + told["harm"]
    np.testing.assert_allclose(total, parts, rtol=1e-6)
    assert told["distill"] > 0 and 0 < told["mac_ratio"] < 1 and told["answer"] > 0
    # A batch that asks nothing says nothing, and no mean divides by zero.
    nothing = {name: jnp.full_like(batch[name], -1) for name in ("segments", "question", "learned", "type")}
    (empty, _), flat = slope(routers, knobs, {**batch, **nothing, "weights": 0 * batch["weights"]})
    assert np.isfinite(empty) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(flat))
    # The harm is heard by the routers: it tells them of one sample which expert would have been better for it.
    without = slope(routers, {**knobs, "dpn.quality": jnp.float32(0)}, batch)[1]
    both = zip(jax.tree.leaves(whole), jax.tree.leaves(without), strict=True)
    assert max(float(jnp.abs(a - b).max()) for a, b in both) > 1e-7


@pytest.mark.slow
def test_forced_and_random_arms(dense: Path, one: Any) -> None:
    batch = one[3]
    for mode, path, share in (("forced", "(2, 2, 2)", None), ("off", "()", 1.0), ("random", "()", None)):
        settings = inserted(dense, dpn__mode=mode, dpn__path=path)
        task = assemble.task(settings)
        params = task.init(jax.random.key(0))[0]
        run = jax.jit(lambda p, b, task=task: (task.evaluate(p, {}, {}, {}, b), task.decisions(p, {}, {}, {}, b)))
        sums, made = run(params, batch)
        ratio = float(sums["mac_ratio"] / sums["count"])
        valid = np.asarray(batch["valid"])
        if mode == "forced":
            assert (np.asarray(made["choice"]) == 2).all() and ratio < 0.62
            assert [(r.mode, r.expert, r.gate) for _, r in dpn.reducers(task.spec)] == [("forced", 2, "off")] * 3
        elif mode == "random":
            assert len(np.unique(np.asarray(made["choice"])[valid])) == 3
            # A question's own, in whatever batch it comes.
            turned = {name: a[::-1] for name, a in batch.items()}
            np.testing.assert_array_equal(made["choice"], run(params, turned)[1]["choice"][::-1])
        assert share is None or ratio == share


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "path"), [("forced", "(1, 2, 1)"), ("by_type", f"({'2, 1, 1, ' * 5})"), ("adaptive", "()")]
)
def test_packed_training_is_lattice_training(mode: str, path: str, dense: Path, one: Any) -> None:
    batch, told = one[3], []
    for layout in experiment.LAYOUTS:
        settings = inserted(dense, dpn__mode=mode, dpn__path=path, dpn__layout=layout)
        task = assemble.task(settings)
        params = task.init(jax.random.key(0))[0]
        knobs = {name: jnp.float32(value) for name, value in task.knobs.items()}
        run = jax.jit(
            jax.value_and_grad(lambda p, b, t=task, k=knobs: t.loss(p, {}, {}, k, b, jax.random.key(1), 0)[0])
        )
        told.append(run(params, batch))
    np.testing.assert_allclose(told[0][0], told[1][0], rtol=1e-5)
    for a, b in zip(*(jax.tree.leaves(slope) for _, slope in told), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1e-2, float(jnp.abs(a).max())))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            {"dpn__mode": "static"},
            "config.dpn.mode must be one of adaptive, random, forced, by_type, off, found 'static'",
        ),
        ({"dpn__tau": 2.0}, "config.dpn.tau must be at least 0 and below 2 halvings, found 2.0"),
        ({"dpn__lam": -1.0}, "config.dpn.lam must be 0 or more, found -1.0"),
        ({"dpn__trainable": "lora"}, "config.dpn.trainable='lora' needs config.model.lora.rank, found 0"),
        ({"dpn__path": "(1, 1, 1)"}, r"path belongs to mode='forced' and 'by_type', found \(1, 1, 1\) for 'adaptive'"),
        (
            {"dpn__mode": "by_type", "dpn__path": "(1, 1, 1)"},
            "must hold 3 experts for each of the types coarse, object",
        ),
        ({"dpn__mode": "forced", "dpn__path": "(1, 1, 3)"}, "must hold numbers of experts"),
        ({"dpn__mode": "forced", "dpn__path": "(1, 1)"}, r"an expert for each of 3 stages, found \(1, 1\)"),
        ({"dpn__distill": 1.0}, r"config.dpn.distill needs a model to learn from \(config.init_from\), found none"),
        ({"dpn__budget": 0.0}, r"config.dpn.budget must be in \(0, 1\], a share of the dense work, found 0.0"),
        ({"data__pack": 9}, "config.data.pack must be 1, as experts are chosen by the question, found 9"),
        ({"dpn__quality_share": 0.0}, r"config.dpn.quality_share must be in \(0, 1\], found 0.0"),
        ({"dpn__at": "(2, 4, 7)"}, r"dpn.at must ascend within 1..6 of 8 layers, found \(2, 4, 7\)"),
        ({"dpn__layout": "dense"}, "config.dpn.layout must be one of lattice, packed, found 'dense'"),
        ({"dpn__exec": "vmap"}, "config.dpn.exec must be one of masked, switch, staged, found 'vmap'"),
        ({"dpn__route_group": 3}, "config.dpn.route_group must divide the 8 rows of a step, or be 0, .* found 3"),
        ({"dpn__route_group": 2, "dpn__loss": "macs"}, "or be 0, as for loss='macs', found 2"),
        ({"dpn__lam_warmup": -5}, "config.dpn.lam_warmup must be 0 or more, found -5"),
        (
            {"dpn__mode": "off", "dpn__trainable": "routers"},
            "config.dpn.trainable must be lora or all where config.dpn.mode='off' asks no router, found routers",
        ),
        (
            {"dpn__mode": "forced", "dpn__path": "(1, 1, 1)", "dpn__quality": 1.0},
            "config.dpn.quality must be 0.0 where config.dpn.mode='forced' asks no router, found 1.0",
        ),
        ({"dpn__n_min": 0}, "dpn.least must be at least 1 token, found 0"),
        (
            {"model__tower__image_size": "(72, 72)"},
            "the grid must be a multiple of 8, one halving per stage, found 9 x 9",
        ),
    ],
)
def test_what_cannot_be_built_is_one_line(overrides: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        assemble.task(config(**overrides))
    assert "\n" not in str(caught.value)


def test_routers_are_not_taken_for_others(one: Any, tmp_path: Path) -> None:
    _, task, params, _ = one
    weights.save(tmp_path / "pooled.safetensors", task.spec, params)
    for leaf, value, found in (("pool", "avg", "'max'"), ("temperature", 1.0, "10.0"), ("router", "linear", "'mlp'")):
        with pytest.raises(InputError, match=f"config.dpn.{leaf} must be {found}, under which the routers"):
            assemble.task(config(init_from=tmp_path / "pooled.safetensors", **{f"dpn__{leaf}": value}))
