# SPDX-License-Identifier: Apache-2.0
"""`make demo`: trains the digits config through the command line, evaluates it, prints a table and draws a page; then
does the same at half of the MACs (`experiments.ltmp.demo`).

The run lies in `runs/demo`. An interrupted one is resumed and a finished one is shown again; `make demo FRESH=1` trains
anew, in the next free folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments import command

CONFIG = "configs/vit.py:digits"
LEAST = 0.96


def main(fresh: bool) -> int:
    """Runs the demo in the root of the checkout; 1 where the accuracy is below `LEAST`."""
    os.chdir(command.ROOT)
    workdir = folder(fresh)
    finished = (workdir / "result.json").exists()
    if finished:
        say(f"{workdir} holds a finished run, shown again below; `make demo FRESH=1` trains a new one.")
    else:
        say("A vision transformer, from scratch, on 1437 real handwritten digits of 8 x 8 pixels: one token per pixel.")
    run = vtjax("run", f"--config={CONFIG}", f"--workdir={workdir}")
    measured = vtjax("eval", f"--workdir={workdir}")
    picture = draw(workdir, measured["top1"])

    from vtjax.viz import tables

    right = round(measured["top1"] * measured["count"])
    speed = f", {run['images_per_s']:,.0f} images/s" if "images_per_s" in run else ""  # none where it was only resumed
    rows = [
        (
            "test accuracy",
            f"{100 * measured['top1']:.2f} %",
            f"{right} of {measured['count']:.0f} digits; guessing gives 10 %",
        ),
        ("test loss", f"{measured['loss']:.3f}", f"guessing gives {2.3026:.3f}"),
        ("parameters", f"{run['params']:,}", ""),
        ("MACs per image", f"{run['macs_per_image']:,}", "1 MAC = 2 FLOPs"),
        (
            "training",
            f"{run['seconds']:.0f} s",
            f"{run['step']} steps{speed}, {run['devices']}",
        ),
    ]
    from experiments.ltmp import demo as ltmp

    print(f"\n{tables.text(('', 'measured', ''), rows)}\n\nfigure: {picture}\n", flush=True)
    say("Now LTMP: per block and image, learned thresholds decide which tokens to merge and which to drop.")
    told, good = ltmp.show(workdir, measured["top1"], vtjax)
    print(f"\n{told}\n\n{what_next(workdir)}", flush=True)
    if measured["top1"] < LEAST:
        say(f"test accuracy must be at least {100 * LEAST:.0f} %, found {100 * measured['top1']:.2f} %")
        return 1
    if not good:
        say(f"LTMP may cost at most {100 * ltmp.MOST:.0f} points of accuracy at half of the MACs, it cost more")
    return 0 if good else 1


def folder(fresh: bool) -> Path:
    """`runs/demo`, or with `fresh` the first of `runs/demo`, `runs/demo-2`, ... that does not exist."""
    path, number = Path("runs/demo"), 2
    while fresh and path.exists():
        path, number = Path(f"runs/demo-{number}"), number + 1
    return path


def vtjax(*arguments: str) -> dict[str, Any]:
    """Runs a command as a user would, and returns the JSON of its last line. A failure ends the demo."""
    say("\n$ vtjax " + " ".join(arguments))
    try:
        return command.vtjax(*arguments)
    except subprocess.CalledProcessError as error:
        say("(`make demo FRESH=1` starts in a new folder)")
        sys.exit(error.returncode)


def draw(workdir: Path, top1: float) -> Path:
    """One page: curves, confusion matrix, and test digits with what the model says."""
    import jax
    import numpy as np

    import vtjax as package
    from vtjax.cli import assemble
    from vtjax.cli.config import load_config
    from vtjax.viz import curves

    config = load_config(CONFIG)
    _, data = assemble.assemble(config)
    m = package.load(workdir)
    predict = jax.jit(lambda params, images: m.apply(params, images)[0].argmax(-1))
    batches = [
        [a[batch["valid"]] for a in (batch["image"], batch["label"], np.asarray(predict(m.params, batch["image"])))]
        for batch in data.eval("eval")
    ]
    images, labels, said = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    title = f"Handwritten digits, {m.spec.depth}-layer ViT: {100 * top1:.1f} % of {len(labels)} test images"
    smoothing, classes = config.loss.label_smoothing, m.spec.classes
    target = np.full(classes, smoothing / classes) + (1 - smoothing) * (np.arange(classes) == 0)
    floor = -(target * np.log(target)).sum()  # cross entropy cannot fall below the entropy of its targets
    note = (
        f"Training: running mean over batches of {config.batch_size} (pale: single batches), images augmented"
        f" ({config.data.augment}), label smoothing {smoothing},\nwhich keeps its loss above {floor:.2f}."
        f" Test: images and labels as they are, averaged parameters (EMA, {config.ema})."
    )
    page = curves.report(curves.series(workdir), images[..., 0], labels, said, title=title, note=note)
    return curves.save(page, workdir / "demo.png")


def what_next(workdir: Path) -> str:
    """A few commands that work from here."""
    return f"""\
what to try next (vtjax lies in .venv/bin):
  vtjax inspect {workdir}                                    where the parameters and the MACs are
  vtjax run --config={CONFIG} --workdir=runs/narrow --config.model.width=32
  vtjax inspect {workdir} runs/narrow                        what that changed
  vtjax eval --config=configs/vit.py:ti16                      pretrained weights on 1000 photographs, where they are
  notebooks/00_tour.ipynb                                      the same from Python, step by step"""


def say(text: str) -> None:
    """A line for people."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(fresh=os.environ.get("FRESH", "") not in ("", "0")))
