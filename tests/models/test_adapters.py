# SPDX-License-Identifier: Apache-2.0
"""Adapters in the slots of ViT and decoder blocks: where they act, how they start, what decoding keeps."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtjax.errors import InputError
from vtjax.methods import das
from vtjax.models import LM, ViT, adapters
from vtjax.models.adapters import STYLES, Attached, Style
from vtjax.ops.tokens import Tokens
from vtjax.spec import AdapterSpec, LMSpec, ViTSpec

VIT = ViTSpec.uniform(depth=1, width=16, heads=2, image_size=8, patch=4, classes=3)
DECODER = LMSpec.uniform(depth=2, width=16, heads=2, mlp=24, vocab=31)
SMALL = {
    name: Style(style.inner.edit(width=4), style.sites, style.skip.edit(width=8), style.normed)
    for name, style in STYLES.items()
}
IDS = np.arange(10).reshape(2, 5) % 31


def run(model, params, inputs=IDS, **options):
    """`model.apply`, compiled as a whole: eager operations would be compiled one by one."""
    return jax.jit(lambda params: model.apply(params, inputs, **options))(params)


def install(spec, style, build, key=1):
    """The model with adapters, its parameters, those of the model without."""
    params = jax.jit(build(spec).init)(jax.random.key(0))
    return jax.jit(lambda params, key: das.install(spec, params, style, key)[1])(params, jax.random.key(key)), params


@pytest.fixture(scope="module")
def installed():
    """`installed(name)`: `install` for the decoder, once per style."""
    return functools.cache(lambda name: install(DECODER, SMALL[name], LM))


@pytest.fixture(scope="module")
def lavin():
    """Random parameters, also of the up-maps, which start at 0."""
    random = np.random.default_rng(0)
    tree = jax.eval_shape(
        lambda key: das.install(DECODER, LM(DECODER).init(key), SMALL["lavin"], key)[1], jax.random.key(0)
    )
    params = jax.tree.map(lambda a: random.normal(size=a.shape).astype(np.float32) * 0.3, tree)
    for name, block in params["das"].items():
        block["skip"]["norm_in"] = params[name]["norm1"]
    return params


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lavin", "llama"])
def test_what_starts_at_zero_changes_nothing(name, installed):
    params, bare = installed(name)
    model = LM(DECODER, adapters=adapters.attach(DECODER, SMALL[name], DECODER.eps))
    np.testing.assert_array_equal(run(model, params)[0], run(LM(DECODER), bare)[0])
    gone, kept = das.remove(DECODER, params, [1])
    short = LM(gone, adapters=adapters.attach(gone, SMALL[name], DECODER.eps))
    np.testing.assert_array_equal(run(short, kept)[0], run(LM(gone), kept)[0])
    assert set(kept["das"]["block_01"]) == {"skip"} and set(kept["das"]["block_00"]) == {"attn_in"}
    assert "block_01" not in kept and gone.lineage[-1].operation == "das.remove"


def test_blocks_that_may_be_skipped_are_removed_ones_where_they_are(lavin):
    style = SMALL["lavin"]
    model = LM(DECODER, adapters=adapters.attach(DECODER, style, DECODER.eps, search=True))
    masked = jax.jit(lambda params, skip: model.apply(params, IDS, knobs={"skipped": skip})[0])
    for skips in ((), (1,)):
        spec, params = das.remove(DECODER, lavin, skips)
        removed = LM(spec, adapters=adapters.attach(spec, style, spec.eps))
        skip = np.isin(np.arange(2), skips)
        np.testing.assert_allclose(masked(lavin, skip), run(removed, params)[0], atol=1e-5)
    assert masked._cache_size() == 1
    for options in ({}, {"knobs": {"skipped": np.zeros(2, bool)}, "want": ("keys",)}):
        with pytest.raises(InputError, match="a block that may be skipped needs the knob skipped"):
            jax.eval_shape(lambda params, options=options: model.apply(params, IDS, **options), lavin)
    with pytest.raises(InputError, match="'instead' at layer 1 would not act"):
        LM(DECODER.edit(blocks={1: {"attn": False, "ffn": False}}), adapters=model.adapters[-1:])


def test_llavas_stand_in_adds_a_normed_copy_of_the_stream():
    style = SMALL["llava"]
    shape = jax.eval_shape(lambda key: adapters.init(style.skip, key, 16), jax.random.key(0))
    zero = {"norm_in": {"scale": jnp.ones(16)}, **jax.tree.map(lambda a: jnp.zeros(a.shape), shape)}
    y = Attached(style.skip, "skip", eps=DECODER.eps)(jnp.full((1, 2, 16), 3.0), {"skip": zero})
    np.testing.assert_allclose(y, np.ones((1, 2, 16)), atol=1e-5)


@pytest.mark.slow
def test_vilts_adapters_read_the_stream_beside_attention_and_mlp():
    style = SMALL["vilt"]
    params, bare = install(VIT, style, ViT)
    images = np.linspace(-1, 1, 2 * 8 * 8 * 3, dtype=np.float32).reshape(2, 8, 8, 3)
    both = adapters.attach(VIT, style)

    @jax.jit
    def streams(params, bare):
        """After the block with both adapters, with the MLP's alone, with neither, and before the MLP."""
        models = [ViT(VIT, adapters=found) for found in (both, both[1:], ())]
        models.append(ViT(VIT.edit(blocks={0: {"ffn": False}})))
        x = [model.apply(params if model.adapters else bare, images)[1]["tokens"].x for model in models]
        return x, adapters.apply(style.inner, params["das"]["block_00"]["mlp"], x[3])

    x, u = streams(params, bare)
    assert [site for _, site, _ in both] == ["attn", "mlp"]
    assert np.abs(x[0] - x[1]).max() > 1e-5 and np.abs(x[1] - x[2]).max() > 1e-5
    np.testing.assert_allclose(x[1], x[2] + u, atol=1e-5)


@pytest.mark.slow
def test_routers_go_on_in_decoding_as_in_the_whole_text(lavin):
    spec, params = das.remove(DECODER, lavin, [1])
    style = SMALL["lavin"]
    model = LM(spec, adapters=adapters.attach(spec, style, spec.eps))

    @jax.jit
    def texts(params):
        whole, _ = model.apply(params, IDS)
        _, aux = model.apply(params, IDS[:, :3], want=("tokens",))
        entering = [Tokens(model.embed(params, IDS[:, :3])), *(block["tokens"] for block in aux["blocks"][:-1])]
        knobs = adapters.routes(spec, model.adapters, params, entering)
        return whole, knobs, *model.prefill(params, IDS[:, :3], room=2)

    whole, knobs, logits, start = texts(params)
    assert {name: a.shape for name, a in knobs.items()} == {"attn_in_route": (2, 2, 2), "skip_route": (2, 2, 2)}
    np.testing.assert_allclose(logits, whole[:, 2], atol=1e-5)
    step, cache = jax.jit(lambda token, cache, knobs: model.step(params, token, cache, knobs=knobs)), start
    for place in (3, 4):
        logits, cache = step(jnp.asarray(IDS[:, place]), cache, knobs)
        np.testing.assert_allclose(logits, whole[:, place], atol=1e-5)
    wrong, _ = step(jnp.asarray(IDS[:, 3]), start, {name: 1 - a for name, a in knobs.items()})
    assert np.abs(wrong - whole[:, 3]).max() > 1e-4


@pytest.mark.parametrize(
    "name", ["vilt", "lavin", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "llava"))]
)
def test_adapters_start_as_published(name):
    style = STYLES[name]
    still_spec = style.inner.edit(zero=True)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 4, 64)), jnp.float32)

    @jax.jit
    def start(key):
        nothing = adapters.apply(still_spec, adapters.init(still_spec, key, 64), x)
        return adapters.init(style.inner, key, 64), nothing

    inner, still = start(jax.random.key(0))
    kernel = {part: np.asarray(p["kernel"]) for part, p in inner.items() if part != "norm"}
    xavier = (2 / (64 + style.inner.width)) ** 0.5
    np.testing.assert_allclose(kernel["down"].std(), 0.02 if name == "vilt" else xavier, rtol=0.2)
    for part in ("up", "up0", "up1"):
        if part in kernel:
            zero = name in ("lavin", "llama")
            assert (kernel[part] == 0).all() == zero
    assert all((np.asarray(p["bias"]) == 0).all() for part, p in inner.items() if part != "route")
    if name == "lavin":
        assert 0 < np.abs(kernel["route"]).max() <= 64**-0.5
    np.testing.assert_array_equal(still, x if name == "llava" else 0 * x)
    sizes = sum(a.size for a in jax.tree.leaves(inner))
    assert sizes == style.inner.params(64)


def test_router_dropout_acts_where_there_is_a_key_and_only_there(lavin):
    attached = Attached(SMALL["lavin"].inner, "attn_in", adds=True)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 16)), jnp.float32)
    knobs = {"attn_in": lavin["das"]["block_00"]["attn_in"]}
    compiled = jax.jit(attached)
    plain = compiled(x, knobs)
    dropped = [compiled(x, knobs | {"adapter_key": jax.random.key(k)}) for k in (0, 0, 1)]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert np.abs(dropped[0] - plain).max() > 1e-4 and np.abs(dropped[0] - dropped[2]).max() > 1e-4


def test_adapters_without_parameters_are_named():
    model = LM(DECODER, adapters=adapters.attach(DECODER, SMALL["llama"], DECODER.eps))
    params = jax.eval_shape(LM(DECODER).init, jax.random.key(0))
    with pytest.raises(InputError, match="the adapter 'attn_in' needs parameters"):
        jax.eval_shape(lambda params: model.apply(params, IDS), params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "lora"}, "form must be one of"),
        ({"width": 0}, "width must be above 0"),
        ({"norm": "both"}, "norm must be one of"),
        ({"scale": float("inf")}, "scale must be finite"),
        ({"form": "router", "width": 7}, "groups must divide width=7"),
        ({"form": "router", "norm": "in"}, "are a bottleneck's"),
        ({"form": "residual", "scale": 2.0}, "has no scale"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"init": "zeros"}, "init must be one of"),
    ],
)
def test_adapters_that_are_none_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        AdapterSpec(**{"form": "bottleneck", "width": 4, **changes})


def test_adapter_specs_are_json():
    for style in STYLES.values():
        for spec in (style.inner, style.skip):
            assert AdapterSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(InputError, match="has no field 'widht'"):
        AdapterSpec.from_dict({"form": "router", "widht": 4})
    with pytest.raises(InputError, match="must divide the model's width 15"):
        adapters.init(SMALL["lavin"].inner, jax.random.key(0), 15)
    with pytest.raises(InputError, match="Style.sites must be some of"):
        Style(STYLES["vilt"].inner, ("out",), STYLES["vilt"].skip, False)
