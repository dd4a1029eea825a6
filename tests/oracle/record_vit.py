# SPDX-License-Identifier: Apache-2.0
"""Records what timm and transformers compute for tiny random models of every family: tests/oracle/vit_*.npz.

Run by hand in an environment with torch, timm and transformers (never a dependency of vtjax or of its tests):

    python tests/oracle/record_vit.py

Each file holds `images` [B,H,W,3], `logits`, `features` (so it serves `vtjax convert --check` as it is), `config` (the
JSON of the model's folder), `versions`, and every weight under `w:` plus its name in the library's own file. Weights
are random multiples of 1/64, which compress well; norms, biases, scales and positions are far from their initial
values.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from tests.oracle import torchfix  # noqa: E402, F401, I001

import timm  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from timm.layers import resample_abs_pos_embed  # noqa: E402

VERSIONS = json.dumps(
    {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "transformers": transformers.__version__,
    }
)
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
GRAIN = 64

# file name -> (architecture, model_args)
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "timm_vit": ("vit_tiny_patch16_224", {**TINY, "num_classes": 5}),
    "timm_vit_mean": ("vit_tiny_patch16_224", {**TINY, "img_size": [24, 40], "num_classes": 5, "global_pool": "avg"}),
    "timm_deit_distilled": ("deit_tiny_distilled_patch16_224", {**TINY, "num_classes": 5}),
    "timm_dinov2": ("vit_small_patch14_dinov2", {**TINY, "num_classes": 0}),
    "timm_dinov2_reg4": ("vit_small_patch14_reg4_dinov2", {**TINY, "num_classes": 0}),
    "timm_dinov2_swiglu": ("vit_giant_patch14_dinov2", {**TINY, "mlp_ratio": 3.0, "num_classes": 0}),
    "timm_clip": ("vit_base_patch32_clip_quickgelu_224", {**TINY, "num_classes": 7}),
    "timm_siglip": ("vit_base_patch32_siglip_256", {**TINY, "num_classes": 0}),
    "timm_qk_norm": ("vit_tiny_patch16_224", {**TINY, "num_classes": 5, "qk_norm": True, "qkv_bias": False}),
    "timm_eva_post": ("eva02_enormous_patch14_clip_224", {**TINY, "num_classes": 7}),
    "timm_eva_split": (
        "eva_giant_patch14_224",
        {**TINY, "num_classes": 5, "qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "init_values": 0.1},
    ),
}
HF_TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
HF_MLP = {**HF_TINY, "intermediate_size": 32}
# file name -> (model class, config class, arguments)
HF: dict[str, tuple[str, str, dict[str, Any]]] = {
    "hf_vit": ("ViTForImageClassification", "ViTConfig", {**HF_MLP, "num_labels": 5}),
    "hf_vit_backbone": ("ViTModel", "ViTConfig", {**HF_MLP, "image_size": [24, 40]}),
    "hf_deit": ("DeiTForImageClassification", "DeiTConfig", {**HF_MLP, "num_labels": 5}),
    "hf_deit_distilled": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {**HF_MLP, "num_labels": 5}),
    "hf_dinov2": ("Dinov2Model", "Dinov2Config", {**HF_TINY, "mlp_ratio": 2}),
    "hf_dinov2_reg4": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {**HF_TINY, "mlp_ratio": 2}),
    "hf_dinov2_swiglu": ("Dinov2Model", "Dinov2Config", {**HF_TINY, "mlp_ratio": 2, "use_swiglu_ffn": True}),
    "hf_clip": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**HF_MLP, "projection_dim": 7}),
    "hf_siglip": ("SiglipVisionModel", "SiglipVisionConfig", HF_MLP),
}


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Random multiples of 1/GRAIN, of a size by which every parameter matters."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            scale_like = any(part in name for part in ("norm", "gamma", "lambda", "ls1", "ls2"))
            if p.ndim == 1 and scale_like and not name.endswith("bias"):
                value = 1 + 0.3 * noise
            elif p.ndim == 1 or "token" in name or "pos" in name or "probe" in name or "latent" in name:
                value = 0.3 * noise
            else:
                value = noise / math.sqrt(p[0].numel())
            p.copy_(torch.round(value * GRAIN) / GRAIN)


def images(size: int | list[int] | tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.round(torch.randn(2, 3, height, width, generator=generator) * 8) / 8


def write(name: str, x: torch.Tensor, logits: torch.Tensor, features: torch.Tensor, config: Any, weights: Any) -> None:
    arrays = {
        "images": x.permute(0, 2, 3, 1).contiguous().numpy(),
        "logits": logits.numpy(),
        "features": features.numpy(),
        "config": np.array(json.dumps(config)),
        "versions": np.array(VERSIONS),
        **{f"w:{k}": v.numpy() for k, v in weights.items()},
    }
    path = HERE / f"vit_{name}.npz"
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB, logits up to {np.abs(arrays['logits']).max():.2f}")


def record_timm(name: str, architecture: str, args: dict[str, Any], generator: torch.Generator) -> None:
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in args.items()}
    model = timm.create_model(architecture, **given).eval()
    randomise(model, generator)
    x = images(args["img_size"], generator)
    cfg = model.pretrained_cfg
    config = {
        "architecture": architecture,
        "num_classes": args["num_classes"],
        "model_args": args,
        "pretrained_cfg": {
            k: cfg[k] for k in ("input_size", "crop_pct", "interpolation", "mean", "std", "num_classes")
        },
    }
    write(name, x, model(x), model.forward_features(x), config, model.state_dict())


def record_hf(name: str, model_class: str, config_class: str, args: dict[str, Any], generator: torch.Generator) -> None:
    config = getattr(transformers, config_class)(**args, attn_implementation="eager")
    model = getattr(transformers, model_class)(config).eval()
    randomise(model, generator)
    x = images(args["image_size"], generator)
    out = model(x, output_hidden_states=True)
    backbone = getattr(model, model.base_model_prefix, model)
    if model_class.startswith("CLIP"):
        features, logits = model.vision_model.post_layernorm(out.last_hidden_state), out.image_embeds
    elif "Classification" in model_class:
        features, logits = backbone(x).last_hidden_state, out.logits
    elif model_class == "ViTModel":
        features, logits = out.last_hidden_state, out.last_hidden_state[:, 0]
    else:
        features, logits = out.last_hidden_state, out.pooler_output
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = json.loads((Path(folder) / "config.json").read_text())
        weights = load_file(Path(folder) / "model.safetensors")
    write(name, x, logits, features, saved, weights)


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class InternBlock(nn.Module):
    """RMSNorm, normed queries and keys over all heads, LayerScale: the equations of InternViT-6B, its names."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attn = nn.ModuleDict(
            {
                "qkv": nn.Linear(width, 3 * width, bias=False),
                "q_norm": RMSNorm(width),
                "k_norm": RMSNorm(width),
                "proj": nn.Linear(width, width),
            }
        )
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.ls1, self.ls2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).chunk(3, -1)
        q, k = self.attn["q_norm"](q), self.attn["k_norm"](k)
        q, k, v = (a.unflatten(-1, (self.heads, -1)).transpose(1, 2) for a in (q, k, v))
        scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + self.ls1 * self.attn["proj"]((scores @ v).transpose(1, 2).flatten(2))
        return x + self.ls2 * self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class InternViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.zeros(1, 1, 16))
        self.embeddings.patch_embedding = nn.Conv2d(3, 16, 8, 8)
        self.embeddings.position_embedding = nn.Parameter(torch.zeros(1, 17, 16))
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(InternBlock(16, 2, 32) for _ in range(2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        e = self.embeddings
        x = e.patch_embedding(images).flatten(2).transpose(1, 2)
        x = torch.cat([e.class_embedding.expand(len(x), -1, -1), x], 1) + e.position_embedding
        for layer in self.encoder.layers:
            x = layer(x)
        return x


def record_intern(generator: torch.Generator) -> None:
    model = InternViT().eval()
    randomise(model, generator)
    x = images(32, generator)
    features = model(x)
    config = {"model_type": "intern_vit_6b", **HF_MLP, "num_channels": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
    config |= {"qkv_bias": False, "qk_normalization": True, "norm_type": "rms_norm", "initializer_factor": 0.1}
    write("intern", x, features[:, 0], features, config, model.state_dict())


def record_resampling(generator: torch.Generator) -> None:
    """Position embeddings of a 3x5 and a 7x7 grid at other sizes, by both conventions."""
    arrays: dict[str, np.ndarray] = {"versions": np.array(VERSIONS)}
    for old, prefix in (((3, 5), 2), ((7, 7), 1)):
        pos = torch.randn(1, prefix + old[0] * old[1], 3, generator=generator)
        arrays[f"pos:{old[0]}x{old[1]}:{prefix}"] = pos[0].numpy()
        for new in ((7, 7), (3, 5), (4, 9), (2, 2), (14, 11), (1, 3)):
            label = f"{old[0]}x{old[1]}:{new[0]}x{new[1]}"
            resampled = resample_abs_pos_embed(pos, list(new), list(old), num_prefix_tokens=prefix)
            arrays[f"timm:{label}"] = resampled[0].numpy()
            grid = pos[:, prefix:].reshape(1, *old, 3).permute(0, 3, 1, 2)
            grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
            plain = torch.cat([pos[:, :prefix], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)
            arrays[f"hf:{label}"] = plain[0].numpy()
    np.savez_compressed(HERE / "resample.npz", **arrays)


def main() -> None:
    print(VERSIONS)
    torch.manual_seed(0)
    with torch.no_grad():
        for number, (name, (architecture, args)) in enumerate(TIMM.items()):
            record_timm(name, architecture, args, torch.Generator().manual_seed(number))
        for number, (name, (model_class, config_class, args)) in enumerate(HF.items(), start=100):
            record_hf(name, model_class, config_class, args, torch.Generator().manual_seed(number))
        record_intern(torch.Generator().manual_seed(200))
        record_resampling(torch.Generator().manual_seed(300))


if __name__ == "__main__":
    main()
