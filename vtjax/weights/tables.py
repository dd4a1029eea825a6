# SPDX-License-Identifier: Apache-2.0
"""timm's, Hugging Face's and GGUF's parameter names beside ours, one table per model class.

A row says that some of our arrays, laid one after another along the foreign array's first axis, are one foreign array.
`weights.names` reads the tables in both directions.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Row:
    """One foreign array.

    Attributes:
      ours: our names, in the order in which they lie in the foreign array.
      foreign: its name; with a leading "/" the table's prefix is not put before it.
      kind: "same"; "linear" (transposed); "conv" (`[P*P*C, D]` <-> `[D, C, P, P]`); "lead" (one leading axis of 1);
        "token" (`[D]` <-> `[1, 1, D]`); "rows" (`[A, ...]` <-> `[A, product of the rest]`).
      needs: the row applies only where our tree has these names, too.
    """

    ours: tuple[str, ...]
    foreign: str
    kind: str = "same"
    needs: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """The names of one library's model class.

    Attributes:
      top, block: rows; those of `block` are relative to one block.
      stem: foreign name of block i, with `{}`.
      global_stem: of global block i of a tiled tower.
      prefixes: what may stand before every name (the class that holds the backbone); the first is written where
        there is a head.
      anchor: name of the patch embedding, by which prefix and table are found.
      marks: a file is of this table if one of its names contains one of these.
      ignored: foreign names that carry nothing we compute with (patterns over the name without prefix).
      fill: foreign names that must exist in the other library but mean nothing here; written as zeros `[1, D]`.
    """

    top: tuple[Row, ...]
    block: tuple[Row, ...]
    stem: str
    anchor: str
    prefixes: tuple[str, ...] = ("",)
    marks: tuple[str, ...] = ("",)
    ignored: tuple[str, ...] = ()
    fill: tuple[str, ...] = ()
    global_stem: str = ""


def _dense(ours: str, foreign: str, needs: str = "") -> tuple[Row, ...]:
    return (
        Row((f"{ours}/kernel",), f"{foreign}.weight", "linear", needs),
        Row((f"{ours}/bias",), f"{foreign}.bias", "same", needs),
    )


def _joined(ours: str, foreign: str, weight: str = ".weight", bias: str = ".bias") -> tuple[Row, ...]:
    names = ours.split()
    return (
        Row(tuple(f"{n}/kernel" for n in names), f"{foreign}{weight}", "linear"),
        Row(tuple(f"{n}/bias" for n in names), f"{foreign}{bias}"),
    )


def _norm(ours: str, foreign: str) -> tuple[Row, ...]:
    return Row((f"{ours}/scale",), f"{foreign}.weight"), Row((f"{ours}/bias",), f"{foreign}.bias")


def _patch(foreign: str) -> tuple[Row, ...]:
    return Row(("embed/patch/kernel",), f"{foreign}.weight", "conv"), Row(("embed/patch/bias",), f"{foreign}.bias")


_QKV = "attn/query attn/key attn/value"

_TIMM_TOP = (
    *_patch("patch_embed.proj"),
    Row(("embed/class_token",), "cls_token", "token"),
    Row(("embed/distill_token",), "dist_token", "token"),
    Row(("embed/registers",), "reg_token", "lead"),
    Row(("embed/pos",), "pos_embed", "lead"),
    *_norm("norm_before", "norm_pre"),
    *_norm("norm", "norm"),
    *_norm("fc_norm", "fc_norm"),
    Row(("pool/probe",), "attn_pool.latent", "token"),
    *_dense("pool/query", "attn_pool.q"),
    *_joined("pool/key pool/value", "attn_pool.kv"),
    *_dense("pool/out", "attn_pool.proj"),
    *_norm("pool/norm", "attn_pool.norm"),
    *_dense("pool/mlp/up", "attn_pool.mlp.fc1"),
    *_dense("pool/mlp/down", "attn_pool.mlp.fc2"),
    *_dense("head", "head"),
    *_dense("head_distill", "head_dist"),
)
_TIMM_BLOCK = (
    *_norm("norm1", "norm1"),
    *_norm("norm2", "norm2"),
    *_joined(_QKV, "attn.qkv"),
    *_norm("attn/query_norm", "attn.q_norm"),
    *_norm("attn/key_norm", "attn.k_norm"),
    *_dense("attn/out", "attn.proj"),
    *_joined("mlp/gate mlp/up", "mlp.fc1"),
    *_dense("mlp/up", "mlp.fc1"),
    *_norm("mlp/norm", "mlp.norm"),
    *_dense("mlp/down", "mlp.fc2"),
)
_TIMM_SCALES = (Row(("layer_scale1",), "ls1.gamma"), Row(("layer_scale2",), "ls2.gamma"))
# EVA: a query and a value bias, gammas without a module, and, where the hidden activations are normed, an unpacked
# SwiGLU. These rows go first: a row takes only what no earlier row took.
_EVA_BLOCK = (
    Row(("attn/query/bias",), "attn.q_bias"),
    Row(("attn/value/bias",), "attn.v_bias"),
    Row(("layer_scale1",), "gamma_1"),
    Row(("layer_scale2",), "gamma_2"),
    *_dense("mlp/gate", "mlp.fc1_g", needs="mlp/norm/scale"),
    *_dense("mlp/up", "mlp.fc1_x", needs="mlp/gate/kernel mlp/norm/scale"),
)
_EVA_SPLIT = (
    *_dense("attn/query", "attn.q_proj"),
    *_dense("attn/key", "attn.k_proj"),
    *_dense("attn/value", "attn.v_proj"),
)

_CLIP_BLOCK = (
    *_norm("norm1", "layer_norm1"),
    *_norm("norm2", "layer_norm2"),
    *_dense("attn/query", "self_attn.q_proj"),
    *_dense("attn/key", "self_attn.k_proj"),
    *_dense("attn/value", "self_attn.v_proj"),
    *_dense("attn/out", "self_attn.out_proj"),
    *_dense("mlp/up", "mlp.fc1"),
    *_dense("mlp/down", "mlp.fc2"),
)
_HF_TOP = (
    *_patch("embeddings.patch_embeddings.projection"),
    Row(("embed/class_token",), "embeddings.cls_token", "token"),
    Row(("embed/pos",), "embeddings.position_embeddings", "lead"),
    *_norm("norm", "layernorm"),
)
_HF_ATTENTION = (
    *_dense("attn/query", "attention.attention.query"),
    *_dense("attn/key", "attention.attention.key"),
    *_dense("attn/value", "attention.attention.value"),
    *_dense("attn/out", "attention.output.dense"),
)
_TEXT = (r"text_model\..*", r"text_projection\..*", r"logit_(scale|bias)", r"(.*\.)?position_ids")


def _decoder(norms: str, attention: str, mlp: str) -> tuple[Row, ...]:
    """The rows of a decoder block; the arguments are the library's names in our order."""
    norm1, norm2, query_norm, key_norm = norms.split()
    projections = zip(["query", "key", "value", "out"], attention.split(), strict=True)
    layers = zip(["gate", "up", "down"], mlp.split(), strict=True)
    return (
        *_norm("norm1", norm1),
        *_norm("norm2", norm2),
        *(row for ours, theirs in projections for row in _dense(f"attn/{ours}", theirs)),
        *_norm("attn/query_norm", query_norm),
        *_norm("attn/key_norm", key_norm),
        *(row for ours, theirs in layers for row in _dense(f"mlp/{ours}", theirs)),
    )


TABLES: dict[str, Table] = {
    "timm": Table(
        _TIMM_TOP,
        (*_TIMM_BLOCK, *_TIMM_SCALES),
        stem="blocks.{}",
        anchor="patch_embed.proj.weight",
    ),
    "timm_eva": Table(
        _TIMM_TOP,
        (*_EVA_BLOCK, *_TIMM_BLOCK),
        stem="blocks.{}",
        anchor="patch_embed.proj.weight",
        marks=(".attn.q_bias", ".gamma_1", ".fc1_g."),
        ignored=(r"blocks\.\d+\.attn\.k_bias",),
    ),
    "timm_eva_split": Table(
        _TIMM_TOP,
        (*_EVA_SPLIT, *_EVA_BLOCK, *_TIMM_BLOCK),
        stem="blocks.{}",
        anchor="patch_embed.proj.weight",
        marks=(".attn.q_proj.",),
    ),
    "hf_vit": Table(
        (
            *_HF_TOP,
            # DeiT's distillation token is a register where only the class token has a head.
            Row(("embed/distill_token",), "embeddings.distillation_token", "token"),
            Row(("embed/registers",), "embeddings.distillation_token", "lead"),
            *_dense("head", "/cls_classifier", needs="head_distill/kernel"),
            *_dense("head_distill", "/distillation_classifier"),
            *_dense("head", "/classifier"),
        ),
        (
            *_HF_ATTENTION,
            *_norm("norm1", "layernorm_before"),
            *_norm("norm2", "layernorm_after"),
            *_dense("mlp/up", "intermediate.dense"),
            *_dense("mlp/down", "output.dense"),
        ),
        stem="encoder.layer.{}",
        anchor="embeddings.patch_embeddings.projection.weight",
        prefixes=("vit.", "deit.", ""),
        marks=(".intermediate.dense.",),
        ignored=(r"pooler\.dense\.(weight|bias)", r"embeddings\.mask_token"),
    ),
    "hf_dinov2": Table(
        (*_HF_TOP, Row(("embed/registers",), "embeddings.register_tokens", "lead")),
        (
            *_HF_ATTENTION,
            *_norm("norm1", "norm1"),
            *_norm("norm2", "norm2"),
            Row(("layer_scale1",), "layer_scale1.lambda1"),
            Row(("layer_scale2",), "layer_scale2.lambda1"),
            *_joined("mlp/gate mlp/up", "mlp.weights_in"),
            *_dense("mlp/down", "mlp.weights_out", needs="mlp/gate/kernel"),
            *_dense("mlp/up", "mlp.fc1"),
            *_dense("mlp/down", "mlp.fc2"),
        ),
        stem="encoder.layer.{}",
        anchor="embeddings.patch_embeddings.projection.weight",
        prefixes=("dinov2.", "dinov2_with_registers.", ""),
        marks=(".layer_scale1.",),
        ignored=(r"embeddings\.mask_token",),
        fill=("embeddings.mask_token",),
    ),
    "hf_clip": Table(
        (
            *_patch("embeddings.patch_embedding"),
            Row(("embed/class_token",), "embeddings.class_embedding"),
            Row(("embed/pos",), "embeddings.position_embedding.weight"),
            *_norm("norm_before", "pre_layrnorm"),
            *_norm("norm", "post_layernorm"),
            *_dense("head", "/visual_projection"),
        ),
        _CLIP_BLOCK,
        stem="encoder.layers.{}",
        anchor="embeddings.patch_embedding.weight",
        prefixes=("vision_model.", ""),
        marks=("pre_layrnorm",),
        ignored=_TEXT,
    ),
    "hf_intern": Table(
        (
            *_patch("embeddings.patch_embedding"),
            Row(("embed/class_token",), "embeddings.class_embedding", "token"),
            Row(("embed/pos",), "embeddings.position_embedding", "lead"),
        ),
        (*_TIMM_BLOCK, Row(("layer_scale1",), "ls1"), Row(("layer_scale2",), "ls2")),
        stem="encoder.layers.{}",
        anchor="embeddings.patch_embedding.weight",
        prefixes=("", "vision_model."),
        marks=(".attn.qkv.",),
        ignored=(r"language_model\..*", r"mlp1\..*"),
    ),
    "hf_siglip": Table(
        (
            *_patch("embeddings.patch_embedding"),
            Row(("embed/pos",), "embeddings.position_embedding.weight"),
            *_norm("norm", "post_layernorm"),
            Row(("pool/probe",), "head.probe", "token"),
            *_joined("pool/query pool/key pool/value", "head.attention.in_proj", "_weight", "_bias"),
            *_dense("pool/out", "head.attention.out_proj"),
            *_norm("pool/norm", "head.layernorm"),
            *_dense("pool/mlp/up", "head.mlp.fc1"),
            *_dense("pool/mlp/down", "head.mlp.fc2"),
        ),
        _CLIP_BLOCK,
        stem="encoder.layers.{}",
        anchor="embeddings.patch_embedding.weight",
        prefixes=("vision_model.", ""),
        marks=("post_layernorm",),
        ignored=_TEXT,
    ),
    "hf_mllama": Table(
        (
            *_patch("patch_embedding"),
            Row(("embed/class_token",), "class_embedding"),
            Row(("embed/pos",), "gated_positional_embedding.embedding"),
            Row(("embed/pos_gate",), "gated_positional_embedding.gate"),
            Row(("embed/tile_pos",), "gated_positional_embedding.tile_embedding.weight", "rows"),
            Row(("embed/tiles/table",), "pre_tile_positional_embedding.embedding.weight", "rows"),
            Row(("embed/tiles/gate",), "pre_tile_positional_embedding.gate"),
            *_norm("norm_before", "layernorm_pre"),
            *_norm("norm", "layernorm_post"),
            Row(("tiles/table",), "post_tile_positional_embedding.embedding.weight", "rows"),
            Row(("tiles/gate",), "post_tile_positional_embedding.gate"),
        ),
        (
            *_norm("norm1", "input_layernorm"),
            *_norm("norm2", "post_attention_layernorm"),
            *_dense("attn/query", "self_attn.q_proj"),
            *_dense("attn/key", "self_attn.k_proj"),
            *_dense("attn/value", "self_attn.v_proj"),
            *_dense("attn/out", "self_attn.o_proj"),
            *_dense("mlp/up", "mlp.fc1"),
            *_dense("mlp/down", "mlp.fc2"),
            Row(("gate1",), "gate_attn"),
            Row(("gate2",), "gate_ffn"),
        ),
        stem="transformer.layers.{}",
        global_stem="global_transformer.layers.{}",
        anchor="patch_embedding.weight",
        prefixes=("", "vision_model."),
        marks=("global_transformer.",),
    ),
    "hf_decoder": Table(
        (
            Row(("embed/tokens",), "embed_tokens.weight"),
            *_norm("norm", "norm"),
            Row(("head/kernel",), "/lm_head.weight", "linear"),
        ),
        _decoder(
            "input_layernorm post_attention_layernorm self_attn.q_norm self_attn.k_norm",
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj",
            "mlp.gate_proj mlp.up_proj mlp.down_proj",
        ),
        stem="layers.{}",
        anchor="embed_tokens.weight",
        prefixes=("model.", ""),
        # A tied head is written twice by some releases.
        ignored=(r"lm_head\.weight", r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
    ),
    "gguf": Table(
        (
            Row(("embed/tokens",), "token_embd.weight"),
            *_norm("norm", "output_norm"),
            Row(("head/kernel",), "output.weight", "linear"),
        ),
        _decoder(
            "attn_norm ffn_norm attn_q_norm attn_k_norm",
            "attn_q attn_k attn_v attn_output",
            "ffn_gate ffn_up ffn_down",
        ),
        stem="blk.{}",
        anchor="token_embd.weight",
        ignored=(r"rope_freqs\.weight",),
    ),
}
