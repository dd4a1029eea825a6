# SPDX-License-Identifier: Apache-2.0
"""The fusion encoder of a `FusionSpec`, ViLT's or METER's, whose modules can be skipped: while it runs, or for good.

A traced `skip` decides module by module with `lax.cond`: one compilation for all subsets, and a skipped module costs
nothing but its stand-in; what is not taken gets gradients of exactly 0. A module that is gone from the spec
(`FusionSpec.skipping`) is not built and has no parameters. Both give the same numbers.

The reference's towers are `ViT`s, its fusion layers and text encoder are written here. Not here: sampling of patches
and images of several sizes in one batch (ViLT), and dropout in ViLT's blocks.

Letters: B batch, N tokens of the text, M of the image, I images of a text, C texts of an image, D width, E the tower's
width, K classes, n arms.
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
from vtjax.models.fusion_layers import SITES, FusionHead, Marks, Pooler, PostLayer, RankHead, TextEmbed
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
      remat: "full" keeps only what enters each module for the backward pass, and of the tower; see `models.segments`.
    """

    spec: FusionSpec
    dtype: Any = jnp.float32
    constrain: Callable[[Array], Array] = identity
    remat: str = "none"

    def __post_init__(self) -> None:
        if self.remat not in ("none", "full"):
            raise InputError(f"remat of a fusion encoder must be none or full, found {self.remat!r}")
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
        params["embed"]["marks"] = Marks(spec, 0, self.dtype).init(next(keys), x, features)["params"]
        if spec.streams == 2:
            params["embed"]["marks"]["first"] = params["embed"]["text"]["tokens"][0]
        params |= self._init_modules(next(keys))
        pools = ("text", "image") if spec.streams == 2 else ("text",)
        pool_key = next(keys)
        params["pool"] = {
            name: self._pool.init(jax.random.fold_in(pool_key, i), x[:, 0])["params"] for i, name in enumerate(pools)
        }
        if spec.classes or spec.ranks:
            params["head"] = self._head.init(next(keys), jnp.zeros((1, spec.pooled), self.dtype))["params"]
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
        images: Float[Array | np.ndarray, "B *I H W C"],
        attention_mask: Mask | None = None,
        *,
        skip: Skip | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B K"], dict[str, Any]]:
        """Runs the model on texts and images.

        Args:
          params: as from `init`, jax or numpy arrays.
          input_ids: token ids; the first token is the text's summary.
          images: float32, already normalised, of the spec's size; `[B, I, H, W, C]` where a text has several.
          attention_mask: 1 for tokens, 0 for padding at the end; None = no padding.
          skip: `[n]`, which arms are skipped, for a spec where none is gone; None = none more than the spec says.
          key: for dropout in post-norm layers, equal for masked and removed modules; None = none.

        Returns:
          Float32 logits; of a model that ranks the score (K = 1); or the pooled vector where there is no head. aux as
          of `fuse`, of the last of several images but for `pooled`, which is all of theirs; of a model that ranks also
          `match` `[B, 2]`, logits of whether text and image belong together (1).

        Raises:
          InputError: ids, masks, images or a `skip` that do not fit.
        """
        if len(images) != len(input_ids):
            raise InputError(f"every text must have an image, found {len(input_ids)} texts and {len(images)} images")
        params, text, patches = self._embedded(params, input_ids, images, attention_mask, skip, key)
        return self._read(params, text, patches, attention_mask, skip, key)

    def rank(
        self,
        params: Params,
        input_ids: Int[Array | np.ndarray, "B C N"],
        images: Float[Array | np.ndarray, "B H W D"],
        attention_mask: Int[Array | np.ndarray, "B C N"] | None = None,
        *,
        skip: Skip | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B C"], Float[Array, "B C 2"]]:
        """Scores of several texts for each image, and whether they belong together, as `match` of `apply`; each image
        passes through the tower once. Arguments and errors as `apply` has them.

        Raises:
          InputError: a model that does not rank.
        """
        if not self.spec.ranks:
            raise InputError("texts are ranked by a model whose spec has ranks=True, found one without")
        rows, texts, length = input_ids.shape
        flat = None if attention_mask is None else attention_mask.reshape(-1, length)
        params, text, patches = self._embedded(params, input_ids.reshape(-1, length), images, flat, skip, key)
        score, aux = self._read(params, text, jnp.repeat(patches, texts, axis=0), flat, skip, key)
        return score.reshape(rows, texts), aux["match"].reshape(rows, texts, 2)

    def _embedded(
        self, params: Params, ids: Any, images: Any, mask: Any, skip: Any, key: Array | None
    ) -> tuple[Params, Array, Array]:
        """The parameters, the text `[B, N, D]` and the image tokens `[B, I, M, E]`, as they are before their types."""
        spec = self.spec
        check_ids(ids, spec.vocab)
        if ids.shape[1] > spec.positions:
            raise InputError(f"texts must have {spec.positions} tokens or fewer, found {ids.shape[1]}")
        if mask is not None:
            check_mask(mask)
        if spec.images > 1 and images.shape[1:2] != (spec.images,):
            raise InputError(f"images must be [B, {spec.images}, H, W, C], found {list(images.shape)}")
        pictures = images.reshape(-1, *images.shape[2:]) if spec.images > 1 else images
        ViT(spec.image).check_images(pictures)
        params, ids, pictures = jax.tree.map(jnp.asarray, (params, ids, pictures))
        text = call_module(TextEmbed(spec, self.dtype), params["embed"]["text"], ids)
        if spec.streams == 1:
            patches = call_module(Embed(spec.image, self.dtype), params["embed"]["image"], pictures)
        else:
            text = self.encode_text(params, text, mask, skip=skip, key=key)
            patches = self.tower.apply(params["tower"], pictures)[1]["features"].astype(self.dtype)
        return params, text, patches.reshape(-1, spec.images, *patches.shape[1:])

    def _read(
        self, params: Params, text: Array, patches: Array, mask: Any, skip: Any, key: Array | None
    ) -> tuple[Array, dict[str, Any]]:
        """What the head says of the text and its images, each of which is fused with it."""
        spec, pooled, aux = self.spec, [], {}
        for number in range(spec.images):
            inner = key if key is None or not number else jax.random.fold_in(key, spec.depth + number)
            marks = Marks(spec, number, self.dtype)
            x, y = call_module(marks, params["embed"]["marks"], text, patches[:, number])
            aux = self.fuse(params, x, y, mask, skip=skip, key=inner)
            pooled.append(aux["pooled"])
        aux["pooled"] = jnp.concatenate(pooled, axis=-1)
        if not (spec.classes or spec.ranks):
            return aux["pooled"].astype(jnp.float32), aux
        found = call_module(self._head, params["head"], aux["pooled"])
        if spec.ranks:
            found, aux["match"] = found
        return found, aux

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

            def either(x: Array, y: Array | None) -> Array:
                if index in spec.skips:
                    return skipped(x, y)
                if skip is None or index >= spec.arms:
                    return kept(x, y)
                found: Array = jax.lax.cond(skip[index], skipped, kept, x, y)
                return found

            found: Array = (either if self.remat == "none" else jax.checkpoint(either))(x, y)
            return self.constrain(found)

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
        return ViT(self.spec.image, dtype=self.dtype, constrain=self.constrain, remat=self.remat)

    @property
    def _norm(self) -> Norm:
        return Norm(self.spec.image.norm, self.spec.image.eps)

    @property
    def _pool(self) -> Pooler:
        return Pooler(self.dtype)

    @property
    def _head(self) -> FusionHead | RankHead:
        if self.spec.ranks:
            return RankHead(self.dtype)
        return FusionHead(2 * self.spec.width, self.spec.classes, self.dtype)
