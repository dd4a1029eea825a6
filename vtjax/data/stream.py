# SPDX-License-Identifier: Apache-2.0
"""Batches as functions of a step, made ahead on grain; and the random numbers that they draw from."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from vtjax.errors import InputError

Batch = dict[str, np.ndarray]
ENDLESS = 2**62
# Domains of randomness: streams with different ones are independent.
ORDER, EXAMPLE, MIX, DRAW = range(4)  # DRAW + number of the split, of which there are two
GROUP = 5


def batches(make: Callable[[int], Batch], start: int, stop: int, *, prefetch: int, workers: int = 0) -> Iterator[Batch]:
    """`make(start), ..., make(stop - 1)`.

    Args:
      make: a pure function of the step.
      prefetch: batches that are prepared ahead, by one thread each (with workers: per worker); 0 = none.
      workers: processes that prepare them; 0 = threads of this process.
    """
    steps = grain.MapDataset.range(start, stop).map(make)
    reading = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
    made = steps.to_iter_dataset(reading)
    if workers:
        from absl import flags

        # grain reads its flags, which nobody has parsed where absl's app.run is not used.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=max(1, prefetch))
        made = made.mp_prefetch(options, worker_init_fn=_start_worker)
    return _Stream(iter(made), copy=workers > 0)


@functools.lru_cache(maxsize=4)
def order(seed: int, domain: int, epoch: int, size: int) -> np.ndarray:
    """The order of one epoch: a permutation of 0..size-1, int64."""
    return rng(seed, domain, epoch).permutation(size)


def rng(seed: int, domain: int, number: int) -> np.random.Generator:
    """The generator of one epoch, example, batch or draw."""
    return np.random.default_rng((seed, domain, number))


class _Stream(Iterator[Batch]):
    """A grain iterator whose threads and processes end when it is closed or dropped, or when the interpreter exits."""

    def __init__(self, batches: Any, copy: bool):
        self._batches, self._copy = batches, copy
        _open.add(self)

    def __next__(self) -> Batch:
        if self._batches is None:
            raise StopIteration
        batch = next(self._batches)
        # Arrays of workers live in shared memory that is freed with them, whoever still looks at it.
        return {k: np.array(v) for k, v in batch.items()} if self._copy else batch

    def close(self) -> None:
        """Ends the stream; a second time does nothing."""
        batches, self._batches = self._batches, None
        if batches is not None:
            batches.close()

    __del__ = close


_open: weakref.WeakSet[_Stream] = weakref.WeakSet()


# Registered after multiprocessing's own hook (grain imports it), so it runs before: that hook waits for workers to obey
# SIGTERM, and grain's __del__ comes when the modules that it needs are gone.
@atexit.register
def _close_open() -> None:
    for stream in list(_open):
        stream.close()


def _start_worker(index: int, count: int) -> None:
    """Ties a worker to its parent: signals to the whole group are the parent's affair (it saves, then closes the
    stream), and a worker whose parent was killed must not stay behind."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def own_rows(batch_size: int, rows: Sequence[int] | None) -> list[int]:
    """This process's rows of every global batch, all of them for None; raises InputError unless they ascend in it."""
    mine = list(range(batch_size)) if rows is None else list(rows)
    if sorted(set(mine)) != mine or not mine or mine[0] < 0 or mine[-1] >= batch_size:
        raise InputError(f"rows must ascend within 0..{batch_size - 1}, found {mine[:8]}")
    return mine
