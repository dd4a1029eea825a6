# SPDX-License-Identifier: Apache-2.0
"""DGMR: keeps the MLP neurons that are the most diverse, drops the others, and distils from the unpruned model.

Shen et al., "Diversity-Guided MLP Reduction for Efficient Large Vision Transformers" (arXiv 2506.08591). The selection
is `ops.gram_schmidt`; here it becomes a spec edit, a map of the parameters, and the terms of the distillation loss.

    spec, params = dgmr.prune(m.spec, m.params, ratio=1.0)     every MLP to `width` neurons, the paper's main setting

Only `mlp/up`, `mlp/gate` and `mlp/down` shrink: kept neurons are copied bit for bit, in pick order, everything else is
the same array as before. Letters: L blocks, N model width, M hidden width of an MLP, K neurons kept, B images, T patch
tokens, D width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from vtjax.errors import InputError, check_choice
from vtjax.models.segments import block_name
from vtjax.models.vit import Params
from vtjax.ops import gram_schmidt
from vtjax.ops.gram_schmidt import Selection
from vtjax.spec import BlockSpec, Lineage, ViTSpec

NAME = "dgmr"
PRUNE = f"{NAME}.prune"
"""The operation in a spec's lineage."""

METHODS = ("gram_schmidt", "l2", "random", "indices")
"""DGMR's; the largest input weights; a draw without replacement; given by hand. All but the last nest: what is kept of
fewer neurons is the beginning of what is kept of more."""

SCORES = gram_schmidt.MODES
POINTS = ("normed", "tokens", "projected")
"""Where student and teacher are compared (spec section 2.1): tokens after the final norm (DINOv2); tokens that leave
the last block (EVA-CLIP, InternViT); normed patches and the head's output (OpenCLIP, whose head is the projection)."""

Picks = Sequence[Selection | None]
"""Per block what is kept, None where the block has no MLP."""

logger = logging.getLogger(__name__)


def prune(
    spec: ViTSpec,
    params: Params,
    *,
    ratio: float | None = None,
    keep: Any = None,
    indices: Sequence[Any] | None = None,
    method: str = "gram_schmidt",
    score: str = "concat",
    form: str = "blocked",
    seed: int = 0,
    parent: str = "",
) -> tuple[ViTSpec, Params]:
    """Prunes the MLPs of a model. One of `ratio`, `keep` and `indices` says how far.

    Args:
      spec, params: any ViT; the parameters may be numpy or jax arrays of any float type, and are not changed. The
        selection is made in float32, copies keep their type.
      ratio: kept neurons over the model width, the same in every block (r of the paper): K = floor(N r).
      keep: kept neurons, a number for all blocks or one per block (0 for a block without MLP).
      indices: per block the neurons to keep, in the order in which they are to stand, None for a block without MLP.
      method: of `METHODS`; "indices" follows from `indices`.
      score: of a gated MLP (SwiGLU): what its neurons are compared by, see `rows`.
      form: of `gram_schmidt.FORMS`; all select the same neurons.
      seed: of "random".
      parent: SHA-256 of the parameters (`train.state.params_sha256`), for the lineage.

    Returns:
      The edited spec, and the parameters of the pruned model.

    Raises:
      InputError: a count that is not a whole number in 1..M; weights that are NaN or infinite, or not of the spec's
        shapes; an unknown method, score or form.
    """
    found = [name for name, value in (("ratio", ratio), ("keep", keep), ("indices", indices)) if value is not None]
    if seed < 0:
        raise InputError(f"seed must be 0 or more, found {seed}")
    if len(found) != 1:
        raise InputError(f"prune needs one of ratio, keep and indices, found {' and '.join(found) or 'none'}")
    if indices is not None:
        picks, method = given(spec, params, indices), "indices"
    else:
        kept = counts(spec, ratio=ratio, keep=keep)
        picks = choose(spec, params, kept, method=method, score=score, form=form, seed=seed)
    edited = edit(spec, widths(picks), picks, method=method, score=score, seed=seed, parent=parent)
    return edited, take(spec, params, picks)


def counts(spec: ViTSpec, *, ratio: float | None = None, keep: Any = None) -> tuple[int, ...]:
    """Kept neurons of every block, `[L]`; 0 for a block without MLP. Arguments and errors as of `prune`."""
    if ratio is not None:
        if isinstance(ratio, bool) or not isinstance(ratio, numbers.Real) or not 0 < ratio < np.inf:
            raise InputError(f"ratio must be above 0 and finite, found {ratio!r}")
        keep = int(spec.width * ratio)
    if isinstance(keep, list | tuple) or np.ndim(keep):
        each = list(keep)
        if len(each) != spec.depth:
            raise InputError(f"keep must be one number, or one for each of {spec.depth} blocks, found {len(each)}")
    else:
        each = [keep if block.ffn else 0 for block in spec.blocks]
    for layer, (block, k) in enumerate(zip(spec.blocks, each, strict=True)):
        least, most = (1, block.mlp) if block.ffn else (0, 0)
        if isinstance(k, bool) or not isinstance(k, numbers.Integral) or not least <= int(k) <= most:
            told = f" (floor({spec.width} x {ratio}))" if ratio is not None else ""
            raise InputError(
                f"block {layer}: K, the neurons to keep, must be a whole number in {least}..M = {most}, "
                f"found {k!r}{told}"
            )
    return tuple(int(k) for k in each)


def rows(spec: ViTSpec, params: Params, layer: int, score: str = "concat") -> Float[Array, "M S"]:
    """What the neurons of a block are selected by, float32: the input weights of each, without bias.

    For a gated MLP by `score`: "concat", gate and value weights side by side (S = 2 N); "gate"; or "value". No code of
    the authors selects gated neurons: this is our rule (spec section 1.5).
    """
    mlp = params[block_name(layer)]["mlp"]
    up = jnp.asarray(mlp["up"]["kernel"], jnp.float32).T
    if spec.activation != "swiglu":
        return up
    return gram_schmidt.scores(jnp.concatenate([jnp.asarray(mlp["gate"]["kernel"], jnp.float32).T, up]), score)


def choose(
    spec: ViTSpec,
    params: Params,
    keep: Sequence[int],
    *,
    method: str = "gram_schmidt",
    score: str = "concat",
    form: str = "blocked",
    seed: int = 0,
    mesh: Mesh | None = None,
) -> list[Selection | None]:
    """The neurons to keep, in pick order, with their norms: residual norms for "gram_schmidt", else those of the rows.

    Blocks of equal width are selected by one compiled program, for the largest of their counts; the others are the
    beginnings of that. Traced parameters are allowed.

    Args:
      keep: as `counts` returns it.
      mesh: Gram-Schmidt's blocks are shared out over its devices, which takes the memory of all input weights together;
        None = one block after the other.
    """
    check_choice("method", method, METHODS[:-1])
    check_choice("score", score, SCORES)
    check_choice("form", form, gram_schmidt.FORMS)
    check(spec, params)
    most: dict[int, int] = {}
    for block, k in zip(spec.blocks, keep, strict=True):
        most[block.mlp] = max(k, most.get(block.mlp, 0))
    shared: dict[int, Selection] = {}
    if method == "gram_schmidt" and mesh is not None:
        for width, k in most.items():
            layers = [layer for layer, block in enumerate(spec.blocks) if block.ffn and block.mlp == width]
            if layers:
                stacked = jnp.stack([rows(spec, params, layer, score) for layer in layers])
                found = gram_schmidt.select_layers(stacked, k, form=form, mesh=mesh)
                shared |= {layer: Selection(found.indices[i], found.norms[i]) for i, layer in enumerate(layers)}
    picks: list[Selection | None] = []
    for layer, (block, k) in enumerate(zip(spec.blocks, keep, strict=True)):
        if not block.ffn:
            picks.append(None)
            continue
        if layer in shared:
            found = shared[layer]
        elif method == "gram_schmidt":
            found = gram_schmidt.select_with_norms(rows(spec, params, layer, score), most[block.mlp], form=form)
        else:
            lengths = _lengths(rows(spec, params, layer, score))
            if method == "l2":
                order = jnp.argsort(-lengths, stable=True)
            else:
                order = jnp.asarray(np.random.default_rng((seed, layer)).permutation(block.mlp))
            found = Selection(jnp.asarray(order, jnp.int32), lengths[order])
        picks.append(Selection(found.indices[:k], found.norms[:k]))
    return picks


def given(spec: ViTSpec, params: Params, indices: Any) -> list[Selection | None]:
    """Neurons that are named by hand, as `choose` returns them; arguments and errors as of `prune`."""
    check(spec, params)
    several = isinstance(indices, list | tuple) or (isinstance(indices, np.ndarray) and indices.ndim == 2)
    if not several or len(indices) != spec.depth:
        there = len(indices) if several else type(indices).__name__
        raise InputError(f"indices must hold one list for each of {spec.depth} blocks, found {there}")
    picks: list[Selection | None] = []
    for layer, (block, named) in enumerate(zip(spec.blocks, indices, strict=True)):
        try:
            found = np.asarray([] if named is None else named)
        except ValueError:  # lists of different lengths
            found = np.asarray(["ragged"])
        if not block.ffn and not found.size:
            picks.append(None)
            continue
        whole = found.ndim == 1 and found.size and np.issubdtype(found.dtype, np.integer)
        if not whole or not block.ffn or found.min() < 0 or found.max() >= block.mlp:
            limits = f"whole numbers in 0..{block.mlp - 1}, at least one" if block.ffn else "empty, as it has no MLP"
            raise InputError(f"indices[{layer}] must be {limits}, found {str(named):.60}")
        neurons, times = np.unique(found, return_counts=True)
        if times.max() > 1:
            raise InputError(f"indices[{layer}] must be distinct, found neuron {neurons[times.argmax()]} again")
        lengths = _lengths(rows(spec, params, layer))
        picks.append(Selection(jnp.asarray(found, jnp.int32), lengths[found]))
    return picks


def hidden(spec: ViTSpec) -> list[int]:
    """Neurons of every block's MLP; 0 where it has none."""
    return [block.mlp if block.ffn else 0 for block in spec.blocks]


def widths(picks: Picks) -> tuple[int, ...]:
    """Kept neurons of every block; 0 where it has no MLP."""
    return tuple(0 if pick is None else int(pick.indices.shape[-1]) for pick in picks)


def edit(
    spec: ViTSpec,
    keep: Sequence[int],
    picks: Picks = (),
    *,
    method: str,
    score: str = "concat",
    allocation: str = "uniform",
    seed: int = 0,
    parent: str = "",
) -> ViTSpec:
    """The spec of the pruned model. Its lineage holds the widths before and after (one number where all blocks have the
    same), how the neurons were selected and their number was allocated, and, where `picks` are given, the `digest` of
    their indices."""
    arguments: dict[str, Any] = {"method": method, "keep": compact(keep), "mlp": compact(hidden(spec))}
    if allocation != "uniform":
        arguments["allocation"] = allocation
    if spec.activation == "swiglu" and method in ("gram_schmidt", "l2"):
        arguments["score"] = score
    if picks:
        arguments["indices_sha256"] = digest([None if pick is None else pick.indices for pick in picks])

    def narrow(layer: int, block: BlockSpec) -> BlockSpec:
        return dataclasses.replace(block, mlp=keep[layer]) if block.ffn else block

    step = Lineage(parent, PRUNE, json.dumps(arguments), seed=seed if method == "random" else None)
    return spec.edit(blocks=narrow, lineage=(*spec.lineage, step))


def digest(indices: Sequence[Any]) -> str:
    """SHA-256 of the neurons of all blocks: int32, block after block, none of a block without MLP."""
    order = b"".join(np.asarray([] if each is None else each, np.int32).tobytes() for each in indices)
    return hashlib.sha256(order).hexdigest()


def take(spec: ViTSpec, params: Params, picks: Picks) -> Params:
    """The parameters of the pruned model; `spec` and `params` are those before.

    A norm on the hidden activations (EVA-02) is indexed, too. It then sees fewer activations than it was trained for,
    so there even dead neurons are missed; a warning says so.
    """
    pruned = dict(params)
    for layer, pick in enumerate(picks):
        if pick is None:
            continue
        block = dict(params[block_name(layer)])
        index = pick.indices if isinstance(pick.indices, jax.core.Tracer) else np.asarray(pick.indices)
        mlp: dict[str, Any] = {}
        for name, leaves in block["mlp"].items():
            if name == "down":
                mlp[name] = {**leaves, "kernel": leaves["kernel"][index]}
            else:
                mlp[name] = {leaf: value[..., index] for leaf, value in leaves.items()}
        pruned[block_name(layer)] = {**block, "mlp": mlp}
    if spec.mlp_norm:
        logger.warning("the norm on the hidden activations (mlp/norm) is pruned with them: its statistics change")
    return pruned


def check(spec: ViTSpec, params: Params) -> None:
    """Raises InputError, by name, unless the MLPs have the spec's shapes and finite input weights of a float type.

    Biases may be absent. NaN in biases and output weights is the owner's affair: it is copied.
    """
    gated = spec.activation == "swiglu"
    for layer, block in enumerate(spec.blocks):
        if not block.ffn:
            continue
        n, m = spec.width, block.mlp
        into = {"kernel": (n, m), "bias": (m,)}
        expected = {"up": into, **({"gate": into} if gated else {}), "down": {"kernel": (m, n), "bias": (n,)}}
        if spec.mlp_norm:
            expected["norm"] = {"scale": (m,), "bias": (m,)}
        mlp = params.get(block_name(layer), {}).get("mlp", {})
        for name, leaves in expected.items():
            for leaf, shape in leaves.items():
                path, value = f"{block_name(layer)}/mlp/{name}/{leaf}", mlp.get(name, {}).get(leaf)
                if value is None:
                    if leaf == "kernel":
                        raise InputError(f"{path} must be {list(shape)}, found none")
                    continue
                if tuple(value.shape) != shape:
                    raise InputError(f"{path} must be {list(shape)}, found {list(value.shape)}")
                if not jnp.issubdtype(value.dtype, jnp.floating):
                    raise InputError(f"{path} must be of a float type, found {value.dtype}")
                if leaf == "kernel" and name != "down" and not isinstance(value, jax.core.Tracer):
                    bad = int((~np.isfinite(np.asarray(value, np.float32))).sum())
                    if bad:
                        raise InputError(f"{path} must be finite, found {bad} NaN or infinite weights")


def original(spec: ViTSpec) -> ViTSpec | None:
    """The spec before the first pruning, with what was done since then to other parts; None where nothing was pruned.

    It has no parameters: what was pruned is not in the checkpoint. It tells what the model cost, and from what it came.
    """
    step = next((step for step in spec.lineage if step.operation == PRUNE), None)
    if step is None:
        return None
    before = _spread(json.loads(step.arguments)["mlp"], spec.depth)
    return spec.edit(
        blocks=lambda layer, block: dataclasses.replace(block, mlp=before[layer]) if block.ffn else block,
        lineage=spec.lineage[: spec.lineage.index(step)],
    )


def settings(spec: ViTSpec) -> dict[str, Any]:
    """What the lineage says of the last pruning: method, keep and mlp (per block), ...; empty where nothing was."""
    steps = [step for step in spec.lineage if step.operation == PRUNE]
    made = json.loads(steps[-1].arguments) if steps else {}
    return made | {name: _spread(made[name], spec.depth) for name in ("keep", "mlp") if made}


class Features(NamedTuple):
    """What is compared.

    Attributes:
      whole: of the image, float32 `[B, P, D]`: the class token (with the distillation token where there is one), the
        mean or pooled vector where there is no class token, or the projection.
      patch: of the patch tokens, float32 `[B, T, D]`.
    """

    whole: Float[Array, "B P D"]
    patch: Float[Array, "B T N"]


def features(spec: ViTSpec, y: Array, aux: Mapping[str, Any], point: str) -> Features:
    """What a model's `apply` returned, as features at `point`.

    Raises:
      InputError: a point that the model does not have; see `check_point`.
    """
    check_point(spec, point)
    x = (aux["tokens"].x if point == "tokens" else aux["features"]).astype(jnp.float32)
    patch = x[:, spec.prefix :]
    if point == "projected":
        whole = y[:, None]
    elif spec.class_token:
        whole = x[:, : 1 + spec.distill_token]
    elif point == "tokens" or spec.pooling == "none":
        whole = patch.mean(1, keepdims=True)
    else:
        whole = aux["pooled"][:, None]
    return Features(whole.astype(jnp.float32), patch)


def check_point(spec: ViTSpec, point: str) -> None:
    """Raises InputError unless `spec` has features at `point`."""
    check_choice("point", point, POINTS)
    if spec.feature_layer is not None:
        raise InputError(f"the last layer is compared, expected feature_layer=None, found {spec.feature_layer}")
    if point == "normed" and not spec.norm_after and spec.class_token:
        raise InputError("point='normed' needs a norm after the last block (norm_after), found none; use 'tokens'")
    if point == "projected" and (not spec.classes or spec.pooling == "none"):
        raise InputError(
            f"point='projected' needs a head on a pooled vector, found classes={spec.classes}, pooling={spec.pooling!r}"
        )


def untouched(spec: ViTSpec, point: str) -> tuple[str, ...]:
    """Top-level names of the parameters that the loss at `point` does not depend on: they stay the teacher's."""
    if point == "projected":
        return ()
    after = ("fc_norm", "pool", "head", "head_distill")
    if point == "tokens":
        return ("norm", *after)
    return after if spec.class_token or spec.pooling == "none" else after[2:]


def distances(student: Features, teacher: Features) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Per image the mean squared difference of `whole` and of `patch`, each over all their elements; float32.

    The loss is `w_class` times the mean of the first over the batch plus `w_patch` times that of the second (spec
    section 2.1). The teacher gets no gradient.
    """
    teacher = jax.tree.map(jax.lax.stop_gradient, teacher)
    whole, patch = (jnp.square(a - b).mean((1, 2)) for a, b in zip(student, teacher, strict=True))
    return whole, patch


def compact(values: Sequence[int]) -> int | list[int]:
    """One number where all are the same."""
    return values[0] if len(set(values)) == 1 else list(values)


def _spread(value: int | list[int], depth: int) -> list[int]:
    return [value] * depth if isinstance(value, int) else value


def _lengths(weights: Float[Array, "M S"]) -> Float[Array, " M"]:
    """Row norms that neither overflow nor vanish."""
    scale = jnp.maximum(jnp.abs(weights).max(), jnp.finfo(jnp.float32).tiny)
    return scale * jnp.sqrt(jnp.square(weights / scale).sum(1))
