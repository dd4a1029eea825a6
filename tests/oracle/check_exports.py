# SPDX-License-Identifier: Apache-2.0
"""Loads what `weights.save` exports into timm and transformers and compares with the recorded outputs.

Not a test: it needs torch, timm and transformers (`python tests/oracle/check_exports.py`). For every recorded model it
writes a timm folder and a Hugging Face folder, as far as the family exists there, and prints the largest difference.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from tests.oracle import torchfix  # noqa: E402, F401, I001

import timm  # noqa: E402
import transformers  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from vtjax import weights  # noqa: E402
from vtjax.errors import InputError  # noqa: E402


def hf_logits(folder: Path, x: torch.Tensor) -> torch.Tensor:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    missing = [k for k in info["missing_keys"] if "pooler" not in k]
    if missing or info["unexpected_keys"]:
        raise AssertionError(f"{name}: missing {missing}, unexpected {info['unexpected_keys']}")
    out = model.eval()(x)
    for key in ("logits", "image_embeds"):
        if getattr(out, key, None) is not None:
            return getattr(out, key)
    return out.last_hidden_state[:, 0] if name in ("ViTModel", "DeiTModel") else out.pooler_output


def main() -> int:
    logging.disable(logging.WARNING)
    worst = 0.0
    for path in sorted(HERE.glob("vit_*.npz")):
        data = np.load(path)
        x = torch.from_numpy(data["images"]).permute(0, 3, 1, 2)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "src").mkdir()
            (folder / "src" / "config.json").write_text(str(data["config"]))
            save_file({k[2:]: data[k] for k in data.files if k.startswith("w:")}, folder / "src" / "model.safetensors")
            spec, params = weights.load(folder / "src")
            line = [f"{path.stem:26}"]
            for layout in ("timm", "hf"):
                try:
                    weights.save(folder / layout, spec, params, layout)
                except InputError as error:
                    line.append(f"{layout}: refused ({error})")
                    continue
                with torch.no_grad():
                    if layout == "timm":
                        y = timm.create_model(f"local-dir:{folder / layout}", pretrained=True).eval()(x)
                    else:
                        y = hf_logits(folder / layout, x)
                difference = float((y - torch.from_numpy(data["logits"])).abs().max())
                worst = max(worst, difference)
                line.append(f"{layout}: {difference:.1e}")
            print("  ".join(line))
    print(f"timm {timm.__version__}, transformers {transformers.__version__}: largest difference {worst:.1e}")
    return int(worst > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
