# SPDX-License-Identifier: Apache-2.0
"""`vtjax convert`: pretrained weights and trained runs to safetensors of vtjax, timm or Hugging Face."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from vtjax import paths
from vtjax.errors import InputError


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vtjax convert`."""
    parser.add_argument(
        "src", metavar="SRC", help="Hugging Face or timm folder, safetensors or GGUF file, name, or a workdir"
    )
    parser.add_argument("dst", metavar="DST", help="file to write; a folder for --layout=hf and --layout=timm")
    parser.add_argument("--spec", help="spec.json of a bare SRC, whose names are known but not its architecture")
    parser.add_argument("--layout", default="vtjax", choices=("vtjax", "timm", "hf"), help="names in DST")
    parser.add_argument("--which", default="last", choices=("last", "best"), help="checkpoint of a workdir")
    parser.add_argument("--check", metavar="IO.npz", help="replay recorded images against logits or features first")
    parser.add_argument("--atol", type=float, default=1e-4, help="largest difference that --check allows (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a DST that exists")


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Converts; returns (1, ...) where the check missed, and then DST is not written."""
    if args.overrides:
        raise InputError(f"convert takes no config, found --config.{next(iter(args.overrides))}")
    if not args.atol >= 0:
        raise InputError(f"--atol must be 0 or more, found {args.atol}")

    from vtjax.weights import save
    from vtjax.weights.convert import convert

    options = {"layout": args.layout, "check": args.check, "atol": args.atol, "overwrite": args.overwrite}
    if not paths.is_workdir(args.src):
        result = convert(args.src, args.dst, args.spec, apply=_forward, **options)
    else:
        from vtjax.train import checkpoint

        if args.spec:
            raise InputError(f"--spec is for bare weights, and {args.src} is a workdir, which knows its spec")
        spec, params = checkpoint.load_params(args.src, which=args.which)
        with tempfile.TemporaryDirectory() as folder:
            exported = save(Path(folder) / "run.safetensors", spec, params)
            result = {**convert(exported, args.dst, apply=_forward, **options), "src": args.src}
    return 0 if result["written"] else 1, result


def _forward(spec: Any) -> Any:
    import jax

    from vtjax.models import build

    return jax.jit(build(spec).apply)
