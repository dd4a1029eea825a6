# SPDX-License-Identifier: Apache-2.0
"""Output weights fitted anew: exact where the kept neurons say everything, closer elsewhere, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.test_dgmr import DENSE, SPECS, changed, every_spec, forward, images, parameters, prune
from vtjax.errors import InputError
from vtjax.methods import dgmr, dgmr_refit
from vtjax.models.layers import Attention, Norm
from vtjax.models.segments import call_module
from vtjax.models.vit import ViT
from vtjax.ops.linear import gelu

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
    arguments = {"images": 32, "ridge": dgmr_refit.RIDGE, "class_weight": (DENSE.tokens - DENSE.prefix) ** 0.5}
    assert json.loads(spec.lineage[-1].arguments) == arguments
    assert dgmr.original(spec) == DENSE and dgmr.settings(spec)["keep"] == [30, 40, 20]


TWO = DENSE.edit(blocks=DENSE.blocks[:2])
VARIANTS = {
    "layer_scale": TWO.edit(layer_scale=0.1),
    "post": TWO.edit(norm_position="post", layer_scale=0.1),
    "registers": TWO.edit(registers=2, pos_prefix=3, mlp_bias=False),
    "gated": TWO.edit(class_token=False, pos_prefix=0, pooling="mean", activation="swiglu", mlp_norm=True),
}


@pytest.mark.parametrize(
    "name", ["layer_scale", "post", *(pytest.param(n, marks=pytest.mark.slow) for n in ("registers", "gated"))]
)
def test_the_fit_is_the_minimum_of_what_the_module_says(name: str) -> None:
    """The gradient of the sum, written from what blocks return, is gone at the fit, block by block."""
    spec, seen = VARIANTS[name], jnp.asarray(images(24))
    values = parameters(spec)
    small, pruned = prune(spec, values, keep=12)
    _, fitted = dgmr_refit.refit(small, pruned, spec, values, np.asarray(seen), batch=7)
    student, teacher = ViT(small), ViT(spec)

    @jax.jit
    def gradients(values: Any, pruned: Any, fitted: Any) -> list[Any]:
        """The largest entry at the fitted and at the copied weights, by block."""
        found = []
        here, there = student.embed(fitted, seen), teacher.embed(values, seen)
        for layer, (block, whole) in enumerate(zip(student.blocks(), teacher.blocks(), strict=True)):
            mine, copied, known = (each[f"block_{layer:02d}"] for each in (fitted, pruned, values))
            dense = said(spec, known, there)[1]
            there = whole.apply({"params": known}, there)[0]
            cost = objective(spec, block, mine, copied, here, there.x, dense)
            slopes = (jax.tree.leaves(jax.grad(cost)(each["mlp"]["down"])) for each in (mine, copied))
            found.append([jnp.stack([abs(leaf).max() for leaf in leaves]).max() for leaves in slopes])
            here = block.apply({"params": mine}, here)[0]
        return found

    for at_fit, at_copy in gradients(values, pruned, fitted):
        assert at_fit < 1e-3 * at_copy


def objective(spec: Any, block: Any, mine: Any, copied: Any, here: Any, wanted: Any, dense: Any) -> Any:
    """The sum of the module's text as a function of a block's `down`; `wanted` is what the block is to leave."""
    hidden = said(spec, mine, here)[0]
    patches = spec.grid[0] * spec.grid[1]
    weight = jnp.where(jnp.arange(spec.tokens) < int(spec.class_token), patches**0.5, 1.0)[:, None]
    pull = dgmr_refit.RIDGE * (weight * hidden**2).sum() / hidden.shape[-1]
    scale = 1.0 if spec.layer_scale is None else mine["layer_scale2"]

    def cost(down: Any) -> Any:
        if spec.norm_position == "pre":
            changed = {**mine, "mlp": {**mine["mlp"], "down": down}}
            error = (block.apply({"params": changed}, here)[0].x - wanted) / scale
        else:
            error = linear(down, hidden) - dense
        return (weight * error**2).sum() + pull * ((down["kernel"] - copied["mlp"]["down"]["kernel"]) ** 2).sum()

    return cost


def said(spec: Any, params: Any, tokens: Any) -> tuple[Any, Any]:
    """What enters the `down` of a block's MLP, and what leaves it."""
    norm = functools.partial(call_module, Norm(spec.norm, spec.eps))
    post, x = spec.norm_position == "post", tokens.x
    inner = x if post else norm(params["norm1"], x)
    y = call_module(Attention(spec, spec.blocks[0]), params["attn"], tokens.replace(x=inner))[0]
    y = norm(params["norm1"], y) if post else y
    x = x + (y if spec.layer_scale is None else y * params["layer_scale1"])
    inner, mlp = x if post else norm(params["norm2"], x), params["mlp"]
    hidden = linear(mlp["up"], inner)
    hidden = jax.nn.silu(linear(mlp["gate"], inner)) * hidden if "gate" in mlp else gelu(hidden)
    hidden = norm(mlp["norm"], hidden) if "norm" in mlp else hidden
    return hidden, linear(mlp["down"], hidden)


def linear(leaves: Any, x: Any) -> Any:
    return x @ leaves["kernel"] + leaves.get("bias", 0.0)


def test_silent_neurons_do_not_stop_it() -> None:
    values = parameters()
    for name in ("kernel", "bias"):
        values = changed(values, f"block_00/mlp/up/{name}", np.zeros_like)
    small, pruned = prune(DENSE, values, keep=20)
    _, fitted = dgmr_refit.refit(small, pruned, DENSE, values, np.asarray(images(2)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(fitted))


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
        (2, {"batch": 0}, "batch must be 1 or more, found 0"),
        (2, {"images": np.full((2, 12, 12, 3), np.nan)}, "images must be finite, found NaN"),
        (2, {"images": np.zeros((2, 8, 8, 3))}, r"images must be \[B, 12, 12, 3\], found \[2, 8, 8, 3\]"),
        (2, {"dense_spec": DENSE.edit(blocks=lambda _, b: dataclasses.replace(b, mlp=20))}, "MLPs must be narrower"),
        (2, {"ridge": -1.0}, "ridge must be 0 or more, found -1.0"),
        (2, {"dense_spec": DENSE.edit(activation="quick_gelu")}, "differ in MLP widths only, found another activation"),
    ],
)
def test_bad_input_is_refused(count: int, change: Any, message: str) -> None:
    values = parameters()
    small, pruned = prune(DENSE, values, keep=20)
    arguments = {"spec": small, "params": pruned, "dense_spec": DENSE, "dense": values}
    with pytest.raises(InputError, match=message):
        dgmr_refit.refit(**{**arguments, "images": np.asarray(images(2))[:count], **change})
