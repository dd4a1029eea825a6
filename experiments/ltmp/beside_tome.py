# SPDX-License-Identifier: Apache-2.0
"""Fixed-rate token merging beside ToMe in PyTorch, on the CPU: what it saves in vtjax, and what it saves in timm.

    python -m experiments.ltmp.beside_tome --torch-python=PATH_TO_A_PYTHON_WITH_TORCH_AND_TIMM --rate=13

Four sides take turns: the dense ViT and the merged one, in vtjax and in PyTorch (`tome_worker.py`: timm's ViT with
ToMe's merging off the shelf). All get the same weights and images in float32 and as many threads as there are usable
cores, and are first checked to compute the same logits. ViT-Ti has pretrained weights and sees photographs (both from
VTJAX_DATA); ViT-S has random weights and sees noise, which is enough for the time, as fixed rates do not depend on it.

vtjax's sides are this process, each of PyTorch's is one of its own; whoever does not measure waits, and the CPU time
that it nevertheless uses is recorded. PyTorch runs in inference mode with fused attention, eagerly unless --compile.
Run it with and without GLIBC_TUNABLES=glibc.malloc.hugetlb=1, which all processes inherit.

`realised` is the speed-up by merging over the ratio of multiply-accumulates (matching and merging not counted): 1 where
the clock shows the whole saving. Appends one record to results/beside_tome.jsonl. A ratio from a machine that did other
work is worthless. The run says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import torch_side
from experiments.torch_side import Torch
from experiments.vit.beside_torch import MODELS
from vtjax.account import flops, record, timing
from vtjax.errors import InputError
from vtjax.spec import ViTSpec
from vtjax.viz import tables

HERE = Path(__file__).resolve().parent
PRETRAINED = {"ViT-Ti/16": "vit_ti16_augreg"}
RANDOM = {"ViT-S/16": "vit_s16_augreg"}
"""By model the name of the spec, of which no weights are needed."""
FORMS = ("dense", "merged")
DEPTH = 12
TOLERANCE = 1e-3


class Jax:
    """This process: one model, dense and merged, and one batch.

    Attributes:
      specs: by `FORMS`.
      params: of both.
      images: float32 `[B, H, W, 3]`.
      tokens: after 0, 1, ..., L blocks, by `FORMS`.
    """

    def __init__(self, model: str, batch: int, rates: Sequence[int], seed: int):
        import jax

        from vtjax.methods import ltmp

        load = _pretrained if model in PRETRAINED else _random
        spec, self.params, self.images = load(model, batch, seed)
        if len(rates) != spec.depth or min(rates) < 0 or not any(rates):
            raise InputError(f"rates must be {spec.depth} numbers of 0 or more, not all 0, found {list(rates)}")
        merged = {layer: (rate, 0) for layer, rate in enumerate(rates) if rate}
        self.specs = {"dense": spec, "merged": ltmp.install_fixed(spec, "merge", merged)}
        self.params = jax.device_put(self.params)
        self._placed = jax.device_put(self.images)
        self.tokens = {form: list(ltmp.fixed_tokens(self.specs[form])) for form in FORMS}

    def forward(self, form: str) -> Callable[[], Any]:
        """A call that returns the logits."""
        import jax

        from vtjax.methods import ltmp, ltmp_deploy

        model = ltmp.vit(self.specs[form], attention=ltmp_deploy.without_gradient("auto"))
        apply = jax.jit(lambda params, images: model.apply(params, images)[0])
        return lambda: apply(self.params, self._placed)

    def macs(self, form: str) -> int:
        """Per image, by formula."""
        return flops.macs(self.specs[form], self.tokens[form])


def _pretrained(model: str, batch: int, seed: int) -> tuple[ViTSpec, Any, np.ndarray]:
    """Pretrained weights and photographs."""
    import vtjax
    from vtjax import data

    loaded = vtjax.load(PRETRAINED[model])
    spec = loaded.spec
    assert isinstance(spec, ViTSpec) and spec.preprocess is not None
    form = {name: getattr(spec.preprocess, name) for name in ("crop", "interpolation", "mean", "std", "squash")}
    photographs = data.open_source("nips17", "all")
    images = data.ImageData(None, photographs, seed=seed, batch_size=batch, image_size=spec.image_size, **form)
    return spec, loaded.params, images.draw("eval", 0)["image"]


def _random(model: str, batch: int, seed: int) -> tuple[ViTSpec, Any, np.ndarray]:
    """Random weights and noise."""
    import jax

    from vtjax.models.vit import ViT
    from vtjax.weights import registry

    spec = registry.NAMED[RANDOM[model]].spec()
    assert isinstance(spec, ViTSpec)
    params = jax.jit(ViT(spec).init)(jax.random.key(seed))
    # Fresh heads are 0, and a comparison of zeros shows nothing.
    rng = np.random.default_rng(seed + 1)
    noisy = jax.tree.map(lambda p: np.asarray(p) + 0.02 * rng.standard_normal(p.shape, np.float32), params)
    images = np.random.default_rng(seed).standard_normal((batch, *spec.image_size, spec.channels), np.float32)
    return spec, noisy, images


def measure(
    model: str,
    batch: int,
    rates: Sequence[int],
    torch_python: str,
    rounds: int,
    calls: int,
    *,
    compile: bool = False,
    pause: float = 0.3,
    seed: int = 0,
) -> dict[str, Any]:
    """Checks that vtjax and PyTorch compute the same, dense and merged, and lets the four sides take turns.

    Args:
      model: of `beside_torch.MODELS`.
      batch: images per call.
      rates: tokens to merge per block; no block merges more than half of its patch tokens, and one with 0 is dense.
      torch_python: a Python that has torch, timm and safetensors.
      rounds, calls, pause: as in `timing.compare`.
      compile: PyTorch's sides by torch.compile, which takes minutes.
      seed: of the choice of photographs, or of weights and noise.

    Returns:
      `vtjax_dense`, `vtjax_merged`, `torch_dense`, `torch_merged`, each with `median_s`, `min_s`, `p10_s`, `p90_s`,
      `calls`; by "dense" and "merged": `ratio` (torch over vtjax, medians) with `ratio_range` (p10, p90 over the
      rounds), `tokens` after 0 to L blocks, `macs` per image, `logits_max_abs_diff`, `logits_std`; by "vtjax" and
      "torch": `speedup` (dense over merged) with `speedup_range`, `realised`; `mac_ratio`; `images_per_s` by side;
      `waiting_cpu_s` by process; the load, `other_cores`; the settings, and what PyTorch's process says about itself.

    Raises:
      InputError: an unknown model, rates that do not fit it, weights or photographs that are missing, a torch process
        that fails, or logits that differ by more than 1e-3 (of their spread, where that is below 1) or in an argmax.
    """
    from vtjax import weights

    if model not in MODELS:
        raise InputError(f"model must be one of {', '.join(MODELS)}, found {model!r}")
    if batch < 1:
        raise InputError(f"batch must be at least 1, found {batch}")
    ours = Jax(model, batch, rates, seed)
    threads = len(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        weights.save(folder / "model.safetensors", ours.specs["dense"], ours.params, layout="timm")
        np.save(folder / "images.npy", ours.images)
        files = {"weights": str(folder / "model.safetensors"), "images": str(folder / "images.npy")}
        torch: dict[str, Torch] = {}
        calls_of: dict[str, Callable[[], Any]] = {}
        checked: dict[str, dict[str, float]] = {"logits_max_abs_diff": {}, "logits_std": {}}
        for form in FORMS:
            torch[form] = Torch(torch_python, threads, worker=HERE / "tome_worker.py")
            stack.callback(torch[form].close)
            wanted = list(rates) if form == "merged" else []
            torch[form].ask("load", model=MODELS[model][0], rates=wanted, batch=batch, compile=compile, **files)
            torch[form].ask("logits", path=str(folder / "logits.npy"))
            calls_of[form] = ours.forward(form)
            theirs = np.load(folder / "logits.npy")
            checked["logits_max_abs_diff"][form] = _same(f"{model} {form}", np.asarray(calls_of[form]()), theirs)
            checked["logits_std"][form] = float(theirs.std())
        about = torch["merged"].ask("about")
        pids = {"vtjax": os.getpid(), **{f"torch_{form}": torch[form].process.pid for form in FORMS}}
        waiting = dict.fromkeys(pids, 0.0)
        measures = {
            **{f"vtjax_{form}": _alone(timing.timer(calls_of[form]), "vtjax", pids, waiting) for form in FORMS},
            **{f"torch_{form}": _alone(_asked(torch[form]), f"torch_{form}", pids, waiting) for form in FORMS},
        }
        others = [pid for name, pid in pids.items() if name != "vtjax"]
        result = timing.compare(measures, rounds=rounds, calls=calls, warmup=2, pause=pause, pids=others)
    macs = {form: ours.macs(form) for form in FORMS}
    mac_ratio = macs["dense"] / macs["merged"]
    sides = ("vtjax", "torch")
    speedup = {side: result.ratio(f"{side}_dense", f"{side}_merged") for side in sides}
    return {
        "model": model,
        "batch": batch,
        "rates": list(rates),
        "weights": PRETRAINED.get(model, "random"),
        "images": "photographs" if model in PRETRAINED else "noise",
        "seed": seed,
        "threads": threads,
        "compile": compile,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        **about,
        **checked,
        "tokens": ours.tokens,
        "macs": macs,
        "mac_ratio": mac_ratio,
        **result.summary(),
        "ratio": {form: result.ratio(f"torch_{form}", f"vtjax_{form}") for form in FORMS},
        "ratio_range": {form: result.ratio_range(f"torch_{form}", f"vtjax_{form}") for form in FORMS},
        "speedup": speedup,
        "speedup_range": {side: result.ratio_range(f"{side}_dense", f"{side}_merged") for side in sides},
        "realised": {side: speedup[side] / mac_ratio for side in sides},
        "images_per_s": {name: batch / result.timings[name].median for name in measures},
        "waiting_cpu_s": waiting,
    }


def _same(name: str, ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of the logits, which is small."""
    difference = float(np.abs(ours - theirs).max())
    limit = TOLERANCE * min(1.0, float(theirs.std()))
    if not difference <= limit:
        images = int((np.abs(ours - theirs).max(-1) > limit).sum())
        raise InputError(
            f"{name}: logits of vtjax and torch must agree to {limit:.2g}, found {difference:.2g} ({images} of "
            f"{len(ours)} images); where merging meets a tie of two pairs, another --seed avoids it"
        )
    if (wrong := int((ours.argmax(-1) != theirs.argmax(-1)).sum())) > 0:
        raise InputError(f"{name}: vtjax and torch must say the same class, found {wrong} of {len(ours)} to differ")
    return difference


def _asked(torch: Torch) -> timing.Measure:
    return lambda calls: torch.ask("forward", calls=calls)["seconds"]


def _alone(measure: timing.Measure, worker: str, pids: Mapping[str, int], waiting: dict[str, float]) -> timing.Measure:
    """The measure, adding to `waiting` the CPU time that the processes other than `worker` used meanwhile."""
    idle = {name: pid for name, pid in pids.items() if name != worker}

    def watched(calls: int) -> Sequence[float]:
        before = {name: timing.cpu_seconds(pid) for name, pid in idle.items()}
        seconds = measure(calls)
        for name, pid in idle.items():
            waiting[name] += timing.cpu_seconds(pid) - before[name]
        return seconds

    return watched


def main(arguments: list[str] | None = None) -> int:
    """Measures one case; the exit code is 2 for bad input."""
    parser = argparse.ArgumentParser(prog="beside_tome", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torch-python", required=True, help="a Python that has torch, timm and safetensors")
    parser.add_argument("--model", choices=tuple(MODELS), default="ViT-Ti/16", help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images per call (default: %(default)s)")
    rate = parser.add_mutually_exclusive_group(required=True)
    rate.add_argument("--rate", type=int, help="tokens to merge in every block")
    rate.add_argument("--rates", type=_numbers, help="the same block by block: 16,16,14,...")
    parser.add_argument("--compile", action="store_true", help="PyTorch's sides by torch.compile")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each side (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=8, help="timed calls per turn (default: %(default)s)")
    parser.add_argument("--pause", type=float, default=0.3, help="seconds between turns (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(HERE / "results" / "beside_tome.jsonl"))
    options = parser.parse_args(arguments)
    rates = options.rates or [options.rate] * DEPTH
    settings = {"compile": options.compile, "pause": options.pause, "seed": options.seed}
    try:
        fields = measure(
            options.model, options.batch, rates, options.torch_python, options.rounds, options.calls, **settings
        )
        written = record.write(options.output, fields)
    except InputError as error:
        print(f"beside_tome: {error}", file=sys.stderr)
        return 2
    _say(written)
    print(json.dumps({name: written[name] for name in ("ratio", "speedup", "mac_ratio", "realised", "other_cores")}))
    return 0


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _say(r: Mapping[str, Any]) -> None:
    rows = [
        (
            form,
            f"{r['macs'][form] / 1e9:.3f}",
            *(f"{1000 * r[f'{side}_{form}']['median_s']:.2f}" for side in ("vtjax", "torch")),
            f"{r['ratio'][form]:.3f}",
            "{:.2f}..{:.2f}".format(*r["ratio_range"][form]),
        )
        for form in FORMS
    ]
    print(f"{r['model']} batch {r['batch']}", file=sys.stderr)
    print(tables.text(("", "GMACs", "vtjax ms", "torch ms", "ratio", "p10..p90"), rows), file=sys.stderr)
    for side in ("vtjax", "torch"):
        print(
            f"{side}: {r['speedup'][side]:.3f} times as fast by merging with {r['mac_ratio']:.3f} times less work: "
            f"realised {r['realised'][side]:.3f}",
            file=sys.stderr,
        )
    torch_side.warn("merging", r)


if __name__ == "__main__":
    sys.exit(main())
