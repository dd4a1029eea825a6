# SPDX-License-Identifier: Apache-2.0
"""The command line in this process, as in tests/cli."""

from tests.cli.conftest import vtjax  # noqa: F401
