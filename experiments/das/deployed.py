# SPDX-License-Identifier: Apache-2.0
"""What a model without some layers costs, sample by sample; and beside the same one with all layers in `vtjax bench`.

Letters: b rows, L layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from experiments.vlm import main as vlm
from vtjax.account import bench, flops
from vtjax.account import fusion as counts
from vtjax.errors import InputError
from vtjax.methods import das
from vtjax.models.fusion import Fusion
from vtjax.models.vlm import VLM
from vtjax.parallel import rules
from vtjax.parallel.rules import path_of
from vtjax.spec import FusionSpec, VLMSpec
from vtjax.train.state import flatten
from vtjax.train.task import Task

INPUTS = ("input_ids", "images", "positions", "segments")


def gone(spec: Any) -> tuple[int, ...]:
    """The layers that DAS took out of a decoder or fusion encoder."""
    if isinstance(spec, FusionSpec):
        return spec.skips
    return tuple(i for i, block in enumerate(spec.blocks) if not block.attn and not block.ffn and i in das.arms(spec))


def whole(spec: Any) -> Any:
    """The same model with all layers, as it would be with adapters inside of them alone."""
    if isinstance(spec, VLMSpec):
        return spec.edit(decoder=whole(spec.decoder))
    history = tuple(step for step in spec.lineage if step.operation != f"{das.METHOD}.remove")
    blocks = {index: {"attn": True, "ffn": True, "adapter": 0} for index in gone(spec)}
    if isinstance(spec, FusionSpec):
        return spec.edit(blocks=blocks, lineage=history, skip=None, encoder_skip=None)
    after = spec.edit(blocks=blocks, lineage=history)
    return das.remove(after, None, [])[0] if das.is_installed(after) else after


def decoder_macs(spec: VLMSpec, tokens: Any, skip: Bool[Array, " L"] | None) -> Float[Array, " b"]:
    """MACs of every row with its image, as `flops.macs` counts a prompt of so many tokens, adapters included.

    Args:
      tokens: whole numbers `[b]`, those of each row.
      skip: what is left out while the model runs; None = nothing more than the spec says.
    """
    # Of layers as they are, then of stand-ins; each a polynomial of degree 2 in the tokens, which three points tell.
    first, second, third = (_costs(spec, n) for n in (1, 2, 3))
    square = (third - 2 * second + first) / 2
    linear = second - first - 3 * square
    n = jnp.asarray(tokens).astype(jnp.float32)[:, None, None]
    each = (first - linear - square) + linear * n + square * n**2
    kept, instead = each[:, 0], each[:, 1]
    out = jnp.zeros(kept.shape[1], bool) if skip is None else jnp.append(skip, False)
    return jnp.where(out, instead, kept).sum(-1)


def _costs(spec: VLMSpec, n: int) -> np.ndarray:
    """`[2, L + 1]`: MACs of each layer and of its stand-in for n tokens; last, of all the rest, which has none."""
    found, width = np.zeros((2, spec.decoder.depth + 1)), spec.decoder.width
    for row in flops.layers(spec, n):
        part, _, name = row.name.partition("/")
        inside = part == "decoder" and name.startswith("block_")
        found[0, int(name[6:8]) if inside else -1] += row.macs
    for index, site, adapter in das.attached(spec.decoder):
        found[int(site == "instead"), index] += adapter.spec.macs(width, n)  # type: ignore[attr-defined]
    return found


def fusion_macs(spec: FusionSpec, length: int, texts: int = 1, skip: Bool[Array, " L"] | None = None) -> Any:
    """MACs of one row of a fusion encoder: `texts` texts of so many tokens, each fused with its images; what makes
    tokens of an image is computed once. A whole number, or with a `skip` float32."""
    rows = flops.layers(spec, length)
    once = sum(row.macs for row in rows if row.name.startswith(("tower/", "embed/image")))
    total = once + texts * (sum(row.macs for row in rows) - once)
    if skip is None:
        return total
    saved = np.zeros(spec.arms)
    for index in range(spec.arms):
        short = spec.skipping([index])
        saved[index] = texts * sum(r.macs for r in rows) - texts * sum(r.macs for r in counts.layers(short, length))
    return total - (jnp.asarray(saved, jnp.float32) * skip[: spec.arms]).sum()


def decoder(config: ConfigDict, task: Task, rows: Any, dense: Any) -> tuple[bench.Candidate, bench.Candidate]:
    """A forward pass over rows of questions, logits of all tokens, beside that of `--dense` or of the same model with
    all layers, where those that it lacks have random weights: times do not depend on them.

    Raises:
      InputError: a `--dense` that takes other ids or images.
    """
    params, _, _ = task.init(jax.random.key(config.seed))
    length = rows["input_ids"].shape[1]
    spec: Any = task.spec

    def candidate(name: str, spec: VLMSpec, params: Any) -> bench.Candidate:
        model = das.vlm(spec, **vlm.options(config))

        def apply(p: Any, ids: Any, images: Any, positions: Any, segments: Any) -> jax.Array:
            return model.apply(p, ids, images, positions=positions, segments=segments)[0]

        macs = int(_costs(spec, length)[0].sum()) + (length - 1) * spec.decoder.width * spec.decoder.vocab
        return bench.Candidate(name, apply, params, macs, inputs=lambda batch: tuple(batch[n] for n in INPUTS))

    if dense is not None:
        _check_same(spec, dense.spec, VLMSpec, ("image_size", "placeholders", "image_token"))
        return candidate("the model", spec, params), candidate("--dense", dense.spec, dense.params)

    def init(key: jax.Array) -> Any:
        made = VLM(before).init(key)
        return {**made, "decoder": das.added(before.decoder, made["decoder"], key)}

    before = whole(spec)
    every = candidate("adapters in all layers", before, _filled(init, params, config.seed))
    return candidate("the model", spec, params), every


def fusion(config: ConfigDict, task: Task, rows: Any, dense: Any) -> tuple[bench.Candidate, bench.Candidate]:
    """The same of a fusion encoder.

    Raises:
      InputError: a `--dense` that takes other texts or images.
    """
    params, _, _ = task.init(jax.random.key(config.seed))
    length, spec = rows["input_ids"].shape[-1], task.spec
    assert isinstance(spec, FusionSpec)
    texts = rows["input_ids"].shape[1] if spec.ranks else 1

    def candidate(name: str, spec: FusionSpec, params: Any) -> bench.Candidate:
        model = Fusion(spec, jnp.dtype(config.dtype), rules.constrain)

        def apply(p: Any, ids: Any, images: Any, mask: Any) -> jax.Array:
            return model.rank(p, ids, images, mask)[0] if spec.ranks else model.apply(p, ids, images, mask)[0]

        macs = fusion_macs(spec, length, texts)
        inputs = ("input_ids", "images", "mask")
        return bench.Candidate(name, apply, params, macs, inputs=lambda batch: tuple(batch[n] for n in inputs))

    if dense is not None:
        _check_same(spec, dense.spec, FusionSpec, ("vocab", "images", "ranks"))
        return candidate("the model", spec, params), candidate("--dense", dense.spec, dense.params)
    before = whole(spec)
    every = candidate("adapters in all modules", before, _filled(Fusion(before).init, params, config.seed))
    return candidate("the model", spec, params), every


def _filled(init: Any, params: Any, seed: int) -> Any:
    """Parameters as `init` has them: those that there are, random ones elsewhere."""
    own, key = flatten(params), jax.random.key(seed)

    def leaf(keys: Any, shape: Any) -> Any:
        if (found := own.get(path_of(keys))) is not None:
            return found
        return 0.02 * jax.random.normal(key, shape.shape)

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(init, key))


def _check_same(spec: Any, dense: Any, kind: type, names: tuple[str, ...]) -> None:
    if not isinstance(dense, kind):
        raise InputError(f"--dense must hold a {kind.__name__}, found {type(dense).__name__}")
    for field in names:
        if (here := getattr(spec, field)) != (there := getattr(dense, field)):
            raise InputError(f"--dense must have {field} {here}, as the model has, found {there}")
