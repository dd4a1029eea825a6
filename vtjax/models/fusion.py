# SPDX-License-Identifier: Apache-2.0
"""The fusion encoder of a `FusionSpec`, ViLT's or METER's, whose modules can be skipped: while it runs, or for good.

A traced `skip` decides module by module with `lax.cond`: one compilation for all subsets, and a skipped module costs
nothing but its stand-in; what is not taken gets gradients of exactly 0. A module that is gone from the spec
(`FusionSpec.skipping`) is not built and has no parameters. Both give the same numbers.

The reference's towers are `ViT`s, its fusion layers and text encoder are written here. Not here: sampling of patches
and images of several sizes in one batch (ViLT), dropout in ViLT's blocks, and heads of other tasks than classification.

Letters: B batch, N tokens of the text, M of the image, D width, E the tower's width, K classes, n arms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vtjax.errors import InputError
from vtjax.models import adapters as adapters_lib
from vtjax.models import segments
from vtjax.models.adapters import Attached
from vtjax.models.fusion_layers import SITES, FusionHead, Marks, Pooler, PostLayer, TextEmbed
from vtjax.models.layers import Adapter, Block, Embed, Norm, identity
from vtjax.models.lm import check_ids, check_mask
from vtjax.models.segments import block_name, call_module
from vtjax.models.vit import ViT
from vtjax.ops.tokens import Tokens
from vtjax.spec import AdapterSpec, FusionSpec

Params = dict[str, Any]
Mask = Int[Array | np.ndarray, "B N"] | Bool[Array | np.ndarray, "B N"] | Float[Array | np.ndarray, "B N"]
Skip = Bool[Array | np.ndarray, " n"]

METHOD = "das"
"""Adapters are `params["das"]["block_07"]["skip"]/...`, the inner ones by their site in place of "skip"."""

BLOCK_SITES = ("attn", "mlp")
"""Sites of the inner adapters of one stream's blocks; of fusion layers they are `fusion_layers.SITES`."""


@dataclasses.dataclass(frozen=True)
class Fusion:
    """A buildable model. Hashable, so it may be a static argument.

    Attributes:
      spec: what to build.
      dtype: compute dtype; parameters stay float32, norms and softmax are computed in float32.
      constrain: applied to activations `[B, N, D]`; sharding is injected here.
    """

    spec: FusionSpec
    dtype: Any = jnp.float32
    constrain: Callable[[Array], Array] = identity

    def __post_init__(self) -> None:
        if not isinstance(self.spec, FusionSpec):
            raise InputError(f"a Fusion is built from a FusionSpec, found {type(self.spec).__name__}")

    def init(self, key: Array) -> Params:
        """Fresh float32 parameters, adapters included; jit it."""
        spec, keys = self.spec, iter(jax.random.split(key, 8))
        x, ids = jnp.zeros((1, 1, spec.width), self.dtype), jnp.zeros((1, 1), jnp.int32)
        image = jnp.zeros((1, *spec.image.image_size, spec.image.channels))
        params: Params = {"embed": {"text": TextEmbed(spec, self.dtype).init(next(keys), ids)["params"]}}
        if spec.streams == 1:
            params["embed"]["image"] = Embed(spec.image, self.dtype).init(next(keys), image)["params"]
            params["norm"] = self._norm.init(key, x)["params"]
        else:
            params["tower"] = self.tower.init(next(keys))
        features = jnp.zeros((1, 1, spec.image.width), self.dtype)
        params["embed"]["marks"] = Marks(spec, self.dtype).init(next(keys), x, features)["params"]
        if spec.streams == 2:
            params["embed"]["marks"]["first"] = params["embed"]["text"]["tokens"][0]
        params |= self._init_modules(next(keys))
        pools = ("text", "image") if spec.streams == 2 else ("text",)
        pool_key = next(keys)
        params["pool"] = {
            name: self._pool.init(jax.random.fold_in(pool_key, i), x[:, 0])["params"] for i, name in enumerate(pools)
        }
        if spec.classes:
            pooled = jnp.zeros((1, len(pools) * spec.width), self.dtype)
            params["head"] = self._head.init(next(keys), pooled)["params"]
        return params | {METHOD: self.init_adapters(next(keys))}

    def _init_modules(self, key: Array) -> Params:
        """Equal modules by one vmapped initialiser, as `segments.init`."""
        x, params = jnp.zeros((1, 1, self.spec.width), self.dtype), {}
        groups: dict[Any, list[int]] = {}
        for index in range(self.spec.depth):
            if index not in self.spec.skips:
                groups.setdefault(self._module(index).clone(adapters=()), []).append(index)
        for module, members in groups.items():
            arguments = (Tokens(x),) if isinstance(module, Block) else (x, x if module.cross else None)
            keys = jnp.stack([jax.random.fold_in(key, index) for index in members])
            stacked = jax.vmap(lambda k, m=module, a=arguments: m.init(k, *a)["params"])(keys)
            for place, index in enumerate(members):
                params[block_name(index)] = jax.tree.map(lambda a, p=place: a[p], stacked)
        return params

    def init_adapters(self, key: Array) -> Params:
        """Fresh parameters of all adapters, by block: what training starts from, in the search and again after it."""
        params: Params = {}
        for index in range(self.spec.depth):
            for number, (site, adapter) in enumerate(self._adapter_specs(index)):
                site_key = jax.random.fold_in(jax.random.fold_in(key, index), number)
                found = adapters_lib.init(adapter, site_key, self.spec.width)
                params.setdefault(block_name(index), {})[site] = found
        return params

    def _adapter_specs(self, index: int) -> list[tuple[str, AdapterSpec]]:
        """The adapters that exist for a module: inside of it where it is kept, and in its place where it may be or is
        skipped."""
        spec, gone = self.spec, index in self.spec.skips
        found = []
        if spec.inner is not None and not gone:
            found += [(site, spec.inner) for site in self._sites(index)]
        stand_in = spec.stand_in(index)
        if stand_in is not None and (gone or (index < spec.arms and not spec.skips)):
            found.append(("skip", stand_in))
        return found

    def _sites(self, index: int) -> tuple[str, ...]:
        if self.spec.streams == 1:
            return BLOCK_SITES
        return SITES if index < 2 * self.spec.fusion else ()

    def _module(self, index: int) -> Block | PostLayer:
        """Module `index` as it is kept; the text encoder's have no adapters inside."""
        spec, block = self.spec, self.spec.blocks[index]
        sites = () if spec.inner is None else self._sites(index)
        inner: tuple[tuple[str, Adapter], ...] = tuple((s, Attached(spec.inner, s)) for s in sites if spec.inner)
        if spec.streams == 1:
            family = dataclasses.replace(spec.image, blocks=(block,), lineage=(), feature_layer=None)
            return Block(family, block, adapters=inner, dtype=self.dtype)
        cross = index < 2 * spec.fusion
        return PostLayer(block, spec.eps if cross else spec.text_eps, cross, inner, spec.dropout, self.dtype)

    def apply(
        self,
        params: Params,
        input_ids: Int[Array | np.ndarray, "B N"],
        images: Float[Array | np.ndarray, "B H W C"],
        attention_mask: Mask | None = None,
        *,
        skip: Skip | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B K"], dict[str, Any]]:
        """Runs the model on texts and images.

        Args:
          params: as from `init`, jax or numpy arrays.
          input_ids: token ids; the first token is the text's summary.
          images: float32, already normalised, of the spec's size.
          attention_mask: 1 for tokens, 0 for padding at the end; None = no padding.
          skip: `[n]`, which arms are skipped, for a spec where none is gone; None = none more than the spec says.
          key: for dropout in post-norm layers, equal for masked and removed modules; None = none.

        Returns:
          Float32 logits, or the pooled vector where there is no head; aux as of `fuse`.

        Raises:
          InputError: ids, masks, images or a `skip` that do not fit.
        """
        check_ids(input_ids, self.spec.vocab)
        if input_ids.shape[1] > self.spec.positions:
            raise InputError(f"texts must have {self.spec.positions} tokens or fewer, found {input_ids.shape[1]}")
        if len(images) != len(input_ids):
            raise InputError(f"every text must have an image, found {len(input_ids)} texts and {len(images)} images")
        if attention_mask is not None:
            check_mask(attention_mask)
        ViT(self.spec.image).check_images(images)
        params, input_ids, images = jax.tree.map(jnp.asarray, (params, input_ids, images))
        text = call_module(TextEmbed(self.spec, self.dtype), params["embed"]["text"], input_ids)
        if self.spec.streams == 1:
            patches = call_module(Embed(self.spec.image, self.dtype), params["embed"]["image"], images)
        else:
            text = self.encode_text(params, text, attention_mask, skip=skip, key=key)
            patches = self.tower.apply(params["tower"], images)[1]["features"].astype(self.dtype)
        text, patches = call_module(Marks(self.spec, self.dtype), params["embed"]["marks"], text, patches)
        aux = self.fuse(params, text, patches, attention_mask, skip=skip, key=key)
        if not self.spec.classes:
            return aux["pooled"].astype(jnp.float32), aux
        return call_module(self._head, params["head"], aux["pooled"]), aux

    def encode_text(
        self,
        params: Params,
        text: Float[Array, "B N D"],
        text_mask: Mask | None = None,
        *,
        skip: Skip | None = None,
        key: Array | None = None,
    ) -> Float[Array, "B N D"]:
        """The layers of METER's text encoder on embedded text; arguments as `apply` and `fuse` have them."""
        spec, alive = self.spec, self._alive(text_mask, text)
        modules = self._modules(params, skip, key)
        for index in range(2 * spec.fusion, spec.depth):
            text = modules(index, text, alive=alive)
        return text

    def fuse(
        self,
        params: Params,
        text: Float[Array | np.ndarray, "B N D"],
        image: Float[Array | np.ndarray, "B M D"],
        text_mask: Mask | None = None,
        image_mask: Any = None,
        *,
        skip: Skip | None = None,
        key: Array | None = None,
    ) -> dict[str, Any]:
        """Runs the blocks of one stream, or the fusion layers of two, on what the embeddings made.

        Args:
          text, image: the streams, types of tokens added.
          text_mask, image_mask: 1 for tokens, 0 for padding, `[B, N]` and `[B, M]`; None = no padding. Of two streams
            the image has none (METER).
          skip, key: as `apply`.

        Returns:
          `text [B, N, D]` and `image [B, M, D]` (of one stream after the final norm), and `pooled`: tanh of a linear
          map of the first token, `[B, D]`, or of both streams', `[B, 2 D]`.
        """
        spec, params = self.spec, jax.tree.map(jnp.asarray, params)
        modules, n = self._modules(params, skip, key), text.shape[1]
        text, image = (jnp.asarray(a).astype(self.dtype) for a in (text, image))
        alive = self._alive(text_mask, text)
        if spec.streams == 1:
            seen = self._alive(image_mask, image)
            if alive is not None or seen is not None:
                ones = jnp.ones((len(text), n + image.shape[1]))
                parts = (ones[:, :n] if alive is None else alive, ones[:, n:] if seen is None else seen)
                alive = jnp.concatenate(parts, axis=1)
            x = jnp.concatenate([text, image], axis=1)
            for index in range(spec.depth):
                x = modules(index, x, alive=alive)
            x = call_module(self._norm, params["norm"], x)
            pooled = call_module(self._pool, params["pool"]["text"], x[:, 0])
            return {"text": x[:, :n], "image": x[:, n:], "pooled": pooled}
        if image_mask is not None:
            raise InputError("images of two streams have no padding, found an image_mask")
        for layer in range(spec.fusion):
            # Both read what the layer before left: the image does not see this layer's text, nor the other way round.
            text, image = (
                modules(layer, text, image, alive=alive),
                modules(spec.fusion + layer, image, text, other_alive=alive),
            )
        firsts = [
            call_module(self._pool, params["pool"][name], a[:, 0]) for name, a in (("text", text), ("image", image))
        ]
        return {"text": text, "image": image, "pooled": jnp.concatenate(firsts, axis=-1)}

    def _modules(self, params: Params, skip: Any, key: Array | None) -> Callable[..., Array]:
        """`(index, x, y=None, alive=None, other_alive=None) -> x` after module `index`, skipped or not."""
        spec = self.spec
        if skip is not None:
            if spec.skips:
                raise InputError(f"a model without modules {spec.skips} takes no skip, found one")
            if skip.shape != (spec.arms,):
                raise InputError(f"skip must be [{spec.arms}], one entry per arm, found {list(skip.shape)}")
            skip = jnp.asarray(skip)
        knobs = segments.method_knobs(params)

        def run(
            index: int, x: Array, y: Array | None = None, alive: Array | None = None, other_alive: Array | None = None
        ) -> Array:
            own, stand_in = dict(knobs.get(block_name(index), {})), spec.stand_in(index)
            inner_key = None if key is None else jax.random.fold_in(key, index)

            def skipped(x: Array, y: Array | None) -> Array:
                return x if stand_in is None else x + Attached(stand_in, "skip")(x, own)

            def kept(x: Array, y: Array | None) -> Array:
                module, p = self._module(index), params[block_name(index)]
                if isinstance(module, Block):
                    tokens, _ = call_module(module, p, Tokens(x, alive=alive), own)
                    return tokens.x
                return call_module(module, p, x, y, alive, other_alive, own, inner_key)

            if index in spec.skips:
                x = skipped(x, y)
            elif skip is None or index >= spec.arms:
                x = kept(x, y)
            else:
                x = jax.lax.cond(skip[index], skipped, kept, x, y)
            return self.constrain(x)

        return run

    def _alive(self, mask: Any, x: Array) -> Float[Array, "B N"] | None:
        if mask is None:
            return None
        if mask.shape != x.shape[:2]:
            raise InputError(f"a mask must be {list(x.shape[:2])} as the tokens are, found {list(mask.shape)}")
        return jnp.asarray(mask).astype(jnp.float32)

    @property
    def tower(self) -> ViT:
        """The image tower of two streams."""
        return ViT(self.spec.image, dtype=self.dtype, constrain=self.constrain)

    @property
    def _norm(self) -> Norm:
        return Norm(self.spec.image.norm, self.spec.image.eps)

    @property
    def _pool(self) -> Pooler:
        return Pooler(self.dtype)

    @property
    def _head(self) -> FusionHead:
        return FusionHead(2 * self.spec.width, self.spec.classes, self.dtype)
