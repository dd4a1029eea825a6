# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/configs.md: what every config is, what it should reach, and where it was compiled for.

python -m docs.make_configs           writes them between their markers (`make docs`)
python -m docs.make_configs --check   exits 1 where the page differs

Parameters and MACs are computed from the configs now; compiles are the records of experiments/*/results/aot.jsonl.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.common import Expected
from vtjax import spec as spec_lib
from vtjax.account import flops, params
from vtjax.cli import config as config_lib
from vtjax.cli import inspect
from vtjax.errors import InputError
from vtjax.viz import tables

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "configs.md"


def build(configs: Path = ROOT / "configs", experiments: Path = ROOT / "experiments") -> dict[str, str]:
    """Markdown by table name.

    Raises:
      InputError: a config file without `VARIANTS` and `EXPECTED` that name the same variants.
    """
    compiles = latest(experiments)
    return {"configs": overview(configs, compiles), "compiles": compiled(configs, compiles)}


def variants(configs: Path) -> Iterator[tuple[str, Expected]]:
    """(`vit.py:tiny`, what it should reach) of every variant of every config file, in the files' order."""
    for path in sorted(p for p in configs.glob("*.py") if p.name not in ("common.py", "__init__.py")):
        module = config_lib.load_module(path, "config file")
        known, expected = (list(getattr(module, name, {})) for name in ("VARIANTS", "EXPECTED"))
        if not known or sorted(known) != sorted(expected):
            raise InputError(
                f"config file {path.name} must have VARIANTS and EXPECTED of the same names, found "
                f"{', '.join(known) or 'none'} and {', '.join(expected) or 'none'}"
            )
        for name in known:
            yield f"{path.name}:{name}", module.EXPECTED[name]


def latest(experiments: Path) -> list[dict[str, Any]]:
    """The newest record of every compile: config, step, topology, slices, batch size."""
    found = {}
    for path in sorted(experiments.glob("*/results/aot.jsonl")):
        for r in tables.read_jsonl(path):
            found[_name(r), r["step"], r["topology"], r["slices"], r["batch_size"]] = r
    return list(found.values())


def overview(configs: Path, compiles: list[dict[str, Any]]) -> str:
    """One row per variant."""
    rows = []
    for name, expected in variants(configs):
        config = config_lib.load_config(configs / name.partition(":")[0], name.partition(":")[2])
        expectation = (expected.figure or "none", expected.source, "yes" if expected.run_here else "no")
        where = ", ".join(dict.fromkeys(_place(r) for r in compiles if _name(r) == name)) or "not yet"
        if expected.by_data:
            told = "follows from its data"
            rows.append((f"`{name}`", told, told, "", f"{config.batch_size}, {config.dtype}", *expectation, where))
            continue
        # A run that a config starts from is not in the repository; its model is described there, too.
        absent = {"init_from": ""} if config.init_from.startswith("runs/") else {}
        model = inspect.open_model(str(configs / name), absent)
        backbone = {part: tree for part, tree in model.params.items() if spec_lib.is_backbone(part)}
        height, width = model.spec.image_size
        tokens = model.spec.visual_tokens if isinstance(model.spec, spec_lib.VLMSpec) else model.spec.tokens
        rows.append(
            (
                f"`{name}`",
                params.count(backbone),
                flops.macs(model.spec),
                f"{height} x {width}, {tokens}",
                f"{config.batch_size}, {config.dtype}",
                *expectation,
                where,
            )
        )
    header = ("config", "parameters", "MACs per image", "image, tokens", "batch, dtype")
    return tables.markdown((*header, "expected", "source", "run here", "compiled for"), rows)


def compiled(configs: Path, compiles: list[dict[str, Any]]) -> str:
    """One row per compile of a variant that exists."""
    order = [name for name, _ in variants(configs)]
    rows = [
        (
            f"`{_name(r)}`",
            r["step"],
            _place(r),
            r["devices"],
            r["batch_size"],
            f"{r['hbm_bytes_per_device'] / 2**30:.2f}",
            f"{r['hbm_limit'] / 2**30:.2f}",
            "yes" if r["fits"] else "**no**",
            f"{r['compile_s']:.0f}",
        )
        for r in sorted((r for r in compiles if _name(r) in order), key=lambda r: order.index(_name(r)))
    ]
    if not rows:
        return "No compile has been recorded yet."
    header = ("config", "step", "topology", "devices", "batch")
    return tables.markdown((*header, "GiB per device", "of", "fits", "compile, s"), rows)


def _name(r: dict[str, Any]) -> str:
    return str(r["config"]).rpartition("/")[2]


def _place(r: dict[str, Any]) -> str:
    return f"{r['slices']} x {r['topology']}" if r["slices"] > 1 else str(r["topology"])


if __name__ == "__main__":
    sys.exit(tables.command(PAGE, build, __doc__))
