# SPDX-License-Identifier: Apache-2.0
"""LTMP in whole models: removal mode in plain numpy, the invariants of the spec's section 12, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtjax.errors import InputError
from vtjax.methods import ltmp
from vtjax.models.vit import ViT
from vtjax.ops import losses
from vtjax.ops import token_reduction as ops
from vtjax.ops.tokens import Tokens
from vtjax.spec import ViTSpec, from_dict

TAU = 0.1
DENSE = ViTSpec.uniform(depth=2, width=32, heads=2, mlp=48, image_size=20, patch=4, classes=7)  # 26 tokens
EXTRA = {
    "prefix": DENSE.edit(distill_token=True, registers=2, pos_prefix=2),
    "mean": DENSE.edit(pooling="mean", class_token=False, pos_prefix=0),
}
MERGE, PRUNE = (0.65, 0.6), (0.022, 0.028)
OFF = {"merge": 1.0, "prune": 0.0}


@functools.cache
def parameters(spec=DENSE):
    """Random everywhere: zero-initialised leaves would hide mistakes."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(ViT(spec).init, jax.random.key(0)))
    rng = np.random.default_rng(7)
    params = tree.unflatten([jnp.asarray(rng.normal(size=leaf.shape) * 0.2, jnp.float32) for leaf in leaves])
    for name, tree in params.items():
        for norm in ("norm1", "norm2") if name.startswith("block") else ("norm",) if name == "norm" else ():
            target = tree if norm == "norm" else tree[norm]
            target["scale"] = target["scale"] + 1.0
    return params


@functools.cache
def pictures(count=5, seed=1, spec=DENSE):
    with jax.ensure_compile_time_eval():  # it may be asked for first while something is traced
        return jax.random.normal(jax.random.key(seed), (count, *spec.image_size, 3))


def knobs_of(variant, merge=MERGE, prune=PRUNE):
    """The knobs that a variant reads, float32 `[L]`, from numbers for all layers or one per layer."""
    used = {"merge_threshold": (ltmp.merges(variant), merge), "prune_threshold": (ltmp.prunes(variant), prune)}
    return {name: np.broadcast_to(np.float32(value), DENSE.depth) for name, (has, value) in used.items() if has}


@functools.cache
def forward(spec, training=False):
    """Jitted `(images, knobs) -> (logits, blocks)` of an installed spec."""
    model = ltmp.vit(spec, training=training)
    params = parameters(bare(spec))

    def run(images, knobs):
        logits, aux = model.apply(params, images, knobs=knobs, want=("tokens", "importance"))
        return logits, aux["blocks"]

    return jax.jit(run)


def bare(spec):
    """The dense spec whose parameters an installed one has."""
    return spec.edit(blocks=lambda _, block: dataclasses.replace(block, reduce=None), lineage=())


@functools.cache
def installed(variant, form="consistent", spec=DENSE, relative=False):
    return ltmp.install(spec, variant=variant, form=form, tau=TAU, relative=relative)[0]


def run(variant, form="consistent", images=None, **thresholds):
    """(logits, blocks as numpy) of the shared model."""
    images = pictures() if images is None else images
    logits, blocks = forward(installed(variant, form))(images, knobs_of(variant, **thresholds))
    return np.asarray(logits), jax.tree.map(np.asarray, [dict(b, tokens=unpack(b["tokens"])) for b in blocks])


def unpack(tokens):
    return {"x": tokens.x, **dict(zip(("size", "alive", "source"), ops.filled(tokens), strict=True))}


both_forms = pytest.mark.parametrize("form", ltmp.FORMS)
all_variants = pytest.mark.parametrize("variant", ltmp.VARIANTS)


# Removal mode (spec section 5) for one image: tokens are dropped from a list.


@dataclasses.dataclass
class One:
    """A token that is there."""

    x: np.ndarray
    size: float
    members: tuple[int, ...]
    importance: float = 0.0
    feature: np.ndarray | None = None


class Removal:
    """Removal mode in float64 numpy; `run` gives logits and, per block, what became of the tokens."""

    def __init__(self, spec, params, knobs):
        self.spec, self.params = spec, jax.tree.map(lambda a: np.asarray(a, np.float64), params)
        self.knobs = {name: np.broadcast_to(np.asarray(v, np.float64), spec.depth) for name, v in knobs.items()}
        self.margin = {"merge": np.inf, "partner": np.inf, "prune": np.inf}

    def norm(self, p, x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.spec.eps) * p["scale"] + p["bias"]

    @staticmethod
    def dense(p, x):
        return x @ p["kernel"] + p["bias"]

    def embed(self, image):
        spec, p, side = self.spec, self.params["embed"], self.spec.patch
        lead = [p[name] for name in ("class_token", "distill_token") if name in p] + list(p.get("registers", ()))
        lead = [x + (p["pos"][i] if i < spec.pos_prefix else 0) for i, x in enumerate(lead)]
        patches = []
        for row, column in np.ndindex(*spec.grid):
            pixels = image[row * side : (row + 1) * side, column * side : (column + 1) * side].reshape(-1)
            patches.append(self.dense(p["patch"], pixels) + p["pos"][spec.pos_prefix + len(patches)])
        return [One(x, 1.0, (i,)) for i, x in enumerate([*lead, *patches])]

    def attention(self, block, p, tokens, reducer):
        heads = block.heads
        x = np.stack([t.x for t in tokens])
        inner = self.norm(p["norm1"], x)
        q, k, v = (self.dense(p["attn"][n], inner).reshape(len(x), heads, -1) for n in ("query", "key", "value"))
        size = np.array([t.size for t in tokens])
        y, received = np.zeros_like(v), np.zeros(len(x))
        for head in range(heads):
            for row in range(len(x)):
                scores = k[:, head] @ q[row, head] / math.sqrt(q.shape[-1])
                weight = np.exp(scores - scores.max()) * (size if ltmp.merges(reducer.variant) else 1.0)
                weight /= weight.sum()
                y[row, head] = weight @ v[:, head]
                received += weight / heads / len(x)
        x = x + self.dense(p["attn"]["out"], y.reshape(len(x), -1))
        compared = {"queries": q, "keys": k, "values": v, "features": x[:, None]}[reducer.similarity].mean(1)
        for i, token in enumerate(tokens):
            token.x, token.importance, token.feature = x[i], received[i], compared[i]
        for i in range(self.spec.prefix):
            tokens[i].importance = np.inf
        if not self.spec.prefix:
            tokens[int(np.argmax(received))].importance = np.inf

    def merge(self, tokens, threshold):
        prefix = self.spec.prefix
        a, b = (list(range(prefix + (prefix + odd) % 2, len(tokens), 2)) for odd in (0, 1))
        joins = {}
        for i in a if b else ():
            u = tokens[i].feature / np.linalg.norm(tokens[i].feature)
            cosines = [u @ tokens[j].feature / np.linalg.norm(tokens[j].feature) for j in b]
            best = max(cosines)
            self.margin["merge"] = min(self.margin["merge"], abs(best - threshold))
            if best > threshold:
                joins[i] = b[cosines.index(best)]
                others = sorted(cosines)[:-1]
                self.margin["partner"] = min(self.margin["partner"], best - max(others, default=-1.0))
        for j in b:
            group = [tokens[j], *(tokens[i] for i in joins if joins[i] == j)]
            size = sum(t.size for t in group)
            x = sum(t.x * t.size for t in group) / size
            members = tuple(m for t in group for m in t.members)
            tokens[j] = One(x, size, members, max(t.importance for t in group))
        return [*tokens[:prefix], *(tokens[i] for i in a if i not in joins), *(tokens[j] for j in b)]

    def prune(self, tokens, threshold, relative):
        share = len(tokens) / relative if relative else 1.0
        for token in tokens:
            self.margin["prune"] = min(self.margin["prune"], abs(token.importance * share - threshold))
        return [t for t in tokens if t.importance * share > threshold]

    def run(self, image):
        tokens, story = self.embed(np.asarray(image, np.float64)), []
        originals = len(tokens)
        for layer, block in enumerate(self.spec.blocks):
            reducer, p = ltmp.reducer(block.reduce, self.spec), self.params[f"block_{layer:02d}"]
            self.attention(block, p, tokens, reducer)
            counts = {"merged": 0, "pruned": 0}
            for step in {"ltmp": "mp", "ltm": "m", "ltp": "p", "ltpm": "pm"}[reducer.variant]:
                before = len(tokens)
                if step == "m":
                    tokens = self.merge(tokens, self.knobs["merge_threshold"][layer])
                    counts["merged"] = before - len(tokens)
                else:
                    tokens = self.prune(tokens, self.knobs["prune_threshold"][layer], reducer.relative)
                    counts["pruned"] = before - len(tokens)
            for token in tokens:
                hidden = self.dense(p["mlp"]["up"], self.norm(p["norm2"], token.x))
                hidden *= 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
                token.x = token.x + self.dense(p["mlp"]["down"], hidden)
            owner = np.full(originals, -1)
            for slot, token in enumerate(tokens):
                owner[list(token.members)] = slot
            x, sizes = np.stack([t.x for t in tokens]), [t.size for t in tokens]
            story.append({**counts, "kept": len(tokens), "source": owner, "sizes": sizes, "x": x})
        return self.read(tokens), story

    def read(self, tokens):
        x = [self.norm(self.params["norm"], t.x) for t in tokens]
        if self.spec.pooling == "mean":
            size = [t.size for t in tokens]
            return self.dense(self.params["head"], sum(v * s for v, s in zip(x, size, strict=True)) / sum(size))
        y = self.dense(self.params["head"], x[0])
        return (y + self.dense(self.params["head_distill"], x[1])) / 2 if self.spec.distill_token else y


def check_removal(spec, knobs, images, *, active=("merged", "pruned")):
    """The masked model equals removal mode in logits, counts, sizes, owners and features; returns the reference."""
    logits, blocks = forward(spec)(images, knobs)
    reference = Removal(spec, parameters(bare(spec)), knobs)
    seen = dict.fromkeys(active, 0)
    for row, image in enumerate(np.asarray(images)):
        expected, story = reference.run(image)
        np.testing.assert_allclose(logits[row], expected, atol=1e-5)
        for told, block in zip(story, blocks, strict=True):
            decisions, kept = block["decisions"], told["kept"]
            for name in ("merged", "pruned", "kept"):
                assert decisions[name][row] == told[name], name
            np.testing.assert_array_equal(decisions["source"][row], told["source"])
            size, alive, _ = ops.filled(block["tokens"])
            np.testing.assert_array_equal(alive[row], np.arange(alive.shape[1]) < kept)
            np.testing.assert_array_equal(size[row, :kept], told["sizes"])
            np.testing.assert_allclose(block["tokens"].x[row, :kept], told["x"], atol=2e-5)
            for name in active:
                seen[name] += told[name]
    assert all(seen.values()), f"the thresholds should make something of each happen: {seen}"
    # A decision nearer than this to its threshold would compare rounding, not code.
    assert reference.margin["merge"] > 1e-6 and reference.margin["partner"] > 1e-6 and reference.margin["prune"] > 1e-8


ACTIVE = {"ltm": ("merged",), "ltp": ("pruned",)}


@all_variants
def test_the_masked_model_is_removal_mode(variant):
    spec = installed(variant)
    check_removal(spec, knobs_of(variant), pictures(), active=ACTIVE.get(variant, ("merged", "pruned")))


@pytest.mark.parametrize(("merge", "prune"), [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (-1.0, 0.0)])
def test_removal_mode_at_the_edges(merge, prune):
    """Everything similar merges, all but the class token is pruned, both, and every token of A merges."""
    knobs = knobs_of("ltmp", merge, prune)
    active = ("pruned",) if merge == 1 else ("merged",) if prune == 0 else ("merged", "pruned")
    check_removal(installed("ltmp"), knobs, pictures(), active=active)


def comparing(spec, variant, similarities, relative=0):
    """An installed spec whose layers compare different features."""
    made = [ltmp.Ltmp(spec.prefix, variant, tau=TAU, similarity=name, relative=relative) for name in similarities]
    return spec.edit(blocks=lambda layer, block: dataclasses.replace(block, reduce=ltmp.describe(made[layer])))


def test_removal_mode_with_distillation_token_registers_and_relative_importance():
    spec = comparing(EXTRA["prefix"], "ltmp", ("queries", "features"), relative=29)
    assert spec.prefix == 4 and spec.tokens == 29
    images = pictures(3, spec=spec)
    check_removal(spec, knobs_of("ltmp", (0.6, 0.4), (0.022, 0.018)), images)
    check_removal(spec, knobs_of("ltmp", -1.0, 1.0), images)


def test_removal_mode_without_a_prefix():
    spec = comparing(EXTRA["mean"], "ltpm", ("values", "keys"))
    images = pictures(3, spec=spec)
    check_removal(spec, knobs_of("ltpm", (0.5, 0.6), (0.022, 0.026)), images)
    check_removal(spec, knobs_of("ltpm", 0.0, 1.0), images, active=("pruned",))  # the most important one stays


@pytest.mark.parametrize("variant", ["ltmp", "ltm", "ltp"])
def test_the_first_faithful_block_is_removal_mode_up_to_order(variant):
    knobs = knobs_of(variant)
    spec = installed(variant, "faithful")
    _, blocks = forward(spec)(pictures(), knobs)
    first = blocks[0]
    reference = Removal(spec, parameters(), knobs)
    for row, image in enumerate(np.asarray(pictures())):
        told = reference.run(image)[1][0]
        for name in ("merged", "pruned", "kept"):
            assert first["decisions"][name][row] == told[name]
        slots = np.asarray(first["decisions"]["source"][row])
        np.testing.assert_array_equal(slots < 0, told["source"] < 0)
        held = slots >= 0
        np.testing.assert_array_equal(first["decisions"]["alive"][row, slots[held]], 1.0)
        np.testing.assert_allclose(first["tokens"].x[row, slots[held]], told["x"][told["source"][held]], atol=2e-5)
    assert reference.margin["merge"] > 1e-6 and reference.margin["prune"] > 1e-8


# Masks, sizes, owners.


@pytest.mark.parametrize("thresholds", [{}, {"merge": -1.0}, {"prune": 1.0}], ids=["some", "all merge", "all pruned"])
@both_forms
@all_variants
def test_masks_only_shrink_and_the_class_token_stays(variant, form, thresholds):
    if "merge" in thresholds and form == "faithful":
        thresholds = {"merge": 0.0}  # below 0 the release's dead tokens would merge again
    _, blocks = run(variant, form, **thresholds)
    slots = DENSE.tokens
    order = [0, *range(2, slots, 2), *range(1, slots, 2)]
    before = np.ones((5, slots), np.float32)
    for block in blocks:
        d, alive = block["decisions"], block["tokens"]["alive"]
        assert set(np.unique(alive)) <= {0.0, 1.0}
        np.testing.assert_array_equal(alive, d["alive"])
        np.testing.assert_array_equal(alive.sum(1), d["kept"])
        np.testing.assert_array_equal(before.sum(1) - d["merged"] - d["pruned"], d["kept"])
        if form == "consistent":
            np.testing.assert_array_equal(alive, np.arange(slots) < d["kept"][:, None])
        else:
            assert (alive <= (before[:, order] if ltmp.merges(variant) else before)).all()
        assert (alive[:, 0] == 1).all() and (d["source"][:, 0] == 0).all()
        assert (block["tokens"]["size"][:, 0] == 1).all()
        before = alive
    assert (before.sum(1) < slots).all()


@both_forms
@all_variants
def test_every_original_has_one_owner_or_was_pruned(variant, form):
    _, blocks = run(variant, form)
    previous = np.tile(np.arange(DENSE.tokens), (5, 1))
    pruned = np.zeros(5)
    for block in blocks:
        size, alive, source = (block["tokens"][name] for name in ("size", "alive", "source"))
        for row in range(5):
            assert (alive[row, source[row][source[row] >= 0]] == 1).all()
            owned = np.bincount(source[row][source[row] >= 0], minlength=DENSE.tokens)
            live = alive[row] > 0.5
            assert (owned[live] >= 1).all() and (owned[~live] == 0).all()
            if ltmp.merges(variant):
                np.testing.assert_array_equal(size[row, live], owned[live])
            gone = source[row] < 0
            assert gone[previous[row] < 0].all()  # what was pruned stays so
            for slot in set(previous[row]) - {-1}:  # what was joined stays joined
                assert len(set(source[row][previous[row] == slot])) == 1
            lost = gone.sum()
            assert owned.sum() + lost == DENSE.tokens and lost >= pruned[row]
            pruned[row] = lost
        if variant == "ltm":
            assert (pruned == 0).all()
            assert (size * alive).sum() == 5 * DENSE.tokens < size.sum()  # dead slots keep stale sizes
        previous = source
    assert (pruned > 0).all() or variant == "ltm"


@functools.partial(jax.jit, static_argnums=0)
def reduce(reducer, x, aux, thresholds):
    """(x, size, decisions) of a reducer alone."""
    knobs = dict(zip(("merge_threshold", "prune_threshold"), thresholds, strict=True))
    tokens, decisions = reducer(Tokens(x), aux, knobs)
    return tokens.x, ops.filled(tokens)[0], decisions


@all_variants
def test_reducers_never_touch_the_prefix(variant):
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(3, 13, 8)), jnp.float32)
    keys = jnp.asarray(np.repeat(rng.normal(size=(3, 1, 2, 4)), 13, axis=1), jnp.float32)  # all alike
    aux = {"keys": keys, "importance": jnp.zeros((3, 13))}  # and none important
    out, size, decisions = reduce(ltmp.Ltmp(4, variant), x, aux, (0.5, 0.5))
    np.testing.assert_array_equal(out[:, :4], x[:, :4])
    np.testing.assert_array_equal(size[:, :4], 1.0)
    np.testing.assert_array_equal(decisions["alive"][:, :4], 1.0)
    np.testing.assert_array_equal(decisions["source"][:, :4], np.tile(np.arange(4), (3, 1)))
    np.testing.assert_array_equal(decisions["kept"], 4 if ltmp.prunes(variant) else 8)  # 5 patches of A, 4 of B


@both_forms
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("variant", ["ltmp", "ltpm"])
def test_a_class_token_alone_or_with_one_patch_has_nobody_to_merge_with(variant, slots, form):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, slots, 8)), jnp.float32)
    aux = {"keys": x.reshape(2, slots, 2, 4), "importance": jnp.full((2, slots), 1.0 / slots)}
    out, _, decisions = reduce(ltmp.Ltmp(1, variant, form), x, aux, (0.0, 0.0))
    np.testing.assert_array_equal(out, x)
    np.testing.assert_array_equal(decisions["kept"], slots)
    np.testing.assert_array_equal(decisions["merged"], 0)


@both_forms
def test_a_token_without_a_direction_does_not_merge(form):
    rng = np.random.default_rng(3)
    keys = rng.normal(size=(1, 9, 2, 4)).astype(np.float32)
    keys[0, 4] = keys[0, 5] = 0.0
    aux = {"keys": jnp.asarray(keys)}
    x = jnp.asarray(rng.normal(size=(1, 9, 8)), jnp.float32)
    out, size, decisions = reduce(ltmp.Ltmp(1, "ltm", form), x, aux, (0.0, 0.0))
    assert decisions["merged"][0] >= 1 and decisions["merge_mask"][0, 1] == 0
    assert not (np.asarray(decisions["best_index"])[np.asarray(decisions["merge_mask"]) > 0] == 2).any()
    assert np.isfinite(out).all() and np.isfinite(size).all()


# Switching off.


@functools.cache
def dense_logits():
    return np.asarray(jax.jit(lambda x: ViT(DENSE).apply(parameters(), x)[0])(pictures()))


@both_forms
@all_variants
def test_merge_threshold_1_and_prune_threshold_0_are_the_dense_model(variant, form):
    logits, blocks = run(variant, form, **OFF)
    np.testing.assert_allclose(logits, dense_logits(), atol=2e-6)
    fractions = ltmp.alive_fractions({"blocks": blocks}, DENSE.tokens)
    np.testing.assert_array_equal(fractions, np.ones((len(blocks), 5)))
    spec = installed(variant, form)
    ratio, _ = ops.budget(fractions, DENSE.tokens, jnp.asarray(ltmp.costs(spec)))
    np.testing.assert_allclose(ratio, 1.0, atol=1e-6)


@both_forms
def test_twins_do_not_merge_at_threshold_1(form):
    rng = np.random.default_rng(5)
    pairs = np.repeat(rng.normal(size=(64, 3, 2, 16)), 2, axis=1)
    keys = jnp.asarray(np.concatenate([pairs[:, :1], pairs], 1), jnp.float32)  # slots (1, 2), (3, 4), (5, 6) are alike
    x = jnp.zeros((64, 7, 4))
    for threshold, merged in ((1.0, 0), (0.99999, 3)):
        _, _, decisions = reduce(ltmp.Ltmp(1, "ltm", form), x, {"keys": keys}, (threshold, 0.0))
        np.testing.assert_array_equal(decisions["merged"], merged)


@both_forms
def test_without_pruning_ltmp_is_ltm(form):
    (a, a_blocks), (b, b_blocks) = (run(variant, form, prune=0.0) for variant in ("ltmp", "ltm"))
    np.testing.assert_array_equal(a, b)
    for one, other in zip(a_blocks, b_blocks, strict=True):
        np.testing.assert_array_equal(one["decisions"]["source"], other["decisions"]["source"])
    assert (b_blocks[-1]["decisions"]["kept"] < DENSE.tokens).all()


@both_forms
def test_without_merging_ltmp_is_ltp(form):
    (a, a_blocks), (b, b_blocks) = (run(variant, form, merge=1.0) for variant in ("ltmp", "ltp"))
    np.testing.assert_allclose(a, b, atol=2e-6)
    for one, other in zip(a_blocks, b_blocks, strict=True):
        for name in ("kept", "pruned"):
            np.testing.assert_array_equal(one["decisions"][name], other["decisions"][name])
    assert (b_blocks[-1]["decisions"]["kept"] < DENSE.tokens).all()


@both_forms
@pytest.mark.parametrize("variant", ["ltmp", "ltm", "ltpm"])
def test_a_lower_merge_threshold_never_merges_less_in_the_first_block(variant, form):
    ladder = (1.0, 0.8, 0.7, 0.6, 0.5, 0.3, 0.0, -1.0)
    counts = np.stack([run(variant, form, merge=t)[1][0]["decisions"]["merged"] for t in ladder])
    assert (np.diff(counts, axis=0) >= 0).all() and (counts[0] == 0).all()
    assert (counts[-1] > counts[2]).all() and (variant == "ltpm" or (counts[-1] == 12).all())


@both_forms
@pytest.mark.parametrize("variant", ["ltmp", "ltp", "ltpm"])
def test_a_higher_prune_threshold_never_keeps_more_in_the_first_block(variant, form):
    ladder = (0.0, 0.01, 0.02, 0.03, 0.05, 0.1, 1.0)
    decisions = [run(variant, form, prune=t)[1][0]["decisions"] for t in ladder]
    pruned = np.stack([d["pruned"] for d in decisions])
    assert (np.diff(pruned, axis=0) >= 0).all() and (pruned[0] == 0).all() and (pruned[-1] > pruned[2]).all()
    assert (decisions[-1]["kept"] == 1).all()
    if variant != "ltpm":  # there, what is pruned can no longer merge
        assert (np.diff(np.stack([d["kept"] for d in decisions]), axis=0) <= 0).all()


# Images of a batch.


@both_forms
@all_variants
def test_images_do_not_know_their_batch_mates(variant, form):
    images = pictures()
    logits, blocks = run(variant, form, images)
    order = np.array([3, 0, 4, 1, 2])
    permuted, moved = run(variant, form, images[order])
    np.testing.assert_allclose(permuted, logits[order], atol=1e-6)
    others, mixed = run(variant, form, jnp.concatenate([images[:2], pictures(3, seed=9)]))
    np.testing.assert_allclose(others[:2], logits[:2], atol=1e-6)
    assert np.abs(others[2:] - logits[2:]).max() > 0.1
    for block, a, b in zip(blocks, moved, mixed, strict=True):
        source = block["decisions"]["source"]
        np.testing.assert_array_equal(a["decisions"]["source"], source[order])
        np.testing.assert_array_equal(b["decisions"]["source"][:2], source[:2])
    assert len({tuple(s) for s in source}) == 5  # ragged: every image reduces in its own way


@both_forms
@all_variants
def test_importances_of_live_tokens_sum_to_1(variant, form):
    _, blocks = run(variant, form)
    alive = np.ones((5, DENSE.tokens))
    for block in blocks:
        np.testing.assert_allclose((block["importance"] * alive).sum(1), 1.0, atol=1e-5)
        np.testing.assert_allclose(block["importance"] * (1 - alive), 0.0, atol=1e-7)
        alive = block["tokens"]["alive"]


# Gradients of the thresholds.

LABELS = jnp.asarray([0, 3, 6, 1, 1])


@functools.cache
def gradients(variant, form):
    """Jitted `(knobs) -> (jacobian of [ce, r, last block's live tokens], (logits, r, decisions))`, while training."""
    spec = installed(variant, form)
    model = ltmp.vit(spec, training=True)

    def values(knobs):
        logits, aux = model.apply(parameters(), pictures(), knobs=knobs)
        ce = losses.cross_entropy(logits, LABELS).mean()
        fractions = ltmp.alive_fractions(aux, spec.tokens)
        ratio, _ = ops.budget(fractions.mean(1), spec.tokens, jnp.asarray(ltmp.costs(spec)))
        live = fractions[-1].sum() * spec.tokens
        return jnp.stack([ce, ratio, live]), (logits, ratio, [b["decisions"] for b in aux["blocks"]])

    return jax.jit(jax.jacrev(values, has_aux=True))


def last_masks_gradient(variant, form, alive, decisions, merge, prune):
    """d(live tokens)/d(thresholds) of one block: the table of spec section 4, from what was decided upon."""

    def slope(values, threshold):
        p = 1 / (1 + np.exp(-(np.asarray(values, np.float64) - threshold) / TAU))
        return p * (1 - p) / TAU

    a, b = slice(2, None, 2), slice(1, None, 2)
    total = {"merge_threshold": 0.0, "prune_threshold": 0.0}
    for row, live in enumerate(np.asarray(alive) > 0.5):
        d = {name: np.asarray(value[row]) for name, value in decisions.items()}
        by_merge = slope(d["best_similarity"], merge) if "best_similarity" in d else None
        by_prune = slope(d["prune_score"], prune) if "prune_score" in d else None
        if variant == "ltm":
            total["merge_threshold"] += by_merge[live[a]].sum()
        elif variant == "ltp":
            total["prune_threshold"] -= by_prune[live].sum()
        elif variant == "ltmp":
            merged = d["merge_mask"] > 0.5
            total["merge_threshold"] += by_merge[live[a] & merged].sum()
            after = np.concatenate([live[:1], live[a] & ~merged, live[b]])
            total["prune_threshold"] -= by_prune[after].sum()
        else:
            left = live & (d["prune_mask"] > 0.5)
            order = np.argsort(~left, kind="stable") if form == "consistent" else np.arange(len(left))
            total["merge_threshold"] += by_merge[left[order][a]].sum()
            replaced = order[a][left[order][a]]  # their mask has become 1 - M(c)
            total["prune_threshold"] -= by_prune[live].sum() - by_prune[replaced].sum()
    return total


@both_forms
@all_variants
def test_the_last_blocks_masks_have_the_gradient_of_the_closed_form(variant, form):
    knobs = knobs_of(variant)
    jacobian, (_, _, decisions) = gradients(variant, form)(knobs)
    expected = last_masks_gradient(variant, form, decisions[0]["alive"], decisions[1], MERGE[1], PRUNE[1])
    costs = jnp.asarray(ltmp.costs(DENSE))
    fractions = jnp.stack([d["alive"].mean() for d in decisions])
    to_fractions = jax.grad(lambda f: ops.budget(f, DENSE.tokens, costs)[0])(fractions)
    for name, to in jacobian.items():
        np.testing.assert_allclose(to[2, 1], expected[name], rtol=1e-4)
        np.testing.assert_allclose(to[1, 1], to_fractions[1] * expected[name] / (5 * DENSE.tokens), rtol=1e-4)
        # While r exceeds its target, SGD lowers t_m and raises t_p.
        assert to[1, 1] > 0 if name == "merge_threshold" else to[1, 1] < 0


@both_forms
@all_variants
def test_the_last_blocks_thresholds_get_nothing_from_the_classification(variant, form):
    jacobian, _ = gradients(variant, form)(knobs_of(variant))
    for to in jacobian.values():
        assert to[0, 1] == 0.0
        assert abs(float(to[0, 0])) > 1e-6


@both_forms
def test_a_block_in_which_nothing_merges_gives_its_merge_threshold_nothing(form):
    run_one = gradients("ltmp", form)
    some, _ = run_one(knobs_of("ltmp", (0.6, 0.6)))
    assert (np.asarray(some["merge_threshold"][1]) != 0).all()
    none, (_, ratio, decisions) = run_one(knobs_of("ltmp", (1.0, 1.0)))
    assert all((d["merged"] == 0).all() for d in decisions) and ratio < 1
    np.testing.assert_array_equal(none["merge_threshold"], 0.0)
    assert (np.asarray(none["prune_threshold"][1]) != 0).all()
    first, _ = run_one(knobs_of("ltmp", (1.0, 0.6)))
    np.testing.assert_array_equal(first["merge_threshold"][:, 0], 0.0)
    assert first["merge_threshold"][1, 1] != 0
    alone, (_, _, decisions) = gradients("ltm", form)(knobs_of("ltm", (1.0, 1.0)))
    assert all((d["merged"] == 0).all() for d in decisions)
    assert (np.asarray(alone["merge_threshold"][1]) > 0).all()  # merging alone trains from 1


@all_variants
def test_the_training_softmax_of_the_faithful_form_is_within_its_epsilon(variant):
    knobs = knobs_of(variant)
    _, (training, _, _) = gradients(variant, "faithful")(knobs)
    evaluating, _ = run(variant, "faithful")
    np.testing.assert_allclose(training, evaluating, atol=2e-5)
    assert (np.asarray(training) != evaluating).any()
    _, (off, _, _) = gradients(variant, "faithful")(knobs_of(variant, **OFF))
    np.testing.assert_allclose(off, dense_logits(), atol=2e-5)


# Installing.


def test_where_thresholds_start():
    for variant, merge, prune in (("ltmp", 0.9, 0.0), ("ltm", 1.0, None), ("ltp", None, 0.0), ("ltpm", 1.0, 0.0)):
        _, thresholds = ltmp.install(DENSE, variant=variant)
        expected = {"merge_threshold": merge, "prune_threshold": prune}
        assert set(thresholds) == {name for name, value in expected.items() if value is not None}
        for name, values in thresholds.items():
            assert values.dtype == np.float32
            np.testing.assert_array_equal(values, np.full(2, expected[name], np.float32))
    _, given = ltmp.install(DENSE, merge_threshold=0.7, prune_threshold=0.01)
    assert given["merge_threshold"][0] == np.float32(0.7) and given["prune_threshold"][1] == np.float32(0.01)


def test_an_installed_spec_says_what_was_done_and_is_read_back():
    spec, _ = ltmp.install(NO_ATTENTION, variant="ltpm", tau=0.5, similarity="values", parent="abc")
    made = ltmp.reducers(spec)
    assert [layer for layer, _ in made] == [0] and spec.blocks[1].reduce is None
    assert made[0][1] == ltmp.Ltmp(1, "ltpm", "consistent", 0.5, "values", 0)
    assert from_dict(spec.to_dict()) == spec
    step = spec.lineage[-1]
    assert step.operation == "ltmp.install" and step.parent == "abc" and '"merge_threshold": 1.0' in step.arguments
    for reducer in (ltmp.Ltmp(1, "ltm", "faithful", 0.1, "keys"), ltmp.FixedRate(1, "merge_prune", 3, 2, "features")):
        assert ltmp.reducer(ltmp.describe(reducer), DENSE) == reducer


def test_the_consistent_form_of_a_spec():
    spec = installed("ltm", "faithful")
    made = ltmp.consistent(spec)
    assert made.blocks == installed("ltm").blocks and ltmp.consistent(made) == made
    fixed = ltmp.install_fixed(DENSE, "prune", {1: (0, 3)})
    assert ltmp.consistent(fixed) == fixed


def test_costs_floor_and_relaxed_thresholds():
    n, width, hidden = DENSE.tokens, 32, 48
    row = [4 * width**2, 2 * width, 2 * width * hidden]
    np.testing.assert_array_equal(ltmp.costs(DENSE), [row] * 2)
    dense = 2 * (row[0] * n + row[1] * n * n + row[2] * n)
    assert ltmp.dense_macs(DENSE) == dense
    spec = installed("ltp")
    _, blocks = run("ltp", prune=1.0)
    fractions = ltmp.alive_fractions({"blocks": blocks}, n)
    ratio = ops.budget(fractions, n, jnp.asarray(ltmp.costs(spec)))[0]
    np.testing.assert_allclose(ratio, ltmp.floor(spec), rtol=1e-6)
    least = row[0] * n + row[1] * n * n + row[2] + sum(row)
    assert ltmp.floor(spec) == pytest.approx(least / dense, rel=1e-5)
    late = ltmp.install_fixed(DENSE, "prune", {1: (0, 3)})
    assert ltmp.floor(late) == pytest.approx((dense - row[2] * (n - 1)) / dense, rel=1e-5)
    given = {"merge_threshold": np.array([0.6, 0.8]), "prune_threshold": np.array([0.02, 0.04])}
    half = ltmp.relaxed(given, 0.5)
    np.testing.assert_allclose(half["merge_threshold"], [0.8, 0.9])
    np.testing.assert_allclose(half["prune_threshold"], [0.01, 0.02])
    np.testing.assert_array_equal(ltmp.relaxed(given, 1.0)["merge_threshold"], 1.0)
    np.testing.assert_array_equal(ltmp.relaxed(given, 1.0)["prune_threshold"], 0.0)


def test_fractions_of_blocks_that_do_not_reduce():
    kept = {"decisions": {"kept": jnp.asarray([13.0, 26.0])}}
    aux = {"blocks": [{}, kept, {}], "pooled": jnp.zeros((2, 4))}
    np.testing.assert_array_equal(ltmp.alive_fractions(aux, 26), [[1, 1], [0.5, 1], [0.5, 1]])


# Fixed rates.


@pytest.mark.parametrize("variant", ltmp.FIXED)
def test_a_fixed_rate_removes_what_it_says(variant):
    merge, prune = (3 if ltmp.merges(variant) else 0), (2 if ltmp.prunes(variant) else 0)
    rates = {0: (merge, prune), 1: (99, 99)}
    spec = ltmp.install_fixed(DENSE, variant, rates)
    model = ltmp.vit(spec)
    logits, aux = jax.jit(lambda x: model.apply(parameters(), x, want=("tokens",)))(pictures(2))
    assert np.isfinite(logits).all()
    first = aux["blocks"][0]["decisions"]
    np.testing.assert_array_equal(first["merged"], merge)
    np.testing.assert_array_equal(first["pruned"], prune)
    left = 26 - merge - prune
    np.testing.assert_array_equal(first["kept"], left)
    assert aux["blocks"][0]["tokens"].x.shape[1] == left == ltmp.fixed_tokens(spec)[1]
    for _ in range(ltmp.merges(variant) + ltmp.prunes(variant)):
        left -= (left - 1) // 2  # a rate is at most half of the patch tokens that are there
    assert aux["tokens"].x.shape[1] == left == ltmp.fixed_tokens(spec)[2] and aux["tokens"].alive is None
    source = np.asarray(aux["tokens"].source)
    for row in range(2):
        owned = np.bincount(source[row][source[row] >= 0], minlength=left)
        assert (owned >= 1).all() and source[row, 0] == 0
        assert (source[row] < 0).any() == ltmp.prunes(variant)
        if ltmp.merges(variant):
            np.testing.assert_array_equal(aux["tokens"].size[row], owned)


def test_the_schedule_of_one_rate_goes_from_merging_to_pruning():
    assert ltmp.schedule(8, 12) == [(8 - p, p) for p in (1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7)]
    assert ltmp.schedule(3, 1) == [(2, 1)]


# What is refused.

REDUCED = ltmp.install(DENSE)[0]
UNPOOLED = DENSE.edit(pooling="none")
REGISTERS = DENSE.edit(registers=1)
NO_ATTENTION = DENSE.edit(blocks={1: {"attn": False}})

INSTALL = {
    "variant": (DENSE, {"variant": "ltmpm"}, "variant must be one of ltmp, ltm, ltp, ltpm, found 'ltmpm'"),
    "form": (DENSE, {"form": "exact"}, "form must be one of consistent, faithful, found 'exact'"),
    "similarity": (DENSE, {"similarity": "cls"}, "similarity must be one of keys, .*, found 'cls'"),
    "tau 0": (DENSE, {"tau": 0.0}, "tau must be positive and finite, found 0.0"),
    "tau negative": (DENSE, {"tau": -0.1}, "tau must be positive and finite, found -0.1"),
    "tau infinite": (DENSE, {"tau": float("inf")}, "tau must be positive and finite, found inf"),
    "tau nan": (DENSE, {"tau": float("nan")}, "tau must be positive and finite, found nan"),
    "merge above 1": (DENSE, {"merge_threshold": 1.5}, r"merge_threshold must be finite and in \[0, 1\], found \[1.5"),
    "prune below 0": (DENSE, {"prune_threshold": -0.1}, r"prune_threshold must be finite and in \[0, 1\], found \[-0"),
    "merge nan": (DENSE, {"merge_threshold": float("nan")}, r"merge_threshold must be finite .* found \[nan"),
    "ltm prunes": (DENSE, {"variant": "ltm", "prune_threshold": 0.1}, "prune_threshold has no meaning .*'ltm'.* 0.1"),
    "ltp merges": (DENSE, {"variant": "ltp", "merge_threshold": 0.1}, "merge_threshold has no meaning .*'ltp'.* 0.1"),
    "distilled, faithful": (EXTRA["prefix"], {"form": "faithful"}, "only prefix token.*found class_token=True, 4 pref"),
    "registers, faithful": (REGISTERS, {"form": "faithful"}, "faithful form .*found class_token=True, 2 prefix"),
    "no class, faithful": (EXTRA["mean"], {"form": "faithful"}, "faithful form .*class_token=False, 0 .*'mean'"),
    "mean, faithful": (DENSE.edit(pooling="mean"), {"form": "faithful"}, "faithful form .*, 1 prefix .*'mean'"),
    "relative, faithful": (DENSE, {"form": "faithful", "relative": True}, "expected relative=0, found 26"),
    "prune_tau": (DENSE, {"prune_tau": -0.1}, r"prune_tau must be 0 \(as tau\) or more, and finite, found -0.1"),
    "prune_tau, faithful": (
        DENSE,
        {"form": "faithful", "prune_tau": 1e-3},
        "one tau, expected prune_tau=0, found 0.001",
    ),
    "attached, faithful": (DENSE, {"form": "faithful", "attached": True}, "masks only, expected attached=0, found 1"),
    "unpooled": (UNPOOLED, {}, "ltmp needs a pooled output, found pooling='none'"),
    "twice": (REDUCED, {}, r"blocks\[0\] reduces already \(ltmp:thresholds.*expected none"),
}


@pytest.mark.parametrize("case", INSTALL)
def test_install_refuses(case):
    spec, arguments, message = INSTALL[case]
    with pytest.raises(InputError, match=message):
        ltmp.install(spec, **arguments)


FIXED = {
    "variant": (DENSE, "ltmp", {0: (1, 1)}, {}, "variant must be one of merge, prune, .*, found 'ltmp'"),
    "similarity": (DENSE, "merge", {0: (1, 0)}, {"similarity": "cls"}, "similarity must be one of .*, found 'cls'"),
    "merge negative": (DENSE, "merge", {0: (-1, 0)}, {}, r"rates \(merge, prune\) must be 0 or more, found \(-1, 0\)"),
    "prune negative": (DENSE, "prune", {1: (0, -2)}, {}, r"rates \(merge, prune\) must be 0 or more, found \(0, -2\)"),
    "layer above": (DENSE, "merge", {2: (1, 0)}, {}, r"rates\[2\] must name a block with attention, of 2, found none"),
    "layer below": (DENSE, "merge", {-1: (1, 0)}, {}, r"rates\[-1\] must name a block with attention"),
    "no attention": (NO_ATTENTION, "merge", {1: (1, 0)}, {}, r"rates\[1\] must name a block with attention"),
    "twice": (REDUCED, "merge", {0: (1, 0)}, {}, r"blocks\[0\] reduces already"),
}


@pytest.mark.parametrize("case", FIXED)
def test_install_fixed_refuses(case):
    spec, variant, rates, arguments, message = FIXED[case]
    with pytest.raises(InputError, match=message):
        ltmp.install_fixed(spec, variant, rates, **arguments)


GOOD = ltmp.describe(ltmp.Ltmp(1))
RATES = ltmp.describe(ltmp.FixedRate(1, "merge", 1, 0))

READ = {
    "another method": (GOOD.replace("ltmp:", "tome:", 1), DENSE, "reduce must read as ltmp.describe writes it"),
    "another kind": (GOOD.replace("thresholds", "counts"), DENSE, "reduce must read as ltmp.describe writes it"),
    "name alone": ("ltmp", DENSE, "must read as ltmp.describe writes it, found 'ltmp'"),
    "field missing": (GOOD.replace(",tau=0.1", ""), DENSE, "must read as ltmp.describe writes it"),
    "field unknown": (GOOD + ",layers=3", DENSE, "must read as ltmp.describe writes it"),
    "no number": (GOOD.replace("tau=0.1", "tau=warm"), DENSE, "must hold numbers where ltmp.describe writes them"),
    "no whole number": (RATES.replace("merge=1", "merge=1.5"), DENSE, "must hold numbers where ltmp.describe"),
    "variant": (GOOD.replace("variant=ltmp", "variant=lpm"), DENSE, "variant must be one of ltmp, .*found 'lpm'"),
    "form": (GOOD.replace("consistent", "exact"), DENSE, "form must be one of consistent, faithful, found 'exact'"),
    "similarity": (GOOD.replace("keys", "cls"), DENSE, "similarity must be one of .*found 'cls'"),
    "tau": (GOOD.replace("tau=0.1", "tau=-1"), DENSE, "tau must be positive and finite, found -1.0"),
    "another model": (GOOD.replace("consistent", "faithful"), REGISTERS, "faithful form needs a class token"),
    "unpooled": (GOOD, UNPOOLED, "needs a pooled output"),
}


@pytest.mark.parametrize("case", READ)
def test_reducer_refuses(case):
    text, spec, message = READ[case]
    assert ltmp.reducer(GOOD, DENSE) == ltmp.Ltmp(1)
    with pytest.raises(InputError, match=message):
        ltmp.reducer(text, spec)


@pytest.mark.parametrize(
    ("spec", "made", "message"),
    [
        (DENSE, ltmp.Ltmp(1, "prune"), "variant must be one of"),
        (DENSE, ltmp.Ltmp(1, form="masked"), "form must be one of"),
        (DENSE, ltmp.Ltmp(1, similarity="importance"), "similarity must be one of"),
        (DENSE, ltmp.Ltmp(1, tau=0.0), "tau must be positive"),
        (EXTRA["prefix"], ltmp.Ltmp(4, form="faithful"), "faithful form needs a class token"),
        (DENSE, ltmp.Ltmp(1, form="faithful", relative=26), "plain importance, expected relative=0, found 26"),
        (DENSE, ltmp.Ltmp(1, form="faithful", attached=1), "masks only, expected attached=0, found 1"),
        (UNPOOLED, ltmp.Ltmp(1), "needs a pooled output"),
    ],
)
def test_check_refuses(spec, made, message):
    with pytest.raises(InputError, match=message):
        ltmp.check(spec, made)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5, 0.5], r"t must hold one number per block, \[3\], found \[2\]"),
        (0.5, r"t must hold one number per block, \[3\], found \[\]"),
        ([[0.5, 0.5, 0.5]], r"t must hold one number per block, \[3\], found \[1, 3\]"),
        ([0.5, 1.0001, 0.5], r"t must be finite and in \[0, 1\], found \[0.5, 1.0001, 0.5\]"),
        ([0.5, -0.0001, 0.5], r"t must be finite and in \[0, 1\]"),
        ([0.5, float("nan"), 0.5], r"t must be finite and in \[0, 1\]"),
        ([float("inf"), 0.0, 0.5], r"t must be finite and in \[0, 1\]"),
    ],
)
def test_check_thresholds_refuses(values, message):
    ltmp.check_thresholds("t", [0.0, 0.5, 1.0], 3)
    with pytest.raises(InputError, match=message):
        ltmp.check_thresholds("t", values, 3)
