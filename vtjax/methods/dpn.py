# SPDX-License-Identifier: Apache-2.0
"""DPN: dynamic pooling experts shorten the visual tokens between segments of a multimodal decoder, per sample.

"Dynamic Pyramid Network for Efficient Multimodal Large Language Model", arXiv 2503.20322. Equations are in
`ops.pooling_experts`; here they become a reducer after a decoder layer, a spec edit, and the pieces of the loss.

    install(spec, params, ...)  -> a spec whose decoder pools at some layers, and parameters with routers
    vlm(spec)                   -> its model: tokens keep their slots, dead ones are masked (training, exact results)
    methods.dpn_packed          -> the same in fewer slots where the paths are known before (training that saves time)
    methods.dpn_deploy, _switch -> the forms in which pooled tokens are gone and time is saved

At a stage a router reads the state of the router token, which stands behind the question and so has seen image and
question, and one of three poolings is taken for the whole image: none, half the width, half of both sides. With
`gate="st"` and identity everywhere the model is the one it was put into, exactly.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vtjax.errors import InputError, check_choice
from vtjax.methods import slots
from vtjax.models.vlm import VLM
from vtjax.ops import cross_attention
from vtjax.ops import pooling_experts as ops
from vtjax.ops.pooling_experts import AREAS, WINDOWS
from vtjax.ops.tokens import Lattice, Tokens
from vtjax.spec import Lineage, VLMSpec
from vtjax.spec import settings as settings_text

NAME = "dpn"
ROUTERS = ("mlp", "linear")
READS = ("router_token", "last_prompt")
MODES = ("adaptive", "random", "forced")
AFTER = 2  # layers after the last stage: text reads the scale of pooled tokens in the second one only (spec section 3)


@dataclasses.dataclass(frozen=True)
class Dpn:
    """The reducer after one decoder layer.

    Knobs, of this layer: `router`, its parameters; `filters`, of depthwise pooling. Traced: `route_key`, a random key:
    experts are drawn (training), without it the likeliest is taken; `choice` int `[B]`, experts that were decided
    elsewhere, -1 = decide here; `relax` in [0, 1]: 1 is the dense model, between them p moves towards identity.

    Attributes:
      stage: number of the stage, from 0: no grid was halved more often before it.
      grid: (H, W) of an image.
      pool, gate: of `ops.POOLS`, `ops.GATES`.
      temperature: of the router's softmax.
      least: tokens of an image that a draw leaves, at least (`n_min`).
      floor_at_eval: the same where the likeliest is taken.
      mode: "adaptive"; "random": any open expert, equally likely, with p as the router says; "forced": `expert`,
        whatever the router says (`relax` of one half and more takes identity).
      expert: number of a forced expert.
      reads: "router_token": the mean state of all router tokens; "last_prompt": that of the last live token, for
        inference without them.
      detach: the router's input carries no gradient.

    Decisions, per sample: `p` float32 `[B, K]`, `choice` int32, `routed` bool (False: no image or no router token, so
    nothing happens), `visual` and `live` float32, visual and all live tokens of the text that go on, and
    `visual_before` and `live_before`, those that came.
    """

    stage: int
    grid: tuple[int, int]
    pool: str = "max"
    gate: str = "prob"
    temperature: float = 10.0
    least: int = 18
    floor_at_eval: bool = False
    mode: str = "adaptive"
    reads: str = "router_token"
    detach: bool = False
    expert: int = 0

    keeps_slots = True

    def __call__(
        self, tokens: Tokens, aux: Mapping[str, Array], knobs: Mapping[str, Any]
    ) -> tuple[Tokens, dict[str, Array]]:
        lattice = tokens.lattice
        if lattice is None:
            raise InputError("dpn needs to know where images and router tokens are, found a text without images")
        if "router" not in knobs:
            raise InputError(f"params['{NAME}'] must hold the router of every stage, found none for stage {self.stage}")
        memory = tokens.memory
        if memory is not None:
            memory = cross_attention.on_grid(memory, self.grid[0] * self.grid[1])
            tokens = tokens.replace(memory=memory)
        place, valid, alive = self._visual(tokens, lattice)
        state, asked = self._asks(tokens, lattice, alive)
        routed = asked & valid.any(1)
        count = self.grid[0] * self.grid[1] >> lattice.halved.sum(1)
        p, choice, scale = self.decide(state, count, routed, knobs)
        x = tokens.x if memory is None else memory.x
        assert x is not None
        pooled, left, halved = ops.pool(
            x, valid, place, lattice.halved, choice, self.grid,
            most=self.stage, kind=self.pool, filters=knobs.get("filters"), source=tokens.source,
        )  # fmt: skip
        pooled = jnp.where(left[..., None], scaled(pooled, scale), pooled)
        before = {"visual_before": valid.sum(1, dtype=jnp.float32), "live_before": alive.sum(1)}
        lattice = dataclasses.replace(lattice, halved=halved)
        if memory is not None:
            # Of its image, as the tower may have pruned the cell in which a window's tokens are pooled.
            number = memory.number.reshape(len(x), -1, self.grid[0] * self.grid[1])
            number = jnp.broadcast_to(number.max(2, keepdims=True), number.shape).reshape(left.shape)
            memory = dataclasses.replace(memory, x=pooled, number=jnp.where(left, number, 0))
            tokens = tokens.replace(memory=memory, lattice=lattice)
        else:
            alive = jnp.where(place >= 0, left.astype(jnp.float32), alive)
            # Positions are counted anew (spec section 2.7).
            position = jnp.maximum(jnp.cumsum(alive, axis=1) - 1, 0).astype(jnp.int32)
            tokens = tokens.replace(x=pooled, alive=alive, position=position, lattice=lattice)
        decisions = {"p": p, "choice": choice, "routed": routed, "visual": left.sum(1, dtype=jnp.float32)}
        return tokens, {**decisions, **before, "live": alive.sum(1)}

    def decide(
        self, state: Float[Array, "B D"], count: Int[Array, " B"], routed: Bool[Array, " B"], knobs: Mapping[str, Any]
    ) -> tuple[Float[Array, "B K"], Int[Array, " B"], Float[Array, " B"]]:
        """p, the expert taken and what pooled tokens are multiplied by, of the router's input and the visual tokens of
        an image now; samples that are not `routed` stay as they are."""
        logp = ops.scores(state, knobs["router"], self.temperature)
        p = jnp.exp(logp)
        if (amount := knobs.get("relax")) is not None:
            moved = (1.0 - amount) * p + amount * (jnp.arange(p.shape[1]) == 0)
            logp = jnp.where(amount > 0, jnp.log(jnp.maximum(moved, 1e-30)), logp)
        choice = jnp.where(routed, self._choose(logp, count, knobs), 0)
        return p, choice, jnp.where(routed, ops.gate(logp, choice, self.gate), 1.0)

    def _visual(self, tokens: Tokens, lattice: Lattice) -> tuple[Array, Array, Array]:
        """Place in the grid and validity of what is pooled, and which slots of the text live."""
        b, n = tokens.x.shape[:2]
        alive = jnp.ones((b, n), jnp.float32) if tokens.alive is None else tokens.alive
        if tokens.memory is None:
            return lattice.place, (lattice.place >= 0) & (alive > 0.5), alive
        number = tokens.memory.number
        place = jnp.arange(number.shape[1]) % (self.grid[0] * self.grid[1])
        return jnp.broadcast_to(place, number.shape), number > 0, alive

    def _asks(self, tokens: Tokens, lattice: Lattice, alive: Array) -> tuple[Float[Array, "B D"], Bool[Array, " B"]]:
        """What the router reads, float32, and whether there is anything."""
        asks = lattice.asks & (alive > 0.5)
        if self.reads == "last_prompt":
            last = alive.shape[1] - 1 - jnp.argmax(alive[:, ::-1] > 0.5, axis=1)
            asks = jnp.arange(alive.shape[1])[None] == last[:, None]
        count = asks.sum(1)
        weight = asks / jnp.maximum(count, 1)[:, None]
        x = jax.lax.stop_gradient(tokens.x) if self.detach else tokens.x
        exact = jax.lax.Precision.HIGHEST
        return jnp.einsum("bn,bnd->bd", weight, x.astype(jnp.float32), precision=exact), count > 0

    def _choose(self, logp: Array, count: Array, knobs: Mapping[str, Any]) -> Int[Array, " B"]:
        key, given = knobs.get("route_key"), knobs.get("choice")
        free = key is None and not self.floor_at_eval
        open_ = ops.allowed(count, 1 if free else self.least)
        if self.mode == "forced":
            dense = jnp.asarray(knobs.get("relax", 0.0)) >= 0.5
            choice = jnp.broadcast_to(jnp.where(dense, 0, self.expert), count.shape)
        elif self.mode == "random" and given is not None and key is None:
            choice = jnp.zeros_like(count)
        elif self.mode == "random":
            if key is None:
                raise InputError("random routing needs the knob route_key or choice, found neither")
            choice = ops.sample(key, jnp.zeros_like(logp), open_)
        elif key is not None:
            choice = ops.sample(key, jax.lax.stop_gradient(logp), open_)
        else:
            choice = ops.likeliest(logp, open_)
        return choice if given is None else jnp.where(given >= 0, given, choice).astype(jnp.int32)


def scaled(x: Float[Array, "B N D"], scale: Float[Array, " B"]) -> Float[Array, "B N D"]:
    """Tokens times a number per sample, the product in float32 (spec section 9, item 7)."""
    return (x.astype(jnp.float32) * scale[:, None, None]).astype(x.dtype)


def boundaries(depth: int, stages: int = 3) -> tuple[int, ...]:
    """Layers before each stage, s L / (M + 1): segments of equal depth (spec section 1)."""
    return tuple(s * depth // (stages + 1) for s in range(1, stages + 1))


def install(
    spec: VLMSpec,
    params: Mapping[str, Any] | None,
    key: Array,
    *,
    at: Sequence[int] = (),
    router: str = "mlp",
    token: int = -1,
    parent: str = "",
    **settings: Any,
) -> tuple[VLMSpec, dict[str, Any] | None]:
    """Routers and poolings in a model, trained or not.

    Args:
      params: the model's; None = none yet (those of `vlm(spec).init` and `fresh`).
      key: for the routers and the router token.
      at: layers before each stage; () = `boundaries` for three.
      router: "mlp" or "linear".
      token: id that stands once in every question, behind the image and before the answer, and that the model knows: it
        is read in place of a router token, and texts stay as they were (ours). -1 = a token of its own.
      parent: hash of the parameters, for the history.
      **settings: fields of `Dpn` other than stage and grid.

    Returns:
      The spec, with `router_token` (behind the last id where it had none and `token` names none), and the parameters
      with `decoder/dpn`, and `bridge/router_token` where it is one of its own.

    Raises:
      InputError: a token that the decoder does not have; boundaries that do not ascend, or leave fewer than `AFTER`
        layers; a grid that the windows do not divide; a setting that is not defined; a decoder that is reduced already;
        a stage after a layer that a DAS search may leave out.
    """
    at = tuple(at) or boundaries(spec.decoder.depth)
    check_choice("router", router, ROUTERS)
    known = {f.name for f in dataclasses.fields(Dpn)} - {"stage", "grid"}
    for name in settings:
        check_choice("a setting of dpn.install", name, tuple(sorted(known)))
    taken = [layer for layer, block in enumerate(spec.decoder.blocks) if block.reduce is not None]
    if taken:
        raise InputError(f"decoder.blocks[{taken[0]}] reduces already, expected none to")
    if token >= spec.decoder.ids or token == spec.image_token:
        raise InputError(f"dpn.token must be an id of the decoder's, 0..{spec.decoder.ids - 1}, found {token}")
    if token < 0:
        token = spec.router_token if spec.router_token >= 0 else max(spec.decoder.ids, spec.image_token + 1)
    made = {layer - 1: describe(Dpn(stage, spec.grid, **settings)) for stage, layer in enumerate(at)}
    _check_layers(spec, at)
    _check_search(spec, at)
    blocks = spec.decoder.blocks
    if gone := [layer for layer in at if not blocks[layer - 1].attn and not blocks[layer - 1].ffn]:
        raise InputError(f"dpn.at must not pool after a layer that was taken out, found {gone[0]} in at={at}")
    decoder = spec.decoder.edit(blocks={layer: {"reduce": text} for layer, text in made.items()})
    arguments = {"at": list(at), "router": router, **settings}
    step = Lineage(parent, "dpn.install", json.dumps(arguments))
    installed = spec.edit(decoder=decoder, router_token=token, lineage=(*spec.lineage, step))
    reducers(installed)
    return installed, None if params is None else added(installed, params, key)


def settled(spec: VLMSpec, *, path: Sequence[int] = (), **settings: Any) -> VLMSpec:
    """An installed spec with other settings at all stages, as fields of `Dpn`; `path`: an expert for each stage, which
    it takes whatever routers say (`mode="forced"`).

    Raises:
      InputError: a path of another length or of other experts, or a setting that is not defined.
    """
    made = reducers(spec)
    if path:
        check_path(spec, path)
    texts = {}
    for number, (layer, found) in enumerate(made):
        forced = {"mode": "forced", "expert": int(path[number])} if path else {}
        changed = dataclasses.replace(found, **{**settings, **forced})
        _check(changed)
        texts[layer] = {"reduce": describe(changed)}
    return spec.edit(decoder=spec.decoder.edit(blocks=texts))


def check_path(spec: VLMSpec, path: Sequence[int]) -> None:
    """Raises InputError for a path that names no expert for each stage."""
    stages = len(reducers(spec))
    if len(path) != stages:
        raise InputError(f"a path must name an expert for each of {stages} stages, found {tuple(path)}")
    if any(expert not in range(len(WINDOWS)) for expert in path):
        raise InputError(f"a path must hold numbers of experts, 0..{len(WINDOWS) - 1}, found {tuple(path)}")


def added(spec: VLMSpec, params: Mapping[str, Any], key: Array) -> dict[str, Any]:
    """Parameters with what `install` adds where it is missing: routers, filters, the router token's embedding.

    Raises:
      InputError: routers of other shapes, or for other layers.
    """
    decoder, bridge = dict(params["decoder"]), dict(params["bridge"])
    token, routers = jax.random.split(key)
    if spec.adds_router_token and "router_token" not in bridge:
        bridge["router_token"] = 0.02 * jax.random.normal(token, (spec.decoder.width,))
    if NAME not in decoder:
        decoder[NAME] = fresh(spec, routers)
    wanted = jax.eval_shape(lambda key: fresh(spec, key), routers)
    for name in sorted(wanted.keys() | decoder[NAME].keys()):
        here, there = (str(jax.tree.map(jnp.shape, tree.get(name))) for tree in (decoder[NAME], wanted))
        if here != there:
            raise InputError(f"params['{NAME}'][{name!r}] must be {there}, as the spec says, found {here}")
    return {**params, "decoder": decoder, "bridge": bridge}


def fresh(spec: VLMSpec, key: Array) -> dict[str, Any]:
    """New `params["decoder"]["dpn"]`: per stage, under the name of its block, `router`, and `filters` of depthwise
    pooling, which begin as averages; and `relax`, 0."""
    d = spec.decoder.width
    out: dict[str, Any] = {"relax": jnp.zeros(())}
    kind = router_of(spec)

    def kernel(key: Array, rows: int, columns: int) -> dict[str, Array]:
        bound = rows**-0.5
        return {"kernel": jax.random.uniform(key, (rows, columns), minval=-bound, maxval=bound)}

    for layer, made in reducers(spec):
        hidden, score = jax.random.split(jax.random.fold_in(key, made.stage))
        router: dict[str, Any] = {"score": kernel(score, d // 4 if kind == "mlp" else d, len(WINDOWS))}
        if kind == "mlp":
            router |= {"norm": {"scale": jnp.ones(d), "bias": jnp.zeros(d)}, "hidden": kernel(hidden, d, d // 4)}
        held: dict[str, Any] = {"router": router}
        if made.pool == "dwconv":
            held["filters"] = {f"{h}x{w}": jnp.full((h * w, d), 1 / (h * w)) for h, w in WINDOWS[1:]}
        out[f"block_{layer:02d}"] = held
    return out


def router_of(spec: VLMSpec) -> str:
    """Which router `spec` was installed with."""
    steps = [step for step in spec.lineage if step.operation == "dpn.install"]
    return json.loads(steps[-1].arguments)["router"]


def vlm(spec: VLMSpec, **options: Any) -> VLM:
    """The model of an installed spec: static shapes, dead tokens masked, routers from `params["decoder"]["dpn"]`.

    Args:
      **options: as of `VLM`; and fields of `Dpn` to override at all stages (`mode`, `gate`, `floor_at_eval`, ...).
    """
    fields = {f.name for f in dataclasses.fields(Dpn)}
    changed = {name: options.pop(name) for name in tuple(options) if name in fields}
    made = tuple((layer, dataclasses.replace(found, **changed)) for layer, found in reducers(spec))
    return VLM(spec, **{**slots(spec), "reducers": made, **options})


_OF_SPEC = ("grid",)


def describe(reducer: Dpn) -> str:
    """The reducer as `DecoderBlockSpec.reduce` holds it: `dpn:stage=0,pool=max,...`."""
    return settings_text.write(f"{NAME}:", reducer, _OF_SPEC)


def reducer(text: str, spec: VLMSpec) -> Dpn:
    """Inverse of `describe`, for the decoder of `spec`.

    Raises:
      InputError: not such a text, or settings that are not defined.
    """
    made = Dpn(grid=spec.grid, **settings_text.read(text, f"{NAME}:", Dpn, _OF_SPEC))
    _check(made)
    return made


def reducers(spec: VLMSpec) -> tuple[tuple[int, Dpn], ...]:
    """`(layer, reducer)` of every stage, as `VLM` takes them.

    Raises:
      InputError: a stage with fewer than `AFTER` layers behind it that are there.
    """
    made = tuple(
        (layer, reducer(block.reduce, spec))
        for layer, block in enumerate(spec.decoder.blocks)
        if block.reduce is not None and block.reduce.startswith(f"{NAME}:")
    )
    left = sum(block.attn or block.ffn for block in spec.decoder.blocks[made[-1][0] + 1 :]) if made else AFTER
    if left < AFTER:
        raise InputError(f"dpn needs at least {AFTER} layers after its last stage, found {left} that were not removed")
    return made


def _check(made: Dpn) -> None:
    for name, known in (("pool", ops.POOLS), ("gate", ops.GATES), ("mode", MODES), ("reads", READS)):
        check_choice(f"dpn.{name}", getattr(made, name), known)
    if not 0 < made.temperature < math.inf:
        raise InputError(f"dpn.temperature must be positive and finite, found {made.temperature}")
    if made.least < 1:
        raise InputError(f"dpn.least must be at least 1 token, found {made.least}")
    if made.expert not in range(len(WINDOWS)):
        raise InputError(f"dpn.expert must be in 0..{len(WINDOWS) - 1}, found {made.expert}")


def _check_layers(spec: VLMSpec, at: Sequence[int]) -> None:
    depth, (rows, columns) = spec.decoder.depth, spec.grid
    if list(at) != sorted(set(at)) or not at or at[0] < 1 or at[-1] > depth - AFTER:
        raise InputError(f"dpn.at must ascend within 1..{depth - AFTER} of {depth} layers, found {tuple(at)}")
    if rows % 2 ** len(at) or columns % 2 ** len(at):
        raise InputError(
            f"the grid must be a multiple of {2 ** len(at)}, one halving per stage, found {rows} x {columns}"
        )
    if spec.bridge.prefix:
        raise InputError("dpn pools a grid of patches, found a bridge that hands on the class token, too (prefix=True)")


def _check_search(spec: VLMSpec, at: Sequence[int]) -> None:
    from vtjax.methods import das

    if not das.is_installed(spec.decoder) or not das.installed(spec.decoder)[1]:
        return
    # What a search leaves out takes its reducer along.
    shared = sorted({layer - 1 for layer in at} & set(das.arms(spec.decoder)))
    if shared:
        raise InputError(
            f"dpn.at must not pool after a layer that the model's DAS search may leave out, found layer {shared[0]} "
            f"in at={tuple(at)} (install DPN before the search)"
        )


def decisions(aux: Mapping[str, Any], spec: VLMSpec) -> dict[str, Array]:
    """What all stages decided, of the `aux` of a model: `p [B,M,K]`, `choice [B,M]`, `routed [B,M]`, `visual`, `live`
    and both before the stage, `[B,M]`."""
    stages = [aux["blocks"][layer]["decisions"] for layer, _ in reducers(spec)]
    return {name: jnp.stack([stage[name] for stage in stages], axis=1) for name in stages[0]}


def stretches(spec: VLMSpec) -> list[range]:
    """The layers before the first stage, between stages, and after the last."""
    ends = [0, *(layer + 1 for layer, _ in reducers(spec)), spec.decoder.depth]
    return [range(low, high) for low, high in itertools.pairwise(ends)]


def costs(spec: VLMSpec) -> Float[np.ndarray, "L 4"]:
    """Per layer: MACs per token of the text (visual tokens in it included) and per pair of them, c(n) = c1 n + c2 n^2
    (spec section 5); and of a bridge with cross-attention per token that it reads and per pair with the text."""
    cross, rows = spec.bridge.cross, []
    for layer, block in enumerate(spec.decoder.blocks):
        d, inner, shared = spec.decoder.width, block.heads * block.head_dim, block.kv_heads * block.head_dim
        linear = 2 * d * (inner + shared) * block.attn + 3 * d * block.mlp * block.ffn
        read = pair = 0
        if cross is not None and layer in cross.layers:
            if not cross.inside:
                inner, shared = cross.heads * cross.head_dim, cross.kv_heads * cross.head_dim
                linear += 2 * d * inner + ((2 if cross.activation == "swiglu" else 1) + 1) * d * cross.mlp
            read, pair = 2 * spec.visual_width * shared, 2 * inner
        rows.append((linear, 2 * block.heads * block.head_dim * block.attn, read, pair))
    return np.asarray(rows, np.float64)


def macs(
    spec: VLMSpec, start: Float[Array, " B"], live: Float[Array, "B M"], visual: Float[Array, "B M1"] | None = None
) -> Float[Array, " B"]:
    """MACs of each sample's prefill in the decoder's blocks, from its live tokens before the first layer and after
    each stage. Tower, projector, routers and head are not counted, as in published figures. Float32.

    Args:
      visual: of a bridge with cross-attention: the tokens that it reads before the first stage and after every one.

    Raises:
      InputError: a bridge with cross-attention without them.
    """
    if (spec.bridge.cross is None) != (visual is None):
        raise InputError("visual tokens are counted apart where a bridge of cross-attention reads them, and only there")
    found, total = costs(spec), jnp.float32(0)
    for stage, layers in enumerate(stretches(spec)):
        linear, pairs, read, pair = found[layers.start : layers.stop].sum(0)
        n = start if stage == 0 else live[:, stage - 1]
        total = total + linear * n + pairs * n * n
        if visual is not None:
            total = total + (read + pair * n) * visual[:, stage]
    return total


def expected_macs(
    spec: VLMSpec, text: Float[Array, " B"], visual: Float[Array, " B"], p: Float[Array, "B M K"]
) -> Float[Array, " B"]:
    """`macs` of each sample where every stage draws its expert from `p`, independently and without a floor: the mean,
    with the gradient of p (ours). Float32.

    Args:
      text, visual: live tokens in front of the first layer.
    """
    areas = jnp.asarray(AREAS, jnp.float32)
    apart = spec.bridge.cross is not None
    found, total = costs(spec), jnp.float32(0)
    share, square = jnp.ones_like(text), jnp.ones_like(text)  # of the visual tokens: E[n] / n, E[n^2] / n^2
    for stage, layers in enumerate(stretches(spec)):
        if stage:
            share = share * (p[:, stage - 1] / areas).sum(-1)
            square = square * (p[:, stage - 1] / areas**2).sum(-1)
        linear, pairs, read, pair = found[layers.start : layers.stop].sum(0)
        left = visual * share
        if apart:
            total = total + linear * text + pairs * text**2 + (read + pair * text) * left
        else:
            total = total + linear * (text + left) + pairs * (text**2 + 2 * text * left + visual**2 * square)
    return total


def path_macs(spec: VLMSpec, path: Sequence[int], text: int) -> int:
    """MACs of the blocks for one image and `text` tokens where every stage takes the expert of `path`. An exact
    integer, the published count (spec section 5).

    Raises:
      InputError: a path of another length than there are stages, or of other experts.
    """
    check_path(spec, path)
    count, total, apart = spec.visual_tokens, 0, spec.bridge.cross is not None
    for stage, layers in enumerate(stretches(spec)):
        if stage:
            height, width = WINDOWS[path[stage - 1]]
            count //= height * width
        n = text + (0 if apart else count)
        for linear, pairs, read, pair in costs(spec)[layers.start : layers.stop]:
            total += int(linear) * n + int(pairs) * n * n + (int(read) + int(pair) * n) * count
    return total


def forced(spec: VLMSpec, path: Sequence[int]) -> dict[str, Array]:
    """The knob that takes the same path for every sample.

    Raises:
      InputError: as `check_path`.
    """
    check_path(spec, path)
    depth = spec.decoder.depth
    choice = np.full(depth, -1, np.int32)
    for (layer, _), expert in zip(reducers(spec), path, strict=True):
        choice[layer] = expert
    return {"choice": jnp.asarray(choice)}


def given(spec: VLMSpec, choice: Int[Array, "B M"]) -> dict[str, Array]:
    """The knob that takes decisions that were made elsewhere, per sample and stage."""
    out = jnp.full((spec.decoder.depth, choice.shape[0]), -1, jnp.int32)
    layers = jnp.asarray([layer for layer, _ in reducers(spec)])
    return {"choice": out.at[layers].set(choice.T.astype(jnp.int32))}


def drawing(spec: VLMSpec, key: Array) -> dict[str, Array]:
    """The knob with which experts are drawn: a key for every stage."""
    return {"route_key": jax.random.split(key, spec.decoder.depth)}
