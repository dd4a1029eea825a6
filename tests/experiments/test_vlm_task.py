# SPDX-License-Identifier: Apache-2.0
"""The experiment on questions: a run and its stages, low-rank updates, answers; published models; what is refused."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from PIL import Image

import vtjax as package
from configs import vlm as configs
from experiments.vlm import main as experiment
from vtjax.account import flops, params
from vtjax.cli import assemble, main
from vtjax.cli import config as config_lib
from vtjax.errors import InputError
from vtjax.models.vlm import VLM
from vtjax.parallel import mesh as mesh_lib
from vtjax.parallel import rules
from vtjax.spec import from_json

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/vlm.py:tiny"
COUNTS = json.loads((ROOT / "tests" / "oracle" / "vlm_counts.json").read_text())
# Parameters of one cross-attention block beside an exact decoder, from the published modules (decoder width, kv heads,
# head dim): OpenFlamingo's GatedCrossAttentionBlock (8 heads of 64, media of 1024, 4x MLP, no biases but the norms');
# mPLUG-Owl3's hyper-attention (`v_kv_proj` with bias and a gate per channel).
CROSS = {
    "openflamingo_3b": lambda e: 2 * e + 512 * e + 1024 * 1024 + 512 * e + 1 + 2 * e + 8 * e * e + 1,
    "mplug_owl3_7b": lambda e: e * 2 * 4 * 128 + 2 * 4 * 128 + e,
}
CROSS["openflamingo_9b"] = CROSS["openflamingo_3b"]
PUBLISHED = [name for name in configs.VARIANTS if name not in ("tiny", "easyvqa", "smollm2")]


def vtjax(capsys: Any, *arguments: str) -> dict[str, Any]:
    """A command in this process; the JSON of its last line."""
    assert main.main(list(arguments)) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def config(name: str = CONFIG, **overrides: Any) -> config_lib.Config:
    return config_lib.load_config(name, overrides={k.replace("__", "."): str(v) for k, v in overrides.items()})


def test_what_does_not_count_may_be_nan() -> None:
    """Logits of padding: of a token that is gone they are NaN. Those of a learned token make the loss NaN."""
    logits = np.zeros((2, 2, 5), np.float32)
    logits[:, 1] = np.nan
    rows = {"labels": [0, 3, 0], "weights": [0.0, 1.0, 1.0], "segments": [1, 1, 1]}
    batch = {name: np.asarray([row, row]) for name, row in rows.items()}
    batch |= {"learned": np.array([[1, -1], [1, 2]]), "question": np.array([[0], [1]])}
    batch |= {name: np.zeros((2, 3)) for name in ("positions", "input_ids", "images")}
    model: Any = types.SimpleNamespace(apply=lambda *given, **more: (logits, {}))
    found = experiment.asked(model, None, batch)
    np.testing.assert_allclose(found.loss[0], [np.log(5)], rtol=1e-6)
    assert np.isnan(found.loss[1]).all() and np.asarray(found.right).tolist() == [[0.0], [0.0]]


def test_a_run_its_stages_and_an_answer(tmp_path, capsys):
    """Everything, then the decoder's low-rank updates, then, merged, the bridge alone."""
    first = vtjax(capsys, "run", f"--config={CONFIG}", f"--workdir={tmp_path}/all")
    lines = [json.loads(line) for line in (tmp_path / "all" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "grad_norm" in line]
    assert losses[-1] < 0.9 * losses[0]
    share = {"coarse": 3, "object": 3, "relation": 2, "fine": 4, "list": 3}
    mean = sum(count * first[f"top1@{kind}"] for kind, count in share.items()) / 15
    assert first["count"] == 120 and mean == pytest.approx(first["top1"])

    # What goes on needs nothing of what it was put together from: SmolLM2 is not looked for.
    goes_on, _ = experiment.source(config("configs/vlm.py:smollm2", workdir=tmp_path / "all"))
    saved: Any = package.load(tmp_path / "all").spec
    assert (goes_on.tower, goes_on.decoder) == (saved.tower, saved.decoder)

    again = vtjax(capsys, "run", f"--config={CONFIG}", f"--workdir={tmp_path}/all")  # finished: keeps its result
    assert again["params_sha256"] == first["params_sha256"]

    options = [f"--config={CONFIG},steps=2,stage=decoder,lora=2", f"--config.init_from={tmp_path}/all"]
    vtjax(capsys, "run", *options, f"--workdir={tmp_path}/decoder")
    before, after = (package.load(tmp_path / name) for name in ("all", "decoder"))
    assert after.spec.decoder.lora is not None and after.spec.lineage[-1].operation == "init_from"
    moved = {
        part: max(
            float(np.abs(a - b).max())
            for a, b in zip(jax.tree.leaves(before.params[part]), jax.tree.leaves(after.params[part]), strict=True)
        )
        for part in ("tower", "bridge")
    }
    assert moved["tower"] == 0.0 < moved["bridge"]
    updated = after.params["decoder"]["block_00"]["attn"]["query"]
    assert np.abs(updated["lora_out"]["kernel"]).max() > 0
    np.testing.assert_array_equal(updated["kernel"], before.params["decoder"]["block_00"]["attn"]["query"]["kernel"])

    options = [f"--config={CONFIG},steps=2,stage=bridge", f"--config.init_from={tmp_path}/decoder"]
    vtjax(capsys, "run", *options, f"--workdir={tmp_path}/bridge")
    m = package.load(tmp_path / "bridge")
    assert m.spec.decoder.lora is None and m.spec.decoder.lineage[-1].operation == "lora.merge"
    picture = np.random.default_rng(0).integers(0, 255, (60, 50, 3)).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    said = m.answer(picture, "shape of the large one?", new_tokens=3)
    assert said == m.answer(tmp_path / "picture.png", "Shape of the large one?", new_tokens=3)
    with pytest.raises(InputError, match="a question must be a text, found list"):
        m.answer(picture, ["what?"])
    with pytest.raises(InputError, match="control tokens, found '<answer>'"):
        m.answer(picture, "<answer> red")
    with pytest.raises(InputError, match=r"uint8 \[H, W, 3\], found float64"):
        m.answer(picture / 255, "what?")
    with pytest.raises(InputError, match="must fit the model's context of 256"):
        m.answer(picture, "what " * 260, new_tokens=3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_parameters_and_every_one_has_its_place(name):
    """Counts of transformers on the meta device; what stands in for another part is named."""
    task = assemble.task(config(f"configs/vlm.py:{name}"))
    spec: Any = task.spec
    shapes = jax.eval_shape(task.init, jax.random.key(0))[0]
    found = {part: params.count(shapes[part]) for part in shapes}
    assert params.count(shapes) == sum(row.params for row in flops.layers(spec))
    if name in COUNTS:
        expected = dict(COUNTS[name])
        projector = params.count(shapes["bridge"]["projector"])
        assert projector == expected["projector"] and found["bridge"] - projector == expected["cross"]
        assert found["decoder"] == expected["decoder"]
        assert not spec.stand_ins and from_json(spec.to_json()) == spec
        assert sum(found.values()) == expected["total"] and found["tower"] == expected["tower"]
    if name in CROSS:
        blocks = [params.count(tree) for part, tree in shapes["bridge"].items() if part != "projector"]
        assert blocks == [CROSS[name](spec.decoder.width)] * len(spec.bridge.cross.layers)
    assert (name in COUNTS) != bool(spec.stand_ins)
    mesh = AbstractMesh((1, 8, 1, 2), mesh_lib.AXES)
    laid = rules.shardings(shapes, mesh)
    for leaf, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(laid), strict=True):
        odd = leaf.ndim == 2 and leaf.shape[0] % 2 == 1  # mPLUG-Owl3 has an odd number of words: no axis divides it
        assert odd or leaf.size <= 2**22 or leaf.size // np.prod(sharding.shard_shape(leaf.shape)) >= 2, leaf.shape


def test_a_batch_for_ahead_of_time_compiles_is_what_the_task_takes():
    made = config("configs/vlm.py:llava15_7b", batch_size=16)
    task, module = assemble.task(made), assemble.experiment("vlm")
    batch = {n: jax.ShapeDtypeStruct(*found) for n, found in module.batch_shapes(made, task, True).items()}
    shapes = jax.eval_shape(task.init, jax.random.key(0))[0]
    loss, _ = jax.eval_shape(lambda p, b: task.loss(p, {}, {}, {}, b, None, 0), shapes, batch)
    assert loss.shape == () and VLM(task.spec).spec.placeholders == 576


@pytest.mark.parametrize(
    "overrides,says",
    [
        (
            {"model__bridge__cross": "perceiver"},
            "bridge.cross must be one of none, hyper, fused, flamingo, mllama",
        ),
        ({"model__bridge__cross": "hyper", "model__bridge__layers": "(7,)"}, r"layers must be in 0\.\.1, found 7"),
        ({"model__bridge__cross": "flamingo"}, "CrossSpec.layers must name at least one layer, found none"),
        ({"data__train_split": ""}, "config.data.train_split must name the split whose words"),
        ({"init_from": "vit_ti16_augreg"}, "must hold a VLMSpec, found ViTSpec"),
    ],
)
def test_what_cannot_be_built_is_one_line(overrides, says, shared_data):
    if "init_from" in overrides:
        shared_data("vit_ti16_augreg.safetensors")
    with pytest.raises(InputError, match=says):
        assemble.task(config(**overrides))
