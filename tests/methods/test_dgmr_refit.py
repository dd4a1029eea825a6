# SPDX-License-Identifier: Apache-2.0
"""Output weights fitted anew: exact where the kept neurons say everything, closer elsewhere, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.methods.test_dgmr import DENSE, SPECS, changed, every_spec, forward, images, parameters, prune
from vtjax.errors import InputError
from vtjax.methods import dgmr, dgmr_refit

KEPT = 20


def doubled(values: Any, spec: Any) -> Any:
    """Every neuron stands there twice, with output weights of its own."""
    for layer in range(spec.depth):
        for name in ("up", "gate"):
            for leaf in values[f"block_{layer:02d}"]["mlp"].get(name, {}):
                path = f"block_{layer:02d}/mlp/{name}/{leaf}"
                values = changed(values, path, lambda x: np.concatenate([x[..., :KEPT]] * 2, -1))
    return values


@every_spec
def test_neurons_that_say_the_same_are_not_missed(name: str) -> None:
    spec = SPECS[name]
    values, seen = doubled(parameters(spec), spec), np.asarray(images(12))
    small, pruned = prune(spec, values, indices=[list(range(KEPT))] * spec.depth)
    fitted_spec, fitted = dgmr_refit.refit(small, pruned, spec, values, seen, ridge=0.0, batch=5)
    known, new = forward(spec)(values, images(16)), images(16)[12:]
    before, after = (abs(forward(small)(each, new) - known[12:]).max() for each in (pruned, fitted))
    assert after < 1e-3 and after < before / 50
    assert dgmr.hidden(fitted_spec) == dgmr.hidden(small)


def test_others_are_missed_less_and_the_rest_stays() -> None:
    values, seen = parameters(), np.asarray(images(40))
    small, pruned = prune(DENSE, values, keep=[30, 40, 20])
    told: list[int] = []
    spec, fitted = dgmr_refit.refit(small, pruned, DENSE, values, seen[:32], progress=told.append)
    known = forward(DENSE)(values, seen)
    before, after = (abs(forward(small)(each, seen) - known)[32:].mean() for each in (pruned, fitted))
    assert after < 0.8 * before
    assert told == [0, 2]  # the block in between keeps everything
    for layer, moved in ((0, True), (1, False), (2, True)):
        for name, leaves in fitted[f"block_{layer:02d}"]["mlp"].items():
            for leaf, value in leaves.items():
                same = np.array_equal(value, pruned[f"block_{layer:02d}"]["mlp"][name][leaf])
                assert same != (moved and name == "down"), (layer, name, leaf)
    assert spec.lineage[:-1] == small.lineage and spec.lineage[-1].operation == dgmr_refit.REFIT
    assert json.loads(spec.lineage[-1].arguments) == {"images": 32, "ridge": dgmr_refit.RIDGE}
    assert dgmr.original(spec) == DENSE and dgmr.settings(spec)["keep"] == [30, 40, 20]


def test_a_strong_ridge_keeps_the_copied_weights() -> None:
    values = parameters()
    small, pruned = prune(DENSE, values, keep=20)
    _, fitted = dgmr_refit.refit(small, pruned, DENSE, values, np.asarray(images(2)), ridge=1e9)
    for layer in range(DENSE.depth):
        found, copied = (each[f"block_{layer:02d}"]["mlp"]["down"]["kernel"] for each in (fitted, pruned))
        np.testing.assert_allclose(found, copied, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "change", "message"),
    [
        (0, {}, "a refit needs at least one image, found none"),
        (2, {"ridge": -1.0}, "ridge must be 0 or more, found -1.0"),
        (2, {"dense_spec": DENSE.edit(activation="quick_gelu")}, "differ in MLP widths only, found another activation"),
    ],
)
def test_bad_input_is_refused(count: int, change: Any, message: str) -> None:
    values = parameters()
    small, pruned = prune(DENSE, values, keep=20)
    arguments = {"spec": small, "params": pruned, "dense_spec": DENSE, "dense": values} | change
    with pytest.raises(InputError, match=message):
        dgmr_refit.refit(images=np.asarray(images(2))[:count], **arguments)
