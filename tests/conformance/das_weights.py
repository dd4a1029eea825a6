# SPDX-License-Identifier: Apache-2.0
"""The DAS release's parameter names and layouts as ours."""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from tests.conformance.arrays import Arrays

Params = dict[str, Any]

_METER = (
    (r"cross_modal_text_layers\.(\d+)\.", "text"),
    (r"cross_modal_image_layers\.(\d+)\.", "image"),
)
_LAYER = (
    (r"attention\.output\.adapter\.", "das/self/"),
    (r"crossattention\.output\.adapter\.", "das/cross/"),
    (r"adapter\.", "das/out/"),
    (r"attention\.self\.", "self/"),
    (r"attention\.output\.dense\.", "self/out."),
    (r"attention\.output\.LayerNorm\.", "norm1."),
    (r"crossattention\.self\.", "cross/"),
    (r"crossattention\.output\.dense\.", "cross/out."),
    (r"crossattention\.output\.LayerNorm\.", "norm2."),
    (r"intermediate\.dense\.", "mlp/up."),
    (r"output\.dense\.", "mlp/down."),
    (r"output\.LayerNorm\.", "norm3."),
)
_TOP = (
    (r"cross_modal_(text|image)_pooler\.", r"pool/\1/"),
    (r"pooler\.", "pool/text/"),
    (r"cross_modal_(text|image)_transform\.", r"embed/marks/\1."),
    (r"token_type_embeddings\.weight", "embed/marks/type"),
    (r"token4classifier", "embed/marks/first"),
    (r"(?:vqa|nlvr2)_classifier\.0\.", "head/up."),
    (r"(?:vqa|nlvr2)_classifier\.1\.", "head/norm."),
    (r"(?:vqa|nlvr2)_classifier\.3\.", "head/down."),
    (r"rank_output\.", "head/rank."),
    (r"itm_score\.", "itm."),
    (r"text_transformer\.", "encoder/"),
    (r"vit_model\.ln\.", "tower/norm."),
    (r"transformer\.norm\.", "norm."),
)
_ADAPTER = (("adapter_layer_norm_before", "norm"), ("down_proj", "down"), ("up_proj", "up"))


def meter_path(name: str, layers: int = 6) -> str:
    """Our path of a parameter of METER; `layers` fusion layers. Weights of norms are scales, others kernels."""
    norm = bool(re.search(r"LayerNorm|layer_norm|\.ln\.|classifier\.1\.|transformer\.norm", name))
    path, lead = name, ""
    for pattern, stream in _METER:
        if match := re.match(pattern, name):
            path, lead = name[match.end() :], f"block_{int(match[1]) + layers * (stream == 'image'):02d}/"
            path = _first(_LAYER, path)
    if match := re.match(r"adapter_list_([lv])\.(\d+)\.0\.", name):
        path, lead = f"das/skip/{name[match.end() :]}", f"block_{int(match[2]) + layers * (match[1] == 'v'):02d}/"
    if not lead:
        path = _first(_TOP, path)
    for theirs, ours in _ADAPTER:
        path = path.replace(theirs, ours)
    if path.startswith("das/"):
        path, lead = path.removeprefix("das/"), f"das/{lead}"
    path = re.sub(r"\.weight$", "/scale" if norm else "/kernel", path)
    return lead + path.replace(".", "/")


def _first(table: tuple[tuple[str, str], ...], name: str) -> str:
    for pattern, ours in table:
        if match := re.match(pattern, name):
            return match.expand(ours) + name[match.end() :]
    return name


def put(tree: Params, path: str, value: np.ndarray) -> None:
    """Sets a leaf; kernels are transposed from (out, in)."""
    *parents, leaf = path.split("/")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[leaf] = jnp.asarray(value.T if leaf == "kernel" else value)


def adapter(arrays: Arrays, at: str) -> Params:
    """Parameters of one adapter of any form."""
    return adapter_of({name: arrays[at + name] for name in arrays.names(at)})


def adapter_of(weights: dict[str, np.ndarray]) -> Params:
    """The same from names and arrays."""
    p: Params = {}
    names = {"conv_A": "down", "down_sampler": "down", "down_proj": "down", "down": "down", "expert_weights": "route"}
    names |= {"up_sampler": "up", "up_proj": "up", "up": "up", "conv_B": "up0", "conv_D": "up1"}
    for name, value in weights.items():
        module, _, leaf = name.rpartition(".")
        if not module:
            p[leaf] = jnp.asarray(value)
        elif module == "adapter_layer_norm_before":
            put(p, f"norm/{'scale' if leaf == 'weight' else 'bias'}", value)
        elif leaf == "bias":
            put(p, f"{names[module]}/bias", value)
        elif module in ("conv_B", "conv_D"):
            p.setdefault(names[module], {})["kernel"] = by_groups(value, weights["conv_A.weight"].shape[0])
        else:
            put(p, f"{names[module]}/kernel", value[..., 0] if value.ndim == 3 else value)
    return p


def by_groups(weight: np.ndarray, inputs: int) -> Any:
    """A grouped convolution's (out, in / groups, 1) as `[groups, in / groups, out / groups]`."""
    outputs, part, _ = weight.shape
    return jnp.asarray(weight[..., 0].reshape(inputs // part, outputs // (inputs // part), part).swapaxes(1, 2))


def vilt(weights: dict[str, np.ndarray]) -> Params:
    """Parameters of ViLT's blocks, norm, pooler and adapters."""
    tree: Params = {}
    for name, value in weights.items():
        if match := re.match(r"transformer\.blocks\.(\d+)\.(.*)", name):
            block, rest = f"block_{int(match[1]):02d}", match[2]
            if rest.startswith("adapter"):
                number, _, rest = rest.partition(".")
                site = {"adapter0": "attn", "adapter1": "mlp"}[number]
                put(
                    tree,
                    "/".join([f"das/{block}/{site}", *meter_path(f"adapter_list_l.0.0.{rest}").split("/")[3:]]),
                    value,
                )
                continue
            module, _, leaf = rest.rpartition(".")
            if module == "attn.qkv":
                for part, third in zip(("query", "key", "value"), np.split(value, 3), strict=True):
                    put(tree, f"{block}/attn/{part}/{'kernel' if leaf == 'weight' else 'bias'}", third)
                continue
            ours = {"attn.proj": "attn/out", "mlp.fc1": "mlp/up", "mlp.fc2": "mlp/down"}.get(module, module)
            kind = "scale" if module.startswith("norm") else "kernel"
            put(tree, f"{block}/{ours}/{kind if leaf == 'weight' else 'bias'}", value)
        elif match := re.match(r"adapter_list\.(\d+)\.0\.(.*)", name):
            put(tree, meter_path(f"adapter_list_l.{match[1]}.0.{match[2]}"), value)
        else:
            put(tree, meter_path(name), value)
    return tree


def llama_block(weights: dict[str, np.ndarray], heads: int) -> tuple[Params, Params]:
    """A LLaMA layer's parameters, and its adapters by our site. Rotated pairs (2i, 2i + 1) become (i, i + d / 2)."""
    p: Params = {}
    names = {"attention.wq": "attn/query", "attention.wk": "attn/key", "attention.wv": "attn/value"}
    names |= {"attention.wo": "attn/out", "feed_forward.w1": "mlp/gate", "feed_forward.w2": "mlp/down"}
    names |= {"feed_forward.w3": "mlp/up", "attention_norm": "norm1", "ffn_norm": "norm2"}
    own: dict[str, dict[str, np.ndarray]] = {}
    for name, value in weights.items():
        module, _, leaf = name.rpartition(".")
        if module.split(".")[0] in ("adapter_attn", "replaced_adapter"):
            which, _, inside = name.partition(".")
            own.setdefault({"adapter_attn": "attn_in", "replaced_adapter": "skip"}[which], {})[inside] = value
            continue
        if module in ("attention.wq", "attention.wk"):
            pairs = value.reshape(heads, -1, 2, value.shape[1])
            value = pairs.swapaxes(1, 2).reshape(value.shape)
        put(p, f"{names[module]}/{'scale' if module.endswith('norm') else 'kernel'}", value)
    return p, {site: adapter_of(found) for site, found in own.items()}
