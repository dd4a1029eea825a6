# SPDX-License-Identifier: Apache-2.0
"""Adapters as modules, and as what the blocks' adapter slots take (`layers.ADAPTER_SITES`).

Their parameters are a method's: `params["das"]["block_07"]["attn_in"]/...`, `params["das"]["block_07"]["skip"]/...`.
They reach the blocks as knobs by these names, and an `Attached` adapter finds its own among them.

Letters: B batch, N tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vtjax.errors import InputError
from vtjax.models.layers import ADAPTER_SITES, Adapter, Knobs
from vtjax.models.segments import block_name
from vtjax.ops import adapters as ops
from vtjax.ops import norms
from vtjax.ops.tokens import Tokens
from vtjax.spec.adapter import AdapterSpec
from vtjax.spec.base import ModelSpec

METER = AdapterSpec("bottleneck", 96, norm="in")
"""METER and ViLT, in the layer; in place of a layer it is 288 (METER's fusion) or 192 wide."""
LAVIN = AdapterSpec("router", 8, init="xavier", dropout=0.1)
"""LaVIN, in the layer; 32 wide in place of it."""
LLAMA = AdapterSpec("bottleneck", 8, init="xavier", zero=True)
"""LLaMA on text, in the layer; 32 wide in place of it."""
LLAVA = AdapterSpec("residual", 64, init="xavier")
"""LLaVA-1.5, in the layer; 256 wide in place of it."""


def linear_init(fan_in: int) -> Any:
    """PyTorch's own start of a linear layer, weights and biases: uniform within fan_in ** -0.5."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init


class AdapterModule(nn.Module):
    """An adapter: what it adds to its stream, or for the residual form its whole result.

    Parameters: `down`, `up` (`kernel`, `bias`), `norm` (`scale`, `bias`) and `scale [1]` where the spec has them; of a
    router `down`, `up0`, `up1` (`kernel [G, H / G, D / G]`) and `route`.
    """

    spec: AdapterSpec

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], weights: Float[Array, "B 2"] | None = None, key: Array | None = None
    ) -> Float[Array, "B N D"]:
        """Args:
        weights: of a router, where they are known (`ops.adapters.route`).
        key: for dropout; None = none.
        """
        spec = self.spec
        spec.check(x.shape[-1])
        return apply(spec, self._params(x.shape[-1]), x, weights, key)

    def _params(self, d: int) -> dict[str, Any]:
        spec, h, zeros = self.spec, self.spec.width, nn.initializers.zeros
        weight = nn.initializers.normal(0.02) if spec.init == "normal" else nn.initializers.xavier_uniform()
        first = weight
        p: dict[str, Any] = {"down": _Linear(first, zeros, name="down")((d, h), (h,))}
        if spec.form == "router":
            inner = (spec.groups, h // spec.groups, d // spec.groups)
            p |= {name: _Linear(zeros, zeros, name=name)(inner, (d,)) for name in ("up0", "up1")}
            return p | {"route": _Linear(linear_init(d), linear_init(d), name="route")((d, 2), (2,))}
        p["up"] = _Linear(zeros if spec.zero else weight, zeros, name="up")((h, d), (d,))
        if spec.norm != "none":
            p["norm"] = _NormParams(name="norm")(d)
        if spec.learned:
            p["scale"] = self.param("scale", nn.initializers.constant(spec.scale), (1,))
        return p


class _Linear(nn.Module):
    """Kernel and bias."""

    kernel: Any
    bias: Any

    @nn.compact
    def __call__(self, kernel: tuple[int, ...], bias: tuple[int, ...]) -> dict[str, Array]:
        return {"kernel": self.param("kernel", self.kernel, kernel), "bias": self.param("bias", self.bias, bias)}


class _NormParams(nn.Module):
    """Scale and bias of a LayerNorm."""

    @nn.compact
    def __call__(self, d: int) -> dict[str, Array]:
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        return {"scale": self.param("scale", ones, (d,)), "bias": self.param("bias", zeros, (d,))}


def apply(
    spec: AdapterSpec,
    p: Any,
    x: Float[Array, "B N D"],
    weights: Float[Array, "B 2"] | None = None,
    key: Array | None = None,
) -> Float[Array, "B N D"]:
    """The adapter of `spec` with the parameters p; as `AdapterModule`."""
    if spec.form == "residual":
        return ops.residual(x, p)
    if spec.form == "bottleneck":
        return ops.bottleneck(x, p, norm=spec.norm, scale=spec.scale)
    drop = None if key is None or not spec.dropout else _dropout(spec.dropout, key)
    return ops.router(x, p, scale=spec.scale, temperature=spec.temperature, weights=weights, drop=drop)


def _dropout(rate: float, key: Array) -> Any:
    def drop(x: Array) -> Array:
        return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0).astype(x.dtype)

    return drop


def init(spec: AdapterSpec, key: Array, d: int) -> Any:
    """Fresh float32 parameters beside a stream of width d."""
    return AdapterModule(spec).init(key, jnp.zeros((1, 1, d)))["params"]


@dataclasses.dataclass(frozen=True)
class Attached:
    """An adapter in a slot of a block (`layers.Adapter`). Hashable.

    Attributes:
      spec: what it is.
      name: its parameters are the block's knob of this name; its router's weights, where they are known from the
        prompt, the knob `<name>_route` `[B, 2]`, else those of the token in the slot `adapter_first` `[B]` (0 where
        there is no such knob); and the key of its dropout the knob `adapter_key`.
      adds: a bottleneck or router before a sublayer hands on x + u(x) (the slots `attn_in` and `mlp_in` replace their
        input); the residual form does so by itself.
      eps: it reads RMSNorm(x) with the scale `norm_in` of its own parameters, a frozen copy of the removed block's
        first norm (LaVIN, LLaMA, LLaVA); None = it reads x.
    """

    spec: AdapterSpec
    name: str
    adds: bool = False
    eps: float | None = None

    def __call__(self, x: Array, knobs: Knobs) -> Array:
        if self.name not in knobs:
            raise InputError(f"the adapter {self.name!r} needs parameters of that name, found none for its block")
        p, route = knobs[self.name], knobs.get(f"{self.name}_route")
        if self.spec.form == "router" and route is None and x.shape[1] == 1:
            raise InputError(
                f"a router's weights are those of the prompt: decoding needs {self.name}_route, see routes"
            )
        if self.eps is not None:
            x = norms.rms_norm(x, p["norm_in"]["scale"], self.eps)
        if self.spec.form == "router" and route is None and (first := knobs.get("adapter_first")) is not None:
            route = ops.route(at(x, first), p, self.spec.temperature)
        y = apply(self.spec, p, x, route, knobs.get("adapter_key"))
        return x + y if self.adds else y


@dataclasses.dataclass(frozen=True)
class Style:
    """How a family of models has its adapters (DAS spec, sections 3.3 to 3.6). JSON-able by its fields.

    Attributes:
      inner: of kept layers.
      sites: where these are, of `ADAPTER_SITES`.
      skip: what stands in for a removed layer.
      normed: that one reads the layer's first norm, kept and frozen.
    """

    inner: AdapterSpec
    sites: tuple[str, ...]
    skip: AdapterSpec
    normed: bool

    def __post_init__(self) -> None:
        if not self.sites or set(self.sites) - set(ADAPTER_SITES[:4]):
            raise InputError(f"Style.sites must be some of {', '.join(ADAPTER_SITES[:4])}, found {self.sites}")


STYLES = {
    "vilt": Style(METER, ("attn", "mlp"), METER.edit(width=192), normed=False),
    "lavin": Style(LAVIN, ("attn_in",), LAVIN.edit(width=32), normed=True),
    "llama": Style(LLAMA, ("attn_in",), LLAMA.edit(width=32), normed=True),
    "llava": Style(LLAVA, ("attn_in", "mlp_in"), LLAVA.edit(width=256), normed=True),
}
"""By the name of the model they were published with."""


def attach(
    spec: ModelSpec, style: Style, eps: float = 1e-6, search: bool = False, arms: Collection[int] | None = None
) -> tuple[tuple[int, str, Adapter], ...]:
    """The `adapters` of a ViT or LM: of every kept block in its sites, of every removed one in its place.

    Args:
      spec: of the model, with what is skipped for good removed (`attn=False, ffn=False`).
      eps: of the norm that skip adapters read, where they do: the model's own.
      search: kept blocks have a skip adapter, too, which acts where the knob `skipped [L]` says so.
      arms: the layers that have skip adapters; None = all. What is empty and none of them stays empty.
    """
    found: list[tuple[int, str, Adapter]] = []
    stand_in = Attached(style.skip, "skip", eps=eps if style.normed else None)
    for index, block in enumerate(spec.blocks):
        arm = arms is None or index in arms
        if not block.attn and not block.ffn:
            if arm:
                found.append((index, "skip", stand_in))
            continue
        for site in style.sites:
            if block.attn if site.startswith("attn") else block.ffn:
                adds = site.endswith("_in") and style.inner.form != "residual"
                found.append((index, site, Attached(style.inner, site, adds)))
        if search and arm:
            found.append((index, "instead", stand_in))
    return tuple(found)


def init_attached(
    spec: Any, style: Style, key: Array, search: bool = False, arms: Collection[int] | None = None
) -> dict[str, Any]:
    """Fresh parameters for `attach`, by block: what goes into `params["das"]`. A `norm_in` is all ones: copy the
    block's `norm1` into it."""
    params: dict[str, Any] = {}
    for index, _, adapter in attach(spec, style, search=search, arms=arms):
        assert isinstance(adapter, Attached)
        site_key = jax.random.fold_in(jax.random.fold_in(key, index), (*style.sites, "skip").index(adapter.name))
        p = init(adapter.spec, site_key, spec.width)
        if adapter.eps is not None:
            p |= {"norm_in": {"scale": jnp.ones(spec.width)}}
        params.setdefault(block_name(index), {})[adapter.name] = p
    return params


def at(x: Float[Array, "B N D"], slot: Int[Array, " B"]) -> Float[Array, "B D"]:
    """The token in one slot of each row."""
    return jnp.take_along_axis(x, slot[:, None, None], axis=1)[:, 0]


def routes(
    spec: Any,
    attached: Sequence[tuple[int, str, Adapter]],
    params: Any,
    entering: Sequence[Tokens],
) -> dict[str, Array]:
    """What a decoder's routers keep of a prompt, as knobs `<site>_route [L, B, 2]` for `LM.step`: later tokens do not
    see the one that decides. Empty where there are no routers.

    Args:
      attached: the model's adapters.
      entering: the prompts as they enter each block.
    """
    found: dict[str, list[Array]] = {}
    for index, site, adapter in attached:
        if not isinstance(adapter, Attached) or adapter.spec.form != "router":
            continue
        tokens = entering[index]
        first = tokens.first()
        read = tokens.x[:, 0] if first is None else at(tokens.x, first)
        p = params["das"][block_name(index)][site]
        norm = p["norm_in"] if site == "skip" else params[block_name(index)]["norm1" if site == "attn_in" else "norm2"]
        read = norms.rms_norm(read, norm["scale"], spec.eps)
        empty = [jnp.zeros((len(read), 2))] * spec.depth
        found.setdefault(f"{site}_route", empty.copy())[index] = ops.route(read, p, adapter.spec.temperature)
    return {name: jnp.stack(rows) for name, rows in found.items()}
