# SPDX-License-Identifier: Apache-2.0
"""The command line as a user would call it: in a process of its own, in the root of the checkout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def vtjax(*arguments: str) -> dict[str, Any]:
    """The JSON of a command's last line.

    Raises:
      subprocess.CalledProcessError: it failed; what it said went to standard error.
    """
    command = [sys.executable, "-m", "vtjax", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
