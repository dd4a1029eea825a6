# SPDX-License-Identifier: Apache-2.0
"""Compiles the large recipes for TPU topologies; each compile appends a record to experiments/*/results/aot.jsonl.

python -m experiments.aot vit                                    22 compiles, about 15 minutes on two cores
python -m experiments.aot ltmp                                   6 compiles
python -m experiments.aot dgmr                                   6 compiles of distillation
python -m experiments.aot vlm                                    3 compiles of multimodal models
python -m experiments.aot dpn                                    2 compiles
python -m experiments.aot lvxattn                                4 compiles of long videos, one over two slices
python -m experiments.aot das                                    4 compiles of searches
python -m experiments.aot vit --only=b16_i1k:train:v6e           what contains this
python -m experiments.aot vit --only=v5e --out=FILE.jsonl        into another file

The compiles are `vtjax aot` commands, one after the other, each in a process of its own. `python -m docs.make_configs`
makes the table of docs/configs.md from the records.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments.command import ROOT, vtjax


class Case(NamedTuple):
    """One compile of the recipe's own batch and mesh (all devices along the data axis), but for some `leaves`."""

    config: str
    step: str
    topology: str
    slices: int = 1
    leaves: tuple[str, ...] = ()

    def __str__(self) -> str:
        several = f"{self.slices}x" if self.slices > 1 else ""
        return f"{self.config.partition(':')[2]}:{self.step}:{several}{self.topology}"


def vit() -> Iterator[Case]:
    """Both recipes and both steps everywhere; and training on one chip, which the whole batch is too much for."""
    places = (("v5e:2x4", 1), ("v6e:16x16", 1), ("v6e:16x16", 2), ("v5p:8x8x8", 1), ("tpu7x:4x4x4", 1))
    for variant in ("b16_i1k", "s16_i1k"):
        for topology, slices in places:
            for step in ("train", "eval"):
                yield Case(f"configs/vit.py:{variant}", step, topology, slices)
        yield Case(f"configs/vit.py:{variant}", "train", "v5e:1x1")


def ltmp() -> Iterator[Case]:
    """The paper's models, where their docstrings say that they run."""
    for variant, topology in (("deit_ti16_i1k", "v5e:2x4"), ("deit_s16_i1k", "v5e:2x4"), ("l16_i1k", "v5e:4x4")):
        for step in ("train", "eval"):
            yield Case(f"configs/ltmp.py:{variant}", step, topology)


def dgmr() -> Iterator[Case]:
    """A distillation step of the paper's models, student and teacher sharded, where their docstrings say they run."""
    places = {"openclip_g": "v5e:2x4", "openclip_bigg": "v5e:4x4", "eva_e": "v5e:4x4"}
    places |= {"eva_8b": "v5e:4x8", "internvit_6b": "v5e:4x8", "dinov2_g": "v5e:2x4"}
    for variant, topology in places.items():
        yield Case(f"configs/dgmr.py:{variant}", "train", topology)


def vlm() -> Iterator[Case]:
    """Instruction tuning of LLaVA-1.5-7B, and of Llama-3.2-11B-Vision."""
    for topology in ("v5e:4x4", "v5p:4x4x4"):
        yield Case("configs/vlm.py:llava15_7b", "train", topology)
    yield Case("configs/vlm.py:llama32_11b_vision", "train", "v5p:2x4x4")


def dpn() -> Iterator[Case]:
    """DPN in LLaVA-1.5-7B, where the model without it is compiled, too; and on the larger grid."""
    yield Case("configs/dpn.py:llava15_7b", "train", "v5e:4x4")
    yield Case("configs/dpn.py:llava_hr_7b", "train", "v5p:4x4x4")


def lvxattn() -> Iterator[Case]:
    """The paper's models over long videos, the frames of a sample over eight devices, or over two slices of eight."""
    yield Case("configs/lvxattn.py:openflamingo_3b", "train", "v5e:4x4")
    yield Case("configs/lvxattn.py:owl3_7b", "train", "v5p:2x4x4")
    yield Case("configs/lvxattn.py:llama3v_11b", "train", "v5p:2x4x4")
    yield Case("configs/lvxattn.py:llama3v_11b", "train", "v5p:2x4x4", 2, ("mesh.slice=2",))


def das() -> Iterator[Case]:
    """Searches: every layer is a conditional, and its adapters are trained."""
    yield Case("configs/das.py:vilt_nlvr2", "train", "v5e:2x4")
    yield Case("configs/das.py:meter_vqa2", "train", "v5e:4x4")
    yield Case("configs/das.py:llava15_7b", "train", "v5e:4x4")
    yield Case("configs/das.py:lavin_7b_scienceqa", "train", "v5e:4x4")


EXPERIMENTS = {"vit": vit, "ltmp": ltmp, "dgmr": dgmr, "vlm": vlm, "dpn": dpn, "lvxattn": lvxattn, "das": das}


def compile_one(case: Case) -> dict[str, Any] | None:
    """What `vtjax aot` says; None where it failed. Without weights, which a compile does not need."""
    words = [f"--config={case.config}", f"--step={case.step}", f"--topology={case.topology}"]
    words += [f"--config.{leaf}" for leaf in case.leaves]
    try:
        return vtjax("aot", *words, f"--slices={case.slices}", "--config.init_from=")
    except subprocess.CalledProcessError:
        return None


def main() -> int:
    """See the module's text; exit code 1 where a compile failed, 2 where nothing is called so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=sorted(EXPERIMENTS))
    parser.add_argument("--only", default="", help="VARIANT:STEP:TOPOLOGY, or part of it")
    parser.add_argument("--out", type=Path, help="instead of experiments/EXPERIMENT/results/aot.jsonl")
    arguments = parser.parse_args()
    known = list(EXPERIMENTS[arguments.experiment]())
    chosen = [case for case in known if arguments.only in str(case)]
    if not chosen:
        print(f"--only must be part of one of {', '.join(map(str, known))}, found {arguments.only}", file=sys.stderr)
        return 2
    out = arguments.out or ROOT / "experiments" / arguments.experiment / "results" / "aot.jsonl"
    os.environ["JAX_PLATFORMS"] = "cpu"  # a record names JAX's devices; libtpu would look for chips first
    from vtjax.account import record

    failed = 0
    for number, case in enumerate(chosen, 1):
        print(f"{number} of {len(chosen)}: {case}", file=sys.stderr, flush=True)
        result = compile_one(case)
        if result is None:
            failed += 1
            continue
        print(json.dumps(record.write(out, {**result, "libtpu": importlib.metadata.version("libtpu")})))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
