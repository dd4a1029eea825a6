# SPDX-License-Identifier: Apache-2.0
"""LTMP: learned thresholds decide, per block and image, which tokens are merged and which are pruned.

Bonnaerens & Dambre, "Learned Thresholds Token Merging and Pruning for Vision Transformers", TMLR 2023. Equations are in
`ops.token_reduction`; here they become a reducer between attention and MLP, a spec edit, and the pieces of the loss.

    install(spec, params, ...)  -> a spec whose blocks reduce, and parameters with two thresholds per block
    vit(spec)                   -> its model: tokens keep their slots, dead ones are masked (training, exact results)
    methods.ltmp_deploy         -> the forms in which dead tokens are gone and time is saved

Two forms. *Consistent* (the default): live tokens move to the front, halves are by rank among live tokens, importance
is a mean over live rows; so the masked model computes what the deployed one does. *Faithful*: what the authors' code
trains, whose masked and deployed models differ (spec section 5).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vtjax.errors import InputError, check_choice
from vtjax.models.vit import ViT
from vtjax.ops import token_reduction as ops
from vtjax.ops.tokens import Tokens, check_tokens
from vtjax.spec import BlockSpec, Lineage, ViTSpec, settings

VARIANTS = ("ltmp", "ltm", "ltp", "ltpm")
"""Merge, then prune; merge only; prune only; prune, then merge."""

FIXED = ("merge", "prune", "merge_prune", "prune_merge")
"""The same at a fixed number of tokens per block, without thresholds."""

FORMS = ("consistent", "faithful")
SIMILARITIES = ("keys", "queries", "values", "features")
NAME = "ltmp"


def merges(variant: str) -> bool:
    """Whether a variant, learned or fixed, merges."""
    return variant not in ("ltp", "prune")


def prunes(variant: str) -> bool:
    """Whether a variant, learned or fixed, prunes."""
    return variant not in ("ltm", "merge")


def _wants(variant: str, similarity: str) -> tuple[str, ...]:
    compared = (similarity,) if merges(variant) and similarity != "features" else ()
    return (*compared, *(("importance",) if prunes(variant) else ()))


@dataclasses.dataclass(frozen=True)
class Ltmp:
    """The reducer of one block.

    Knobs: `merge_threshold` (cosine) and `prune_threshold` (importance, a share of attention), scalars.

    Attributes:
      prefix: leading tokens that are neither merged nor pruned.
      patch: the most important patch is not pruned, either: patches are pooled.
      variant, form: of `VARIANTS`, `FORMS`.
      tau: temperature of the masker's gradient.
      prune_tau: the same where tokens are pruned; 0 = `tau`. Importances are about 1/N, far below a tau of 0.1, under
        which every token pulls alike at the threshold, however far from it.
      similarity: what cosines are taken of: the block's keys, queries, values, or the features after attention.
      relative: tokens of the dense model where the prune threshold is compared with importance x live tokens / that
        number, so that it means the same at another image size; 0 = plain importance.
      attached: the loss sees what a merge leaves in its partner, see `ops.merge`. Of no effect on what is computed.

    Decisions, per image: `merged`, `pruned`, `kept` (float32 `[B]`, tokens), `alive` `[B, N]`, `source` `[B, N0]`, and
    what was decided upon: `best_similarity`, `best_index`, `merge_mask` over A and `prune_score`, `prune_mask`,
    `prune_alive` (the tokens that could be pruned).
    """

    prefix: int
    variant: str = "ltmp"
    form: str = "consistent"
    tau: float = 0.1
    similarity: str = "keys"
    relative: int = 0
    attached: int = 0
    prune_tau: float = 0.0
    patch: bool = False

    @property
    def wants(self) -> tuple[str, ...]:
        """What is read from the attention."""
        return _wants(self.variant, self.similarity)

    def __call__(self, tokens: Tokens, aux: Mapping[str, Array], knobs: Mapping[str, Array]) -> tuple[Tokens, dict]:
        check_tokens(tokens, self.prefix, **{name: aux[name] for name in self.wants})
        for name in starts(self.variant, 1):
            if name not in knobs:
                raise InputError(f"{name} must be in params['{NAME}'] or among the knobs, found neither")
        before = ops.filled(tokens)[1]
        importance = None
        if prunes(self.variant):
            importance = ops.protect(aux["importance"], self.prefix, tokens.alive, patch=self.patch)
        unit = None
        if merges(self.variant):
            features = tokens.x[:, :, None] if self.similarity == "features" else aux[self.similarity]
            unit = ops.unit_features(features)
        decisions: dict[str, Array] = {}
        if self.variant == "ltpm":
            tokens = self._prune(tokens, importance, knobs, decisions)
            after_prune = ops.filled(tokens)[1]
            tokens, unit = self._settle(tokens, unit)
            assert unit is not None
            tokens, _ = self._merge(tokens, None, unit, knobs, decisions)
            tokens, _ = self._settle(tokens, None)
            pruned = before.sum(1) - after_prune.sum(1)
        else:
            if unit is not None:
                tokens, importance = self._merge(tokens, importance, unit, knobs, decisions)
            after_merge = ops.filled(tokens)[1]
            if importance is not None:
                tokens = self._prune(tokens, importance, knobs, decisions)
            pruned = after_merge.sum(1) - ops.filled(tokens)[1].sum(1)
            tokens, _ = self._settle(tokens, None)
        size, alive, source = ops.filled(tokens)
        kept = alive.sum(1)
        decisions |= {"kept": kept, "pruned": pruned, "merged": before.sum(1) - kept - pruned}
        return tokens, {**decisions, "alive": alive, "source": source}

    def _merge(
        self,
        tokens: Tokens,
        importance: Array | None,
        unit: Float[Array, "B N d"],
        knobs: Mapping[str, Array],
        decisions: dict[str, Array],
    ) -> tuple[Tokens, Array | None]:
        exact = self.form == "consistent"
        found = ops.match(unit, self.prefix, tokens.alive, hide_dead=exact)
        merged = ops.threshold_mask(found.similarity, jnp.asarray(knobs["merge_threshold"]), self.tau, exact=exact)
        decisions |= {"best_similarity": found.similarity, "best_index": found.partner, "merge_mask": merged}
        return ops.merge(tokens, importance, found, merged, self.prefix, attached=bool(self.attached))

    def _prune(
        self, tokens: Tokens, importance: Array | None, knobs: Mapping[str, Array], decisions: dict[str, Array]
    ) -> Tokens:
        assert importance is not None
        scores = importance
        if self.relative:
            # Protected tokens have infinite importance, whose product with a gradient of 0 would be NaN.
            share = jnp.where(jnp.isfinite(importance), importance, 0.0)
            scores = share * ops.filled(tokens)[1].sum(1, keepdims=True) / self.relative
            scores = jnp.where(jnp.isfinite(importance), scores, importance)
        threshold = jnp.asarray(knobs["prune_threshold"])
        keep = ops.threshold_mask(scores, threshold, self.prune_tau or self.tau, exact=self.form == "consistent")
        decisions |= {"prune_score": scores, "prune_mask": keep, "prune_alive": ops.filled(tokens)[1]}
        return ops.prune(tokens, keep)

    def _settle(self, tokens: Tokens, unit: Array | None) -> tuple[Tokens, Array | None]:
        """In the consistent form live tokens move to the front; their unit features with them."""
        if self.form == "faithful":
            return tokens, unit
        return ops.compact(tokens, unit)


@dataclasses.dataclass(frozen=True)
class FixedRate:
    """The reducer of one block that merges and prunes fixed numbers of tokens, which leave at once.

    Attributes:
      prefix, similarity: as in `Ltmp`.
      variant: of `FIXED`.
      merge, prune: tokens per block; each at most half of the patch tokens that are there.
    """

    prefix: int
    variant: str
    merge: int
    prune: int
    similarity: str = "keys"

    @property
    def wants(self) -> tuple[str, ...]:
        """What is read from the attention."""
        return _wants(self.variant, self.similarity)

    def __call__(self, tokens: Tokens, aux: Mapping[str, Array], knobs: Mapping[str, Array]) -> tuple[Tokens, dict]:
        check_tokens(tokens, self.prefix, **{name: aux[name] for name in self.wants})
        if tokens.alive is not None:
            raise InputError("fixed rates need tokens that are all live, found some that learned thresholds may remove")
        batch, before = tokens.x.shape[:2]
        importance = None
        if prunes(self.variant):
            importance = ops.protect(aux["importance"], self.prefix, tokens.alive)
        unit = None
        if merges(self.variant):
            unit = ops.unit_features(tokens.x[:, :, None] if self.similarity == "features" else aux[self.similarity])
        pruned = 0
        if self.variant == "prune_merge":
            assert importance is not None and unit is not None
            unit = ops.prune_least(tokens.replace(x=unit), importance, self.prune, self.prefix)[0].x
            tokens, _ = ops.prune_least(tokens, importance, self.prune, self.prefix)
            pruned, importance = before - tokens.x.shape[1], None
        if unit is not None:
            tokens, importance = ops.merge_top(
                tokens, importance, unit, self.merge, self.prefix, by_similarity=self.variant == "merge_prune"
            )
        if importance is not None:
            left = tokens.x.shape[1]
            tokens, _ = ops.prune_least(tokens, importance, self.prune, self.prefix)
            pruned = left - tokens.x.shape[1]
        kept = tokens.x.shape[1]
        counts = {"kept": kept, "pruned": pruned, "merged": before - kept - pruned}
        decisions = {name: jnp.full((batch,), float(n)) for name, n in counts.items()}
        return tokens, {**decisions, "source": ops.filled(tokens)[2]}


def schedule(rate: int, depth: int) -> list[tuple[int, int]]:
    """(merged, pruned) per block for the fixed variants that do both, from one rate. Spec section 4."""
    pruned = [int(1 + (rate - 2) * layer / max(depth - 1, 1)) for layer in range(depth)]
    return [(rate - p, p) for p in pruned]


_faithful_training = functools.partial(ops.faithful_attention, training=True)


def install(
    spec: ViTSpec,
    *,
    variant: str = "ltmp",
    form: str = "consistent",
    tau: float = 0.1,
    prune_tau: float = 0.0,
    similarity: str = "keys",
    relative: bool = False,
    attached: bool = False,
    merge_threshold: float | None = None,
    prune_threshold: float | None = None,
    dtype: str = "float32",
    parent: str = "",
) -> tuple[ViTSpec, dict[str, np.ndarray]]:
    """LTMP in every block that has attention.

    Args:
      tau, prune_tau: temperatures of the masker; recorded with the thresholds, which they shape.
      merge_threshold, prune_threshold: where they start, in [0, 1]; None = as the authors: 0 for pruning, 0.9 for
        merging where it comes first and is followed by pruning, else 1. (A block in which nothing merges gives its
        threshold no gradient under "ltmp", hence not 1. Spec section 4.)
      dtype: of the computation under which they will be learned; recorded, see `learned_dtype`.
      parent: SHA-256 of the dense parameters.

    Returns:
      The edited spec, and `params["ltmp"]`: `merge_threshold`, `prune_threshold`, float32 `[L]`, as far as the variant
      has them.

    Raises:
      InputError: an unknown variant, form or similarity; a number out of range; a spec that the method or the faithful
        form does not cover, or in which blocks reduce already.
    """
    check_choice("variant", variant, VARIANTS)
    thresholds = starts(variant, spec.depth, merge_threshold, prune_threshold)
    reducer = Ltmp(
        spec.prefix, variant, form, tau, similarity, spec.tokens if relative else 0, int(attached), prune_tau
    )
    check(spec, reducer)
    text = describe(reducer)
    arguments = {"reduce": text, "dtype": dtype, **{name: float(value[0]) for name, value in thresholds.items()}}
    return _installed(spec, lambda _: text, "ltmp.install", arguments, parent), thresholds


def learned_dtype(spec: ViTSpec) -> str:
    """The dtype under which the thresholds of an installed spec were learned: rounding decides for tokens near them."""
    steps = [json.loads(step.arguments) for step in spec.lineage if step.operation == "ltmp.install"]
    return str(steps[-1].get("dtype", "float32")) if steps else "float32"


def starts(
    variant: str, depth: int, merge_threshold: float | None = None, prune_threshold: float | None = None
) -> dict[str, np.ndarray]:
    """`params["ltmp"]` of a variant before training; see `install`."""
    given = {
        "merge_threshold": (merges(variant), merge_threshold, 0.9 if variant == "ltmp" else 1.0),
        "prune_threshold": (prunes(variant), prune_threshold, 0.0),
    }
    thresholds: dict[str, np.ndarray] = {}
    for name, (used, value, default) in given.items():
        if not used and value is not None:
            raise InputError(f"{name} has no meaning for the variant {variant!r}, expected None, found {value}")
        if used:
            thresholds[name] = np.full(depth, default if value is None else value, np.float32)
            check_thresholds(name, thresholds[name], depth)
    return thresholds


def install_fixed(
    spec: ViTSpec, variant: str, rates: Mapping[int, tuple[int, int]], *, similarity: str = "keys", parent: str = ""
) -> ViTSpec:
    """Fixed-rate merging or pruning, the baselines: `rates[layer] = (merged, pruned)` tokens.

    Raises:
      InputError: an unknown variant or similarity, a negative rate, or a layer without attention.
    """
    for layer, (merge, prune) in rates.items():
        _check_fixed(FixedRate(spec.prefix, variant, merge, prune, similarity))
        if not 0 <= layer < spec.depth or not spec.blocks[layer].attn:
            raise InputError(f"rates[{layer}] must name a block with attention, of {spec.depth}, found none")
    texts = {
        layer: describe(FixedRate(spec.prefix, variant, merge, prune, similarity))
        for layer, (merge, prune) in rates.items()
    }
    arguments = {"variant": variant, "rates": {str(layer): list(rate) for layer, rate in sorted(rates.items())}}
    return _installed(spec, lambda layer: texts.get(layer), "ltmp.install_fixed", arguments, parent)


_OF_SPEC = ("prefix", "patch")


def describe(reducer: Ltmp | FixedRate) -> str:
    """The reducer as `BlockSpec.reduce` holds it: `ltmp:thresholds,variant=ltmp,form=consistent,...`."""
    kind = "thresholds" if isinstance(reducer, Ltmp) else "fixed"
    return settings.write(f"{NAME}:{kind},", reducer, _OF_SPEC)


def reducer(text: str, spec: ViTSpec) -> Ltmp | FixedRate:
    """Inverse of `describe`, for blocks of `spec`.

    Raises:
      InputError: not such a text.
    """
    fixed = text.startswith(f"{NAME}:fixed,")
    kind, cls = ("fixed", FixedRate) if fixed else ("thresholds", Ltmp)
    values = settings.read(text, f"{NAME}:{kind},", cls, _OF_SPEC)
    made = cls(prefix=spec.prefix, **values)
    if isinstance(made, Ltmp):
        made = dataclasses.replace(made, patch=spec.pooling == "mean")
        check(spec, made)
    else:
        _check_fixed(made)
    return made


def reducers(spec: ViTSpec) -> tuple[tuple[int, Ltmp | FixedRate], ...]:
    """`(layer, reducer)` of every block that LTMP reduces, as `ViT` takes them."""
    return tuple(
        (layer, reducer(block.reduce, spec))
        for layer, block in enumerate(spec.blocks)
        if block.reduce is not None and block.reduce.startswith(f"{NAME}:")
    )


def fixed_tokens(spec: ViTSpec) -> tuple[int, ...]:
    """Tokens before the first block and after each, `[L + 1]`, of a spec that merges and prunes fixed numbers."""
    made, counts = dict(reducers(spec)), [spec.tokens]
    for layer in range(spec.depth):
        left, reducer = counts[-1], made.get(layer)
        if isinstance(reducer, FixedRate):
            steps = [reducer.merge if merges(reducer.variant) else 0, reducer.prune if prunes(reducer.variant) else 0]
            for step in reversed(steps) if reducer.variant == "prune_merge" else steps:
                left -= min(step, (left - spec.prefix) // 2)
        counts.append(left)
    return tuple(counts)


def vit(spec: ViTSpec, *, training: bool = False, **options: Any) -> ViT:
    """The model of an installed spec: static shapes, dead tokens masked, thresholds read from `params["ltmp"]` or from
    the knobs of the same names (a scalar, or one per layer).

    Args:
      training: with the softmax that the faithful form trains with; of no effect on the consistent one.
      **options: as of `ViT`.
    """
    made = reducers(spec)
    if any(isinstance(r, Ltmp) and r.form == "faithful" for _, r in made):
        options["attention"] = _faithful_training if training else ops.faithful_attention
    return ViT(spec, reducers=made, **options)


def consistent(spec: ViTSpec) -> ViTSpec:
    """The spec with its learned reducers in the consistent form, whose masked model computes what removal computes; so
    thresholds that the faithful form has learned are seen as they will be deployed."""
    made = dict(reducers(spec))

    def edit(layer: int, block: BlockSpec) -> BlockSpec:
        found = made.get(layer)
        if not isinstance(found, Ltmp):
            return block
        return dataclasses.replace(block, reduce=describe(dataclasses.replace(found, form="consistent")))

    return spec.edit(blocks=edit)


def costs(spec: ViTSpec) -> Float[np.ndarray, "L 3"]:
    """Per block: MACs of attention's projections per token, of attention per pair of tokens, of the MLP per token."""
    rows = []
    for block in spec.blocks:
        inner = block.heads * block.head_dim if block.attn else 0
        matrices = 3 if spec.activation == "swiglu" else 2
        rows.append((4 * spec.width * inner, 2 * inner, matrices * spec.width * block.mlp if block.ffn else 0))
    return np.asarray(rows, np.float32)


def dense_macs(spec: ViTSpec) -> float:
    """MACs of the blocks for one image of which no token is reduced."""
    n = spec.tokens
    return float((costs(spec).astype(np.float64) @ np.asarray([n, n * n, n])).sum())


def floor(spec: ViTSpec) -> float:
    """The lowest reachable budget: the first reducing block's attention is dense, then only the prefix lives on."""
    first = reducers(spec)[0][0] if reducers(spec) else 0
    least = protected(spec) / spec.tokens
    fractions = jnp.asarray([1.0 if layer < first else least for layer in range(spec.depth)])
    return float(ops.budget(fractions, spec.tokens, jnp.asarray(costs(spec)))[0])


def protected(spec: ViTSpec) -> int:
    """Tokens that every image keeps: the prefix, and a patch where patches are pooled or there is no prefix."""
    return spec.prefix + (spec.pooling == "mean" or not spec.prefix)


def alive_fractions(aux: Mapping[str, Any], tokens: int) -> Float[Array, "L B"]:
    """Live tokens after each block over `tokens`, per image, differentiable where the model masked them."""
    rows: list[Array] = []
    for block in aux["blocks"]:
        decisions = block.get("decisions")
        if decisions is None:
            rows.append(rows[-1] if rows else jnp.ones(aux["pooled"].shape[:1]))
        elif "alive" in decisions:
            rows.append(decisions["alive"].sum(1) / tokens)
        else:
            rows.append(decisions["kept"] / tokens)
    return jnp.stack(rows)


def relaxed(thresholds: Mapping[str, Any], amount: float) -> dict[str, Any]:
    """Less aggressive thresholds: `amount` 0 leaves them, 1 reduces nothing, between them the way is straight. A
    negative amount goes the other way, within [0, 1]."""
    ends = {"merge_threshold": 1.0, "prune_threshold": 0.0}
    return {name: jnp.clip(value + amount * (ends[name] - value), 0.0, 1.0) for name, value in thresholds.items()}


def check(spec: ViTSpec, made: Ltmp) -> None:
    """Raises InputError for settings that are not defined for `spec`."""
    check_choice("variant", made.variant, VARIANTS)
    check_choice("form", made.form, FORMS)
    check_choice("similarity", made.similarity, SIMILARITIES)
    if made.relative < 0:
        raise InputError(f"relative must be 0 or the tokens of the dense model, found {made.relative}")
    if not 0 < made.tau < np.inf:
        raise InputError(f"tau must be positive and finite, found {made.tau}")
    if not 0 <= made.prune_tau < np.inf:
        raise InputError(f"prune_tau must be 0 (as tau) or more, and finite, found {made.prune_tau}")
    if made.form == "faithful":
        if not spec.class_token or spec.prefix != 1 or spec.pooling != "class":
            raise InputError(
                "the faithful form needs a class token as the only prefix token, and class pooling, found "
                f"class_token={spec.class_token}, {spec.prefix} prefix tokens, pooling={spec.pooling!r}"
            )
        if made.relative:
            raise InputError(f"the faithful form compares plain importance, expected relative=0, found {made.relative}")
        if made.prune_tau:
            raise InputError(f"the faithful form has one tau, expected prune_tau=0, found {made.prune_tau}")
        if made.attached:
            raise InputError(f"the faithful form trains through masks only, expected attached=0, found {made.attached}")
    if spec.pooling == "none":
        raise InputError("ltmp needs a pooled output, found pooling='none'; use token_reduction.unmerge on the tokens")


def _check_fixed(made: FixedRate) -> None:
    check_choice("variant", made.variant, FIXED)
    check_choice("similarity", made.similarity, SIMILARITIES)
    if made.merge < 0 or made.prune < 0:
        raise InputError(f"the rates (merge, prune) must be 0 or more, found ({made.merge}, {made.prune})")


def check_thresholds(name: str, values: Any, depth: int) -> None:
    """Raises InputError unless `values` holds one finite number in [0, 1] per layer."""
    found = np.asarray(values)
    if found.shape != (depth,):
        raise InputError(f"{name} must hold one number per block, [{depth}], found {list(found.shape)}")
    if not np.isfinite(found).all() or (found < 0).any() or (found > 1).any():
        raise InputError(f"{name} must be finite and in [0, 1], found {found.tolist()}")


def _installed(spec: ViTSpec, text: Any, operation: str, arguments: Mapping[str, Any], parent: str) -> ViTSpec:
    taken = [layer for layer, block in enumerate(spec.blocks) if block.reduce is not None]
    if taken:
        raise InputError(f"blocks[{taken[0]}] reduces already ({spec.blocks[taken[0]].reduce}), expected none to")

    def edit(layer: int, block: BlockSpec) -> BlockSpec:
        return dataclasses.replace(block, reduce=text(layer)) if block.attn else block

    step = Lineage(parent=parent, operation=operation, arguments=json.dumps(arguments))
    return spec.edit(blocks=edit, lineage=(*spec.lineage, step))
