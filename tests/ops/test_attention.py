# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtjax.ops import attention as op

B, N, M, H, D = 2, 7, 9, 3, 8


@pytest.fixture
def qkv():
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(k, (B, n, H, D)) for k, n in zip(keys, (N, M, M), strict=True))


def oracle(q, k, v, size=None, alive=None):
    """Loops in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    b, n, h, d = q.shape
    m = k.shape[1]
    size = np.ones((b, m)) if size is None else np.asarray(size, np.float64)
    alive = np.ones((b, m)) if alive is None else np.asarray(alive)
    y, lse, share = np.zeros((b, n, h, d)), np.full((b, n, h), -np.inf), np.zeros((b, h, n, m))
    for i in range(b):
        live = alive[i] > 0.5
        for j in range(h):
            for r in range(n):
                if live.any():
                    e = np.exp(k[i, :, j] @ q[i, r, j] / np.sqrt(d)) * size[i] * live
                    share[i, j, r] = e / e.sum()
                    lse[i, r, j] = np.log(e.sum())
                    y[i, r, j] = share[i, j, r] @ v[i, :, j]
    if n == m:
        rows = alive[:, None, :, None] > 0.5
        importance = (share * rows).sum((1, 2)) / h / np.maximum((alive > 0.5).sum(-1, keepdims=True), 1)
    else:
        importance = share.mean((1, 2))
    return y, lse, importance


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("square", [False, True])
def test_reference_and_second_pass_equal_the_loops(qkv, masked, square):
    q, k, v = qkv
    q = k * 0.7 + 0.1 if square else q
    rng = np.random.default_rng(1)
    size = jnp.asarray(rng.integers(1, 5, (B, M)), jnp.float32) if masked else None
    alive = jnp.asarray(rng.random((B, M)) > 0.4, jnp.float32) if masked else None
    if masked:
        alive = alive.at[1].set(0.0)
    y, aux = op.attention(q, k, v, size=size, alive=alive, want=("importance", "lse"))
    want = oracle(q, k, v, size, alive)
    for got, expected in zip((y, aux["lse"], aux["importance"]), want, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-6)
    for block in (3, 256):
        importance, lse = op.statistics(q, k, size=size, alive=alive, block=block)
        np.testing.assert_allclose(lse, want[1], atol=2e-6)
        np.testing.assert_allclose(importance, want[2], atol=2e-6)


@pytest.mark.parametrize("dtype,atol", [(jnp.float32, 1e-5), (jnp.bfloat16, 0.06)])
def test_the_dense_path_has_the_value_and_gradients_of_the_general_one(qkv, dtype, atol):
    q, k, v = (a.astype(dtype) for a in qkv)
    target = jax.random.normal(jax.random.key(9), (B, N, H, D))

    def value(size, q, k, v):
        y, _ = op.attention(q, k, v, size=size)
        assert y.dtype == dtype
        return (y.astype(jnp.float32) * target).sum(), y

    dense = jax.grad(value, (1, 2, 3), has_aux=True)(None, q, k, v)
    general = jax.grad(value, (1, 2, 3), has_aux=True)(jnp.ones((B, M)), q, k, v)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=atol), dense, general
    )


def test_a_token_of_size_k_equals_k_tokens(qkv):
    q, k, v = qkv
    repeats = np.array([1, 3, 1, 1, 2, 1, 1, 4, 1])
    size = jnp.broadcast_to(jnp.asarray(repeats, jnp.float32), (B, M))
    y, _ = op.attention(q, k, v, size=size)
    again, _ = op.attention(q, jnp.repeat(k, repeats, axis=1), jnp.repeat(v, repeats, axis=1))
    np.testing.assert_allclose(y, again, atol=2e-6)


def test_dead_keys_do_not_matter_however_large(qkv):
    q, k, v = qkv
    alive = jnp.ones((B, M)).at[:, 4:].set(0.0)
    y, _ = op.attention(q, k, v, alive=alive)
    short, _ = op.attention(q, k[:, :4], v[:, :4])
    np.testing.assert_allclose(y, short, atol=1e-6)
    huge = k.at[:, 4:].multiply(1e4)
    y, _ = op.attention(q, huge, v, alive=alive)
    np.testing.assert_allclose(y, short, atol=1e-6)
    grad = jax.grad(lambda a: op.attention(q, huge, v, alive=a)[0].sum())(alive)
    assert np.isfinite(grad).all()


def test_filling_is_read_by_live_queries_only(qkv):
    """Against a mask that is written out; nothing of it in the gradients."""
    q, k, v = (a[:, :N] for a in qkv)
    alive = jnp.ones((B, N)).at[0, 4:].set(0).at[1, 2].set(0)
    read = (alive[:, :, None] + alive[:, None]) > 0

    def masked(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=read[:, None])

    def both(function):
        return jax.jit(jax.value_and_grad(lambda *a: (function(*a) ** 2).sum(), (0, 1, 2)))(q, k, v)

    found = both(lambda q, k, v: op.filled(q, k, v, alive=alive)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, both(masked))


def test_alive_carries_the_gradient_of_the_masked_softmax(qkv):
    q, k, v = (a.astype(jnp.float32) for a in qkv)
    alive = jnp.ones((B, M)).at[0, 2].set(0.0)
    target = jax.random.normal(jax.random.key(5), (B, N, H, D))

    def value(a):
        return (op.attention(q, k, v, alive=a)[0] * target).sum()

    grad = jax.grad(value)(alive)
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(D)
    e = np.exp(scores)
    total = (e * np.asarray(alive)[:, None, None]).sum(-1, keepdims=True)
    y = np.einsum("bhnm,bmhd->bnhd", e * np.asarray(alive)[:, None, None] / total, v)
    centred = np.asarray(v)[:, None] - y[:, :, None]  # B N M H D
    expected = np.einsum("bhnm,bnmhd,bnhd->bm", e / total, centred, target)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-4)
    assert abs(grad[0, 2]) > 1e-3  # a dead key is heard too: it may come back


def test_splash_kernel_in_interpret_mode_equals_the_reference():
    keys = jax.random.split(jax.random.key(2), 3)
    q, k, v = (jax.random.normal(a, (1, n, 2, 16)) for a, n in zip(keys, (130, 150, 150), strict=True))
    size = jnp.ones((1, 150)).at[:, 3].set(5.0)
    alive = jnp.ones((1, 150)).at[:, 100:].set(0.0)
    y = op._splash(q, k, v, size, alive, 0.25, interpret=True)
    expected, _ = op.attention(q, k, v, size=size, alive=alive, scale=0.25, implementation="xla")
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_bfloat16_keeps_float32_statistics(qkv):
    q, k, v = (a.astype(jnp.bfloat16) for a in qkv)
    y, aux = op.attention(q, k, v, want=("importance", "lse"))
    assert y.dtype == jnp.bfloat16
    assert aux["importance"].dtype == aux["lse"].dtype == jnp.float32
    np.testing.assert_allclose(aux["importance"].sum(-1), 1.0, atol=1e-5)


def test_auto_asks_cudnn_only_for_what_it_can():
    """cuDNN refuses other shapes while tracing, which must not be the end of a model that asked for "auto"."""

    def takes(tokens, width, dtype=jnp.bfloat16):
        x = jnp.zeros((1, tokens, 2, width), dtype)
        return op._cudnn_takes(x, x)

    assert takes(196, 64) and takes(196, 72, jnp.float16)
    assert not takes(197, 64)
    assert not takes(196, 60) and not takes(196, 136) and not takes(196, 64, jnp.float32)


@pytest.mark.parametrize("bad", [{"implementation": "flash"}, {"want": ("scores",)}])
def test_unknown_choices_are_named(qkv, bad):
    with pytest.raises(ValueError, match="flash|scores"):
        op.attention(*qkv, **bad)
