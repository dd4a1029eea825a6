# SPDX-License-Identifier: Apache-2.0
"""8-bit weights: the error bound, exactness where there is nothing to round, sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtjax.ops import quantize as ops


def kernel(seed: int = 0, shape: tuple[int, int] = (24, 10)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.float32(rng.normal(size=shape) * np.exp(rng.normal(size=shape[1])))


def test_no_weight_is_off_by_more_than_half_a_step() -> None:
    w = kernel()
    found = ops.quantize(jnp.asarray(w))
    assert found.values.dtype == jnp.int8 and found.values.shape == w.shape and found.scales.shape == (10,)
    np.testing.assert_allclose(found.scales, np.abs(w).max(0) / 127, rtol=1e-6)
    error = np.abs(np.asarray(ops.dequantize(found)) - w)
    assert (error <= np.asarray(found.scales) * (0.5 + 1e-4)).all() and error.max() > 0
    expected = np.clip(np.rint(w / np.asarray(found.scales)), -127, 127)
    np.testing.assert_array_equal(found.values, expected)


def test_the_product_is_off_by_at_most_the_bound() -> None:
    """|x w - x w'| <= s / 2 times the sum of |x|, channel by channel."""
    w, x = kernel(1), np.float32(np.random.default_rng(2).normal(size=(7, 24)))
    found = ops.quantize(jnp.asarray(w))
    error = np.abs(x.astype(np.float64) @ (np.asarray(ops.dequantize(found), np.float64) - w))
    assert (error <= np.abs(x).sum(1)[:, None] * np.asarray(found.scales) / 2 * 1.001).all()


def test_what_is_on_the_grid_is_kept_exactly() -> None:
    values = np.random.default_rng(0).integers(-127, 128, (16, 4)).astype(np.float32)
    values[0] = 127
    found = ops.quantize(jnp.asarray(values * np.float32(0.25)))
    np.testing.assert_array_equal(found.values, values)
    np.testing.assert_array_equal(ops.dequantize(found), values * np.float32(0.25))
    again = ops.quantize(ops.dequantize(found))
    np.testing.assert_array_equal(again.values, found.values)


def test_signs_and_scales_commute_with_it() -> None:
    w = kernel()
    found = ops.quantize(jnp.asarray(w))
    np.testing.assert_array_equal(ops.quantize(jnp.asarray(-w)).values, -found.values)
    np.testing.assert_array_equal(ops.quantize(jnp.asarray(w * 4)).values, found.values)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_empty_tiny_and_huge_channels(scale: float) -> None:
    w = kernel()
    w[:, 3] *= np.float32(scale)
    found = ops.dequantize(ops.quantize(jnp.asarray(w)))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:, 3], w[:, 3], atol=np.abs(w[:, 3]).max() / 254 * 1.001)


def test_what_is_not_finite_stays_so() -> None:
    w = kernel()
    w[2, 5] = np.nan
    found = np.asarray(ops.dequantize(ops.quantize(jnp.asarray(w))))
    assert not np.isfinite(found[:, 5]).any() and np.isfinite(np.delete(found, 5, 1)).all()


def test_a_tree_keeps_all_but_its_kernels() -> None:
    tree = {"mlp": {"up": {"kernel": kernel(), "bias": np.ones(10, np.float32)}}, "pos": kernel(3)}
    small = ops.quantize_kernels(tree)
    assert isinstance(small["mlp"]["up"]["kernel"], ops.Quantized) and small["pos"] is tree["pos"]
    assert ops.size_bytes(tree) == 4 * (240 + 10 + 240) and ops.size_bytes(small) == 240 + 4 * 10 + 4 * (10 + 240)
    back = jax.jit(ops.dequantize_kernels)(small)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    np.testing.assert_array_equal(back["mlp"]["up"]["bias"], tree["mlp"]["up"]["bias"])
    np.testing.assert_allclose(back["mlp"]["up"]["kernel"], kernel(), atol=np.abs(kernel()).max() / 254 * 1.001)
