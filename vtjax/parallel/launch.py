# SPDX-License-Identifier: Apache-2.0
"""Several processes of one run: joining, agreeing on what to run, ending when one of them is lost.

JAX's coordination service notices a lost process (by its heartbeats; the loss of process 0, which hosts the service, at
once) and aborts the others from C++, with a stack trace. `join` turns that into one line that names the lost process,
and `errors.EXIT_LOST`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import pathlib
import re
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the only way to its key-value store
from jax.experimental import multihost_utils

from vtjax.errors import EXIT_LOST, InputError

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_JOINING = 300  # seconds that processes wait for each other to start
_asked: Counter[str] = Counter()  # how often `agree` was called for a subject
_handlers: list[Any] = []  # ctypes keeps no reference of its own
_joined: list[bool] = []
_stdout: list[int] = []  # where standard output went before `join`


def wanted(multihost: bool) -> bool:
    """Whether this process is one of several: by the flag, or by one of the three variables."""
    return multihost or any(os.environ.get(name) for name in NAMES)


def join(multihost: bool, heartbeat_timeout: int, *, quiet: bool = True) -> None:
    """Joins the processes of one run; the first thing to do with JAX.

    Args:
      multihost: the cluster says who they are (Cloud TPU, SLURM, Kubernetes). JAX_COORDINATOR_ADDRESS,
        JAX_NUM_PROCESSES and JAX_PROCESS_ID say it anywhere else; without either, this process is alone.
      heartbeat_timeout: seconds after which a process that is not heard of counts as lost.
      quiet: what C++ writes goes to a file, which is named where it matters.

    Raises:
      InputError: the three variables are not complete, or no cluster is recognised.
    """
    if not wanted(multihost):
        return
    address, count, index = (os.environ.get(name, "") for name in NAMES)
    complete = bool(address) and count.isdigit() and index.isdigit() and int(index) < int(count)
    if not multihost and not complete:
        found = ", ".join(f"{name}={os.environ.get(name)!r}" for name in NAMES)
        raise InputError(
            f"several processes need HOST:PORT, their number and each one's index, found {found}; a process alone "
            "needs none of the three (unset them)"
        )
    if quiet:
        _explain_aborts(heartbeat_timeout)
    described: dict[str, Any] = {}
    if not multihost:
        described = {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}
    try:
        jax.distributed.initialize(
            **described, heartbeat_timeout_seconds=heartbeat_timeout, initialization_timeout=_JOINING
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(f"the processes of this run cannot be joined: {error}") from error
    _joined.append(True)
    me, host = jax.process_index(), socket.gethostname()
    _client().key_value_set(f"vtjax/host/{me}", host)
    print(f"joined as process {me} of {jax.process_count()}, on {host}", file=sys.stderr, flush=True)


def joined() -> bool:
    """Whether this process is one of several, and has met the others."""
    return jax.distributed.is_initialized()


def first() -> bool:
    """Whether this is the process that writes what one must write: process 0, or the only one."""
    return jax.process_index() == 0


def leave(code: int, *, together: bool) -> None:
    """Ends a process of several: together with the others, which need process 0 until their end; or, where only this
    one may have failed, with `code` and without waiting for more than a moment."""
    if not jax.distributed.is_initialized():
        return
    if together:
        jax.distributed.shutdown()
        return
    with contextlib.suppress(Exception):  # of jaxlib: nobody else came
        _client().wait_at_barrier("vtjax/failed", 3_000)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def restore_stdout() -> None:
    """Gives standard output back, which C++ (Gloo) would write into: after a command, before its result is printed."""
    if _stdout:
        os.dup2(_stdout.pop(), 1)


def from_first(value: int) -> int:
    """Process 0's number, on every process; all must call it."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if jax.process_count() > 1 else value


def agree(subject: str, values: Mapping[str, Any], patience: int = 60) -> None:
    """Compares `values` (JSON-able, flat) between all processes, which must all call it.

    Args:
      subject: part of the message.
      patience: seconds to wait for the slowest process.

    Raises:
      InputError: on every process, with the first differences between process 0 and another one; or a process that
        has not come in time.
    """
    if not jax.distributed.is_initialized():
        return
    client, me = _client(), jax.process_index()
    mine = json.dumps(dict(values), sort_keys=True, default=str)
    _asked[subject] += 1
    key = f"vtjax/agree/{subject}/{_asked[subject]}"
    client.key_value_set(f"{key}/{me}", mine)
    if me == 0:
        verdict = ""
        for other in range(1, jax.process_count()):
            theirs = json.loads(_wait_for(f"{key}/{other}", subject, other, patience))
            verdict = verdict or _difference(subject, json.loads(mine), theirs, other)
        client.key_value_set(f"{key}/verdict", verdict or "equal")
    verdict = _wait_for(f"{key}/verdict", subject, 0, patience * jax.process_count())
    if verdict != "equal":
        # All have read it before the first one leaves, whose end would be a loss to the others.
        client.wait_at_barrier(f"{key}/read", 1000 * patience)
        if me == 0:
            time.sleep(2)  # it serves the others, which learn of its end at once
        raise InputError(verdict)


@contextlib.contextmanager
def naming_the_lost(heartbeat_timeout: int) -> Iterator[None]:
    """Lets the coordination service have the first word where an error may be the loss of another process: a collective
    breaks at once when a peer is gone, the service knows who it was when its heartbeats are due."""
    try:
        yield
    except Exception as error:
        signs = re.search(r"Gloo|peer|UNAVAILABLE|DEADLINE|connection", str(error), re.IGNORECASE)
        if not jax.distributed.is_initialized() or not signs or isinstance(error, InputError):
            raise
        time.sleep(heartbeat_timeout + 10)
        raise


def _wait_for(key: str, subject: str, process: int, patience: int) -> str:
    try:
        return _client().blocking_key_value_get(key, 1000 * patience)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE" not in str(error):
            raise
        raise InputError(
            f"process {process} ({_host(process)}) has not told its {subject} within {patience} s, as all must"
        ) from None


def _difference(subject: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], other: int) -> str:
    names = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    if not names:
        return ""
    here, there = f"process 0 ({_host(0)})", f"process {other} ({_host(other)})"
    shown = "; ".join(f"{n} is {ours.get(n)!r} on {here}, {theirs.get(n)!r} on {there}" for n in names[:3])
    more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
    return f"all processes of a run must have the same {subject}: {shown}{more}"


def _host(index: int) -> str:
    try:
        return _client().key_value_try_get(f"vtjax/host/{index}")
    except Exception:  # of jaxlib, which names none; the message is worth more than the host
        return "host unknown"


def _client() -> Any:
    return distributed.global_state.client


def _explain_aborts(heartbeat_timeout: int) -> None:
    """Sends what C++ writes to standard output and error into a file, and reads there what to say when C++ aborts.
    Python's own `sys.stderr` stays where it was."""
    descriptor, path = tempfile.mkstemp(prefix=f"vtjax-{os.getpid()}-", suffix=".log")
    shown = os.dup(2)
    sys.stderr.flush()
    sys.stderr = os.fdopen(shown, "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    os.dup2(descriptor, 2)
    _stdout.append(os.dup(1))
    os.dup2(descriptor, 1)
    os.close(descriptor)

    def aborted(number: int) -> None:
        with open(path, encoding="utf-8", errors="replace") as file:
            said = file.read()
        code, line = _verdict(said, heartbeat_timeout)
        os.write(shown, f"vtjax: {line}; details: {path}\n".encode())
        os._exit(code)

    # By way of C: Python's own handlers run between bytecodes, and abort() does not come back.
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    _handlers.append(handler)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    atexit.register(lambda: pathlib.Path(path).unlink(missing_ok=True))


def _verdict(said: str, heartbeat_timeout: int) -> tuple[int, str]:
    """(exit code, line) from what C++ wrote before it aborted."""
    lost = re.search(r"stopped sending heartbeats\):?\s*(.*?)(?=\n\s*The tasks|\[type|\n\n|$)", said, re.DOTALL)
    resume = "start all processes again, the run goes on from its last checkpoint"
    if distributed.global_state.client is not None and not _joined:
        count = distributed.global_state.num_processes
        return EXIT_LOST, f"not all {count} processes came within {_JOINING} s; {resume}"
    if lost:
        indices = re.findall(r"\d+", lost[1])
        named = f"process{'es' * (len(indices) > 1)} {', '.join(indices)} lost"
        return EXIT_LOST, f"{named}: no heartbeat for {heartbeat_timeout} s (config.heartbeat_timeout); {resume}"
    if "coordination service" in said or "distributed service" in said:
        address = distributed.global_state.coordinator_address
        return EXIT_LOST, f"process 0 lost: the coordinator at {address} does not answer; {resume}"
    return 128 + signal.SIGABRT, "aborted by a library"
