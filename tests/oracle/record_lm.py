# SPDX-License-Identifier: Apache-2.0
"""Records what transformers computes for tiny random language models of every family: tests/oracle/lm_*.npz.

Run by hand in an environment with torch and transformers (never a dependency of vtjax or of its tests):

    python tests/oracle/record_lm.py

Each file holds `input_ids` [B,N], masks that pad left and right (`left_mask`, `right_mask` [B,N]) with the logits under
each (`left_logits`, `right_logits` [B,N,V], padding's rows zero), `config` (the JSON of the model's folder),
`versions`, and every weight under `w:` plus its name in the library's own file. Weights are random multiples of 1/64.
"""

from __future__ import annotations

import json
import math
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
GRAIN = 64
TINY: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 64, "eos_token_id": 3}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 100.0}

# file name -> (model class, config class, arguments)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**TINY, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}),
    "llama3": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**TINY, "rope_parameters": LLAMA3, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**TINY, "tie_word_embeddings": True, "eos_token_id": [3, 4]}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**TINY, "head_dim": 8, "tie_word_embeddings": False}),
}


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Random multiples of 1/GRAIN, of a size by which every parameter matters."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                value = 1 + 0.3 * noise
            elif p.ndim == 1:
                value = 0.3 * noise
            elif "embed" in name:
                value = noise
            else:
                value = noise / math.sqrt(p.shape[1]) * 1.5
            p.copy_(torch.round(value * GRAIN) / GRAIN)


def record(name: str, model_class: str, config_class: str, arguments: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(len(name))
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**arguments)).eval()
    randomise(model, generator)
    ids = torch.randint(5, 32, (3, 12), generator=generator)
    arrays: dict[str, np.ndarray] = {"input_ids": ids.numpy().astype(np.int32)}
    kept = torch.tensor([12, 7, 4])[:, None]
    for side, mask in (("left", torch.arange(12) >= 12 - kept), ("right", torch.arange(12) < kept)):
        with torch.inference_mode():
            logits = model(ids, attention_mask=mask.long()).logits
        arrays[f"{side}_mask"] = mask.numpy().astype(np.int32)
        arrays[f"{side}_logits"] = (logits * mask[..., None]).numpy()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        arrays["config"] = np.array((Path(folder) / "config.json").read_text())
        weights = {f"w:{n}": w.numpy() for n, w in load_file(Path(folder) / "model.safetensors").items()}
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    path = HERE / f"lm_{name}.npz"
    np.savez_compressed(path, versions=np.array(json.dumps(versions)), **arrays, **weights)
    print(f"{path.name}: {path.stat().st_size} bytes, logits of spread {arrays['left_logits'].std():.2f}")


if __name__ == "__main__":
    for name, (model_class, config_class, arguments) in MODELS.items():
        record(name, model_class, config_class, arguments)
