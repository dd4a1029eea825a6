# SPDX-License-Identifier: Apache-2.0
"""timm's side of `beside_torch.py`: runs under another interpreter, sleeps while the other side measures.

Reads one JSON request per line from standard input and answers with one line. Imports nothing of vtjax.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Worker:
    """One timm model at a time, and what is asked of it."""

    def load(self, model: str, weights: str, seed: int, batch: int, image_size: int) -> dict[str, Any]:
        """Builds the model with the given weights and makes the batch: the same numbers as on the other side."""
        import numpy as np
        import safetensors.torch
        import timm
        import torch

        timm.layers.set_fused_attn(True)
        self.model = timm.create_model(model, pretrained=False)
        self.model.load_state_dict(safetensors.torch.load_file(weights))
        if not self.model.blocks[0].attn.fused_attn:
            raise RuntimeError("timm did not take the fused attention")
        rng = np.random.default_rng(seed)
        images = rng.standard_normal((batch, image_size, image_size, 3), np.float32)
        self.images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        self.labels = torch.from_numpy(rng.integers(0, 1000, batch))
        return {}

    def logits(self, path: str) -> dict[str, Any]:
        """Saves the logits of the batch."""
        import numpy as np
        import torch

        self.model.eval()
        with torch.inference_mode():
            np.save(path, self.model(self.images).numpy())
        return {}

    def forward(self, calls: int) -> dict[str, Any]:
        """Seconds per call."""
        import torch

        self.model.eval()
        seconds = []
        with torch.inference_mode():
            for _ in range(calls):
                start = time.perf_counter()
                self.model(self.images)
                seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    def optimiser(self, lr: float, weight_decay: float, kind: str) -> dict[str, Any]:
        """A fresh AdamW with weight decay on matrices only."""
        import torch

        self.model.train()
        embeddings = ("cls_token", "pos_embed")
        named = list(self.model.named_parameters())
        matrices = [p for n, p in named if p.ndim > 1 and n not in embeddings]
        rest = [p for n, p in named if p.ndim <= 1 or n in embeddings]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, **{kind: True})
        return {}

    def train(self, calls: int) -> dict[str, Any]:
        """Seconds per training step, and the losses before each."""
        import torch

        seconds, losses = [], []
        for _ in range(calls):
            start = time.perf_counter()
            self.adamw.zero_grad(set_to_none=True)
            loss = torch.nn.functional.cross_entropy(self.model(self.images), self.labels)
            loss.backward()
            self.adamw.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "losses": losses}

    def about(self) -> dict[str, Any]:
        """Versions and settings."""
        import timm
        import torch

        return {
            "torch_version": torch.__version__,
            "timm_version": timm.__version__,
            "torch_threads": torch.get_num_threads(),
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        }


def serve(worker: Callable[[], Any]) -> None:
    """Answers requests, by methods of a worker, until standard input ends. The argument is the number of threads."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the libraries print goes to standard error
    # Where torchvision was built for another torch, timm needs a hand to import.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "oracle"))
    import torch
    import torchfix  # noqa: F401

    torch.set_num_threads(int(sys.argv[1]))
    answering = worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(answering, request.pop("do"))(**request)
        except Exception as error:  # the other side reports it and ends
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(Worker)
