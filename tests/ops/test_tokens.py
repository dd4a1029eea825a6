# SPDX-License-Identifier: Apache-2.0
"""Tokens that no block can have made are refused, with one line, where their values are known; how they are moved."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtjax.errors import InputError
from vtjax.methods import ltmp
from vtjax.ops.tokens import Tokens, check_tokens, to_front


def tokens(**fields: Any) -> Tokens:
    good = {
        "size": np.asarray([[1, 2, 1, 1], [1, 1, 1, 1]], np.float32),
        "alive": np.asarray([[1, 1, 0, 1], [1, 1, 1, 1]], np.float32),
        "source": np.asarray([[0, 1, 1, 3], [0, 1, 2, 3]], np.int32),
    }
    made = Tokens(jnp.ones((2, 4, 3)), **{name: jnp.asarray(value) for name, value in good.items()})
    for name, value in fields.items():  # past the tests' own check of annotated shapes
        object.__setattr__(made, name, jnp.asarray(value))
    return made


def changed(name: str, row: int, column: int, value: float) -> Tokens:
    made = tokens()
    return made.replace(**{name: getattr(made, name).at[row, column].set(value)})


BAD = {
    "mask of a half": (changed("alive", 1, 2, 0.5), "alive must be 0 or 1, found 0.5"),
    "mask nan": (changed("alive", 1, 2, np.nan), "alive must be 0 or 1, found nan"),
    "dead class token": (changed("alive", 0, 0, 0), "alive must be 1 for the 1 prefix tokens, found 0"),
    "size 0": (changed("size", 0, 1, 0), "size must be positive for live tokens, found 0.0"),
    "size negative": (changed("size", 1, 3, -1), "size must be positive for live tokens, found -1.0"),
    "source beyond": (changed("source", 1, 3, 4), r"source must be -1 or a slot below 4, found 0 \.\. 4"),
    "size of others": (tokens(size=np.ones((2, 3))), r"size must be \[2, 4\] as x \[2, 4, 3\], found \[2, 3\]"),
    "mask of others": (tokens(alive=np.ones((1, 4))), r"alive must be \[2, 4\] as x .*, found \[1, 4\]"),
    "source of others": (tokens(source=np.zeros((3, 4), np.int32)), r"source must be \[2\] as x .*found \[3, 4\]"),
    "no tokens": (Tokens(jnp.ones((2, 0, 3))), "tokens must be at least the 1 that are protected, found 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str) -> None:
    bad, message = BAD[case]
    with pytest.raises(InputError, match=message):
        check_tokens(bad, 1)
    # And by the method itself, before anything is decided.
    batch, slots = bad.x.shape[:2]
    aux = {"importance": jnp.full((batch, slots), 0.25), "keys": jnp.ones((batch, slots, 1, 2))}
    with pytest.raises(InputError, match=message):
        ltmp.Ltmp(1)(bad, aux, {"merge_threshold": jnp.asarray(0.9), "prune_threshold": jnp.asarray(0.0)})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["importance", "keys"])
def test_scores_must_be_finite_where_tokens_live(name: str, value: float) -> None:
    def scores(slot: int) -> Any:
        bad = jnp.full((2, 4), 0.25) if name == "importance" else jnp.ones((2, 4, 1, 2))
        return {name: bad.at[0, slot].set(value)}

    check_tokens(tokens(), 1, **scores(2))  # of a dead token
    with pytest.raises(InputError, match=f"{name} must be finite for live tokens, found NaN or infinity"):
        check_tokens(tokens(), 1, **scores(1))
    with pytest.raises(InputError, match=rf"{name} must begin with \[2, 4\] as x does, found \[2, 3"):
        check_tokens(tokens(), 1, **{name: scores(1)[name][:, :3]})


def test_under_jit_only_shapes_are_looked_at() -> None:
    good = tokens()
    check_tokens(good, 1)
    check_tokens(Tokens(good.x), 1)
    jax.jit(lambda t: check_tokens(t, 1))(changed("alive", 0, 0, 0))


def test_what_is_kept_moves_to_the_front_in_its_order() -> None:
    kept = jnp.array([[False, True, False, True], [True, True, True, False]])
    moved = to_front(kept, 3)
    ids = jnp.arange(8).reshape(2, 4)
    np.testing.assert_array_equal(moved(ids), [[1, 3, 0], [4, 5, 6]])
    np.testing.assert_array_equal(moved(jnp.stack([ids, -ids], -1))[..., 1], -moved(ids))
