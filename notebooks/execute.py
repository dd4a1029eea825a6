# SPDX-License-Identifier: Apache-2.0
"""Runs notebooks and keeps their outputs: `make notebooks`. The tests run copies at the size `tiny`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300_000  # bytes on disk


def execute(path: Path, size: str, timeout: int = 3600, say: Callable[[str], None] | None = None) -> Any:
    """The executed notebook; the file is left as it is.

    Args:
      path: the notebook. It runs in the root of the checkout.
      size: the variant of its config, which the notebook reads from the environment (`VTJAX_SIZE`); "" = its own.
      timeout: seconds for one cell.
      say: gets a line before every cell of code.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    environment = {**os.environ, "VTJAX_SIZE": size, "PYTHONPATH": str(ROOT)}

    def starts(cell: Any, cell_index: int) -> None:
        if say is not None and cell.cell_type == "code":
            first = next((line for line in cell.source.splitlines() if line.strip()), "")
            say(f"{path.name}: cell {cell_index + 1} of {len(notebook.cells)}: {first[:60]}")

    client = NotebookClient(
        notebook,
        timeout=timeout,
        resources={"metadata": {"path": str(ROOT)}},
        on_cell_start=starts,
        # Of its warnings none is about a notebook: how it was started, and by whom.
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )
    client.execute(env=environment)
    # Times of cells and the patch version of Python would change the file at every run.
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def main(paths: list[str]) -> int:
    """Exit code 0, 1 where the outputs cannot be kept, 2 without a notebook."""
    if not paths:
        known = ", ".join(sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")))
        say(f"no notebook to run: ONLY must be one of {known}, found {os.environ.get('ONLY', '')!r}")
        return 2
    for name in paths:
        start = time.time()
        notebook = execute(Path(name), size="", say=say)
        text = nbformat.writes(notebook) + "\n"
        if str(ROOT) in text:
            say(f"{name}: the outputs name a folder of this machine ({ROOT}); print relative paths")
            return 1
        if len(text) >= LIMIT:
            say(f"{name}: {len(text)} bytes with outputs, expected below {LIMIT}; make the figures smaller")
            return 1
        Path(name).write_text(text)
        say(f"{name}: {time.time() - start:.0f} s, {len(text) // 1000} kB")
    return 0


def say(text: str) -> None:
    """A line for people."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
