# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can cause. The command line turns them into one line and an exit code."""

from __future__ import annotations

from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: a config key, value, path, checkpoint or shape.

    The message is one line that names the thing, what was expected and what was found.
    The command line prints it without a traceback and exits with code 2.
    """


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Raises InputError unless `value` is one of the known ones."""
    if value not in (known := tuple(known)):
        raise InputError(f"{name} must be one of {', '.join(known)}, found {value!r}")


class BusyError(InputError):
    """Another process is at work in the folder; it may be finished later."""


class MissingExtraError(InputError):
    """An optional package is needed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'vtjax[{extra}]'")


class NonFiniteError(RuntimeError):
    """Training met a non-finite loss or gradient; the update was masked and the run stopped (exit code 3)."""


class Preempted(SystemExit):
    """SIGTERM or Ctrl-C arrived: the state was saved; the code is `EXIT_PREEMPTED` or `EXIT_INTERRUPTED`."""


EXIT_BAD_INPUT = 2
EXIT_NON_FINITE = 3
EXIT_LOST = 76  # another process of the run is gone; start all of them again
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: "try again", which is what a scheduler should do
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell has it; in training the state was saved
