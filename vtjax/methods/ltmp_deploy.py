# SPDX-License-Identifier: Apache-2.0
"""LTMP as it is deployed: dead tokens are gone and time is saved, for every image, at any batch size, under jit.

The number of live tokens depends on image and block, and XLA wants static shapes. The images of a batch run together,
through all blocks, their live tokens one after the other ("packed"): the MLP runs on these, whose sum varies less than
the longest image. For attention the images are sorted by their live tokens before every block, and cut into groups of
alike ones, each padded to its longest image. Each group and each MLP has a few sizes, calibrated on data, and takes the
least that suffices (`lax.switch`). Nothing is ever cut off: where something is longer than its largest size, the images
that ran together run again through the masked model, which computes the same, and are counted. Which images share a
batch or a group decides about speed alone.

    sizes = calibrate(counts, ...)              # live tokens of other images
    model = Deployed(spec, sizes, groups=4)
    y, aux = jax.jit(model.apply)(params, images)

Letters: B batch, T images that run together, G images of a group, L layers, N tokens of the dense model, K slots of
attention, P packed tokens, R rows of the MLP, D width.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from vtjax.errors import InputError
from vtjax.methods import ltmp
from vtjax.models.layers import Block, Knobs
from vtjax.models.segments import block_name, call_module, check_knobs, layer_knobs, method_knobs
from vtjax.models.vit import Params, ViT
from vtjax.ops.attention import IMPLEMENTATIONS, removed
from vtjax.ops.token_reduction import filled
from vtjax.ops.tokens import Tokens
from vtjax.spec import ViTSpec

Choices = tuple[int, ...]
"""Sizes that a group, or an MLP, may be run with, ascending; () = that of the dense model."""


class Sizes(NamedTuple):
    """What a deployed model is compiled for; see `calibrate`.

    Attributes:
      slots: per block and group, from the shortest images to the longest, choices of K: live tokens that an image of
        the group may bring. Where there are other numbers of groups, each has all of a block's choices.
      rows: per block choices of R, for its MLP: live tokens that all images together may have after the reducer.
      images: that run together, for which the rows are meant; for others they are scaled. 0 = as they are. Fewer images
        than these differ more, so that they overflow more often.
    """

    slots: tuple[tuple[Choices, ...], ...]
    rows: tuple[Choices, ...]
    images: int = 0


class Packed(NamedTuple):
    """The live tokens of images, one after the other; what comes after them means nothing."""

    x: Float[Array, "P D"]
    size: Float[Array, " P"]
    start: Int[Array, " T"]
    live: Int[Array, " T"]


class Padded(NamedTuple):
    """The same, every image in slots of its own, the live ones in front."""

    x: Float[Array, "G K D"]
    size: Float[Array, "G K"]
    live: Int[Array, " G"]


@dataclasses.dataclass(frozen=True)
class Deployed:
    """A model with learned thresholds, without its dead tokens.

    Attributes:
      spec: one in which LTMP is installed, in either form: removal is the same.
      sizes: see `calibrate`.
      groups: of attention, at most; one image or more each.
      together: images that run together, T; larger batches run part by part. 0 = the whole batch.
      dtype, attention: as of `ViT`.

    Raises:
      InputError: a spec without learned thresholds, or whose tokens are not pooled; sizes that do not fit it.
    """

    spec: ViTSpec
    sizes: Sizes
    groups: int = 1
    together: int = 0
    dtype: Any = jnp.float32
    attention: str = "auto"

    def __post_init__(self) -> None:
        spec = self.spec
        found = dict(ltmp.reducers(spec))
        if not found:
            raise InputError("deployment needs a spec with learned thresholds (ltmp.install), found none")
        for layer, block in enumerate(spec.blocks):
            if block.reduce is not None and not isinstance(found.get(layer), ltmp.Ltmp):
                raise InputError(f"blocks[{layer}].reduce must be of learned thresholds, found {block.reduce!r}")
        if spec.feature_layer is not None:
            raise InputError(f"deployment gives pooled outputs only, found feature_layer={spec.feature_layer}")
        if self.attention not in IMPLEMENTATIONS:
            raise InputError(f"attention must be one of {', '.join(IMPLEMENTATIONS)}, found {self.attention!r}")
        for name, count in (("slots", len(self.sizes.slots)), ("rows", len(self.sizes.rows))):
            if count != spec.depth:
                raise InputError(f"sizes.{name} must hold {spec.depth} blocks, found {count}")
        of_groups = [(f"slots[{layer}]", known) for layer, block in enumerate(self.sizes.slots) for known in block]
        of_mlps = [(f"rows[{layer}]", known) for layer, known in enumerate(self.sizes.rows)]
        for name, known in (*of_groups, *of_mlps):
            if list(known) != sorted(set(known)) or not all(size >= 1 for size in known):
                raise InputError(f"sizes.{name} must ascend from 1 or more, found {known}")
        least = ltmp.protected(spec)
        for name, known in of_groups:
            if known and not least <= known[0] <= known[-1] <= spec.tokens:
                limits = f"{least}..{spec.tokens} tokens, of which {least} always stay"
                raise InputError(f"sizes.{name} must be in {limits}, found {known}")
        if self.groups < 1:
            raise InputError(f"groups must be 1 or more, found {self.groups}")
        if self.together < 0:
            raise InputError(f"together must be 0 or more images, found {self.together}")

    def apply(
        self, params: Params, images: Float[Array | np.ndarray, "B H W C"], *, knobs: Knobs | None = None
    ) -> tuple[Float[Array, "B K"], dict[str, Array]]:
        """Runs the model; arguments as of `ViT.apply`.

        Returns:
          y: as of `ViT.apply`.
          aux: `kept [B, L]` int32, live tokens after each block; `slots [B, L]` int32 and `rows [B, L]` float32, what
            the image was run with: K, and its share R / T; `overflow [B]` bool: the image, or one that it ran together
            with, was longer than the sizes allow, so that it ran again, through the masked model.
        """
        self._vit.check_images(images)
        if not len(images):
            raise InputError("images must be at least one, found none")
        params, images = jax.tree.map(jnp.asarray, params), jnp.asarray(images)
        thresholds = method_knobs(params) | dict(knobs or {})
        check_knobs(thresholds, self.spec.depth)
        batch = images.shape[0]
        together = min(self.together or batch, batch)
        # Filled up with copies of the last image, which are short after the first block's attention.
        missing = -batch % together
        if missing:
            images = jnp.concatenate([images, jnp.repeat(images[-1:], missing, 0)])
        counts = jnp.arange(batch + missing) < batch
        run = functools.partial(self._run, params, thresholds)
        if batch == together:
            return run((images, counts))
        parts = jax.tree.map(lambda a: a.reshape(-1, together, *a.shape[1:]), (images, counts))
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:batch], jax.lax.map(run, parts))

    @property
    def _vit(self) -> ViT:
        return ltmp.vit(ltmp.consistent(self.spec), dtype=self.dtype, attention=without_gradient(self.attention))

    def _run(self, params: Params, thresholds: Knobs, given: tuple[Array, Array]) -> tuple[Array, dict[str, Array]]:
        """Images `[T, H, W, C]` that run together, of which those count that `[T]` says; the result of `apply`."""
        images, counts = given
        spec, vit, together = self.spec, self._vit, images.shape[0]
        x = vit.embed(params, images).x
        state = Packed(
            x.reshape(-1, x.shape[-1]),
            jnp.ones(together * spec.tokens, jnp.float32),
            jnp.arange(together, dtype=jnp.int32) * spec.tokens,
            jnp.where(counts, spec.tokens, ltmp.protected(spec)).astype(jnp.int32),
        )
        told: dict[str, list[Array]] = {"kept": [], "slots": [], "rows": []}
        checks: list[Array] = []  # of what is longer than its largest size; none where that is the dense one
        parts, most = groups_of(together, self.groups), spec.tokens
        for layer, block in enumerate(vit.blocks()):
            first, second = halves(block)
            p, knobs = params.get(block_name(layer), {}), layer_knobs(thresholds, layer)
            order = jnp.argsort(state.live) if len(parts) > 1 and layer else jnp.arange(together, dtype=jnp.int32)
            choices, done, slots = self._slots(layer, len(parts)), [], []
            most = max(known[-1] for known in choices)
            for known, part in zip(choices, parts, strict=True):
                some = state._replace(start=state.start[order[part]], live=state.live[order[part]])
                attend = functools.partial(_attend, first, p, knobs, known[-1])
                longest = some.live.max()
                if known[-1] < spec.tokens:
                    checks.append(longest > known[-1])
                size, padded = least(known, longest, attend, *some)
                done.append(padded)
                slots.append(jnp.broadcast_to(size, padded.live.shape))
            state = _flat(done)
            known = self._rows(layer, together)
            if known[-1] < together * spec.tokens:
                checks.append(state.live.sum() > known[-1])
            size, state = least(known, state.live.sum(), functools.partial(_mlp, second, p, knobs, known[-1]), *state)
            rows = jnp.broadcast_to(size / together, (together,))
            # In the order of the images again.
            values = (state.start, state.live, jnp.concatenate(slots), rows)
            start, live, *used = (jnp.zeros_like(a).at[order].set(a, unique_indices=True) for a in values)
            state = state._replace(start=start, live=live)
            for name, value in zip(told, (live, *used), strict=True):
                told[name].append(value)
        y, _ = vit.read(params, _alone(_padded(state, most)))
        aux = {name: jnp.stack(values, 1) for name, values in told.items()}

        def slowly() -> tuple[Array, dict[str, Array]]:
            y, made = vit.apply(params, images, knobs=thresholds)
            kept = jnp.round(ltmp.alive_fractions(made, spec.tokens).T * spec.tokens).astype(jnp.int32)
            return y, {**aux, "kept": kept}

        overflow = jnp.stack(checks).any() if checks else jnp.bool_(False)
        if checks:
            y, aux = jax.lax.cond(overflow, slowly, lambda: (y, aux))
        return y, {**aux, "overflow": jnp.broadcast_to(overflow, (together,))}

    def _slots(self, layer: int, groups: int) -> tuple[Choices, ...]:
        """Choices of each group."""
        known = tuple(choices or (self.spec.tokens,) for choices in self.sizes.slots[layer])
        if len(known) != groups:
            known = (tuple(sorted(set(itertools.chain(*known)))),) * groups
        return known

    def _rows(self, layer: int, together: int) -> Choices:
        """Choices of an MLP, for so many images."""
        dense, of = together * self.spec.tokens, self.sizes.images or together
        scaled = {min(-(-size * together // of), dense) for size in self.sizes.rows[layer]}
        return tuple(sorted(scaled)) or (dense,)


def groups_of(images: int, groups: int) -> list[slice]:
    """So many images as equal groups, not more than asked for."""
    length = -(-images // min(groups, images))
    return [slice(start, min(start + length, images)) for start in range(0, images, length)]


def least(known: Choices, needed: Array, run: Callable[..., Any], *state: Any) -> tuple[Array, Any]:
    """`run(size, *state)` with the least size that holds what is needed, else the largest; the size, and the result."""
    branches = [functools.partial(run, size) for size in known]
    if len(branches) == 1:
        return jnp.int32(known[0]), branches[0](*state)
    index = (jnp.asarray(known[:-1]) < needed).sum()  # not searchsorted, which is a loop
    return jnp.asarray(known)[index], jax.lax.switch(index, branches, *state)


def _padded(state: Packed, slots: int) -> Padded:
    """Every image's tokens in so many slots; what lies beyond its own is its neighbours'."""
    index = state.start[:, None] + jnp.arange(slots)
    x = jnp.take(state.x, index, axis=0, mode="clip")
    return Padded(x, jnp.take(state.size, index, mode="clip"), state.live)


def _alone(padded: Padded) -> Tokens:
    """Every image's tokens without its neighbours', which may be NaN."""
    live = jnp.arange(padded.size.shape[1]) < padded.live[:, None]
    x, size = jnp.where(live[..., None], padded.x, 0), jnp.where(live, padded.size, 1)
    return Tokens(x, size, live.astype(jnp.float32))


def _attend(block: Block | None, params: Any, knobs: Knobs, most: int, length: int, *state: Array) -> Padded:
    """Attention and reducer of a block at `length` slots per image; the result in `most`."""
    given = _padded(Packed(*state), length)
    if block is None:
        return Padded(_fit(given.x, most), _fit(given.size, most, 1.0), given.live)
    tokens, _ = call_module(block, params, _alone(given), knobs)
    size, alive, _ = filled(tokens)
    # An image whose scores are NaN keeps as many as are protected, and so its NaN to itself.
    kept = jnp.maximum((alive > 0.5).sum(1), ltmp.protected(block.family)).astype(jnp.int32)
    return Padded(_fit(tokens.x, most), _fit(size, most, 1.0), kept)


def _flat(groups: Sequence[Padded]) -> Packed:
    """Groups as they lie: images start where their slots do."""
    starts, base = [], 0
    for group in groups:
        images, slots = group.size.shape
        starts.append(base + slots * np.arange(images, dtype=np.int32))
        base += images * slots
    x = jnp.concatenate([group.x.reshape(-1, group.x.shape[-1]) for group in groups])
    size = jnp.concatenate([group.size.reshape(-1) for group in groups])
    return Packed(x, size, jnp.asarray(np.concatenate(starts)), jnp.concatenate([group.live for group in groups]))


def _mlp(block: Block | None, params: Any, knobs: Knobs, most: int, rows: int, *state: Array) -> Packed:
    """The MLP of a block on the live tokens of all images, `rows` of them with what fills up; the result in `most`."""
    given = Packed(*state)
    ends = jnp.cumsum(given.live)
    starts = ends - given.live
    row = jnp.arange(rows)
    image = jnp.minimum((row[:, None] >= ends[None]).sum(1), len(ends) - 1)
    index = given.start[image] + row - starts[image]
    x = jnp.take(given.x, index, axis=0, mode="clip")
    size = jnp.take(given.size, index, mode="clip")
    if block is not None:
        tokens, _ = call_module(block, params, Tokens(x[None]), knobs)
        x = tokens.x[0]
    return Packed(_fit(x, most, axis=0), _fit(size, most, 1.0, axis=0), starts.astype(jnp.int32), given.live)


def without_gradient(attention: str) -> Any:
    """The attention implementation of a deployed model: `removed` where a config leaves the choice."""
    return removed if attention in ("auto", "xla") else attention


def halves(block: Block) -> tuple[Block | None, Block | None]:
    """A block as two: up to its reducer, and its MLP. The token count changes between them."""
    spec = block.spec
    if not spec.attn and not spec.ffn:
        return block, None
    first = block.clone(spec=dataclasses.replace(spec, ffn=False)) if spec.attn else None
    second = block.clone(spec=dataclasses.replace(spec, attn=False), reducer=None) if spec.ffn else None
    return first, second


def calibrate(
    counts: Real[np.ndarray, "n L"],
    spec: ViTSpec,
    *,
    batch: int,
    groups: int = 1,
    together: int = 0,
    choices: int = 3,
    spare: float = 0.1,
    seed: int = 0,
) -> Sizes:
    """Sizes for `Deployed`, from the live tokens of calibration images.

    Batches are drawn from the images, sorted and put into groups as the model would. The sizes of a block are quantiles
    of the groups' longest images (slots) and of the sums (rows), the largest that occurred, and one more that is larger
    by `spare`, for images that differ from these. Of two that lie closer than 1 / 50 of the dense size the larger
    stays: each is compiled.

    Args:
      counts: live tokens after each block, of n images that represent those to come (`kept` of any form).
      batch, groups, together: as the model will be used.
      choices: at most how many sizes a group gets, and an MLP, beside the spare one; 0 = the dense size alone.
      spare: a share of the largest size of a group, half of it for an MLP; it also lets every image be a token longer.
        Below 0 there is none.

    Raises:
      InputError: counts of another shape, or not within 1..tokens; numbers that no deployment has.
    """
    found, least = _per_image("counts", counts, spec), ltmp.protected(spec)
    if found.min() < least or found.max() > spec.tokens:
        raise InputError(f"counts must be in {least}..{spec.tokens}, found {found.min():g} to {found.max():g}")
    found = found.astype(int)
    for name, value, lowest in (("batch", batch, 1), ("groups", groups, 1), ("together", together, 0)):
        if value < lowest:
            raise InputError(f"{name} must be {lowest} or more, found {value}")
    if choices < 0 or not math.isfinite(spare):
        raise InputError(f"choices must be 0 or more and spare finite, found {choices} and {spare}")
    rng = np.random.default_rng(seed)
    together = min(together or batch, batch)
    drawn = np.stack([rng.integers(0, len(found), together) for _ in range(max(64, 2048 // together))])
    entering = np.concatenate([np.full((len(found), 1), spec.tokens), found], 1)[drawn]  # [draws, T, L + 1]
    slots, rows = [], []
    for layer in range(spec.depth):
        lengths = np.sort(entering[:, :, layer], 1)
        longest = [lengths[:, part].max(1) for part in groups_of(together, groups)]
        slots.append(tuple(_quantiles(needed, choices, spare, 1, spec.tokens) for needed in longest))
        sums = entering[:, :, layer + 1].sum(1)
        rows.append(_quantiles(sums, choices, spare / 2, together, together * spec.tokens))
    return Sizes(tuple(slots), tuple(rows), together)


def _per_image(name: str, counts: Any, spec: ViTSpec) -> np.ndarray:
    """`counts` as float64 `[n, L]`, finite and of an image at least."""
    found = np.asarray(counts, float)
    if found.ndim != 2 or found.shape[1] != spec.depth or not len(found):
        raise InputError(f"{name} must be [images, {spec.depth}], one per block, found {list(found.shape)}")
    if not np.isfinite(found).all() or found.min() < 0:
        raise InputError(f"{name} must be finite and 0 or more, found others")
    return found


def _quantiles(needed: np.ndarray, choices: int, spare: float, more: int, dense: int) -> Choices:
    """At most so many sizes that cover what is needed, and a spare one."""
    chosen: list[int] = []
    wanted = list(np.quantile(needed, np.arange(choices, 0, -1) / max(choices, 1), method="higher"))
    if choices and spare >= 0:
        wanted.insert(0, math.ceil(wanted[0] * (1 + spare)) + more)
    for size in (min(int(size), dense) for size in wanted):
        size = dense if size > dense * 0.98 else size
        if not chosen or chosen[-1] - size >= dense / 50:
            chosen.append(size)
    return tuple(reversed(chosen))


def fixed(spec: ViTSpec, merged: Real[np.ndarray, "n L"], pruned: Real[np.ndarray, "n L"]) -> ViTSpec:
    """The fixed-count form, a method of its own: every image loses as many tokens as calibration images did on average.

    It is the fastest, and no longer adapts to the image. Its model is `ltmp.vit(spec)`, its parameters are those of the
    dense model. No more than half of the patch tokens can leave in one step; what is left over leaves in later blocks.

    Args:
      spec: one in which LTMP is installed.
      merged, pruned: tokens per calibration image and block.

    Raises:
      InputError: a spec without learned thresholds, or counts of another shape.
    """
    made = {layer: reducer for layer, reducer in ltmp.reducers(spec) if isinstance(reducer, ltmp.Ltmp)}
    if not made:
        raise InputError("the fixed form needs a spec with learned thresholds (ltmp.install), found none")
    first = next(iter(made.values()))
    variant = {"ltmp": "merge_prune", "ltm": "merge", "ltp": "prune", "ltpm": "prune_merge"}[first.variant]
    # The running totals, not only the single counts, are to be right.
    wanted = {
        name: np.rint(np.cumsum(_per_image(name, counts, spec).mean(0))).astype(int)
        for name, counts in (("merged", merged), ("pruned", pruned))
    }
    done, left, rates = dict.fromkeys(wanted, 0), spec.tokens, {}
    for layer in made:
        step = {}
        for name in reversed(wanted) if variant == "prune_merge" else wanted:
            step[name] = min(int(wanted[name][layer]) - done[name], (left - spec.prefix) // 2)
            done[name] += step[name]
            left -= step[name]
        rates[layer] = step["merged"], step["pruned"]
    rates = {layer: rate for layer, rate in rates.items() if any(rate)}
    return ltmp.install_fixed(spec.unreduced(), variant, rates, similarity=first.similarity)


def _fit(x: Array, length: int, fill: float = 0.0, axis: int = 1) -> Array:
    """An axis cut or filled up to `length`."""
    missing = length - x.shape[axis]
    if missing <= 0:
        return jax.lax.slice_in_dim(x, 0, length, axis=axis)
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)], constant_values=fill)
