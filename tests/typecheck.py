# SPDX-License-Identifier: Apache-2.0
"""The checker that `tests/conftest.py` puts around every function of vtjax: shapes, dtypes and types at run time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

# As mypy reads annotations: an int is a float.
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_local: dict[Any, Callable[..., Any]] = {}


def check(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` is jaxtyping's stand-in, which has the annotations of what is decorated and does nothing.

    A function inside another one is decorated anew at each call of that; one checker, which takes a millisecond to
    make, serves for all its lives. There are two stand-ins, for the arguments and for what is returned; the latter
    need not look at the arguments again, whose sizes jaxtyping still knows.
    """
    if fn.__annotations__.get("return", Any) is not Any:
        fn.__annotations__ = {"return": fn.__annotations__["return"]}
    if "<locals>" not in fn.__qualname__:
        return _check(fn)
    told = tuple(fn.__annotations__.items())
    optional = len(fn.__defaults__ or ()), *(fn.__kwdefaults__ or ())
    key = fn.__module__, fn.__qualname__, fn.__code__.co_varnames, optional, told
    if key not in _local:
        _local[key] = _check(fn)
    return _local[key]
