# SPDX-License-Identifier: Apache-2.0
"""Tables: alignment, numbers, and the README round trip."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtjax.errors import InputError
from vtjax.viz import tables

HEADER = ("model", "params", "top-1", "note")
ROWS = [("ViT-Ti/16", 5717416, "75.5%", None), ("ViT-B/16", 86567656, "1.2%", "a|b")]


def test_text_aligns_numbers_to_the_right() -> None:
    assert tables.text(HEADER, ROWS).splitlines() == [
        "model          params  top-1  note",
        "---------  ----------  -----  ----",
        "ViT-Ti/16   5,717,416  75.5%",
        "ViT-B/16   86,567,656   1.2%  a|b",
    ]


def test_markdown_aligns_and_escapes() -> None:
    assert tables.markdown(HEADER, ROWS).splitlines() == [
        "| model | params | top-1 | note |",
        "|---|---:|---:|---|",
        "| ViT-Ti/16 | 5,717,416 | 75.5% |  |",
        "| ViT-B/16 | 86,567,656 | 1.2% | a\\|b |",
    ]


def test_tables_without_rows_and_uneven_rows() -> None:
    assert tables.text(("a", "b"), []) == "a  b\n-  -"
    with pytest.raises(ValueError, match=r"2 values \(a, b\), found 1"):
        tables.markdown(("a", "b"), [(1,)])


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        (None, ""),
        (True, "yes"),
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (1234.5, "1234"),
        (12345.6, "12,346"),
        (1e-7, "1e-07"),
        ("x", "x"),
        ((1, 2), "(1, 2)"),
    ],
)
def test_number(value: object, printed: str) -> None:
    assert tables.number(value) == printed


README = """# Title

<!-- table:speed -->
| stale |
<!-- /table -->
between
<!-- table:size --><!-- /table -->
end
"""


def test_refresh_writes_only_what_differs(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(README)
    new = {"size": tables.markdown(("a",), [(1,)]), "speed": tables.markdown(("b",), [("x",)])}
    assert tables.refresh(file, new, check=True) == ["speed", "size"]
    assert file.read_text() == README
    assert tables.refresh(file, new) == ["speed", "size"]
    assert file.read_text() == (
        "# Title\n\n<!-- table:speed -->\n| b |\n|---|\n| x |\n<!-- /table -->\nbetween\n"
        "<!-- table:size -->\n| a |\n|---:|\n| 1 |\n<!-- /table -->\nend\n"
    )
    assert tables.refresh(file, new, check=True) == tables.refresh(file, new) == []
    assert tables.refresh(file, {"size": "| other |"}) == ["size"]
    assert "| x |" in file.read_text()
    assert [f.name for f in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no markers", "has no <!-- table:t -->"),
        ("<!-- table:t -->", "table:t --> has no <!-- /table -->"),
        ("<!-- /table -->", "out of turn"),
        ("<!-- table:t --><!-- table:u --><!-- /table -->", "out of turn"),
    ],
)
def test_bad_markers(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "README.md"
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        tables.refresh(file, {"t": "| x |"})
    assert file.read_text() == content


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="README.md does not exist"):
        tables.refresh(tmp_path / "README.md", {})
    with pytest.raises(InputError, match="x.jsonl does not exist"):
        tables.read_jsonl(tmp_path / "x.jsonl")


def test_read_jsonl_forgives_a_torn_last_line_only(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"a": 1}\n\n{"a": 2}\n{"a": ')
    assert tables.read_jsonl(file) == [{"a": 1}, {"a": 2}]
    file.write_text('{"a": 1}\n[2]\n{"a": 3}\n')
    with pytest.raises(InputError, match=r"line 2 must be a JSON object, found '\[2\]'"):
        tables.read_jsonl(file)


def test_a_table_without_records_says_so(tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    makers = (
        ("sum", "some", lambda records: str(sum(r["a"] for r in records))),
        ("nothing to say", "some", lambda records: ""),
        ("no file", "other", lambda records: "never"),
    )
    none = tables.NOTHING
    assert tables.from_records(tmp_path, makers) == {"sum": "3", "nothing to say": none, "no file": none}
