# SPDX-License-Identifier: Apache-2.0
"""DPN in fewer slots: after every stage the tokens that are left move together, and the rest of the row is cut off.

The same function as `dpn.vlm`, gradients included, in static shapes. Where routers are free a text may keep all its
tokens, and nothing can be cut; where all paths are known before (a static path, paths by type of question, one path
drawn for a whole batch), the later layers run over what the longest of them leaves: training saves time, too.
Source: spec section 8.2. Letters: B batch, N slots, M stages.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vtjax.errors import InputError
from vtjax.methods import dpn
from vtjax.models.vlm import VLM
from vtjax.ops.pooling_experts import AREAS
from vtjax.ops.tokens import Tokens, to_front
from vtjax.spec import VLMSpec


@dataclasses.dataclass(frozen=True)
class Packed(dpn.Dpn):
    """`dpn.Dpn`, whose tokens then move to the front of their row.

    Attributes:
      cut: slots that are cut off, as many as every text has lost in this stage. A text that has lost fewer is NaN from
        here on: its paths were not those that the model was made for.
    """

    cut: int = 0

    keeps_slots = False

    def __call__(
        self, tokens: Tokens, aux: Mapping[str, Array], knobs: Mapping[str, Any]
    ) -> tuple[Tokens, dict[str, Array]]:
        tokens, decisions = super().__call__(tokens, aux, knobs)
        return packed(tokens, self.grid[1], tokens.x.shape[1] - self.cut), decisions


def packed(tokens: Tokens, columns: int, room: int) -> Tokens:
    """What lives, and cells of the pooled grid that a tower pruned, in the first `room` slots, in their order; `source`
    says where. `columns`: of an image's grid before any pooling."""
    lattice, alive = tokens.lattice, tokens.alive
    assert lattice is not None and alive is not None
    # A dead cell stays: what is pooled from its neighbours lies in its slot.
    row, column = lattice.place // columns, lattice.place % columns
    steps = 2**lattice.halved
    cell = (lattice.place >= 0) & (row % steps[:, :1] == 0) & (column % steps[:, 1:] == 0)
    kept = (alive > 0.5) | cell
    rank = jnp.where(kept, jnp.cumsum(kept, axis=1) - 1, -1).astype(jnp.int32)
    source = rank
    if tokens.source is not None:
        known = jnp.take_along_axis(rank, jnp.maximum(tokens.source, 0), axis=1)
        source = jnp.where(tokens.source >= 0, known, -1)
    moved, lost = to_front(kept, room), kept.sum(1) > room
    there = moved(kept)
    return tokens.replace(
        x=jnp.where(lost[:, None, None], jnp.nan, moved(tokens.x)),
        alive=moved(alive),
        source=jnp.minimum(source, room - 1),
        position=None if tokens.position is None else moved(tokens.position),
        segment=None if tokens.segment is None else moved(tokens.segment),
        lattice=dataclasses.replace(
            lattice, place=jnp.where(there, moved(lattice.place), -1), asks=moved(lattice.asks) & there
        ),
    )


def vlm(spec: VLMSpec, *, paths: Sequence[Sequence[int]] = (), **options: Any) -> VLM:
    """The model of an installed spec in the packed layout. Logits are those of the slots that are left, or with
    `slots=` of those that entered (`aux["tokens"].source` says which is where).

    Args:
      paths: all paths that will be taken, each an expert per stage, by texts of one image each; () = any.
      **options: as of `dpn.vlm`.

    Raises:
      InputError: a path that `dpn.check_path` refuses, or a bridge of cross-attention, whose tokens stand apart.
    """
    if spec.bridge.cross is not None:
        raise InputError("the packed layout takes visual tokens in the text, found a bridge of cross-attention")
    model = dpn.vlm(spec, **options)
    gone = cuts(spec, paths)
    made = tuple(
        (layer, Packed(**vars(reducer), cut=cut)) for (layer, reducer), cut in zip(model.reducers, gone, strict=True)
    )
    return dataclasses.replace(model, reducers=made)


def cuts(spec: VLMSpec, paths: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Slots that every one of the paths frees in each stage, beyond those of the stages before.

    Raises:
      InputError: as `dpn.check_path`.
    """
    for path in paths:
        dpn.check_path(spec, path)
    stages = len(dpn.reducers(spec))
    if not paths:
        return (0,) * stages
    areas = np.array(AREAS)
    left = math.prod(spec.grid) // np.cumprod(areas[np.array(paths)], axis=1).min(0)
    return tuple(int(n) for n in -np.diff(left, prepend=math.prod(spec.grid)))
