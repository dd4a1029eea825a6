# SPDX-License-Identifier: Apache-2.0
"""Tables as text and Markdown, and the tables of a README, rebuilt from recorded results.

A README holds its tables between `<!-- table:NAME -->` and `<!-- /table -->`, so that no figure in it is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vtjax.errors import InputError

_NUMBER = re.compile(r"[-+]?[\d,.]*\d(e[-+]?\d+)?\s?(%|x|s|ms|MB|GB)?")
_MARKER = re.compile(r"<!-- (table:\S+|/table) -->")

NOTHING = "*Not recorded.*"
"""What stands in a README for a table without records."""


def text(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned plain text without a final newline; columns of numbers are set flush right.

    Integers get thousands separators, floats four significant digits, None and "" stay empty; format a value beforehand
    to have it otherwise.
    """
    cells, right = _cells(header, rows)
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]

    def line(values: Sequence[str]) -> str:
        parts = [v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True)]
        return "  ".join(parts).rstrip()

    return "\n".join([line(cells[0]), line(["-" * w for w in widths]), *map(line, cells[1:])])


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table without a final newline, formatted as `text`; a "|" in a cell is escaped."""
    cells, right = _cells(header, rows)
    lines = ["| " + " | ".join(v.replace("|", "\\|").replace("\n", " ") for v in line) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("---:" if r else "---" for r in right) + "|", *lines[1:]])


def number(value: Any) -> str:
    """How `text` and `markdown` print one value."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def spread(record: Mapping[str, Any], name: str) -> str:
    """ " [low, high]" of the record's field `name`_range, the 10th and 90th percentile of a timing's rounds; "" where
    they were not recorded."""
    return " [{:.2f}, {:.2f}]".format(*record[f"{name}_range"]) if f"{name}_range" in record else ""


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Objects of a `.jsonl` file, in order; a torn last line is passed over.

    Raises:
      InputError: there is no such file, or a line before the last is no JSON object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        raise InputError(f"records file {os.fspath(path)} does not exist") from None
    found = []
    for number_, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            value = None
        if isinstance(value, dict):
            found.append(value)
        elif number_ < len(lines):
            raise InputError(f"{os.fspath(path)} line {number_} must be a JSON object, found {line[:40]!r}")
    return found


def from_records(
    folder: str | os.PathLike[str], makers: Iterable[tuple[str, str, Callable[[list[dict[str, Any]]], str]]]
) -> dict[str, str]:
    """Markdown by table name, each made from the records of a file; `NOTHING` where there are none of its kind.

    Args:
      folder: of the `.jsonl` files.
      makers: (table, file without its ending, function of the records).

    Raises:
      InputError: as `read_jsonl`.
    """
    found = {}
    for name, file, make in makers:
        path = Path(folder) / f"{file}.jsonl"
        found[name] = (make(read_jsonl(path)) if path.exists() else "") or NOTHING
    return found


def refresh(path: str | os.PathLike[str], tables: Mapping[str, str], check: bool = False) -> list[str]:
    """Puts the tables between their markers.

    Args:
      path: the Markdown file; it is rewritten whole or not at all.
      tables: Markdown by name. Markers with other names are left alone.
      check: only compare.

    Returns:
      Names of the tables that differed.

    Raises:
      InputError: no such file, a table without its markers, or markers that do not pair.
    """
    file = Path(path)
    try:
        old = file.read_text(encoding="utf-8")
    except OSError:
        raise InputError(f"Markdown file {file} does not exist") from None
    changed, parts, end, seen = [], [], 0, set()
    for name, start, stop in _between_markers(old, file):
        seen.add(name)
        if name not in tables:
            continue
        new = f"\n{tables[name].strip()}\n"
        if old[start:stop] != new:
            changed.append(name)
        parts += [old[end:start], new]
        end = stop
    missing = [name for name in tables if name not in seen]
    if missing:
        raise InputError(f"{file} has no <!-- table:{missing[0]} -->")
    if changed and not check:
        temporary = file.with_name(f".{file.name}.tmp")
        temporary.write_text("".join([*parts, old[end:]]), encoding="utf-8")
        temporary.replace(file)
    return changed


def command(path: str | os.PathLike[str], build: Callable[[], Mapping[str, str]], description: str | None) -> int:
    """The command line of a module that makes a page's tables; the exit code. With `--check` nothing is written, and
    the code is 1 where a table differs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    changed = refresh(path, build(), check=check)
    print(f"{', '.join(changed) or 'nothing'} {'differs' if check else 'rewritten'}", file=sys.stderr)
    return 1 if check and changed else 0


def _between_markers(content: str, file: Path) -> Iterator[tuple[str, int, int]]:
    """Name, start and stop of what stands between each pair of markers."""
    name, start = "", 0
    for marker in _MARKER.finditer(content):
        opens = marker[1] != "/table"
        if opens == bool(name):
            raise InputError(
                f"{file}: every <!-- table:NAME --> needs its <!-- /table -->, found {marker[0]} out of turn"
            )
        if opens:
            name, start = marker[1].removeprefix("table:"), marker.end()
        else:
            yield name, start, marker.start()
            name = ""
    if name:
        raise InputError(f"{file}: <!-- table:{name} --> has no <!-- /table -->")


def _cells(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> tuple[list[list[str]], list[bool]]:
    """All lines as text, the header first, and which columns hold numbers only."""
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row must hold {len(header)} values ({', '.join(header)}), found {len(row)}")
    body = [[number(value) for value in row] for row in rows]
    filled = [[line[i] for line in body if line[i]] for i in range(len(header))]
    right = [bool(column) and all(_NUMBER.fullmatch(v) for v in column) for column in filled]
    return [list(header), *body], right
