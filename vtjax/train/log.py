# SPDX-License-Identifier: Apache-2.0
"""What a run says: the progress line, `metrics.jsonl`, TensorBoard, and JSON files written whole or not at all."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import platform
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from etils import epath

from vtjax import paths
from vtjax.train.task import Batch

SAY_EVERY = 2.0  # seconds between two lines of an evaluation


def plain(value: Any) -> Any:
    """`value` as JSON-able Python: config dicts, tuples, numpy and device arrays; a non-finite float becomes text."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def write_text(path: epath.Path, text: str, shared: bool = False) -> None:
    """Writes a file whole or not at all: where it is local by a temporary file, fsync and rename, where it is an object
    (`gs://...`) by one write, which is that by itself. Process 0 only; missing folders are made. `shared`: other runs,
    perhaps on other machines, write it, too."""
    if jax.process_index() != 0:
        return
    if not is_local(path):
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = f".{socket.gethostname()}-{os.getpid()}" if shared else ""
    temporary = path.parent / f".{path.name}{mine}.tmp"
    with _naming(path), open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def _naming(path: epath.Path) -> Iterator[None]:
    """Puts the path into an error that has none: a full disk shows in `write`, which does not know it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def write_json(path: epath.Path, value: Any) -> None:
    """As `write_text`, for a JSON-able value."""
    write_text(path, json.dumps(plain(value), indent=1) + "\n")


def is_local(path: epath.Path) -> bool:
    """False for `gs://` and the like, which can neither append nor fsync."""
    return not paths.is_url(path)


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """`path` as orbax wants it; `gs://` paths stay as they are. Raises `MissingExtraError` where gcsfs is missing."""
    paths.check_url(os.fspath(path))
    path = epath.Path(path)
    return epath.Path(os.path.abspath(path)) if is_local(path) else path


class Lines:
    """`metrics.jsonl`: one object per step, in order, each with `step`.

    Opening drops every line with a step beyond `last_step` and a torn last line (a kill while writing), atomically. So
    a resumed run leaves the file as an uninterrupted one does. Only process 0 writes.
    """

    def __init__(self, path: epath.Path, last_step: int):
        self._path = path
        self._lines: list[str] = []
        self._step = -1
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                step = json.loads(line)["step"]
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
            if self._step < step <= last_step:
                self._lines.append(line)
                self._step = step
        self._rewrite()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends `{"step": step, **values}`; values for the step of the last line are joined to that line."""
        joined = step == self._step
        old = json.loads(self._lines.pop()) if joined else {}
        line = json.dumps({"step": step, **old, **plain(values)})
        self._lines.append(line)
        self._step = step
        if joined or not is_local(self._path):
            self._rewrite()
        elif jax.process_index() == 0:
            with _naming(self._path), open(self._path, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def _rewrite(self) -> None:
        write_text(self._path, "".join(line + "\n" for line in self._lines))


class TensorBoard:
    """`clu.metric_writers` where TensorFlow is importable; otherwise does nothing."""

    def __init__(self, folder: epath.Path):
        self._writer: Any = None
        if jax.process_index() == 0 and importlib.util.find_spec("tensorflow") is not None:
            from clu import metric_writers

            self._writer = metric_writers.SummaryWriter(os.fspath(folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars of one step."""
        if self._writer is not None:
            self._writer.write_scalars(step, dict(values))
            self._writer.flush()


class Progress:
    """One line on standard error: step, loss, images/s, time left, memory. Rewritten in place on a terminal.

    Args:
      steps: last step of the run.
      images: images per step.
      stream: text stream; standard error where None.
    """

    def __init__(self, steps: int, images: int, stream: Any = None):
        self._steps, self._images = steps, images
        self._stream = sys.stderr if stream is None else stream
        self._seconds = 0.0
        self._counted = 0
        self._since: float | None = None
        self._open = False

    def done(self) -> None:
        """Call when a step is known to be finished. The clock starts with the first, so its compilation is out."""
        now = time.perf_counter()
        if self._since is not None:
            self._seconds += now - self._since
            self._counted += 1
        self._since = now

    def pause(self) -> None:
        """Call before an evaluation or a save, when no step is under way: the time until `resume` does not count."""
        self._since = None

    def resume(self) -> None:
        """Call when the next step is about to begin."""
        self._since = time.perf_counter()

    @property
    def images_per_s(self) -> float | None:
        """Mean of the finished steps of this process's run; None before the second one."""
        return self._counted * self._images / self._seconds if self._counted and self._seconds else None

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Prints the line for a step."""
        speed, left = "-", "-"
        if rate := self.images_per_s:
            speed, left = f"{rate:.0f}", _clock((self._steps - step) * self._images / rate)
        parts = [f"step {step}/{self._steps}", f"loss {values['loss']:.4g}"]
        parts += [f"{speed} images/s", f"{left} left", f"memory {memory_gib():.1f} GiB"]
        self.say("  ".join(parts), keep=False)

    def say(self, text: str, keep: bool = True) -> None:
        """A line; with `keep` it stays on a terminal where later progress lines replace each other."""
        if jax.process_index() != 0:
            return
        if self._stream.isatty():
            self._stream.write(f"\r\033[K{text}" + ("\n" if keep else ""))
            self._open = not keep
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Ends an open terminal line."""
        if self._open:
            self._stream.write("\n")
            self._open = False


def watched(batches: Iterable[Batch], total: int, say: Callable[[str], None], last: bool = False) -> Iterator[Batch]:
    """The batches of an evaluation; every few seconds `say` gets a line that tells how far it is.

    Args:
      batches: this process's; of `total` valid examples over all processes.
      last: say it at the end, too.
    """
    done, began = 0, time.monotonic()
    said = began
    for batch in batches:
        yield batch
        done = min(done + int(batch["valid"].sum()) * jax.process_count(), total)
        now = time.monotonic()
        if now - said > SAY_EVERY or (last and done == total):
            say(f"evaluated {done} of {total}, {done / (now - began):.0f} images/s")
            said = now


def parameters(params: Any) -> str:
    """How many parameters there are, in one line; in a table, array by array, where vtjax logs at the level debug."""
    if logging.getLogger("vtjax").isEnabledFor(logging.DEBUG):
        return parameter_overview.get_parameter_overview(params, include_stats=False)
    counts: dict[str, int] = {}
    for name, tree in params.items():
        kind = "blocks" if name.startswith("block_") else name
        counts[kind] = counts.get(kind, 0) + int(parameter_overview.count_parameters({name: tree}))
    return f"{sum(counts.values()):,} parameters: " + ", ".join(f"{kind} {n:,}" for kind, n in counts.items())


class Profile:
    """A trace of the steps start .. stop - 1 by `jax.profiler`; nothing where both are 0.

    A context; on leaving it an open trace is written.
    """

    def __init__(self, steps: tuple[int, int], folder: epath.Path):
        (self._start, self._stop), self._folder, self._open = steps, folder, False

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def before(self, step: int) -> None:
        """Call before step number `step` (from 0) is dispatched."""
        if self._start <= step < self._stop and not self._open:
            jax.profiler.start_trace(os.fspath(self._folder))
            self._open = True

    def after(self, step: int, result: jax.Array) -> None:
        """Call when it is dispatched, with something that it computes."""
        if self._open and step + 1 >= self._stop:
            jax.block_until_ready(result)
            self._close()

    def _close(self) -> None:
        if self._open:
            jax.profiler.stop_trace()
            self._open = False


def memory_gib() -> float:
    """Peak memory in GiB: of the first device where the backend tells, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    out = {"python": platform.python_version()}
    for name in ("vtjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
