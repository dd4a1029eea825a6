# SPDX-License-Identifier: Apache-2.0
"""Replays stacks of the DAS release in which some layers are skipped."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.conformance.arrays import Arrays
from tests.conformance.das_weights import llama_block, meter_path, put, vilt
from vtjax.methods import das
from vtjax.models import LM, adapters, segments
from vtjax.models.fusion import Fusion
from vtjax.models.segments import block_name
from vtjax.ops.tokens import Tokens
from vtjax.spec import AdapterSpec, FusionSpec, LMSpec, ViTSpec


def cases(arrays: Arrays, at: str) -> list[str]:
    """The numbered selections, of which there are as many as the file says."""
    found = [f"{at}{name}/" for name in arrays.children(at) if name.isdigit()]
    arrays.compare(at + "n_select", len(found), "exact")
    return found


def weights_of(arrays: Arrays, at: str) -> dict[str, np.ndarray]:
    return {name: arrays[f"{at}w/{name}"] for name in arrays.names(f"{at}w/")}


def fusion_spec(streams: int, depth: int, cfg: np.ndarray, shapes: tuple[int, ...]) -> FusionSpec:
    """From `cfg` only the heads; everything else is the weights'."""
    width, mlp, inner, skip = shapes
    heads = int(cfg[1])
    adapter = AdapterSpec("bottleneck", inner, norm="in")
    block = {"heads": heads, "head_dim": width // heads, "mlp": mlp}
    image = ViTSpec.uniform(depth=1, width=width, heads=heads, image_size=2, patch=1, pooling="none")
    return FusionSpec.small(
        streams,
        depth=depth,
        width=width,
        heads=heads,
        blocks=[block] * (streams * depth),
        image=image,
        inner=adapter,
        skip=adapter.edit(width=skip),
        encoder_skip=None,
    )


def two_streams(arrays: Arrays, at: str) -> None:
    """METER's fusion layers: outputs, and the norms of all adapters' gradients."""
    weights = weights_of(arrays, at)
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("cross_modal_text_layers."))
    params: dict[str, Any] = {}
    for name, value in weights.items():
        put(params, meter_path(name, layers), value)
    first = params["das"]["block_00"]
    width, mlp = params["block_00"]["mlp"]["up"]["kernel"].shape
    shapes = (width, mlp, first["self"]["down"]["kernel"].shape[1], first["skip"]["down"]["kernel"].shape[1])
    cfg = arrays[at + "cfg"]
    arrays.compare(at + "cfg", [width, cfg[1], *shapes[1:]], "exact")
    spec = fusion_spec(2, layers, cfg, shapes)
    x, y, mask = jnp.asarray(arrays[at + "x0"]), jnp.asarray(arrays[at + "y0"]), arrays[at + "text_mask"]

    if at + "layer0_text_out" in arrays:
        pair = {block_name(i): params[block_name(i * layers)] for i in (0, 1)}
        own = {block_name(i): params["das"][block_name(i * layers)] for i in (0, 1)}
        one = Fusion(fusion_spec(2, 1, cfg, shapes))
        found = one.fuse({**params, **pair, "das": own}, x, y, mask)
        arrays.compare(at + "layer0_text_out", found["text"], "logits")

    model = Fusion(spec)
    masked = jax.jit(lambda params, skip: model.fuse(params, x, y, mask, skip=skip))

    def total(own: Any, skip: Any, cotangent: Any) -> Any:
        return (model.fuse(params | {"das": own}, x, y, mask, skip=skip)["pooled"] * cotangent).sum()

    gradient = jax.jit(jax.grad(total))
    for here in cases(arrays, at):
        skip = selected(arrays, here, spec.arms)
        for name, half in (("skip_flag_l", skip[:layers]), ("skip_flag_v", skip[layers:])):
            arrays.compare(here + name, np.where(half, 1.0, -1.0), "exact")
        after, kept = das.remove(spec, params, np.flatnonzero(skip))
        for found in (masked(params, skip), Fusion(after).fuse(kept, x, y, mask)):
            compare_streams(arrays, here, found)
        grads = gradient(params["das"], skip, arrays[here + "cot"])
        norms = []
        for name in arrays[here + "adapter_grad_names"]:
            leaf = grads
            for part in meter_path(str(name), layers).split("/")[1:]:
                leaf = leaf[part]
            norms.append(float(jnp.linalg.norm(leaf)))
        recorded = arrays[here + "adapter_grad_norms"]
        # -1: there is no path, so ours has to be 0, not only small.
        norms = [-1.0 if r == -1 and n == 0 else n for r, n in zip(recorded, norms, strict=True)]
        arrays.compare(here + "adapter_grad_norms", norms, "grad_norm")


def single_stream(arrays: Arrays, at: str) -> None:
    """ViLT's blocks."""
    params = vilt(weights_of(arrays, at))
    depth = sum(name.startswith("block_") for name in params)
    first = params["das"]["block_00"]
    width, mlp = params["block_00"]["mlp"]["up"]["kernel"].shape
    shapes = (width, mlp, first["attn"]["down"]["kernel"].shape[1], first["skip"]["down"]["kernel"].shape[1])
    cfg = arrays[at + "cfg"]
    arrays.compare(at + "cfg", [width, cfg[1], *shapes[1:]], "exact")
    spec = fusion_spec(1, depth, cfg, shapes)
    inputs = [jnp.asarray(arrays[at + name]) for name in ("text", "image", "text_mask", "image_mask")]
    model = Fusion(spec)
    masked = jax.jit(lambda params, skip: model.fuse(params, *inputs, skip=skip))
    for here in cases(arrays, at):
        skip = selected(arrays, here, spec.arms)
        after, kept = das.remove(spec, params, np.flatnonzero(skip))
        for found in (masked(params, skip), Fusion(after).fuse(kept, *inputs)):
            compare_streams(arrays, here, found)


def compare_streams(arrays: Arrays, here: str, found: Any) -> None:
    for name, ours in (("text_feats", "text"), ("image_feats", "image"), ("cls_feats", "pooled")):
        arrays.compare(here + name, found[ours], "logits")


def selected(arrays: Arrays, here: str, arms: int) -> np.ndarray:
    """`[arms]` bool from the list of skipped ones."""
    skip = np.zeros(arms, bool)
    skip[arrays[here + "select"]] = True
    return skip


def decoder(arrays: Arrays, at: str) -> None:
    """LLaMA's layers with LaVIN's or plain adapters."""
    weights = weights_of(arrays, at)
    cfg = arrays[at + "cfg"]
    heads, found = int(cfg[1]), {}
    depth = 1 + max(int(name.split(".")[1]) for name in weights)
    for layer in range(depth):
        lead = f"layers.{layer}."
        own = {name.removeprefix(lead): value for name, value in weights.items() if name.startswith(lead)}
        found[layer] = llama_block(own, heads)
    width, mlp = found[0][0]["mlp"]["up"]["kernel"].shape
    context = int(cfg[3])
    arrays.compare(at + "cfg", [width, heads, depth, context], "exact")
    style = adapters.STYLES["lavin" if "route" in found[0][1]["skip"] else "llama"]
    style = adapters.Style(
        style.inner.edit(width=found[0][1]["attn_in"]["down"]["kernel"].shape[1]),
        style.sites,
        style.skip.edit(width=found[0][1]["skip"]["down"]["kernel"].shape[1]),
        normed=True,
    )
    spec = LMSpec.uniform(depth=depth, width=width, heads=heads, mlp=mlp, vocab=1, eps=1e-5, context=context)
    params: dict[str, Any] = {block_name(layer): p for layer, (p, _) in found.items()}
    params["das"] = {
        block_name(layer): own | {"skip": own["skip"] | {"norm_in": p["norm1"]}} for layer, (p, own) in found.items()
    }
    x = jnp.asarray(arrays[at + "h0"])
    b, n = x.shape[:2]
    place = jnp.broadcast_to(jnp.arange(n), (b, n))
    tokens = Tokens(x, position=place, segment=segment_of(arrays, at, n, place))
    for here in cases(arrays, at):
        after, kept = das.remove(spec, params, arrays[here + "select"])
        blocks = LM(after, adapters=adapters.attach(after, style, eps=spec.eps)).blocks()
        out, _ = segments.run(blocks, kept, tokens, knobs=segments.method_knobs(kept))
        arrays.compare(here + "out", out.x, "logits")


def segment_of(arrays: Arrays, at: str, n: int, place: Any) -> Any:
    """Plain causal attention; or, where no later row sees the first slot, that slot as a text of its own."""
    mask, causal = arrays[at + "mask"], np.where(np.tril(np.ones((n, n))), 0.0, -np.inf)
    barred = causal.copy()
    barred[1:, 0] = -np.inf
    alone = mask.shape[-2:] == barred.shape and n > 1 and mask[0, 0, 1, 0] < 0
    arrays.compare(at + "mask", (barred if alone else causal)[None, None], "exact")
    return jnp.where(place == 0, 1, 2) if alone else None
