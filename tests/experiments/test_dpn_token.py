# SPDX-License-Identifier: Apache-2.0
"""Routers that read the token in front of the answer: texts, and with no pooling every logit, stay as they were."""

import jax
import numpy as np
import pytest

from experiments.vlm import main as vlm
from vtjax import answer, weights
from vtjax.cli import assemble
from vtjax.cli import config as config_lib
from vtjax.errors import InputError
from vtjax.methods import dpn
from vtjax.models.vlm import VLM

LEAVES = {"data.n": "8", "dpn.token": "answer"}


@pytest.fixture(scope="module")
def given():
    config = config_lib.load_config("configs/dpn.py", "tiny", LEAVES)
    task, data = assemble.assemble(config)
    return config, task, next(iter(data.eval()))


def test_texts_and_logits_are_those_of_the_model_it_is_put_into(given):
    config, task, batch = given
    base, _ = vlm.composed(config)
    assert task.spec.router_token == answer.tokenizer_of(base).encode("<answer>")[0] < base.decoder.ids
    assert not task.spec.adds_router_token
    plain = next(iter(vlm.data(config, type("Of", (), {"spec": base})).eval()))
    np.testing.assert_array_equal(plain["input_ids"], batch["input_ids"])
    asks = batch["input_ids"] == task.spec.router_token
    assert (asks.sum(1) == (batch["question"][:, 0] >= 0)).all()
    assert (np.argmax(asks, 1) == batch["learned"][:, 0])[batch["valid"]].all()  # what it reads has seen no answer
    params, _, _ = task.init(jax.random.key(0))
    assert "router_token" not in params["bridge"]
    dense = dpn.forced(task.spec, (0, 0, 0))
    found = jax.jit(lambda p: vlm.asked(dpn.vlm(task.spec), p, batch, dense).logits)(params)
    np.testing.assert_array_equal(found, jax.jit(lambda p: vlm.asked(VLM(base), p, batch).logits)(params))


def test_it_is_saved_loaded_and_asked(given, tmp_path):
    _, task, batch = given
    params, _, _ = task.init(jax.random.key(0))
    weights.save(tmp_path / "model.safetensors", task.spec, params)
    spec, _ = weights.load(tmp_path / "model.safetensors")
    assert spec == task.spec
    asked = answer.inputs(spec, np.zeros((64, 64, 3), np.uint8), "shape of the large one?")
    assert (asked["input_ids"] == spec.router_token).sum() == 1


def test_what_it_cannot_be_is_refused(given):
    config, task, _ = given
    base, _ = vlm.composed(config)
    with pytest.raises(
        InputError, match=rf"dpn.token must be an id of the decoder's, 0..{base.decoder.ids - 1}, found"
    ):
        dpn.install(base, None, jax.random.key(0), token=base.decoder.ids)
    other = config_lib.load_config("configs/dpn.py", "tiny", {"data.n": "8", "dpn.token": "question"})
    with pytest.raises(InputError, match="config.dpn.token must be one of router, answer, found 'question'"):
        assemble.assemble(other)
