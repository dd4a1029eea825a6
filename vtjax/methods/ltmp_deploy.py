# SPDX-License-Identifier: Apache-2.0
"""LTMP as it is deployed: dead tokens are gone and time is saved, for every image, at any batch size, under jit.

The number of live tokens depends on image and block, and XLA wants static shapes. Images are run in small groups. Each
block has a few lengths, calibrated on data, and a group takes the least that holds all of its images (`lax.switch`).
The last length is always that of the dense model, so that nothing is ever cut off: an image with more tokens than any
calibrated length takes a slower path, is counted, and gets the same result. Before some blocks the images are sorted by
their live tokens, so that a group holds alike ones. Which images share a batch or a group decides about speed alone.

    lengths = calibrate(counts, ...)            # counts of live tokens from other images
    model = Deployed(spec, lengths, group=8)
    y, aux = jax.jit(model.apply)(params, images)

Letters: B batch, G images of a group, L layers, K slots of a group, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from vtjax.errors import InputError
from vtjax.methods import ltmp
from vtjax.models.layers import Block, Knobs
from vtjax.models.segments import block_name, call_module, layer_knobs
from vtjax.models.vit import Params, ViT, method_knobs
from vtjax.ops.attention import IMPLEMENTATIONS
from vtjax.ops.token_reduction import filled
from vtjax.ops.tokens import Tokens
from vtjax.spec import ViTSpec

Lengths = tuple[tuple[int, ...], ...]
"""Per unit the numbers of slots that a group may be run with, ascending; that of the dense model comes on top. Unit
0 is the attention of block 0, unit l the MLP of block l - 1 and the attention of block l, unit L the last MLP:
between two reducers the number of tokens does not change."""


@dataclasses.dataclass(frozen=True)
class Deployed:
    """A model with learned thresholds, without its dead tokens.

    Attributes:
      spec: one in which LTMP is installed, in either form: removal is the same.
      lengths: see `calibrate`.
      group: images that are run together, G; 0 = the whole batch at once ("padded").
      sort_at: units before which the images of the batch are sorted by their live tokens; of no use in one group.
      dtype, attention: as of `ViT`.

    Raises:
      InputError: a spec without learned thresholds, or whose tokens are not pooled; lengths that do not fit it.
    """

    spec: ViTSpec
    lengths: Lengths
    group: int = 0
    sort_at: tuple[int, ...] = ()
    dtype: Any = jnp.float32
    attention: str = "auto"

    def __post_init__(self) -> None:
        spec = self.spec
        if not any(isinstance(reducer, ltmp.Ltmp) for _, reducer in ltmp.reducers(spec)):
            raise InputError("deployment needs a spec with learned thresholds (ltmp.install), found none")
        if spec.feature_layer is not None:
            raise InputError(f"deployment gives pooled outputs only, found feature_layer={spec.feature_layer}")
        if self.attention not in IMPLEMENTATIONS:
            raise InputError(f"attention must be one of {', '.join(IMPLEMENTATIONS)}, found {self.attention!r}")
        if len(self.lengths) != spec.depth + 1:
            units = spec.depth + 1
            raise InputError(f"lengths must hold {units} units, one more than blocks, found {len(self.lengths)}")
        for unit, known in enumerate(self.lengths):
            if list(known) != sorted(set(known)) or not all(1 <= length <= spec.tokens for length in known):
                raise InputError(f"lengths[{unit}] must ascend within 1..{spec.tokens}, found {known}")
        if self.group < 0:
            raise InputError(f"group must be 0 or more images, found {self.group}")
        if any(not 0 < unit <= spec.depth for unit in self.sort_at):
            raise InputError(f"sort_at must name units in 1..{spec.depth}, found {self.sort_at}")

    def apply(
        self, params: Params, images: Float[Array | np.ndarray, "B H W C"], *, knobs: Knobs | None = None
    ) -> tuple[Float[Array, "B K"], dict[str, Array]]:
        """Runs the model; arguments as of `ViT.apply`.

        Returns:
          y: as of `ViT.apply`.
          aux: int32 `kept [B, L]`, live tokens after each block; `slots [B, L + 1]`, what the image was run with;
            bool `overflow [B]`: it had more tokens in some block than any calibrated length there.
        """
        spec, vit = self.spec, self._vit
        params, images = jax.tree.map(jnp.asarray, (params, images))
        thresholds = method_knobs(params) | dict(knobs or {})
        batch = images.shape[0]
        group = min(self.group or batch, batch)
        missing = -batch % group  # filled up with copies of the last image, which cost little: they are one token long
        tokens = vit.embed(params, images)
        x = jnp.concatenate([tokens.x, jnp.repeat(tokens.x[-1:], missing, 0)]) if missing else tokens.x
        total = batch + missing
        live = jnp.where(jnp.arange(total) < batch, spec.tokens, max(spec.prefix, 1)).astype(jnp.int32)
        sizes = jnp.ones(x.shape[:2], jnp.float32)
        where = jnp.arange(total)
        kept: list[Array] = []
        slots: list[Array] = []
        bounds = [0, *sorted(set(self.sort_at)), spec.depth + 1]
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
            if start and total > group:
                order = jnp.argsort(live)
                x, sizes, live, where = x[order], sizes[order], live[order], where[order]
                kept, slots = [k[order] for k in kept], [s[order] for s in slots]

            def stage(state: Any, units: range = range(start, stop)) -> Any:
                return self._stage(units, params, thresholds, state)

            grouped = jax.tree.map(lambda a: a.reshape(-1, group, *a.shape[1:]), (x, sizes, live))
            if total > group:
                state, made = jax.lax.map(stage, grouped)
            else:
                state, made = jax.tree.map(lambda a: a[None], stage(jax.tree.map(lambda a: a[0], grouped)))
            (x, sizes, live), (counts, used) = jax.tree.map(lambda a: a.reshape(total, *a.shape[2:]), (state, made))
            kept.append(counts)
            slots.append(used)
        back = jnp.argsort(where)[:batch]
        alive = (jnp.arange(x.shape[1]) < live[:, None]).astype(jnp.float32)
        y, _ = vit.read(params, jax.tree.map(lambda a: a[back], Tokens(x, sizes, alive)))
        counts, used = jnp.concatenate(kept, 1)[back], jnp.concatenate(slots, 1)[back]
        return y, {"kept": counts[:, : spec.depth], "slots": used, "overflow": self._overflow(counts)}

    @property
    def _vit(self) -> ViT:
        return ltmp.vit(ltmp.consistent(self.spec), dtype=self.dtype, attention=self.attention)

    def _stage(self, units: range, params: Params, thresholds: Knobs, state: Any) -> Any:
        """Some units for one group: state `x [G, S, D]`, `size [G, S]`, `live [G]` -> state, and per image and unit the
        live tokens after it and the slots that it was run with."""
        kept, slots = [], []
        for unit in units:
            lengths = self._ways(unit)
            index = jnp.searchsorted(jnp.asarray(lengths), state[2].max())
            branches = [self._branch(unit, length, params, thresholds) for length in lengths]
            state = jax.lax.switch(index, branches, *state) if len(branches) > 1 else branches[0](*state)
            kept.append(state[2])
            slots.append(jnp.full_like(state[2], jnp.asarray(lengths)[index]))
        return state, (jnp.stack(kept, 1), jnp.stack(slots, 1))

    def _branch(self, unit: int, length: int, params: Params, thresholds: Knobs) -> Callable[..., Any]:
        """A unit at one length."""
        spec = self.spec
        last = unit == spec.depth
        # What pools the class token alone needs no others.
        slots = max(spec.prefix, 1) if last and spec.pooling == "class" else spec.tokens

        def run(x: Array, size: Array, live: Array) -> tuple[Array, Array, Array]:
            alive = (jnp.arange(length) < live[:, None]).astype(jnp.float32)
            tokens = Tokens(x[:, :length], size[:, :length], alive)
            if unit:
                tokens = self._half(unit - 1, 1, params, thresholds, tokens)
            if not last:
                tokens = self._half(unit, 0, params, thresholds, tokens)
            size, alive, _ = filled(tokens)
            return _fit(tokens.x, slots), _fit(size, slots, 1.0), alive.sum(1).astype(jnp.int32)

        return run

    def _half(self, layer: int, half: int, params: Params, thresholds: Knobs, tokens: Tokens) -> Tokens:
        """The attention and reducer of a block, or its MLP."""
        block = self._vit.blocks()[layer]
        made = halves(block)[half]
        if made is None:
            return tokens
        tokens, _ = call_module(made, params.get(block_name(layer), {}), tokens, layer_knobs(thresholds, layer))
        return tokens

    def _ways(self, unit: int) -> tuple[int, ...]:
        """The lengths of a unit, the dense one included."""
        return tuple(sorted({*self.lengths[unit], self.spec.tokens}))

    def _overflow(self, counts: Int[Array, "B U"]) -> Array:
        """Whether an image had more live tokens before some unit than its calibrated lengths hold."""
        most = [known[-1] if known else self.spec.tokens for known in self.lengths[1:]]
        return (counts[:, : self.spec.depth] > jnp.asarray(most)).any(1)


def halves(block: Block) -> tuple[Block | None, Block | None]:
    """A block as two: up to its reducer, and its MLP. The token count changes between them."""
    spec = block.spec
    if not spec.attn and not spec.ffn:
        return block, None
    first = block.clone(spec=dataclasses.replace(spec, ffn=False)) if spec.attn else None
    second = block.clone(spec=dataclasses.replace(spec, attn=False), reducer=None) if spec.ffn else None
    return first, second


def calibrate(
    counts: Int[np.ndarray, "n L"],
    spec: ViTSpec,
    *,
    batch: int,
    group: int = 0,
    lengths: int = 6,
    apart: int = 4,
    sort_at: Sequence[int] = (),
    seed: int = 0,
) -> Lengths:
    """Lengths for `Deployed`, from the live tokens of calibration images.

    Batches are drawn from the images and put into groups as the model would; the lengths of a unit are quantiles of the
    groups' longest images, the last of them the longest of all. Of two that lie closer than `apart` the longer stays:
    each is compiled.

    Args:
      counts: live tokens after each block, of n images that represent those to come (`kept` of any form).
      batch, group, sort_at: as the model will be used.
      lengths: at most how many a unit gets.
      apart: tokens, at least, between two of them.

    Raises:
      InputError: counts of another shape, or not within 1..tokens.
    """
    found = np.asarray(counts)
    if found.ndim != 2 or found.shape[1] != spec.depth or not len(found):
        raise InputError(f"counts must be [images, {spec.depth}], one per block, found {list(found.shape)}")
    if found.min() < 1 or found.max() > spec.tokens:
        raise InputError(f"counts must be in 1..{spec.tokens}, found {found.min()} to {found.max()}")
    rng = np.random.default_rng(seed)
    group = min(group or batch, batch)
    rows = np.stack([rng.integers(0, len(found), batch) for _ in range(max(64, 2048 // batch))])
    entering = np.concatenate([np.full((len(found), 1), spec.tokens), found], 1)[rows]  # [draws, batch, L + 1]
    out: list[tuple[int, ...]] = []
    for unit in range(spec.depth + 1):
        if unit in sort_at:
            order = entering[:, :, unit].argsort(1, kind="stable")
            entering = np.take_along_axis(entering, order[..., None], 1)
        groups = [entering[:, start : start + group, unit].max(1) for start in range(0, batch, group)]
        longest = np.concatenate(groups)
        wanted = np.quantile(longest, np.arange(lengths, 0, -1) / lengths, method="higher")
        chosen = [int(wanted[0])]
        for length in wanted[1:]:
            if chosen[-1] - length >= apart:
                chosen.append(int(length))
        out.append(tuple(reversed(chosen)))
    return tuple(out)


def evenly(depth: int, count: int) -> tuple[int, ...]:
    """`count` units, evenly spread over a model of `depth` blocks, before which images may be sorted."""
    return tuple(sorted({round((i + 1) * depth / (count + 1)) for i in range(count)} - {0}))


def fixed(spec: ViTSpec, merged: Real[np.ndarray, "n L"], pruned: Real[np.ndarray, "n L"]) -> ViTSpec:
    """The fixed-count form, a method of its own: every image loses as many tokens as calibration images did on average.

    It is the fastest, and no longer adapts to the image. Its model is `ltmp.vit(spec)`, its parameters are those of the
    dense model.

    Args:
      spec: one in which LTMP is installed.
      merged, pruned: tokens per calibration image and block.
    """
    made = {layer: reducer for layer, reducer in ltmp.reducers(spec) if isinstance(reducer, ltmp.Ltmp)}
    if not made:
        raise InputError("the fixed form needs a spec with learned thresholds (ltmp.install), found none")
    first = next(iter(made.values()))
    variant = {"ltmp": "merge_prune", "ltm": "merge", "ltp": "prune", "ltpm": "prune_merge"}[first.variant]
    # Rounded so that the running totals, not only the single counts, are right.
    totals = [np.rint(np.cumsum(np.asarray(counts, float).mean(0))).astype(int) for counts in (merged, pruned)]
    steps = [np.diff(total, prepend=0) for total in totals]
    rates = {layer: (int(steps[0][layer]), int(steps[1][layer])) for layer in made}
    rates = {layer: rate for layer, rate in rates.items() if any(rate)}
    bare = spec.edit(blocks=lambda _, block: dataclasses.replace(block, reduce=None))
    return ltmp.install_fixed(bare, variant, rates, similarity=first.similarity)


def _fit(x: Array, slots: int, fill: float = 0.0) -> Array:
    """The second axis cut or filled up to `slots`."""
    missing = slots - x.shape[1]
    if missing <= 0:
        return x[:, :slots]
    return jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
