# SPDX-License-Identifier: Apache-2.0
"""Tower, bridge and decoder together, for the projector and the three forms of cross-attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtjax import models, spec, weights
from vtjax.errors import InputError
from vtjax.models import lora
from vtjax.models.lm import LM
from vtjax.models.vlm import VLM
from vtjax.spec import BridgeSpec, CrossSpec, LMSpec, LoRASpec, ViTSpec, VLMSpec
from vtjax.weights import names

TOWER = ViTSpec.uniform(depth=2, width=12, heads=2, mlp=16, image_size=8, patch=4, feature_layer=-2)
TEXT = LMSpec.uniform(depth=2, width=16, heads=4, kv_heads=2, mlp=24, vocab=29, context=40)
IMAGE, NEW = 5, 3
FORMS = {
    "projector": BridgeSpec(hidden=20),
    "flamingo": BridgeSpec("none", cross=CrossSpec.flamingo((0,), 16, 2, 6)),
    "hyper": BridgeSpec(hidden=16, cross=CrossSpec.hyper((1,))),
    "mllama": BridgeSpec("linear", prefix=True, cross=CrossSpec.mllama((1,), 4, 2, 4, 24)),
}
IMAGES = np.random.default_rng(0).normal(size=(2, 2, 8, 8, 3)).astype(np.float32)
IMAGE_MASK = np.array([[1, 1], [1, 0]])


def described(form):
    text = TEXT.edit(blocks={1: {"attn": False, "ffn": False}}) if form == "mllama" else TEXT
    return VLMSpec(TOWER, FORMS[form], text, IMAGE)


def texts(model_spec, length=0):
    """Two texts, of two images and of one."""
    run, words = [IMAGE] * model_spec.placeholders, iter(np.random.default_rng(1).integers(6, 29, 99).tolist())
    made = [[next(words), *run, next(words), *run, next(words)], [next(words), *run, next(words), next(words)]]
    width = length or max(map(len, made))
    ids, mask = np.full((2, width), 7, np.int32), np.zeros((2, width), np.int32)
    for row, text in enumerate(made):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    return ids, mask


@pytest.fixture(scope="module", params=FORMS)
def made(request):
    """(spec, model, parameters, jitted apply); gates open."""
    model_spec = described(request.param)
    model = models.build(model_spec)
    params = jax.jit(model.init)(jax.random.key(0))
    params = jax.tree.map(
        lambda a: a + 0.3 * np.random.default_rng(a.size).normal(size=a.shape).astype(np.float32), params
    )

    @jax.jit
    def apply(params, ids, mask, images=IMAGES, image_mask=IMAGE_MASK):
        return model.apply(params, ids, images, mask, image_mask=image_mask)[0]

    return model_spec, model, params, apply


def test_the_spec_names_every_parameter_and_survives_json(made):
    model_spec, _, params, _ = made
    flat = dict(names.flatten(params))
    assert {n: a.shape for n, a in flat.items()} == names.shapes(model_spec)
    again = spec.from_json(model_spec.to_json())
    assert again == model_spec and again.edit(image_token=6).diff(model_spec) == {"image_token": (6, 5)}


def test_texts_depend_on_their_own_images_only(made):
    model_spec, _, params, apply = made
    ids, mask = texts(model_spec)
    y = np.asarray(apply(params, ids, mask))
    first = model_spec.placeholders + 1  # what comes before the first image sees none
    spoilt = np.stack([np.stack([IMAGES[0, 0], -IMAGES[0, 1]]), np.stack([IMAGES[1, 0], IMAGES[1, 1] + 9])])
    other = np.asarray(apply(params, ids, mask, spoilt))
    np.testing.assert_array_equal(y[1][mask[1] > 0], other[1][mask[1] > 0])  # its second image is filling
    np.testing.assert_array_equal(y[0, : first + 1], other[0, : first + 1])
    assert np.abs(y[0] - other[0])[-1].max() > 1e-3
    assert np.abs(y[0] - np.asarray(apply(params, ids, mask, IMAGES[:, ::-1]))[0])[first].max() > 1e-3


def test_generation_over_the_cache_is_full_recomputation_token_for_token(made):
    model_spec, model, params, apply = made
    ids, mask = texts(model_spec)
    tokens, _ = model.generate(params, ids, IMAGES, mask, image_mask=IMAGE_MASK, new_tokens=NEW)
    width = ids.shape[1] + NEW
    grown, alive = texts(model_spec, width)
    for _ in range(NEW):
        y = np.asarray(apply(params, grown, alive))
        for row, at in enumerate(alive.sum(1)):
            grown[row, at], alive[row, at] = y[row, at - 1].argmax(), 1
    ends = [row[m > 0][-NEW:].tolist() for row, m in zip(grown, alive, strict=True)]
    assert tokens.tolist() == ends


def test_a_closed_gate_leaves_the_decoder_alone():
    """Fresh gates are 0: the text model of the block forms says what it would alone."""
    model_spec = described("flamingo")
    params = jax.jit(VLM(model_spec).init)(jax.random.key(1))
    ids, mask = texts(model_spec)
    y, _ = jax.jit(lambda p: VLM(model_spec).apply(p, ids, IMAGES, mask, image_mask=IMAGE_MASK))(params)
    alone, _ = jax.jit(lambda p: LM(TEXT).apply(p, ids, mask))(params["decoder"])
    np.testing.assert_array_equal(y, alone)
    grads = jax.jit(jax.grad(lambda p: VLM(model_spec).apply(p, ids, IMAGES, mask, image_mask=IMAGE_MASK)[0].sum()))(
        params
    )
    assert float(jnp.abs(grads["bridge"]["block_00"]["gate1"])[0]) > 0


def test_remat_and_scan_change_nothing():
    """Four equal layers, of which one has cross-attention."""
    text = TEXT.edit(blocks=TEXT.blocks * 2)
    model_spec = dataclasses.replace(described("hyper"), decoder=text)
    params = jax.jit(VLM(model_spec).init)(jax.random.key(2))
    ids, mask = texts(model_spec)
    found = []
    for options in ({}, {"remat": "full", "scan": True}):
        model = VLM(model_spec, **options)

        def loss(p, model=model):
            return (model.apply(p, ids, IMAGES, mask, image_mask=IMAGE_MASK)[0] ** 2).mean()

        found.append(jax.jit(jax.value_and_grad(loss))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), *found)


def test_low_rank_updates_change_nothing_at_first_and_merge_into_the_weights():
    params = jax.jit(LM(TEXT).init)(jax.random.key(3))
    edited, updated = lora.add(TEXT, params, LoRASpec(2, 4.0, ("query", "down")), jax.random.key(4))
    ids = np.arange(12, dtype=np.int32).reshape(2, 6)
    run = jax.jit(lambda p: LM(edited).apply(p, ids)[0])
    plain = jax.jit(lambda p: LM(TEXT).apply(p, ids)[0])
    np.testing.assert_array_equal(run(updated), plain(params))
    assert {n: a.shape for n, a in names.flatten(updated)} == names.shapes(edited)
    moved = jax.tree.map(lambda a: a + 0.1, updated)
    merged_spec, merged = lora.merge(edited, moved)
    np.testing.assert_allclose(plain(merged), run(moved), atol=2e-5)
    assert merged_spec.lora is None and [step.operation for step in merged_spec.lineage] == ["lora.add", "lora.merge"]
    for function, argument in ((lora.merge, ()), (lora.add, (LoRASpec(2, 4.0), jax.random.key(0)))):
        with pytest.raises(InputError, match="updates"):
            function(*((TEXT, params) if function is lora.merge else (edited, updated)), *argument)


def test_a_file_holds_the_whole_model(tmp_path):
    model_spec = described("mllama")
    params = jax.jit(VLM(model_spec).init)(jax.random.key(5))
    weights.save(tmp_path / "vlm.safetensors", model_spec, params)
    again, loaded = weights.load(tmp_path / "vlm.safetensors")
    assert again == model_spec
    jax.tree.map(np.testing.assert_array_equal, loaded, jax.tree.map(np.asarray, params))
    for layout in ("hf", "timm"):
        with pytest.raises(InputError, match="layout"):
            weights.save(tmp_path / "folder", model_spec, params, layout=layout)


GOOD = {"input_ids": texts(described("projector"))[0], "images": IMAGES, "image_mask": IMAGE_MASK}


@pytest.mark.parametrize(
    "change,says",
    [
        ({"image_mask": None}, r"text 1 must hold 4 placeholders \(token 5\) for each of its 2 images, found 4"),
        ({"images": None, "image_mask": None}, "for each of its 0 images, found 8"),
        ({"image_mask": np.array([[1, 1], [0, 1]])}, "before what fills it up"),
        ({"image_mask": np.ones((2, 3), int)}, r"image_mask must be \[2, 2\], found \[2, 3\]"),
        ({"images": IMAGES[:, :, :4]}, r"images must be \[2, 8, 8, 3\], .*found \[2, 2, 4, 8, 3\]"),
        ({"images": IMAGES[:1]}, r"images must be \[2, .*found \[1, "),
        ({"input_ids": GOOD["input_ids"] + 25}, r"must be in 0\.\.28 \(the vocabulary\), found"),
        ({"new_tokens": 40}, "must fit the model's context of 40, found 12 and 39"),
    ],
)
def test_bad_inputs_are_one_line(change, says):
    model_spec = described("projector")
    params = jax.eval_shape(VLM(model_spec).init, jax.random.key(0))
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, np.float32), params)
    with pytest.raises(InputError, match=says) as caught:
        VLM(model_spec).generate(zeros, **{"new_tokens": 1, **GOOD, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make,says",
    [
        (lambda: VLMSpec(TOWER, FORMS["projector"], TEXT, -1), "image_token must be 0 or more"),
        (lambda: VLMSpec(TOWER, FORMS["flamingo"], TEXT, 29), "below 29 where the decoder reads it, found 29"),
        (
            lambda: VLMSpec(TOWER, BridgeSpec(hidden=4, cross=CrossSpec.hyper((2,))), TEXT, 5),
            r"layers must be in 0\.\.1",
        ),
        (lambda: VLMSpec(TOWER, BridgeSpec("none", cross=CrossSpec.hyper((1,))), TEXT, 5), "must be 16 wide, found 12"),
        (lambda: VLMSpec(TOWER, BridgeSpec("none"), TEXT, 5), "tower of the decoder's width 16, found 12"),
        (lambda: described("mllama").edit(bridge=FORMS["hyper"]), "needs self-attention at layer 1"),
        (lambda: CrossSpec.flamingo((1, 0), 16), "layers must ascend"),
        (lambda: CrossSpec.mllama((1,), 4, 3, 4, 8), "kv_heads that divide heads"),
        (lambda: BridgeSpec("linear", hidden=3), "hidden is the width inside projector='mlp'"),
        (lambda: LoRASpec(0, 1.0), "rank above 0"),
        (lambda: LoRASpec(1, 1.0, ("head",)), "sites must be some of"),
        (lambda: VLM(TEXT), "built from a VLMSpec, found LMSpec"),
    ],
)
def test_specs_that_no_model_can_have_are_refused(make, says):
    with pytest.raises(InputError, match=says):
        make()
