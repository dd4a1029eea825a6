# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from vtjax.errors import InputError
from vtjax.models.lm import LM
from vtjax.models.vit import ViT
from vtjax.parallel import mesh as mesh_lib
from vtjax.parallel import rules
from vtjax.spec import LMSpec, ViTSpec


def abstract_mesh(data: int = 2, fsdp: int = 2, tensor: int = 2, context: int = 1) -> Any:
    return AbstractMesh((data, fsdp, context, tensor), mesh_lib.AXES, axis_types=(AxisType.Auto,) * 4)


def specs(tree: Any, mesh: Any, table: rules.Rules = rules.DEFAULT) -> dict[str, P]:
    out = rules.shardings(tree, mesh, table)
    return {rules.path_of(keys): leaf.spec for keys, leaf in jax.tree_util.tree_flatten_with_path(out)[0]}


def vit_params(**fields: Any) -> Any:
    spec = ViTSpec.uniform(depth=2, width=16, heads=2, image_size=16, patch=4, classes=8, **fields)
    return jax.eval_shape(ViT(spec).init, jax.random.key(0))


def test_the_default_table_on_a_real_vit() -> None:
    got = specs(vit_params(), abstract_mesh())
    expected = {
        "block_00/attn/query/kernel": P("fsdp", "tensor"),
        "block_01/attn/value/bias": P("tensor"),
        "block_00/attn/out/kernel": P("tensor", "fsdp"),
        "block_00/attn/out/bias": P(),
        "block_00/mlp/up/kernel": P("fsdp", "tensor"),
        "block_00/mlp/down/kernel": P("tensor", "fsdp"),
        "block_00/norm1/scale": P(),
        "embed/patch/kernel": P(None, "fsdp"),
        "embed/class_token": P(),
        "head/kernel": P("fsdp", "tensor"),
        "norm/scale": P(),
    }
    for path, spec in expected.items():
        # Trailing None entries say the same.
        assert tuple(got[path]) == tuple(spec) or tuple(got[path])[len(spec) :] == (None,) * (
            len(got[path]) - len(spec)
        ), path


def test_every_kernel_of_a_rich_vit_is_split() -> None:
    params = vit_params(
        activation="swiglu", pooling="attention", pool_mlp=32, class_token=False, pos_prefix=0, mlp_norm=True
    )
    for path, spec in specs(params, abstract_mesh()).items():
        if path.endswith("kernel"):
            assert any(entry is not None for entry in spec), path


def test_a_decoder_is_split_like_a_vit_and_its_vocabulary_by_rows() -> None:
    spec = LMSpec.uniform(
        depth=1, width=16, heads=4, kv_heads=2, mlp=24, vocab=32, qk_norm="head", qkv_bias=True, tied=False
    )
    got = specs(jax.eval_shape(LM(spec).init, jax.random.key(0)), abstract_mesh())
    expected = {
        "embed/tokens": P(("tensor", "fsdp")),
        "block_00/attn/key/kernel": P("fsdp", "tensor"),
        "block_00/attn/key/bias": P("tensor"),
        "block_00/attn/key_norm/scale": P(),
        "block_00/attn/out/kernel": P("tensor", "fsdp"),
        "block_00/mlp/gate/kernel": P("fsdp", "tensor"),
        "block_00/mlp/down/kernel": P("tensor", "fsdp"),
        "head/kernel": P("fsdp", "tensor"),
    }
    assert {path: got[path] for path in expected} == expected


def test_optimiser_state_is_laid_out_like_its_parameters() -> None:
    params = vit_params()
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    got, mirrored = specs(params, abstract_mesh()), specs({"opt": state}, abstract_mesh())
    for path, spec in got.items():
        assert mirrored[f"opt/0/mu/{path}"] == spec
        assert mirrored[f"opt/0/nu/{path}"] == spec
    assert mirrored["opt/0/count"] == P()


def test_a_dimension_that_does_not_divide_stays_whole_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    tree = {
        "query": {"kernel": jax.ShapeDtypeStruct((16, 9), jnp.float32)},
        "key": {"kernel": jax.ShapeDtypeStruct((15, 9), jnp.float32)},
    }
    with caplog.at_level(logging.WARNING, "vtjax.parallel.rules"):
        got = specs(tree, abstract_mesh())
    assert got == {"query/kernel": P("fsdp", None), "key/kernel": P(None, None)}
    assert len(caplog.records) == 1
    assert "key/kernel (15, 9) and 1 more" in caplog.text and "'tensor': 2" in caplog.text


def test_what_lies_over_fsdp_lies_over_context_too() -> None:
    tree = {
        "query": {"kernel": jax.ShapeDtypeStruct((16, 9), jnp.float32)},
        "key": {"kernel": jax.ShapeDtypeStruct((6, 9), jnp.float32)},
        "embed": {"tokens": jax.ShapeDtypeStruct((32, 4), jnp.float32)},
    }
    both = specs(tree, abstract_mesh(tensor=1, context=4))
    assert both["query/kernel"] == P(("fsdp", "context"), "tensor") and both["embed/tokens"] == P(("fsdp", "context"))
    assert both["key/kernel"] == P("fsdp", "tensor")  # 6 does not divide by 8, nor by context=4
    assert specs(tree, abstract_mesh(fsdp=1, context=4))["query/kernel"] == P("context", None)


def test_factored_moments_with_fewer_dimensions_are_whole() -> None:
    got = specs({"v_row": {"query": {"kernel": jax.ShapeDtypeStruct((16,), jnp.float32)}}}, abstract_mesh())
    assert got == {"v_row/query/kernel": P()}


def test_first_match_counts() -> None:
    tree = {"a": {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32)}}
    table = ((r"a/kernel$", P(None, "tensor")), (r"kernel$", P("fsdp")), (r"", P()))
    assert specs(tree, abstract_mesh(), table) == {"a/kernel": P(None, "tensor")}


def test_bad_tables_are_named() -> None:
    tree = {"a": jax.ShapeDtypeStruct((4,), jnp.float32)}
    with pytest.raises(InputError, match="rule 'a' names the axis 'model', expected data, fsdp, context, tensor"):
        rules.shardings(tree, abstract_mesh(), (("a", P("model")),))
    with pytest.raises(InputError, match="no sharding rule matches 'a'"):
        rules.shardings(tree, abstract_mesh(), (("b", P()),))


def test_constrain_is_the_identity_without_a_mesh() -> None:
    x = jnp.ones((3, 2))
    assert rules.constrain(x) is x


def test_constrain_under_a_mesh_keeps_values() -> None:
    mesh = mesh_lib.make({"data": -1})
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: rules.constrain(x) * 2)(jnp.ones((3, 2)))
    assert y.tolist() == [[2.0, 2.0]] * 3
