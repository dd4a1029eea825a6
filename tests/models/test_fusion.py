# SPDX-License-Identifier: Apache-2.0
"""Fusion encoders: skipped while running or for good, with gradients where they belong; bad input."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtjax.errors import InputError
from vtjax.methods import das
from vtjax.models import ViT, build
from vtjax.models.fusion import Fusion
from vtjax.models.segments import block_name
from vtjax.ops import bandit
from vtjax.spec import FusionSpec, from_json, skip_list
from vtjax.train import optim
from vtjax.train.state import flatten
from vtjax.weights import names

SPECS = {1: FusionSpec.small(1, depth=2, width=16, classes=5), 2: FusionSpec.small(2, depth=1, width=16, classes=5)}
IDS = np.arange(12).reshape(2, 6) % 128
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
FEATURES = [np.random.default_rng(n).normal(size=(2, n, 16)).astype(np.float32) for n in (6, 9)]
IMAGES = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)


class Case:
    """A model with random parameters, also where they start at 0, and its compiled passes: of its fusion layers alone,
    which compile fast, or of the whole."""

    def __init__(self, spec, whole=False):
        self.spec, self.model, self.whole = spec, Fusion(spec), whole
        random = np.random.default_rng(1)
        self.params = jax.tree.map(
            lambda a: jnp.asarray(random.normal(size=a.shape) * 0.2, jnp.float32), abstract(spec)
        )

        def loss(own, params, skip):
            aux = self.run(self.model, params | {"das": own}, skip)
            return (aux["pooled"] ** 2).sum() + (aux["logits"].sum() if whole else 0), aux

        self.compiled = jax.jit(jax.grad(loss, has_aux=True))

    def masked(self, params, skip):
        return self.compiled(params["das"], params, skip)[1]

    def gradient(self, params, skip):
        return self.compiled(params["das"], params, skip)[0]

    def run(self, model, params, skip=None, key=None, ids=IDS, mask=MASK):
        if not self.whole:
            return model.fuse(params, *FEATURES, mask, skip=skip, key=key)
        logits, aux = model.apply(params, ids, IMAGES, mask, skip=skip, key=key)
        return aux | {"logits": logits}

    def removed(self, skips, key=None):
        spec, params = das.remove(self.spec, self.params, skips)
        return jax.jit(lambda params: self.run(Fusion(spec), params, key=key))(params)

    def skip(self, *arms):
        return jnp.asarray(bandit.mask(arms, self.spec.arms))


@functools.cache
def abstract(spec):
    """The parameters' shapes."""
    return jax.eval_shape(Fusion(spec).init, jax.random.key(0))


@pytest.fixture(scope="module")
def cases():
    """`cases(streams, whole=False)`, each once."""
    return functools.cache(lambda streams, whole=False: Case(SPECS[streams], whole))


BOTH = pytest.mark.parametrize("streams", [1, pytest.param(2, marks=pytest.mark.slow)])


def close(found, expected, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), found, expected)


@BOTH
def test_masked_modules_are_removed_ones(streams, cases):
    case = cases(streams)
    close(case.masked(case.params, case.skip(0)), case.removed("[0]"))


@pytest.mark.slow
@pytest.mark.parametrize("streams", [1, 2])
def test_all_subsets_and_one_compilation(streams, cases):
    case = cases(streams, True)
    for size in range(case.spec.arms + 1):
        for skips in itertools.combinations(range(case.spec.arms), size):
            close(case.masked(case.params, case.skip(*skips)), case.removed(skips))
    assert case.compiled._cache_size() == 1


@BOTH
def test_without_skips_and_with_adapters_that_add_nothing_it_is_the_frozen_model(streams, cases):
    case = cases(streams)
    silent = jax.tree_util.tree_map_with_path(
        lambda path, a: 0 * a if path[0].key == "das" and path[-2].key == "up" else a, case.params
    )
    bare = Fusion(case.spec.without_adapters())
    frozen = jax.jit(lambda params: case.run(bare, params))({k: v for k, v in case.params.items() if k != "das"})
    close(case.masked(silent, case.skip()), frozen, atol=2e-6)
    # A module that changes nothing can be skipped, and nothing changes: of one stream it is enough that its two
    # branches end in zeros.
    if streams == 1:
        for part in ("attn/out", "mlp/down"):
            outer, inner = part.split("/")
            p = silent["block_01"][outer][inner]
            p["kernel"], p["bias"] = 0 * p["kernel"], 0 * p["bias"]
        close(case.masked(silent, case.skip(1)), case.masked(silent, case.skip()), atol=2e-6)


@BOTH
def test_what_is_not_taken_has_gradients_of_zero_and_what_is_taken_has_some(streams, cases):
    case, gone = cases(streams), (0,)
    grads = case.gradient(case.params, case.skip(*gone))
    for index in range(case.spec.arms if streams == 1 else 2):
        for site, p in grads[block_name(index)].items():
            taken = (site == "skip") == (index in gone)
            sizes = [float(np.abs(a).max()) for a in jax.tree.leaves(p)]
            assert (max(sizes) > 0) if taken else sizes == [0.0] * len(sizes), (index, site)


def test_frozen_parameters_do_not_train_and_the_trained_ones_are_dass(cases):
    case = cases(2)
    group_of = optim.group_of({"groups": das.groups(2, head=50.0)})
    trained = {path: group_of(path) for path in flatten(case.params) if group_of(path) is not None}
    tops = {path.split("/")[0] for path in trained}
    assert tops == {"das", "pool", "head", "embed"}
    assert {path for path in trained if path.startswith("embed")} == {"embed/marks/type", "embed/marks/first"}
    assert trained["das/block_00/cross/up/kernel"] == "cross" and trained["das/block_00/cross/up/bias"] == "cross_bias"
    assert trained["das/block_00/skip/norm/scale"] == "rest" and trained["head/norm/scale"] == "head"
    assert set(das.groups(1, 10.0)) == set(das.groups(2, 50.0)) and das.groups(1, 10.0)["cross"]["lr_scale"] == 1.0


@pytest.mark.parametrize("streams", [1, 2])
def test_names_and_shapes_are_those_of_files(streams):
    for spec in (SPECS[streams], SPECS[streams].skipping([1])):
        own = {path: leaf.shape for path, leaf in flatten(abstract(spec)).items() if not path.startswith("das/")}
        assert names.shapes(spec) == own and all(map(names.is_own, own))


@pytest.mark.slow
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("head", [{"images": 2}, {"classes": 0, "ranks": True}])
def test_heads_of_other_tasks(streams, head):
    """Names and shapes; every image is fused with its text as if it were alone, and texts are ranked one by one."""
    spec = SPECS[streams].edit(**head)
    shapes = abstract(spec)
    own = {path: a.shape for path, a in flatten({k: v for k, v in shapes.items() if k != "das"}).items()}
    assert own == names.shapes(spec)
    random = np.random.default_rng(3)
    params = jax.tree.map(lambda a: jnp.asarray(random.normal(size=a.shape) * 0.2, jnp.float32), shapes)
    model = Fusion(spec)
    if spec.ranks:
        ids, masks = np.stack([IDS, IDS[::-1]], axis=1), np.stack([MASK, MASK[::-1]], axis=1)
        score, match = jax.jit(model.rank)(params, ids, IMAGES, masks)
        for number in range(2):
            one, aux = jax.jit(model.apply)(params, ids[:, number], IMAGES, masks[:, number])
            close((score[:, number], match[:, number]), (one[:, 0], aux["match"]))
        return
    several = np.stack([IMAGES, IMAGES[::-1]], axis=1)
    _, aux = jax.jit(model.apply)(params, IDS, several, MASK)
    single = Fusion(spec.edit(images=1, classes=0))
    for number in range(2):
        kinds = params["embed"]["marks"]["type"][jnp.asarray([0, 1 + number])]
        alone = {**params, "embed": {**params["embed"], "marks": {**params["embed"]["marks"], "type": kinds}}}
        pooled, _ = jax.jit(single.apply)(alone, IDS, several[:, number], MASK)
        close(jnp.split(aux["pooled"], 2, axis=-1)[number], pooled)


def test_both_streams_read_what_the_layer_before_left(cases):
    """Invariant 7: what a text branch makes of a layer, the image branch of the same layer does not see."""
    case = cases(2)
    other = jax.tree.map(lambda a: a, case.params)
    other["block_00"]["mlp"]["up"]["kernel"] = 3 * other["block_00"]["mlp"]["up"]["kernel"]
    run = jax.jit(lambda params: case.run(case.model, params))
    before, after = run(case.params), run(other)
    np.testing.assert_array_equal(before["image"], after["image"])
    assert np.abs(before["text"] - after["text"]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("streams", [1, 2])
def test_padding_is_not_read_and_a_text_of_nothing_is_no_nan(streams, cases):
    case, other = cases(streams, True), np.where(MASK == 1, IDS, 99)
    run = jax.jit(lambda params, ids, mask: case.run(case.model, params, ids=ids, mask=mask)["logits"])
    np.testing.assert_allclose(run(case.params, IDS, MASK), run(case.params, other, MASK), atol=1e-6)
    assert np.abs(run(case.params, other, np.ones_like(MASK)) - run(case.params, IDS, MASK)).max() > 1e-4
    empty = np.stack([MASK[0], 0 * MASK[0]])
    assert np.isfinite(run(case.params, IDS, empty)).all()  # refused only where its values are known


@pytest.mark.slow
def test_dropout_is_the_same_for_masked_and_removed_modules(cases):
    case, key = cases(2, True), jax.random.key(3)
    masked = jax.jit(lambda params, skip: case.run(case.model, params, skip, key))
    found = masked(case.params, case.skip(0))
    close(found, case.removed([0], key=key))
    assert np.abs(found["logits"] - case.masked(case.params, case.skip(0))["logits"]).max() > 1e-3


@pytest.mark.slow
def test_bfloat16_streams_keep_their_type_through_skipped_modules(cases):
    case = cases(2, True)
    model = Fusion(case.spec, dtype=jnp.bfloat16)
    aux = jax.jit(lambda params, skip: case.run(model, params, skip))(case.params, case.skip(0))
    logits = aux["logits"]
    assert logits.dtype == jnp.float32 and aux["text"].dtype == aux["image"].dtype == jnp.bfloat16
    np.testing.assert_allclose(logits, case.masked(case.params, case.skip(0))["logits"], atol=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("streams", [1, 2])
def test_fresh_parameters(streams):
    spec = SPECS[streams]
    params = jax.jit(Fusion(spec).init)(jax.random.key(0))
    own = jax.jit(Fusion(spec).init_adapters)(jax.random.key(1))
    assert jax.tree.structure(own) == jax.tree.structure(params["das"])
    a, b = (params["das"][block_name(i)]["skip"]["down"]["kernel"] for i in (0, 1))
    assert np.abs(a - b).max() > 0 and abs(float(a.std()) - 0.02) < 0.005
    if streams == 2:
        np.testing.assert_array_equal(params["embed"]["marks"]["first"], params["embed"]["text"]["tokens"][0])
        features = ViT(spec.image).apply(params["tower"], IMAGES)[1]["features"]
        assert features.shape == (2, 17, 16)
    logits, _ = build(spec).apply(params, IDS, IMAGES, MASK)
    assert logits.shape == (2, 5) and np.isfinite(logits).all()


@pytest.mark.slow
def test_a_search_finds_the_blocks_that_do_nothing():
    """Invariant 5, a real model: of eight blocks two are the identity."""
    spec, free = FusionSpec.small(1, depth=8, width=16, classes=5), (2, 5)
    case = Case(spec, whole=True)
    params = jax.tree.map(lambda a: a, case.params)
    for index in range(8):
        for p in params["das"][block_name(index)].values():
            p["up"] = jax.tree.map(jnp.zeros_like, p["up"])
        if index in free:
            for branch, last in (("attn", "out"), ("mlp", "down")):
                p = params[block_name(index)][branch]
                p[last] = jax.tree.map(jnp.zeros_like, p[last])
    whole = case.masked(params, case.skip())["text"]

    def loss(subset):
        """How far the network without these blocks is from the whole one, in units of its size."""
        return float(((case.masked(params, case.skip(*subset))["text"] - whole) ** 2).mean() / (whole**2).mean())

    assert max(loss([i]) for i in free) < 1e-9 < min(loss([i]) for i in range(8) if i not in free)
    settings = bandit.Bandit(8, 2)
    state = settings.start()
    for _ in range(150):
        subsets = bandit.candidates(settings, state, 0)
        state = bandit.update(settings, state, subsets, np.array([loss(s) for s in subsets.tolist()]))
    assert tuple(sorted(bandit.final(state.preference, 2).tolist())) == free
    assert case.compiled._cache_size() == 1


# Bad input.


@pytest.fixture(scope="module")
def shapes():
    return abstract(SPECS[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip": np.zeros(4, bool)}, r"skip must be \[2\], one entry per arm, found \[4\]"),
        ({"ids": np.zeros((2, 41), np.int32), "mask": None}, "40 tokens or fewer, found 41"),
        ({"ids": np.full((2, 6), 128)}, r"in 0\.\.127"),
        ({"mask": np.full((2, 6), 2)}, "must be 0 or 1"),
        ({"mask": 0 * MASK}, "a token in every row"),
    ],
)
def test_input_that_does_not_fit_is_refused(changes, message, shapes):
    values = {"skip": None, "ids": IDS, "mask": MASK, **changes}
    ids, mask, skip = (values[name] for name in ("ids", "mask", "skip"))
    with pytest.raises(InputError, match=message):
        jax.eval_shape(lambda params: Fusion(SPECS[1]).apply(params, ids, IMAGES, mask, skip=skip), shapes)


def test_a_model_without_some_modules_takes_no_skip(shapes):
    spec, params = das.remove(SPECS[1], shapes, [1])
    with pytest.raises(InputError, match=r"a model without modules \(1,\) takes no skip"):
        jax.eval_shape(lambda params: Fusion(spec).fuse(params, *FEATURES, skip=np.zeros(2, bool)), params)
    with pytest.raises(InputError, match="found 1, which is gone"):
        das.remove(spec, params, [0, 1])


@pytest.mark.parametrize(
    ("skips", "message"),
    [
        ([1, 1], "each module once, found 1 twice"),
        ([12], r"in 0\.\.11, found 12"),
        ([-1], r"in 0\.\.11, found -1"),
        ([1.0], "whole numbers, found 1.0"),
        ([True], "whole numbers, found True"),
        (["1"], "whole numbers, found '1'"),
        ("[1, 2", "a list of modules"),
        ("one", "a list of modules"),
        (3, "a list of modules"),
        ({1: 2}, "a list of modules"),
    ],
)
def test_lists_of_modules_that_are_none_are_refused(skips, message):
    with pytest.raises(InputError, match=message):
        skip_list(skips, 12)


@pytest.mark.parametrize("skips", [(3, 1), [3, 1], "[3, 1]", "3, 1", np.array([3, 1]), {1, 3}])
def test_lists_of_modules_have_one_form(skips):
    assert skip_list(skips, 12) == (1, 3)
    assert skip_list("[]", 12) == () and skip_list("7", 12) == (7,)


def test_specs_are_json_and_know_their_skips():
    for spec in (FusionSpec.meter(), FusionSpec.vilt(), FusionSpec.meter(288, everywhere=True), *SPECS.values()):
        assert from_json(spec.to_json()) == spec and spec.skips == ()
    spec = FusionSpec.meter(everywhere=True).skipping([20, 3])
    assert from_json(spec.to_json()) == spec and spec.skips == (3, 20)
    assert (spec.blocks[3].adapter, spec.blocks[20].adapter) == (288, 192)
    assert spec.skipping("[0]").skips == (0, 3, 20)
    with pytest.raises(InputError, match=r"in 0\.\.11, found 12"):
        FusionSpec.meter().skipping([12])  # the text encoder's layers are no arms there


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"streams": 3}, "streams must be 1 or 2"),
        ({"vocab": 0}, "vocab must be positive"),
        ({"fusion": 2}, r"fusion must be in 1\.\.1"),
        ({"arms": 4}, r"arms must be in 0\.\.3"),
        ({"eps": float("nan")}, "eps must be 0 or more"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"classes": -1}, "classes must be 0 or more"),
        ({"blocks": {0: {"ffn": False}}}, "kept or skipped as a whole"),
        ({"blocks": {0: {"attn": False, "ffn": False}}}, r"blocks\[0\].adapter must be 6"),
        ({"blocks": {0: {"reduce": "ltmp:"}}}, "reduce is not defined for fusion encoders"),
        ({"skip": {"form": "residual", "width": 4}}, "skip must be a bottleneck"),
    ],
)
def test_specs_that_no_model_can_have_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        SPECS[2].edit(**changes)


def test_a_stream_is_as_wide_as_its_image():
    with pytest.raises(InputError, match="image must be 16 wide"):
        SPECS[1].edit(image=SPECS[1].image.edit(width=20))
    with pytest.raises(InputError, match="is of two streams, found 1 with one"):
        SPECS[1].edit(fusion=1)
    for changes in ({"norm_position": "post"}, {"norm_after": False}):
        with pytest.raises(InputError, match="norms before the branches and after the last block"):
            SPECS[1].edit(image=SPECS[1].image.edit(**changes))
    for changes in ({"pooling": "class"}, {"classes": 3}):
        with pytest.raises(InputError, match="without pooling and head"):
            SPECS[2].edit(image=SPECS[2].image.edit(**changes))
    with pytest.raises(InputError, match="images of two streams have no padding"):
        x = jnp.zeros((1, 2, 16))
        Fusion(SPECS[2]).fuse({}, x, x, image_mask=jnp.ones((1, 2)))
