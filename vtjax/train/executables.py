# SPDX-License-Identifier: Apache-2.0
"""Compiled programs that several runs of one process share."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from typing import Any


class Executables:
    """A cache of compiled programs by their lowered text.

    The text holds everything that is compiled: operations, constants, shapes, shardings, donation. So two runs share an
    executable where, and only where, they would have compiled the same one; they are traced each for itself. What it
    does not hold is the Python function behind a host callback: such programs are not shared. All runs must use the
    same devices.

    Attributes:
      compiled: how many executables were compiled, by the name of the program.
      shared: how many times one was found.
    """

    def __init__(self) -> None:
        self._by_text: dict[str, Any] = {}
        self.compiled: Counter[str] = Counter()
        self.shared: Counter[str] = Counter()

    def share(self, jitted: Any, name: str) -> Callable[..., Any]:
        """`jitted`, compiled with its first arguments through the cache; later ones must have the same shapes."""
        chosen: list[Any] = []

        def call(*args: Any) -> Any:
            if not chosen:
                chosen.append(self._get(jitted.lower(*args), name))
            return chosen[0](*args)

        return call

    def _get(self, lowered: Any, name: str) -> Any:
        text = lowered.as_text()
        key = hashlib.sha256(f"{lowered.in_tree} {lowered.out_tree}\n{text}".encode()).hexdigest()
        if key in self._by_text:
            self.shared[name] += 1
            return self._by_text[key]
        executable = lowered.compile()
        self.compiled[name] += 1
        if "callback" not in text:
            self._by_text[key] = executable
        return executable
