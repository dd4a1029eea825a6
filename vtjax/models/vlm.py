# SPDX-License-Identifier: Apache-2.0
"""The multimodal language model of a `VLMSpec`: a ViT and an LM around a bridge.

Visual tokens either take the place of placeholders in the text, or are what the text's cross-attention reads.
Letters: B batch, I images of a sample, t tiles of an image, T visual tokens of an image, N tokens of the text, E visual
width, D width of the decoder, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vtjax.errors import InputError
from vtjax.models import generate as generate_lib
from vtjax.models.bridge import Frames, Projector, pooled
from vtjax.models.layers import Adapter, Knobs, Reducer, identity
from vtjax.models.lm import LM, Ids, Mask, Params, check_ids, counted
from vtjax.models.segments import block_name, call_module
from vtjax.models.tiled import TiledViT, check_tiles
from vtjax.models.vit import ViT
from vtjax.ops import cross_attention, splice, token_reduction
from vtjax.ops.cross_attention import Attend, Memory
from vtjax.ops.tokens import Lattice
from vtjax.spec import TiledViTSpec, VLMSpec, is_backbone

Images = (
    Float[Array | np.ndarray, "B H W C"]
    | Float[Array | np.ndarray, "B I H W C"]
    | Float[Array | np.ndarray, "B I t H W C"]
)
Ratio = Int[Array | np.ndarray, "B I"]
ImageMask = Int[Array | np.ndarray, "B I"] | Bool[Array | np.ndarray, "B I"]
Numbers = Int[Array | np.ndarray, "B I"]
Intervals = Int[Array | np.ndarray, "B N 2"]


@dataclasses.dataclass(frozen=True)
class VLM:
    """A buildable model. Hashable, so it may be a static argument.

    Attributes:
      spec: what to build.
      dtype: compute dtype of all parts; parameters stay float32.
      remat, scan: see `models.segments`; of tower and decoder.
      attention: of the decoder, see `LM`.
      reducers, adapters: of the decoder, see `LM`.
      tower_reducers, tower_adapters: of the tower, see `ViT`; a tiled one has neither. Where each visual token has its
        placeholder, the grid is restored (`ops.token_reduction.unmerge`): a merged patch copies its holder, and the
        placeholder of a pruned one is dead. Cross-attention reads what is left; where a reducer of the decoder works on
        the grid, it is restored there (`Memory.holder`).
      constrain: applied to activations `[B,N,D]`; sharding is injected here.
      attend: attention to visual tokens, `ops.cross_attention.attend` or a distributed form of it.
      frames: how images go through the tower; where they lie on devices of their own, sharding is injected here.

    Raises:
      InputError: what `ViT`, `TiledViT` and `LM` refuse; a tower that reduces its tokens where its prefix has
        placeholders, too.
    """

    spec: VLMSpec
    dtype: Any = jnp.float32
    remat: str = "none"
    scan: bool = False
    attention: str = "auto"
    reducers: tuple[tuple[int, Reducer], ...] = ()
    adapters: tuple[tuple[int, str, Adapter], ...] = ()
    tower_reducers: tuple[tuple[int, Reducer], ...] = ()
    tower_adapters: tuple[tuple[int, str, Adapter], ...] = ()
    constrain: Callable[[Array], Array] = identity
    attend: Attend = cross_attention.attend
    frames: Frames = Frames()

    def __post_init__(self) -> None:
        if not isinstance(self.spec, VLMSpec):
            raise InputError(f"a VLM is built from a VLMSpec, found {type(self.spec).__name__}")
        self.tower.blocks()
        if self.tower_reducers and self.spec.bridge.cross is None and self.spec.bridge.prefix:
            raise InputError("a tower that drops tokens gives its patches back, found a bridge with prefix=True")
        layers = () if self.spec.bridge.cross is None else self.spec.bridge.cross.layers
        # Cross-attention knows the rows of the text by their slots.
        shorten = [layer for layer, reducer in self.reducers if not getattr(reducer, "keeps_slots", False)]
        if layers and shorten and min(shorten) < max(layers):
            raise InputError(
                f"a reducer of the decoder must come after its last cross-attention, which knows the rows of the text, "
                f"at layer {max(layers)}, found one after layer {min(shorten)}"
            )
        self.lm.blocks()

    @property
    def tower(self) -> ViT | TiledViT:
        """The tower up to the tokens that are taken: what comes after them is not computed."""
        spec = self.spec.tower
        if isinstance(spec, TiledViTSpec):
            if self.tower_reducers or self.tower_adapters:
                raise InputError("a tiled tower takes no reducers and adapters, found some")
            return TiledViT(spec, self.dtype, self.remat, self.scan, self.frames.constrain)
        last = spec.depth if spec.feature_layer is None else spec.feature_layer % spec.depth + 1
        used = dataclasses.replace(
            spec,
            blocks=spec.blocks[:last],
            norm_after=spec.norm_after and spec.feature_layer is None,
            fc_norm=False,
            pooling="none",
            classes=0,
            feature_layer=None,
        )
        return ViT(
            used,
            dtype=self.dtype,
            remat=self.remat,
            scan=self.scan,
            reducers=tuple(r for r in self.tower_reducers if r[0] < last),
            adapters=tuple(a for a in self.tower_adapters if a[0] < last),
            constrain=self.frames.constrain,
        )

    @property
    def lm(self) -> LM:
        """The decoder, with the bridge's cross-attention in it; its parameters are `decoder_params`."""
        return LM(
            self.spec.decoder,
            dtype=self.dtype,
            remat=self.remat,
            scan=self.scan,
            attention=self.attention,
            reducers=self.reducers,
            adapters=self.adapters,
            constrain=self.constrain,
            cross=self.spec.bridge.cross,
            attend=self.attend,
        )

    def init(self, key: Array) -> Params:
        """Fresh float32 parameters `tower`, `bridge`, `decoder`; jit it."""
        spec, (tower, bridge, decoder) = self.spec, jax.random.split(key, 3)
        # The whole tower, as a file of it has it.
        model = TiledViT(spec.tower) if isinstance(spec.tower, TiledViTSpec) else ViT(spec.tower)
        whole = model.init(tower)
        text = self.lm.init(decoder, spec.visual_width)
        layers = () if spec.bridge.cross is None else spec.bridge.cross.layers
        crossing: Params = {block_name(i): text[block_name(i)].pop("cross") for i in layers}
        projector: Params = {}
        if spec.bridge.projector != "none":
            visual = jnp.zeros((1, 1, spec.tower_width), self.dtype)
            projector = {"projector": self._projector.init(bridge, visual)["params"]}
        text = {name: tree for name, tree in text.items() if tree}
        if spec.adds_router_token:
            projector["router_token"] = 0.02 * jax.random.normal(jax.random.fold_in(bridge, 1), (spec.decoder.width,))
        return {"tower": whole, "bridge": {**projector, **crossing}, "decoder": text}

    def apply(
        self,
        params: Params,
        input_ids: Ids,
        images: Images | None = None,
        attention_mask: Mask | None = None,
        *,
        image_mask: ImageMask | None = None,
        aspect_ratio: Ratio | None = None,
        positions: Ids | None = None,
        segments: Ids | None = None,
        knobs: Knobs | None = None,
        want: tuple[str, ...] = (),
        slots: Int[Array | np.ndarray, "B M"] | None = None,
        image_number: Numbers | None = None,
        image_interval: Intervals | None = None,
    ) -> tuple[Float[Array, "B M V"], dict[str, Any]]:
        """Runs the model over whole texts with their images.

        Args:
          params: as from `init` or `vtjax.load` (jax or numpy arrays). Parameters of methods are beside the part that
            they act in (`params["decoder"]["<method>"]`).
          input_ids: token ids, with `spec.placeholders` tokens `spec.image_token` for each image, in the order of the
            images.
          images: float32, already normalised, of the tower's size; one per sample, or I of them; None = none. For a
            tiled tower also `[B, I, t, H, W, C]`, as `data.tiles` makes them.
          attention_mask, positions, segments, knobs, want, slots: as in `LM.apply`; they belong to the decoder.
          image_mask: 1 for images, 0 for what fills samples with fewer up, after them; None = all are images, or where
            there are aspect ratios, those with one.
          aspect_ratio: number of each image's canvas (`TiledViTSpec.aspect_ratios`, from 1; 0 = no image). Tiles that
            an image lacks are not read by the text. None = one tile each.
          image_number: with cross-attention, which placeholder of its text each image belongs to, from 1; 0 fills
            samples up. In place of `image_mask`: images may come in any order, and many frames may share a placeholder.
          image_interval: (first, last) placeholder whose images each row of the text sees; None = as the spec says.

        Returns:
          logits: float32, of the wanted slots, or of every slot of the text; padding's mean nothing.
          aux: as of `LM.apply`, and with images `visual [B, I * T, E]`, what the tower and the projector made of them,
            of as many tiles as are given (and of `frames`' filling); and `tower`, of a tower with reducers, one dict
            per layer with its `decisions`, whose samples are the images as `frames.join` orders them.

        Raises:
          InputError: what `LM.apply` refuses; images of another size; placeholders that do not fit the images (where
            the values are known, which they are not inside `jit`).
        """
        entered, seen = self.enter(
            params, input_ids, images, image_mask, attention_mask, positions, aspect_ratio, segments, image_number,
            image_interval,
        )  # fmt: skip
        text = {"attention_mask": attention_mask, "positions": positions, "segments": segments, **entered}
        y, aux = self.lm.apply(self.decoder_params(params), knobs=knobs, want=want, slots=slots, **text)
        return y, {**aux, **seen}

    def generate(
        self,
        params: Params,
        input_ids: Ids,
        images: Images | None = None,
        attention_mask: Mask | None = None,
        *,
        image_mask: ImageMask | None = None,
        aspect_ratio: Ratio | None = None,
        image_number: Numbers | None = None,
        image_interval: Intervals | None = None,
        new_tokens: int,
        **options: Any,
    ) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
        """Continues prompts with images, over a cache; jitted. `options` as in `models.generate.generate`.

        Returns:
          The new tokens, and how many of them are the text's, as there.

        Raises:
          InputError: as `apply` and `models.generate.generate`.
        """
        self.check(input_ids, images, image_mask, aspect_ratio, image_number, image_interval)
        given: tuple[Any, ...] = (jnp.asarray(input_ids), images, image_mask, attention_mask)
        given += (options.get("positions"), aspect_ratio, None, image_number, image_interval)
        options = {"attention_mask": attention_mask, "new_tokens": new_tokens, **options}
        entered = _entered(self, params, *given)
        return generate_lib.generate(self.lm, self.decoder_params(params), **{**options, **entered})

    def decoder_params(self, params: Params) -> Params:
        """The decoder's parameters with the bridge's cross-attention in the blocks, where `LM` looks for it."""
        tree = dict(params["decoder"])
        for layer in () if self.spec.bridge.cross is None else self.spec.bridge.cross.layers:
            name = block_name(layer)
            tree[name] = {**tree.get(name, {}), "cross": params["bridge"][name]}
        return tree

    def look(
        self, params: Params, images: Images, aspect_ratio: Ratio | None = None
    ) -> tuple[Float[Array, "B M E"], Int[Array, "B I T"], dict[str, Any]]:
        """What tower and projector make of the images (and aspect ratios) as `apply` takes them: visual tokens, image
        by image, M = I * T, and 1 where they live (0 where the tower dropped them, or an image lacks the tile). I is
        what `frames` fills up to; of tiles those count that are given. And of a tower with reducers `layers`, what they
        tell, and `holder [B, M]` where cross-attention reads what they left and a reducer of the decoder the grid."""
        spec = self.spec
        many = images[:, None] if images.ndim == 4 else images
        flat = self.frames.join(jnp.asarray(many))
        ratio = () if aspect_ratio is None else (self.frames.join(jnp.asarray(aspect_ratio)),)
        _, aux = self.tower.apply(self._tower_params(params["tower"]), flat, *ratio)
        x, alive = aux["features"], aux["tokens"].alive
        side: dict[str, Any] = {"layers": aux["blocks"]} if self.tower_reducers else {}
        if self.tower_reducers and (spec.bridge.cross is None or spec.bridge.pool != (1, 1)):
            whole, known = token_reduction.unmerge(aux["tokens"].replace(x=x), spec.tower.grid, spec.tower.prefix)
            x, live = whole.reshape(len(x), -1, x.shape[-1]), known.reshape(len(x), -1).astype(jnp.int32)
        else:
            live = jnp.ones(x.shape[:2], jnp.int32) if alive is None else (alive > 0.5).astype(jnp.int32)
            tiles = flat.shape[1] if flat.ndim == 5 else 1
            if tiles < spec.tiles:
                # What fills an image up to all tiles is read by nobody: it is not projected either.
                x, live = (a[:, : a.shape[1] // spec.tiles * tiles] for a in (x, live))
            if not spec.bridge.prefix:
                x, live = self._without_prefix(x, tiles), self._without_prefix(live, tiles)
            if self.tower_reducers and any(hasattr(reducer, "grid") for _, reducer in self.reducers):
                source = token_reduction.filled(aux["tokens"])[2][:, spec.tower.prefix :]
                side["holder"] = jnp.where(source < 0, -1, source - spec.tower.prefix)
        if spec.bridge.pool != (1, 1):
            x, live = pooled(x, live, spec.tower.grid, spec.bridge.pool)
        if spec.bridge.projector != "none":
            x = call_module(self._projector, jax.tree.map(jnp.asarray, params["bridge"]["projector"]), x)
        x, live = (self.frames.split(a, len(many)) for a in (x, live))
        if "holder" in side:
            side["holder"] = self.frames.split(side["holder"], len(many)).reshape(len(many), -1)
        lie = self.frames.visual or self.constrain
        return lie(x.reshape(len(many), -1, x.shape[-1])), live, side

    def enter(
        self,
        params: Params,
        input_ids: Ids,
        images: Images | None,
        image_mask: ImageMask | None = None,
        attention_mask: Mask | None = None,
        positions: Ids | None = None,
        aspect_ratio: Ratio | None = None,
        segments: Ids | None = None,
        image_number: Numbers | None = None,
        image_interval: Intervals | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `LM.apply` takes of text and images (`embeddings`, `memory`, `lattice`; and `attention_mask` or
        `segments` anew where the tower pruned patches), and what `apply` tells of the images.

        Raises:
          InputError: as `apply`.
        """
        self.check(input_ids, images, image_mask, aspect_ratio, image_number, image_interval)
        spec = self.spec
        placeholder = jnp.asarray(input_ids) == spec.image_token
        # What stands for an image, or asks, may be a number that the decoder does not have.
        ids = jnp.where(placeholder, jnp.minimum(spec.image_token, spec.decoder.ids - 1), input_ids)
        asks = None
        if spec.router_token >= 0:
            asks = jnp.asarray(input_ids) == spec.router_token
        own = asks if spec.adds_router_token else None
        x = self.lm.embed(params["decoder"], ids if own is None else jnp.where(own, 0, ids))
        if own is not None:
            x = jnp.where(own[..., None], jnp.asarray(params["bridge"]["router_token"]).astype(x.dtype), x)
        cross = spec.bridge.cross
        known: dict[str, Any] = {"embeddings": x}
        if asks is not None:
            place = jnp.where(placeholder, (jnp.cumsum(placeholder, axis=1) - 1) % spec.visual_tokens, -1)
            halved = jnp.zeros((len(x), 2), jnp.int32)
            known["lattice"] = Lattice(place if cross is None else jnp.full_like(place, -1), asks, halved)
        if images is None:
            return known, {}
        visual, live, side = self.look(params, images, aspect_ratio)
        seen = {"visual": visual, **({"tower": side["layers"]} if self.tower_reducers else {})}
        count = 1 if images.ndim == 4 else images.shape[1]
        if cross is None:
            filling = live.shape[1] - count
            visual = visual[:, : visual.shape[1] // live.shape[1] * count] if filling else visual
            live = live[:, :count].reshape(len(live), -1)
            known["embeddings"] = splice.splice(x, placeholder, visual)
            if self.tower_reducers:
                place = jnp.maximum(jnp.cumsum(placeholder, axis=1) - 1, 0)
                there = jnp.take_along_axis(live, place, axis=1) | ~placeholder
                if segments is not None:
                    known["segments"] = jnp.where(there, jnp.asarray(segments), -1)
                else:
                    mask = 1 if attention_mask is None else jnp.asarray(attention_mask)
                    known["attention_mask"] = there.astype(jnp.int32) * mask
            return known, {**seen, "visual": visual}
        if segments is not None:
            placeholder = self._shared(placeholder, segments)
        if image_number is None:
            every = jnp.broadcast_to(jnp.arange(1, count + 1, dtype=jnp.int32), (len(visual), count))
            image_number = every if image_mask is None else every * jnp.asarray(image_mask, jnp.int32)
        number = jnp.pad(jnp.asarray(image_number, jnp.int32), ((0, 0), (0, live.shape[1] - count)))
        low, high = cross_attention.interval(placeholder, cross.sees)
        if image_interval is not None:
            low, high = jnp.moveaxis(jnp.asarray(image_interval, jnp.int32), -1, 0)
        place = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]) if positions is None else jnp.asarray(positions)
        if positions is None and attention_mask is not None:
            place = counted(jnp.asarray(attention_mask, jnp.int32))
        place = jnp.take_along_axis(place, splice.places(placeholder, count), axis=1).astype(jnp.int32)
        place = jnp.take_along_axis(place, jnp.maximum(number - 1, 0), axis=1)

        def each(a: Array) -> Array:
            """What is known of an image, for its tokens."""
            return jnp.broadcast_to(a[:, :, None], live.shape).reshape(visual.shape[:2])

        memory = Memory(
            x=visual,
            number=each(number) * live.reshape(visual.shape[:2]),
            position=each(place),
            low=low,
            high=high,
            holder=side.get("holder"),
        )
        return {**known, "memory": memory}, seen

    @staticmethod
    def _shared(placeholder: Array, segments: Any) -> Array:
        """Placeholders of packed texts, which cross-attention knows in the prefix that all of them see."""
        own = placeholder & (jnp.asarray(segments) > 0)
        if not isinstance(own, jax.core.Tracer) and bool(own.any()):
            raise InputError(
                "packed texts must have their images in the shared prefix (segment 0), found one behind it"
            )
        return placeholder & ~own

    def check(
        self,
        input_ids: Any,
        images: Any,
        image_mask: Any = None,
        aspect_ratio: Any = None,
        image_number: Any = None,
        image_interval: Any = None,
    ) -> None:
        """Raises InputError for ids, images and placeholders that do not fit each other, as far as they are known."""
        spec = self.spec
        check_ids(input_ids, max(spec.decoder.ids, spec.image_token + 1, spec.router_token + 1))
        size = (*spec.image_size, spec.tower.channels)
        count, tiled = 0, isinstance(spec.tower, TiledViTSpec)
        if aspect_ratio is not None and (not tiled or images is None):
            raise InputError("aspect_ratio belongs to images of a tiled tower, found it without")
        if images is not None:
            known = images.ndim in ((4, 5, 6) if tiled else (4, 5)) and len(images) == len(input_ids)
            if not known or tuple(images.shape[-3:]) != size:
                raise InputError(
                    f"images must be [{len(input_ids)}, {', '.join(map(str, size))}], or several of them per text, "
                    f"found {list(images.shape)}"
                )
            if not jnp.issubdtype(images.dtype, jnp.floating):
                raise InputError(
                    f"images must be floating, normalised as spec.preprocess says (vtjax.answer.inputs makes them), "
                    f"found {images.dtype}"
                )
            count = 1 if images.ndim == 4 else images.shape[1]
            if isinstance(spec.tower, TiledViTSpec):
                tiles = images.shape[2] if images.ndim == 6 else 1
                check_tiles(spec.tower, (len(images), count, tiles, *size), aspect_ratio)
        if image_interval is not None:
            wanted = [*input_ids.shape, 2]
            if spec.bridge.cross is None or list(image_interval.shape) != wanted:
                raise InputError(
                    f"image_interval must be {wanted}, for a bridge with cross-attention, found "
                    f"{list(image_interval.shape)}"
                )
        if image_number is not None:
            if spec.bridge.cross is None or image_mask is not None:
                raise InputError("image_number takes the place of image_mask for a bridge with cross-attention")
            if tuple(image_number.shape) != (len(input_ids), count):
                raise InputError(f"image_number must be {[len(input_ids), count]}, found {list(image_number.shape)}")
        elif image_mask is None and aspect_ratio is not None:
            image_mask = aspect_ratio > 0
        if image_mask is not None and tuple(image_mask.shape) != (len(input_ids), count):
            raise InputError(f"image_mask must be {[len(input_ids), count]}, found {list(image_mask.shape)}")
        if any(isinstance(given, jax.core.Tracer) for given in (input_ids, image_mask, image_number)):
            return
        ids = np.asarray(input_ids)
        if (other := ids[(ids >= spec.decoder.ids) & (ids != spec.image_token) & (ids != spec.router_token)]).size:
            raise InputError(f"input_ids must be in 0..{spec.decoder.ids - 1} (the vocabulary), found {other[0]}")
        if image_mask is not None and (other := np.setdiff1d(np.asarray(image_mask), (0, 1))).size:
            raise InputError(f"image_mask must be 0 or 1, found {other[0]}")
        given = np.full(len(ids), count) if image_mask is None else np.asarray(image_mask).astype(int).sum(1)
        if image_number is not None:
            given = np.maximum(np.asarray(image_number).max(1, initial=0), 0)
        if image_mask is not None and (np.diff(np.asarray(image_mask).astype(int), axis=1) > 0).any():
            raise InputError("image_mask must hold the images of a sample before what fills it up, found another order")
        found = (ids == spec.image_token).sum(1)
        if (wrong := np.flatnonzero(found != given * spec.placeholders)).size:
            row = wrong[0]
            raise InputError(
                f"text {row} must hold {spec.placeholders} placeholders (token {spec.image_token}) for each of its "
                f"{given[row]} images, found {found[row]}"
            )
        if any(getattr(reducer, "reads", "") == "router_token" for _, reducer in self.reducers):
            self._check_routing(ids, given)

    def _check_routing(self, ids: np.ndarray, given: np.ndarray) -> None:
        spec = self.spec
        for row in np.flatnonzero(given):
            images, asks = (np.flatnonzero(ids[row] == token) for token in (spec.image_token, spec.router_token))
            runs = images.reshape(given[row], -1)
            if (np.diff(runs, axis=1) != 1).any():
                raise InputError(f"the placeholders of an image must follow each other, found a gap in text {row}")
            if not len(asks) or asks[-1] < images[-1]:
                raise InputError(
                    f"text {row} must hold the router token ({spec.router_token}) behind its images, found none"
                )

    def _tower_params(self, params: Params) -> Params:
        """The tower's, of whose methods (thresholds, one per layer) the layers that are not computed have no part."""
        depth, used = self.spec.tower.depth, self.tower.spec.depth
        if used == depth:
            return params

        def cut(a: Any) -> Any:
            return a[:used] if jnp.ndim(a) and len(a) == depth else a

        return {name: tree if is_backbone(name) else jax.tree.map(cut, tree) for name, tree in params.items()}

    def _without_prefix(self, a: Array, tiles: int) -> Array:
        """`[B, N, ...]` without the tokens of each tile that are not patches."""
        by_tile = a.reshape(len(a), tiles, -1, *a.shape[2:])[:, :, self.spec.tower.prefix :]
        return by_tile.reshape(len(a), -1, *a.shape[2:])

    @property
    def _projector(self) -> Projector:
        return Projector(self.spec.bridge, self.spec.decoder.width, self.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _entered(model: VLM, params: Params, ids: Array, images: Any, *more: Any) -> Mapping[str, Any]:
    return model.enter(params, ids, images, *more)[0]
