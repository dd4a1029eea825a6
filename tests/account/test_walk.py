# SPDX-License-Identifier: Apache-2.0
"""The walk over the jaxpr: every primitive that multiplies, every construct that repeats, nothing silently 0."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from vtjax.account import flops
from vtjax.account.walk import walk
from vtjax.errors import InputError

F32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
SQUARE = F32((6, 6))
CUBE = 6**3


def macs(fn, *args, **options) -> int:
    counts = walk(fn, *args, **options)
    assert counts.unknown == {}
    assert sum(counts.by_primitive.values()) == counts.macs and counts.flops == 2 * counts.macs
    return counts.macs


def test_matrix_products() -> None:
    assert macs(jnp.matmul, F32((2, 3)), F32((3, 5))) == 30
    assert macs(lambda a, b: jnp.einsum("bnhd,bmhd->bhnm", a, b), F32((2, 3, 4, 5)), F32((2, 7, 4, 5))) == 840
    assert macs(jnp.vdot, F32((9,)), F32((9,))) == 9
    assert macs(jax.vmap(jnp.matmul), F32((4, 2, 3)), F32((4, 3, 5))) == 120
    assert macs(jnp.matmul, F32((0, 3)), F32((3, 5))) == 0


def test_nothing_else_is_counted() -> None:
    def fn(x, key):
        x = jax.nn.softmax(jnp.exp(x) * jax.lax.log(2.0)) + jax.random.normal(key, x.shape)
        x = jnp.sort(jax.nn.gelu(x).cumsum(0).at[0].add(1.0), axis=-1)
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, (2, 2), (1, 1), "SAME").mean() + jnp.argmax(x)

    assert macs(fn, SQUARE, jax.random.key(0)) == 0
    assert macs(fn, SQUARE, jax.ShapeDtypeStruct((2,), jnp.uint32)) == 0


@pytest.mark.parametrize(("groups", "batch_groups"), [(1, 1), (2, 1), (1, 2)])
def test_convolutions_against_their_definition(groups: int, batch_groups: int) -> None:
    def fn(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (2, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
            batch_group_count=batch_groups,
        )

    # Output 4 x 6 positions of a 3 x 2 window over 4 channels in `groups` groups.
    expected = (2 // batch_groups) * 4 * 6 * 8 * (3 * 2 * 4 // groups)
    assert macs(fn, F32((2, 9, 7, 4)), F32((3, 2, 4 // groups, 8))) == expected


def test_a_convolution_equals_the_patch_product() -> None:
    x, kernel = F32((3, 20, 35, 3)), F32((5, 5, 3, 24))
    conv = partial(
        jax.lax.conv_general_dilated,
        window_strides=(5, 5),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    assert macs(conv, x, kernel) == macs(jnp.matmul, F32((3, 28, 75)), F32((75, 24)))


def test_scan_counts_its_length() -> None:
    def fn(x, n):
        return jax.lax.scan(lambda c, _: (jax.lax.scan(lambda d, _: (d @ d, None), c, None, 3)[0], None), x, None, n)[0]

    assert macs(partial(fn, n=5), SQUARE) == 15 * CUBE
    assert macs(partial(fn, n=0), SQUARE) == 0
    assert macs(lambda x: jax.lax.fori_loop(0, 4, lambda _, c: c @ c, x), SQUARE) == 4 * CUBE
    assert macs(lambda x: jax.lax.map(lambda r: r @ r, x), F32((7, 6, 6))) == 7 * CUBE
    assert macs(jax.grad(lambda x: fn(x, 5).sum()), SQUARE) == 3 * 15 * CUBE


def test_xla_counts_a_scan_once_and_the_walk_does_not() -> None:
    """The reason why the walk exists; if this fails, XLA was mended."""

    def fn(x):
        return jax.lax.scan(lambda c, _: (c @ c, None), x, None, 12)[0]

    compiled = jax.jit(fn).lower(SQUARE).compile().cost_analysis()
    assert compiled["flops"] < 2 * 2 * CUBE < 12 * 2 * CUBE == walk(fn, SQUARE).flops


def test_while_needs_an_assumption() -> None:
    def fn(x, n):
        return jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] @ c[1]), (0, x))[1]

    n = jax.ShapeDtypeStruct((), jnp.int32)
    with pytest.raises(InputError, match="216 MACs per iteration.*while_trips"):
        walk(fn, SQUARE, n)
    counts = walk(fn, SQUARE, n, while_trips=7)
    assert counts.macs == 7 * CUBE and counts.assumed == ("while: 7 iterations",)
    assert macs(lambda n: jax.lax.while_loop(lambda c: c < n, lambda c: c + 1, 0), n) == 0

    def test_multiplies(x):
        return jax.lax.while_loop(lambda c: (c @ c).sum() < 9, lambda c: c + 1, x)

    assert macs(test_multiplies, SQUARE, while_trips=7) == 8 * CUBE


def test_cond_takes_the_dearest_branch_and_says_so() -> None:
    def fn(i, x):
        return jax.lax.switch(i, [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x)

    i = jax.ShapeDtypeStruct((), jnp.int32)
    counts = walk(fn, i, SQUARE)
    assert counts.macs == 2 * CUBE
    assert counts.assumed == (f"cond: the dearest of branches with 0, {2 * CUBE}, {CUBE} MACs",)
    assert walk(lambda p, x: jax.lax.cond(p, lambda: x @ x, lambda: x.T @ x), True, SQUARE).assumed == ()


def test_platform_dependent_takes_the_branch_of_the_platform() -> None:
    def fn(x):
        return jax.lax.platform_dependent(x, tpu=lambda x: x, cuda=lambda x: x @ x @ x, default=lambda x: x @ x)

    assert walk(fn, SQUARE).macs == CUBE
    assert walk(fn, SQUARE, platform="cuda").macs == 2 * CUBE
    assert walk(fn, SQUARE, platform="tpu").macs == 0
    assert walk(fn, SQUARE, platform="tpu").assumed == ("platform_dependent: the branch for tpu",)


@jax.custom_vjp
def squared(x):
    return x @ x


squared.defvjp(lambda x: (squared(x), x), lambda x, g: (g @ x.T @ x,))


@jax.custom_jvp
def doubled(x):
    return x @ x


doubled.defjvp(lambda p, t: (doubled(*p), t[0] @ p[0]))


def test_calls_are_entered() -> None:
    assert macs(jax.jit(jax.jit(lambda x: x @ x)), SQUARE) == CUBE
    assert macs(lambda x: squared(x) + doubled(x), SQUARE) == 2 * CUBE
    assert macs(jax.value_and_grad(lambda x: squared(x).sum()), SQUARE) == 3 * CUBE
    assert macs(jax.grad(lambda x: squared(x).sum()), SQUARE) == 2 * CUBE  # the value itself is dropped
    assert macs(jax.value_and_grad(lambda x: doubled(x).sum()), SQUARE) == 2 * CUBE
    remat = jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ x) @ x))
    assert macs(remat, SQUARE) == 2 * CUBE
    # Two products again before the transposes of both: 2 + 2 + 4.
    assert macs(jax.value_and_grad(lambda x: remat(x).sum()), SQUARE) == 8 * CUBE

    batched = jax.custom_batching.custom_vmap(lambda x: x @ x)
    batched.def_vmap(lambda size, batch, x: (batched(x[0]), False))
    assert macs(batched, SQUARE) == CUBE


def test_what_cannot_be_seen_is_named() -> None:
    from jax.experimental import pallas as pl

    def kernel(x, out):
        out[...] = x[...] @ x[...]

    def hidden(x):
        y = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name="square", interpret=True)(x)
        y = jax.ffi.ffi_call("my_gemm", jax.ShapeDtypeStruct(x.shape, x.dtype))(y)
        return jax.pure_callback(lambda v: v, y, y) + jnp.linalg.cholesky(x) + jnp.fft.fft(x).real

    def loop(x):
        return jax.lax.scan(lambda c, _: (hidden(c), None), x, None, 3)[0] @ x

    counts = walk(loop, SQUARE)
    assert counts.macs == CUBE
    assert counts.unknown == {
        "pallas_call:square": 3,
        "ffi_call:my_gemm": 3,
        "pure_callback": 3,
        "cholesky": 3,
        "fft": 3,
    }

    either = walk(lambda p, x: jax.lax.cond(p, lambda: x @ x, lambda: hidden(x)), True, SQUARE)
    assert either.macs == CUBE and either.unknown["pallas_call:square"] == 1
    with pytest.raises(InputError, match="while_trips"):
        walk(lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, hidden, x), SQUARE)


def test_flops_offers_the_walk() -> None:
    assert flops.walk is walk and flops.Counts is type(walk(jnp.matmul, SQUARE, SQUARE))


def test_shard_map_counts_every_device() -> None:
    script = """
        import jax, jax.numpy as jnp
        from jax.sharding import AxisType, PartitionSpec as P
        from vtjax.account.flops import walk
        mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        def ring(q, k):
            def step(c, _):
                return (c[0] + q @ c[1].T @ c[1], jax.lax.ppermute(c[1], "data", [(0, 1), (1, 0)])), None
            return jax.lax.scan(step, (jnp.zeros_like(q), k), None, 2)[0][0]
        x = jax.ShapeDtypeStruct((8, 6), jnp.float32)
        def count(axes, **options):
            f = jax.shard_map(ring, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P("data"), **options)
            return walk(f, x, x)
        alone, both = count(None, axis_names={"data"}), count(None)
        assert alone.unknown == both.unknown == {}, (alone, both)
        print(alone.macs, both.macs, walk(lambda q, k: q @ k.T @ k, x, x).macs)
    """
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "PATH": ""}
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, env=flags)
    assert run.returncode == 0, run.stderr
    alone, replicated, dense = map(int, run.stdout.split())
    # Over "data" the shards together do the dense work; over "model" it is done twice.
    assert alone == dense == 2 * 8 * 8 * 6
    assert replicated == 2 * dense
