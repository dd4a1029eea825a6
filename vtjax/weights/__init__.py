# SPDX-License-Identifier: Apache-2.0
"""Weights in and out: timm, Hugging Face and vtjax files, named models, other resolutions."""

from __future__ import annotations

from vtjax.weights.resample import resize
from vtjax.weights.store import load, save

__all__ = ["load", "resize", "save"]
