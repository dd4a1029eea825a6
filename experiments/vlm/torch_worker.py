# SPDX-License-Identifier: Apache-2.0
"""transformers' side of `beside_torch.py`: runs under another interpreter, sleeps while the other side measures.

Greedy decoding is written out here: it takes less time than `generate`, which looks after much else at every token.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "vit"))
from torch_worker import serve  # noqa: E402


class Worker:
    """One language model, and what is asked of it."""

    def load(self, folder: str) -> dict[str, Any]:
        """Reads the model with fused attention, float32."""
        import torch
        import transformers

        options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        return {}

    def prompt(self, ids: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """The prompts, without padding, and how many tokens `decode` adds."""
        import torch

        self.ids, self.new_tokens = torch.tensor(ids), new_tokens
        return {}

    def _prefill(self) -> Any:
        return self.model(self.ids, use_cache=True, logits_to_keep=1)

    def _decode(self) -> Any:
        import torch

        out, told = self._prefill(), []
        for number in range(self.new_tokens):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            told.append(token)
            if number + 1 < self.new_tokens:
                out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
        return torch.cat(told, 1)

    def logits(self, path: str) -> dict[str, Any]:
        """Saves the logits after the prompts' last tokens."""
        import numpy as np
        import torch

        with torch.inference_mode():
            np.save(path, self._prefill().logits[:, -1].numpy())
        return {}

    def tokens(self) -> dict[str, Any]:
        """The tokens that follow."""
        import torch

        with torch.inference_mode():
            return {"tokens": self._decode().tolist()}

    def prefill(self, calls: int) -> dict[str, Any]:
        """Seconds per call: the prompts, up to the last token's logits, with a cache."""
        return self._timed(self._prefill, calls)

    def decode(self, calls: int) -> dict[str, Any]:
        """Seconds per call: the prompts and all new tokens."""
        return self._timed(self._decode, calls)

    def _timed(self, call: Any, calls: int) -> dict[str, Any]:
        import torch

        seconds = []
        with torch.inference_mode():
            for _ in range(calls):
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    def about(self) -> dict[str, Any]:
        """Versions and settings."""
        import torch
        import transformers

        return {
            "torch_version": torch.__version__,
            "transformers_version": transformers.__version__,
            "torch_threads": torch.get_num_threads(),
        }


if __name__ == "__main__":
    serve(Worker)
