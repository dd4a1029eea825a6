# SPDX-License-Identifier: Apache-2.0
"""The same thresholds under changed conditions: worse images, and other image sizes.

    python -m experiments.ltmp.changed

A threshold on importance, which is a share among all tokens, does not mean the same for another number of tokens; the
`relative` form compares importance x live tokens / N instead. Both were learned at 224 px for 0.6 of the MACs. Images
are the evaluation half. Appends to results/changed.jsonl.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from experiments.ltmp import accuracy, deploy
from vtjax import weights
from vtjax.account import bench, flops, record
from vtjax.cli import assemble
from vtjax.cli import config as config_lib
from vtjax.methods import ltmp
from vtjax.models.vit import ViT
from vtjax.train.executables import Executables

RECORDS = Path(__file__).resolve().parent / "results" / "changed.jsonl"
TARGET, SEED = 0.6, 0


def _jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=10)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def _noise(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image, np.float32)
    noise = np.random.default_rng(int(pixels.sum()) % 2**32).normal(0, 25, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


CONDITIONS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "as it is": lambda image: image,
    "blurred, radius 2": lambda image: image.filter(ImageFilter.GaussianBlur(2)),
    "noise, 0.1 of the range": _noise,
    "JPEG quality 10": _jpeg,
    "half as bright": lambda image: ImageEnhance.Brightness(image).enhance(0.5),
    "1.5 times as bright": lambda image: ImageEnhance.Brightness(image).enhance(1.5),
}
SIZES = (160, 288)


def main() -> int:
    """See the module's text."""
    config = config_lib.load_config(accuracy.CONFIG)
    _, data = assemble.assemble(config)
    batches = [{name: value[b["valid"]] for name, value in b.items()} for b in data.eval("eval")]
    rows = {name: np.concatenate([b[name] for b in batches]) for name in ("image", "label")}
    pixels = [Image.fromarray(p) for p in np.rint((rows["image"] * 0.5 + 0.5) * 255).astype(np.uint8)]
    models = {form: learned(form) for form in ("plain", "relative")}
    for form, (spec, params) in {"dense": models["plain"], **models}.items():
        if form == "dense":
            spec, params = bench.undone(spec), deploy.backbone(params)
        for name, change in CONDITIONS.items():
            images = [change(image) for image in pixels]
            keep(form, name, 224, evaluate(spec, params, images, rows["label"]))
        for size in SIZES:
            edited, resized = weights.resize(spec, params, image_size=(size, size))
            images = [image.resize((size, size), Image.Resampling.BICUBIC) for image in pixels]
            keep(form, f"{size} px", size, evaluate(edited, resized, images, rows["label"]))
    return 0


def learned(form: str) -> tuple[Any, Any]:
    """Spec and parameters of a run at the target, trained where it is not there yet."""
    leaves = {"ltmp.target": TARGET, "seed": SEED, "ltmp.relative": form == "relative"}
    done = accuracy.trained(f"{'ltmp' if form == 'plain' else form} {TARGET} {SEED}", leaves, Executables())
    return done.spec, done.params


def evaluate(spec: Any, params: Any, images: list[Image.Image], labels: np.ndarray) -> dict[str, Any]:
    """Accuracy and MACs, over those of the dense model at this size."""
    model = ltmp.vit(ltmp.consistent(spec)) if ltmp.reducers(spec) else ViT(spec)

    @jax.jit
    def run(params: Any, x: Any) -> Any:
        y, aux = model.apply(params, x)
        return y.argmax(-1), deploy.layers(aux, spec)["kept"]

    correct, macs = [], []
    for first in range(0, len(images), 50):
        part = np.stack([np.asarray(image, np.float32) for image in images[first : first + 50]]) / 255
        said, kept = run(params, jnp.asarray((part - 0.5) / 0.5))
        correct.append(np.asarray(said) == labels[first : first + 50])
        macs.append(deploy.macs_of(spec, kept))
    return accuracy.measured(np.concatenate(correct), np.concatenate(macs), flops.macs(bench.undone(spec)))


def keep(form: str, condition: str, size: int, found: dict[str, Any]) -> None:
    """Records one evaluation."""
    told = {"form": form, "condition": condition, "size": size, "target": TARGET, "seed": SEED}
    record.write(RECORDS, {**told, **{k: v for k, v in found.items() if k != "correct"}})
    print(f"{form}, {condition}: {found['top1']:.1%} at {found['mac_ratio']:.3f}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
