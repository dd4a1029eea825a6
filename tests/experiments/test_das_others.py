# SPDX-License-Identifier: Apache-2.0
"""What DAS stands beside, and what disturbs its search."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from experiments.das import accuracy, others
from vtjax.data.questions import Questions
from vtjax.models.lm import LM
from vtjax.models.vlm import VLM
from vtjax.spec import BridgeSpec, LMSpec, ViTSpec, VLMSpec

SPEC = VLMSpec(
    tower=ViTSpec.uniform(image_size=(8, 8), patch=4, width=8, depth=1, heads=2, mlp=16, classes=0, pooling="none"),
    bridge=BridgeSpec(projector="linear"),
    decoder=LMSpec.uniform(depth=2, width=8, heads=2, mlp=12, vocab=20),
    image_token=1,
)


@pytest.fixture(scope="module")
def params() -> Any:
    return jax.jit(VLM(SPEC).init)(jax.random.key(0))


def asked() -> Questions:
    class Images:
        def __len__(self) -> int:
            return 50

        def __getitem__(self, index: int) -> Any:
            raise AssertionError("no image is read")

    kind = np.arange(200, dtype=np.int32) % 2
    return Questions(
        images=Images(),
        texts=tuple(f"question {i}" for i in range(200)),
        image=np.arange(200, dtype=np.int32) // 4,
        answer=np.where(kind == 0, np.arange(200) // 2 % 3, 3 + np.arange(200) // 2 % 2).astype(np.int32),
        type=kind,
        answers=("red", "green", "blue", "yes", "no"),
        types=("color", "exists"),
    )


def test_noisy_answers_are_other_answers_of_the_same_type_in_training_splits_alone() -> None:
    clean, edit = asked(), others.noisy(0.2, 0)
    assert edit(clean, "test[:10]") is clean
    noisy = edit(clean, "train[:3500]")
    wrong = noisy.answer != clean.answer
    assert 20 <= wrong.sum() <= 60  # 40 of 200, a deviation of 5.7
    assert ((noisy.answer < 3) == (noisy.type == 0)).all()
    np.testing.assert_array_equal(noisy.answer, others.noisy(0.2, 0)(clean, "train[:3500]").answer)
    assert (noisy.answer != others.noisy(0.2, 1)(clean, "train[:3500]").answer).any()


def test_few_answers_are_those_of_the_held_split() -> None:
    clean, edit = asked(), others.biased("train[3500:]", ("red", "no"))
    assert edit(clean, "train[:3500]") is clean
    few = edit(clean, "train[3500:]")
    assert set(few.answer.tolist()) == {0, 4} and len(few.texts) == len(few.image) == 84
    assert [few.texts[0], few.texts[1]] == ["question 0", "question 3"]


def test_trained_prompts_are_tokens_before_all_others(params: Any) -> None:
    ids = np.array([[1, 1, 1, 1, 7, 8, 9, 2]], np.int32)
    images = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32)
    given = {"positions": np.arange(8)[None], "segments": np.array([[0, 0, 0, 0, 1, 1, 2, 2]], np.int32)}
    given["positions"][0, 6:] = [4, 5]
    rows = np.asarray(LM(SPEC.decoder).embed(params["decoder"], np.array([[5, 6]])))[0]
    slots = np.array([[5, 7]])
    own = {**params, others.PROMPT: {"rows": rows}}
    prompted = others.Prompted(VLM(SPEC)).apply(own, ids, images, slots=slots, **given)[0]
    longer = {
        "positions": np.concatenate([np.arange(2)[None], given["positions"] + 2], axis=1),
        "segments": np.concatenate([np.zeros((1, 2), np.int32), given["segments"]], axis=1),
    }
    before = np.concatenate([np.array([[5, 6]], np.int32), ids], axis=1)
    expected = VLM(SPEC).apply(params, before, images, slots=slots + 2, **longer)[0]
    np.testing.assert_allclose(prompted, expected, atol=1e-5)


def test_narrower_mlps_keep_neurons_as_they_are(params: Any) -> None:
    spec, own = others.narrower(SPEC, params, 5)
    assert [block.mlp for block in spec.decoder.blocks] == [5, 5]
    for name in ("block_00", "block_01"):
        mlp, before = (jax.tree.map(np.asarray, tree["decoder"][name]["mlp"]) for tree in (own, params))
        places = [int(np.flatnonzero((row == before["up"]["kernel"].T).all(1))[0]) for row in mlp["up"]["kernel"].T]
        assert len(set(places)) == 5
        np.testing.assert_array_equal(mlp["gate"]["kernel"], before["gate"]["kernel"][:, places])
        np.testing.assert_array_equal(mlp["down"]["kernel"], before["down"]["kernel"][places])
    assert own["tower"] is params["tower"] and params["decoder"]["block_00"]["mlp"]["up"]["kernel"].shape == (8, 12)


def test_eight_bits_are_within_half_a_step_per_channel_and_what_was_trained_stays(params: Any) -> None:
    rounded = others.int8(params, lambda path: "bridge" if path.startswith("bridge/") else None)
    assert rounded["bridge"]["projector"] is not None
    jax.tree.map(np.testing.assert_array_equal, rounded["bridge"], params["bridge"])
    before, after = (tree["decoder"]["block_00"]["mlp"]["up"]["kernel"] for tree in (params, rounded))
    step = np.abs(before).max(0) / 127
    assert (np.abs(before - after) <= step * 0.501).all() and (before != after).any()
    assert all(len(np.unique(np.round(column / s))) <= 255 for column, s in zip(after.T, step, strict=True))
    np.testing.assert_array_equal(rounded["decoder"]["norm"]["scale"], params["decoder"]["norm"]["scale"])


def test_arms_start_from_what_they_say() -> None:
    def config(kind: str, name: str) -> Any:
        arm = next(arm for arm in accuracy.KINDS[kind]() if arm.name == name)
        return accuracy.settings("R", kind, arm, 3, {"steps": "40", "optim.warmup": "4"})

    found = config("arms", "bandit m=2")
    assert (found.init_from, found.workdir) == ("R/base/base_3", "R/arms/bandit_m=2_3")
    assert found.das.preferences == "R/search/bandit_m=2_3"  # layers alone: it trained the bridge, too
    assert (found.das.phase, found.das.skips, found.steps, found.seed) == ("finetune", 2, 40, 3)
    full, lora = config("arms", "full"), config("arms", "lora")
    assert full.init_from == lora.init_from == "R/base/base_3" and full.experiment == "vlm"
    assert set(lora.optim.groups) == {"bridge", "lora", "unchanged"} and not full.optim.groups
    assert config("others", "int8").init_from == "R/arms/adapters_3"
    noisy = config("disturbed", "noise 0.2")
    assert (noisy.init_from, noisy.das.preferences) == ("R/base/base_3", "R/disturbed/search_noise_0.2_3")
    assert config("base", "base").init_from == ""
    for task in accuracy.TASKS.values():
        for kind, arms in task.kinds.items():
            names = [arm.name for arm in arms()]
            assert len(names) == len(set(names)), kind
    task = accuracy.TASKS["sortofclevr"]
    last = next(arm for arm in task.kinds["arms"]() if arm.name == "last m=2")
    found = accuracy.settings("R", "arms", last, 1, {}, task)
    assert (found.init_from, found.das.remove, found.das.skips) == ("runs/dpn/dense_1", "[6, 7]", 2)
