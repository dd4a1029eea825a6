# SPDX-License-Identifier: Apache-2.0
"""Runs notebooks and keeps their outputs: `make notebooks`. The tests run copies at the size `tiny`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300_000  # bytes on disk


def execute(path: Path, size: str, timeout: int = 3600) -> Any:
    """The executed notebook; the file is left as it is.

    Args:
      path: the notebook. It runs in the root of the checkout.
      size: the variant of its config, which the notebook reads from the environment (`VTJAX_SIZE`); "" = its own.
      timeout: seconds for one cell.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    environment = {**os.environ, "VTJAX_SIZE": size, "PYTHONPATH": str(ROOT)}
    client = NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(ROOT)}})
    client.execute(env=environment)
    # Times of cells and the patch version of Python would change the file at every run.
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def main(paths: list[str]) -> None:
    for name in paths:
        start = time.time()
        notebook = execute(Path(name), size="")
        text = nbformat.writes(notebook) + "\n"
        if str(ROOT) in text:
            sys.exit(f"{name}: the outputs name a folder of this machine ({ROOT}); print relative paths")
        if len(text) >= LIMIT:
            sys.exit(f"{name}: {len(text)} bytes with outputs, expected below {LIMIT}; make the figures smaller")
        Path(name).write_text(text)
        print(f"{name}: {time.time() - start:.0f} s, {len(text) // 1000} kB", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
