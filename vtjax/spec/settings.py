# SPDX-License-Identifier: Apache-2.0
"""Settings of a token reducer as the text that a block's spec holds: `ltmp:thresholds,variant=merge,...`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from vtjax.errors import InputError

_READ: dict[str, Any] = {"str": str, "int": int, "float": float, "bool": {"True": True, "False": False}.__getitem__}


def write(name: str, settings: Any, without: Collection[str]) -> str:
    """The text: `name`, and the fields of a dataclass of strings and numbers but for those that `without` names."""
    fields = (f.name for f in dataclasses.fields(settings) if f.name not in without)
    return name + ",".join(f"{field}={getattr(settings, field)}" for field in fields)


def read(text: str, name: str, cls: type, without: Collection[str]) -> dict[str, Any]:
    """The values of the fields, as `write` wrote them.

    Raises:
      InputError: another name, other fields, or a value that is none of its field's kind.
    """
    method = name.partition(":")[0]
    kinds = {f.name: str(f.type) for f in dataclasses.fields(cls) if f.name not in without}
    given = [part.partition("=")[::2] for part in text.removeprefix(name).split(",")]
    if not text.startswith(name) or sorted(field for field, _ in given) != sorted(kinds):
        raise InputError(f"reduce must read as {method}.describe writes it, found {text!r}")
    try:
        return {field: _READ[kinds[field]](value) for field, value in given}
    except (ValueError, KeyError):
        raise InputError(f"reduce must hold numbers where {method}.describe writes them, found {text!r}") from None
