# SPDX-License-Identifier: Apache-2.0
"""A model whose text reads its images, as it is deployed: visual tokens that LTMP and DPN drop are gone, on one device.

The text keeps its length, what it reads shrinks. The tower's slots are cut off behind the longest image (live tokens
are in front), and the text reads what the images of its row have left, one after the other, in the least of a few sizes
that holds the longest row (`lax.switch`): calibrated ones before the first stage of DPN, those of its grids after every
stage. Layers that DAS took out are there in no form. Nothing that lives is ever cut off: where an image has more tokens
than its room, the batch runs again through the masked model, which computes the same, and says so.

    rooms = calibrate(model, params, images)                    # of other images
    logits, told = jax.jit(Crossed(model, rooms).apply)(params, input_ids, images, slots=slots)

Letters: B rows, I images of a row, N tokens of the text, M visual tokens, S stages of DPN, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vtjax.errors import InputError
from vtjax.methods import das, dpn, dpn_deploy, ltmp
from vtjax.methods.ltmp_deploy import least
from vtjax.models import segments
from vtjax.models.layers import Knobs
from vtjax.models.vlm import VLM
from vtjax.ops import cross_attention
from vtjax.ops.cross_attention import Memory
from vtjax.ops.tokens import Tokens, to_front


class Rooms(NamedTuple):
    """What a deployed model is compiled for; see `calibrate`.

    Attributes:
      tower: slots that are left of an image after each of the tower's learned reducers.
      read: ascending choices of M before the first stage, for all images of a row; where none suffices, all slots are
        read.
    """

    tower: tuple[int, ...] = ()
    read: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Cut(ltmp.Ltmp):
    """`ltmp.Ltmp` in the consistent form, whose slots from `room` on are gone. Where more tokens live
    (`decisions["kept"]`), the rest of the model means nothing."""

    room: int = 0

    def __call__(self, tokens: Tokens, aux: Mapping[str, Array], knobs: Mapping[str, Array]) -> tuple[Tokens, dict]:
        tokens, decisions = super().__call__(tokens, aux, knobs)
        x, size, alive = (None if a is None else a[:, : self.room] for a in (tokens.x, tokens.size, tokens.alive))
        return tokens.replace(x=x, size=size, alive=alive), decisions


@dataclasses.dataclass(frozen=True)
class Crossed:
    """A multimodal model of cross-attention without its dropped visual tokens.

    Attributes:
      model: of `methods.build`, whose spec brings reducers and routers; any of them may be missing.
      rooms: see `calibrate`.

    Raises:
      InputError: visual tokens that stand in the text (`dpn_deploy` has their form); attention over several devices; a
        search of DAS that is not over; LTMP in the faithful form; rooms that do not fit the tower.
    """

    model: VLM
    rooms: Rooms = Rooms()

    def __post_init__(self) -> None:
        model, spec = self.model, self.model.spec
        if spec.bridge.cross is None:
            raise InputError("this deployment takes a bridge of cross-attention, found visual tokens in the text")
        if model.attend is not cross_attention.attend:
            raise InputError("this deployment runs on one device, found attention that is distributed")
        if das.is_installed(spec.decoder) and das.installed(spec.decoder)[1]:
            raise InputError("this deployment takes a model whose layers are gone (das.remove), found one in a search")
        learned = learned_reducers(model)
        if faithful := [layer for layer, reducer in learned if reducer.form != "consistent"]:
            raise InputError(
                f"this deployment takes LTMP in the consistent form (ltmp.consistent), found the faithful one at "
                f"block {faithful[0]}"
            )
        rooms, tokens = self.rooms.tower, spec.tower.tokens if learned else 0
        least_of = 1 + max((reducer.prefix for _, reducer in learned), default=0)
        if rooms and (len(rooms) != len(learned) or not all(least_of <= room <= tokens for room in rooms)):
            raise InputError(
                f"rooms.tower must be {len(learned)} numbers of slots, {least_of}..{tokens}, found {rooms}"
            )
        if list(self.rooms.read) != sorted(set(self.rooms.read)) or not all(size >= 1 for size in self.rooms.read):
            raise InputError(f"rooms.read must ascend from 1 or more, found {self.rooms.read}")

    def apply(
        self,
        params: Any,
        input_ids: Any,
        images: Any,
        attention_mask: Any = None,
        *,
        positions: Any = None,
        segments: Any = None,
        image_number: Any = None,
        image_interval: Any = None,
        knobs: Knobs | None = None,
        slots: Any = None,
    ) -> tuple[Float[Array, "B M V"], dict[str, Array]]:
        """Runs the model; arguments as of `VLM.apply`.

        Returns:
          logits: as of `VLM.apply`.
          told: `choice [B, S]` int32, experts taken; `read [S + 1]` int32, visual slots that the text read before and
            after every stage; `overflow` bool: an image had more tokens than its room, so that the masked model ran.

        Raises:
          InputError: as `VLM.apply`.
        """
        given = {"positions": positions, "segments": segments}
        given |= {"image_number": image_number, "image_interval": image_interval}
        more = {"knobs": knobs, "slots": slots}
        model, params = self._cut(), jax.tree.map(jnp.asarray, params)
        entered, seen = model.enter(params, input_ids, images, attention_mask=attention_mask, **given)
        text = entered["embeddings"], positions, segments, entered["memory"], entered.get("lattice")
        tokens = model.lm.enter(model.decoder_params(params), None, attention_mask, *text)
        x, choice, read = self._decoder(params, tokens, knobs or {})
        rows = x if slots is None else jnp.take_along_axis(x, jnp.asarray(slots)[:, :, None], axis=1)
        done = model.lm.logits(params["decoder"], rows), choice, read
        kept = [aux["decisions"]["kept"].max() for aux in seen.get("tower", ()) if "alive" in aux.get("decisions", {})]
        overflow = jnp.bool_(False)
        if self.rooms.tower:
            overflow = (jnp.stack(kept) > jnp.asarray(self.rooms.tower)).any()

            def slowly() -> tuple[Array, Array, Array]:
                logits, aux = self.model.apply(params, input_ids, images, attention_mask, **more, **given)
                made = dpn.decisions(aux, model.spec)["choice"] if dpn.reducers(model.spec) else choice
                return logits, made, jnp.full_like(read, math.prod(model.spec.grid) * _images(images))

            done = jax.lax.cond(overflow, slowly, lambda: done)
        return done[0], {"choice": done[1], "read": done[2], "overflow": overflow}

    def _cut(self) -> VLM:
        """The model whose tower's slots are cut off."""
        if not self.rooms.tower:
            return self.model
        rooms = dict(zip((layer for layer, _ in learned_reducers(self.model)), self.rooms.tower, strict=True))
        made = tuple(
            (layer, Cut(**vars(reducer), room=rooms[layer]) if layer in rooms else reducer)
            for layer, reducer in self.model.tower_reducers
        )
        return dataclasses.replace(self.model, tower_reducers=made)

    def _decoder(self, params: Any, tokens: Tokens, more: Knobs) -> tuple[Array, Array, Array]:
        """What leaves the last layer, experts `[B, S]`, and visual slots that were read `[S + 1]`."""
        spec, given = self.model.spec, dict(self.model.reducers)
        decoder = self.model.decoder_params(params)
        knobs = segments.method_knobs(decoder) | dict(more)
        grids = dpn_deploy.grids(spec.grid, len(dpn.reducers(spec)))
        choices, read = [jnp.zeros((len(tokens.x), 0), jnp.int32)], []
        for stage, layers in enumerate(dpn.stretches(spec)):
            memory = tokens.memory
            assert memory is not None
            whole = memory.number.shape[1]
            images = whole // math.prod(spec.grid)
            known = self.rooms.read if stage == 0 else tuple(images * rows * columns for rows, columns in grids[stage])
            known = tuple(sorted({size for size in known if size < whole} | {whole}))
            needed = (memory.number > 0).sum(1).max()
            run = functools.partial(self._layers, decoder, knobs, layers)
            size, x = least(known, needed, run, tokens)
            tokens = tokens.replace(x=x)
            read.append(size)
            if (reducer := given.get(layers.stop - 1)) is not None:
                tokens, decisions = reducer(tokens, {}, segments.layer_knobs(knobs, layers.stop - 1))
                choices.append(decisions["choice"][:, None])
        return tokens.x, jnp.concatenate(choices, axis=1), jnp.stack(read)

    def _layers(self, decoder: Any, knobs: Any, layers: range, size: int, tokens: Tokens) -> Array:
        """What leaves some layers whose text reads so many slots."""
        assert tokens.memory is not None
        blocks = dataclasses.replace(self.model.lm, reducers=()).blocks()
        short = tokens.replace(memory=packed(tokens.memory, size))
        return segments.run(
            blocks, decoder, short, layers=layers, knobs=knobs, remat="none", constrain=self.model.constrain
        )[0].x


def packed(memory: Memory, size: int) -> Memory:
    """The visual tokens that may be read, in their order, in `size` slots: as many as any row has, or more."""
    assert memory.x is not None
    if size == memory.number.shape[1]:
        return memory
    moved = to_front(memory.number > 0, size)
    x, number, position = moved(memory.x), moved(memory.number), moved(memory.position)
    return dataclasses.replace(memory, x=x, number=number, position=position, holder=None)


def learned_reducers(model: VLM) -> list[tuple[int, ltmp.Ltmp]]:
    """The learned reducers of the tower's blocks, as far as these are computed."""
    if not model.tower_reducers:
        return []
    tower: Any = model.tower  # one with tiles takes no reducers
    return [(layer, reducer) for layer, reducer in tower.reducers if isinstance(reducer, ltmp.Ltmp)]


def calibrate(model: VLM, params: Any, images: Any, spare: float = 0.1) -> Rooms:
    """Rooms for images like these, `[B, I, H, W, C]`: what the longest of them needs, and a share of `spare` more."""
    found = learned_reducers(model)
    if not found:
        return Rooms()
    _, live, side = jax.jit(model.look)(params, images)
    tokens = model.spec.tower.tokens
    kept = [np.max(side["layers"][layer]["decisions"]["kept"]) for layer, _ in found]
    row = int(np.asarray(live).sum((1, 2)).max())
    tower = tuple(min(math.ceil(count * (1 + spare)) + 1, tokens) for count in map(int, kept))
    return Rooms(tower, (math.ceil(row * (1 + spare)) + 1,))


def _images(images: Any) -> int:
    return 1 if images.ndim == 4 else int(images.shape[1])
