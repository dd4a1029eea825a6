# SPDX-License-Identifier: Apache-2.0
"""The output weights of a pruned MLP, fitted anew: what the kept neurons can say of what the whole MLP said.

DGMR copies the output weights of the kept neurons and leaves the rest to distillation. But what a dropped neuron added
is, for a large part, a linear function of what the others say, which least squares on some images find. Not in the
paper; without it (`config.dgmr.refit = 0`) a run is the paper's.

Block after block the pruned model runs up to the hidden activations h of its MLP, the dense model runs beside it, and

    minimise over W, b:  sum_t c_t |h_t W + b - y_t|^2 + ridge m |W - W_0|^2

where t goes over the tokens of all images. y = y_dense + (x_dense - x) / s is what `down` must say for the block to
leave the dense model's tokens: y_dense is what the dense model's `down` said, x the tokens to which the branch is
added, s the layer scale (1 without). So it also makes good what earlier blocks left. Where the branch ends in a norm
(`norm_position="post"`), in which that is not linear, y = y_dense. W_0 are the copied weights, m is the mean diagonal
entry of sum_t c_t h_t' h_t. Class and distillation tokens have c = sqrt(patch tokens), halfway between all tokens
alike and the distillation loss, in which the class token counts like all patch tokens together; others have c = 1.

Letters: T tokens of all images, K kept neurons, J = K + 1 with a hidden activation of 1 for the bias, D width.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from vtjax.errors import InputError
from vtjax.methods import dgmr
from vtjax.models.layers import Block
from vtjax.models.segments import block_name
from vtjax.models.vit import Params, ViT
from vtjax.ops.tokens import Tokens
from vtjax.spec import Lineage, ViTSpec

REFIT = f"{dgmr.NAME}.refit"
"""The operation in a spec's lineage."""

RIDGE = 1e-1
"""Pull towards the copied weights; see the module's text. Settled by `experiments.dgmr.refit_constants`."""


def refit(
    spec: ViTSpec,
    params: Params,
    dense_spec: ViTSpec,
    dense: Params,
    images: Float[np.ndarray, "n H W C"],
    *,
    ridge: float = RIDGE,
    class_weight: float | None = None,
    batch: int = 20,
    progress: Callable[[int], None] = lambda layer: None,
    parent: str = "",
) -> tuple[ViTSpec, Params]:
    """Fits `mlp/down` of every block that lost neurons.

    Args:
      spec, params: the pruned model.
      dense_spec, dense: the one that it was.
      images: float, normalised; no labels are needed.
      ridge: see the module's text; 0 = none.
      class_weight: c of the class and distillation tokens; None = the square root of the number of patch tokens.
      batch: images at a time. The tokens of all images of both models are held on the device.
      progress: called with the layer, before its work.
      parent: SHA-256 of `params` (`train.state.params_sha256`), for the lineage.

    Returns:
      The spec with a step more in its lineage, and the parameters, of which `mlp/down` are new. Least squares are
      float64, on the host.

    Raises:
      InputError: no images, images of another shape or that are not finite, a negative ridge, a class_weight of 0
        or less, a batch below 1, or models that are not the same but for MLPs of which at least one is narrower;
        parameters as of `dgmr.check`.
    """
    if not len(images):
        raise InputError("a refit needs at least one image, found none")
    if not np.isfinite(images).all():
        raise InputError("images must be finite, found NaN or infinite pixels")
    if not 0 <= ridge < np.inf:
        raise InputError(f"ridge must be 0 or more, found {ridge}")
    if class_weight is not None and not 0 < class_weight < np.inf:
        raise InputError(f"class_weight must be above 0, found {class_weight}")
    if batch < 1:
        raise InputError(f"batch must be 1 or more, found {batch}")
    differ = [name for name in spec.diff(dense_spec) if not name.startswith("lineage") and not name.endswith(".mlp")]
    if differ:
        raise InputError(f"the dense model must differ in MLP widths only, found another {differ[0]}")
    narrower = [m - n for n, m in zip(dgmr.hidden(spec), dgmr.hidden(dense_spec), strict=True)]
    if min(narrower) < 0 or not any(narrower):
        raise InputError(
            f"MLPs must be narrower than the dense model's {dgmr.compact(dgmr.hidden(dense_spec))}, "
            f"found {dgmr.compact(dgmr.hidden(spec))}"
        )
    dgmr.check(spec, params)
    dgmr.check(dense_spec, dense)
    student, teacher = ViT(spec), ViT(dense_spec)
    student.check_images(images)
    batches = [jnp.asarray(part, jnp.float32) for part in np.array_split(images, -(-len(images) // batch))]
    params, dense = dict(jax.tree.map(jnp.asarray, params)), jax.tree.map(jnp.asarray, dense)
    embed = jax.jit(lambda model, params, images: model.embed(params, images), static_argnums=0)
    here = [embed(student, params, part) for part in batches]
    there = [embed(teacher, dense, part) for part in batches]
    heavy = (spec.tokens - spec.prefix) ** 0.5 if class_weight is None else class_weight
    for layer, (block, whole) in enumerate(zip(student.blocks(), teacher.blocks(), strict=True)):
        name = block_name(layer)
        if narrower[layer]:
            progress(layer)
            pairs = zip(here, there, strict=True)
            found = [_normal(spec, block, whole, heavy, params[name], dense[name], *pair) for pair in pairs]
            gram, moment = (np.sum([np.float64(each) for each in parts], 0) for parts in zip(*found, strict=True))
            mlp = params[name]["mlp"]
            down = {leaf: jnp.asarray(value) for leaf, value in _solve(gram, moment, mlp["down"], ridge).items()}
            params[name] = {**params[name], "mlp": {**mlp, "down": down}}
        here = [_run(block, params[name], tokens) for tokens in here]
        there = [_run(whole, dense[name], tokens) for tokens in there]
    step = Lineage(parent, REFIT, json.dumps({"images": len(images), "ridge": ridge, "class_weight": heavy}))
    return spec.edit(lineage=(*spec.lineage, step)), params


def images_of(spec: ViTSpec) -> int:
    """How many images the last fit in a spec's lineage had; 0 where there was none."""
    steps = [step for step in spec.lineage if step.operation == REFIT]
    return json.loads(steps[-1].arguments)["images"] if steps else 0


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _normal(
    spec: ViTSpec, block: Block, whole: Block, heavy: Any, params: Any, dense: Any, here: Tokens, there: Tokens
) -> tuple[Float[Array, "J J"], Float[Array, "J D"]]:
    """Of one batch, float32: sum_t c_t h_t' h_t and sum_t c_t h_t' y_t."""
    hidden, _, before = _tapped(block, params, here)
    _, y, known = _tapped(whole, dense, there)
    if spec.norm_position == "pre":
        scale = jnp.ones(()) if spec.layer_scale is None else params["layer_scale2"]
        y += (known - before) / jnp.where(scale == 0, jnp.inf, scale)
    compared = int(spec.class_token) + int(spec.distill_token)
    weight = jnp.where(jnp.arange(spec.tokens) < compared, jnp.sqrt(heavy), 1.0)[:, None]
    hidden = weight * jnp.pad(hidden, ((0, 0), (0, 0), (0, 1)), constant_values=1.0)
    hidden, y = (x.reshape(-1, x.shape[-1]) for x in (hidden, weight * y))
    return tuple(jnp.matmul(hidden.T, x, precision=jax.lax.Precision.HIGHEST) for x in (hidden, y))  # type: ignore


def _solve(
    gram: Float[np.ndarray, "J J"], moment: Float[np.ndarray, "J D"], down: Any, ridge: float
) -> dict[str, np.ndarray]:
    """The new leaves of `down`, of the old ones' types; J = K + 1. Without a bias there is none to fit."""
    kernel = np.asarray(down["kernel"], np.float64)
    k, bias = len(kernel), "bias" in down
    pull = ridge * np.trace(gram[:k, :k]) / k
    gram, moment = gram[: k + bias, : k + bias].copy(), moment[: k + bias].copy()
    gram[np.arange(k), np.arange(k)] += pull
    moment[:k] += pull * kernel
    # Not `solve`: without a pull, or with neurons that are silent, the products may be singular.
    found = np.linalg.lstsq(gram, moment, rcond=None)[0]
    fitted = {"kernel": found[:k], **({"bias": found[k]} if bias else {})}
    return {leaf: value.astype(np.asarray(down[leaf]).dtype) for leaf, value in fitted.items()}


@functools.partial(jax.jit, static_argnums=0)
def _run(block: Block, params: Any, tokens: Tokens) -> Tokens:
    return block.apply({"params": params}, tokens)[0]


def _tapped(block: Block, params: Any, tokens: Tokens) -> tuple[Array, Array, Array]:
    """What enters and what leaves the block's `mlp/down`, and the tokens to which the MLP's branch is added."""
    seen: list[tuple[Array, Array]] = []

    def watch(function: Any, args: Any, options: Any, context: Any) -> Any:
        y = function(*args, **options)
        if context.module.path == ("mlp", "down") and context.method_name == "__call__":
            seen.append((args[0], y))
            return jnp.zeros_like(y)
        return y

    with nn.intercept_methods(watch):
        without = block.apply({"params": params}, tokens)[0].x
    return *seen[0], without
