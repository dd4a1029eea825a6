# SPDX-License-Identifier: Apache-2.0
"""Hugging Face language models: `config.json` to `LMSpec`, and back. Facts are those of transformers 5.24."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vtjax.errors import InputError, check_choice
from vtjax.spec import LMSpec, RopeScaling

TABLE = "hf_decoder"

# Defaults of fields that a config may leave out.
_COMMON: dict[str, Any] = {
    **{"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10_000.0},
    **{"attention_bias": False, "mlp_bias": False, "use_sliding_window": False, "max_position_embeddings": 32768},
}
_QWEN: dict[str, Any] = {
    **{"vocab_size": 151936, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32},
    **{"num_key_value_heads": 32, "intermediate_size": 22016},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        **_COMMON,
        **{"max_position_embeddings": 2048, "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "intermediate_size": 11008, "eos_token_id": 2},
    },
    "qwen2": {**_COMMON, **_QWEN},
    "qwen3": {**_COMMON, **_QWEN, "head_dim": 128},
}
"""By `model_type`. LLaVA's published folders leave out of `text_config` all that is a default."""


def spec_from_config(config: Mapping[str, Any], where: str, generation: Mapping[str, Any] | None = None) -> LMSpec:
    """The spec of a Hugging Face folder.

    Args:
      config: `config.json`, of a `model_type` in `FAMILIES`.
      where: the folder, for error lines.
      generation: `generation_config.json`, whose end tokens go before those of the config.

    Raises:
      InputError: a setting that an LMSpec cannot describe, by name.
    """
    kind = config["model_type"]
    get = {**FAMILIES[kind], **{k: v for k, v in config.items() if v is not None}}
    check_choice(f"{where}: hidden_act", get["hidden_act"], ("silu",))
    if get["use_sliding_window"]:
        raise InputError(f"{where}: use_sliding_window=True (attention over a window) cannot be described by an LMSpec")
    rope, scaling = _rope(get, where)
    # Written out as null it means none; left out, the family's.
    eos = {**FAMILIES[kind], **config, **(generation or {})}.get("eos_token_id")
    heads = int(get["num_attention_heads"])
    return LMSpec.uniform(
        depth=int(get["num_hidden_layers"]),
        width=int(get["hidden_size"]),
        heads=heads,
        kv_heads=int(get.get("num_key_value_heads", heads)),
        head_dim=int(get["head_dim"]) if "head_dim" in get else None,
        mlp=int(get["intermediate_size"]),
        vocab=int(get["vocab_size"]),
        context=int(get["max_position_embeddings"]),
        eps=float(get["rms_norm_eps"]),
        rope_base=rope,
        rope_scaling=scaling,
        qkv_bias=kind == "qwen2" or bool(get["attention_bias"]),
        out_bias=kind != "qwen2" and bool(get["attention_bias"]),
        mlp_bias=kind == "llama" and bool(get["mlp_bias"]),
        qk_norm="head" if kind == "qwen3" else "none",
        tied=bool(get["tie_word_embeddings"]),
        eos=[eos] if isinstance(eos, int) else list(eos or ()),
    )


def _rope(get: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling: in `rope_parameters` since transformers 5, before that in `rope_theta` and `rope_scaling`."""
    given = get.get("rope_parameters") or get.get("rope_scaling") or {}
    base = float(given.get("rope_theta", get["rope_theta"]))
    kind = given.get("rope_type", given.get("type", "default"))
    check_choice(f"{where}: rope_type", kind, ("default", "linear", "llama3"))
    if kind == "default":
        return base, None
    if kind == "linear":
        return base, RopeScaling("linear", float(given["factor"]))
    low, high, context = (
        given[name] for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    return base, RopeScaling("llama3", float(given["factor"]), float(low), float(high), int(context))


def config(spec: LMSpec) -> dict[str, Any]:
    """The `config.json` from which transformers rebuilds the model.

    Raises:
      InputError: a field of the spec that none of llama, qwen2, qwen3 can express.
    """
    kind, name = ("qwen3", "Qwen3") if spec.qk_norm == "head" else ("llama", "Llama")
    if spec.qkv_bias and not spec.out_bias:
        kind, name = "qwen2", "Qwen2"
    block, scaling = spec.blocks[0], spec.rope_scaling
    rope: dict[str, Any] = {"rope_theta": spec.rope_base, "rope_type": scaling.kind if scaling else "default"}
    if scaling is not None:
        rope["factor"] = scaling.factor
        if scaling.kind == "llama3":
            rope |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
            rope["original_max_position_embeddings"] = scaling.context
    out: dict[str, Any] = {
        **{"architectures": [f"{name}ForCausalLM"], "model_type": kind, "dtype": "float32", "vocab_size": spec.vocab},
        **{"hidden_size": spec.width, "num_hidden_layers": spec.depth, "num_attention_heads": block.heads},
        **{"num_key_value_heads": block.kv_heads, "head_dim": block.head_dim, "intermediate_size": block.mlp},
        **{"hidden_act": "silu", "max_position_embeddings": spec.context, "rms_norm_eps": spec.eps},
        # rope_theta and rope_scaling are where releases before 5 look.
        **{"rope_parameters": rope, "rope_theta": spec.rope_base, "rope_scaling": rope if scaling else None},
        **{"attention_bias": spec.qkv_bias and spec.out_bias, "mlp_bias": spec.mlp_bias},
        **{"tie_word_embeddings": spec.tied, "eos_token_id": list(spec.eos) or None},
    }
    # What transformers would build from this, compared with what is to be written.
    rebuilt = spec_from_config(json.loads(json.dumps(out)), "the Hugging Face config")
    faults = rebuilt.edit(lineage=spec.lineage).diff(spec)
    if faults:
        field, (theirs, wanted) = next(iter(faults.items()))
        raise InputError(f"a Hugging Face {kind} config cannot express {field}={wanted!r} (it would give {theirs!r})")
    return out
