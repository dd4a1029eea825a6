# SPDX-License-Identifier: Apache-2.0
"""Text from a language model: greedy or sampled, batched, ragged, compiled once per shape.

Letters: B batch, N tokens of the prompt, T new tokens, V vocabulary, D width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vtjax.errors import InputError
from vtjax.models.cache import Cache
from vtjax.models.layers import Knobs
from vtjax.models.lm import LM, Ids, Mask, Params, check_ids, check_mask
from vtjax.ops.cross_attention import Memory
from vtjax.ops.tokens import Lattice


def generate(
    model: LM,
    params: Params,
    input_ids: Ids | None = None,
    attention_mask: Mask | None = None,
    *,
    new_tokens: int,
    embeddings: Float[Array | np.ndarray, "B N D"] | None = None,
    positions: Ids | None = None,
    memory: Memory | None = None,
    lattice: Lattice | None = None,
    knobs: Knobs | None = None,
    key: Array | None = None,
    temperature: Float[Array, ""] | float = 1.0,
    top_k: int | None = None,
    top_p: Float[Array, ""] | float | None = None,
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Continues prompts until each has met one of the spec's `eos` tokens, or for `new_tokens` tokens.

    Args:
      model, params: the model.
      input_ids, attention_mask, embeddings, positions, memory, lattice, knobs: the prompts, as in `LM.apply`; padding
        on either side.
      new_tokens: T, above 0; prompt and new tokens must fit the spec's context.
      key: random key for sampling; None takes the likeliest token each time.
      temperature: divides the logits, above 0; traced. Without a key of no effect, as the next two.
      top_k: sample among the k likeliest tokens; None = all.
      top_p: sample among the fewest tokens that have at least this share of the probability, in (0, 1]; traced.

    Returns:
      The new tokens, after a text's end its first `eos` again, and how many of them are the text's (its end included).

    Raises:
      InputError: what `LM.apply` refuses, a text that does not fit the context, or a setting out of range.
    """
    if new_tokens < 1:
        raise InputError(f"new_tokens must be 1 or more, found {new_tokens}")
    if top_k is not None and not 1 <= top_k <= model.spec.vocab:
        raise InputError(f"top_k must be in 1..{model.spec.vocab}, found {top_k}")
    for name, value, most in (("temperature", temperature, np.inf), ("top_p", top_p, 1.0)):
        known = value is not None and not isinstance(value, jax.core.Tracer)
        if known and not 0 < float(value) <= most:  # type: ignore[arg-type]
            raise InputError(f"{name} must be above 0{' and at most 1' if most == 1 else ''}, found {value}")
    # The values are not known inside the compiled function.
    if input_ids is not None:
        check_ids(input_ids, model.spec.ids)
    if attention_mask is not None:
        check_mask(attention_mask)
    prompt: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "embeddings": embeddings}
    prompt |= {"positions": positions, "memory": memory, "lattice": lattice, "knobs": knobs}
    sampling = None if key is None else (key, temperature, top_p)
    return _generate(model, params, prompt, sampling, new_tokens, top_k)


@functools.partial(jax.jit, static_argnums=(0, 4))
def go_on(
    model: LM, params: Params, logits: Float[Array, "B V"], cache: Cache, new_tokens: int, knobs: Knobs | None = None
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Continues greedily from a prefill whose cache has room for `new_tokens - 1` tokens; returns as `generate`."""
    return _decoded(model, params, logits, cache, knobs, None, new_tokens, None)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _generate(
    model: LM, params: Params, prompt: dict[str, Any], sampling: Any, new_tokens: int, top_k: int | None
) -> tuple[Array, Array]:
    logits, cache = model.prefill(params, **prompt, room=new_tokens - 1)
    return _decoded(model, params, logits, cache, prompt["knobs"], sampling, new_tokens, top_k)


def _decoded(
    model: LM,
    params: Params,
    logits: Array,
    cache: Cache,
    knobs: Knobs | None,
    sampling: Any,
    new_tokens: int,
    top_k: int | None,
) -> tuple[Array, Array]:
    ends = jnp.asarray(model.spec.eos, jnp.int32)

    def choose(logits: Array, number: Any) -> Array:
        if sampling is None:
            return jnp.argmax(logits, -1).astype(jnp.int32)
        key, temperature, top_p = sampling
        kept = restricted(logits / temperature, top_k, top_p)
        return jax.random.categorical(jax.random.fold_in(key, number), kept).astype(jnp.int32)

    def going(state: Any) -> Array:
        return (state[0] < new_tokens) & ~state[4].all()

    def one(state: Any) -> Any:
        number, cache, tokens, count, done = state
        before = jax.lax.dynamic_slice_in_dim(tokens, number - 1, 1, axis=1)[:, 0]
        logits, cache = model.step(params, before, cache, knobs=knobs)
        token = choose(logits, number)
        token = jnp.where(done, ends[0], token) if model.spec.eos else token
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], number, 1)
        return number + 1, cache, tokens, count + ~done, done | jnp.isin(token, ends)

    first = choose(logits, 0)
    filler = model.spec.eos[0] if model.spec.eos else 0
    tokens = jnp.full((logits.shape[0], new_tokens), filler, jnp.int32).at[:, 0].set(first)
    count = jnp.ones(logits.shape[0], jnp.int32)
    _, _, tokens, count, _ = jax.lax.while_loop(going, one, (1, cache, tokens, count, jnp.isin(first, ends)))
    return tokens, count


def restricted(
    logits: Float[Array, "B V"], top_k: int | None, top_p: Float[Array, ""] | float | None
) -> Float[Array, "B V"]:
    """The logits, -inf outside the `top_k` likeliest and outside the fewest tokens with `top_p` of the probability.
    Tokens that tie with the last one inside stay."""
    if top_k is not None:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        ordered = -jnp.sort(-logits, axis=-1)
        share = jax.nn.softmax(ordered, -1)
        inside = jnp.cumsum(share, -1) - share < top_p
        least = jnp.where(inside, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits
