# SPDX-License-Identifier: Apache-2.0
"""DGMR's surgery: the invariants of the spec's section 7, budgets over blocks, features, and what is refused."""

from __future__ import annotations

import functools
import json
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vtjax
from vtjax import weights
from vtjax.account import flops, params
from vtjax.errors import InputError
from vtjax.methods import dgmr, dgmr_budget
from vtjax.models.vit import ViT
from vtjax.parallel import mesh as mesh_lib
from vtjax.spec import ViTSpec, from_json
from vtjax.train.state import flatten, params_sha256

DENSE = ViTSpec.uniform(depth=3, width=16, heads=2, mlp=40, image_size=12, patch=4, classes=5)
GATED = DENSE.edit(activation="swiglu", layer_scale=0.1)
SHALLOW = DENSE.edit(blocks=DENSE.blocks[:1])
FORM = "deflated"  # the quickest to compile; all select the same
SPECS = {"plain": DENSE, "gated": GATED, "no_bias": DENSE.edit(mlp_bias=False)}
every_spec = pytest.mark.parametrize("name", SPECS)


@functools.cache
def parameters(spec: ViTSpec = DENSE, seed: int = 0) -> Any:
    """Random everywhere, numpy float32: zero-initialised leaves would hide mistakes."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(ViT(spec).init, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return tree.unflatten([np.float32(rng.normal(size=leaf.shape) * 0.3) for leaf in leaves])


def changed(values: Any, path: str, edit: Any) -> Any:
    """A copy of a parameter tree in which one leaf is `edit(leaf)`."""
    head, _, rest = path.partition("/")
    return {**values, head: changed(values[head], rest, edit) if rest else edit(np.array(values[head]))}


@functools.cache
def forward(spec: ViTSpec) -> Any:
    return jax.jit(lambda values, images: ViT(spec).apply(values, images)[0])


def images(count: int = 3, spec: ViTSpec = DENSE) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (count, *spec.image_size, 3))


prune = functools.partial(dgmr.prune, form=FORM)


def order(spec: ViTSpec, values: Any, keep: int | list[int], **how: Any) -> list[np.ndarray]:
    picks = dgmr.choose(spec, values, dgmr.counts(spec, keep=keep), **{"form": FORM, **how})
    return [np.asarray(pick.indices) for pick in picks if pick is not None]


def greedy(matrix: np.ndarray, k: int) -> list[int]:
    """Form A in float64, round after round: an obvious reference."""
    left, kept = list(range(len(matrix))), []
    while len(kept) < k:
        rest, picked = matrix[left].astype(np.float64), []
        for _ in range(min(matrix.shape[1], len(left))):
            lengths = (rest**2).sum(1)
            lengths[picked] = -1.0
            best = int(lengths.argmax())
            picked.append(best)
            rest = rest - np.outer(rest @ rest[best], rest[best]) / lengths[best]
        kept += [left[i] for i in picked]
        left = [row for i, row in enumerate(left) if i not in picked]
    return kept[:k]


@every_spec
@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_kept_weights_are_bitwise_copies_in_pick_order(name: str, ratio: float) -> None:
    spec, values = SPECS[name], parameters(SPECS[name])
    before = jax.tree.map(np.array, values)
    pruned_spec, pruned = prune(spec, values, ratio=ratio)
    k = int(16 * ratio)
    assert [block.mlp for block in pruned_spec.blocks] == [k] * 3
    for layer, index in enumerate(order(spec, values, k)):
        old, new = (tree[f"block_{layer:02d}"]["mlp"] for tree in (values, pruned))
        for part in ("up", "gate") if name == "gated" else ("up",):
            np.testing.assert_array_equal(new[part]["kernel"], old[part]["kernel"][:, index])
            if name != "no_bias":
                np.testing.assert_array_equal(new[part]["bias"], old[part]["bias"][index])
        np.testing.assert_array_equal(new["down"]["kernel"], old["down"]["kernel"][index])
        if name != "no_bias":
            np.testing.assert_array_equal(new["down"]["bias"], old["down"]["bias"])
        matrix = old["up"]["kernel"].T
        if name == "gated":
            matrix = np.concatenate([old["gate"]["kernel"].T, matrix], 1)
        assert index.tolist() == greedy(matrix, k)
    jax.tree.map(np.testing.assert_array_equal, before, values)  # the inputs are as they were
    assert params.count(pruned) == params.count(pruned_spec)


@every_spec
def test_everything_but_the_mlps_is_the_same_array(name: str) -> None:
    spec, values = SPECS[name], parameters(SPECS[name])
    _, pruned = prune(spec, values, ratio=1.0)
    before, after = flatten(values), flatten(pruned)
    assert before.keys() == after.keys()
    touched = {path for path in before if after[path] is not before[path]}
    assert touched == {path for path in before if "/mlp/" in path and not path.endswith("down/bias")}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_types_are_selected_in_float32_and_copied_as_they_are(dtype: Any) -> None:
    narrow = jax.tree.map(lambda x: jnp.asarray(x, dtype), parameters())
    wide = jax.tree.map(lambda x: np.asarray(x, np.float32), narrow)
    assert list(map(list, order(DENSE, narrow, 16))) == list(map(list, order(DENSE, wide, 16)))
    _, pruned = prune(DENSE, narrow, ratio=1.0)
    assert {leaf.dtype for leaf in jax.tree.leaves(pruned)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("method", dgmr.METHODS[:-1])
def test_fewer_neurons_are_the_beginning_of_more(method: str) -> None:
    """Within one round and over several; also where the counts differ over the blocks."""
    whole = order(DENSE, parameters(), 40, method=method)
    for keep in (8, 16, 32):
        for short, long in zip(order(DENSE, parameters(), keep, method=method), whole, strict=True):
            np.testing.assert_array_equal(short, long[:keep])
    mixed = order(DENSE, parameters(), [8, 32, 17], method=method)
    assert [len(index) for index in mixed] == [8, 32, 17]
    for short, long in zip(mixed, whole, strict=True):
        np.testing.assert_array_equal(short, long[: len(short)])


@every_spec
def test_keeping_all_is_a_permutation_that_changes_nothing(name: str) -> None:
    spec, values = SPECS[name], parameters(SPECS[name])
    pruned_spec, pruned = prune(spec, values, keep=40)
    for index in order(spec, values, 40):
        assert sorted(index) == list(range(40))
    np.testing.assert_allclose(forward(pruned_spec)(pruned, images()), forward(spec)(values, images()), atol=1e-5)
    back = [np.argsort(index) for index in order(spec, values, 40)]
    _, undone = prune(pruned_spec, pruned, indices=back)
    jax.tree.map(np.testing.assert_array_equal, undone, values)


@every_spec
def test_dead_neurons_are_not_missed(name: str) -> None:
    """Half of them have no output weights, half no input weights and no bias; the short ones are pruned."""
    spec, values = SPECS[name], parameters(SPECS[name])
    rng = np.random.default_rng(5)
    for layer in range(3):
        dead = rng.permutation(40)[:24]
        where = f"block_{layer:02d}/mlp"

        def silence(x: np.ndarray, rows: np.ndarray = dead[:12]) -> np.ndarray:
            x[rows] = 0.0
            return x

        def cut(x: np.ndarray, columns: np.ndarray = dead[12:], short: np.ndarray = dead[:12]) -> np.ndarray:
            x[..., columns] = 0.0
            return x * np.where(np.isin(np.arange(40), short), 1e-3, 1.0).astype(np.float32)

        values = changed(values, f"{where}/down/kernel", silence)
        for part in ("up", "gate") if name == "gated" else ("up",):
            for leaf in values[f"block_{layer:02d}"]["mlp"][part]:
                values = changed(values, f"{where}/{part}/{leaf}", cut)
    pruned_spec, pruned = prune(spec, values, ratio=1.0)
    np.testing.assert_allclose(forward(pruned_spec)(pruned, images()), forward(spec)(values, images()), atol=2e-6)


def test_only_the_input_weights_decide() -> None:
    values, rng = parameters(), np.random.default_rng(3)
    other = values
    for path, leaf in flatten(values).items():
        if not path.endswith("mlp/up/kernel"):
            noise = np.float32(rng.normal(size=leaf.shape))
            other = changed(other, path, lambda _, noise=noise: noise)
    for a, b in zip(order(DENSE, values, 32), order(DENSE, other, 32), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_second_round_is_a_fresh_one_on_what_is_left() -> None:
    values = parameters()
    first = order(DENSE, values, 16)
    both = order(DENSE, values, 32)
    rest = [np.setdiff1d(np.arange(40), index) for index in first]
    left_spec, left = prune(DENSE, values, indices=rest)
    for layer, again in enumerate(order(left_spec, left, 16)):
        np.testing.assert_array_equal(both[layer][:16], first[layer])
        np.testing.assert_array_equal(both[layer][16:], rest[layer][again])


@pytest.mark.parametrize("score", dgmr.SCORES)
def test_gated_neurons_move_together(score: str) -> None:
    """SiLU is on the gate; rows i of gate and value, and column i of the output, are one neuron."""
    values = parameters(GATED)
    pruned_spec, pruned = prune(GATED, values, keep=16, score=score)
    index = order(GATED, values, 16, score=score)[0]
    old, new = values["block_00"]["mlp"], pruned["block_00"]["mlp"]
    gate, value = old["gate"]["kernel"].T, old["up"]["kernel"].T
    assert index.tolist() == greedy({"gate": gate, "value": value}.get(score, np.hstack([gate, value])), 16)
    x = np.float32(np.random.default_rng(0).normal(size=(4, 16)))
    parts = [x @ old[part]["kernel"][:, index] + old[part]["bias"][index] for part in ("gate", "up")]
    hidden = parts[0] / (1 + np.exp(-parts[0])) * parts[1]
    expected = hidden @ old["down"]["kernel"][index] + old["down"]["bias"]
    gate, up = (x @ new[part]["kernel"] + new[part]["bias"] for part in ("gate", "up"))
    np.testing.assert_allclose(
        jax.nn.silu(gate) * up @ new["down"]["kernel"] + new["down"]["bias"], expected, atol=1e-5
    )
    assert dgmr.settings(pruned_spec)["score"] == score


@pytest.mark.parametrize("form", ["blocked", "lazy"])
def test_all_forms_select_the_same(form: str) -> None:
    for a, b in zip(order(DENSE, parameters(), 32), order(DENSE, parameters(), 32, form=form), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_mesh_changes_nothing() -> None:
    kept, mesh = dgmr.counts(DENSE, keep=[16, 8, 16]), mesh_lib.make({"data": 1, "fsdp": -1})
    shared = dgmr.choose(DENSE, parameters(), kept, form=FORM, mesh=mesh)
    for a, b in zip(shared, dgmr.choose(DENSE, parameters(), kept, form=FORM), strict=True):
        assert a is not None and b is not None
        np.testing.assert_array_equal(a.indices, b.indices)
        np.testing.assert_allclose(a.norms, b.norms, rtol=1e-6)


def test_jit_is_eager() -> None:
    kept = dgmr.counts(DENSE, ratio=1.0)
    jitted = jax.jit(lambda values: dgmr.take(DENSE, values, dgmr.choose(DENSE, values, kept, form=FORM)))(parameters())
    jax.tree.map(np.testing.assert_array_equal, jitted, prune(DENSE, parameters(), ratio=1.0)[1])


def test_the_other_criteria() -> None:
    values = parameters()
    lengths = np.linalg.norm(values["block_01"]["mlp"]["up"]["kernel"], axis=0)
    np.testing.assert_array_equal(order(DENSE, values, 9, method="l2")[1], np.argsort(-lengths, kind="stable")[:9])
    drawn = [order(DENSE, values, 20, method="random", seed=seed) for seed in (0, 0, 1)]
    assert all(len(set(index)) == 20 for index in drawn[0])
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2]) and not np.array_equal(drawn[0][0], drawn[0][1])
    tied = changed(values, "block_00/mlp/up/kernel", np.ones_like)
    np.testing.assert_array_equal(order(DENSE, tied, 5, method="l2")[0], np.arange(5))


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_neither_tiny_nor_huge_weights_are_lost(scale: float) -> None:
    values = parameters()
    scaled = changed(values, "block_00/mlp/up/kernel", lambda x: x * np.float32(scale))
    for method in ("gram_schmidt", "l2"):
        expected = order(DENSE, values, 16, method=method)[0]
        np.testing.assert_array_equal(order(DENSE, scaled, 16, method=method)[0], expected)


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_degenerate_weights_still_give_distinct_neurons(rank: int) -> None:
    rng = np.random.default_rng(0)
    low = np.float32(rng.integers(-3, 4, (16, rank)) @ rng.integers(-3, 4, (rank, 40)))
    values = changed(parameters(), "block_02/mlp/up/kernel", lambda _: low)
    index = order(DENSE, values, 16)[2]
    assert len(set(index)) == 16
    assert np.linalg.matrix_rank(low[:, index[:rank]]) == np.linalg.matrix_rank(low) if rank else True


def test_fewer_neurons_than_inputs() -> None:
    narrow = DENSE.edit(blocks=lambda _, block: block.__class__(**{**vars(block), "mlp": 9}))
    assert [sorted(index) for index in order(narrow, parameters(narrow), 9)] == [list(range(9))] * 3


def test_what_is_not_finite_elsewhere_is_copied() -> None:
    values = changed(parameters(), "block_00/mlp/up/bias", lambda x: x * np.nan)
    values = changed(values, "block_00/mlp/down/kernel", lambda x: x * np.inf)
    _, pruned = prune(DENSE, values, ratio=1.0)
    assert np.isnan(pruned["block_00"]["mlp"]["up"]["bias"]).all()


def test_the_norm_on_hidden_activations_is_pruned_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    spec = GATED.edit(mlp_norm=True)
    values = parameters(spec)
    with caplog.at_level(logging.WARNING):
        pruned_spec, pruned = prune(spec, values, keep=16)
    index = order(spec, values, 16)[0]
    for leaf in ("scale", "bias"):
        np.testing.assert_array_equal(
            pruned["block_00"]["mlp"]["norm"][leaf], values["block_00"]["mlp"]["norm"][leaf][index]
        )
    assert "mlp/norm" in caplog.text and np.isfinite(forward(pruned_spec)(pruned, images())).all()


def test_removed_mlps_are_left_alone() -> None:
    spec = DENSE.edit(blocks={1: {"ffn": False}})
    values = {**parameters(), "block_01": {k: v for k, v in parameters()["block_01"].items() if k in ("norm1", "attn")}}
    pruned_spec, pruned = prune(spec, values, ratio=1.0)
    assert [block.mlp for block in pruned_spec.blocks] == [16, 40, 16]
    assert dgmr.settings(pruned_spec)["keep"] == [16, 0, 16] and pruned["block_01"] is values["block_01"]
    restored = dgmr.original(pruned_spec)
    assert restored == spec
    with pytest.raises(
        InputError, match=r"block 1: K, the neurons to keep, must be a whole number in 0..M = 0, found 3"
    ):
        dgmr.counts(spec, keep=[16, 3, 16])


@pytest.mark.parametrize("layout", ["timm", "vtjax"])
def test_what_the_foundation_loads_can_be_pruned(layout: str, tmp_path: Any) -> None:
    """Fused names of timm (qkv, and gate beside value in one array): the same neurons, and the same model after."""
    values = parameters(GATED)
    path = weights.save(tmp_path / "model.safetensors", GATED, values, layout=layout)
    m = vtjax.load(path, spec=GATED if layout == "timm" else None)
    spec, pruned = prune(m.spec, m.params, ratio=1.0)
    _, expected = prune(GATED, values, ratio=1.0)
    jax.tree.map(np.testing.assert_array_equal, pruned, expected)
    weights.save(tmp_path / "pruned.safetensors", spec, pruned)
    again = vtjax.load(tmp_path / "pruned.safetensors")
    assert again.spec == spec and [block.mlp for block in again.spec.blocks] == [16] * 3
    np.testing.assert_array_equal(jax.jit(again.apply)(again.params, images())[0], forward(spec)(expected, images()))


def test_the_lineage_tells_what_was_done() -> None:
    values = parameters()
    spec, once = prune(DENSE, values, ratio=2.0, parent=params_sha256(values))
    step = spec.lineage[-1]
    assert (step.operation, step.parent, step.seed) == ("dgmr.prune", params_sha256(values), None)
    arguments = json.loads(step.arguments)
    assert (
        arguments.pop("indices_sha256")
        == json.loads(prune(DENSE, values, keep=32, form="deflated")[0].lineage[-1].arguments)["indices_sha256"]
    )
    assert arguments == {"method": "gram_schmidt", "keep": 32, "mlp": 40}
    twice, _ = prune(spec, once, keep=[8, 9, 10], method="random", seed=4)
    assert twice.lineage[-1].seed == 4 and dgmr.settings(twice)["keep"] == [8, 9, 10]
    assert dgmr.original(twice) == DENSE == dgmr.original(spec) and dgmr.original(DENSE) is None
    assert from_json(twice.to_json()) == twice


def test_macs_fall_by_formula_and_by_walk() -> None:
    spec, pruned = prune(DENSE, parameters(), keep=[4, 40, 16])
    walked = flops.walk(ViT(spec).apply, pruned, jax.ShapeDtypeStruct((1, 12, 12, 3), jnp.float32))
    assert walked.macs == flops.macs(spec) == flops.macs(DENSE) - 2 * 10 * 16 * (36 + 24)


PRUNE: dict[str, tuple[dict[str, Any], str]] = {
    "no extent": ({}, "prune needs one of ratio, keep and indices, found none"),
    "two": ({"ratio": 1.0, "keep": 4}, "prune needs one of ratio, keep and indices, found ratio and keep"),
    "zero": ({"keep": 0}, r"block 0: K, the neurons to keep, must be a whole number in 1..M = 40, found 0"),
    "above": ({"keep": 41}, r"must be a whole number in 1..M = 40, found 41"),
    "not whole": ({"keep": 4.5}, r"must be a whole number in 1..M = 40, found 4.5"),
    "a truth": ({"keep": True}, r"must be a whole number in 1..M = 40, found True"),
    "few counts": ({"keep": [4, 4]}, "keep must be one number, or one for each of 3 blocks, found 2"),
    "ratio 0": ({"ratio": 0.0}, "ratio must be above 0 and finite, found 0.0"),
    "ratio -1": ({"ratio": -1.0}, "ratio must be above 0 and finite, found -1.0"),
    "ratio nan": ({"ratio": float("nan")}, "ratio must be above 0 and finite, found nan"),
    "large ratio": ({"ratio": 3.0}, r"in 1..M = 40, found 48 \(floor\(16 x 3.0\)\)"),
    "tiny ratio": ({"ratio": 0.01}, r"in 1..M = 40, found 0 \(floor\(16 x 0.01\)\)"),
    "method": ({"ratio": 1.0, "method": "taylor"}, "method must be one of gram_schmidt, l2, random, found 'taylor'"),
    "score": ({"ratio": 1.0, "score": "sum"}, "score must be one of concat, gate, value, found 'sum'"),
    "form": ({"ratio": 1.0, "form": "D"}, "form must be one of .*, found 'D'"),
    "few indices": ({"indices": [[1]]}, "indices must hold one list for each of 3 blocks, found 1"),
    "twice": ({"indices": [[1, 1], [0], [0]]}, r"indices\[0\] must be distinct, found neuron 1 again"),
    "beyond": (
        {"indices": [[0], [40], [0]]},
        r"indices\[1\] must be whole numbers in 0..39, .*, found \[40\]",
    ),
    "negative": (
        {"indices": [[0], [0], [-1]]},
        r"indices\[2\] must be whole numbers in 0..39, .*, found \[-1\]",
    ),
    "empty": ({"indices": [[0], [], [0]]}, r"indices\[1\] must be whole numbers in 0..39, at least one, found \[\]"),
}


@pytest.mark.parametrize("case", PRUNE)
def test_bad_arguments_get_one_line(case: str) -> None:
    arguments, message = PRUNE[case]
    with pytest.raises(InputError, match=message) as error:
        prune(DENSE, parameters(), **arguments)
    assert "\n" not in str(error.value)


WEIGHTS: dict[str, tuple[str, Any, str]] = {
    "nan": ("up/kernel", lambda x: np.where(np.arange(40) == 3, np.nan, x), "must be finite, found 16 NaN or infinite"),
    "inf": ("up/kernel", lambda x: np.where(x == x.max(), np.inf, x), "must be finite, found 1 NaN or infinite"),
    "W": ("up/kernel", lambda x: x[:, :-1], r"must be \[16, 40\], found \[16, 39\]"),
    "not 2-D": ("up/kernel", lambda x: x[None], r"must be \[16, 40\], found \[1, 16, 40\]"),
    "whole": ("up/kernel", lambda x: x.astype(int), "must be of a float type, found int64"),
    "b": ("up/bias", lambda x: x[:-1], r"must be \[40\], found \[39\]"),
    "V": ("down/kernel", lambda x: x.T, r"must be \[40, 16\], found \[16, 40\]"),
    "c": ("down/bias", lambda x: x[:-1], r"must be \[16\], found \[15\]"),
}


@pytest.mark.parametrize("method", ["gram_schmidt", "random"])
@pytest.mark.parametrize("case", WEIGHTS)
def test_bad_weights_are_named_before_anything_is_selected(case: str, method: str) -> None:
    path, edit, message = WEIGHTS[case]
    with pytest.raises(InputError, match=f"block_01/mlp/{path} {message}"):
        prune(DENSE, changed(parameters(), f"block_01/mlp/{path}", edit), ratio=1.0, method=method)


def test_missing_weights_are_named() -> None:
    values = parameters()
    with pytest.raises(InputError, match=r"block_00/mlp/gate/kernel must be \[16, 40\], found none"):
        prune(GATED, values, ratio=1.0)


# Budgets over blocks.


def curve(counts: list[int], costs: list[float]) -> dgmr_budget.Curve:
    return dgmr_budget.Curve(np.asarray(counts), np.asarray(costs))


def test_a_total_goes_where_it_saves_most() -> None:
    curves = [curve([1, 2, 3, 4], [9.0, 3.0, 1.0, 0.0]), None, curve([1, 2, 3, 4], [4.0, 3.9, 3.8, 0.0])]
    # By hand: 6 and 2 are saved by the second and third of block 0; block 2's hull falls by 4/3 throughout.
    assert dgmr_budget.allocate(curves, 4) == (3, 0, 1)
    assert dgmr_budget.allocate(curves, 7) == (3, 0, 4)
    assert dgmr_budget.allocate(curves, 8) == (4, 0, 4)
    assert dgmr_budget.allocate(curves, 4, limits=(2, 3)) == (2, 0, 2)


def test_convex_curves_are_spent_optimally() -> None:
    """Against all allocations."""
    rng = np.random.default_rng(0)
    curves = []
    for _ in range(3):
        gains = np.sort(rng.random(6))[::-1]
        curves.append(curve(list(range(1, 7)), list(gains.sum() - np.cumsum(gains))))
    for total in range(3, 19):
        every = [a for a in np.ndindex(6, 6, 6) if sum(a) + 3 == total]
        best = min(sum(c.costs[i] for c, i in zip(curves, a, strict=True)) for a in every)
        found = dgmr_budget.allocate(curves, total)
        assert sum(found) == total
        assert sum(c.costs[k - 1] for c, k in zip(curves, found, strict=True)) == pytest.approx(best)


def test_counts_are_multiples_where_asked() -> None:
    rng = np.random.default_rng(1)
    curves = [curve(list(range(1, 41)), list(-np.sort(-rng.random(40)))) for _ in range(4)]
    for total in (32, 64, 120, 160):
        found = dgmr_budget.allocate(curves, total, multiple=8)
        assert sum(found) == total and all(k % 8 == 0 and k >= 8 for k in found)


def test_norms_of_a_full_selection_make_curves() -> None:
    values = changed(parameters(), "block_01/mlp/up/kernel", lambda x: x * (np.arange(40) < 4))
    picks = dgmr.choose(DENSE, values, dgmr.counts(DENSE, keep=40), form=FORM)
    curves = dgmr_budget.by_norms(picks)
    for found in curves:
        assert found is not None and found.counts[-1] == 40 and found.costs[-1] == pytest.approx(0.0, abs=1e-12)
        assert (np.diff(found.costs) <= 1e-12).all() and found.costs[0] < 1.0
    kept = dgmr_budget.allocate(curves, 48)
    assert sum(kept) == 48 and kept[1] == 4, kept  # four live neurons are all that block 1 needs
    spec, _ = prune(DENSE, values, keep=kept)
    assert flops.macs(spec) == flops.macs(prune(DENSE, values, ratio=1.0)[0])


def test_sensitivities_are_what_pruning_one_block_does() -> None:
    dense = DENSE.edit(blocks=DENSE.blocks[:2])
    values = changed(parameters(dense), "block_01/mlp/down/kernel", np.zeros_like)
    whole = dgmr.choose(dense, values, dgmr.counts(dense, keep=40), form=FORM)
    pictures = np.asarray(images(4))
    curves = dgmr_budget.by_features(dense, values, whole, pictures, ViT(dense).apply, grid=2, batch=2)
    first, second = curves
    assert first is not None and second is not None
    assert first.costs[-1] == 0.0 and first.counts[-1] == 40
    assert (second.costs == 0.0).all()  # its MLP does nothing
    assert whole[0] is not None
    kept = [np.asarray(whole[0].indices)[: first.counts[1]], np.arange(40)]
    spec, pruned = prune(dense, values, indices=kept)
    here, there = (
        dgmr.features(s, *jax.jit(ViT(s).apply)(p, pictures), "normed") for s, p in ((spec, pruned), (dense, values))
    )
    expected = sum(float(each.mean()) for each in dgmr.distances(here, there))
    assert first.costs[1] == pytest.approx(expected, rel=1e-4)
    assert dgmr_budget.allocate(curves, 41) == (40, 1)


BUDGETS: dict[str, tuple[Any, str]] = {
    "too few": (lambda c: dgmr_budget.allocate(c, 1), r"total of kept neurons must be in 2..8, found 1"),
    "too many": (lambda c: dgmr_budget.allocate(c, 9), r"total of kept neurons must be in 2..8, found 9"),
    "limits": (lambda c: dgmr_budget.allocate(c, 7, limits=(1, 3)), r"total of kept neurons must be in 2..6, found 7"),
    "multiple": (lambda c: dgmr_budget.allocate(c, 4, multiple=0), "multiple must be 1 or more, found 0"),
    "remainder": (lambda c: dgmr_budget.allocate(c, 5, multiple=2), "reachable in multiples of 2, found 1 over"),
    "nan": (lambda c: dgmr_budget.allocate([curve([1, 2], [np.nan, 0.0])], 1), r"curves\[0\] must hold a finite cost"),
    "order": (lambda c: dgmr_budget.allocate([curve([2, 1], [1.0, 0.0])], 1), "must ascend from 1 or more"),
}


@pytest.mark.parametrize("case", BUDGETS)
def test_budgets_that_cannot_be_met_get_one_line(case: str) -> None:
    call, message = BUDGETS[case]
    with pytest.raises(InputError, match=message):
        call([curve([1, 2, 3, 4], [4.0, 2.0, 1.0, 0.0])] * 2)


# What is compared.


def features_of(spec: ViTSpec, point: str, values: Any = None) -> tuple[dgmr.Features, Any, Any]:
    values = parameters(spec) if values is None else values
    y, aux = jax.jit(ViT(spec).apply)(values, images(2, spec))
    return dgmr.features(spec, y, aux, point), y, aux


def test_features_at_each_point() -> None:
    plain = SHALLOW.edit(registers=2, distill_token=True, pos_prefix=4)
    found, _, aux = features_of(plain, "normed")
    np.testing.assert_array_equal(found.whole, aux["features"][:, :2])
    np.testing.assert_array_equal(found.patch, aux["features"][:, 4:])
    found, _, aux = features_of(plain, "tokens")
    np.testing.assert_array_equal(found.whole, aux["tokens"].x[:, :2])
    np.testing.assert_array_equal(found.patch, aux["tokens"].x[:, 4:])
    found, y, aux = features_of(SHALLOW, "projected")
    np.testing.assert_array_equal(found.whole, y[:, None])
    np.testing.assert_array_equal(found.patch, aux["features"][:, 1:])
    mean = SHALLOW.edit(class_token=False, pos_prefix=0, pooling="mean")
    found, _, aux = features_of(mean, "normed")
    np.testing.assert_array_equal(found.whole, aux["pooled"][:, None])
    found, _, aux = features_of(mean, "tokens")
    np.testing.assert_allclose(found.whole[:, 0], aux["tokens"].x.mean(1), atol=1e-6)


def test_the_terms_are_separate_means_over_elements() -> None:
    student = dgmr.Features(
        jnp.asarray([[[1.0, 2.0]], [[0.0, 0.0]]]), jnp.asarray([[[1.0, 1.0]] * 3, [[2.0, 0.0]] * 3])
    )
    teacher = jax.tree.map(jnp.zeros_like, student)
    whole, patch = dgmr.distances(student, teacher)
    np.testing.assert_allclose(whole, [2.5, 0.0])
    np.testing.assert_allclose(patch, [1.0, 2.0])
    gradient = jax.grad(lambda t: sum(each.sum() for each in dgmr.distances(student, t)))(teacher)
    assert not any(np.any(leaf) for leaf in gradient)


@pytest.mark.parametrize(
    ("point", "pooling"), [("normed", "class"), ("normed", "mean"), ("tokens", "mean"), ("projected", "class")]
)
def test_what_the_loss_does_not_touch_has_no_gradient_and_the_rest_has(point: str, pooling: str) -> None:
    spec = SHALLOW if pooling == "class" else SHALLOW.edit(class_token=False, pos_prefix=0, pooling="mean")
    values = parameters(spec)
    known = jax.tree.map(lambda x: x + 1.0, features_of(spec, point)[0])

    def loss(values: Any) -> jax.Array:
        here = dgmr.features(spec, *ViT(spec).apply(values, images(2, spec)), point)
        return sum((each.mean() for each in dgmr.distances(here, known)), jnp.float32(0))

    gradient = flatten(jax.jit(jax.grad(loss))(values))
    still = {path.split("/")[0] for path, leaf in gradient.items() if not np.any(leaf)}
    assert still == {name for name in dgmr.untouched(spec, point) if name in values}


@pytest.mark.parametrize(
    ("spec", "point", "message"),
    [
        (SHALLOW, "logits", "point must be one of normed, tokens, projected, found 'logits'"),
        (SHALLOW.edit(norm_after=False), "normed", "needs a norm after the last block .* use 'tokens'"),
        (SHALLOW.edit(classes=0), "projected", "needs a head on a pooled vector, found classes=0, pooling='class'"),
        (SHALLOW.edit(feature_layer=0), "tokens", "the last layer is compared, expected feature_layer=None, found 0"),
    ],
)
def test_points_that_a_model_lacks_are_refused(spec: ViTSpec, point: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        dgmr.check_point(spec, point)
