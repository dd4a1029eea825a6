# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import toy
from vtjax.errors import InputError
from vtjax.parallel import mesh as mesh_lib
from vtjax.train.program import Program
from vtjax.train.state import flatten, merge, params_sha256, prune, split


def build(config: Any, **kwargs: Any) -> Program:
    return Program(toy.task(config, **kwargs), config, mesh_lib.make(config.mesh))


def run(program: Program, config: Any, steps: int, poison: int = -1) -> tuple[Any, list[Any]]:
    state, frozen = program.init()
    seen = []
    batches = toy.Data(config, poison=poison).train(0)
    for step in range(steps):
        batch = mesh_lib.place(next(batches), program.mesh)
        state, metrics = program.step(state, frozen, program.knobs(), batch, program.key, np.int32(step))
        seen.append(metrics)
    return state, seen


def same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_the_step_donates_its_state_and_nothing_else() -> None:
    config = toy.config()
    program = build(config, teacher=True)
    state, frozen = program.init()
    batch = mesh_lib.place(next(toy.Data(config).train(0)), program.mesh)
    program.step(state, frozen, program.knobs(), batch, program.key, np.int32(0))
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt, state.step)))
    assert not any(x.is_deleted() for x in jax.tree.leaves((frozen, batch, program.key)))


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_step_that_is_not_finite_changes_nothing_and_neither_does_the_next(ema: float) -> None:
    config = toy.config(ema=ema)
    program = build(config)
    good, _ = run(program, config, 3)
    kept = jax.device_get(good)
    state, metrics = run(program, config, 5, poison=3)
    assert [bool(m["finite"]) for m in metrics[:4]] == [True, True, True, False]
    same(state, kept)
    assert int(state.step) == 3 and np.isnan(metrics[3]["loss"])


def test_a_gradient_that_is_not_finite_is_masked_though_the_loss_is() -> None:
    config = toy.config()
    task = toy.task(config)

    def loss(params: Any, *rest: Any) -> Any:
        return jnp.sqrt(jnp.abs(params["head"]["bias"]).sum()), {}  # 0 at the start, with an infinite slope

    program = Program(toy.task(config, loss=loss), config, mesh_lib.make(config.mesh))
    before = jax.device_get(program.init()[0])
    state, metrics = run(program, config, 1)
    assert float(metrics[0]["loss"]) == 0.0 and not bool(metrics[0]["finite"])
    same(state, before)
    assert task.spec == toy.SPEC


def test_accumulation_equals_the_big_batch() -> None:
    big, small = toy.config(), toy.config(accumulate=4)
    one, first = run(build(big, noise=0.0), big, 4)
    four, second = run(build(small, noise=0.0), small, 4)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)
        np.testing.assert_allclose(a["top1"], b["top1"], rtol=1e-6)
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(four.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_untrained_parameters_have_no_optimiser_state_and_keep_their_bits() -> None:
    config = toy.config(optim__groups={"body": {"pattern": "^block_00", "frozen": True}}, ema=0.5)
    program = build(config)
    before = jax.device_get(program.init()[0])
    state, _ = run(program, config, 3)
    same(before.params["block_00"], state.params["block_00"])
    assert (before.params["head"]["kernel"] != np.asarray(state.params["head"]["kernel"])).all()
    for path in flatten((state.opt, state.ema)):
        assert "block_00" not in path
    assert set(state.ema) == {"head"}
    assert set(program.averaged(state)) == {"block_00", "head"}


def test_nothing_trained_is_a_legal_task() -> None:
    config = toy.config(optim__groups={"all": {"pattern": "", "frozen": True}})
    program = build(config)
    before = jax.device_get(program.init()[0])
    state, metrics = run(program, config, 2)
    same(before.params, state.params)
    assert int(state.step) == 2 and bool(metrics[-1]["finite"])


def test_ema_against_numpy() -> None:
    config = toy.config(ema=0.8)
    program = build(config)
    state, frozen = program.init()
    average = {path: np.asarray(x, np.float64) for path, x in flatten(state.params).items()}
    batches = toy.Data(config).train(0)
    for step in range(4):
        batch = mesh_lib.place(next(batches), program.mesh)
        state, _ = program.step(state, frozen, program.knobs(), batch, program.key, np.int32(step))
        for path, x in flatten(state.params).items():
            average[path] = 0.8 * average[path] + 0.2 * np.asarray(x)
    for path, x in flatten(program.averaged(state)).items():
        np.testing.assert_allclose(x, average[path], rtol=1e-5, atol=1e-7)


def test_other_knobs_and_steps_compile_nothing_new() -> None:
    config = toy.config()
    program = build(config, noise=0.0, knobs={"temperature": 1.0})
    state, frozen = program.init()
    batch = mesh_lib.place(next(toy.Data(config).train(0)), program.mesh)
    losses = []
    for step, value in enumerate((1.0, 0.5, 2.0)):
        knobs = {"temperature": jax.device_put(np.float32(value), mesh_lib.replicated(program.mesh))}
        state, metrics = program.step(state, frozen, knobs, batch, program.key, np.int32(step))
        losses.append(float(metrics["loss"]))
    assert program.step._cache_size() == 1
    assert len(set(losses)) == 3
    assert program.knobs()["temperature"].dtype == jnp.float32


def test_evaluation_counts_every_valid_example_once() -> None:
    values = []
    for batch_size in (8, 7, 21):
        config = toy.config(batch_size=batch_size)
        program = build(config)
        state, frozen = program.init()
        big = toy.Data(toy.config(batch_size=21)).batch(1, 0)

        def batches(size: int, big: Any = big) -> Any:
            for start in range(0, 21, size):
                rows = np.arange(start, start + size)
                batch = {name: value[np.minimum(rows, 20)] for name, value in big.items()}
                yield {**batch, "valid": rows < 21}

        values.append(program.evaluate(state.params, frozen, state.extra, batches(batch_size)))
    assert [v["count"] for v in values] == [21, 21, 21]
    assert values[0]["top1"] == values[1]["top1"] == values[2]["top1"]
    assert values[0]["loss"] == pytest.approx(values[2]["loss"], rel=1e-6)


def test_an_empty_evaluation_is_refused() -> None:
    config = toy.config()
    program = build(config)
    state, frozen = program.init()
    empty = {**toy.Data(config).batch(1, 0), "valid": np.zeros(8, bool)}
    with pytest.raises(InputError, match="saw no valid examples"):
        program.evaluate(state.params, frozen, state.extra, [empty])


def test_loaded_weights_are_placed_and_become_float32_masters() -> None:
    config = toy.config(optim__groups={"body": {"pattern": "^block_00", "frozen": True}})
    plain = toy.task(config)
    params = jax.device_get(plain.init(jax.random.key(5))[0])
    loaded = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), params)

    def init(key: jax.Array) -> Any:
        fresh, frozen, extra = plain.init(key)
        return (
            {**fresh, "block_00": loaded["block_00"], "head": {**fresh["head"], "kernel": loaded["head"]["kernel"]}},
            frozen,
            extra,
        )

    program = Program(toy.task(config, init=init), config, mesh_lib.make(config.mesh))
    state, _ = program.init()
    assert state.params["head"]["kernel"].dtype == jnp.float32
    assert state.params["block_00"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16  # untrained: as it came
    np.testing.assert_array_equal(state.params["head"]["kernel"], loaded["head"]["kernel"].astype(np.float32))
    assert set(state.params["head"]) == {"kernel", "bias"}


def test_params_that_do_not_fit_are_named() -> None:
    program = build(toy.config())
    params = jax.device_get(program.init()[0].params)
    with pytest.raises(InputError, match=r"parameter 'head/kernel' is \(2, 3\), expected \(8, 3\)"):
        program.place_params({**params, "head": {**params["head"], "kernel": np.zeros((2, 3))}})
    with pytest.raises(InputError, match="parameter 'tail' is .4,., expected absent"):
        program.place_params({**params, "tail": np.zeros(4)})


def test_bad_ema_is_refused() -> None:
    with pytest.raises(InputError, match=r"ema must be in \[0, 1\), 0 = off, found 1.0"):
        build(toy.config(ema=1.0))


def test_split_and_merge_are_inverse() -> None:
    tree = {"a": {"b": 1, "c": 2}, "d": 3}
    groups = {"a/b": "x", "a/c": None, "d": None}
    assert split(tree, groups) == ({"a": {"b": 1}}, {"a": {"c": 2}, "d": 3})
    assert merge(*split(tree, groups)) == tree
    assert prune({"a": {"b": {}}, "c": 1, "d": {}}) == {"c": 1}


def test_params_sha256_sees_names_shapes_dtypes_and_bytes() -> None:
    base = {"b": {"x": np.arange(4, dtype=np.float32)}, "a": np.float32(1)}
    same_tree = {"a": jnp.float32(1), "b": {"x": jnp.arange(4, dtype=jnp.float32)}}
    assert params_sha256(base) == params_sha256(same_tree)
    others = [
        {**base, "b": {"y": base["b"]["x"]}},
        {**base, "b": {"x": base["b"]["x"].reshape(2, 2)}},
        {**base, "b": {"x": base["b"]["x"].view(np.int32)}},
        {**base, "b": {"x": np.nextafter(base["b"]["x"], 9)}},
    ]
    assert len({params_sha256(tree) for tree in [base, *others]}) == 5
