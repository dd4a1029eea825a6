# SPDX-License-Identifier: Apache-2.0
"""Records what timm's evaluation transform and torchvision's colour functions make of small images.

Writes tests/data/oracle_transforms.npz. Recorded with timm 1.0.31, torchvision 0.28.0, Pillow 13.0.0, numpy 2.4.6; the
versions used are stored in the file. Needs timm and torchvision; the tests need neither.
"""

from __future__ import annotations

import json
from pathlib import Path

import torchfix  # noqa: F401  before timm

# isort: split

import numpy as np
import PIL
import timm
import torchvision
from PIL import Image
from timm.data.transforms_factory import create_transform
from torchvision.transforms import functional

# Smooth and noisy parts, sides odd and even, upright and lying; one smaller than the targets.
SHAPES = {"tall": (53, 40), "wide": (41, 66), "small": (9, 12)}
CASES = [  # (image, target, crop, interpolation, squash)
    ("tall", (24, 24), 0.875, "bicubic", False),
    ("wide", (24, 24), 0.875, "bicubic", False),
    ("wide", (24, 24), 0.9, "bicubic", False),
    ("tall", (32, 32), 1.0, "bicubic", False),
    ("small", (24, 24), 0.875, "bicubic", False),
    ("wide", (21, 21), 0.95, "bilinear", False),
    ("tall", (16, 28), 0.875, "bicubic", False),
    ("wide", (28, 20), 0.8, "bicubic", False),
    ("wide", (41, 41), 1.0, "bicubic", False),
    ("wide", (24, 24), 1.0, "bicubic", True),
    ("tall", (21, 21), 0.9, "bilinear", True),
    ("small", (24, 24), 1.0, "bicubic", True),
    ("wide", (16, 28), 0.875, "bicubic", True),
]
COLOURS = [
    ("brightness", 1.3),
    ("contrast", 0.6),
    ("saturation", 1.7),
    ("hue", 0.1),
    ("hue", -0.25),
]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def image(shape: tuple[int, int], seed: int) -> np.ndarray:
    """uint8 [H, W, 3]: waves of another direction in each channel, noise in the left half."""
    height, width = shape
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 5 + seed), np.cos(y / 7), np.sin((x + y) / 6)], axis=-1)
    pixels = 128 + 110 * waves
    pixels[:, : width // 2] += rng.normal(0, 40, (height, width // 2, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def main() -> None:
    arrays: dict[str, np.ndarray] = {name: image(shape, i) for i, (name, shape) in enumerate(SHAPES.items())}
    for i, (name, size, crop, interpolation, squash) in enumerate(CASES):
        mode = "squash" if squash else "center"
        transform = create_transform(
            (3, *size), crop_pct=crop, crop_mode=mode, interpolation=interpolation, mean=MEAN, std=STD
        )
        arrays[f"evaluate_{i}"] = transform(Image.fromarray(arrays[name])).permute(1, 2, 0).numpy()
    for i, (kind, amount) in enumerate(COLOURS):
        adjusted = getattr(functional, f"adjust_{kind}")(Image.fromarray(arrays["tall"]), amount)
        arrays[f"colour_{i}"] = np.asarray(adjusted)
    versions = {m.__name__: m.__version__ for m in (timm, torchvision, PIL, np)}
    meta = {"versions": versions, "cases": CASES, "colours": COLOURS, "mean": MEAN, "std": STD}
    arrays["meta"] = np.array(json.dumps(meta))
    np.savez_compressed(Path(__file__).parent.parent / "data" / "oracle_transforms.npz", **arrays)


if __name__ == "__main__":
    main()
