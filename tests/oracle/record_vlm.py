# SPDX-License-Identifier: Apache-2.0
"""Records what transformers computes for tiny random multimodal models, and how many parameters published ones have.

Run by hand in an environment with torch and transformers (never a dependency of vtjax or of its tests):

    python tests/oracle/record_vlm.py

`vlm_llava.npz`: `input_ids` [B,N], `images` [I,H,W,3] in the order of the texts, `logits` [B,N,V], `config`, `versions`
and every weight under `w:` plus its name in the library's own file. Weights are random multiples of 1/64.
`vlm_mllama.npz`: the text model of Llama 3.2 Vision with one cross-attention layer: `input_ids`, `visual` [B,I,T,D],
`logits`, `config`, weights. Every text begins with an image: rows before one attend to everything evenly there.
`vlm_mllama_tiled.npz`: all of Llama 3.2 Vision, tiled tower and projector included, with every gate open: two images
in the first text (3 x 1 and 1 x 1 tiles), one in the second (2 x 2): `input_ids`, `images` [B,I,tiles,H,W,C],
`aspect_ratio` [B,I], `logits`.
`vlm_counts.json`: parameters of published models, built on the meta device from the configs below, by part.
"""

from __future__ import annotations

import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torchfix  # noqa: F401  before transformers

# isort: split

import numpy as np
import torch
import transformers
from record_lm import randomise
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, MllamaConfig
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.modeling_mllama import _prepare_cross_attention_mask
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

HERE = Path(__file__).resolve().parent
IMAGE = 31
VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4}
TEXT: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 64}


def save(name: str, model: Any, arrays: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        arrays["config"] = np.array((Path(folder) / "config.json").read_text())
        arrays |= {f"w:{n}": w.numpy() for n, w in load_file(Path(folder) / "model.safetensors").items()}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    path = HERE / f"vlm_{name}.npz"
    arrays["versions"] = np.array(json.dumps({**versions, "transformers": transformers.__version__}))
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {path.stat().st_size} bytes, logits of spread {arrays['logits'].std():.2f}")


def llava() -> None:
    """Two texts, the first with two images, the second with one."""
    generator = torch.Generator().manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), image_token_id=IMAGE
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    randomise(model, generator)
    ids = torch.randint(3, 30, (2, 14), generator=generator)
    for row, start in ((0, 1), (0, 7), (1, 3)):
        ids[row, start : start + 4] = IMAGE
    images = torch.round(torch.randn(3, 3, 8, 8, generator=generator) * 64) / 64
    with torch.inference_mode():
        logits = model(input_ids=ids, pixel_values=images).logits
    arrays = {"input_ids": ids.numpy().astype(np.int32), "images": images.permute(0, 2, 3, 1).numpy()}
    save("llava", model, {**arrays, "logits": logits.numpy()})


def mllama() -> None:
    """Runs of images: 1, 2 | 3 in the first text, 1 | 2 in the second, whose third image is padding."""
    generator = torch.Generator().manual_seed(1)
    config = MllamaTextConfig(**TEXT, cross_attention_layers=[1], rms_norm_eps=1e-5, pad_token_id=0)
    config._attn_implementation = "eager"
    model = transformers.MllamaForCausalLM(config).eval()
    randomise(model, generator)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("gate"):
                p.fill_(0.5)
    ids = torch.randint(3, 30, (2, 10), generator=generator)
    ids[0, [0, 1, 6]], ids[1, [0, 4]] = 32, 32
    visual = torch.round(torch.randn(2, 3, 5, 16, generator=generator) * 64) / 64
    sparse = [get_cross_attention_token_mask(row.tolist(), 32) for row in ids]
    dense = convert_sparse_cross_attention_mask_to_dense(sparse, [[1, 1, 1], [1, 1]], 1, 10)
    mask, rows = _prepare_cross_attention_mask(torch.tensor(dense), 5, torch.float32)
    with torch.inference_mode():
        logits = model(
            input_ids=ids,
            cross_attention_states=visual.reshape(2, 15, 16),
            cross_attention_mask=mask,
            full_text_row_masked_out_mask=rows,
        ).logits
    arrays = {"input_ids": ids.numpy().astype(np.int32), "visual": visual.numpy(), "logits": logits.numpy()}
    save("mllama", model, arrays)


def tiled() -> None:
    """Three images of three aspect ratios; the second text has one, and padding for another."""
    generator = torch.Generator().manual_seed(2)
    vision = MllamaVisionConfig(
        **{"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_global_layers": 2},
        **{"attention_heads": 2, "image_size": 8, "patch_size": 4, "intermediate_layers_indices": [0, 2]},
        vision_output_dim=24,
    )
    text = MllamaTextConfig(**TEXT, cross_attention_layers=[1], pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=32)
    config._attn_implementation = "eager"
    model = transformers.MllamaForConditionalGeneration(config).eval()
    randomise(model, generator)
    with torch.no_grad():
        for number, (name, p) in enumerate(model.named_parameters()):
            if "gate" in name.split(".")[-1]:
                p.fill_(0.25 + number % 5 / 8)
    ids = torch.randint(3, 30, (2, 9), generator=generator)
    ids[0, [0, 4]], ids[1, 0] = 32, 32
    supported = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
    ratio = torch.tensor([[7, 1], [6, 0]])
    tiles = [[supported[i - 1][0] * supported[i - 1][1] for i in row if i] for row in ratio.tolist()]
    live = torch.zeros(2, 2, 4, dtype=torch.long)
    live[:, :, 0] = 1  # as the processor does, for padding too
    for b, row in enumerate(tiles):
        for i, count in enumerate(row):
            live[b, i, :count] = 1
    images = torch.round(torch.randn(2, 2, 4, 3, 8, 8, generator=generator) * 8) / 8
    images *= live[:, :, :, None, None, None] * (ratio > 0)[:, :, None, None, None, None]
    sparse = [get_cross_attention_token_mask(row.tolist(), 32) for row in ids]
    dense = convert_sparse_cross_attention_mask_to_dense(sparse, tiles, 4, 9)
    with torch.inference_mode():
        logits = model(
            input_ids=ids,
            pixel_values=images,
            aspect_ratio_ids=ratio,
            aspect_ratio_mask=live,
            cross_attention_mask=torch.tensor(dense),
        ).logits
    arrays = {"input_ids": ids.numpy().astype(np.int32), "images": images.permute(0, 1, 2, 4, 5, 3).numpy()}
    arrays |= {"aspect_ratio": ratio.numpy().astype(np.int32), "logits": logits.numpy()}
    save("mllama_tiled", model, arrays)


def counts() -> None:
    """Parameters by part, on the meta device."""
    clip = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    vicuna = {
        "llava15_7b": LlamaConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5),
        "llava15_13b": LlamaConfig(
            vocab_size=32064,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            hidden_size=5120,
            intermediate_size=13824,
            num_hidden_layers=40,
            num_attention_heads=40,
        ),
    }
    out: dict[str, Any] = {"transformers": transformers.__version__}
    for name, text in vicuna.items():
        with torch.device("meta"):
            model = transformers.LlavaForConditionalGeneration(LlavaConfig(vision_config=clip, text_config=text))
        out[name] = parts(model)
    llama = MllamaConfig(
        vision_config=MllamaVisionConfig(image_size=560, intermediate_layers_indices=[3, 7, 15, 23, 30]),
        text_config=MllamaTextConfig(),
    )
    with torch.device("meta"):
        out["llama32_11b_vision"] = parts(transformers.MllamaForConditionalGeneration(llama))
    (HERE / "vlm_counts.json").write_text(json.dumps(out, indent=1) + "\n")
    print(out)


def parts(model: Any) -> dict[str, Any]:
    """Sums over what lies below `vision`, `projector`, `cross_attn` layers and the rest."""
    found = {"tower": 0, "projector": 0, "cross": 0, "decoder": 0}
    crossing = {n.split(".cross_attn")[0] for n, _ in model.named_parameters() if ".cross_attn." in n}
    for name, p in model.named_parameters():
        part = "tower" if "vision" in name else "projector" if "projector" in name else "decoder"
        if any(name.startswith(stem + ".") for stem in crossing):
            part = "cross"
        found[part] += p.numel()
    return {**found, "total": sum(found.values())}


if __name__ == "__main__":
    llava()
    mllama()
    tiled()
    counts()
