# SPDX-License-Identifier: Apache-2.0
"""Tower, bridge and decoder together, for the projector and the three forms of cross-attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from vtjax import methods, models, spec, weights
from vtjax.account import flops, params
from vtjax.data import question_loader
from vtjax.errors import InputError
from vtjax.methods import dpn, ltmp
from vtjax.models import bridge, lora
from vtjax.models.lm import LM
from vtjax.models.vlm import VLM
from vtjax.ops import cross_attention
from vtjax.ops.cross_attention import Memory
from vtjax.spec import BridgeSpec, CrossSpec, LMSpec, LoRASpec, ViTSpec, VLMSpec
from vtjax.weights import names

TOWER = ViTSpec.uniform(depth=2, width=12, heads=2, mlp=16, image_size=8, patch=4, feature_layer=-2)
TEXT = LMSpec.uniform(depth=2, width=16, heads=4, kv_heads=2, mlp=24, vocab=29, context=40)
IMAGE, NEW = 5, 3
FORMS = {
    "projector": BridgeSpec(hidden=20),
    "flamingo": BridgeSpec("none", cross=CrossSpec.flamingo((0,), 16, 2, 6)),
    "hyper": BridgeSpec(hidden=16, cross=CrossSpec.hyper((1,))),
    "fused": BridgeSpec(hidden=16, cross=CrossSpec.fused((1,))),
    "mllama": BridgeSpec("linear", prefix=True, cross=CrossSpec.mllama((1,), 4, 2, 4, 24)),
}
IMAGES = np.random.default_rng(0).normal(size=(2, 2, 8, 8, 3)).astype(np.float32)
IMAGE_MASK = np.array([[1, 1], [1, 0]])


def described(form):
    text = TEXT.edit(blocks={1: {"attn": False, "ffn": False}}) if form == "mllama" else TEXT
    return VLMSpec(TOWER, FORMS[form], text, IMAGE)


def texts(model_spec, room=0):
    """Two texts, of two images and of one, padded right."""
    run, words = [IMAGE] * model_spec.placeholders, iter(np.random.default_rng(1).integers(6, 29, 99).tolist())
    made = [[next(words), *run, next(words), *run, next(words)], [next(words), *run, next(words), next(words)]]
    width = max(map(len, made)) + room
    ids, mask = np.full((2, width), 7, np.int32), np.zeros((2, width), np.int32)
    for row, text in enumerate(made):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    return ids, mask


@pytest.fixture(scope="module", params=FORMS)
def made(request):
    """(spec, model, parameters, jitted apply); gates open."""
    model_spec = described(request.param)
    model = models.build(model_spec)

    @jax.jit
    def apply(params, ids, mask, images):
        return model.apply(params, ids, images, mask, image_mask=IMAGE_MASK)[0]

    return model_spec, model, drawn(model_spec), apply


def drawn(model_spec):
    """Parameters at random, which a compile of `init` would take seconds for."""
    noise = np.random.default_rng(2)
    flat = {name: 0.3 * noise.normal(size=shape).astype(np.float32) for name, shape in names.shapes(model_spec).items()}
    return names.unflatten({name: a + (name.endswith("scale")) for name, a in flat.items()})


def test_the_spec_names_every_parameter_and_survives_json(made):
    model_spec, model, _, _ = made
    fresh = dict(names.flatten(jax.eval_shape(model.init, jax.random.key(0))))
    assert {n: a.shape for n, a in fresh.items()} == names.shapes(model_spec)
    assert params.count(model_spec) == params.count(fresh)
    again = spec.from_json(model_spec.to_json())
    assert again == model_spec and again.edit(image_token=6).diff(model_spec) == {"image_token": (6, 5)}


def test_texts_depend_on_their_own_images_only(made):
    model_spec, _, weights, apply = made
    ids, mask = texts(model_spec, NEW)
    y = np.asarray(apply(weights, ids, mask, IMAGES))
    first = model_spec.placeholders + 1  # what comes before the first image sees none
    spoilt = np.stack([np.stack([IMAGES[0, 0], -IMAGES[0, 1]]), np.stack([IMAGES[1, 0], IMAGES[1, 1] + 9])])
    other = np.asarray(apply(weights, ids, mask, spoilt))
    np.testing.assert_array_equal(y[1][mask[1] > 0], other[1][mask[1] > 0])  # its second image is filling
    np.testing.assert_array_equal(y[0, : first + 1], other[0, : first + 1])
    assert np.abs(y[0] - other[0])[mask[0] > 0][-1].max() > 1e-3
    assert np.abs(y[0] - np.asarray(apply(weights, ids, mask, IMAGES[:, ::-1]))[0])[first].max() > 1e-3


def test_generation_over_the_cache_is_full_recomputation_token_for_token(made):
    model_spec, model, weights, apply = made
    ids, mask = texts(model_spec)
    tokens, _ = model.generate(weights, ids, IMAGES, mask, image_mask=IMAGE_MASK, new_tokens=NEW)
    left = [np.stack([np.roll(row, -kept.sum()) for row, kept in zip(a, mask, strict=True)]) for a in (ids, mask)]
    again, _ = model.generate(weights, left[0], IMAGES, left[1], image_mask=IMAGE_MASK, new_tokens=NEW)
    assert again.tolist() == tokens.tolist()
    grown, alive = texts(model_spec, NEW)
    for _ in range(NEW):
        y = np.asarray(apply(weights, grown, alive, IMAGES))
        for row, at in enumerate(alive.sum(1)):
            grown[row, at], alive[row, at] = y[row, at - 1].argmax(), 1
    assert tokens.tolist() == [row[kept > 0][-NEW:].tolist() for row, kept in zip(grown, alive, strict=True)]


def crossed(cross, depth):
    """(decoder, its parameters, ids, memory) with two images in every text, which is at 2 and 4."""
    text = TEXT.edit(blocks=TEXT.blocks[:1] * depth)
    one = dataclasses.replace(described("hyper"), decoder=text, bridge=BridgeSpec(hidden=16, cross=cross))
    ids = np.random.default_rng(3).integers(6, 29, (2, 6)).astype(np.int32)
    ids[:, [2, 4]] = IMAGE
    low, high = cross_attention.interval(jnp.asarray(ids == IMAGE), cross.sees)
    number = jnp.array([[1, 1, 2, 2], [1, 2, 2, 0]])
    memory = Memory(jax.random.normal(jax.random.key(1), (2, 4, 16)), number, 2 * number, low, high)
    return VLM(one).lm, VLM(one).decoder_params(drawn(one)), ids, memory


class Drop:
    """Removes the last token of an image from what is alive."""

    def __call__(self, tokens, aux, knobs):
        return tokens.replace(alive=jnp.ones(tokens.x.shape[:2]).at[:, -1].set(0.0)), {}


def test_tokens_that_the_tower_drops_are_not_read():
    """Cross-attention leaves them out; in a text each has its place."""
    model_spec = described("flamingo")
    reduced = VLM(model_spec, tower_reducers=((0, Drop()),))
    weights = drawn(model_spec)
    ids, _ = texts(model_spec)
    entered = jax.jit(lambda p: reduced.enter(p, ids, IMAGES, IMAGE_MASK)[0]["memory"])(weights)
    assert entered.number.tolist() == [[1, 1, 1, 0, 2, 2, 2, 0], [1, 1, 1, 0, 0, 0, 0, 0]]
    assert entered.position[0].tolist() == [1] * 4 + [3] * 4
    with pytest.raises(
        InputError, match="must come after its last cross-attention, .*layer 1, found one after layer 0"
    ):
        VLM(described("hyper"), reducers=((0, Drop()),))
    with_prefix = dataclasses.replace(described("projector"), bridge=BridgeSpec(hidden=20, prefix=True))
    with pytest.raises(InputError, match="gives its patches back, found a bridge with prefix=True"):
        VLM(with_prefix, tower_reducers=((0, Drop()),))


@pytest.mark.parametrize("pools", [False, True])
def test_a_pruning_tower_gives_its_grid_back_and_pruned_patches_are_dead(pools):
    """LTMP before a projector, and DPN on what is left: the text without those placeholders says the same."""
    tower, thresholds = ltmp.install(TOWER.edit(image_size=(16, 16)), variant="ltmp", merge_threshold=0.9)
    one = dataclasses.replace(described("projector"), tower=tower)
    deep = LMSpec.uniform(depth=4, width=16, heads=4, kv_heads=2, mlp=24, vocab=29, context=60)
    one = dataclasses.replace(one, decoder=deep)
    images = np.random.default_rng(5).normal(size=(2, 16, 16, 3)).astype(np.float32)
    ids = np.full((2, 16 + 5), IMAGE, np.int32)
    ids[:, [0, 17, 18, 19, 20]] = np.random.default_rng(6).integers(6, 29, (2, 5))
    knobs = {}
    if pools:
        one, _ = dpn.install(one, None, jax.random.key(0), at=(2,), gate="off", least=1)
        ids[:, 19], knobs = one.router_token, dpn.forced(one, (2,))
    weights = drawn(one.unreduced())
    weights["tower"]["ltmp"] = {**thresholds, "prune_threshold": np.full(2, 0.055, np.float32)}
    if pools:
        weights["decoder"]["dpn"] = dpn.fresh(one, jax.random.key(1))
    model = methods.build(one)
    y, aux = jax.jit(lambda p: model.apply(p, ids, images, knobs=knobs))(weights)
    entered, _ = jax.jit(lambda p: model.enter(p, ids, images))(weights)
    there = np.asarray(entered["attention_mask"])
    assert 4 < there.sum() - 10 < 30 and there[:, [0, 17, 18, 19, 20]].all()
    if pools:
        left = np.asarray(aux["tokens"].alive) > 0
        assert (left.sum(1) < there.sum(1)).all() and (left.sum(1) >= 5 + 1).all()
        return
    for row in range(2):
        kept = entered["embeddings"][row : row + 1, there[row] > 0]
        alone, _ = jax.jit(lambda p, x: model.lm.apply(p, embeddings=x))(model.decoder_params(weights), kept)
        np.testing.assert_allclose(np.asarray(y)[row][there[row] > 0], alone[0], atol=2e-5)
    tokens, _ = model.generate(weights, ids, images, new_tokens=2)
    assert tokens[:, 0].tolist() == np.asarray(y)[:, -1].argmax(-1).tolist()


def test_a_closed_gate_leaves_the_decoder_alone():
    """Gates of 0: the decoder says what it would alone; and they learn."""
    lm, weights, ids, memory = crossed(CrossSpec.flamingo((0,), 16, 2, 6), 1)
    cross = {**weights["block_00"]["cross"], "gate1": np.zeros(1, np.float32), "gate2": np.zeros(1, np.float32)}
    weights["block_00"] = {**weights["block_00"], "cross": cross}

    def said(p, memory):
        y = lm.apply(p, ids, memory=memory)[0]
        return y.sum(), y

    grads, y = jax.jit(jax.grad(said, has_aux=True))(weights, memory)
    np.testing.assert_array_equal(y, jax.jit(lambda p: lm.apply(p, ids)[0])(weights))
    assert abs(float(grads["block_00"]["cross"]["gate1"][0])) > 1e-3


@pytest.mark.slow
def test_remat_and_scan_change_nothing():
    """Three equal layers, of which the last has cross-attention; the memory goes past the others."""
    lm, weights, ids, memory = crossed(CrossSpec.hyper((2,)), 3)
    found = []
    for model in (lm, dataclasses.replace(lm, remat="full", scan=True)):

        def loss(p, x, model=model):
            seen = dataclasses.replace(memory, x=x)
            return (model.apply(p, ids, memory=seen)[0] ** 2).mean()

        found.append(jax.jit(jax.value_and_grad(loss, (0, 1)))(weights, memory.x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), *found)


def test_low_rank_updates_change_nothing_at_first_and_merge_into_the_weights():
    plain_params = drawn(TEXT)
    edited = lora.install(TEXT, LoRASpec(2, 4.0, ("query", "down")))
    updated = lora.add(edited, plain_params, jax.random.key(4))
    ids = np.arange(12, dtype=np.int32).reshape(2, 6)
    run = jax.jit(lambda p: LM(edited).apply(p, ids)[0])
    plain = jax.jit(lambda p: LM(TEXT).apply(p, ids)[0])
    np.testing.assert_array_equal(run(updated), plain(plain_params))
    assert {n: a.shape for n, a in names.flatten(updated)} == names.shapes(edited)
    moved = jax.tree.map(lambda a: a + 0.1, updated)
    merged_spec, merged = lora.merge(edited, moved)
    np.testing.assert_allclose(plain(merged), run(moved), atol=2e-5)
    assert merged_spec.lora is None and [step.operation for step in merged_spec.lineage] == [
        "lora.install",
        "lora.merge",
    ]
    with pytest.raises(InputError, match="only low-rank updates can be merged"):
        lora.merge(TEXT, plain_params)
    with pytest.raises(InputError, match="low-rank updates once, found some"):
        lora.install(edited, LoRASpec(2, 4.0))


def test_a_file_holds_the_whole_model(tmp_path):
    model_spec = described("mllama")
    made = drawn(model_spec)
    weights.save(tmp_path / "vlm.safetensors", model_spec, made)
    again, loaded = weights.load(tmp_path / "vlm.safetensors")
    assert again == model_spec
    jax.tree.map(np.testing.assert_array_equal, loaded, made)
    for layout in ("hf", "timm"):
        with pytest.raises(InputError, match="layout"):
            weights.save(tmp_path / "folder", model_spec, made, layout=layout)


GOOD = {"input_ids": texts(described("projector"))[0], "images": IMAGES, "image_mask": IMAGE_MASK}


@pytest.mark.parametrize(
    "change,says",
    [
        ({"image_mask": None}, r"text 1 must hold 4 placeholders \(token 5\) for each of its 2 images, found 4"),
        ({"images": None, "image_mask": None}, "for each of its 0 images, found 8"),
        ({"image_mask": np.array([[1, 1], [0, 1]])}, "before what fills it up"),
        ({"image_mask": np.array([[2, 0], [1, 0]])}, "image_mask must be 0 or 1, found 2"),
        ({"image_mask": np.ones((2, 3), int)}, r"image_mask must be \[2, 2\], found \[2, 3\]"),
        ({"images": IMAGES[:, :, :4]}, r"images must be \[2, 8, 8, 3\], .*found \[2, 2, 4, 8, 3\]"),
        ({"images": IMAGES[:1]}, r"images must be \[2, .*found \[1, "),
        ({"input_ids": GOOD["input_ids"] + 25}, r"must be in 0\.\.28 \(the vocabulary\), found"),
    ],
)
def test_bad_inputs_are_one_line(change, says):
    with pytest.raises(InputError, match=says) as caught:
        VLM(described("projector")).check(**{**GOOD, **change})
    assert "\n" not in str(caught.value)


def test_packed_texts_share_their_images():
    """With cross-attention: an image behind the prefix would be seen by the texts after it."""
    model = VLM(described("flamingo"))
    ids = np.array([[IMAGE, 8, 9, IMAGE, 8, 9]])
    shared, own = np.array([[0, 1, 1, 0, 2, 2]]), np.array([[0, 1, 1, 2, 2, 2]])
    places = jax.jit(lambda s: model._shared(jnp.asarray(ids == IMAGE), s))
    assert places(shared).tolist() == [[True, False, False, True, False, False]]
    assert places(own).tolist() == [[True, False, False, False, False, False]]
    with pytest.raises(InputError, match="their images in the shared prefix"):
        model.enter(drawn(model.spec), ids, IMAGES[:1], segments=own)


def test_a_prompt_longer_than_the_context_is_refused():
    model = VLM(described("projector"))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, np.float32), shapes)
    with pytest.raises(InputError, match="must fit the model's context of 40, found 11 and 39"):
        model.generate(zeros, **GOOD, new_tokens=40)


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
        (lambda: BridgeSpec(hidden=3, pool=(0, 1)), "BridgeSpec.pool must be two numbers of patches"),
        (lambda: BridgeSpec(hidden=3, prefix=True, pool=(1, 2)), r"\(1, 1\) with prefix=True, found \(1, 2\)"),
        (
            lambda: VLMSpec(TOWER, BridgeSpec(hidden=4, pool=(1, 4)), TEXT, 5),
            r"must divide the grid 2 x 2, found \(1, 4\)",
        ),
        (lambda: BridgeSpec("linear", hidden=3), "hidden is the width inside projector='mlp'"),
        (lambda: LoRASpec(0, 1.0), "rank above 0"),
        (lambda: LoRASpec(1, 1.0, ("head",)), "sites must be some of"),
    ],
)
def test_specs_that_no_model_can_have_are_refused(make, says):
    with pytest.raises(InputError, match=says):
        make()


@functools.partial(jax.jit, static_argnums=0)
def answers(model, params, batch):
    text = {name: batch[name] for name in ("positions", "segments")}
    slots = jnp.maximum(batch["learned"], 0)
    return model.apply(params, batch["input_ids"], batch["images"], slots=slots, **text)[0]


def arrays(tree):
    return jax.tree.map(jnp.asarray, tree)


def test_patches_pooled_before_the_projector():
    """The mean of what lives in every window; the decoder gets fewer tokens and the work says so."""
    rng = np.random.default_rng(0)
    x, live = rng.normal(size=(2, 48, 3)).astype(np.float32), (rng.random((2, 48)) > 0.4).astype(np.int32)
    live[0, :3] = live[0, 6:9] = 0  # the first window of the first tile is dead
    y, there = (np.asarray(a) for a in bridge.pooled(jnp.asarray(x), jnp.asarray(live), (4, 6), (2, 3)))
    assert y.shape == (2, 8, 3) and not there[0, 0]
    for image, place in np.ndindex(2, 8):
        tile, row, column = place // 4, place % 4 // 2, place % 2
        window = np.s_[tile, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
        inside, kept = (a.reshape(2, 2, 4, 6, -1)[image][window].reshape(6, -1) for a in (x, live))
        assert there[image, place] == kept.any()
        if kept.any():
            np.testing.assert_allclose(y[image, place], inside[kept[:, 0] > 0].mean(0), atol=1e-6)
    whole = described("projector")
    one = whole.edit(bridge=dataclasses.replace(whole.bridge, pool=(1, 2)))
    assert (one.grid, one.visual_tokens, whole.visual_tokens) == ((2, 1), 2, 4)
    assert spec.from_json(one.to_json()) == one and flops.macs(one) < flops.macs(whole)
    images, ids = jnp.asarray(IMAGES[:, :1]), np.array([[9, IMAGE, IMAGE, 10]] * 2, np.int32)
    assert VLM(one).apply(arrays(drawn(one)), ids, images)[0].shape == (2, 4, 29)
    # A linear projector and the mean change places.
    straight = one.edit(bridge=dataclasses.replace(one.bridge, projector="linear", hidden=0))
    params, every = arrays(drawn(straight)), straight.edit(bridge=dataclasses.replace(straight.bridge, pool=(1, 1)))
    fewer, all_of_them = (np.asarray(VLM(s).look(params, images)[0]) for s in (straight, every))
    np.testing.assert_allclose(fewer, all_of_them.reshape(2, 2, 2, -1).mean(2), atol=1e-5)


def test_rows_of_the_question_loader_answer_packed_as_alone():
    """The arrays of a batch through the whole model: each question's logits are those of a row of its own."""
    config = common.questions(name="marked_shapes", n=16, size=48, prefetch=0)
    tower = ViTSpec.uniform(depth=1, width=12, heads=2, mlp=16, image_size=24, patch=8)
    found = {}
    for pack in (15, 1):
        config.pack = pack
        options = {"seed": 0, "batch_size": 4 if pack > 1 else 60, "image_size": (24, 24), "visual_tokens": 9}
        data, words = question_loader.from_config(config, **options)
        text = LMSpec.uniform(depth=2, width=16, heads=4, kv_heads=2, mlp=24, vocab=words.vocabulary, context=200)
        one = VLMSpec(tower, BridgeSpec(hidden=20), text, words.image)
        batch = next(data.eval())
        names_of = ("input_ids", "images", "positions", "segments", "learned")
        given = {name: batch[name] for name in names_of}

        y = np.asarray(answers(VLM(one), drawn(one), given))
        for row, asked in enumerate(batch["question"]):
            for place, number in enumerate(asked.tolist()):
                own = (batch["learned"][row] >= 0) & (batch["segments"][row][batch["learned"][row]] == place + 1)
                if number >= 0:
                    found.setdefault(number, []).append(y[row, own])
    both = [pair for pair in found.values() if len(pair) == 2]
    assert len(both) >= 30
    for packed, alone in both:
        assert packed.shape == alone.shape and len(packed) >= 2 and np.abs(packed).max() > 0.1
        np.testing.assert_allclose(packed, alone, rtol=0, atol=2e-5 * np.abs(alone).max())


@pytest.mark.parametrize("made", ["projector", "mllama"], indirect=True)
def test_bfloat16_says_about_what_float32_says(made):
    model_spec, model, weights, apply = made
    ids, mask = texts(model_spec)
    half = dataclasses.replace(model, dtype=jnp.bfloat16)
    y = np.asarray(apply(weights, ids, mask, IMAGES))[mask > 0]
    small, aux = jax.jit(lambda p: half.apply(p, ids, IMAGES, mask, image_mask=IMAGE_MASK))(weights)
    assert small.dtype == jnp.float32 and aux["visual"].dtype == jnp.bfloat16
    error = np.abs(np.asarray(small)[mask > 0] - y).max() / np.abs(y).max()
    assert 1e-5 < error < 0.05
    tokens, count = half.generate(weights, ids, IMAGES, mask, image_mask=IMAGE_MASK, new_tokens=NEW)
    assert tokens.shape == (2, NEW) and count.tolist() == [NEW, NEW]
    # The cache holds what a whole pass computes: the first token is its argmax wherever that is clear.
    last = np.asarray(small)[np.arange(2), mask.sum(1) - 1]
    clear = np.diff(np.sort(last)[:, -2:])[:, 0] > 0.1
    assert clear.any() and (np.asarray(tokens)[clear, 0] == last.argmax(-1)[clear]).all()
