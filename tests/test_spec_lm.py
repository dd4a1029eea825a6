# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from vtjax import spec as spec_lib
from vtjax.errors import InputError
from vtjax.spec import Lineage, LMSpec, RopeScaling, ViTSpec

BASE = LMSpec.uniform(depth=3, width=48, heads=6, kv_heads=2, mlp=80, vocab=100)


def test_round_trip_keeps_every_field():
    spec = BASE.edit(
        blocks={0: {"mlp": 5}, 2: {"attn": False, "ffn": False, "adapter": 4}},
        rope_scaling=RopeScaling("llama3", 8.0),
        eos=(2, 7),
        lineage=(Lineage("abc", "skip", json.dumps({"layers": [2]}), seed=3),),
    )
    again = spec_lib.from_json(spec.to_json())
    assert again == spec and hash(again) == hash(spec) and again.sha256 == spec.sha256
    assert json.loads(spec.to_json())["kind"] == "LMSpec"


def test_edit_and_diff_speak_of_single_blocks():
    other = BASE.edit(blocks={1: {"reduce": "pool"}}, tied=False)
    assert BASE.diff(other) == {"blocks[1].reduce": (None, "pool"), "tied": (True, False)}
    assert other.unreduced() == BASE.edit(tied=False)


def test_a_spec_of_another_kind_differs_and_is_told_apart():
    vit = ViTSpec.uniform(depth=3, width=48, heads=6)
    assert BASE.diff(vit)["kind"] == ("LMSpec", "ViTSpec")
    assert isinstance(spec_lib.from_json(vit.to_json()), ViTSpec)


def test_uniform_takes_a_head_width_of_its_own():
    assert LMSpec.uniform(depth=1, width=10, heads=3, head_dim=4, mlp=8, vocab=9).blocks[0].kv_heads == 3
    with pytest.raises(InputError, match="multiple of heads, found width=10, heads=3"):
        LMSpec.uniform(depth=1, width=10, heads=3, mlp=8, vocab=9)


@pytest.mark.parametrize(
    "changes,says",
    [
        ({"vocab": 0}, "LMSpec.vocab must be positive, found 0"),
        ({"blocks": {1: {"kv_heads": 4}}}, r"blocks\[1\].kv_heads must divide heads=6, found 4"),
        ({"blocks": {1: {"kv_heads": 0}}}, r"blocks\[1\].kv_heads must divide"),
        ({"blocks": {0: {"head_dim": 7}}}, r"blocks\[0\].head_dim must be even, found 7"),
        ({"blocks": {0: {"mlp": 0}}}, r"LMSpec.blocks\[0\].mlp must be positive"),
        ({"blocks": {0: {"attn": False, "reduce": "dpn"}}}, "needs the block's attention"),
        ({"blocks": {0: {"ffn": False, "adapter": 3}}}, "stands in for a removed block"),
        ({"qk_norm": "full"}, "qk_norm must be one of none, head"),
        ({"eos": (100,)}, r"eos must hold token ids below vocab=100, found \(100,\)"),
        ({"rope_base": 0.0}, "rope_base must be positive"),
        ({"eps": -1.0}, "eps must be 0 or more"),
        ({"rope_scaling": {"kind": "yarn", "factor": 2.0}}, "kind must be one of linear, llama3, found 'yarn'"),
        ({"rope_scaling": {"kind": "linear", "factor": 0.5}}, "factor must be 1 or more, found 0.5"),
        ({"rope_scaling": {"kind": "llama3", "factor": 8.0, "low": 4.0}}, "needs 0 < low < high"),
        ({"rope_base": "10000"}, "rope_base must be float, found '10000'"),
    ],
)
def test_bad_edits_are_named_in_one_line(changes, says):
    with pytest.raises(InputError, match=says) as error:
        BASE.edit(**changes)
    assert "\n" not in str(error.value)
