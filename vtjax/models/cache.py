# SPDX-License-Identifier: Apache-2.0
"""What a decoder remembers between tokens. Layers may remember sequences of different lengths.

A *stretch* is a run of layers between two reducers: they see the same slots. A reducer that shortens the sequence makes
the caches of all later layers shorter.

Letters: B batch, N slots of the prompt in a stretch, C slots of its cache, K key and value heads, d head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from vtjax.models.cross_attention import Past
from vtjax.models.decoder import LayerCache
from vtjax.ops.cross_attention import Memory
from vtjax.ops.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Slots that a run of layers shares.

    Attributes:
      alive: `[B, C]` bool, slots that hold a token.
      slot: int32, where the next token goes; equal for all samples.
      position: `[B]` int32, the next token's place in the text.
    """

    alive: Bool[Array, "B C"]
    slot: Int[Array, ""]
    position: Int[Array, " B"]

    def grown(self) -> Stretch:
        """With the next token in its slot; `slot` and `position` are still that token's."""
        taken = jnp.arange(self.alive.shape[1]) == self.slot
        return dataclasses.replace(self, alive=self.alive | taken)

    def advanced(self) -> Stretch:
        """Ready for the token after."""
        return dataclasses.replace(self, slot=self.slot + 1, position=self.position + 1)


@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of all layers, by the name of their block; blocks without attention have none.

    Attributes:
      keys, values: `[B, K, C, d]`; C is each layer's own.
      stretches: one per run of layers between reducers.
      cross: keys and values of the visual tokens, where a block has cross-attention.
      memory: which of them new tokens see, `[B, 1]`, one per stretch: a reducer may leave fewer; () = there are none.
      routes: what routers decided by the prompt, as knobs of `LM.step`; see `adapters.routes`.
    """

    keys: dict[str, Array]
    values: dict[str, Array]
    stretches: tuple[Stretch, ...]
    cross: dict[str, Past]
    memory: tuple[Memory, ...] = ()
    routes: dict[str, Array] = dataclasses.field(default_factory=dict)

    def layer(self, name: str, stretch: Stretch) -> LayerCache:
        """What block `name` gets to see, for a stretch that has grown."""
        return LayerCache(self.keys[name], self.values[name], stretch.alive, stretch.slot)


jax.tree_util.register_dataclass(Stretch, data_fields=["alive", "slot", "position"], meta_fields=[])
jax.tree_util.register_dataclass(
    Cache, data_fields=["keys", "values", "stretches", "cross", "memory", "routes"], meta_fields=[]
)


def start(entered: Sequence[Tokens], layers: Mapping[str, Mapping[str, Any]], room: int) -> Cache:
    """The cache after a prompt.

    Args:
      entered: the tokens that entered the first layer of every stretch.
      layers: `keys` and `values` `[B, N, K, d]` of the prompt, `cross_keys` and `cross_values` of the visual tokens, by
        the name of the block; what a block does not have is absent.
      room: slots for tokens to come.
    """

    def padded(a: Array) -> Array:
        return jnp.pad(a.swapaxes(1, 2), ((0, 0), (0, 0), (0, room), (0, 0)))

    return Cache(
        keys={name: padded(aux["keys"]) for name, aux in layers.items() if "keys" in aux},
        values={name: padded(aux["values"]) for name, aux in layers.items() if "keys" in aux},
        stretches=tuple(_stretch(tokens, room) for tokens in entered),
        cross={name: (aux["cross_keys"], aux["cross_values"]) for name, aux in layers.items() if "cross_keys" in aux},
        memory=tuple(_seen_by_the_next(tokens, tokens.memory) for tokens in entered if tokens.memory is not None),
    )


def _seen_by_the_next(tokens: Tokens, memory: Memory) -> Memory:
    """A new token sees what the last one of the text does."""
    last = last_live(tokens)
    low, high = (jnp.take_along_axis(a, last[:, None], axis=1) for a in (memory.low, memory.high))
    return dataclasses.replace(memory, x=None, low=low, high=high, holder=None)


def last_live(tokens: Tokens) -> Int[Array, " B"]:
    """The last live slot of every row."""
    b, n = tokens.x.shape[:2]
    if tokens.alive is None:
        return jnp.full((b,), n - 1)
    return n - 1 - jnp.argmax(tokens.alive[:, ::-1] > 0.5, axis=1)


def _stretch(tokens: Tokens, room: int) -> Stretch:
    b, n = tokens.x.shape[:2]
    live = jnp.ones((b, n), bool) if tokens.alive is None else tokens.alive > 0.5
    position = jnp.broadcast_to(jnp.arange(n), (b, n)) if tokens.position is None else tokens.position
    return Stretch(
        alive=jnp.pad(live, ((0, 0), (0, room))),
        slot=jnp.int32(n),
        position=jnp.where(live, position, -1).max(1).astype(jnp.int32) + 1,
    )
