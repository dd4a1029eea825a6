# SPDX-License-Identifier: Apache-2.0
"""A multimodal model's formulas against the traced model, for every bridge."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtjax.account import flops, params
from vtjax.errors import InputError
from vtjax.models.vlm import VLM
from vtjax.spec import BridgeSpec, CrossSpec, LMSpec, TiledViTSpec, ViTSpec, VLMSpec

# Sizes without common factors, so that no two terms are equal by chance.
TOWER = ViTSpec.uniform(depth=3, width=14, heads=2, mlp=22, image_size=10, patch=5, feature_layer=-2)
TEXT = LMSpec.uniform(depth=3, width=24, heads=6, kv_heads=2, head_dim=10, mlp=44, vocab=37, context=64)
EMPTY = {1: {"attn": False, "ffn": False}}
TILED = TiledViTSpec.uniform(
    depth=2, global_blocks=1, width=14, heads=2, mlp=22, image_size=10, patch=5, tiles=3, features=(0,)
)
SPECS = {
    "projector": VLMSpec(TOWER, BridgeSpec(hidden=19), TEXT, 5),
    "low rank": VLMSpec(TOWER, BridgeSpec(hidden=19), TEXT.edit(lora={"rank": 3, "alpha": 1.0, "sites": ["key"]}), 5),
    "flamingo": VLMSpec(TOWER, BridgeSpec("none", cross=CrossSpec.flamingo((0, 2), 24, 2, 6)), TEXT, 5),
    "hyper": VLMSpec(TOWER, BridgeSpec(hidden=17, cross=CrossSpec.hyper((1,))), TEXT, 5),
    "mllama": VLMSpec(
        TOWER,
        BridgeSpec("linear", bias=False, prefix=True, cross=CrossSpec.mllama((1,), 4, 2, 8, 30)),
        TEXT.edit(blocks=EMPTY),
        5,
    ),
    "tiled": VLMSpec(
        TILED, BridgeSpec("linear", prefix=True, cross=CrossSpec.mllama((1,), 4, 2, 8, 30)), TEXT.edit(blocks=EMPTY), 5
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_formulas_equal_the_model(name: str) -> None:
    spec = SPECS[name]
    model = VLM(spec)
    tree = jax.eval_shape(model.init, jax.random.key(0))
    # Formulas count an image with all its tiles.
    tiles, ratio = ((1, TILED.tiles), np.ones((1, 1), np.int32)) if spec.tower is TILED else ((), None)
    ids = jax.ShapeDtypeStruct((1, 13), jnp.int32)
    image = jax.ShapeDtypeStruct((1, *tiles, 10, 10, 3), jnp.float32)

    def prefill(p, ids, image):
        entered = model.enter(p, ids, image, aspect_ratio=ratio)[0]
        return model.lm.prefill(model.decoder_params(p), room=0, **entered)[0]

    counts = flops.walk(prefill, tree, ids, image)
    assert counts.unknown == {} and counts.assumed == ()
    assert flops.macs(spec, 13) == counts.macs
    assert flops.macs(spec) == flops.macs(spec, spec.placeholders + flops.QUESTION)
    assert params.count(spec) == params.count(tree)
    by_kind = {row.kind: row.params for row in flops.by_kind(flops.layers(spec)) if row.params}
    of_tree: dict[str, int] = {}
    for group in params.table(tree):
        of_tree[group.kind] = of_tree.get(group.kind, 0) + group.params
    assert of_tree == by_kind


def test_a_tiled_tower_has_the_tokens_of_all_its_tiles() -> None:
    assert flops.macs(TILED, TILED.tokens) == flops.macs(TILED)
    with pytest.raises(InputError, match="tokens must be those of all 3 tiles, 24 everywhere, found"):
        flops.layers(TILED, 5)
