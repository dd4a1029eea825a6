# SPDX-License-Identifier: Apache-2.0
"""Realised speed on this machine: the reduced model beside the dense one, taking turns on the same photographs.

    python -m experiments.ltmp.speed                    all cases; nothing else may use the cores
    python -m experiments.ltmp.speed --only="ViT-Ti/16 packed 32"

`realised` = (dense time / reduced time) / (dense MACs / mean of the images' own MACs): 1 where the clock shows the
whole saving. A second ratio is against the dense model run on 8 images after the other, which some CPUs like better
than one large batch. Lengths are calibrated on the calibration half, times are of the evaluation half. ViT-Ti
has the thresholds of `python -m experiments.ltmp.accuracy grid` (target 0.6, seed 0); there are no weights of a ViT-S
here, so it has random ones, and thresholds that spend 0.6 of its MACs on photographs.

The fixed form also runs beside a model whose tokens are cut off without any decision, as many in every block: a bound
that no way to choose them can beat on this machine.

Appends to results/speed.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vtjax
from experiments.ltmp import accuracy, deploy, start
from vtjax.account import bench, flops, record, timing
from vtjax.cli import config as config_lib
from vtjax.methods import ltmp, ltmp_deploy
from vtjax.models.vit import ViT
from vtjax.ops.tokens import Tokens
from vtjax.spec import ViTSpec

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "experiments" / "ltmp" / "results" / "speed.jsonl"
TARGET = 0.6
MODELS = ("ViT-Ti/16", "ViT-S/16")
CASES = [
    (model, form, batch)
    for model in MODELS
    for form, batches in (("packed", (1, 8, 32)), ("fixed", (1, 8, 16, 32)))
    for batch in batches
]
IMAGES = 128  # that are timed
IN_GROUPS = 8


def load(model: str, config: Any, calibration: np.ndarray) -> tuple[ViTSpec, Any]:
    """Spec and parameters with thresholds."""
    if model == "ViT-Ti/16":
        found = vtjax.load(accuracy.run_of(TARGET))
        return ltmp.consistent(found.spec), found.params
    dense = ViTSpec.uniform(depth=12, width=384, heads=6, mlp=1536, image_size=224, patch=16, classes=1000)
    # The spread of trained weights; fresh ones make all tokens alike.
    keys = iter(jax.random.split(jax.random.key(0), 1000))
    params = jax.tree.map(
        lambda x: np.asarray(x + 0.03 * jax.random.normal(next(keys), x.shape)),
        jax.jit(ViT(dense).init)(jax.random.key(1)),
    )
    spec, _ = ltmp.install(dense)
    settings = config.ltmp
    numbers = (settings.prune_share, settings.slope, settings.share_slope)
    thresholds = start.even(spec, params, calibration[:32], TARGET, *numbers)
    return spec, {**params, ltmp.NAME: thresholds}


def in_groups(dense: bench.Candidate, group: int) -> bench.Candidate:
    """The dense model over small groups of the batch, one after the other."""

    def apply(params: Any, x: Any) -> Any:
        y = jax.lax.map(lambda part: dense.apply(params, part), x.reshape(-1, group, *x.shape[1:]))
        return y.reshape(-1, y.shape[-1])

    return bench.Candidate("dense in groups", apply, dense.params, dense.macs)


@dataclasses.dataclass(frozen=True)
class Cut:
    """A reducer that keeps the first tokens, whichever they are."""

    kept: int
    wants = ()

    def __call__(self, tokens: Tokens, aux: Any, knobs: Any) -> tuple[Tokens, dict[str, Any]]:
        """Cuts the others off."""
        return tokens.replace(x=tokens.x[:, : self.kept]), {}


def cut(config: Any, spec: ViTSpec, counts: Any, dense: bench.Candidate) -> bench.Candidate:
    """The dense model with the fixed form's number of tokens in every block."""
    kept = ltmp.fixed_tokens(ltmp_deploy.fixed(spec, counts["merged"], counts["pruned"]))
    before = bench.undone(spec)
    model = ViT(before, reducers=tuple((layer, Cut(count)) for layer, count in enumerate(kept[1:])))
    return bench.Candidate("cut", lambda p, x: model.apply(p, x)[0], dense.params, flops.macs(before, kept))


def case(
    model: str, form: str, batch: int, loaded: tuple[ViTSpec, Any, Any], images: np.ndarray, options: Any
) -> dict[str, Any]:
    """Measures one case; returns its record."""
    spec, params, counts = loaded
    config = config_lib.load_config("configs/ltmp.py:ti16", overrides={"ltmp.deploy.form": form, **options.deploy})
    sides = {
        "dense": deploy.undiminished(config, spec, params),
        "reduced": deploy.candidate(config, spec, params, counts, batch),
    }
    if batch > IN_GROUPS:
        sides["dense_in_groups"] = in_groups(sides["dense"], IN_GROUPS)
    if form == "fixed":
        sides["cut"] = cut(config, spec, counts, sides["dense"])
    chosen = [{"image": jnp.asarray(rows["image"])} for rows in bench.batches({"image": images}, batch)]
    ready = {}
    for name, side in sides.items():
        print(f"compiling {model}, {form}, batch {batch}: {name} ...", file=sys.stderr)
        placed = jax.device_put(side.params)
        ready[name] = bench.forward(side, placed, chosen, bench.Peak(jax.devices()[0]))
    compared = timing.compare(
        {name: r.measure for name, r in ready.items()}, rounds=options.rounds, calls=len(chosen) if batch > 1 else 32
    )
    macs = {name: r.mean_macs() for name, r in ready.items()}
    ratio, (low, high) = compared.ratio("dense", "reduced"), compared.ratio_range("dense", "reduced")
    work = macs["dense"] / macs["reduced"]
    found: dict[str, Any] = {
        "model": model,
        "form": form,
        "batch": batch,
        "time_ratio": ratio,
        "time_ratio_p10": low,
        "time_ratio_p90": high,
        "mac_ratio": work,
        "realised": ratio / work,
        "compile_s": ready["reduced"].compile_s,
        "dense_compile_s": ready["dense"].compile_s,
        **{f"{name}_ms": _milliseconds(compared.timings[name]) for name in sides},
        "settings": dict(sides["reduced"].settings),
        "calibration_images": len(counts["kept"]),
        "images": len(images),
        "other_cores": compared.other_cores,
        "seed": 0,
    }
    if "dense_in_groups" in sides:
        found["realised_against_groups"] = compared.ratio("dense_in_groups", "reduced") / work
    if "cut" in sides:
        found["realised_by_cut"] = compared.ratio("dense", "cut") / (macs["dense"] / macs["cut"])
    if form == "packed":
        found["sizes_mac_ratio"] = macs["dense"] / ready["reduced"].told["macs_of_sizes"]
        found["overflow_rate"] = ready["reduced"].told["overflow_rate"]
    return found


def _milliseconds(times: timing.Timing) -> dict[str, float]:
    summary = times.summary()
    return {name: 1000 * summary[f"{name}_s"] for name in ("median", "min", "p10", "p90")}


def main(arguments: list[str]) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the cases' names, such as 'packed 32'")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--deploy", action="append", default=[], metavar="LEAF=VALUE", help="of config.ltmp.deploy")
    parser.add_argument("--dry", action="store_true", help="record nothing")
    options = parser.parse_args(arguments)
    options.deploy = {f"ltmp.deploy.{k}": v for k, _, v in (text.partition("=") for text in options.deploy)}
    config = config_lib.load_config("configs/ltmp.py:ti16")
    spec = vtjax.load("vit_ti16_augreg").spec
    calibration = deploy.photographs(config, spec, "train", deploy.IMAGES)
    images = deploy.photographs(config, spec, "eval", IMAGES)
    for model in MODELS:
        cases = [c for c in CASES if c[0] == model and options.only in f"{c[0]} {c[1]} {c[2]}"]
        if not cases:
            continue
        loaded = load(model, config, calibration)
        counts = deploy.counted(config, *loaded, calibration)
        print(
            f"{model}: mean kept {counts['kept'].mean(0).round(1)}, std {counts['kept'].std(0).round(1)}",
            file=sys.stderr,
        )
        for _, form, batch in cases:
            found = case(model, form, batch, (*loaded, counts), images, options)
            if not options.dry:
                record.write(RECORDS, found)
            told = {k: round(v, 3) for k, v in found.items() if isinstance(v, float)}
            print(f"{model} {form} {batch}: {told}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
