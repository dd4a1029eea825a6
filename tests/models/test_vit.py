# SPDX-License-Identifier: Apache-2.0
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vtjax.account import flops
from vtjax.errors import InputError
from vtjax.models import build, segments
from vtjax.models.layers import sincos2d
from vtjax.models.vit import ViT
from vtjax.ops.tokens import Tokens
from vtjax.spec import ViTSpec

TINY = ViTSpec.uniform(depth=4, width=16, heads=2, mlp=24, image_size=16, patch=8, classes=5)
SHALLOW = TINY.edit(blocks=TINY.blocks[:2])
KEY = jax.random.key(0)


def noisy(params, scale=0.2):
    """Zero-initialised leaves hide mistakes: add noise everywhere."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return tree.unflatten([a + scale * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)])


def run(model, params, **options):
    """Jitted `apply` on the images of the spec."""
    return jax.jit(lambda p, x: model.apply(p, x, **options))(params, images(model.spec))


def images(spec, batch=2):
    return jax.random.normal(jax.random.key(1), (batch, *spec.image_size, spec.channels))


@pytest.fixture(scope="module")
def tiny():
    model = ViT(TINY)
    return model, noisy(jax.jit(model.init)(KEY))


SWITCHES = {
    "registers": {"registers": 2, "pos_prefix": 0},
    "distilled": {"distill_token": True, "pos_prefix": 2},
    "mean": {"pooling": "mean", "class_token": False, "pos_prefix": 0, "norm_after": False, "fc_norm": True},
    "attention_pool": {"pooling": "attention", "pool_mlp": 24, "class_token": False, "pos_prefix": 0},
    "unpooled": {"pooling": "none"},
    "no_head": {"classes": 0},
    "post_norm": {"norm_position": "post", "activation": "gelu_tanh"},
    "clip": {"norm_before": True, "patch_bias": False, "activation": "quick_gelu", "head_bias": False},
    "swiglu": {"activation": "swiglu", "layer_scale": 1e-5, "mlp_norm": True},
    "intern": {"norm": "rmsnorm", "qk_norm": "full", "qkv_bias": False, "layer_scale": 0.1},
    "qk_norm": {"qk_norm": "head", "key_bias": False, "out_bias": False, "mlp_bias": False},
    "sincos": {"pos": "sincos2d"},
}


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_builds_and_reaches_the_output(name):
    spec = SHALLOW.edit(**SWITCHES[name])
    model = ViT(spec)
    params = noisy(jax.jit(model.init)(KEY))
    y, aux = run(model, params)
    shape = {"unpooled": (2, spec.tokens, 5), "no_head": (2, 16)}.get(name, (2, 5))
    assert y.shape == shape and y.dtype == jnp.float32
    assert aux["features"].shape == (2, spec.tokens, 16)

    def value(p):
        return jnp.square(model.apply(p, images(spec))[0] - 1.0).sum()

    # A distilled model's class head and distillation head both feed y; nothing in the tree may be decoration. The key
    # bias shifts a whole row of scores and cancels in the softmax, unless a key norm follows.
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(value))(params)):
        text = jax.tree_util.keystr(path, simple=True, separator="/")
        if text.endswith("key/bias") and spec.qk_norm == "none":
            assert float(jnp.abs(leaf).max()) < 1e-3
        else:
            assert float(jnp.abs(leaf).max()) > 0, text


def test_init_matches_unrolled_init_in_names_and_differs_between_blocks(tiny):
    model, _ = tiny
    params = jax.jit(model.init)(KEY)
    assert [k for k in params if k.startswith("block")] == [f"block_{i:02d}" for i in range(4)]
    kernels = [params[f"block_{i:02d}"]["mlp"]["up"]["kernel"] for i in range(4)]
    assert not np.allclose(kernels[0], kernels[1])
    uneven = TINY.edit(blocks={2: {"mlp": 10}})
    shapes = jax.eval_shape(ViT(uneven).init, KEY)
    assert shapes["block_02"]["mlp"]["up"]["kernel"].shape == (16, 10)


@pytest.mark.parametrize(
    "remat,scan",
    [
        pytest.param("full", True, marks=pytest.mark.slow),
        pytest.param("dots", True, marks=pytest.mark.slow),
        ("names", True),
        ("names", False),
    ],
)
def test_scan_and_remat_change_nothing_but_memory(remat, scan):
    spec = TINY.edit(blocks={1: {"mlp": 10}})  # runs of equal blocks: [0], [1], [2, 3]
    model = ViT(spec)
    params = noisy(jax.jit(model.init)(KEY))
    other = dataclasses.replace(model, remat=remat, scan=scan)

    def value(m, p):
        y, aux = m.apply(p, images(spec), key=jax.random.key(3), drop_path=0.5)
        assert len(aux["blocks"]) == 4
        return jnp.square(y).sum()

    a, ga = jax.jit(jax.value_and_grad(lambda p: value(model, p)))(params)
    b, gb = jax.jit(jax.value_and_grad(lambda p: value(other, p)))(params)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-3), ga, gb)


def test_scan_compiles_equal_blocks_once():
    model = ViT(TINY, remat="full", scan=True)
    text = str(jax.make_jaxpr(lambda p: model.apply(p, images(TINY))[0])(jax.eval_shape(model.init, KEY)))
    assert text.count("scan[") == 1 and "length=4" in text


def test_feature_layer_takes_the_tokens_that_leave_a_block(tiny):
    model, params = tiny
    full, aux = run(model, params, want=("tokens",))
    for layer in (-2, 1):
        other = ViT(TINY.edit(feature_layer=layer))
        y, side = run(other, params)
        np.testing.assert_array_equal(y, full)
        np.testing.assert_array_equal(side["features"], aux["blocks"][layer]["tokens"].x)
        assert all("tokens" not in block for block in side["blocks"])


def test_wanted_outputs(tiny):
    model, params = tiny
    _, aux = run(model, params, want=("keys", "importance", "lse"))
    for block in aux["blocks"]:
        assert block["keys"].shape == (2, 5, 2, 8)
        assert block["lse"].shape == (2, 5, 2)
        np.testing.assert_allclose(block["importance"].sum(-1), 1.0, atol=1e-5)


class KillLast:
    """A reducer: kills the last `knob` tokens of a block."""

    wants = ("importance", "keys")

    def __call__(self, tokens, aux, knobs):
        assert aux["importance"].shape == tokens.x.shape[:2] and "keys" in aux
        n = tokens.x.shape[1]
        alive = jnp.ones(tokens.x.shape[:2]) if tokens.alive is None else tokens.alive
        alive = alive * (jnp.arange(n) < n - knobs["kill"])
        return tokens.replace(alive=alive), {"kept": alive.sum(-1)}


def test_reducers_get_their_layer_of_the_knobs_and_knobs_override_method_parameters(tiny):
    _, params = tiny
    model = ViT(TINY, reducers=tuple((i, KillLast()) for i in range(4)))
    with_method = {**params, "ltmp": {"kill": jnp.array([0.0, 1.0, 1.0, 2.0])}}
    _, aux = run(model, with_method)
    kept = [float(block["decisions"]["kept"][0]) for block in aux["blocks"]]
    assert kept == [5, 4, 4, 3]
    assert all(set(block) == {"decisions"} for block in aux["blocks"])
    y, aux = run(model, with_method, knobs={"kill": jnp.zeros(4)})
    assert [float(block["decisions"]["kept"][0]) for block in aux["blocks"]] == [5, 5, 5, 5]
    np.testing.assert_allclose(y, run(ViT(TINY), params)[0], atol=2e-6)


def test_adapters_act_at_their_sites(tiny):
    model, params = tiny
    base = run(model, params, want=("tokens",))[1]["blocks"]
    for site in ("attn_in", "attn", "mlp_in", "mlp", "out"):
        changed = ViT(TINY, adapters=((2, site, lambda x, knobs: x * knobs["a"]),))
        knobs = {"a": jnp.full(4, 0.5)}
        blocks = run(changed, params, want=("tokens",), knobs=knobs)[1]["blocks"]
        np.testing.assert_array_equal(blocks[1]["tokens"].x, base[1]["tokens"].x)
        assert float(jnp.abs(blocks[2]["tokens"].x - base[2]["tokens"].x).max()) > 1e-3
        if site == "out":
            np.testing.assert_allclose(blocks[2]["tokens"].x, base[2]["tokens"].x * 1.5, rtol=1e-5)


def test_a_removed_block_keeps_its_number_and_starts_as_the_identity():
    spec = TINY.edit(blocks={1: {"attn": False, "ffn": False, "adapter": 6}, 2: {"attn": False, "ffn": False}})
    model = ViT(spec)
    params = jax.jit(model.init)(KEY)
    assert "block_02" not in params and set(params["block_01"]) == {"adapter"}
    _, aux = run(model, params, want=("tokens",))
    for layer in (1, 2):
        np.testing.assert_array_equal(aux["blocks"][layer]["tokens"].x, aux["blocks"][0]["tokens"].x)
    injected = ViT(spec, adapters=((2, "skip", lambda x, knobs: -x),))
    _, aux = run(injected, params, want=("tokens",))
    assert float(jnp.abs(aux["blocks"][2]["tokens"].x).max()) == 0.0


def test_dead_and_sized_tokens_are_weighted_in_the_mean():
    spec = TINY.edit(pooling="mean", classes=0, norm_after=False)
    x = jnp.arange(2 * 5 * 16, dtype=jnp.float32).reshape(2, 5, 16)
    alive = jnp.array([[1.0, 1, 0, 1, 1]] * 2)
    size = jnp.array([[1.0, 2, 9, 1, 1]] * 2)
    pooled = ViT(spec)._pooled({}, Tokens(x, size=size, alive=alive))
    np.testing.assert_allclose(pooled, (2 * x[:, 1] + x[:, 3] + x[:, 4]) / 4)


def test_drop_path_rates_grow_and_keep_the_mean():
    from vtjax.models.segments import _drop_path

    drop = _drop_path(0.25, jax.random.key(0))
    y = drop(jnp.ones((4000, 1, 1)), 0)
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert abs(float(y.mean()) - 1.0) < 0.03
    assert not np.array_equal(y, drop(jnp.ones((4000, 1, 1)), 1))


def test_bfloat16_compute_keeps_float32_masters(tiny):
    model, params = tiny
    half = dataclasses.replace(model, dtype=jnp.bfloat16)
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(jax.eval_shape(half.init, KEY)))
    y, aux = run(half, params)
    assert y.dtype == jnp.float32 and aux["features"].dtype == jnp.bfloat16
    np.testing.assert_allclose(y, run(model, params)[0], atol=0.15)


def test_sincos_positions_are_those_of_the_reference_formula():
    table = sincos2d(3, 5, 16)
    omega = 1 / 10_000 ** (np.arange(4) / 3)
    row, column = 2, 4
    expected = np.concatenate([f(p * omega) for p in (column, row) for f in (np.sin, np.cos)])
    np.testing.assert_allclose(table[row * 5 + column], expected, atol=1e-6)


@pytest.mark.parametrize(
    "make,says",
    [
        (lambda: ViT(TINY, remat="some"), "remat must be one of"),
        (lambda: ViT(TINY, scan=True), "scan=True needs remat"),
        (lambda: ViT(TINY, reducers=((4, KillLast()),)), "layer 4"),
        (lambda: ViT(TINY, adapters=((0, "side", lambda x, k: x),)), "adapter site"),
        (lambda: ViT(TINY).apply({}, jnp.zeros((1, 16, 24, 3))), "images must be"),
    ],
)
def test_bad_input_is_named(make, says):
    with pytest.raises(InputError, match=says):
        make()


def test_numpy_parameters_and_images_are_taken_eagerly(tiny):
    model, params = tiny
    y, _ = model.apply(jax.tree.map(np.asarray, params), np.asarray(images(TINY)))
    np.testing.assert_allclose(y, run(model, params)[0], atol=1e-5)


def test_build_makes_the_model_of_the_spec():
    assert build(TINY, remat="full") == ViT(TINY, remat="full")
    assert segments.block_name(3) == "block_03"


@pytest.mark.slow
def test_jitted_init_compiles_faster_than_the_training_step():
    spec = ViTSpec.uniform(depth=12, width=192, heads=3, classes=1000)
    model, optimiser = ViT(spec), optax.adamw(1e-3)
    params = jax.eval_shape(model.init, KEY)

    def step(params, state, x):
        grads = jax.grad(lambda p: jnp.square(model.apply(p, x)[0]).sum())(params)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def seconds(lowered):
        start = time.process_time()
        lowered.compile()
        return time.process_time() - start

    shape = jax.ShapeDtypeStruct((16, *spec.image_size, 3), jnp.float32)
    init = seconds(jax.jit(model.init).lower(KEY))
    train = seconds(jax.jit(step).lower(params, jax.eval_shape(optimiser.init, params), shape))
    assert init < train, f"init {init:.1f} s, training step {train:.1f} s"


def test_remat_policies_recompute_what_they_say():
    """In MACs of the gradient: "dots" keeps the projections and repeats the scores, "full" repeats both."""
    x = images(SHALLOW)

    def macs(remat):
        model = ViT(SHALLOW, remat=remat)
        params = jax.eval_shape(model.init, KEY)
        return flops.walk(jax.grad(lambda p: model.apply(p, x)[0].sum()), params).macs

    scores = 2 * 2 * 2 * SHALLOW.tokens**2 * SHALLOW.width  # two blocks, two images, two products
    assert macs("none") < macs("dots") <= macs("none") + scores < macs("full")


@pytest.mark.parametrize("layer", [-2, 1, 3])
def test_feature_layer_ends_a_scan_and_changes_nothing(tiny, layer):
    _, params = tiny
    spec = TINY.edit(feature_layer=layer)
    scanned = ViT(spec, remat="full", scan=True)
    text = str(jax.make_jaxpr(lambda p: scanned.apply(p, images(spec))[1]["features"])(params))
    assert text.count("scan[") == {-2: 1, 1: 2, 3: 1}[layer]  # runs of two or more: [0..2], [0, 1] and [2, 3], [0..3]
    a, b = (run(model, params)[1] for model in (ViT(spec), scanned))
    np.testing.assert_allclose(a["features"], b["features"], atol=1e-5)
    assert a["blocks"] == b["blocks"] == [{}] * 4


def test_a_scalar_knob_reaches_every_layer(tiny):
    _, params = tiny
    model = ViT(TINY, reducers=tuple((i, KillLast()) for i in range(4)))
    _, aux = run(model, params, knobs={"kill": jnp.float32(2)})
    assert [float(block["decisions"]["kept"][0]) for block in aux["blocks"]] == [3, 3, 3, 3]


def removed(tiny_spec):
    return tiny_spec.edit(blocks={1: {"attn": False, "ffn": False}})


@pytest.mark.parametrize(
    "make,says",
    [
        (lambda p, x: ViT(TINY, attention="flash"), "attention must be one of auto, .*found 'flash'"),
        (lambda p, x: ViT(removed(TINY), reducers=((1, KillLast()),)), "'reducer' at layer 1 would not act"),
        (lambda p, x: ViT(removed(TINY), adapters=((1, "mlp", lambda x, k: x),)), "'mlp' at layer 1 would not act"),
        (lambda p, x: ViT(TINY, adapters=((1, "skip", lambda x, k: x),)), "'skip' at layer 1 would not act"),
        (lambda p, x: ViT(TINY, reducers=((1, KillLast()), (1, KillLast()))), "at most one 'reducer', found 2"),
        (lambda p, x: ViT(TINY).apply(p, x, want=("scores",)), "want must be a tuple of .*found 'scores'"),
        (lambda p, x: ViT(TINY).apply(p, x, drop_path=0.1), "drop_path=0.1 needs a random key"),
        (lambda p, x: ViT(TINY).apply(p, x, knobs={"a": {"b": jnp.ones(3)}}), r"knob a/b must be .*\[4, ...\].*\[3\]"),
        (lambda p, x: ViT(TINY).apply({**p, "ltmp": jnp.ones(4)}, x), r"params\['ltmp'\] must hold .* by name"),
        (
            lambda p, x: ViT(TINY).apply({**p, "a": {"t": jnp.ones(4)}, "b": {"t": jnp.ones(4)}}, x),
            r"params\['b'\]\['t'\] must have a name of its own",
        ),
        (
            lambda p, x: ViT(TINY.edit(blocks={2: {"reduce": "ltmp"}})).apply(p, x),
            r"blocks\[2\].reduce='ltmp' needs a reducer",
        ),
    ],
)
def test_what_would_be_ignored_is_refused(tiny, make, says):
    with pytest.raises(InputError, match=says) as error:
        make(tiny[1], images(TINY))
    assert "\n" not in str(error.value)
