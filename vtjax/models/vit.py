# SPDX-License-Identifier: Apache-2.0
"""The vision transformer of a `ViTSpec`: embed, blocks, pool, head.

`ViT` is a thin frozen dataclass around Linen modules; its parameters are one nested dict of float32 arrays.
Letters: B batch, N tokens, D width, K classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vtjax.errors import InputError
from vtjax.models import segments
from vtjax.models.layers import (
    Adapter,
    AttentionFn,
    AttentionPool,
    Block,
    Embed,
    Head,
    Knobs,
    Norm,
    Reducer,
    identity,
)
from vtjax.models.segments import call_module
from vtjax.ops.attention import IMPLEMENTATIONS, STATISTICS
from vtjax.ops.tokens import Tokens
from vtjax.spec import ViTSpec

Params = dict[str, Any]

WANTS = (*STATISTICS, "queries", "keys", "values", "tokens")


@dataclasses.dataclass(frozen=True)
class ViT:
    """A buildable model. Hashable, so it may be a static argument.

    Attributes:
      spec: what to build.
      dtype: compute dtype; parameters stay float32, norms and softmax are computed in float32.
      remat, scan: see `models.segments`.
      attention: implementation of `ops.attention`, or a function in its place (`layers.AttentionFn`) for the blocks.
      reducers: `(layer, reducer)` pairs, at most one per layer.
      adapters: `(layer, site, function)` triples, at most one per layer and site.
      constrain: applied to activations `[B,N,D]`; sharding is injected here.

    Raises:
      InputError: an unknown remat policy or attention, or a reducer or adapter that would not act: a layer or site that
        does not exist, that a removed block lacks, or that is taken.
    """

    spec: ViTSpec
    dtype: Any = jnp.float32
    remat: str = "none"
    scan: bool = False
    attention: str | AttentionFn = "auto"
    reducers: tuple[tuple[int, Reducer], ...] = ()
    adapters: tuple[tuple[int, str, Adapter], ...] = ()
    constrain: Callable[[Array], Array] = identity

    def __post_init__(self) -> None:
        if not isinstance(self.spec, ViTSpec):
            raise InputError(f"a ViT is built from a ViTSpec, found {type(self.spec).__name__}")
        segments.check(self.remat, self.scan)
        if isinstance(self.attention, str) and self.attention not in IMPLEMENTATIONS:
            raise InputError(f"attention must be one of {', '.join(IMPLEMENTATIONS)}, found {self.attention!r}")
        segments.check_slots(self.spec, self.reducers, self.adapters)

    def blocks(self) -> list[Block]:
        """One module per layer, reducers and adapters in place."""
        reducers = dict(self.reducers)
        return [
            Block(
                family=self._family,
                spec=block,
                reducer=reducers.get(index),
                adapters=tuple((site, fn) for layer, site, fn in self.adapters if layer == index),
                dtype=self.dtype,
                implementation=self.attention,
            )
            for index, block in enumerate(self.spec.blocks)
        ]

    @property
    def _family(self) -> ViTSpec:
        """What blocks may know of the spec: no depth and no history, so that equal blocks are equal modules."""
        return dataclasses.replace(self.spec, blocks=self.spec.blocks[:1], lineage=(), feature_layer=None)

    def init(self, key: Array) -> Params:
        """Fresh float32 parameters; jit it. Equal blocks share one traced initialiser."""
        spec, (height, width) = self.spec, self.spec.image_size
        keys = iter(jax.random.split(key, 6))
        images = jnp.zeros((1, height, width, spec.channels))
        tokens = Tokens(jnp.zeros((1, spec.tokens, spec.width), self.dtype))
        pooled = jnp.zeros((1, spec.width), self.dtype)

        params: Params = {"embed": Embed(spec, self.dtype).init(next(keys), images)["params"]}
        params |= segments.init(self.blocks(), next(keys), tokens)
        for name, used in (("norm_before", spec.norm_before), ("norm", spec.norm_after), ("fc_norm", spec.fc_norm)):
            if used:
                params[name] = self._norm.init(key, pooled)["params"]
        if spec.pooling == "attention":
            params["pool"] = self._pool.init(next(keys), tokens)["params"]
        if spec.classes:
            for name in ("head", "head_distill") if spec.distill_token else ("head",):
                params[name] = self._head.init(next(keys), pooled)["params"]
        return params

    def apply(
        self,
        params: Params,
        images: Float[Array | np.ndarray, "B H W C"],
        *,
        knobs: Knobs | None = None,
        want: tuple[str, ...] = (),
        key: Array | None = None,
        drop_path: float = 0.0,
    ) -> tuple[Float[Array, "B *N K"], dict[str, Any]]:
        """Runs the model.

        Args:
          params: as from `init` or `vtjax.load` (jax or numpy arrays), and the parameters of methods beside them
            (`params["<method>"]`), which reach the blocks as knobs.
          images: float32, already normalised, of the spec's size.
          knobs: traced arrays by name, `[L, ...]` or one scalar for all layers; they override method parameters of the
            same name.
          want: per-block outputs to return in `aux["blocks"][l]`: "tokens", and from blocks with attention "queries",
            "keys", "values", "importance", "lse".
          key, drop_path: stochastic depth in training.

        Returns:
          y: float32 logits `[B,K]`, or pooled features `[B,D]` where there is no head (`[B,N,D]` tokens where there
            is no pooling either). With a distillation token, the mean of the two heads.
          aux: `features [B,N,D]` (after the final norm, or as `spec.feature_layer` says), `pooled [B,D]`, `tokens`
            (the Tokens that left the last block), `blocks` (one dict per layer), and with a distillation token
            `logits_class`, `logits_distill`.

        Raises:
          InputError: images of another shape than the spec's; an unknown name in `want`; a block whose `reduce` names
            a reducer that the model was not given; knobs that do not fit the layers, or that two methods share.
        """
        spec = self.spec
        unknown = [want] if isinstance(want, str) else [w for w in want if w not in WANTS]
        if unknown:
            raise InputError(f"want must be a tuple of {', '.join(WANTS)}, found {unknown[0]!r}")
        segments.check_reducers(spec, self.reducers)
        self.check_images(images)
        params, images = jax.tree.map(jnp.asarray, (params, images))
        feature_layer = None if spec.feature_layer is None else spec.feature_layer % spec.depth
        tokens, blocks = segments.run(
            self.blocks(),
            params,
            self.embed(params, images),
            knobs=segments.method_knobs(params) | dict(knobs or {}),
            want=want,
            keep=() if feature_layer is None else (feature_layer,),
            remat=self.remat,
            scan=self.scan,
            drop_path=drop_path,
            key=key,
            constrain=self.constrain,
        )
        kept = None if feature_layer is None else blocks[feature_layer]["tokens"].x
        if feature_layer is not None and "tokens" not in want:
            del blocks[feature_layer]["tokens"]
        y, aux = self.read(params, tokens)
        return y, {**aux, "tokens": tokens, "blocks": blocks, **({} if kept is None else {"features": kept})}

    def check_images(self, images: Any) -> None:
        """Raises InputError for images of another shape than the spec's."""
        expected = (*self.spec.image_size, self.spec.channels)
        if tuple(images.shape[1:]) != expected:
            raise InputError(f"images must be [B, {', '.join(map(str, expected))}], found {list(images.shape)}")

    def embed(self, params: Params, images: Float[Array | np.ndarray, "B H W C"]) -> Tokens:
        """The tokens that enter the first block."""
        x = self.constrain(call_module(Embed(self.spec, self.dtype), params["embed"], images))
        return Tokens(call_module(self._norm, params["norm_before"], x) if self.spec.norm_before else x)

    def read(self, params: Params, tokens: Tokens) -> tuple[Float[Array, "B *N K"], dict[str, Any]]:
        """Final norm, pooling and head on the tokens that left the last block: `y`, and of aux `features`, `pooled`
        and the logits of both heads; see `apply`."""
        spec, x = self.spec, tokens.x
        if spec.norm_after:
            x = call_module(self._norm, params["norm"], x)
        aux: dict[str, Any] = {"features": x}
        if spec.pooling == "none":
            return self._unpooled(params, x, aux)
        pooled = self._pooled(params, tokens.replace(x=x))
        aux["pooled"] = pooled
        if not spec.classes:
            return pooled.astype(jnp.float32), aux
        y = call_module(self._head, params["head"], pooled)
        if spec.distill_token:
            distill = self._normed_pool(params, x[:, 1])
            aux["logits_class"] = y
            aux["logits_distill"] = call_module(self._head, params["head_distill"], distill)
            y = (y + aux["logits_distill"]) / 2
        return y, aux

    def _pooled(self, params: Params, tokens: Tokens) -> Float[Array, "B D"]:
        spec, x = self.spec, tokens.x
        if spec.pooling == "attention":
            return self._normed_pool(params, call_module(self._pool, params["pool"], tokens))
        if spec.pooling == "class":
            return self._normed_pool(params, x[:, 0])
        weights = tokens.weights()
        patches = x[:, spec.prefix :].astype(jnp.float32)
        if weights is None:
            mean = patches.mean(1)
        else:
            w = weights[:, spec.prefix :, None]
            mean = (patches * w).sum(1) / jnp.maximum(w.sum(1), 1e-6)
        return self._normed_pool(params, mean.astype(x.dtype))

    def _normed_pool(self, params: Params, pooled: Float[Array, "B D"]) -> Float[Array, "B D"]:
        return call_module(self._norm, params["fc_norm"], pooled) if self.spec.fc_norm else pooled

    def _unpooled(self, params: Params, x: Array, aux: dict[str, Any]) -> tuple[Array, dict[str, Any]]:
        if not self.spec.classes:
            return x.astype(jnp.float32), aux
        return call_module(self._head, params["head"], x), aux

    @property
    def _norm(self) -> Norm:
        return Norm(self.spec.norm, self.spec.eps)

    @property
    def _pool(self) -> AttentionPool:
        return AttentionPool(self._family, self.dtype, self.attention if isinstance(self.attention, str) else "auto")

    @property
    def _head(self) -> Head:
        return Head(self.spec.classes, self.spec.head_bias, self.dtype)
