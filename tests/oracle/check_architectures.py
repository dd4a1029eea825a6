# SPDX-License-Identifier: Apache-2.0
"""Compares `weights.timm.spec_from_name` with timm itself, for every timm architecture that it accepts.

Not a test: it needs timm (`python tests/oracle/check_architectures.py`, in an environment with torch and timm). Builds
each model on the meta device and compares names, shapes, epsilon, activation, heads and pooling.
Last run with timm 1.0.31: 110 architectures accepted, 0 differ.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.oracle import torchfix  # noqa: E402, F401, I001

import timm  # noqa: E402

from vtjax.errors import InputError  # noqa: E402
from vtjax.weights import names  # noqa: E402
from vtjax.weights import timm as ours  # noqa: E402

ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "swiglu"}
POOLS = {"token": "class", "avg": "mean", "map": "attention", "": "none"}


def main() -> int:
    accepted, wrong = 0, 0
    for name in timm.list_models(["vit_*", "deit*", "eva*"]):
        try:
            ours.arguments(name)
        except InputError:
            continue
        accepted += 1
        with torch.device("meta"):
            model = timm.create_model(name)
        spec = ours.spec_from_name(name, num_classes=model.num_classes, img_size=model.patch_embed.img_size[0])
        expected = names.foreign_shapes(spec, ours.table(spec))
        found = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        norm, act = model.blocks[0].norm1, type(model.blocks[0].mlp.act).__name__
        faults = [k for k in set(expected) | set(found) if expected.get(k) != found.get(k)][:3]
        for what, a, b in (
            ("eps", spec.eps, norm.eps),
            ("activation", spec.activation, ACTIVATIONS.get(act, act)),
            ("pooling", spec.pooling, POOLS[model.global_pool]),
            ("heads", spec.blocks[0].heads, model.blocks[0].attn.num_heads),
        ):
            faults += [f"{what}: {a} != {b}"] if a != b else []
        if faults:
            wrong += 1
            print(f"{name}: {faults}")
    print(f"timm {timm.__version__}: {accepted} architectures accepted, {wrong} differ")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
