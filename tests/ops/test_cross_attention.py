# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np

from vtjax.ops import cross_attention, splice

RNG = np.random.default_rng(0)
B, N, M, H, K, D = 2, 5, 7, 4, 2, 3
Q, KEYS, VALUES = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((B, N, H, D), (B, M, K, D), (B, M, K, D)))
NUMBER = np.array([[1, 1, 2, 2, 3, 3, 0], [2, 1, 1, 0, 2, 3, 3]], np.int32)
LOW = np.array([[1, 1, 1, 2, 4], [1, 2, 3, 1, 1]], np.int32)
HIGH = np.array([[0, 1, 3, 2, 4], [3, 2, 3, 0, 1]], np.int32)  # rows that see nothing: (0, 0), (0, 4), (1, 3)
RULE = {"low": jnp.asarray(LOW), "high": jnp.asarray(HIGH), "number": jnp.asarray(NUMBER)}


def obvious():
    y, lse = np.zeros((B, N, H, D)), np.full((B, N, H), -np.inf)
    for b, n, h in np.ndindex(B, N, H):
        seen = [m for m in range(M) if NUMBER[b, m] > 0 and LOW[b, n] <= NUMBER[b, m] <= HIGH[b, n]]
        if seen:
            z = np.array([Q[b, n, h] @ KEYS[b, m, h * K // H] * D**-0.5 for m in seen], np.float64)
            lse[b, n, h] = np.log(np.exp(z).sum())
            y[b, n, h] = np.exp(z - lse[b, n, h]) @ VALUES[b, seen, h * K // H]
    return y, lse


def test_attention_is_the_obvious_one_and_rows_without_images_give_zero():
    run = jax.jit(lambda k, v: cross_attention.attend(Q, k, v, **RULE))
    y, lse = run(KEYS, VALUES)
    expected, statistics = obvious()
    np.testing.assert_allclose(y, expected, atol=1e-6)
    np.testing.assert_allclose(lse, statistics, atol=1e-6)
    assert (np.asarray(y)[0, 0] == 0).all() and (np.asarray(y)[1, 3] == 0).all() and np.isneginf(lse[0, 4]).all()
    # Padding is not read, whatever it holds; scores of any size are finite.
    spoilt = (
        np.where((NUMBER > 0)[:, :, None, None], KEYS, np.nan),
        np.where((NUMBER > 0)[:, :, None, None], VALUES, np.inf),
    )
    np.testing.assert_array_equal(run(*spoilt)[0], y)
    assert np.isfinite(np.asarray(run(KEYS * 1e5, VALUES)[0])).all()


def test_gradients_are_finite_and_zero_where_nothing_is_seen():
    def loss(q, k, v):
        y, lse = cross_attention.attend(q, k, v, **RULE)
        return (y**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

    dq, dk, dv = jax.jit(jax.grad(loss, (0, 1, 2)))(Q, KEYS, VALUES)
    assert all(np.isfinite(np.asarray(g)).all() for g in (dq, dk, dv))
    assert (np.asarray(dq)[0, 0] == 0).all() and (np.asarray(dk)[0, 6] == 0).all() and (np.asarray(dv)[1, 3] == 0).all()
    assert np.abs(dq[0, 1]).min() > 0


def test_which_images_a_row_sees():
    at = jnp.asarray([[0, 1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0], [0] * 7]).astype(bool)

    def told(sees):
        low, high = cross_attention.interval(at, sees)
        return [
            [list(range(a, b + 1)) for a, b in zip(*row, strict=True)]
            for row in zip(low.tolist(), high.tolist(), strict=True)
        ]

    assert told("before")[0] == [[], [1], [1, 2], [1, 2], [1, 2], [1, 2, 3], [1, 2, 3]]
    assert told("latest")[0] == [[], [1], [2], [2], [2], [3], [3]]
    assert told("run")[0] == [[], [1], [1, 2], [1, 2], [1, 2], [3], [3]]
    assert told("all")[0] == [[1, 2, 3]] * 7
    for sees in ("all", "before", "latest", "run"):
        assert told(sees)[1] == [[1]] * 7 and told(sees)[2] == [[]] * 7


def test_visual_tokens_take_the_place_of_placeholders():
    x, visual = jnp.zeros((2, 5, 1)), jnp.arange(1.0, 9.0).reshape(2, 4, 1)
    at = jnp.array([[0, 1, 1, 0, 1], [0, 0, 0, 1, 0]], bool)
    np.testing.assert_array_equal(splice.splice(x, at, visual)[..., 0], [[0, 1, 2, 0, 3], [0, 0, 0, 5, 0]])
    assert splice.places(at, 3).tolist() == [[1, 2, 4], [3, 0, 0]]


def test_gradients_in_turn_are_the_gradients() -> None:
    """Layers that read the same visual tokens and hand them on."""
    x, y = jnp.arange(4.0), jnp.linspace(1.0, 2.0, 4)

    def loss(x: jax.Array, y: jax.Array, turns: bool) -> jax.Array:
        for number in range(3):
            x, y = cross_attention.in_turn(x, y) if turns else (x, y)
            x = jnp.sin(x * y + number)
        return x.sum()

    plain, turned = (jax.jit(jax.value_and_grad(lambda x, y, t=t: loss(x, y, t), (0, 1)))(x, y) for t in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), plain, turned)
