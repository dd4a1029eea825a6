# SPDX-License-Identifier: Apache-2.0
"""The tiled tower, alone and in a multimodal model; its numbers are compared with transformers' in tests/weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtjax import answer, models, spec, weights
from vtjax.account import params
from vtjax.errors import InputError
from vtjax.models.tiled import TiledViT
from vtjax.models.vlm import VLM
from vtjax.spec import BridgeSpec, CrossSpec, LMSpec, TextSpec, TiledViTSpec, VLMSpec
from vtjax.weights import names

TOWER = TiledViTSpec.uniform(
    depth=2, global_blocks=1, width=8, heads=2, mlp=12, image_size=8, patch=4, tiles=4, features=(1,)
)
TEXT = LMSpec.uniform(depth=2, width=16, heads=4, kv_heads=2, mlp=24, vocab=29, context=40)
CROSS = CrossSpec.mllama((1,), 4, 2, 4, 24)
MODEL = VLMSpec(
    TOWER, BridgeSpec("linear", prefix=True, cross=CROSS), TEXT.edit(blocks={1: {"attn": False, "ffn": False}}), 5
)
IMAGES = np.random.default_rng(0).normal(size=(2, 2, 4, 8, 8, 3)).astype(np.float32)
IDS = np.array([[5, 9, 5, 7, 8, 11], [5, 12, 6, 7, 9, 10]], np.int32)
RATIO = np.array([[7, 1], [6, 0]], np.int32)


def drawn(model_spec):
    noise = np.random.default_rng(2)
    flat = {name: 0.3 * noise.normal(size=shape).astype(np.float32) for name, shape in names.shapes(model_spec).items()}
    return names.unflatten({name: a + (name.endswith("scale")) for name, a in flat.items()})


@pytest.fixture(scope="module")
def made():
    """(model, parameters, jitted look)."""
    model = models.build(MODEL)
    return model, drawn(MODEL), jax.jit(model.look)


def test_the_spec_names_every_parameter_and_survives_json():
    for one, model in ((TOWER, models.build(TOWER)), (MODEL, models.build(MODEL))):
        fresh = dict(names.flatten(jax.eval_shape(model.init, jax.random.key(0))))
        assert {n: a.shape for n, a in fresh.items()} == names.shapes(one)
        assert params.count(one) == params.count(fresh)
        assert spec.from_json(one.to_json()) == one
    assert MODEL.edit(tower=TOWER.edit(eps=0.5)).diff(MODEL) == {"tower.eps": (0.5, 1e-5)}
    assert MODEL.unreduced() == MODEL and MODEL.visual_tokens == 20 and MODEL.placeholders == 1


def test_a_file_holds_the_tower_alone(tmp_path):
    values = drawn(TOWER)
    weights.save(tmp_path / "tower.safetensors", TOWER, values)
    again, loaded = weights.load(tmp_path / "tower.safetensors")
    assert again == TOWER
    jax.tree.map(np.testing.assert_array_equal, loaded, values)
    for layout in ("hf", "timm"):
        with pytest.raises(InputError, match="layout"):
            weights.save(tmp_path / "folder", TOWER, values, layout=layout)


def test_tiles_that_an_image_lacks_are_not_read(made):
    model, values, look = made
    visual, live, _ = look(values, IMAGES, RATIO)
    live = live.reshape(len(live), -1)
    assert live[0].tolist() == [1] * 15 + [0] * 5 + [1] * 5 + [0] * 15 and live[1].tolist() == [1] * 20 + [0] * 20
    number = jax.eval_shape(lambda p: model.enter(p, IDS, IMAGES, aspect_ratio=RATIO)[0]["memory"].number, values)
    assert number.shape == live.shape and visual.shape == (2, 40, 16)


def test_a_picture_of_a_question_is_cut_into_tiles():
    asked = {}

    class Listening:
        spec = MODEL.edit(text=TextSpec("words", ("what", "?")))

        def generate(self, params, input_ids, images, attention_mask, **options):
            asked.update(options, shape=images.shape)
            return np.zeros((1, 1), np.int32), np.zeros(1, np.int32)

    answer.answer(Listening(), {}, np.zeros((30, 9, 3), np.uint8), "what?", new_tokens=1)
    assert asked["shape"] == (1, 1, 4, 8, 8, 3) and asked["aspect_ratio"].tolist() == [[8]]


def test_patches_alone_may_reach_the_decoder(made):
    _, values, look = made
    edited = MODEL.edit(bridge=dataclasses.replace(MODEL.bridge, prefix=False))
    found = jax.jit(VLM(edited).look)(values, IMAGES, RATIO)[:2]
    for whole, part in zip(look(values, IMAGES, RATIO)[:2], found, strict=True):
        kept = np.asarray(whole).reshape(2, 8, 5, -1)[:, :, 1:]
        np.testing.assert_allclose(part, kept.reshape(part.shape), atol=1e-6)


def test_images_without_tiles_are_one_tile_of_the_first_aspect_ratio(made):
    """Tiles that are not given are not projected."""
    model, values, look = made
    images = IMAGES[:, :, 0]
    visual, live, _ = jax.jit(model.look)(values, images)
    lacking = np.pad(IMAGES[:, :, :1], [(0, 0), (0, 0), (0, 3), (0, 0), (0, 0), (0, 0)])
    same, also, _ = look(values, lacking, np.ones((2, 2), np.int32))
    first = np.asarray(same).reshape(2, 2, 4, 5, -1)[:, :, 0]
    np.testing.assert_allclose(visual, first.reshape(visual.shape), atol=1e-6)
    np.testing.assert_array_equal(live, also[:, :, :5])
    assert not np.asarray(also)[:, :, 5:].any()
    ids = np.where(np.arange(6)[None] == 0, 5, 7)
    assert jax.eval_shape(lambda p: model.apply(p, ids, images[:1, 0])[0], values).shape == (1, 6, 29)


def test_generation_over_the_cache_is_full_recomputation(made):
    model, values, _ = made
    tokens, _ = model.generate(values, IDS, IMAGES, aspect_ratio=RATIO, new_tokens=2)
    longer = np.concatenate([IDS, np.asarray(tokens)], axis=1)
    y = jax.jit(lambda p: model.apply(p, longer, IMAGES, aspect_ratio=RATIO)[0])(values)
    np.testing.assert_array_equal(tokens, np.asarray(y)[:, -3:-1].argmax(-1))


def test_remat_and_scan_change_nothing(made):
    _, values, look = made
    other = jax.jit(VLM(MODEL, remat="full", scan=True).look)(values, IMAGES, RATIO)
    np.testing.assert_allclose(other[0], look(values, IMAGES, RATIO)[0], atol=1e-5)


@pytest.mark.parametrize(
    "change,says",
    [
        ({"images": np.zeros((2, 2, 5, 8, 8, 3))}, r"images must have 1\.\.4 tiles, found 5"),
        ({"aspect_ratio": RATIO + 3}, r"aspect_ratio must be in 0\.\.8 \(0 = no image\), found 10"),
        ({"aspect_ratio": RATIO - 1}, r"aspect_ratio must be in 0\.\.8 \(0 = no image\), found -1"),
        ({"images": IMAGES[:, :, :2]}, "aspect_ratio 6 has 2 x 2 tiles, found images of 2"),
        ({"images": IMAGES[..., :4, :]}, r"images must be \[2, 8, 8, 3\], .*found \[2, 2, 4, 8, 4, 3\]"),
        ({"aspect_ratio": None}, r"images of several tiles need aspect_ratio \[2, 2\], found none for 4 tiles"),
        ({"aspect_ratio": RATIO[:, :1]}, r"aspect_ratio must be \[2, 2\], found \[2, 1\]"),
        ({"images": None}, "aspect_ratio belongs to images of a tiled tower"),
        ({"aspect_ratio": RATIO[:, ::-1]}, "what fills it up|placeholders"),
    ],
)
def test_bad_inputs_are_one_line(change, says):
    with pytest.raises(InputError, match=says) as caught:
        VLM(MODEL).check(**{"input_ids": IDS, "images": IMAGES, "aspect_ratio": RATIO, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make,says",
    [
        (lambda: TOWER.edit(image_size=(8, 9)), r"positive multiple of patch=4, found \(8, 9\)"),
        (lambda: TOWER.edit(tiles=0), "tiles must be positive, found 0"),
        (lambda: TOWER.edit(global_blocks=3), "global_blocks must be at least 1 and leave a local one of 3, found 3"),
        (lambda: TOWER.edit(features=(3,)), r"features must ascend within 0\.\.2 \(the local layers\), found \(3,\)"),
        (lambda: TOWER.edit(features=(1, 0)), r"features must ascend .*found \(1, 0\)"),
        (lambda: TOWER.edit(eps=-1.0), "eps must be 0 or more"),
        (lambda: TOWER.edit(activation="relu"), "activation must be one of"),
        (lambda: TOWER.edit(blocks={0: {"reduce": "ltmp"}}), "must not reduce tokens"),
        (lambda: TiledViTSpec.uniform(depth=1, global_blocks=1, width=9, heads=2), "multiple of heads, found width=9"),
        (lambda: MODEL.edit(bridge=BridgeSpec(hidden=8)), "a TiledViTSpec needs BridgeSpec.cross"),
        (lambda: VLM(MODEL, tower_adapters=((0, "out", jnp.tanh),)), "a tiled tower takes no reducers and adapters"),
        (
            lambda: TiledViT(TOWER).apply({}, np.zeros((2, 8, 4, 3))),
            r"\[..., tiles, 8, 8, 3\], found \[2, 1, 8, 4, 3\]",
        ),
    ],
)
def test_what_no_tower_can_have_is_refused(make, says):
    with pytest.raises(InputError, match=says):
        make()
