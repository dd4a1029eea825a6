# SPDX-License-Identifier: Apache-2.0
"""What is deployed computes what the masked model computes, whatever the sizes, the groups and the batch mates."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtjax.errors import InputError
from vtjax.methods import ltmp, ltmp_deploy
from vtjax.models.vit import ViT
from vtjax.ops import token_reduction as ops
from vtjax.spec import ViTSpec

CLASS = ViTSpec.uniform(depth=3, width=32, heads=2, mlp=64, image_size=16, patch=4, classes=7)
SHORT = dataclasses.replace(CLASS, blocks=CLASS.blocks[:2])
REGISTERS = ViTSpec.uniform(
    depth=2, width=32, heads=2, mlp=64, image_size=16, patch=4, classes=7, registers=2, distill_token=True, pos_prefix=4
)
MEAN = ViTSpec.uniform(
    depth=2,
    width=32,
    heads=2,
    mlp=64,
    image_size=16,
    patch=4,
    classes=7,
    class_token=False,
    pooling="mean",
    pos_prefix=0,
)
slow = (
    pytest.mark.slow
)  # every deployed model compiles for seconds: one of a kind runs in `make test`, all in `make test-slow`
THRESHOLDS = {"merge_threshold": 0.35, "prune_threshold": 0.045}


def noisy(spec: ViTSpec, seed: int = 0) -> Any:
    params = jax.jit(ViT(spec).init)(jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(
        tree, [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


def images(count: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (count, 16, 16, 3))


def installed(spec: ViTSpec, variant: str = "ltmp", form: str = "consistent", **changed: Any) -> tuple[ViTSpec, Any]:
    given = {name: value for name, value in THRESHOLDS.items() if name in ltmp.starts(variant, 1)} | changed
    reduced, thresholds = ltmp.install(spec, variant=variant, form=form, **given)
    return reduced, {**noisy(spec), "ltmp": thresholds}


def masked(spec: ViTSpec, params: Any, batch: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and live tokens after each block `[B, L]`."""
    y, aux = jax.jit(ltmp.vit(ltmp.consistent(spec)).apply)(params, batch)
    return np.asarray(y), np.rint(np.asarray(ltmp.alive_fractions(aux, spec.tokens)).T * spec.tokens).astype(int)


def equal(model: ltmp_deploy.Deployed, params: Any, batch: jax.Array) -> dict[str, np.ndarray]:
    """Asserts that a deployed model does what the masked one does; its aux."""
    y, aux = jax.jit(model.apply)(params, batch)
    expected, kept = masked(model.spec, params, batch)
    np.testing.assert_array_equal(aux["kept"], kept)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert kept.min() < model.spec.tokens and any(len(np.unique(k)) > 1 for k in kept.T), "all images alike"
    return {name: np.asarray(value) for name, value in aux.items()}


def long(spec: ViTSpec, *known: int, rows: tuple[int, ...] = (), images: int) -> ltmp_deploy.Sizes:
    """`sizes`, with those of the dense model on top, so that nothing overflows."""
    return sizes(spec, *known, spec.tokens, rows=(*rows, images * spec.tokens))


def sizes(spec: ViTSpec, *known: int, rows: tuple[int, ...] = ()) -> ltmp_deploy.Sizes:
    return ltmp_deploy.Sizes(((known,),) * spec.depth, (rows,) * spec.depth)


@pytest.mark.parametrize("variant", [v if v == "ltmp" else pytest.param(v, marks=slow) for v in ltmp.VARIANTS])
def test_removal_computes_what_the_mask_computes(variant: str) -> None:
    spec, params = installed(SHORT, variant)
    model = ltmp_deploy.Deployed(spec, long(spec, 10, rows=(30,), images=5), groups=2)
    assert not equal(model, params, images(5))["overflow"].any()


@pytest.mark.parametrize("dense", [REGISTERS, pytest.param(MEAN, marks=slow)], ids=["registers", "mean"])
def test_any_prefix_and_pooling(dense: ViTSpec) -> None:
    spec, params = installed(dense)
    equal(ltmp_deploy.Deployed(spec, long(spec, 10, rows=(30,), images=4), groups=2), params, images(4))


@slow
def test_thresholds_of_the_faithful_form_are_deployed_by_removal() -> None:
    spec, params = installed(SHORT, form="faithful")
    equal(ltmp_deploy.Deployed(spec, sizes(spec, 10, rows=(30,))), params, images(4))


def test_what_exceeds_every_calibrated_length_is_counted_and_exact() -> None:
    spec, params = installed(SHORT)
    _, kept = masked(spec, params, images(6))
    most = int(kept[:, 0].max()) - 1
    known = ltmp_deploy.Sizes((((),), ((most,),)), ((), ()))
    aux = equal(ltmp_deploy.Deployed(spec, known, together=1), params, images(6))
    np.testing.assert_array_equal(aux["overflow"], kept[:, 0] > most)
    assert 0 < aux["overflow"].sum() < 6
    assert (aux["slots"][:, 1] == most).all()  # what it was tried with
    # Those that ran together with it took the slow way, too.
    aux = equal(ltmp_deploy.Deployed(spec, known, together=3), params, images(6))
    np.testing.assert_array_equal(aux["overflow"], (kept[:, 0] > most).reshape(2, 3).any(1).repeat(3))
    most = int(kept[:, 1].max()) - 1
    known = ltmp_deploy.Sizes((((),), ((),)), ((), (most,)))
    aux = equal(ltmp_deploy.Deployed(spec, known, together=1), params, images(6))
    np.testing.assert_array_equal(aux["overflow"], kept[:, 1] > most)
    assert (aux["rows"][:, 1] == most).all()


def test_slots_hold_what_lives() -> None:
    spec, params = installed(CLASS)
    known = long(spec, 9, rows=(45, 90), images=9)
    aux = equal(ltmp_deploy.Deployed(spec, known, groups=2), params, images(9))
    entering = np.concatenate([np.full((9, 1), 17), aux["kept"][:, :-1]], 1)
    assert (aux["slots"] >= entering).all() and set(aux["slots"].ravel()) == {9, 17}
    for layer in (1, 2):  # alike images share a group
        order = entering[:, layer].argsort(kind="stable")
        assert (np.diff(aux["slots"][order, layer]) >= 0).all()
    sums = aux["kept"].sum(0)
    assert (aux["rows"] * 9 >= sums - 1e-3).all() and (aux["rows"][:, -1] < 17).any()


@pytest.mark.parametrize(
    ("groups", "together"), [(2, 3), *(pytest.param(*case, marks=slow) for case in ((1, 0), (3, 0)))]
)
def test_batch_mates_and_groups_do_not_matter(groups: int, together: int) -> None:
    spec, params = installed(SHORT)
    batch = np.asarray(images(7))
    alone, _ = masked(spec, params, batch)
    known = long(spec, 9, rows=(30,), images=together or 7)
    run = jax.jit(ltmp_deploy.Deployed(spec, known, groups=groups, together=together).apply)
    np.testing.assert_allclose(run(params, batch)[0], alone, atol=1e-5)
    np.testing.assert_allclose(np.asarray(run(params, batch[::-1])[0])[::-1], alone, atol=1e-5)


@slow
def test_more_room_changes_nothing() -> None:
    spec, params = installed(SHORT)
    tight, wide = (
        jax.jit(ltmp_deploy.Deployed(spec, known).apply)(params, images(3))[0]
        for known in (long(spec, 8, rows=(12, 24), images=3), sizes(spec))
    )
    np.testing.assert_allclose(tight, wide, atol=1e-6)


def test_thresholds_may_be_given_as_knobs_without_another_compilation() -> None:
    spec, params = installed(CLASS)
    model = ltmp_deploy.Deployed(spec, sizes(spec, 8))
    compiled = 0

    def run(knobs: Any) -> Any:
        nonlocal compiled
        compiled += 1
        return model.apply(params, images(3), knobs=knobs)

    run = jax.jit(run)
    _, off = run({"merge_threshold": jnp.float32(1), "prune_threshold": jnp.float32(0)})
    _, all_pruned = run({"merge_threshold": jnp.float32(1), "prune_threshold": jnp.float32(1)})
    assert compiled == 1
    assert (np.asarray(off["kept"]) == 17).all() and (np.asarray(all_pruned["kept"]) == 1).all()


def test_nothing_reduced_is_the_dense_model() -> None:
    spec, params = installed(CLASS, merge_threshold=1.0, prune_threshold=0.0)
    y, _ = jax.jit(ltmp_deploy.Deployed(spec, sizes(spec)).apply)(params, images(3))
    dense = {name: tree for name, tree in params.items() if name != "ltmp"}
    np.testing.assert_allclose(y, jax.jit(ViT(CLASS).apply)(dense, images(3))[0], atol=1e-5)


def test_calibrated_sizes_hold_the_images_that_they_were_made_of() -> None:
    spec, params = installed(CLASS)
    _, kept = masked(spec, params, images(64))
    bare = ltmp_deploy.calibrate(kept, spec, batch=16, groups=2, choices=3, spare=-1)
    assert all(1 <= len(known) <= 3 for block in bare.slots for known in block) and len(bare.rows) == 3
    assert [block[-1][-1] for block in bare.slots] == [17, *kept.max(0)[:-1]]  # the longest group's
    assert all((np.diff([known[-1] for known in block]) >= 0).all() for block in bare.slots)
    assert all(known[-1] <= 16 * most for known, most in zip(bare.rows, kept.max(0), strict=True))
    known = ltmp_deploy.calibrate(kept, spec, batch=16, groups=2, choices=2)
    assert all(a[-1] >= b[-1] for a, b in zip(known.rows, bare.rows, strict=True)) and known.rows != bare.rows
    assert ltmp_deploy.calibrate(kept, spec, batch=4, choices=0)[:2] == sizes(spec)[:2]


def test_the_fixed_form_removes_the_mean_counts() -> None:
    spec, _ = installed(CLASS)
    merged = np.array([[2, 1, 0], [3, 2, 1]])
    pruned = np.array([[1, 0, 1], [0, 1, 1]])
    fixed = ltmp_deploy.fixed(spec, merged, pruned)
    assert [(r.variant, r.merge, r.prune) for _, r in ltmp.reducers(fixed)] == [
        ("merge_prune", 2, 0),
        ("merge_prune", 2, 1),
        ("merge_prune", 0, 1),
    ]
    y, aux = jax.jit(ltmp.vit(fixed).apply)(noisy(CLASS), images(2))
    counts = [17, *(block["decisions"]["kept"][0] for block in aux["blocks"])]
    assert counts == list(ltmp.fixed_tokens(fixed)) and np.isfinite(y).all()


def test_a_dense_size_that_was_calibrated_is_no_overflow() -> None:
    spec, params = installed(CLASS, merge_threshold=1.0, prune_threshold=0.0)
    run = jax.jit(ltmp_deploy.Deployed(spec, sizes(spec, 17, rows=(17,)), together=1).apply)
    _, aux = run(params, images(2))
    assert not aux["overflow"].any() and (np.asarray(aux["rows"]) == 17).all()


BOTH = dataclasses.replace(SHORT, pooling="mean")
POOL = dataclasses.replace(SHORT, class_token=False, pos_prefix=0, pooling="attention", pool_heads=2, pool_mlp=64)


@pytest.mark.parametrize(
    ("dense", "groups"), [(MEAN, 1), *(pytest.param(*case, marks=slow) for case in ((SHORT, 2), (BOTH, 1), (POOL, 1)))]
)
def test_an_image_of_nan_keeps_it_to_itself(dense: ViTSpec, groups: int) -> None:
    spec, params = installed(dense)
    apply = jax.jit(ltmp_deploy.Deployed(spec, long(spec, 10, rows=(30,), images=5), groups=groups).apply)
    batch = np.asarray(images(5))
    clean, _ = apply(params, batch)
    batch = np.where(np.arange(5)[:, None, None, None] == 2, np.nan, batch)
    dirty, _ = apply(params, batch)
    assert np.isnan(dirty[2]).all()
    others = [0, 1, 3, 4]
    np.testing.assert_allclose(np.asarray(dirty)[others], np.asarray(clean)[others], atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": np.zeros((2, 8, 16, 3), np.float32)}, r"images must be .*16, 16, 3.*, found .*8, 16, 3"),
        ({"images": np.zeros((0, 16, 16, 3), np.float32)}, "images must be at least one, found none"),
        (
            {"knobs": {"merge_threshold": jnp.zeros(2)}},
            r"merge_threshold must be .* per layer, \[3, ...\], found \[2\]",
        ),
        ({"params": noisy(CLASS)}, "merge_threshold must be in params.'ltmp'. or among the knobs"),
    ],
)
def test_what_cannot_be_deployed_is_refused(changed: dict[str, Any], message: str) -> None:
    spec, params = installed(CLASS)
    arguments = {"params": params, "images": images(2), **changed}
    with pytest.raises(InputError, match=message):
        ltmp_deploy.Deployed(spec, sizes(spec, 8)).apply(**arguments)


@pytest.mark.parametrize("count", [4, *(pytest.param(more, marks=slow) for more in (16, 32))])
def test_sizes_of_calibrated_images_hold_them_and_are_scaled_to_another_number(count: int) -> None:
    spec, params = installed(SHORT)
    _, kept = masked(spec, params, images(64))
    known = ltmp_deploy.calibrate(kept, spec, batch=16, choices=2)
    assert known.images == 16
    aux = equal(ltmp_deploy.Deployed(spec, known), params, images(64)[:count])
    assert not aux["overflow"].any() and aux["rows"][0, -1] < 14


def test_where_patches_are_pooled_one_of_them_stays() -> None:
    spec, params = installed(BOTH, prune_threshold=1.0)
    y, aux = jax.jit(ltmp_deploy.Deployed(spec, sizes(spec, 2, 17)).apply)(params, images(4))
    expected, _ = masked(spec, params, images(4))
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert (np.asarray(aux["kept"])[:, -1] == 2).all() and np.ptp(np.asarray(y), 0).max() > 1e-3
    assert ltmp.protected(spec) == 2 and ltmp.protected(installed(SHORT)[0]) == ltmp.protected(installed(MEAN)[0]) == 1


def test_the_fixed_form_removes_later_what_a_step_cannot() -> None:
    spec, _ = installed(CLASS)
    fixed = ltmp_deploy.fixed(spec, np.array([[4, 4, 4]]), np.array([[10, 10, 10]]))
    assert ltmp.fixed_tokens(fixed) == (17, 7, 3, 2)


def test_groups_are_as_equal_as_they_can_be() -> None:
    assert ltmp_deploy.groups_of(8, 2) == [slice(0, 4), slice(4, 8)]
    assert ltmp_deploy.groups_of(7, 3) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert ltmp_deploy.groups_of(2, 5) == [slice(0, 1), slice(1, 2)]


SPEC, REGISTERED = installed(CLASS)[0], installed(REGISTERS)[0]
_FIXED = ltmp.describe(ltmp.FixedRate(1, "merge", 2, 0))
MIXED = SPEC.edit(blocks=lambda layer, block: dataclasses.replace(block, reduce=_FIXED) if layer == 1 else block)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"spec": CLASS, "sizes": sizes(CLASS)}, "needs a spec with learned thresholds .*, found none"),
        ({"sizes": ltmp_deploy.Sizes((((),),) * 2, ((),) * 3)}, "sizes.slots must hold 3 blocks, found 2"),
        ({"sizes": sizes(SPEC, 8, 4)}, r"sizes.slots\[0\] must ascend from 1 or more, found \(8, 4\)"),
        (
            {"sizes": sizes(SPEC, 18)},
            r"sizes.slots\[0\] must be in 1..17 tokens, .*, found \(18,\)",
        ),
        ({"sizes": sizes(SPEC, rows=(0,))}, r"sizes.rows\[0\] must ascend from 1 or more, found \(0,\)"),
        ({"sizes": sizes(REGISTERED, 3), "spec": REGISTERED}, r"sizes.slots\[0\] must be in 4..20 tokens, of which 4"),
        ({"spec": MIXED}, r"blocks\[1\].reduce must be of learned thresholds, found 'ltmp:fixed"),
        ({"groups": 0}, "groups must be 1 or more, found 0"),
        ({"together": -1}, "together must be 0 or more images, found -1"),
        ({"attention": "flash"}, "attention must be one of .*, found 'flash'"),
        ({"spec": dataclasses.replace(SPEC, feature_layer=1)}, "pooled outputs only, found feature_layer=1"),
    ],
)
def test_a_deployment_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ltmp_deploy.Deployed(**{"spec": SPEC, "sizes": sizes(SPEC, 8), **fields})


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.ones((4, 2), int), r"counts must be \[images, 3\], one per block, found \[4, 2\]"),
        (np.ones((0, 3), int), r"counts must be \[images, 3\]"),
        (np.zeros((4, 3), int), "counts must be in 1..17, found 0 to 0"),
        (np.full((4, 3), 18), "counts must be in 1..17, found 18 to 18"),
        (np.full((4, 3), np.nan), "counts must be finite and 0 or more"),
    ],
)
def test_counts_that_cannot_be_are_refused(counts: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ltmp_deploy.calibrate(counts, SPEC, batch=4)


@pytest.mark.parametrize("counts", [np.ones((4, 2)), np.ones((0, 3)), np.full((4, 3), np.nan)])
def test_the_fixed_form_needs_counts_of_every_block(counts: np.ndarray) -> None:
    with pytest.raises(InputError, match="merged must be"):
        ltmp_deploy.fixed(SPEC, counts, counts)


@pytest.mark.parametrize(("choices", "spare"), [(-1, 0.1), (3, np.nan)])
def test_choices_that_cannot_be_are_refused(choices: int, spare: float) -> None:
    with pytest.raises(InputError, match="choices must be 0 or more and spare finite"):
        ltmp_deploy.calibrate(np.full((4, 3), 9), SPEC, batch=4, choices=choices, spare=spare)


@pytest.mark.parametrize("changed", [{"batch": 0}, {"groups": 0}, {"together": -1}])
def test_a_calibration_for_no_deployment_is_refused(changed: dict[str, int]) -> None:
    name, value = next(iter(changed.items()))
    with pytest.raises(InputError, match=f"{name} must be . or more, found {value}"):
        ltmp_deploy.calibrate(np.full((4, 3), 9), SPEC, **{"batch": 4, **changed})


def test_a_linear_probe_segments_from_unmerged_tokens() -> None:
    """Every patch has one of three colours; a linear probe on patch features tells it, dense or unmerged."""
    rng = np.random.default_rng(0)
    colours = np.array([[2.0, -1, 0], [-1, 2, 0], [0, -1, 2]], np.float32)
    fields = np.repeat(np.repeat(rng.integers(0, 3, (48, 2, 2)), 2, 1), 2, 2)  # 2 x 2 regions of 2 x 2 patches
    batch = np.repeat(np.repeat(colours[fields], 4, 1), 4, 2) + 0.1 * rng.standard_normal((48, 16, 16, 3))
    # Close to the identity, as a trained model's residual stream is; noise of 0.2 would drown the patches.
    weights = jax.tree.map(lambda x: 0.5 * x, jax.jit(ViT(CLASS).init)(jax.random.key(0)))
    spec, thresholds = ltmp.install(CLASS, variant="ltmp", merge_threshold=0.9, prune_threshold=0.02)
    _, aux = jax.jit(ltmp.vit(spec).apply)({**weights, "ltmp": thresholds}, batch.astype(np.float32))
    features, valid = (np.asarray(a) for a in ops.unmerge(aux["tokens"], CLASS.grid, CLASS.prefix))
    kept = np.asarray(aux["tokens"].alive).sum(1)
    assert kept.max() < 14 and features.shape == (48, 4, 4, 32)

    _, dense = jax.jit(ViT(CLASS).apply)(weights, batch.astype(np.float32))
    plain = np.asarray(dense["tokens"].x)[:, 1:].reshape(48, 4, 4, 32)
    right = {name: probe(x, fields, valid) for name, x in {"dense": plain, "unmerged": features}.items()}
    assert right["unmerged"] > 0.95 and right["unmerged"] >= right["dense"] - 0.03
    # A grid that ignored `source` would hold other patches' features.
    wrong = probe(np.roll(features, 1, 2), fields, valid)
    assert wrong < right["unmerged"] - 0.1


def probe(features: np.ndarray, labels: np.ndarray, valid: np.ndarray) -> float:
    """Accuracy on the second half of the images of a least-squares probe fitted on the first."""
    half = len(features) // 2
    x = np.concatenate([features, np.ones((*features.shape[:-1], 1))], -1)
    first, second = valid[:half], valid[half:]
    target = np.eye(3)[labels]
    weights, *_ = np.linalg.lstsq(x[:half][first], target[:half][first], rcond=None)
    return float(((x[half:][second] @ weights).argmax(-1) == labels[half:][second]).mean())
