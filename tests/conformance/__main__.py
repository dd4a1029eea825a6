# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.conformance METHOD FILE.npz`: replays a file of recorded arrays through vtjax.

Every array of the file is an input or is compared; what is neither is a miss. Prints the largest error per group, then
one line of JSON: `groups`, `compared`, `unread`, `worst`, `failed` (the arrays that missed). Exit code 1 on any miss,
or where nothing was compared; 2 on a file that cannot be replayed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import zipfile

import jax
import numpy as np

from tests.conformance.arrays import Arrays, MissingError

METHODS = ("ltmp", "dgmr", "das")


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("file")
    arguments = parser.parse_args()
    method = importlib.import_module(f"tests.conformance.{arguments.method}")
    try:
        with np.load(arguments.file, allow_pickle=False) as file:
            arrays = Arrays({name: file[name] for name in file.files}, method.SEPARATOR)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        print(f"{arguments.file}: expected an .npz file of plain arrays, found {error}", file=sys.stderr)
        return 2
    try:
        with jax.default_matmul_precision("highest"):
            method.replay(arrays)
    except MissingError as error:
        print(
            f"{arguments.file}: expected the array {error.args[0]} beside those of its case, found none",
            file=sys.stderr,
        )
        return 2
    result = arrays.result()
    for group, (error, worst) in arrays.worst().items():
        print(f"{group:24s} largest error {error:.2e} of its tolerance's 1 at {worst}", file=sys.stderr)
    print(json.dumps(result))
    return 1 if result["failed"] or result["unread"] or not result["compared"] else 0


if __name__ == "__main__":
    sys.exit(main())
