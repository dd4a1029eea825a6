# SPDX-License-Identifier: Apache-2.0
"""The timing of kernels, at a size that means nothing."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from experiments.lvxattn import kernels
from vtjax.errors import InputError
from vtjax.ops import partial_softmax


def test_operations_are_those_of_pairs_that_are_seen() -> None:
    case = kernels.Case(rows=48, keys=200, heads=2, kv_heads=1, head_dim=16)
    for name, rule in kernels.rules(case).items():
        seen = int(np.asarray(partial_softmax.seen(**rule)).sum())
        assert kernels.operations(case, rule)["forward"] == 4 * seen * 2 * 16
        assert (seen == 48 * 200) == (name == "dense")


def test_without_a_gpu_it_is_one_line() -> None:
    with pytest.raises(InputError, match="kernels are timed on a GPU or TPU, found 'cpu'"):
        kernels.main(["share"])
    with pytest.raises(InputError, match="kernels are timed on a GPU, found 'cpu'"):
        kernels.main(["shapes"])


@pytest.mark.slow
def test_records_of_a_tiny_size() -> None:
    case = kernels.Case(rows=8, keys=64, heads=2, kv_heads=1, head_dim=16)
    for kernel in kernels.KERNELS:
        found = kernels.share(kernel, case, rounds=1, matrix=32, interpret=True)
        assert set(found["share"]) == {
            f"{form}_{which}_{rule}"
            for form in (kernel, "chunked")
            for which in ("forward", "backward")
            for rule in ("dense", "before")
        }
        assert all(value > 0 for value in found["share"].values()) and len(found["executed"]) == 2
    tried = {name: sizes[:1] for name, sizes in kernels.grid().items()}
    made = list(kernels.shapes(case, tried, rounds=1, interpret=True))
    assert [one["tiles_of"] for one in made] == list(tried) and all(one["operations_per_s"] > 0 for one in made)
    assert jax.default_backend() == "cpu"
