# SPDX-License-Identifier: Apache-2.0
"""LTMP as it is deployed: dead tokens are gone and time is saved, for every image, at any batch size, under jit.

The number of live tokens depends on image and block, and XLA wants static shapes. Images are run in small groups, each
through all blocks. Attention is padded to the longest image of its group, the MLP runs on the concatenated live tokens
of the group ("packed": their sum varies less than the longest). Each block has a few sizes for both, calibrated on
data, and takes the least that suffices (`lax.switch`). The last one is always that of the dense model, so that nothing
is ever cut off: what is longer than any calibrated size takes a slower path, is counted, and gets the same result.
Before some blocks the images are sorted by their live tokens, so that a group holds alike ones. Which images share a
batch or a group decides about speed alone.

    sizes = calibrate(counts, ...)              # live tokens of other images
    model = Deployed(spec, sizes, group=8, sort_at=(3, 6, 9))
    y, aux = jax.jit(model.apply)(params, images)

Letters: B batch, G images of a group, L layers, N tokens of the dense model, K slots of attention, R rows of the MLP,
D width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from vtjax.errors import InputError
from vtjax.methods import ltmp
from vtjax.models.layers import Block, Knobs
from vtjax.models.segments import block_name, call_module, check_knobs, layer_knobs
from vtjax.models.vit import Params, ViT, method_knobs
from vtjax.ops.attention import IMPLEMENTATIONS, removed
from vtjax.ops.token_reduction import filled
from vtjax.ops.tokens import Tokens
from vtjax.spec import ViTSpec

Choices = tuple[tuple[int, ...], ...]
"""Per block the sizes that a group may be run with, ascending; that of the dense model comes on top."""


class Sizes(NamedTuple):
    """What a deployed model is compiled for; see `calibrate`.

    Attributes:
      slots: K, for the attention of each block: at least the live tokens that any image of the group brings.
      rows: R, for the MLP of each block: at least the live tokens that the group has after the reducer.
    """

    slots: Choices
    rows: Choices


@dataclasses.dataclass(frozen=True)
class Deployed:
    """A model with learned thresholds, without its dead tokens.

    Attributes:
      spec: one in which LTMP is installed, in either form: removal is the same.
      sizes: see `calibrate`.
      group: images that are run together, G; 0 = the whole batch at once.
      sort_at: blocks before which the images of the batch are sorted by their live tokens; of no use in one group.
      dtype, attention: as of `ViT`.

    Raises:
      InputError: a spec without learned thresholds, or whose tokens are not pooled; sizes that do not fit it.
    """

    spec: ViTSpec
    sizes: Sizes
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
        for name, choices in self.sizes._asdict().items():
            if len(choices) != spec.depth:
                raise InputError(f"sizes.{name} must hold {spec.depth} blocks, found {len(choices)}")
            for layer, known in enumerate(choices):
                if list(known) != sorted(set(known)) or not all(size >= 1 for size in known):
                    raise InputError(f"sizes.{name}[{layer}] must ascend from 1 or more, found {known}")
                if name == "slots" and known and known[-1] > spec.tokens:
                    raise InputError(f"sizes.slots[{layer}] must be at most {spec.tokens} tokens, found {known}")
        if self.group < 0:
            raise InputError(f"group must be 0 or more images, found {self.group}")
        if any(not 0 < layer < spec.depth for layer in self.sort_at):
            raise InputError(f"sort_at must name blocks in 1..{spec.depth - 1}, found {self.sort_at}")

    def apply(
        self, params: Params, images: Float[Array | np.ndarray, "B H W C"], *, knobs: Knobs | None = None
    ) -> tuple[Float[Array, "B K"], dict[str, Array]]:
        """Runs the model; arguments as of `ViT.apply`.

        Returns:
          y: as of `ViT.apply`.
          aux: `kept [B, L]` int32, live tokens after each block; `slots [B, L]` int32 and `rows [B, L]` float32, what
            the image was run with: K, and its share R / G; `overflow [B]` bool: in some block it or its group had more
            live tokens than any calibrated size there.
        """
        spec, vit = self.spec, self._vit
        vit.check_images(images)
        if not len(images):
            raise InputError("images must be at least one, found none")
        params, images = jax.tree.map(jnp.asarray, (params, images))
        thresholds = method_knobs(params) | dict(knobs or {})
        check_knobs(thresholds, spec.depth)
        batch = images.shape[0]
        group = min(self.group or batch, batch)
        missing = -batch % group  # filled up with copies of the last image, which cost little: they are one token long
        tokens = vit.embed(params, images)
        x = jnp.concatenate([tokens.x, jnp.repeat(tokens.x[-1:], missing, 0)]) if missing else tokens.x
        total = batch + missing
        live = jnp.where(jnp.arange(total) < batch, spec.tokens, max(spec.prefix, 1)).astype(jnp.int32)
        sizes = jnp.ones(x.shape[:2], jnp.float32)
        where = jnp.arange(total)
        made: list[Any] = []
        bounds = [0, *sorted(set(self.sort_at)), spec.depth]
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
            if start and total > group:
                order = jnp.argsort(live)
                x, sizes, live, where = x[order], sizes[order], live[order], where[order]
                made = jax.tree.map(lambda a, order=order: a[order], made)

            def stage(state: Any, layers: range = range(start, stop)) -> Any:
                return self._stage(layers, params, thresholds, state)

            grouped = jax.tree.map(lambda a: a.reshape(-1, group, *a.shape[1:]), (x, sizes, live))
            if total > group:
                result = jax.lax.map(stage, grouped)
            else:
                result = jax.tree.map(lambda a: a[None], stage(jax.tree.map(lambda a: a[0], grouped)))
            (x, sizes, live), told = jax.tree.map(lambda a: a.reshape(total, *a.shape[2:]), result)
            made.append(told)
        back = jnp.argsort(where)[:batch]
        alive = (jnp.arange(x.shape[1]) < live[:, None]).astype(jnp.float32)
        y, _ = vit.read(params, jax.tree.map(lambda a: a[back], Tokens(x, sizes, alive)))
        aux = {name: jnp.concatenate([told[name] for told in made], 1)[back] for name in made[0]}
        return y, {**aux, "overflow": aux["overflow"].any(1)}

    @property
    def _vit(self) -> ViT:
        return ltmp.vit(ltmp.consistent(self.spec), dtype=self.dtype, attention=without_gradient(self.attention))

    def _stage(self, layers: range, params: Params, thresholds: Knobs, state: Any) -> Any:
        """Some blocks for one group: state `x [G, N, D]`, `size [G, N]`, `live [G]` -> state, and what `apply` tells of
        every image, `[G, blocks]`."""
        told: dict[str, list[Array]] = {name: [] for name in ("kept", "slots", "rows", "overflow")}
        group, tokens = state[2].shape[0], self.spec.tokens
        blocks = self._vit.blocks()
        for layer in layers:
            first, second = halves(blocks[layer])
            p, knobs = params.get(block_name(layer), {}), layer_knobs(thresholds, layer)
            known, dense = self.sizes.slots[layer], tokens
            over = state[2] > _last(known, dense)
            attend = functools.partial(_attend, first, p, knobs)
            slots, state = _least((*known, dense), state[2].max(), attend, state)
            known, dense = self.sizes.rows[layer], group * tokens
            over |= state[2].sum() > _last(known, dense)
            known = tuple(size for size in known if size < dense)  # those of a larger group hold any of a smaller one
            rows, state = _least((*known, dense), state[2].sum(), functools.partial(_mlp, second, p, knobs), state)
            values = {"kept": state[2], "slots": slots, "rows": rows / group, "overflow": over}
            for name, value in values.items():
                told[name].append(jnp.broadcast_to(value, (group,)))
        return state, {name: jnp.stack(values, 1) for name, values in told.items()}


State = tuple[Float[Array, "G N D"], Float[Array, "G N"], Int[Array, " G"]]


def _least(sizes: tuple[int, ...], needed: Array, run: Callable[..., State], state: State) -> tuple[Array, State]:
    """`run(size, *state)` with the least size that holds what is needed; the size, and the result."""
    known = tuple(sorted(set(sizes)))
    index = (jnp.asarray(known) < needed).sum()  # not searchsorted, which is a loop
    branches = [functools.partial(run, size) for size in known]
    result = jax.lax.switch(index, branches, *state) if len(branches) > 1 else branches[0](*state)
    return jnp.asarray(known)[index], result


def _last(known: tuple[int, ...], dense: int) -> int:
    return known[-1] if known else dense


def _attend(block: Block | None, params: Any, knobs: Knobs, length: int, x: Array, size: Array, live: Array) -> State:
    """Attention and reducer of a block at `length` slots per image."""
    if block is None:
        return x, size, live
    alive = (jnp.arange(length) < live[:, None]).astype(jnp.float32)
    tokens, _ = call_module(block, params, Tokens(x[:, :length], size[:, :length], alive), knobs)
    new_size, alive, _ = filled(tokens)
    slots = x.shape[1]
    # An image whose scores are NaN keeps its prefix, and so its NaN to itself.
    kept = jnp.maximum((alive > 0.5).sum(1), max(block.family.prefix, 1))
    return _fit(tokens.x, slots), _fit(new_size, slots, 1.0), kept.astype(jnp.int32)


def _mlp(block: Block | None, params: Any, knobs: Knobs, rows: int, x: Array, size: Array, live: Array) -> State:
    """The MLP of a block on the live tokens of all images, one after the other, `rows` of them with what fills up."""
    if block is None:
        return x, size, live
    group, slots, width = x.shape
    ends = jnp.cumsum(live)
    row = jnp.arange(rows)
    image = jnp.minimum((row[:, None] >= ends[None]).sum(1), group - 1)
    slot = jnp.minimum(row - (ends - live)[image], slots - 1)
    packed = jnp.take(x.reshape(-1, width), image * slots + slot, axis=0, mode="clip")
    tokens, _ = call_module(block, params, Tokens(packed[None]), knobs)
    source = jnp.minimum((ends - live)[:, None] + jnp.arange(slots), rows - 1)
    unpacked = jnp.take(tokens.x[0], source, axis=0, mode="clip")
    # Zeros in dead slots, not another image's tokens: these may be NaN.
    return jnp.where((jnp.arange(slots) < live[:, None])[..., None], unpacked, 0), size, live


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
    counts: Int[np.ndarray, "n L"],
    spec: ViTSpec,
    *,
    batch: int,
    group: int = 0,
    choices: int = 6,
    sort_at: Sequence[int] = (),
    seed: int = 0,
) -> Sizes:
    """Sizes for `Deployed`, from the live tokens of calibration images.

    Batches are drawn from the images and put into groups as the model would. The sizes of a block are quantiles of the
    groups' longest images (slots) and of their sums (rows), the largest that occurred among them. Of two that lie
    closer than 1 / 50 of the dense size the larger stays: each is compiled.

    Args:
      counts: live tokens after each block, of n images that represent those to come (`kept` of any form).
      batch, group, sort_at: as the model will be used.
      choices: at most how many sizes a block gets for its attention, and for its MLP; 0 = the dense size alone.

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
    drawn = np.stack([rng.integers(0, len(found), batch) for _ in range(max(64, 2048 // batch))])
    entering = np.concatenate([np.full((len(found), 1), spec.tokens), found], 1)[drawn]  # [draws, batch, L + 1]
    slots, rows = [], []
    for layer in range(spec.depth):
        if layer in sort_at:
            order = entering[:, :, layer].argsort(1, kind="stable")
            entering = np.take_along_axis(entering, order[..., None], 1)
        groups = [entering[:, start : start + group] for start in range(0, batch, group)]
        slots.append(_quantiles(np.concatenate([g[:, :, layer].max(1) for g in groups]), choices, spec.tokens))
        dense = group * spec.tokens
        rows.append(_quantiles(np.concatenate([g[:, :, layer + 1].sum(1) for g in groups]), choices, dense))
    return Sizes(tuple(slots), tuple(rows))


def _quantiles(needed: np.ndarray, choices: int, dense: int) -> tuple[int, ...]:
    """At most so many sizes that cover what is needed."""
    chosen: list[int] = []
    for size in np.quantile(needed, np.arange(choices, 0, -1) / max(choices, 1), method="higher"):
        if not chosen or chosen[-1] - size >= dense / 50:
            chosen.append(int(size))
    return tuple(reversed(chosen))


def evenly(depth: int, count: int) -> tuple[int, ...]:
    """`count` blocks, evenly spread over a model of `depth`, before which images may be sorted."""
    spread = {round((i + 1) * depth / (count + 1)) for i in range(count)}
    return tuple(sorted(spread & set(range(1, depth))))


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
    return ltmp.install_fixed(spec.unreduced(), variant, rates, similarity=first.similarity)


def _fit(x: Array, slots: int, fill: float = 0.0) -> Array:
    """The second axis cut or filled up to `slots`."""
    missing = slots - x.shape[1]
    if missing <= 0:
        return x[:, :slots]
    return jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
