# SPDX-License-Identifier: Apache-2.0
"""Records what transformers' processor of Llama 3.2 Vision makes of small images, and of the sizes of large ones.

Writes tests/data/oracle_tiles.npz: `ratio` and `pixels:NAME` (uint8, before normalisation, existing tiles only) per
image, whose source is `source:NAME`; `normalised`, all tiles of "small"; `mean_std`. And `sizes` [S, 6]: height, width,
canvas rows and columns (in tiles of 560 pixels, 4 of them), fitted height and width.
Needs transformers and Pillow; the tests need only Pillow.
"""

from __future__ import annotations

import json
from pathlib import Path

import torchfix  # noqa: F401  before transformers

# isort: split

import numpy as np
import PIL
import transformers
from PIL import Image
from record_transforms import image
from transformers.models.mllama import image_processing_pil_mllama as mllama

TILE, TILES = 12, 4
SHAPES = {"tall": (53, 20), "wide": (17, 66), "small": (9, 7), "square": (40, 40), "strip": (3, 90), "exact": (12, 24)}


def main() -> None:
    processor = mllama.MllamaImageProcessorPil(size={"height": TILE, "width": TILE}, max_image_tiles=TILES)
    arrays, ratio = {}, []
    for seed, (name, shape) in enumerate(SHAPES.items()):
        arrays[f"source:{name}"] = image(shape, seed)
        made = processor([[Image.fromarray(arrays[f"source:{name}"])]], return_tensors="np")
        ratio.append(int(made["aspect_ratio_ids"][0, 0]))
        # Multiples of 1/255 after normalisation: kept as the integers that they were.
        pixels = np.transpose(made["pixel_values"][0, 0], (0, 2, 3, 1))
        mean, std = np.array(processor.image_mean), np.array(processor.image_std)
        if name == "small":
            arrays["normalised"] = pixels
        arrays[f"pixels:{name}"] = np.round((pixels[: made["num_tiles"][0][0]] * std + mean) * 255).astype(np.uint8)
    rng = np.random.default_rng(0)
    sizes = [(560, 560), (1, 1), (1, 5000), (5000, 1), (559, 561), (1120, 1120), (2240, 560), (560, 1121), (700, 1681)]
    sizes += [tuple(map(int, rng.integers(1, 3000, 2))) for _ in range(60)]
    rows = []
    for height, width in sizes:
        canvas = mllama.get_optimal_tiled_canvas(height, width, TILES, 560)
        fitted = mllama.get_image_size_fit_to_canvas(height, width, *canvas, 560)
        rows.append([height, width, canvas[0] // 560, canvas[1] // 560, *fitted])
    arrays |= {"ratio": np.array(ratio, np.int32), "sizes": np.array(rows, np.int32)}
    arrays["mean_std"] = np.array([processor.image_mean, processor.image_std])
    versions = {"transformers": transformers.__version__, "Pillow": PIL.__version__}
    arrays["versions"] = np.array(json.dumps(versions))
    path = Path(__file__).resolve().parents[1] / "data" / "oracle_tiles.npz"
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {path.stat().st_size} bytes", ratio)


if __name__ == "__main__":
    main()
