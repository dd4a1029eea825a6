# SPDX-License-Identifier: Apache-2.0
"""PyTorch's side of `selection.py`: the released algorithm, as spec section 1.1 describes it, eagerly in float32.

Runs under another interpreter and sleeps while another side measures. Reads one JSON request per line from standard
input and answers with one line. Imports nothing of vtjax.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "vit"))
from torch_worker import serve  # noqa: E402


class Loop:
    """One matrix at a time."""

    def load(self, path: str, k: int, device: str) -> dict[str, Any]:
        """Reads `[M, N]` from a `.npy` file; at most N picks are one round."""
        self.weights, self.k = torch.from_numpy(np.load(path)).to(device), k
        return {}

    def select(self, calls: int) -> dict[str, Any]:
        """Seconds per selection, and the picks."""
        seconds: list[float] = []
        found: list[int] = []
        with torch.inference_mode():
            for _ in range(calls):
                start = time.perf_counter()
                # Not a list of tensors: between the large ones these small ones would keep the memory from being freed.
                rows, picks = self.weights, torch.empty(self.k, dtype=torch.int64, device=self.weights.device)
                for index in range(self.k):
                    norms = torch.linalg.vector_norm(rows, dim=1)
                    norm, pick = torch.max(norms, 0)
                    unit = rows[pick] / norm
                    rows = rows - torch.outer(rows @ unit, unit)
                    picks[index] = pick
                found = picks.tolist()  # waits for the device
                seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "picks": found}

    def about(self) -> dict[str, Any]:
        """Version and settings."""
        return {"torch_version": torch.__version__, "torch_threads": torch.get_num_threads(), "pid": os.getpid()}


if __name__ == "__main__":
    serve(Loop)
