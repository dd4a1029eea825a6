# SPDX-License-Identifier: Apache-2.0
"""A model beside its dense baseline: compile time, latency, throughput, memory, MACs, cost and energy.

Ratios are dense over reduced. `realised` is the time ratio over the MAC ratio: 1 where the clock shows the whole saving
that the arithmetic promises. Both sides see the same batches, turn by turn (`account.timing`).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vtjax.account import timing
from vtjax.account.walk import Counts, walk
from vtjax.errors import InputError
from vtjax.spec import Spec

SIDES = ("reduced", "dense")
"""In the order in which they are compiled: the smaller first, so that a device's highest use shows for both."""


def images_of(batch: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a vision model takes of a batch."""
    return (batch["image"],)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model in the form in which it is deployed.

    Attributes:
      name: for people.
      apply: `apply(params, *inputs)`, any tree of arrays; traced and compiled here.
      params: its parameters.
      macs: per image, by formula. Where they depend on the image, a function of the inputs that are timed, giving their
        mean.
      settings: static facts for the result, such as where the parameters come from.
      inputs: batch (name -> arrays `[B, ...]`) -> inputs of `apply`.
      jit: False where `apply` drives compiled pieces from the host, for example because shapes depend on the data. The
        walk and the compiler do not see it whole then.
      tell: what the outputs of a call say, as numbers; their mean over the batches joins the result.
    """

    name: str
    apply: Callable[..., Any]
    params: Any
    macs: float | Callable[..., float]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    inputs: Callable[[Mapping[str, Any]], tuple[Any, ...]] = images_of
    jit: bool = True
    tell: Callable[[Any], Mapping[str, float]] | None = None


@dataclasses.dataclass(frozen=True)
class Rates:
    """Of the machine as a whole; None = not told.

    Attributes:
      price: per hour, in any currency.
      watts: drawn while it works.
      peak_tflops: 10^12 FLOP/s at most, for `mfu` (the share of it that the model's own FLOPs use).
    """

    price: float | None = None
    watts: float | None = None
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"--{field.name} must be positive and finite, found {value}")


def undone(spec: Spec) -> Spec:
    """The dense model that a spec came from, as far as the spec tells: token reducers off, no history.

    Raises:
      InputError: blocks or neurons were removed; a spec does not hold what was there before.
    """
    reducers = {block.reduce.partition(":")[0] for block in spec.blocks if block.reduce is not None}
    # A reducer is a field of the spec. What other surgery took away is not in it.
    surgery = [s.operation for s in spec.lineage if s.operation.partition(".")[0] not in {"init_from", *reducers}]
    why = ""
    if removed := [str(i) for i, block in enumerate(spec.blocks) if not (block.attn and block.ffn)]:
        why = f"parts of block {', '.join(removed)} were removed"
    elif len({(block.heads, block.head_dim, block.mlp) for block in spec.blocks}) > 1:
        why = "its blocks differ in width"
    elif surgery:
        why = f"its lineage names {surgery[-1]}"
    if why:
        raise InputError(
            f"the model before the surgery is not told by the spec ({why}): name it by --dense=FILE.py:VARIANT, a "
            "workdir or weights"
        )
    return spec.unreduced().edit(lineage=())


def batches(rows: Mapping[str, np.ndarray], size: int) -> list[dict[str, np.ndarray]]:
    """Whole batches of `size` rows from host arrays `[n, ...]`; where n is smaller, one batch that repeats them."""
    count = len(next(iter(rows.values())))
    where = [np.arange(i * size, (i + 1) * size) % count for i in range(max(1, count // size))]
    return [{name: value[index] for name, value in rows.items()} for index in where]


class Peak:
    """The most memory that a device needs from here on, beyond what is in use now; in bytes.

    Known where the device keeps count (GPU, TPU) and the mark lies above all earlier ones, which cannot be reset.
    """

    def __init__(self, device: Any):
        self._device, self._before = device, device.memory_stats() or {}

    def read(self) -> int | None:
        """The mark; None where it is not known."""
        after, before = self._device.memory_stats() or {}, self._before
        if not {"peak_bytes_in_use", "bytes_in_use"} <= before.keys() & after.keys():
            return None
        reached = after["peak_bytes_in_use"]
        return reached - before["bytes_in_use"] if reached > before["peak_bytes_in_use"] else None


@dataclasses.dataclass
class Ready:
    """A side at one batch size, compiled.

    Attributes:
      call: `call(first, *rest)`.
      first: the parameters; with `carry` a state, which every call replaces by the first of its results.
      rest: the other arguments, by batch; calls go through them in turn.
      compile_s: seconds; of a host-driven side, what its first pass over the batches took longer than its second.
      lower_s: seconds of tracing and lowering; what both sides share is traced once, by the first.
      memory: of one device: `memory_bytes`, None where not known, and `memory_source`: "device" (its highest use) or
        "compiled" (arguments, results and temporaries, as the compiler planned, also apart).
      walked: what the walk saw in one call; None = nothing.
      macs: MACs per image by formula, by batch.
      settings: as of `Candidate`.
      told: what the outputs say, see `Candidate.tell`.
    """

    call: Callable[..., Any]
    first: Any
    rest: Sequence[tuple[Any, ...]]
    compile_s: float
    memory: Mapping[str, Any]
    macs: Sequence[float]
    lower_s: float | None = None
    walked: Counts | None = None
    carry: bool = False
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    told: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self._turns: list[list[int]] = []
        self._next = 0

    def measure(self, calls: int) -> list[float]:
        """See `timing.Measure`."""
        seconds, made = [], []
        for _ in range(calls):
            rest = self.rest[self._next]
            start = time.perf_counter()
            out = jax.block_until_ready(self.call(self.first, *rest))
            seconds.append(time.perf_counter() - start)
            made.append(self._next)
            if self.carry:
                self.first = out[0]
            self._next = (self._next + 1) % len(self.rest)
        self._turns.append(made)
        return seconds

    def mean_macs(self) -> float:
        """MACs per image by formula, over the calls that `timing.compare` timed."""
        timed = [index for turn in self._turns[2::2] for index in turn]  # a warm-up, then a warm-up before each turn
        return _whole(float(np.mean([self.macs[index] for index in timed])))


def compiled(
    jitted: Any, first: Any, rest: Sequence[tuple[Any, ...]], macs: Sequence[float], peak: Peak, *, carry: bool = False
) -> Ready:
    """A jitted function, compiled for the arguments (see `Ready`), counted, and run once; `peak` was made before the
    arguments were put on the devices."""
    start = time.perf_counter()
    lowered = jitted.lower(first, *rest[0])
    middle = time.perf_counter()
    executable = lowered.compile()
    end = time.perf_counter()
    try:
        walked: Counts | None = walk(jitted, first, *rest[0])
    except InputError:  # a loop of unknown length
        walked = None
    out = jax.block_until_ready(executable(first, *rest[0]))
    plan = executable.memory_analysis()
    parts = {
        "argument_bytes": plan.argument_size_in_bytes,
        "output_bytes": plan.output_size_in_bytes,
        "temp_bytes": plan.temp_size_in_bytes,
    }
    memory = _memory(peak, sum(parts.values()) - plan.alias_size_in_bytes) | parts
    first = out[0] if carry else first
    return Ready(executable, first, rest, end - middle, memory, macs, middle - start, walked, carry)


def forward(candidate: Candidate, params: Any, chosen: Sequence[Mapping[str, Any]], peak: Peak) -> Ready:
    """A candidate's forward pass over batches of one size.

    Args:
      params: the candidate's, on the devices.
      chosen: batches on the devices.
      peak: as in `compiled`.

    Raises:
      InputError: the batches lack an input.
    """
    try:
        rest = [candidate.inputs(batch) for batch in chosen]
    except KeyError as error:
        have = ", ".join(sorted(chosen[0]))
        raise InputError(f"{candidate.name} takes {error} of a batch, which has {have}") from None
    macs = [candidate.macs(*inputs) if callable(candidate.macs) else candidate.macs for inputs in rest]
    if candidate.jit:
        ready = compiled(jax.jit(candidate.apply), params, rest, macs, peak)
        told: dict[str, float] = {}
        if candidate.tell is not None:
            each = [candidate.tell(jax.device_get(ready.call(params, *inputs))) for inputs in rest]
            told = {name: float(np.mean([values[name] for values in each])) for name in each[0]}
        return dataclasses.replace(ready, settings=candidate.settings, told=told)
    seconds = []
    for _ in range(2):  # its pieces compile as they meet new shapes
        start = time.perf_counter()
        for inputs in rest:
            jax.block_until_ready(candidate.apply(params, *inputs))
        seconds.append(time.perf_counter() - start)
    spent = max(0.0, seconds[0] - seconds[1])
    return Ready(candidate.apply, params, rest, spent, _memory(peak, None), macs, settings=candidate.settings)


def _memory(peak: Peak, planned: int | None) -> dict[str, Any]:
    if (highest := peak.read()) is not None:
        return {"memory_bytes": highest, "memory_source": "device"}
    return {"memory_bytes": planned, "memory_source": None if planned is None else "compiled"}


def report(
    ready: Mapping[str, Ready],
    batch: int,
    *,
    params: Mapping[str, int],
    rates: Rates,
    training: bool = False,
    rounds: int = 10,
    calls: int = 5,
    progress: Callable[[timing.Measure], timing.Measure] = lambda measure: measure,
) -> dict[str, Any]:
    """Lets both sides take turns, and sets them side by side.

    Args:
      ready: by `SIDES`.
      batch: images per call.
      params: parameters, by side.
      training: the calls are training steps. Their work is what the walk counts, backward pass included;
        `model_tflops` counts three forward passes, by custom.
      rounds, calls: as in `timing.compare`.
      progress: wraps what is timed.

    Returns:
      `dense` and `reduced`, each with `params`; `macs` per image of a forward pass by formula and `macs_walked` of the
      call (None where the walk cannot see it), of which `macs_agree` says whether they are equal, and `macs_not_seen`
      the calls that the walk cannot count; `lower_s` (tracing included), `compile_s`; `median_s`, `min_s`, `p10_s`,
      `p90_s`, `calls`; `images_per_s`; the memory, see `Ready`; `model_tflops` per second (2 FLOPs per MAC); and where
      the rates were told `mfu`, `cost_per_million`, `kwh_per_million` images. Then `time_ratio` with its range
      `time_ratio_p10`, `time_ratio_p90` over the rounds, `mac_ratio`, `realised`; `batch`, the load, `other_cores`.
    """
    measures = {name: progress(ready[name].measure) for name in SIDES}
    compared = timing.compare(measures, rounds=rounds, calls=calls)
    sides = {
        name: {"params": params[name], **_side(ready[name], compared.timings[name], batch, rates, training)}
        for name in SIDES
    }
    counted = "macs_walked" if training else "macs"
    dense, reduced = (sides[name][counted] for name in ("dense", "reduced"))
    mac_ratio = dense / reduced if dense and reduced else None
    time_ratio = compared.ratio("dense", "reduced")
    low, high = compared.ratio_range("dense", "reduced")
    return {
        "dense": sides["dense"],
        "reduced": sides["reduced"],
        "time_ratio": time_ratio,
        "time_ratio_p10": low,
        "time_ratio_p90": high,
        "mac_ratio": mac_ratio,
        "realised": time_ratio / mac_ratio if mac_ratio else None,
        "batch": batch,
        "load_before": compared.load_before,
        "load_after": compared.load_after,
        "other_cores": compared.other_cores,
    }


def _side(ready: Ready, times: timing.Timing, batch: int, rates: Rates, training: bool) -> dict[str, Any]:
    macs, walked = ready.mean_macs(), None if ready.walked is None else _whole(ready.walked.macs / batch)
    side: dict[str, Any] = {"macs": macs, "macs_walked": walked}
    if walked is not None and not training:
        side["macs_agree"] = macs == walked
    if ready.walked is not None and ready.walked.unknown:
        side["macs_not_seen"] = ready.walked.unknown
    speed = batch / times.median
    side |= {"lower_s": ready.lower_s, "compile_s": ready.compile_s, **times.summary(), "images_per_s": speed}
    side |= {**ready.memory, "model_tflops": (3 if training else 1) * 2 * macs * speed / 1e12}
    if rates.peak_tflops is not None:
        side["mfu"] = side["model_tflops"] / rates.peak_tflops
    hours = 1e6 / speed / 3600
    if rates.price is not None:
        side["cost_per_million"] = rates.price * hours
    if rates.watts is not None:
        side["kwh_per_million"] = rates.watts * hours / 1000
    return {**side, **ready.settings, **ready.told}


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value
