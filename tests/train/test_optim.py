# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train import toy
from vtjax.errors import InputError
from vtjax.parallel import mesh as mesh_lib
from vtjax.train import optim
from vtjax.train.state import flatten

PARAMS = {
    "block_00": {"mlp": {"up": {"kernel": np.array([[1.0, -2.0]], np.float32), "bias": np.array([0.5], np.float32)}}},
    "head": {"kernel": np.array([[3.0], [4.0]], np.float32)},
}


def settings(**leaves: Any) -> Any:
    return toy.config(**{f"optim__{name}": value for name, value in leaves.items()}).optim


def descend(config: Any, steps: int, grads: list[Any]) -> Any:
    optimiser, _ = optim.make(config, steps, PARAMS, optim.group_of(config))
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optimiser.init(params)
    update = jax.jit(optimiser.update)
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params


def gradients(n: int) -> list[Any]:
    rng = np.random.default_rng(0)
    return [jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), PARAMS) for _ in range(n)]


def test_cosine_schedule_with_warm_up() -> None:
    rate = optim.schedule(settings(lr=0.4, warmup=4, end_lr=0.1), 20)
    for step in range(21):
        cosine = 0.1 + (0.4 - 0.1) * 0.5 * (1 + math.cos(math.pi * (step - 4) / 16))
        expected = 0.4 * step / 4 if step < 4 else cosine
        assert float(rate(step)) == pytest.approx(expected, rel=1e-6), step


def test_linear_schedule_with_warm_up() -> None:
    rate = optim.schedule(settings(lr=0.4, warmup=2, end_lr=0.0, schedule="linear"), 10)
    assert [float(rate(s)) for s in (0, 1, 2, 6, 10)] == pytest.approx([0.0, 0.2, 0.4, 0.2, 0.0])


def test_constant_schedule_with_warm_up() -> None:
    rate = optim.schedule(settings(lr=0.4, warmup=2, schedule="constant"), 10)
    assert [float(rate(s)) for s in (0, 1, 2, 9)] == pytest.approx([0.0, 0.2, 0.4, 0.4])


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ({"schedule": "step"}, "config.optim.schedule must be one of cosine, linear, constant, found 'step'"),
        ({"warmup": 10}, "config.optim.warmup must be in 0..9 (config.steps=10), found 10"),
        ({"warmup": -1}, "config.optim.warmup must be in 0..9 (config.steps=10), found -1"),
        ({"name": "lion"}, "config.optim.name must be one of adamw, sgd, adafactor, found 'lion'"),
        ({"lr": -0.1}, "config.optim.lr must be 0 or more, found -0.1"),
        ({"groups": {"g": {"pattern": "tail"}}}, "config.optim.groups.g.pattern 'tail' matches no parameter"),
    ],
)
def test_bad_settings_say_so_in_one_line(leaves: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        optim.make(settings(**leaves), 10, PARAMS, lambda path: "default")
    assert str(caught.value) == message


def test_a_pattern_that_is_no_regex_is_named() -> None:
    with pytest.raises(InputError, match=r"optim.groups.g.pattern '\(' is not a regex"):
        optim.group_of(settings(groups={"g": {"pattern": "("}}))


def test_groups_in_alphabetical_order_first_match_counts() -> None:
    groups = {"b": {"pattern": "kernel"}, "a": {"pattern": "^head", "frozen": True}}
    of = optim.group_of(settings(groups=groups))
    assert of("head/kernel") is None
    assert of("block_00/mlp/up/kernel") == "b"
    assert of("block_00/mlp/up/bias") == "default"


def test_adamw_with_groups_against_numpy() -> None:
    groups = {
        "head": {"pattern": "^head/", "lr_scale": 0.1, "weight_decay": 0.5},
        "rest": {"pattern": "bias", "lr_scale": 2.0, "weight_decay": -1.0},
    }
    config = settings(lr=0.01, weight_decay=0.2, clip=1.0, groups=groups, warmup=2)
    grads = gradients(5)
    got = descend(config, 8, grads)

    scale = {"head/kernel": 0.1, "block_00/mlp/up/bias": 2.0, "block_00/mlp/up/kernel": 1.0}
    decay = {"head/kernel": 0.5, "block_00/mlp/up/bias": 0.0, "block_00/mlp/up/kernel": 0.2}
    params = {k: v.astype(np.float64) for k, v in flatten(PARAMS).items()}
    m, v = ({k: np.zeros_like(x) for k, x in params.items()} for _ in range(2))
    for t, grad in enumerate(grads):
        flat = {k: g.astype(np.float64) for k, g in flatten(grad).items()}
        norm = math.sqrt(sum((g**2).sum() for g in flat.values()))
        rate = 0.01 * t / 2 if t < 2 else 0.01 * 0.5 * (1 + math.cos(math.pi * (t - 2) / 6))
        for k, g in flat.items():
            g = g * min(1.0, 1.0 / norm)
            m[k] = 0.9 * m[k] + 0.1 * g
            v[k] = 0.999 * v[k] + 0.001 * g**2
            step = m[k] / (1 - 0.9 ** (t + 1)) / (np.sqrt(v[k] / (1 - 0.999 ** (t + 1))) + 1e-8)
            params[k] = params[k] - rate * scale[k] * (step + decay[k] * params[k])
    for k, x in flatten(got).items():
        np.testing.assert_allclose(x, params[k], rtol=2e-6)


def test_sgd_with_momentum_against_numpy() -> None:
    config = settings(name="sgd", lr=0.1, momentum=0.8, weight_decay=0.0, schedule="constant")
    grads = gradients(3)
    trace = {k: 0.0 * v for k, v in flatten(PARAMS).items()}
    params = dict(flatten(PARAMS))
    for grad in grads:
        for k, g in flatten(grad).items():
            trace[k] = g + 0.8 * trace[k]
            params[k] = params[k] - 0.1 * trace[k]
    for k, x in flatten(descend(config, 3, grads)).items():
        np.testing.assert_allclose(x, params[k], rtol=1e-6)


def test_adafactor_descends() -> None:
    config = settings(name="adafactor", lr=0.1, weight_decay=0.0, schedule="constant")
    after = descend(config, 5, [PARAMS] * 5)  # the gradient of half the squared norm, at the start
    assert float(optax.tree.norm(after)) < float(optax.tree.norm(PARAMS))


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_the_mean_and_see_every_row_once(parts: int) -> None:
    batch = {"x": jnp.arange(8.0)}

    def grad(rows: Any, key: jax.Array) -> Any:
        return {"mean": rows["x"].mean(), "squares": (rows["x"] ** 2).mean()}

    got = jax.jit(lambda b: optim.accumulate(grad, b, jax.random.key(0), parts))(batch)
    assert float(got["mean"]) == 3.5 and float(got["squares"]) == 17.5


def test_micro_batches_have_their_own_keys() -> None:
    def draw(rows: Any, key: jax.Array) -> jax.Array:
        return jax.random.normal(key)

    key = jax.random.key(3)
    expected = np.mean([jax.random.normal(jax.random.fold_in(key, i)) for i in range(2)])
    got = optim.accumulate(draw, {"x": jnp.zeros(4)}, key, 2)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_batches_that_do_not_divide_are_refused() -> None:
    mesh = mesh_lib.make({"data": -1})
    optim.check_batch(8, 4, mesh)
    with pytest.raises(
        InputError, match=r"batch_size must be a multiple of accumulate x \(data x fsdp\) = 3 x 1, found 8"
    ):
        optim.check_batch(8, 3, mesh)
