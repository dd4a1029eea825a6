# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import subprocess
import sys

import pytest

from vtjax import spec as spec_lib
from vtjax.errors import InputError
from vtjax.spec import Lineage, Preprocess, ViTSpec

BASE = ViTSpec.uniform(depth=3, width=48, heads=3, image_size=(32, 48), patch=8, classes=7)


def test_round_trip_keeps_every_field():
    spec = BASE.edit(
        blocks={0: {"mlp": 5}, 2: {"attn": False, "ffn": False, "adapter": 4}},
        registers=2,
        layer_scale=0.1,
        feature_layer=-2,
        preprocess=Preprocess(crop=1.0, mean=(0.1, 0.2, 0.3)),
        lineage=(Lineage("abc", "prune", json.dumps({"ratio": 2}), seed=3),),
    )
    again = spec_lib.from_json(spec.to_json())
    assert again == spec and hash(again) == hash(spec) and again.sha256 == spec.sha256
    assert json.loads(spec.to_json())["format"] == 1


def test_a_spec_of_an_older_writer_gets_the_defaults_of_new_fields():
    data = BASE.to_dict()
    del data["mlp_norm"], data["preprocess"]["crop"]
    assert spec_lib.from_dict(data) == BASE


def test_sizes():
    spec = BASE.edit(registers=2, distill_token=True, pos_prefix=2)
    assert spec.grid == (4, 6) and spec.prefix == 4 and spec.tokens == 28 and spec.depth == 3


def test_diff_names_leaves():
    other = BASE.edit(blocks={1: {"mlp": 10}}, pooling="mean")
    assert BASE.diff(other) == {"blocks[1].mlp": (192, 10), "pooling": ("class", "mean")}
    assert BASE.diff(BASE) == {}
    shorter = BASE.edit(blocks=BASE.blocks[:2])
    assert BASE.diff(shorter) == {"blocks[2]": (dataclasses.asdict(BASE.blocks[2]), None)}


def test_edit_by_function_touches_what_it_returns():
    narrow = BASE.edit(blocks=lambda i, b: dataclasses.replace(b, mlp=10 * (i + 1)))
    assert [b.mlp for b in narrow.blocks] == [10, 20, 30]
    assert BASE.blocks[0].mlp == 192


@pytest.mark.parametrize(
    "changes,says",
    [
        ({"witdh": 3}, "did you mean 'width'"),
        ({"width": "48"}, "ViTSpec.width must be int, found '48'"),
        ({"width": True}, "ViTSpec.width must be int, found True"),
        ({"width": 0}, "width must be positive"),
        ({"image_size": (32,)}, "must hold 2 values, found 1"),
        ({"image_size": (32, 47)}, r"multiple of patch=8, found \(32, 47\)"),
        ({"blocks": ()}, "at least one block"),
        ({"blocks": {3: {"mlp": 1}}}, r"blocks\[3\] does not exist"),
        ({"blocks": {1: {"mpl": 1}}}, r"blocks\[1\] has no field 'mpl'.*did you mean 'mlp'"),
        ({"blocks": {1: {"mlp": 0}}}, r"blocks\[1\].mlp must be positive"),
        ({"blocks": {1: {"heads": 0}}}, r"blocks\[1\] needs heads"),
        ({"blocks": {1: {"adapter": -1}}}, r"blocks\[1\].adapter must be 0 or more"),
        ({"blocks": {1: {"attn": False, "reduce": "ltmp"}}}, "needs the block's attention"),
        ({"norm": "batchnorm"}, "norm must be one of layernorm, rmsnorm"),
        ({"pooling": "class", "class_token": False, "pos_prefix": 0}, "needs class_token=True"),
        ({"pooling": "attention"}, "pool_mlp > 0"),
        ({"pos": "sincos2d", "width": 46}, "multiple of 4, found 46"),
        ({"pos_prefix": 2}, r"pos_prefix must be in 0\.\.1"),
        ({"distill_token": True, "class_token": False, "pos_prefix": 0, "pooling": "mean"}, "distill_token needs"),
        ({"feature_layer": 3}, r"feature_layer must be in \[-3, 3\)"),
        ({"registers": -1}, "must be 0 or more"),
        ({"eps": -1.0}, "eps must be 0 or more"),
        ({"eps": float("nan")}, "eps must be 0 or more"),
        ({"layer_scale": float("inf")}, "layer_scale must be finite"),
        ({"blocks": {"0": {"mlp": 1}}}, r"blocks\['0'\] does not exist"),
        ({"blocks": {0: 5}}, r"blocks\[0\] must be edited by a mapping of fields, found 5"),
        ({"blocks": {1: {"adapter": 4}}}, r"blocks\[1\].adapter=4 stands in for a removed block"),
        ({"blocks": {1: {"adapter": 4, "attn": False}}}, "found attn=False, ffn=True"),
        ({"distill_token": True, "pooling": "none"}, "distill_token has a head for a pooled vector"),
        ({"pooling": "attention", "pool_mlp": 4, "pool_heads": 5}, "pool_heads must divide width=48, found 5"),
        ({"pooling": "attention", "pool_mlp": 4, "pool_heads": -3}, "pool_heads must divide"),
        ({"preprocess": {"crop": 0.0}}, r"Preprocess.crop must be in \(0, 1\], found 0.0"),
        ({"preprocess": {"std": (0.5, 0.0, 0.5)}}, "Preprocess.std must be positive"),
        ({"preprocess": {"squash": 1}}, "preprocess.squash must be bool, found 1"),
    ],
)
def test_bad_edits_are_named_in_one_line(changes, says):
    with pytest.raises(InputError, match=says) as error:
        BASE.edit(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text,says",
    [
        ("{", "must be JSON text"),
        ("[]", "must be a JSON object, found list"),
        ("{}", "format must be 1, found None"),
        ('{"format": 2}', "format must be 1, found 2"),
        ('{"format": 1, "kind": "CNN"}', "kind must be one of ViTSpec"),
        (
            '{"format": 1, "kind": []}',
            r"kind must be one of ViTSpec, TiledViTSpec, LMSpec, VLMSpec, FusionSpec, found \[\]",
        ),
        ('{"format": 1, "kind": "ViTSpec"}', "lacks the field 'image_size'"),
        ('{"format": 1, "kind": "ViTSpec", "depth": 3}', "has no field 'depth'"),
    ],
)
def test_bad_json_is_named_in_one_line(text, says):
    with pytest.raises(InputError, match=says):
        spec_lib.from_json(text)


def test_editing_blocks_leaves_the_pooling_alone():
    spec = BASE.edit(pooling="attention", pool_mlp=96)
    assert spec.pool_heads == 3
    pruned = spec.edit(blocks={0: {"heads": 1}})
    assert pruned.pool_heads == 3 and "pool_heads" not in spec.diff(pruned)
    assert spec_lib.from_json(pruned.to_json()) == pruned


def test_uniform_checks_types_as_edit_does():
    assert ViTSpec.uniform(depth=1, width=8, heads=2, image_size=(16, 32)).image_size == (16, 32)
    with pytest.raises(InputError, match="no field 'witdh'.*did you mean 'width'"):
        ViTSpec.uniform(depth=1, width=8, heads=2, image_size=16, witdh=3)


def test_heads_must_divide_the_width():
    with pytest.raises(InputError, match="multiple of heads"):
        ViTSpec.uniform(depth=1, width=10, heads=3)


def test_the_spec_needs_the_standard_library_only():
    code = "import sys, vtjax.spec; print(sorted({'jax', 'numpy', 'flax'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
