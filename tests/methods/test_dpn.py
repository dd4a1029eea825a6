# SPDX-License-Identifier: Apache-2.0
"""DPN in a decoder: against a reference that moves tokens, one sample at a time; insertion, generation, deployment."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtjax import methods, spec, weights
from vtjax.account import flops
from vtjax.account import params as account
from vtjax.errors import InputError
from vtjax.methods import das, dpn, dpn_deploy, dpn_switch
from vtjax.models import segments
from vtjax.models.adapters import STYLES
from vtjax.models.vlm import VLM
from vtjax.ops import pooling_experts as ops
from vtjax.ops.tokens import Tokens
from vtjax.spec import BridgeSpec, CrossSpec, LMSpec, ViTSpec, VLMSpec
from vtjax.weights import names

TOWER = ViTSpec.uniform(depth=1, width=12, heads=2, mlp=16, image_size=16, patch=2)
TEXT = functools.partial(LMSpec.uniform, width=16, heads=4, kv_heads=2, mlp=24, vocab=29, context=120)
AT, DEPTH = (1, 2, 3), 5  # as few layers as three stages need
BASE, SMALL = (VLMSpec(TOWER, BridgeSpec(hidden=20), TEXT(depth=depth), 5) for depth in (8, DEPTH))
KEY = jax.random.key(0)
put = functools.partial(dpn.install, BASE, None, KEY)
SPEC, _ = dpn.install(SMALL, None, KEY, at=AT, least=2)
SEARCH, _ = das.install(SMALL, None, STYLES["llama"], None, among=(1, 3))
CHECKED = VLM(SPEC, reducers=dpn.reducers(SPEC))
GRID, N = (8, 8), 64


def drawn(model_spec):
    """Parameters at random, routers that differ between samples included."""
    noise = np.random.default_rng(2)
    flat = {n: 0.3 * noise.normal(size=shape).astype(np.float32) for n, shape in names.shapes(model_spec).items()}
    made = names.unflatten({name: a + (name.endswith("scale")) for name, a in flat.items()})
    made = dpn.added(model_spec, made, jax.random.key(1))
    routers = dpn.fresh(model_spec, jax.random.key(9))
    made["decoder"]["dpn"] = jax.tree.map(lambda a: 20 * a if a.ndim == 2 else a, routers)
    return made


def questions():
    """Three texts of one image each, of different lengths, padded right."""
    rng = np.random.default_rng(0)
    ids, mask = np.full((3, N + 9), 7, np.int32), np.zeros((3, N + 9), np.int32)
    for row, (before, after) in enumerate([(1, 5), (3, 3), (0, 6)]):
        text = [*rng.integers(6, 29, before), *[5] * N, *rng.integers(6, 29, after - 1), SPEC.router_token, 8]
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    return ids, mask, rng.normal(size=(3, 16, 16, 3)).astype(np.float32)


def gapped():
    """A question with a word between two placeholders."""
    ids = IDS[:1].copy()
    first = (ids[0] == 5).argmax()
    ids[0, [first - 1, first + 1]] = ids[0, [first + 1, first - 1]]
    return ids, IMAGES[:1]


PARAMS = jax.tree.map(jnp.asarray, drawn(SPEC))
IDS, MASK, IMAGES = questions()


def with_filters():
    """The same with filters of depthwise pooling at random."""
    noise, own = np.random.default_rng(3), dict(PARAMS["decoder"]["dpn"])
    for name in own.keys() - {"relax"}:
        filters = {f"{h}x{w}": jnp.asarray(noise.normal(size=(h * w, 16)), jnp.float32) for h, w in ops.WINDOWS[1:]}
        own[name] = {**own[name], "filters": filters}
    return {**PARAMS, "decoder": {**PARAMS["decoder"], "dpn": own}}


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, ids, mask, images, knobs):
    y, aux = model.apply(params, ids, images, mask, knobs=knobs)
    return y, dpn.decisions(aux, SPEC) if model.reducers else {}, aux["tokens"].alive, aux["tokens"].position


def masked(knobs=None, params=PARAMS, **options):
    return run(dpn.vlm(SPEC, **options), params, IDS, MASK, IMAGES, knobs or {})


@functools.partial(jax.jit, static_argnames="layers")
def through(decoder, x, layers):
    return segments.run(VLM(SPEC.unreduced()).lm.blocks(), decoder, Tokens(x), layers=layers)[0].x


def reference(row, path=None, gate="prob", pool="max"):
    """Logits of one sample whose pooled tokens are gone, its experts, and the positions of each segment."""
    plain = VLM(SPEC.unreduced())
    known, _ = plain.enter(PARAMS, IDS[row : row + 1], IMAGES[row : row + 1])
    live = MASK[row] > 0
    x, start = known["embeddings"][:, live], int((IDS[row] == 5).argmax())
    asks = np.flatnonzero(IDS[row][live] == SPEC.router_token)[0] - N
    grid, n, chosen = GRID, N, []
    decoder = {name: tree for name, tree in PARAMS["decoder"].items() if name != "dpn"}
    for stage, layers in enumerate(itertools.starmap(range, itertools.pairwise((0, *AT, DEPTH)))):
        x = through(decoder, x, layers)
        if stage == 3:
            break
        router = PARAMS["decoder"]["dpn"][f"block_{layers[-1]:02d}"]["router"]
        logp = ops.scores(x[:, asks + n], router, 10.0)
        expert = int(logp.argmax()) if path is None else path[stage]
        (h, w), (rows, columns) = ops.WINDOWS[expert], grid
        cells = x[:, start : start + n].reshape(rows // h, h, columns // w, w, -1)
        made = cells.max((1, 3)) if pool == "max" else cells.mean((1, 3))
        scale = {"prob": jnp.exp(logp)[0, expert], "off": 1.0, "st": 1.0}[gate]
        x = jnp.concatenate([x[:, :start], made.reshape(1, -1, x.shape[2]) * scale, x[:, start + n :]], axis=1)
        grid, n = (rows // h, columns // w), n // (h * w)
        chosen.append(expert)
    lm = plain.lm
    return np.asarray(lm._logits(PARAMS["decoder"], lm._norm(PARAMS["decoder"], x)))[0], chosen, n


@pytest.mark.parametrize(
    ("gate", "pool", "path"),
    [
        ("prob", "max", None),
        ("prob", "avg", (1, 1, 2)),
        pytest.param("off", "max", (2, 0, 1), marks=pytest.mark.slow),
        pytest.param("st", "avg", (2, 2, 2), marks=pytest.mark.slow),
    ],
)
def test_masked_tokens_are_tokens_that_are_gone(gate, pool, path):
    y, made, alive, position = masked({} if path is None else dpn.forced(SPEC, path), gate=gate, pool=pool)
    for row in range(3):
        expected, chosen, n = reference(row, path, gate, pool)
        live = np.asarray(alive[row]) > 0
        assert np.asarray(made["choice"][row]).tolist() == chosen
        np.testing.assert_allclose(np.asarray(y[row])[live], expected, atol=1e-4)
        assert np.asarray(position[row])[live].tolist() == list(range(len(expected)))
        assert float(made["visual"][row, 2]) == n and float(made["live"][row, 2]) == len(expected)
    if path is None:
        assert len({tuple(c) for c in np.asarray(made["choice"]).tolist()}) > 1, "the samples decide alike"


def test_identity_with_a_gate_of_one_is_the_model_it_was_put_into_exactly():
    dense = run(VLM(SPEC.unreduced()), PARAMS, IDS, MASK, IMAGES, {})[0]
    live = MASK > 0
    y = masked(dpn.forced(SPEC, (0, 0, 0)), gate="st")[0]
    np.testing.assert_array_equal(np.asarray(y)[live], np.asarray(dense)[live])
    faint = masked(dpn.forced(SPEC, (0, 0, 0)), gate="prob")[0]
    assert np.abs(np.asarray(faint) - np.asarray(dense))[live].max() > 0.1
    for gate in ops.GATES:  # the guard's way back
        relaxed = masked({"relax": jnp.float32(1.0)}, gate=gate)[0]
        np.testing.assert_array_equal(np.asarray(relaxed)[live], np.asarray(dense)[live])


def test_a_sample_decides_for_itself_and_by_its_question():
    y, made, _, _ = masked()
    images = IMAGES.copy()
    images[1] += 3
    other, also, _, _ = run(dpn.vlm(SPEC), PARAMS, IDS, MASK, images, {})
    for row in (0, 2):
        np.testing.assert_array_equal(np.asarray(y)[row][MASK[row] > 0], np.asarray(other)[row][MASK[row] > 0])
        np.testing.assert_array_equal(made["p"][row], also["p"][row])
    assert np.abs(np.asarray(made["p"] - also["p"]))[1].max() > 1e-3
    behind = IDS.copy()
    last = MASK.sum(1) - 1  # behind the router token: the answer
    behind[np.arange(3), last] = 9
    np.testing.assert_array_equal(made["p"], run(dpn.vlm(SPEC), PARAMS, behind, MASK, IMAGES, {})[1]["p"])
    asked = IDS.copy()
    asked[np.arange(3), last - 2] = (asked[np.arange(3), last - 2] - 6 + 5) % 23 + 6
    assert np.abs(made["p"] - run(dpn.vlm(SPEC), PARAMS, asked, MASK, IMAGES, {})[1]["p"]).max() > 1e-4


def test_padding_on_either_side_and_texts_without_an_image():
    y, made, _, _ = masked()
    shift = IDS.shape[1] - MASK.sum(1)
    left = [np.stack([np.roll(row, k) for row, k in zip(a, shift, strict=True)]) for a in (IDS, MASK)]
    z, also, _, _ = run(dpn.vlm(SPEC), PARAMS, *left, IMAGES, {})
    np.testing.assert_array_equal(made["choice"], also["choice"])
    for row in range(3):
        np.testing.assert_allclose(z[row][-1], y[row][MASK[row].sum() - 1], atol=1e-4)
    text = np.random.default_rng(4).integers(6, 29, (2, 7)).astype(np.int32)
    one = jax.jit(lambda m, p: m.apply(p, text)[0], static_argnums=0)
    np.testing.assert_array_equal(one(dpn.vlm(SPEC), PARAMS), one(VLM(SPEC.unreduced()), PARAMS))


@pytest.mark.slow
def test_draws_keep_the_floor_and_follow_the_key():
    many = jax.jit(
        jax.vmap(lambda key: run(dpn.vlm(SPEC, least=9), PARAMS, IDS, MASK, IMAGES, dpn.drawing(SPEC, key))[1])
    )
    made = many(jax.random.split(jax.random.key(0), 40))
    assert float(made["visual"].min()) >= 9 and len(np.unique(made["choice"])) == 3
    assert (np.diff(made["visual"], axis=-1) <= 0).all()
    again = many(jax.random.split(jax.random.key(0), 40))
    np.testing.assert_array_equal(made["choice"], again["choice"])
    random = jax.jit(
        jax.vmap(lambda key: run(dpn.vlm(SPEC, mode="random"), PARAMS, IDS, MASK, IMAGES, dpn.drawing(SPEC, key))[1])
    )
    share = np.bincount(np.asarray(random(jax.random.split(jax.random.key(1), 200))["choice"])[..., 0].ravel()) / 600
    np.testing.assert_allclose(share, 1 / 3, atol=0.08)


def test_random_routing_without_a_key_takes_the_given_experts():
    """As in evaluation, where an expert is drawn by the question's number; it needs one or the other."""
    layer, reducer = dpn.reducers(SPEC)[0]
    reducer = dataclasses.replace(reducer, mode="random")
    held = {"router": PARAMS["decoder"]["dpn"][f"block_{layer:02d}"]["router"]}
    read = jnp.zeros((3, SPEC.decoder.width)), jnp.full(3, N), jnp.array([True, True, False])
    choice = reducer.decide(*read, {**held, "choice": jnp.array([2, 1, 2])})[1]
    assert choice.tolist() == [2, 1, 0]
    with pytest.raises(InputError, match="random routing needs the knob route_key or choice, found neither"):
        reducer.decide(*read, held)


def answer_slopes(after):
    """Gradient of a loss of the text in each router, with `after` layers behind the last stage."""
    last = dpn.describe(dpn.Dpn(2, GRID, least=1))
    blocks = {AT[2] - 1: {"reduce": None}, DEPTH - 1 - after: {"reduce": last}}
    made = SPEC.edit(decoder=SPEC.decoder.edit(blocks=blocks))
    params = {**PARAMS, "decoder": {**PARAMS["decoder"], "dpn": dpn.fresh(made, jax.random.key(1))}}
    text = (MASK > 0) & (IDS != 5)

    def loss(routers):
        held = {**params, "decoder": {**params["decoder"], "dpn": routers}}
        y, _ = dpn.vlm(made).apply(held, IDS, IMAGES, MASK, knobs=dpn.forced(made, (1, 1, 1)))
        return (jax.nn.log_softmax(y)[..., 8] * text).sum()

    slope = jax.jit(jax.grad(loss))(params["decoder"]["dpn"])
    return [
        float(jnp.abs(tree["router"]["score"]["kernel"]).max())
        for name, tree in sorted(slope.items())
        if name != "relax"
    ]


def test_the_answer_reaches_a_router_two_layers_before_the_end_but_not_one(monkeypatch):
    """RMSNorm of the next layer hides the scale of pooled tokens from the text (spec section 3); so one is refused."""
    reached = answer_slopes(2)
    assert min(reached) > 1e-4
    with pytest.raises(InputError, match="dpn needs at least 2 layers after its last stage, found 1"):
        answer_slopes(1)
    monkeypatch.setattr(dpn, "AFTER", 1)
    assert answer_slopes(1)[-1] < 1e-3 * reached[-1]


def test_generation_after_a_pooled_prefill_is_full_recomputation():
    model, new = dpn.vlm(SPEC), 5
    tokens, _ = model.generate(PARAMS, IDS, IMAGES, MASK, new_tokens=new)
    ids, mask = (np.pad(a, ((0, 0), (0, new))) for a in (IDS, MASK))
    chosen = dpn.given(SPEC, masked()[1]["choice"])  # decided before the answer
    for _ in range(new):
        y = np.asarray(run(model, PARAMS, ids, mask, IMAGES, chosen)[0])
        for row, at in enumerate(mask.sum(1)):
            ids[row, at], mask[row, at] = y[row, at - 1].argmax(), 1
    assert tokens.tolist() == [row[kept > 0][-new:].tolist() for row, kept in zip(ids, mask, strict=True)]
    staged = dpn_deploy.Staged(model, keep=new - 1)
    rows = dpn_deploy.entered(model, PARAMS, IDS, IMAGES, MASK)
    short, _, choice = staged.generate(PARAMS, rows, new)
    assert short.tolist() == tokens.tolist() and choice.tolist() == masked()[1]["choice"].tolist()
    cache = staged(PARAMS, rows).cache
    lengths = [cache.keys[f"block_{layer:02d}"].shape[2] for layer in (0, *AT)]
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] < lengths[0] - 40
    assert dpn_deploy.cache_bytes(cache) < 0.8 * DEPTH * 2 * 3 * lengths[0] * 2 * 4 * 4
    # One question alone: one program for every path, and caches cut to the path.
    switch = dpn_switch.Switch(model, keep=new - 1)
    for row in range(2):
        alone = dpn_deploy.entered(model, PARAMS, IDS[row : row + 1], IMAGES[row : row + 1], MASK[row : row + 1])
        again, _, path = switch.generate(PARAMS, alone, new)
        assert again[0].tolist() == tokens[row].tolist() and path[0].tolist() == choice[row].tolist()
        held = switch.prefill(PARAMS, alone).cache
        left = [N // 2 ** sum(path[0, :stage]) for stage in range(4)]  # an expert halves as often as its number says
        slots = [n + alone.asks.shape[1] + new - 1 for n in left]
        assert [held.keys[f"block_{layer:02d}"].shape[2] for layer in (0, *AT)] == slots
        assert [stretch.alive.sum() for stretch in held.stretches] == [n + MASK[row].sum() - N for n in left]


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"pool": "avg"}, marks=pytest.mark.slow),
        pytest.param({"pool": "dwconv"}, marks=pytest.mark.slow),
        pytest.param({"reads": "last_prompt"}, marks=pytest.mark.slow),
    ],
)
def test_deployed_forms_say_what_the_masked_model_says(options):
    params = with_filters() if options.get("pool") == "dwconv" else PARAMS
    model = dpn.vlm(SPEC, **options)
    rows = dpn_deploy.entered(model, params, IDS, IMAGES, MASK)
    y, made, _, _ = masked(params=params, **options)
    last = np.asarray(y)[np.arange(3), MASK.sum(1) - 1]
    done = dpn_deploy.Staged(model)(params, rows)
    assert done.choice.tolist() == made["choice"].tolist()
    np.testing.assert_allclose(done.logits, last, atol=2e-5)
    paths = np.array([[2, 0, 1], [0, 0, 0], [2, 0, 2]], np.int32)
    forced = dpn_deploy.Staged(model)(params, rows, paths)
    also = np.asarray(masked(dpn.given(SPEC, jnp.asarray(paths)), params, **options)[0])[np.arange(3), MASK.sum(1) - 1]
    np.testing.assert_allclose(forced.logits, also, atol=2e-5)
    leaning = {**params["decoder"], "dpn": {**params["decoder"]["dpn"], "relax": jnp.float32(1.0)}}
    assert (dpn_deploy.Staged(model)({**params, "decoder": leaning}, rows).choice == 0).all()  # the guard's dense path
    switch = jax.jit(dpn_switch.Switch(model).__call__)
    for row in range(3):
        part = [a[row : row + 1] for a in (IDS, IMAGES, MASK)]
        logits, choice, cache = switch(params, dpn_deploy.entered(model, params, *part))
        assert choice[0].tolist() == made["choice"][row].tolist() and cache is None
        np.testing.assert_allclose(logits[0], last[row], atol=2e-5)


def test_remat_changes_nothing_and_half_precision_little():
    y, made, _, _ = masked()
    z, also, _, _ = masked(remat="full")
    np.testing.assert_allclose(z, y, atol=1e-5)
    half, chosen, _, _ = masked(dpn.given(SPEC, made["choice"]), dtype=jnp.bfloat16)
    assert also["p"].dtype == jnp.float32 and chosen["p"].dtype == jnp.float32
    live = MASK > 0
    assert np.abs(np.asarray(half) - np.asarray(y))[live].max() < 0.1 * np.abs(np.asarray(y)).max()


def test_a_cross_attention_bridge_pools_the_images_that_all_layers_read():
    """Per image, in place: pooled away tokens have number 0; text keeps its slots and its experts."""
    bridge = BridgeSpec("mlp", hidden=20, cross=CrossSpec.flamingo((0, 2, 4), 16, 2, 6))
    made, _ = dpn.install(dataclasses.replace(SMALL, bridge=bridge), None, jax.random.key(0), at=AT, least=2)
    params = drawn(made.unreduced())
    params["decoder"]["dpn"] = dpn.fresh(made, jax.random.key(1))
    ids = np.random.default_rng(7).integers(6, 29, (2, 10)).astype(np.int32)
    ids[:, [1, 4]], ids[:, 7] = 5, made.router_token
    images = np.random.default_rng(4).normal(size=(2, 2, 16, 16, 3)).astype(np.float32)
    model = dpn.vlm(made, gate="st")

    @functools.partial(jax.jit, static_argnums=1)
    def apply(params, ids, images, knobs):
        y, aux = model.apply(params, np.asarray(ids, np.int32), images, knobs=knobs)
        memory = aux["tokens"].memory
        return y, dpn.decisions(aux, made), memory.number, memory.x, aux["visual"]

    dense = jax.jit(lambda p: VLM(made.unreduced()).apply(p, ids, images)[0])(params)
    asked = tuple(map(tuple, ids.tolist()))
    same, _, number, _, _ = apply(params, asked, images, dpn.forced(made, (0, 0, 0)))
    np.testing.assert_array_equal(same, dense)
    path = dpn.forced(made, (2, 1, 0))
    y, decided, number, x, visual = apply(params, asked, images, path)
    assert decided["visual"][0].tolist() == [32, 16, 16] and decided["visual_before"][0].tolist() == [128, 32, 16]
    assert np.abs(np.asarray(y - dense)).max() > 1e-3
    # Each image on its own grid: 2 x 2, then 1 x 2.
    cells = np.asarray(visual).reshape(2, 2, 4, 2, 2, 4, -1).max((3, 5))
    np.testing.assert_array_equal(np.asarray(x)[np.asarray(number) > 0], cells.reshape(-1, cells.shape[-1]))
    assert (np.asarray(number) > 0).sum(1).tolist() == [2 * N // 8] * 2
    # Work: of the text, and of what it reads.
    rows = flops.layers(made.unreduced(), 10)
    whole = sum(row.macs for row in rows if row.name.startswith(("decoder/block", "bridge/block")))
    assert dpn.path_macs(made, (0, 0, 0), 10) == whole
    start, live = jnp.full(2, 10.0), jnp.full((2, 3), 10.0)
    read = jnp.concatenate([decided["visual_before"][:, :1], decided["visual"]], axis=1)
    spent = dpn.macs(made, start, live, read / 2)  # two images, of which `path_macs` counts one
    np.testing.assert_allclose(spent, [dpn.path_macs(made, (2, 1, 0), 10)] * 2, rtol=1e-6)
    p = jax.nn.one_hot(jnp.asarray([[2, 1, 0]] * 2), 3)
    np.testing.assert_allclose(dpn.expected_macs(made, start, jnp.full(2, 64.0), p), spent, rtol=1e-6)
    # New tokens read what the stages left.
    tokens, _ = model.generate(params, ids, images, new_tokens=3, knobs=path)
    text = ids
    for _ in range(3):
        z = apply(params, tuple(map(tuple, text.tolist())), images, path)[0]
        text = np.concatenate([text, np.asarray(z)[:, -1:].argmax(-1).astype(np.int32)], axis=1)
    assert tokens.tolist() == text[:, 10:].tolist()


def test_the_spec_says_which_path_is_taken():
    """Whatever routers say; the knob says the same."""
    made = dpn.settled(SPEC, path=(2, 0, 1), gate="off")
    assert spec.from_json(made.to_json()) == made and [r.expert for _, r in dpn.reducers(made)] == [2, 0, 1]
    y, decided, _, _ = run(dpn.vlm(made), PARAMS, IDS, MASK, IMAGES, {})
    other, _, _, _ = masked(dpn.forced(SPEC, (2, 0, 1)), gate="off")
    np.testing.assert_array_equal(y, other)
    assert decided["choice"].tolist() == [[2, 0, 1]] * 3
    assert (run(dpn.vlm(made), PARAMS, IDS, MASK, IMAGES, {"relax": jnp.float32(1.0)})[1]["choice"] == 0).all()


def test_the_spec_and_a_file_keep_it_all(tmp_path):
    assert spec.from_json(SPEC.to_json()) == SPEC
    assert dpn.boundaries(32) == (8, 16, 24) and dpn.boundaries(40) == (10, 20, 30)
    path = tmp_path / "pooled.safetensors"
    weights.save(path, SPEC, PARAMS)
    again, params = weights.load(path)
    assert again == SPEC and account.count(params) == account.count(PARAMS)
    model = methods.build(again)
    assert model.reducers == dpn.reducers(SPEC)
    y = run(model, params, IDS, MASK, IMAGES, {})[0]
    np.testing.assert_array_equal(y, masked()[0])


ROWS = dpn_deploy.entered(dpn.vlm(SPEC), PARAMS, IDS, IMAGES, MASK)
GOLDEN = {
    (0, 0, 0): (3_817_152_184_320, 4_252_017_623_040),
    (1, 1, 1): (1_777_399_234_560, 2_201_997_017_088),
    (2, 2, 2): (1_261_728_497_664, 1_683_683_868_672),
    (2, 2, 1): (1_276_315_435_008, None),
}


def test_published_work():
    """LLaVA-1.5-7B's multiply-accumulates, to the last one (spec section 5; PyramidDrop's 3.82 T and 1.78 T)."""
    tower = ViTSpec.uniform(depth=1, width=64, heads=1, mlp=64, image_size=336, patch=14)
    text = LMSpec.uniform(depth=32, width=4096, heads=32, mlp=11008, vocab=32064, tied=False)
    seven, _ = dpn.install(VLMSpec(tower, BridgeSpec(hidden=4096), text, 32000), None, jax.random.key(0))
    for path, counts in GOLDEN.items():
        for tokens, expected in zip((0, 64), counts, strict=True):
            assert expected is None or dpn.path_macs(seven, path, tokens) == expected
    live = jnp.asarray([[352.0, 208.0, 136.0]])
    np.testing.assert_allclose(dpn.macs(seven, jnp.asarray([640.0]), live), [GOLDEN[1, 1, 1][1]], rtol=1e-6)
    early, late = dpn.path_macs(seven, (2, 0, 0), 64), dpn.path_macs(seven, (0, 0, 2), 64)
    dense = GOLDEN[0, 0, 0][1]
    assert round(100 * (early / dense - 1), 1) == -51.0 and round(100 * (late / dense - 1), 1) == -17.0
    router = dpn.fresh(seven, jax.random.key(0))["block_07"]["router"]
    assert account.count(router) == 4_205_568


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda: put(at=(2, 4, 7)), "ascend within 1..6 of 8 layers, found (2, 4, 7)"),
        (lambda: put(at=(4, 2)), "ascend within 1..6 of 8 layers, found (4, 2)"),
        (lambda: put(at=(1, 2, 3, 4)), "a multiple of 16, one halving per stage, found 8 x 8"),
        (lambda: dpn.install(SPEC, None, KEY), "decoder.blocks[0] reduces already"),
        (lambda: dpn.install(SEARCH, None, KEY, at=AT), "DAS search may leave out, found layer 1 in at=(1, 2, 3)"),
        (lambda: put(router="conv"), "router must be one of mlp, linear"),
        (lambda: put(pool="min"), "dpn.pool must be one of max, avg, dwconv"),
        (lambda: put(temperature=0.0), "dpn.temperature must be positive"),
        (lambda: put(least=0), "dpn.least must be at least 1 token, found 0"),
        (lambda: put(n_min=2), "a setting of dpn.install must be one of detach, expert, floor_at_eval"),
        (lambda: dpn.forced(SPEC, (1, 1)), "an expert for each of 3 stages, found (1, 1)"),
        (lambda: dpn.settled(SPEC, path=(1, 1, 3)), "numbers of experts, 0..2, found (1, 1, 3)"),
        (lambda: dpn.reducer(dpn.describe(dpn.Dpn(0, GRID)).replace("False", "no"), SPEC), "reduce must hold"),
        (lambda: dpn_switch.Switch(dpn.vlm(SPEC))(PARAMS, ROWS), "one question at a time (Staged takes several), foun"),
        (lambda: dpn_deploy.entered(dpn.vlm(SPEC), PARAMS, *gapped(), MASK[:1]), "found a gap in sample 0"),
        (lambda: dpn.install(BASE.edit(bridge=BridgeSpec(hidden=20, prefix=True)), None, KEY), "a grid of patches"),
        (lambda: dpn.reducer("dpn:stage=0", SPEC), "must read as dpn.describe writes it"),
        (lambda: dpn.added(SPEC, {**PARAMS, "decoder": {"dpn": {}}}, KEY), "params['dpn']['block_00'] must be"),
        (lambda: dpn.path_macs(SPEC, (0, 0), 3), "an expert for each of 3 stages, found (0, 0)"),
        (lambda: CHECKED.check(np.where(IDS == 29, 8, IDS), IMAGES), "text 0 must hold the router token (29) behind"),
        (lambda: CHECKED.check(IDS[:, ::-1], IMAGES), "router token"),
        (lambda: CHECKED.check(np.roll(IDS, 12, 1), IMAGES), "must follow each other, found a gap"),
        (lambda: dpn_deploy.entered(dpn.vlm(SPEC), PARAMS, IDS[:, N:], IMAGES), "one image per sample, 64 pla"),
        (
            lambda: dpn_deploy.entered(dpn.vlm(SPEC, tower_reducers=((0, abs),)), PARAMS, IDS, IMAGES),
            "a tower that keeps its tokens",
        ),
        (
            lambda: dpn_deploy.entered(
                dpn.vlm(SPEC.edit(bridge=BridgeSpec(hidden=20, cross=CrossSpec.hyper((1,))))), PARAMS, IDS, IMAGES
            ),
            "visual tokens that stand in the text, found a bridge of cross-attention",
        ),
        (lambda: dpn_deploy.Staged(dpn.vlm(SPEC)).generate(PARAMS, ROWS, 4), "Staged needs keep=3 or more"),
        (lambda: dpn_switch.Switch(dpn.vlm(SPEC), 2).generate(PARAMS, ROWS, 4), "Switch needs keep=3 or more"),
        (lambda: dataclasses.replace(SMALL, router_token=5), "an id other than image_token=5"),
    ],
)  # fmt: skip
def test_what_is_not_defined_is_one_line(change, says):
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        change()
    assert "\n" not in str(caught.value)


def test_layers_that_no_search_may_leave_out_can_be_pooled_after():
    search, _ = das.install(BASE, None, STYLES["llama"], None, among=(1, 3))
    for model, at in ((search, (1, 3)), (das.remove(search, None, [3])[0], (1, 2, 3))):  # during a search, after it
        made = dpn.install(model, None, KEY, at=at, least=2)[0]
        assert tuple(layer + 1 for layer, _ in dpn.reducers(made)) == at


def test_work_to_be_expected_is_the_mean_over_paths() -> None:
    """The sum over all paths of probability times work."""
    spec, paths = SPEC, list(itertools.product(range(3), repeat=3))
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), size=(2, 3)).astype(np.float32)
    text, visual = jnp.asarray([3.0, 7.0]), jnp.full(2, float(spec.visual_tokens))
    found = dpn.expected_macs(spec, text, visual, jnp.asarray(p))
    for row in range(2):
        chance = [float(np.prod([p[row, stage, k] for stage, k in enumerate(path)])) for path in paths]
        work = [dpn.path_macs(spec, path, int(text[row])) for path in paths]
        np.testing.assert_allclose(found[row], np.dot(chance, work), rtol=1e-5)
