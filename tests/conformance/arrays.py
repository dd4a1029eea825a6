# SPDX-License-Identifier: Apache-2.0
"""The arrays of a recorded file: which were read, which were compared, and how far off they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

TOLERANCES = {"value": 2e-5, "logits": 1e-4, "grad": 2e-4, "norm": 1e-4, "product": 1e-5, "exact": 0.0}
TOLERANCES |= {"gate": 1e-6, "sampled": 2e-3, "grad_norm": 1e-4, "rate": 1e-9}
"""Largest difference; of "grad" and "grad_norm", absolute or relative to the recorded number; of "norm", relative to
it; of "product", over 1 + its size. As the vectors' descriptions say."""


class MissingError(KeyError):
    """A case of the file lacks an array."""


class Arrays:
    """Recorded arrays by name, whose parts are separated. Reading one marks it as used; `compare` judges one."""

    def __init__(self, arrays: Mapping[str, np.ndarray], separator: str = "/"):
        self._arrays, self._separator = dict(arrays), separator
        self._used: set[str] = set()
        self._errors: dict[str, tuple[float, float]] = {}
        self._failed: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            raise MissingError(name)
        self._used.add(name)
        return self._arrays[name]

    def names(self, prefix: str = "") -> list[str]:
        """Names that begin with `prefix`, without it."""
        return [name.removeprefix(prefix) for name in self._arrays if name.startswith(prefix)]

    def children(self, prefix: str = "") -> list[str]:
        """First parts of the names below `prefix`, in order."""
        return list(dict.fromkeys(name.split(self._separator)[0] for name in self.names(prefix)))

    def compare(self, name: str, value: Any, kind: str = "value", where: np.ndarray | None = None) -> None:
        """Judges `value` against the recorded array, where there is one; `where` picks the entries that count."""
        if name not in self:
            return
        expected, found = self[name], np.asarray(value)
        if expected.shape != found.shape:
            self.miss(name)
            return
        if where is not None:
            expected, found = expected[where], found[where]
        expected, found = expected.astype(np.float64), found.astype(np.float64)
        same = (expected == found) | (np.isnan(expected) & np.isnan(found))
        with np.errstate(invalid="ignore"):
            error = np.where(same, 0.0, np.abs(expected - found))
        error = np.where(np.isnan(error), np.inf, error)
        if kind in ("grad", "grad_norm"):
            error = np.minimum(error, error / np.maximum(np.abs(expected), 1e-30))
        elif kind == "norm":
            error = error / np.maximum(np.abs(expected), 1e-30)
        elif kind == "product":
            error = error / (1 + np.abs(expected))
        largest, tolerance = float(error.max(initial=0.0)), TOLERANCES[kind]
        if not largest <= tolerance:  # NaN, too
            self.miss(name, largest, np.inf if tolerance == 0 else largest / tolerance)
        else:
            self._errors[name] = (largest, largest / tolerance if tolerance else 0.0)

    def miss(self, name: str, error: float = np.inf, ratio: float = np.inf) -> None:
        """Judges an array to be wrong."""
        self._failed.add(name)
        self._errors[name] = (error, ratio)

    def worst(self) -> dict[str, tuple[float, str]]:
        """Per group (first part of the name): the largest error in units of its tolerance, and whose it is."""
        out: dict[str, tuple[float, str]] = {}
        for name, (error, ratio) in self._errors.items():
            group = name.split(self._separator)[0]
            if group not in out or ratio > out[group][0]:
                out[group] = (ratio, f"{name} ({error:.1e})")
        return out

    def result(self) -> dict[str, Any]:
        """What the runner prints last."""
        finite = [error for error, _ in self._errors.values() if np.isfinite(error)]
        return {
            "groups": len({name.split(self._separator)[0] for name in self._errors}),
            "compared": len(self._errors),
            "unread": sorted(set(self._arrays) - self._used),
            "worst": max(finite, default=0.0),
            "failed": sorted(self._failed),
        }
