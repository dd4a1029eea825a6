# SPDX-License-Identifier: Apache-2.0
"""The kernels of `partial_softmax`, interpreted on a CPU, against its chunked form; compiled for TPUs and lowered for
GPUs that are not there."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from tests import devices
from vtjax.ops import cross_attention, partial_softmax, partial_softmax_gpu, partial_softmax_tiles, partial_softmax_tpu
from vtjax.ops.partial_softmax_gpu import Shape
from vtjax.parallel import kernels

D = 8
SEES = ("all", "before", "latest", "run", "documents", "nothing", "scattered")


def masks(rng: np.random.Generator, rows: int, keys: int) -> dict[str, jax.Array]:
    """One entry of the batch for each kind of mask: rows before the first image, padding and text rows that see nothing
    are among them."""
    at = rng.random((1, rows)) < 0.4
    at[:, 0] = False
    found = jax.jit(lambda at: [cross_attention.interval(at, sees) for sees in SEES[:4]])(at)
    documents, low = np.sort(rng.integers(1, 4, (1, rows))), rng.integers(-1, 4, (1, rows))
    found += [
        (documents, documents),
        (np.ones_like(low), np.zeros_like(low)),
        (low, low + rng.integers(-1, 3, low.shape)),
    ]
    number = np.sort(rng.integers(0, at.sum() + 1, (len(SEES), keys)))
    number[-1] = rng.integers(-1, 4, keys)
    ids = (*(np.concatenate(x) for x in zip(*found, strict=True)), number)
    return {name: jnp.asarray(x, jnp.int32) for name, x in zip(("low", "high", "number"), ids, strict=True)}


def run(kernel: str, given: tuple[jax.Array, ...], rule: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Forward and backward in small tiles."""
    forward, backward = partial_softmax.forward, partial_softmax.backward
    more: list[dict[str, Any]] = [{}, {}]
    if kernel == "tpu":
        forward, backward = partial_softmax_tpu.forward, partial_softmax_tpu.backward
        more = [{"interpret": True}] * 2
    if kernel == "gpu":
        forward, backward = partial_softmax_gpu.forward, partial_softmax_gpu.backward
        more = [{"shape": Shape(32, 32, 4, 1)}, {"dq_shape": Shape(32, 32, 4, 1), "dkv_shape": Shape(16, 64, 4, 1)}]
        more = [{**m, "interpret": True} for m in more]
    q, k, v, do = given

    def both(q: Any, k: Any, v: Any, do: Any, low: Any, high: Any, number: Any) -> dict[str, Any]:
        rule = {"low": low, "high": high, "number": number, "scale": 0.3}
        o, lse = forward(q, k, v, **rule, **more[0])
        delta = (do.astype(jnp.float32) * o).sum(-1) - 0.5
        dq, dk, dv = backward(q, k, v, do, lse, delta, **rule, **more[1])
        return {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}

    return jax.jit(both)(q, k, v, do, rule["low"], rule["high"], rule["number"])


def tensors(rng: np.random.Generator, b: int, rows: int, keys: int, heads: int, kv_heads: int, dtype: Any) -> Any:
    q, do = (jnp.asarray(rng.normal(size=(b, rows, heads, D)), dtype) for _ in range(2))
    return q, *(jnp.asarray(rng.normal(size=(b, keys, kv_heads, D)), dtype) for _ in range(2)), do


def compare(found: dict[str, jax.Array], wanted: dict[str, jax.Array], tolerance: float) -> None:
    for name, a in found.items():
        assert a.dtype == jnp.float32 and a.shape == wanted[name].shape, name
        b = np.asarray(wanted[name], np.float32)
        scale = max(np.abs(b[np.isfinite(b)]).max(), 1.0)
        np.testing.assert_allclose(a, b, atol=tolerance * scale, rtol=0, err_msg=name)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ROWS", "ROWS_BACK", "KEYS"):
        monkeypatch.setattr(partial_softmax_tpu, name, 128)


@pytest.mark.parametrize(
    ("rows", "keys", "heads", "kv_heads", "dtype"),
    [
        (41, 150, 8, 2, "float32"),
        (21, 33, 7, 1, "bfloat16"),
        pytest.param(19, 70, 3, 3, "float32", marks=pytest.mark.slow),
        pytest.param(150, 400, 6, 2, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_kernels_are_the_chunked_form(
    rows: int, keys: int, heads: int, kv_heads: int, dtype: str, small_tiles: None
) -> None:
    """Groups of 4, 7 and 1 heads, lengths that are no multiple of anything, every kind of mask; NaN in padding."""
    rng = np.random.default_rng(0)
    rule = masks(rng, rows, keys)
    q, k, v, do = tensors(rng, len(SEES), rows, keys, heads, kv_heads, dtype)
    wanted = run("chunked", tuple(x.astype(jnp.float32) for x in (q, k, v, do)), rule)
    blind = np.isneginf(wanted["lse"])
    assert blind[SEES.index("nothing")].all() and 0.1 < blind.mean() < 0.9
    padding = (rule["number"] <= 0)[:, :, None, None]
    k, v = (jnp.where(padding, jnp.nan, x) for x in (k, v))
    for kernel in ("tpu", "gpu"):
        found = run(kernel, (q, k, v, do), rule)
        compare(found, wanted, 2e-6 if dtype == "float32" else 4e-3)
        np.testing.assert_array_equal(np.isneginf(found["lse"]), blind)
        assert (np.asarray(found["o"])[blind] == 0).all() and (np.asarray(found["dq"])[blind] == 0).all()


def test_tiles_that_are_not_seen_are_not_read(small_tiles: None) -> None:
    """A number times zero would be NaN where the tile holds NaN. Also a group of one head."""
    rng = np.random.default_rng(1)
    q, k, v, do = tensors(rng, 1, 150, 384, 2, 2, "float32")
    low = np.full((1, 150), 2)
    low[0, 130:] = 1
    number = np.repeat([3, 9, 1], 128)[None]
    rule = {name: jnp.asarray(x, jnp.int32) for name, x in (("low", low), ("high", low * 0 + 3), ("number", number))}
    wanted = run("chunked", (q, k, v, do), rule)
    k, v = (x.at[:, 128:256].set(jnp.nan) for x in (k, v))
    for kernel in ("tpu", "gpu"):
        found = run(kernel, (q, k, v, do), rule)
        compare(found, wanted, 2e-6)
        assert (found["dk"][:, 128:256] == 0).all() and (found["dv"][:, 128:256] == 0).all()


@pytest.mark.parametrize("kernel", ["chunked", "tpu", "gpu"])
def test_nan_in_a_key_that_is_seen_reaches_the_rows_that_see_it(kernel: str) -> None:
    """And no other sample; a part without a number would be left out of a merge, and nobody would know."""
    given = list(tensors(np.random.default_rng(0), 2, 4, 40, 2, 1, jnp.float32))
    given[1] = given[1].at[0, 3].set(jnp.nan)
    rule = {"low": jnp.ones((2, 4), jnp.int32), "high": jnp.ones((2, 4), jnp.int32).at[0, 1].set(0)}
    found = run(kernel, tuple(given), {**rule, "number": jnp.ones((2, 40), jnp.int32)})
    for name in ("o", "lse"):
        bad = np.isnan(np.asarray(found[name]).reshape(2, 4, -1)).all(-1)
        assert bad.tolist() == [[True, False, True, True], [False] * 4]
    assert (found["lse"][0, 1] == -jnp.inf).all() and (found["o"][0, 1] == 0).all()
    assert jnp.isnan(found["dq"][0, 0]).all() and not jnp.isnan(found["dk"][1]).any()
    whole = partial_softmax.merge(*(partial_softmax.Part(found["o"][i], found["lse"][i]) for i in (0, 1)))
    assert jnp.isnan(whole.o[0]).all() and jnp.isnan(whole.lse[0]).all()


@pytest.mark.parametrize("kernel", ["tpu", "gpu"])
def test_no_keys_at_all(kernel: str) -> None:
    forward = {"tpu": partial_softmax_tpu.forward, "gpu": partial_softmax_gpu.forward}[kernel]
    q, k, ids = jnp.ones((1, 2, 2, D)), jnp.ones((1, 0, 1, D)), jnp.ones((1, 2), jnp.int32)
    rule = {"low": ids, "high": ids, "number": jnp.ones((1, 0), jnp.int32)}
    o, lse = jax.jit(lambda q, k: forward(q, k, k, **rule, scale=1.0, interpret=True))(q, k)
    assert (o == 0).all() and np.isneginf(lse).all()


def test_few_rows_share_out_the_keys_among_programs() -> None:
    """As in decoding on a GPU, where a program for each head would leave most of it idle."""
    rng = np.random.default_rng(2)
    q, k, v, _ = tensors(rng, 2, 1, 700, 2, 1, "float32")
    ids = jnp.ones((2, 1), jnp.int32)
    rule = {"low": ids, "high": 2 * ids, "number": jnp.asarray(rng.integers(0, 4, (2, 700)), jnp.int32), "scale": 0.3}
    split = functools.partial(partial_softmax_gpu.forward, **rule, interpret=True)
    wanted = jax.jit(functools.partial(partial_softmax.forward, **rule))(q, k, v)
    compare(jax.jit(split)(q, k, v)._asdict(), wanted._asdict(), 2e-6)
    (call,) = [e for e in jax.make_jaxpr(split)(q, k, v).jaxpr.eqns if e.primitive.name == "pallas_call"]
    assert call.params["grid_mapping"].grid == (1, 1, 2 * 5)  # 700 keys, 4 tiles of 32 at least


def test_tables_say_what_every_pair_of_tiles_holds() -> None:
    rng = np.random.default_rng(3)
    rule = masks(rng, 30, 64)

    @jax.jit
    def found(low: Any, high: Any, number: Any) -> Any:
        rows, keys = partial_softmax_tiles.rows(low, high, 2, 8), partial_softmax_tiles.keys(number, 16)
        row = tuple(jnp.moveaxis(rows.table, 1, 0)[:, :, :, None])
        key = tuple(jnp.moveaxis(keys.table, 1, 0)[:, :, None])
        whole, visible = partial_softmax_tiles.whole(row, key), partial_softmax_tiles.visible(row, key)
        return whole, visible, partial_softmax.seen(low, high, number)

    whole, visible, seen = (np.asarray(x) for x in found(**rule))
    seen = np.pad(np.repeat(seen, 2, axis=1), ((0, 0), (0, 4), (0, 0))).reshape(len(SEES), 8, 8, 4, 16)
    np.testing.assert_array_equal(whole, seen.all((2, 4)))
    assert (visible | ~seen.any((2, 4))).all() and not visible.all()


def test_the_kernel_is_that_of_the_platform() -> None:
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    assert kernels.choose("auto", mesh, jnp.dtype("bfloat16")) == "chunked"
    assert kernels.choose("tpu", mesh, jnp.dtype("bfloat16")) == "tpu" and kernels.interpreted("tpu", mesh)
    assert kernels.choose("tpu", mesh, jnp.dtype("float64")) == "chunked"
    for platform, wanted in (("tpu", "tpu"), ("cuda", "gpu"), ("gpu", "gpu"), ("cpu", "chunked")):
        device = jax.sharding.AbstractDevice(device_kind="", num_cores=None, platform=platform)
        abstract = jax.sharding.AbstractMesh((2,), ("x",), abstract_device=device)
        assert kernels.choose("auto", abstract, jnp.dtype("float32")) == wanted
        assert kernels.choose("auto", abstract, jnp.dtype("float64")) == "chunked"
        assert not kernels.interpreted(wanted, abstract)
    assert kernels.choose("auto", jax.sharding.AbstractMesh((2,), ("x",)), jnp.dtype("float32")) == "chunked"
    with pytest.raises(ValueError, match="kernel must be one of auto, chunked, tpu, gpu, found 'cuda'"):
        kernels.choose("cuda", mesh, jnp.dtype("float32"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gpu_kernels_lower_for_cuda(dtype: str) -> None:
    """Through Triton's dialect; nothing is run."""

    def like(*shape: int, dtype: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def both(q: Any, k: Any, do: Any, lse: Any, low: Any, number: Any) -> Any:
        rule = {"low": low, "high": low, "number": number, "scale": 0.1}
        given = q, k, k, do, lse, lse
        return partial_softmax_gpu.forward(q, k, k, **rule), partial_softmax_gpu.backward(*given, **rule)

    ids = {"dtype": jnp.int32}
    wide, number = like(1, 300, 8, 128), like(1, 300, 8, dtype=jnp.float32)
    given = wide, like(1, 2000, 2, 128), wide, number, like(1, 300, **ids), like(1, 2000, **ids)
    name = "__gpu$xla.gpu.triton"
    lowered = jax.jit(both).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count(f"custom_call @{name}(") == 3


@pytest.mark.slow
def test_kernels_inside_every_strategy() -> None:
    """On eight devices; interpreted, so without `check_vma`."""
    environment = {**os.environ, "XLA_FLAGS": devices.flags(8), "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-m", "tests.ops.kernels_over_devices"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2 * 8 and [r for r in found if not r["error"] < 1e-5] == []


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(("head_dim", "check_vma"), [(128, True), (128, False), (64, True)])
def test_tpu_kernels_compile_for_eight_v5e(head_dim: int, check_vma: bool) -> None:
    """Llama 3.2 Vision's heads, 524288 keys over eight chips: three kernels, and no scores in memory."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    words = [sys.executable, "-m", "tests.ops.kernels_over_devices", "v5e:2x4", str(head_dim), str(int(check_vma))]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kernels"] == ["partial_softmax_dkv", "partial_softmax_dq", "partial_softmax_forward"]
    assert found["temp_bytes"] < 600 * 2**20  # keys and values, and their gradients, each laid out by heads: 512 MiB
