# SPDX-License-Identifier: Apache-2.0
"""PyTorch's side of `beside_tome.py`: timm's ViT, dense or with ToMe's merging at fixed rates, applied off the shelf.

Runs under another interpreter and sleeps while another side measures. Reads one JSON request per line from standard
input and answers with one line. Imports nothing of vtjax.

ToMe (Bolya et al. 2023): between attention and MLP the tokens are split by parity, every even one proposes to the most
similar odd one (cosine of the keys' mean over heads), and the r most similar pairs become their size-weighted means.
The class token, which is even, proposes to nobody. Keys of larger tokens get more attention, by the log of their size.

This is the fastest of what was tried, on one core at r = 13, ViT-Ti and ViT-S, batches 1 to 16; minima, on a machine
that did other work. The whole forward pass differs by at most 6 % between them, at batch 1 by less than the noise.
  attention: fused, with the log-sizes as its mask. Written-out softmax takes 10.3 instead of 7.5 ms per block of ViT-Ti
    at batch 16;
  merging: rows picked and added over the flattened batch. gather and scatter_add along the tokens take 3.1 instead of
    0.2 ms per block there, a product with one-hot rows 2.8 ms;
  images: as timm has them. Channels-last order is within 10 % of one patch embedding, slower or faster by batch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "vit"))
from torch_worker import Worker, serve  # noqa: E402


def attend(attention: Any, x: torch.Tensor, size: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """timm's attention with log-sizes; the output `[B, N, D]` and the keys' mean over heads `[B, N, d]`."""
    batch, count, width = x.shape
    qkv = attention.qkv(x).view(batch, count, 3, attention.num_heads, attention.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    bias = None if size is None else size.log()[:, None, None, :]
    y = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return attention.proj(y.transpose(1, 2).reshape(batch, count, width)), k.mean(1)


def match(metric: torch.Tensor, rate: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions `[B, .]` in their half: even tokens that stay, in order; those that merge; the odd ones they go to."""
    unit = functional.normalize(metric, dim=-1)
    cosine = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    cosine[:, 0] = -math.inf
    best, partner = cosine.max(-1)
    order = best.argsort(-1, descending=True)
    merged = order[:, :rate]
    return order[:, rate:].sort(-1).values, merged, partner.gather(1, merged)


def merge(
    x: torch.Tensor, size: torch.Tensor | None, metric: torch.Tensor, rate: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `[B, N - rate, D]` and their sizes: even tokens that stay, then the odd ones. Absent sizes are 1."""
    batch, count, width = x.shape
    stay, merged, into = match(metric, rate)
    left = count - rate
    size = x.new_ones(batch, count) if size is None else size
    image = torch.arange(batch)[:, None]
    odd = torch.arange(1, count, 2).expand(batch, -1)
    picked = (torch.cat([2 * stay, odd], 1) + image * count).flatten()
    source = (2 * merged + image * count).flatten()
    target = (into + stay.shape[1] + image * left).flatten()

    rows, sizes = x.reshape(-1, width), size.flatten()
    new_sizes, extra = sizes.index_select(0, picked), sizes.index_select(0, source)
    joined = rows.index_select(0, picked).mul_(new_sizes[:, None])
    joined.index_add_(0, target, rows.index_select(0, source).mul_(extra[:, None]))
    new_sizes.index_add_(0, target, extra)
    joined.div_(new_sizes[:, None])
    return joined.view(batch, left, width), new_sizes.view(batch, left)


class Merging(torch.nn.Module):
    """A timm ViT that merges `rates[l]` tokens in block l, at most half of the patch tokens."""

    def __init__(self, model: Any, rates: Sequence[int]):
        super().__init__()
        self.vit, self.rates = model, tuple(rates)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        vit, size = self.vit, None
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        for block, rate in zip(vit.blocks, self.rates, strict=True):
            y, metric = attend(block.attn, block.norm1(x), size)
            x = x + block.ls1(y)
            rate = min(rate, (x.shape[1] - 1) // 2)
            if rate:
                x, size = merge(x, size, metric, rate)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return vit.forward_head(vit.norm(x))


class Tome(Worker):
    """One model and one batch, dense or with merging."""

    def load(
        self, model: str, weights: str, rates: list[int], batch: int, images: str, compile: bool = False
    ) -> dict[str, Any]:
        """Builds the model, dense where `rates` is empty, and reads the images, float32 `[B, H, W, 3]`."""
        import safetensors.torch
        import timm

        timm.layers.set_fused_attn(True)
        built = timm.create_model(model, pretrained=False)
        built.load_state_dict(safetensors.torch.load_file(weights))
        if not built.blocks[0].attn.fused_attn:
            raise RuntimeError("timm did not take the fused attention")
        if rates and len(rates) != len(built.blocks):
            raise ValueError(f"rates must hold one number per block, {len(built.blocks)}, found {len(rates)}")
        model = Merging(built, rates) if rates else built
        self.model = torch.compile(model, dynamic=False) if compile else model
        pixels = np.load(images)
        if len(pixels) != batch:
            raise ValueError(f"{images} must hold {batch} images, found {len(pixels)}")
        self.images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
        return {}


if __name__ == "__main__":
    serve(Tome)
