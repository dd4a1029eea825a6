# SPDX-License-Identifier: Apache-2.0
"""How a stack of blocks is initialised and run: unrolled, rematerialised, or scanned over equal blocks.

Parameters are always unrolled on disk and in memory (`block_00/...`). Measured (anchors of the design): scanning
without remat costs memory, so scan is only accepted together with remat.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from vtjax.errors import InputError
from vtjax.models.decoder import DecoderBlock
from vtjax.models.layers import ADAPTER_SITES, Adapter, Block, DropPath, Knobs, Reducer, with_first
from vtjax.ops.cross_attention import SAVED
from vtjax.ops.tokens import Tokens
from vtjax.spec import ModelSpec, is_backbone

AnyBlock = Block | DecoderBlock

REMAT = ("none", "full", "dots", "names")
"""What the backward pass keeps: everything; only block inputs; matmul outputs; what attention gave and MLP hidden."""


def block_name(index: int) -> str:
    """`block_00`, `block_01`, ..."""
    return f"block_{index:02d}"


def check(remat: str, scan: bool) -> None:
    """Raises InputError for an unknown policy, or for scan without remat."""
    if remat not in REMAT:
        raise InputError(f"remat must be one of {', '.join(REMAT)}, found {remat!r}")
    if scan and remat == "none":
        raise InputError("scan=True needs remat ('full', 'dots' or 'names'), found remat='none'")


def check_slots(
    spec: ModelSpec, reducers: Sequence[tuple[int, Reducer]], adapters: Sequence[tuple[int, str, Adapter]]
) -> None:
    """Raises InputError for a reducer or adapter that would not act: a layer or site that does not exist, that a
    removed block lacks, or that is taken."""
    slots = [*((layer, "reducer") for layer, _ in reducers), *((a[0], a[1]) for a in adapters)]
    for layer, site in slots:
        if not 0 <= layer < spec.depth:
            raise InputError(f"a reducer or adapter names layer {layer}, expected 0..{spec.depth - 1}")
        if site != "reducer" and site not in ADAPTER_SITES:
            raise InputError(f"adapter site must be one of {', '.join(ADAPTER_SITES)}, found {site!r}")
        if slots.count((layer, site)) > 1:
            raise InputError(f"layer {layer} must have at most one {site!r}, found {slots.count((layer, site))}")
        block = spec.blocks[layer]
        kept = block.attn or block.ffn
        acts = {"mlp": block.ffn, "mlp_in": block.ffn, "skip": not kept, "instead": kept, "out": True}
        if not acts.get(site, block.attn):
            state = f"attn={block.attn}, ffn={block.ffn}"
            raise InputError(f"{site!r} at layer {layer} would not act: the block has {state}")
        if site == "instead" and (layer, "reducer") in slots:
            raise InputError(f"layer {layer} must not be skipped for some batches and reduce for all, found both")


def check_reducers(spec: ModelSpec, reducers: Sequence[tuple[int, Reducer]]) -> None:
    """Raises InputError for a block that names a reducer where none was given."""
    given = dict(reducers)
    for layer, block in enumerate(spec.blocks):
        if block.reduce is not None and layer not in given:
            raise InputError(f"blocks[{layer}].reduce={block.reduce!r} needs a reducer, found none there")


def init(blocks: Sequence[AnyBlock], key: Array, tokens: Tokens) -> dict[str, Any]:
    """Parameters of all blocks by name. Equal blocks are initialised by one vmapped call, which keeps compilation
    short: a jitted init of many unrolled blocks would compile for longer than the training step."""
    groups: dict[AnyBlock, list[int]] = {}
    for index, block in enumerate(blocks):
        bare = block.clone(reducer=None, adapters=())
        groups.setdefault(bare, []).append(index)
    params: dict[int, Any] = {}
    for block, members in groups.items():
        keys = jnp.stack([jax.random.fold_in(key, index) for index in members])
        stacked = jax.vmap(lambda k, b=block: b.init(k, tokens).get("params", {}))(keys)
        for position, index in enumerate(members):
            params[index] = jax.tree.map(lambda a, p=position: a[p], stacked)
    return {block_name(i): params[i] for i in range(len(blocks)) if params[i]}


def layer_knobs(knobs: Knobs, index: int) -> dict[str, Any]:
    """Layer `index` of every knob: leaves carry the layers on their first axis; a scalar is every layer's; what lies
    under the name of a block is that block's alone."""
    everywhere = {name: value for name, value in knobs.items() if not _is_block(name)}
    found = jax.tree.map(lambda a: a[index] if jnp.ndim(a) else a, everywhere)
    return found | dict(knobs.get(block_name(index), {}))


def _is_block(name: str) -> bool:
    return re.fullmatch(r"block_\d+", name) is not None


def check_knobs(knobs: Knobs, depth: int) -> None:
    """Raises InputError for a leaf that is neither a scalar nor `[depth, ...]`: indexing would clamp; and for a block
    that does not exist."""
    everywhere = {name: value for name, value in knobs.items() if not _is_block(name)}
    names = {block_name(index) for index in range(depth)}
    if unknown := knobs.keys() - everywhere.keys() - names:
        raise InputError(f"a method's parameters must belong to one of {depth} blocks, found {min(unknown)}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(everywhere):
        if jnp.ndim(leaf) and jnp.shape(leaf)[0] != depth:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise InputError(
                f"the knob {name} must be a scalar or have one entry per layer, [{depth}, ...], "
                f"found {list(jnp.shape(leaf))}"
            )


def method_knobs(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of all methods, by their names within the method. Those that lie under the name of a block there
    (routers, adapters: what only some layers have) are handed to that block."""
    knobs: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {}
    for method, tree in params.items():
        if is_backbone(method):
            continue
        if not isinstance(tree, Mapping):
            raise InputError(f"params[{method!r}] must hold a method's parameters by name, found {type(tree).__name__}")
        for block in filter(_is_block, tree):
            for name in own.get(block, {}).keys() & tree[block].keys():
                raise InputError(f"params[{method!r}][{block!r}][{name!r}] must have a name of its own, found it twice")
            own.setdefault(block, {}).update(tree[block])
        plain = {name: value for name, value in tree.items() if not _is_block(name)}
        for name in knobs.keys() & plain.keys():
            raise InputError(f"params[{method!r}][{name!r}] must have a name of its own, found it twice")
        knobs |= plain
    return knobs | own


def run(
    blocks: Sequence[AnyBlock],
    params: Mapping[str, Any],
    tokens: Tokens,
    *,
    layers: range | None = None,
    knobs: Knobs | None = None,
    want: tuple[str, ...] = (),
    keep: Collection[int] = (),
    remat: str = "none",
    scan: bool = False,
    drop_path: float = 0.0,
    key: Array | None = None,
    constrain: Any = lambda x: x,
) -> tuple[Tokens, list[dict[str, Any]]]:
    """Runs the blocks.

    Args:
      blocks: one module per layer.
      params: `{block_name: parameters}`; other names are ignored.
      layers: which of them; None = all.
      knobs: traced method parameters, leaves `[L, ...]` or scalars. A block with an adapter "instead" needs `skipped`,
        bool: whether it is skipped, for all samples alike. What is skipped is not computed.
      want: attention outputs to return per block, and "tokens" for the `Tokens` that leave it.
      keep: layers whose aux holds "tokens" whatever `want` says; each ends a scan.
      remat, scan: see `check`. Scan applies to runs of at least two equal blocks without reducer and `want`, and with
        equal adapters, whose knobs have one form.
      drop_path: stochastic depth rate of the last block; the rate grows linearly from 0. Needs `key`.
      key: random key for stochastic depth.
      constrain: applied to `[B,N,D]` activations after every block (sharding), identity by default.

    Returns:
      The tokens that leave the last block, and one aux dict per block that was run.

    Raises:
      InputError: stochastic depth without a key, a knob that does not fit the layers, or a block that may be skipped
        whose aux is asked for.
    """
    knobs = knobs or {}
    check_knobs(knobs, len(blocks))
    if drop_path != 0.0 and key is None:
        raise InputError(f"drop_path={drop_path} needs a random key, found None")
    rates = [drop_path * i / max(len(blocks) - 1, 1) for i in range(len(blocks))]
    keys = None if key is None or drop_path == 0.0 else jax.random.split(key, len(blocks))

    def call(
        block: AnyBlock, p: Any, tokens: Tokens, k: Knobs, rate: Any, drop_key: Any
    ) -> tuple[Tokens, dict[str, Any]]:
        drop = () if drop_key is None else (_drop_path(rate, drop_key),)
        asked = tuple(w for w in want if w != "tokens")
        if instead := dict(block.adapters).get("instead"):
            if asked or block.reducer is not None or "skipped" not in k:
                found = f"want={asked}, " + ("a reducer" if block.reducer is not None else f"knobs {', '.join(k)}")
                raise InputError(
                    f"a block that may be skipped needs the knob skipped, and gives tokens only; found {found}"
                )
            tokens = jax.lax.cond(
                k["skipped"],
                lambda t: t.replace(x=t.x + instead(t.x, with_first(k, t))),
                lambda t: call_module(block, p, t, k, (), *drop)[0],
                tokens,
            )
            aux: dict[str, Any] = {}
        else:
            tokens, aux = call_module(block, p, tokens, k, asked, *drop)
        tokens = tokens.replace(x=constrain(tokens.x))
        return tokens, {**aux, "tokens": tokens} if "tokens" in want else aux

    def body(block: AnyBlock) -> Any:
        def one(p: Any, tokens: Tokens, k: Knobs, rate: Any, drop_key: Any) -> tuple[Tokens, dict[str, Any]]:
            return call(block, p, tokens, k, rate, drop_key)

        return one if remat == "none" else jax.checkpoint(one, policy=_policy(remat))

    auxes: list[dict[str, Any]] = []
    for (block, _), members in itertools.groupby(
        range(len(blocks)) if layers is None else layers, key=lambda i: (blocks[i], sum(i > layer for layer in keep))
    ):
        run_of = list(members)
        plain = block.reducer is None and not want
        arguments = [
            (params.get(block_name(i), {}), layer_knobs(knobs, i), rates[i], None if keys is None else keys[i])
            for i in run_of
        ]
        one = body(block)
        alike = len({jax.tree.structure(given) for given in arguments}) == 1
        if scan and plain and alike and len(run_of) > 1:
            stacked = jax.tree.map(lambda *a: jnp.stack(a), *arguments)
            # What no block changes is not carried: a carry is kept for the backward pass once per layer.
            memory = tokens.memory
            tokens, _ = jax.lax.scan(functools.partial(_carry, one, memory), tokens.replace(memory=None), stacked)
            tokens = tokens.replace(memory=memory)
            auxes.extend({} for _ in run_of)
        else:
            for p, k, rate, drop_key in arguments:
                tokens, aux = one(p, tokens, k, rate, drop_key)
                auxes.append(aux)
        if run_of[-1] in keep:
            auxes[-1]["tokens"] = tokens
    return tokens, auxes


def call_module(module: nn.Module, params: Any, *args: Any) -> Any:
    """A Linen module as a function of its parameters; what it returns is the module's affair."""
    return module.apply({"params": params}, *args)


def _carry(one: Any, memory: Any, tokens: Tokens, layer: tuple[Any, ...]) -> tuple[Tokens, None]:
    return one(layer[0], tokens.replace(memory=memory), *layer[1:])[0].replace(memory=None), None


def _policy(remat: str) -> Any:
    policies = jax.checkpoint_policies
    return {
        "full": policies.nothing_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "names": policies.save_only_these_names("attention", "mlp", *SAVED),
    }[remat]


def _drop_path(rate: Any, key: Array) -> DropPath:
    """Drops the whole branch of a sample with probability `rate`, scales the rest (Huang et al. 2016)."""

    def drop(branch: Array, number: int) -> Array:
        keep = jax.random.bernoulli(jax.random.fold_in(key, number), 1.0 - rate, (branch.shape[0], 1, 1))
        return jnp.where(keep, branch / jnp.asarray(1.0 - rate, branch.dtype), 0)

    return drop
