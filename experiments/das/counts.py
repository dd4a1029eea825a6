# SPDX-License-Identifier: Apache-2.0
"""Trained parameters and MACs of METER, ViLT and LaVIN-7B with layers left out, counted from configs/das.py.

    python -m experiments.das.counts           seconds; nothing is computed. Rewrites results/counts.jsonl

Beside each count stands what it was compared with: "release", counted on the release's own modules at full size (spec
section 5), or "README", the figure that the release publishes. Adapter parameters are counted as there, without their
norms, heads and poolers. 1 GMAC is 2 GFLOPs; the release's "GFLOPs" are GMACs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vtjax.account import flops, fusion, record
from vtjax.cli import assemble
from vtjax.cli import config as config_lib
from vtjax.methods import das
from vtjax.spec import FusionSpec, VLMSpec

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "experiments" / "das" / "results" / "counts.jsonl"
CONFIG = ROOT / "configs" / "das.py"
METER_SPLITS = {(4, 0): -2.56, (3, 1): -6.87, (2, 2): -11.18, (1, 3): -15.49, (0, 4): -19.80}
"""Branches of METER's fusion layers that are left out, (text, image): additional GMACs."""

VILT_SIZES = {(384, 576): -1.01, (384, 640): -1.12}
LAVIN_PROJECTOR = 1024 * 128 + 128 + 128 * 4096 + 4096
LAVIN_MODALITY = 2 * 4096
"""LaVIN's own, which the config's stand-ins do not have."""

Count = tuple[str, str, str, float, float, str]
"""Model, what of it, unit, ours, theirs, whose."""


def spec_of(variant: str) -> Any:
    """The spec of a variant of configs/das.py, as its search has it."""
    return assemble.task(config_lib.load_config(CONFIG, variant)).spec


def meter(spec: FusionSpec) -> Iterator[Count]:
    """METER: fusion layers alone, and with the text encoder's."""

    def updated(model: FusionSpec) -> float:
        return fusion.updated(model) / 1e6

    yield "METER", "adapters in all layers", "M parameters", updated(spec), 5.34, "release"
    yield "METER", "4 branches left out", "M parameters", updated(spec.skipping([0, 1, 6, 7])), 5.333, "release"
    everywhere = FusionSpec.meter(everywhere=True, classes=spec.classes).skipping([12, 13, 14])
    yield "METER", "3 layers of the text encoder left out", "M parameters", updated(everywhere), 6.23, "release"
    for side, total, adapters in ((384, 97.7, 1.638), (288, 55.3, 0.969)):
        here = spec.edit(image=spec.image.edit(image_size=(side, side)))
        dense = flops.macs(here.without_adapters(), fusion.TEXT) / 1e9
        yield f"METER, {side} pixels", "without adapters", "GMAC", dense, total, "release"
        yield (
            f"METER, {side} pixels",
            "adapters in all layers",
            "GMAC more",
            fusion.additional(here) / 1e9,
            adapters,
            "release",
        )
        for (texts, images), added in (METER_SPLITS if side == 384 else {(2, 2): -6.33}).items():
            short = here.skipping([*range(texts), *range(here.fusion, here.fusion + images)])
            what = f"{texts} text and {images} image branches left out"
            yield f"METER, {side} pixels", what, "GMAC more", fusion.additional(short) / 1e9, added, "release"


def vilt(spec: FusionSpec) -> Iterator[Count]:
    """ViLT with one image per text."""
    one = spec.edit(images=1)
    yield "ViLT", "adapters in all blocks", "M parameters", fusion.updated(one) / 1e6, 3.56, "release"
    for size, added in VILT_SIZES.items():
        short = one.edit(image=one.image.edit(image_size=size)).skipping([5])
        name = f"ViLT, {fusion.TEXT + short.image.tokens} tokens"
        yield name, "1 block left out", "GMAC more", fusion.additional(short) / 1e9, added, "release"


def lavin(spec: VLMSpec) -> Iterator[Count]:
    """LaVIN-7B: router adapters in decoder and tower, its projector and modality embedding."""
    style, _ = das.installed(spec.decoder)
    width, tower = spec.decoder.width, spec.tower
    inner, skip = style.inner.params(width), style.skip.params(width)
    every = spec.decoder.depth * inner + tower.depth * style.inner.params(tower.width)
    every += LAVIN_PROJECTOR + LAVIN_MODALITY
    for m, published in {0: 3.8, 2: 4.2, 4: 4.6, 6: 5.0}.items():
        yield (
            "LaVIN-7B",
            f"{m} layers left out",
            "M parameters",
            (every + m * (skip - inner)) / 1e6,
            published,
            "README",
        )


def counted() -> list[dict[str, Any]]:
    """All of them."""
    found = [*meter(spec_of("meter_vqa2")), *vilt(spec_of("vilt_nlvr2")), *lavin(spec_of("lavin_7b_scienceqa"))]
    names = ("model", "what", "unit", "ours", "theirs", "whose")
    return [{"kind": "counts", **dict(zip(names, row, strict=True))} for row in found]


def main(arguments: list[str]) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args(arguments)
    options.out.unlink(missing_ok=True)
    for fields in counted():
        made = record.write(options.out, fields)
        print(f"{made['model']}: {made['what']}: {made['ours']:.3f}, {made['whose']} {made['theirs']}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
