# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C as a request: the loop finishes its step, saves, and ends with an exit code that says which."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vtjax.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED
from vtjax.parallel import mesh as mesh_lib

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Context in which SIGTERM, and SIGINT the first time, set `received` and do nothing else.

    After its first time SIGINT has its former handler again, so that a second Ctrl-C interrupts; on leaving, both have.
    Python runs handlers between bytecodes, so a signal during a compilation or a device wait is seen when that ends.
    Outside the main thread, where handlers cannot be set, the signals keep their former meaning.

    Attributes:
      received: number of the first signal; 0 before.
    """

    def __init__(self) -> None:
        self.received = 0
        self._heard = 0
        self._flag: tuple[int, jax.Array] | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number in self._former:
            self._restore(number)

    @property
    def now(self) -> bool:
        """Whether to stop now, the same on all processes: alone as soon as the signal is here, with others when all
        have heard of it."""
        return bool(self.received if jax.process_count() == 1 else self._heard)

    def flag(self, mesh: Mesh) -> jax.Array:
        """int32 `[devices]`: the signal that this process has received, on its own devices; what a compiled step takes
        the maximum of."""
        if self._flag is None or self._flag[0] != self.received:
            value = np.full(mesh.size, self.received, np.int32)
            self._flag = self.received, mesh_lib.put(value, mesh_lib.device_sharding(mesh))
        return self._flag[1]

    def hear(self, number: int) -> None:
        """The maximum that a step gave back. Of two signals the larger number, SIGTERM, counts everywhere."""
        if number:
            self._heard = self.received = number

    @property
    def name(self) -> str:
        """Of the signal received."""
        return signal.Signals(self.received).name

    @property
    def exit_code(self) -> int:
        """`EXIT_INTERRUPTED` after SIGINT, `EXIT_PREEMPTED` after SIGTERM."""
        return EXIT_INTERRUPTED if self.received == signal.SIGINT else EXIT_PREEMPTED

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if number == signal.SIGINT:
            self._restore(number)
            # Not by `sys.stderr`, in the middle of whose writing a handler may run.
            os.write(2, _FIRST)

    def _restore(self, number: int) -> None:
        if self._former[number] is not None:
            signal.signal(number, self._former[number])


_FIRST = b"\nSIGINT: finishing the step, then saving; a second one ends at once\n"
