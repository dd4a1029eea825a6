# SPDX-License-Identifier: Apache-2.0
"""Adapters: what is trained beside, before or in place of frozen layers (DAS spec, section 3).

Parameters are mappings as the modules of `models.adapters` name them: `down` and `up` with `kernel` `[in, out]` and
`bias`, `norm` with `scale` and `bias`. They are cast to the dtype of x, in which all is computed, but for the
statistics of norms and softmax, which are float32.

Letters: B batch, N tokens, D width, H bottleneck, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vtjax.ops.linear import matmul, precision
from vtjax.ops.norms import layer_norm

NORM_EPS = 1e-5
"""Of an adapter's own LayerNorm, whatever the backbone's is."""

Params = Mapping[str, Any]


def linear_map(x: Float[Array, "*B D"], p: Params) -> Float[Array, "*B H"]:
    """x W + b, for `kernel [D, H]` and `bias [H]`."""
    return matmul(x, p["kernel"].astype(x.dtype)) + p["bias"].astype(x.dtype)


def bottleneck(x: Float[Array, "*B D"], p: Params, *, norm: str = "in", scale: float = 1.0) -> Float[Array, "*B D"]:
    """u(x) = s (up relu(down LN(x))), without residual (METER, ViLT: `norm="in"`; LLaMA: `norm="none"`).

    Args:
      norm: "in", "none", or "out": LN(s (up relu(down x))).
      scale: s; `p["scale"] [1]`, where it is there, is s in its place, and trained.

    Source: spec sections 3.1 and 3.5.
    """
    factor = p["scale"].astype(x.dtype) if "scale" in p else scale
    inner = layer_norm(x, p["norm"]["scale"], p["norm"]["bias"], NORM_EPS) if norm == "in" else x
    y = factor * linear_map(jax.nn.relu(linear_map(inner, p["down"])), p["up"])
    return layer_norm(y, p["norm"]["scale"], p["norm"]["bias"], NORM_EPS) if norm == "out" else y


def residual(x: Float[Array, "*B D"], p: Params) -> Float[Array, "*B D"]:
    """f(x) = x + up relu(down x), the form of LLaVA: in place of a layer, h + f(norm h) adds a normed copy of h, too.

    Source: spec section 3.6.
    """
    return x + bottleneck(x, p, norm="none")


def grouped(x: Float[Array, "*B H"], p: Params) -> Float[Array, "*B D"]:
    """A linear map by groups: part g of the input makes part g of the output. `kernel [G, H / G, D / G]`, `bias [D]`.

    Raises:
      ValueError: an input whose width is not that of the groups.
    """
    kernel = p["kernel"].astype(x.dtype)
    groups, inputs, outputs = kernel.shape
    if x.shape[-1] != groups * inputs:
        raise ValueError(f"{groups} groups of {inputs} need an input of width {groups * inputs}, found {x.shape[-1]}")
    parts = x.reshape(*x.shape[:-1], groups, inputs)
    y = jnp.einsum("...gi,gio->...go", parts, kernel, precision=precision(x))
    return y.reshape(*x.shape[:-1], groups * outputs) + p["bias"].astype(x.dtype)


def route(first: Float[Array, "B D"], p: Params, temperature: float) -> Float[Array, "B 2"]:
    """How a router mixes its two up-maps: softmax(E x / t) of the first token, rounded to float16 as in the release.

    Float32 that hold float16 numbers: what a cache keeps for all later tokens.
    """
    logits = linear_map(first.astype(jnp.float32), p["route"]) / temperature
    return jax.nn.softmax(logits, axis=-1).astype(jnp.float16).astype(jnp.float32)


def router(
    x: Float[Array, "B N D"],
    p: Params,
    *,
    scale: float = 1.0,
    temperature: float = 10.0,
    weights: Float[Array, "B 2"] | None = None,
    drop: Callable[[Array], Array] | None = None,
) -> Float[Array, "B N D"]:
    """u(x) = s (w_0 (B z) + w_1 (D z)), z = A x, without residual: linear, `p["up0"]` and `p["up1"]` by groups (LaVIN).

    Args:
      weights: w, where it is known from the prompt; None = `route` of the first token of x.
      drop: dropout on z while training; None = none.

    Source: spec section 3.4.
    """
    weights = route(x[:, 0], p, temperature) if weights is None else weights
    z = linear_map(x, p["down"])
    z = z if drop is None else drop(z)
    share = weights.astype(x.dtype)[:, :, None, None]
    return scale * (share[:, 0] * grouped(z, p["up0"]) + share[:, 1] * grouped(z, p["up1"]))
