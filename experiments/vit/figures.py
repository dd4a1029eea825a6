# SPDX-License-Identifier: Apache-2.0
"""The foundation's figures that are neither accuracy nor speed; each appends a record to results/figures.jsonl.

python -m experiments.vit.figures logits --torch-python=PYTHON   largest logit difference to timm on 8 photographs
python -m experiments.vit.figures resume --kills=20              runs killed at random, compared bit for bit
python -m experiments.vit.figures clone                          seconds of `make demo` and `make test`, empty clone

`logits` needs the ViT-Ti/16 weights and the photographs on VTJAX_DATA, and a Python with torch and timm. `clone` takes
what is committed, and adds the folders of VTJAX_DATA, so that no test is skipped for want of data.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vtjax.account import record
from vtjax.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "experiments" / "vit" / "results" / "figures.jsonl"
WEIGHTS = "vit_ti16_augreg"

TIMM = """
import sys, numpy as np, torch
try:
    import torchvision
except RuntimeError:  # a torchvision that does not fit this torch; timm needs it for its data code only
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
    for name in [n for n in sys.modules if n.startswith("torchvision")]:
        del sys.modules[name]
import safetensors.torch, timm
weights, images, out = sys.argv[1:]
model = timm.create_model("vit_tiny_patch16_224", num_classes=1000).eval()
model.load_state_dict(safetensors.torch.load_file(weights))
x = torch.from_numpy(np.load(images)).permute(0, 3, 1, 2).contiguous()
with torch.inference_mode():
    np.save(out, model(x).numpy())
print(torch.__version__, timm.__version__)
"""


def logits(python: str, count: int) -> dict[str, Any]:
    """Largest absolute difference between our logits and timm's, float32, on the first `count` photographs."""
    import jax
    import numpy as np

    import vtjax
    from vtjax.data import sources, transforms
    from vtjax.weights import registry

    model = vtjax.load(WEIGHTS)
    photographs = sources.open_source("nips17", f"all[:{count}]")
    pixels = np.stack([photographs[i]["image"] for i in range(len(photographs))])
    images = transforms.normalise(pixels, model.spec.preprocess.mean, model.spec.preprocess.std)
    ours, _ = jax.jit(model.apply)(model.params, images)
    with tempfile.TemporaryDirectory() as folder:
        source, out = f"{folder}/images.npy", f"{folder}/logits.npy"
        np.save(source, images)
        command = [python, "-c", TIMM, str(registry.resolve(WEIGHTS)), source, out]
        versions = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
        theirs = np.load(out)
    return {
        "max_abs_diff": float(np.abs(np.asarray(ours) - theirs).max()),
        "largest_logit": float(np.abs(theirs).max()),
        "images": len(images),
        "same_top1": int((np.asarray(ours).argmax(-1) == theirs.argmax(-1)).sum()),
        "torch_version": versions[0],
        "timm_version": versions[1],
    }


def resume(kills: int) -> dict[str, Any]:
    """What `tests.train.kill_resume` prints."""
    command = [sys.executable, "-m", "tests.train.kill_resume", "--kills", str(kills)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def clone() -> dict[str, Any]:
    """Seconds of the README's two commands, each in a clone of its own, virtual environment included."""
    seconds: dict[str, Any] = {}
    data = os.environ.get("VTJAX_DATA", "")
    folders = os.pathsep.join(str(Path(p).resolve()) for p in data.split(os.pathsep) if p)
    environment = {**os.environ, **({"VTJAX_DATA": folders} if folders else {})}
    for target in ("demo", "test"):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["git", "clone", "-q", str(ROOT), f"{folder}/vtjax"], check=True)
            start = time.perf_counter()
            done = subprocess.run(["make", target], cwd=f"{folder}/vtjax", env=environment, stdout=sys.stderr)
            seconds[f"make_{target}_s"] = round(time.perf_counter() - start, 1)
            seconds[f"make_{target}_exit"] = done.returncode
            print(f"make {target}: {seconds[f'make_{target}_s']} s", file=sys.stderr)
    return seconds


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=("logits", "resume", "clone"))
    parser.add_argument("--torch-python", default="")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--kills", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.figure == "logits" and not arguments.torch_python:
        print("--torch-python must be a Python with torch and timm, found none", file=sys.stderr)
        return 2
    try:
        values = {
            "logits": lambda: logits(arguments.torch_python, arguments.images),
            "resume": lambda: resume(arguments.kills),
            "clone": clone,
        }[arguments.figure]()
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(record.write(RECORDS, {"figure": arguments.figure, **values})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
