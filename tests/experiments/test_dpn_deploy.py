# SPDX-License-Identifier: Apache-2.0
"""What `vtjax bench` times of DPN says what the masked model says to the same questions."""

import dataclasses

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

import vtjax
from experiments.dpn import deploy as deploy_lib
from vtjax.cli import assemble
from vtjax.cli import config as config_lib
from vtjax.errors import InputError
from vtjax.methods import dpn
from vtjax.train.task import first_examples


@pytest.fixture(scope="module")
def given():
    config = config_lib.load_config("configs/dpn.py", "tiny", {"data.n": "8"})
    task, data = assemble.assemble(config)
    return config, task, first_examples(data, "eval", 4)


@pytest.mark.slow  # the forms themselves: tests/methods/test_dpn.py
def test_both_sides_answer_the_question_alone(given):
    config, task, rows = given
    short, whole = deploy_lib.deploy(config, task, rows, None)
    ids, images, segments = inputs = short.inputs(rows)
    mask = deploy_lib.prompt(task.spec, ids, segments)
    assert (ids[np.arange(4), mask.sum(1) - 1] == task.spec.router_token).all() and (mask.sum(1) < ids.shape[1]).any()
    last = mask.sum(1)[:, None] - 1
    params = short.params
    model = dpn.vlm(task.spec)
    masked = jax.jit(lambda p: model.apply(p, ids, images, mask)[0])(params)
    assert_allclose(short.apply(params, *inputs), np.take_along_axis(masked, last[:, :, None], 1)[:, 0], atol=1e-5)
    dense = jax.jit(lambda p: model.apply(p, ids, images, mask, knobs=dpn.forced(task.spec, (0, 0, 0)))[0])(params)
    assert_allclose(whole.apply(params, *inputs), np.take_along_axis(dense, last[:, :, None], 1)[:, 0], atol=1e-5)
    # Routers with fresh weights pool: less work.
    assert short.macs(*inputs) < whole.macs(*inputs)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["switch", "masked"])
def test_other_forms_say_the_same(given, form):
    config, task, rows = given
    expected = deploy_lib.deploy(config, task, rows, None)[0]
    config = config_lib.load_config("configs/dpn.py", "tiny", {"data.n": "8", "dpn.exec": form})
    found = deploy_lib.deploy(config, task, rows, None)[0]
    alone = [a[:1] for a in found.inputs(rows)]
    assert_allclose(found.apply(found.params, *alone), expected.apply(expected.params, *alone), atol=1e-5)
    assert found.macs(*alone) == expected.macs(*alone) and found.settings == {"form": form}
    if form == "switch":
        with pytest.raises(InputError, match="Switch takes one question at a time"):
            found.apply(found.params, *found.inputs(rows))


def test_other_models_are_refused(given):
    config, task, rows = given
    other = vtjax.Model(task.spec.edit(router_token=task.spec.router_token + 1), {}, lambda: None)
    with pytest.raises(InputError, match="--dense must have router_token"):
        deploy_lib.deploy(config, task, rows, other)
    crossing = config_lib.load_config("configs/all_five.py", "tiny", {})
    with pytest.raises(InputError, match="found cross-attention"):
        deploy_lib.deploy(config, dataclasses.replace(task, spec=assemble.task(crossing).spec), rows, None)
