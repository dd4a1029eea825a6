# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtjax.ops import cross_attention, packing
from vtjax.ops import decoder_attention as ops
from vtjax.ops.partial_softmax import Part, merge

RNG = np.random.default_rng(0)


def arrays(n, heads, kv_heads, d=8, b=2):
    return [RNG.standard_normal((b, n, h, d)).astype(np.float32) for h in (heads, kv_heads, kv_heads)]


def obvious(q, k, v, alive):
    """One row at a time, over the slots that it sees."""
    y = np.zeros_like(q)
    for b, i, h in np.ndindex(*q.shape[:3]):
        kv = h * k.shape[2] // q.shape[2]
        seen = [j for j in range(i + 1) if alive[b, j] or j == i]
        s = k[b, seen, kv] @ q[b, i, h] / np.sqrt(q.shape[-1])
        w = np.exp(s - s.max())
        y[b, i, h] = (w / w.sum()) @ v[b, seen, kv]
    return y


@pytest.mark.parametrize("heads,kv_heads,implementation", [(6, 2, "square"), (6, 2, "blocks"), (2, 2, "auto")])
def test_against_the_obvious_version(heads, kv_heads, implementation, monkeypatch):
    monkeypatch.setattr(ops, "BLOCK", 3)
    q, k, v = arrays(7, heads, kv_heads)
    alive = np.array([[1] * 7, [0, 0, 1, 1, 0, 1, 0]], np.float32)
    call = jax.jit(lambda *a: ops.causal(*a[:3], alive=a[3], implementation=implementation))
    np.testing.assert_allclose(call(q, k, v, alive), obvious(q, k, v, alive), atol=2e-6)
    plain = jax.jit(lambda *a: ops.causal(*a, implementation=implementation))(q, k, v)
    np.testing.assert_allclose(plain[0], call(q, k, v, alive)[0], atol=2e-6)


def test_blocks_leave_out_the_upper_triangle(monkeypatch):
    monkeypatch.setattr(ops, "BLOCK", 4)
    q, k, v = map(jnp.asarray, arrays(12, 2, 1))
    text = str(jax.make_jaxpr(lambda *a: ops.causal(*a, implementation="blocks"))(q, k, v))
    assert all(f"f32[2,1,2,4,{m}]" in text for m in (4, 8, 12)) and "f32[2,1,2,12,12]" not in text


def test_gradients_are_those_of_the_square(monkeypatch):
    monkeypatch.setattr(ops, "BLOCK", 4)
    q, k, v = map(jnp.asarray, arrays(10, 4, 2))
    alive = jnp.asarray([[1.0] * 10, [0.0] * 3 + [1.0] * 7])

    def value(implementation):
        def f(*a):
            return jnp.square(ops.causal(*a, alive=alive, implementation=implementation)).sum()

        return jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v)

    for a, b in zip(value("square"), value("blocks"), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_cached_token_is_the_last_row():
    q, k, v = map(jnp.asarray, arrays(6, 6, 2))
    alive = jnp.asarray([[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 1]])
    whole = ops.causal(q, k, v, alive=alive.astype(jnp.float32))
    pad = ((0, 0), (0, 0), (0, 3), (0, 0))
    cache = [jnp.pad(a.swapaxes(1, 2), pad, constant_values=50.0) for a in (k, v)]
    y = ops.cached(q[:, -1:], *cache, jnp.pad(alive > 0, ((0, 0), (0, 3))))
    np.testing.assert_allclose(y, whole[:, -1:], atol=2e-6)


def test_weights_are_what_causal_attention_takes_of_each_slot():
    q, k, v = arrays(7, 6, 2)
    alive = jnp.array([[1.0] * 7, [0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0]])
    kinds = {"alive": alive, "segment": jnp.array([[0, 0, 1, 1, 2, 2, 2]] * 2)}
    weight = jax.jit(lambda q, k: ops.weights(q, k, **kinds))(q, k)
    np.testing.assert_allclose(weight.sum(-1), 1.0, atol=1e-6)
    assert (np.asarray(weight)[:, :, 4:, 2:4] == 0).all(), "a question sees another one"
    whole = np.einsum("bhnm,bmhd->bnhd", weight, np.repeat(v, 3, axis=2))
    np.testing.assert_allclose(whole, jax.jit(lambda *a: ops.causal(*a, **kinds))(q, k, v), atol=2e-6)


def test_half_precision_keeps_float32_statistics():
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in arrays(40, 2, 1, b=1))
    y = ops.causal(q, k, v)
    assert y.dtype == jnp.bfloat16
    exact = ops.causal(*(a.astype(jnp.float32) for a in (q, k, v)))
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.03)


def test_an_unknown_implementation_is_named():
    q, k, v = map(jnp.asarray, arrays(2, 1, 1))
    with pytest.raises(ValueError, match="must be one of auto, square, blocks, found 'flash'"):
        ops.causal(q, k, v, implementation="flash")


def test_packed_texts_see_what_the_packing_mask_says():
    q, k, _ = arrays(8, 6, 2)
    segment = np.array([[0, 0, 1, 1, 2, 2, 2, -1], [0, 1, 1, 1, 2, 3, -1, -1]])
    seen = np.asarray(jax.jit(lambda q, k: ops.weights(q, k, segment=jnp.asarray(segment)))(q, k) > 0)
    expected = np.asarray(packing.attention_mask(jnp.asarray(segment)))
    for row, part in enumerate(segment):
        assert (seen[row][:, part >= 0] == expected[row, part >= 0]).all(), row


def test_text_and_images_under_one_softmax():
    """The fused form of hyper-attention: two parts, merged by their log-sum-exps, are attention to all keys."""
    rng = np.random.default_rng(0)
    q, k, v, ik, iv = (
        jnp.asarray(rng.normal(size=(2, n, heads, 8)), jnp.float32)
        for n, heads in ((7, 4), (7, 2), (7, 2), (5, 2), (5, 2))
    )
    number = jnp.asarray(rng.integers(0, 3, (2, 5)), jnp.int32)
    low, high = jnp.ones((2, 7), jnp.int32), jnp.asarray(rng.integers(0, 3, (2, 7)), jnp.int32)
    text = Part(*ops.causal(q, k, v, return_lse=True))
    found = merge(text, Part(*cross_attention.attend(q, ik, iv, low=low, high=high, number=number))).o
    keys, values = (jnp.repeat(jnp.concatenate(pair, 1), 2, axis=2) for pair in ((ik, k), (iv, v)))
    image = number[:, None]
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((7, 7), bool)), (2, 7, 7))
    seen = jnp.concatenate([(image > 0) & (image <= high[:, :, None]), causal], -1)
    scores = jnp.where(seen[:, None], jnp.einsum("bnhd,bmhd->bhnm", q, keys) * 8**-0.5, -jnp.inf)
    np.testing.assert_allclose(found, jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores), values), atol=1e-6)
