# SPDX-License-Identifier: Apache-2.0
"""One JSON line per measurement, with what is needed to judge and repeat it; no path of the machine in it."""

from __future__ import annotations

import datetime
import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

_ROOT = Path(__file__).resolve().parent.parent.parent
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_RESERVED = ("command", "date", "commit", "hardware", "versions", "load")

# An absolute path of two parts or more; a URL (gs://...) does not match.
_ABSOLUTE = re.compile(r"(?<![\w.:/~])/(?:[^\s/'\":=,;]+/)+[^\s/'\":=,;]*")


def write(path: str | os.PathLike[str], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Appends `fields` and the circumstances to a `.jsonl` file, and returns the whole record.

    The line is written by one system call to a locked file opened for appending, so that lines of several processes do
    not mix; a line that a killed process left unfinished is closed first. Absolute paths in texts are cut: to the path
    within the checkout, else to the last part.

    Args:
      path: the file; missing folders are made.
      fields: JSON-able; by custom with `seed` (or `seeds`). Numpy and JAX scalars and arrays are converted.

    Raises:
      ValueError: a field that is written here (`command`, `date`, `commit`, `hardware`, `versions`, `load`), or a
        value that is no JSON (NaN included).
    """
    taken = [name for name in _RESERVED if name in fields]
    if taken:
        raise ValueError(f"record fields must not be {', '.join(_RESERVED)}, found {', '.join(taken)}")
    record = {**_clean(dict(fields)), **circumstances()}
    line = json.dumps(record, allow_nan=False, default=_plain) + "\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        # Else the end that is looked at may be inside another one's line: a file grows while it is written to.
        fcntl.flock(handle, fcntl.LOCK_EX)
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = "\n" + line
        os.write(handle, line.encode())
    finally:
        os.close(handle)
    return json.loads(line)


def circumstances() -> dict[str, Any]:
    """`command`, `date` (UTC), `commit`, `hardware`, `versions`, `load` (average over 1, 5, 15 minutes)."""
    return {
        "command": _clean(" ".join([Path(sys.argv[0]).name or "python", *sys.argv[1:]])),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
        "load": [round(x, 2) for x in os.getloadavg()],
    }


@functools.cache
def hardware() -> dict[str, Any]:
    """CPU model, usable cores, memory in GB (10^9 bytes), and JAX's devices as `{kind: count}`."""
    kinds: dict[str, int] = {}
    for device in jax.devices():
        kinds[device.device_kind] = kinds.get(device.device_kind, 0) + 1
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "devices": kinds,
    }


def versions() -> dict[str, str]:
    """Python's version and those of the packages that decide speed and numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Git commit of the checkout, with "+" where tracked files differ from it; None outside a checkout."""
    if not (_ROOT / ".git").exists():
        return None
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*args: str) -> str:
    run = subprocess.run(["git", "-C", str(_ROOT), *args], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return names[1].strip() if names else platform.machine()


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return _ABSOLUTE.sub(lambda found: _short(found[0]), value)
    if isinstance(value, Mapping):
        return {str(k): _clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(v) for v in value]
    return value


def _short(path: str) -> str:
    whole = Path(path)
    if whole.is_relative_to(_ROOT) and whole != _ROOT:
        return str(whole.relative_to(_ROOT))
    return whole.name


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return _clean(os.fspath(value))
    raise ValueError(f"a record holds JSON values, found {type(value).__name__}")


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a file, oldest first; unfinished lines are passed over."""
    records = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                records.append(record)
    return records
