# SPDX-License-Identifier: Apache-2.0
"""The second half of `make demo`: thresholds for the digits model, at half of its MACs, and what the clock says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = "configs/ltmp.py:digits"
MOST = 0.02
"""Accuracy that may be lost before the demo counts as failed."""


def show(dense: Path, top1: float, vtjax: Callable[..., dict[str, Any]]) -> tuple[str, bool]:
    """Learns the thresholds for the run in `dense`, times both models, draws; the text for people, and whether the
    accuracy is where it should be.

    Args:
      top1: of the dense model.
      vtjax: runs a command and gives its result.
    """
    from vtjax.viz import tables

    workdir = dense.with_name(f"{dense.name}_ltmp")
    run = vtjax("run", f"--config={CONFIG}", f"--config.init_from={dense}", f"--workdir={workdir}")
    speed = vtjax("bench", f"--workdir={workdir}", "--batch=128", "--images=128", "--rounds=5")
    picture = draw(workdir)
    times = [1e6 * speed[side]["median_s"] / speed["batch"] for side in ("dense", "reduced")]
    rows = [
        ("test accuracy", f"{100 * top1:.2f} %", f"{100 * run['top1']:.2f} %"),
        ("MACs per image", f"{run['dense_macs_per_image']:,}", f"{run['macs_per_image']:,.0f}"),
        ("of the dense MACs", "1", f"{run['mac_ratio']:.3f}"),
        (f"time per image, batch {speed['batch']}", *(f"{t:.0f} µs" for t in times)),
        ("learned numbers", f"{run['params']:,} (fixed now)", "4 thresholds"),
    ]
    span = f"{speed['time_ratio_p10']:.2f} to {speed['time_ratio_p90']:.2f} round by round"
    told = (
        f"{speed['time_ratio']:.2f} times as fast ({span}); the arithmetic promises {speed['mac_ratio']:.2f}. "
        "Two tiny blocks are no\nshowcase for speed: experiments/ltmp/README.md has a ViT-Ti and a ViT-S."
    )
    text = f"{tables.text(('', 'dense', 'LTMP'), rows)}\n\n{told}\n\nfigure: {picture}"
    return text, run["top1"] >= top1 - MOST


def draw(workdir: Path) -> Path:
    """Which pixels of a digit live on as tokens of their own."""
    import jax

    import vtjax as package
    from vtjax.cli import assemble
    from vtjax.cli.config import of_workdir
    from vtjax.viz import tokens

    config = of_workdir(str(workdir), {"init_from": str(workdir), "workdir": ""})
    _, data = assemble.assemble(config)
    model = package.load(workdir)
    images = next(iter(data.eval("eval")))["image"][:1]
    _, aux = jax.jit(model.apply)(model.params, images)
    sources = np.stack([np.asarray(block["decisions"]["source"]) for block in aux["blocks"]])
    spec = model.spec
    pixels = images * np.asarray(spec.preprocess.std) + np.asarray(spec.preprocess.mean)
    shown = np.clip(1.0 - pixels[0], 0.0, 1.0)  # dark on white, as one writes
    figure = tokens.layer_maps(
        np.repeat(np.repeat(shown, 28, 0), 28, 1).astype(np.float32),
        sources[:, 0],
        grid=spec.grid,
        prefix=spec.prefix,
        title="What LTMP keeps of a digit",
    )
    return tokens.save(figure, workdir / "demo_ltmp.png")
