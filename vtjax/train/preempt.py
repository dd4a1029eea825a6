# SPDX-License-Identifier: Apache-2.0
"""SIGTERM as a request: the loop finishes its step, saves, and ends with `EXIT_PREEMPTED`."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

import jax
import numpy as np
from jax.experimental import multihost_utils


class Sigterm:
    """Context in which SIGTERM sets `requested` and does nothing else; the former handler returns afterwards.

    Python runs handlers between bytecodes, so a signal during a compilation or a device wait is seen when that ends.
    Outside the main thread, where handlers cannot be set, SIGTERM keeps its former meaning.
    """

    def __init__(self) -> None:
        self.requested = False
        self._former: object = None

    def __enter__(self) -> Sigterm:
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._former is not None:
            signal.signal(signal.SIGTERM, self._former)  # type: ignore[arg-type]

    @property
    def local(self) -> bool:
        """Whether to break off work that only a process alone may break off: the others would wait for it."""
        return self.requested and jax.process_count() == 1

    def agreed(self, ask: bool) -> bool:
        """Whether to stop now, the same on all processes. With several, they ask each other where `ask` is true."""
        if jax.process_count() == 1:
            return self.requested
        return ask and bool(multihost_utils.process_allgather(np.asarray(self.requested)).any())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
