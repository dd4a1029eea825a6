# SPDX-License-Identifier: Apache-2.0
"""Pretended devices of a child process."""

from __future__ import annotations

import os


def flags(count: int) -> str:
    """XLA_FLAGS of a child on `count` CPU devices, which compiles as fast as its parent."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
