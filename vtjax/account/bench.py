# SPDX-License-Identifier: Apache-2.0
"""A reduced model beside its dense baseline, in one run: what it takes, and what of the saved work is saved time.

time_ratio = time of dense / time of reduced,  mac_ratio = MACs of dense / MACs of reduced,
realised = time_ratio / mac_ratio: 1 where the whole saving in work is a saving in time
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from vtjax.account import flops, timing

KWH = 3.6e6  # joules


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One of the two models.

    Attributes:
      name: for people.
      apply: `(params, images) -> anything`; traced and compiled here.
      params: its parameters, where they are to be used.
      macs: per image. Where they depend on the image, a function of the images that are timed, giving their mean.
      settings: static facts for the result, such as where the parameters come from.
    """

    name: str
    apply: Callable[[Any, Any], Any]
    params: Any
    macs: float | Callable[[Any], float]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def measure(
    reduced: Candidate,
    dense: Candidate,
    images: jax.Array,
    *,
    rounds: int = 7,
    calls: int = 5,
    price: float | None = None,
    watts: float | None = None,
) -> dict[str, Any]:
    """Compiles both, lets them take turns (`account.timing`), and sets them side by side.

    Args:
      images: `[B, ...]` on the devices.
      price: of the hardware per hour, in any currency.
      watts: that the hardware draws under this load.

    Returns:
      `dense` and `reduced`, each with `compile_s`, `median_s`, `min_s`, `p10_s`, `p90_s`, `calls`, `images_per_s`,
      `memory_bytes` (parameters, images, results and temporaries of the compiled program on one device), `macs` per
      image, `macs_walked` (of the traced program, per image), `params`, and where the rates were told
      `cost_per_million`, `kwh_per_million` images; `time_ratio` with its range `time_ratio_p10`, `time_ratio_p90` over
      the rounds, `mac_ratio`, `realised`; `batch`, the load, and `other_cores`.
    """
    batch = images.shape[0]
    rows: dict[str, dict[str, Any]] = {}
    timers: dict[str, timing.Measure] = {}
    for label, candidate in (("dense", dense), ("reduced", reduced)):
        start = time.perf_counter()
        compiled = jax.jit(candidate.apply).lower(candidate.params, images).compile()
        rows[label] = {
            "name": candidate.name,
            "compile_s": round(time.perf_counter() - start, 3),
            "memory_bytes": _memory(compiled),
            "macs": candidate.macs(images) if callable(candidate.macs) else candidate.macs,
            "macs_walked": flops.walk(candidate.apply, candidate.params, images).macs / batch,
            "params": sum(x.size for x in jax.tree.leaves(candidate.params)),
            **candidate.settings,
        }
        timers[label] = timing.timer(compiled, candidate.params, images)
    compared = timing.compare(timers, rounds=rounds, calls=calls)
    for label, row in rows.items():
        row |= compared.timings[label].summary()
        per_image = row["median_s"] / batch
        row["images_per_s"] = 1 / per_image
        if price is not None:
            row["cost_per_million"] = price / 3600 * per_image * 1e6
        if watts is not None:
            row["kwh_per_million"] = watts * per_image * 1e6 / KWH
    low, high = compared.ratio_range("dense", "reduced")
    time_ratio, mac_ratio = compared.ratio("dense", "reduced"), rows["dense"]["macs"] / rows["reduced"]["macs"]
    summary = compared.summary()
    return {
        **rows,
        "time_ratio": time_ratio,
        "time_ratio_p10": low,
        "time_ratio_p90": high,
        "mac_ratio": mac_ratio,
        "realised": time_ratio / mac_ratio,
        "batch": batch,
        **{name: summary[name] for name in ("load_before", "load_after", "other_cores")},
    }


def _memory(compiled: Any) -> int:
    analysis = compiled.memory_analysis()
    parts = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes", "generated_code_size_in_bytes")
    return sum(getattr(analysis, part) for part in parts) - analysis.alias_size_in_bytes
