# SPDX-License-Identifier: Apache-2.0
"""The recorded models of tests/oracle as folders, as a user would have them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

ORACLE = Path(__file__).resolve().parents[1] / "oracle"
NAMES = sorted(p.stem.removeprefix("vit_") for p in ORACLE.glob("vit_*.npz"))


@dataclasses.dataclass(frozen=True)
class Oracle:
    """One recorded model."""

    images: np.ndarray
    logits: np.ndarray
    features: np.ndarray
    config: dict
    tensors: dict[str, np.ndarray]

    def write(self, folder: Path) -> Path:
        """Its config.json and model.safetensors in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        save_file(self.tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder


def read(name: str) -> Oracle:
    with np.load(ORACLE / f"vit_{name}.npz") as data:
        return Oracle(
            images=data["images"],
            logits=data["logits"],
            features=data["features"],
            config=json.loads(str(data["config"])),
            tensors={k[2:]: data[k] for k in data.files if k.startswith("w:")},
        )
