# SPDX-License-Identifier: Apache-2.0
"""A language model's formulas against the traced model, and against published counts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from vtjax.account import flops, params
from vtjax.errors import InputError
from vtjax.models.lm import LM
from vtjax.ops import decoder_attention
from vtjax.spec import LMSpec

# Sizes without common factors, so that no two terms are equal by chance.
SMALL = LMSpec.uniform(depth=3, width=24, heads=6, kv_heads=2, head_dim=10, mlp=44, vocab=37, context=64)
SPECS = {
    "llama": SMALL,
    "qwen2": SMALL.edit(qkv_bias=True),
    "biases": SMALL.edit(qkv_bias=True, out_bias=True, mlp_bias=True),
    "qwen3": SMALL.edit(qk_norm="head", tied=False),
    "surgery": SMALL.edit(
        blocks={0: {"mlp": 11, "kv_heads": 3}, 1: {"attn": False, "ffn": False, "adapter": 9}, 2: {"ffn": False}}
    ),
}
IDS = jax.ShapeDtypeStruct((1, 13), jnp.int32)


def traced(model, ids=IDS):
    tree = jax.eval_shape(model.init, jax.random.key(0))
    return flops.walk(lambda p, i: model.prefill(p, i, room=2)[0], tree, ids), tree


@pytest.mark.parametrize("name", SPECS)
def test_formulas_equal_the_model(name: str) -> None:
    spec = SPECS[name]
    counts, tree = traced(LM(spec))
    assert counts.unknown == {} and counts.assumed == ()
    assert flops.macs(spec, 13) == counts.macs == flops.macs(spec, [13] * 4)
    assert params.count(spec) == params.count(tree)
    by_kind = {row.kind: row.params for row in flops.by_kind(flops.layers(spec)) if row.params}
    of_tree: dict[str, int] = {}
    for group in params.table(tree):
        of_tree[group.kind] = of_tree.get(group.kind, 0) + group.params
    assert of_tree == by_kind


def test_blocks_save_what_lies_above_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_attention, "BLOCK", 4)
    rows = [(0, 4), (4, 8), (8, 12), (12, 13)]
    skipped = sum((stop - start) * (13 - stop) for start, stop in rows)
    counts, _ = traced(LM(SMALL, attention="blocks"))
    assert counts.macs == flops.macs(SMALL, 13) - 3 * 2 * skipped * 60


def test_a_shortened_sequence_costs_by_segment() -> None:
    """DPN's count of one LLaMA layer on n tokens: 4 n d^2 + 2 n^2 d + 3 n d m, head apart."""
    spec = LMSpec.uniform(depth=4, width=32, heads=4, mlp=80, vocab=50)
    n = [20, 20, 11, 11, 11]
    expected = sum(4 * i * 32**2 + 2 * i**2 * 32 + 3 * i * 32 * 80 for i in n[:-1])
    assert flops.macs(spec, n) == expected + 32 * 50
    with pytest.raises(InputError, match="tokens must hold 5 counts"):
        flops.macs(spec, [3, 3])
    with pytest.raises(InputError, match="above 0"):
        flops.macs(spec, 0)


def test_published_parameters() -> None:
    smollm = LMSpec.uniform(depth=30, width=576, heads=9, kv_heads=3, mlp=1536, vocab=49152)
    assert params.count(smollm) == 134_515_008
    llama = LMSpec.uniform(depth=16, width=2048, heads=32, kv_heads=8, mlp=8192, vocab=128256)
    assert params.count(llama) == 1_235_814_400  # Llama-3.2-1B
    qwen = LMSpec.uniform(depth=24, width=896, heads=14, kv_heads=2, mlp=4864, vocab=151936, qkv_bias=True)
    assert params.count(qwen) == 494_032_768  # Qwen2-0.5B
