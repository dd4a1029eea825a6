# SPDX-License-Identifier: Apache-2.0
"""Frozen dataclasses as JSON and back: types are checked, and whatever is wrong is named by its dotted name."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from vtjax.errors import InputError


def diff(a: Any, b: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Leaves that differ between two JSON-able values, by dotted name; a missing side is None."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        pairs = [(f"{name}.{k}" if name else str(k), a.get(k), b.get(k)) for k in dict.fromkeys([*a, *b])]
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and name and _nested(a, b):
        longest = range(max(len(a), len(b)))
        pairs = [(f"{name}[{i}]", a[i] if i < len(a) else None, b[i] if i < len(b) else None) for i in longest]
    else:
        return {} if plain(a) == plain(b) else {name: (a, b)}
    return {k: v for label, x, y in pairs for k, v in diff(x, y, label).items()}


def _nested(*lists: Any) -> bool:
    return any(isinstance(x, Mapping) for values in lists for x in values)


def choice(spec: Any, field: str, allowed: tuple[str, ...]) -> None:
    if getattr(spec, field) not in allowed:
        raise InputError(
            f"{type(spec).__name__}.{field} must be one of {', '.join(allowed)}, found {getattr(spec, field)!r}"
        )


def _known(cls: type, names: Iterable[str], where: str) -> None:
    known = [f.name for f in dataclasses.fields(cls)]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(f"{where} has no field {name!r}, expected one of {', '.join(known)}{hint}")


def edit(spec: Any, changes: dict[str, Any]) -> Any:
    _known(type(spec), changes, type(spec).__name__)
    blocks = changes.get("blocks")
    if isinstance(blocks, Mapping):
        edited = list(spec.blocks)
        for index, fields in blocks.items():
            if not isinstance(index, int) or not -len(edited) <= index < len(edited):
                raise InputError(f"blocks[{index!r}] does not exist, expected an index below {len(edited)}")
            if not isinstance(fields, Mapping):
                raise InputError(f"blocks[{index}] must be edited by a mapping of fields, found {fields!r}")
            _known(type(edited[index]), fields, f"blocks[{index}]")
            edited[index] = dataclasses.replace(edited[index], **fields)
        changes = {**changes, "blocks": tuple(edited)}
    elif callable(blocks):
        changes = {**changes, "blocks": tuple(blocks(i, b) for i, b in enumerate(spec.blocks))}
    # By way of the JSON form, which checks the types of the new values.
    fields = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
    return build(type(spec), plain({**fields, **changes}), type(spec).__name__)


def plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def build(cls: type, data: Mapping[str, Any], where: str) -> Any:
    if not isinstance(data, Mapping):
        raise InputError(f"{where} must be an object, found {type(data).__name__}")
    _known(cls, data, where)
    hints = typing.get_type_hints(cls)
    values = {k: _value(hints[k], v, f"{where}.{k}") for k, v in data.items()}
    for field in dataclasses.fields(cls):
        if field.name not in values and field.default is dataclasses.MISSING:
            raise InputError(f"{where} lacks the field {field.name!r}")
    return cls(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type, or an InputError that names the field."""
    args = typing.get_args(hint)
    if isinstance(value, Mapping) and sum(map(dataclasses.is_dataclass, args)) > 1:
        # Of several classes the first that has all the fields.
        hint = next((kind for kind in args if value.keys() <= {f.name for f in dataclasses.fields(kind)}), args[0])
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{where} must be a list, found {value!r}")
        if args[-1] is not Ellipsis and len(args) != len(value):
            raise InputError(f"{where} must hold {len(args)} values, found {len(value)}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(_value(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if args:  # X | None
        return None if value is None else _value(args[0], value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise InputError(f"{where} must be {hint.__name__}, found {value!r}")
    return value
