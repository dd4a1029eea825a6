# SPDX-License-Identifier: Apache-2.0
"""Counts of fusion encoders: equal to what is built and traced, and to the DAS specification's section 5."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from vtjax.account import flops, fusion, params, walk
from vtjax.errors import InputError
from vtjax.models.adapters import STYLES
from vtjax.models.fusion import Fusion
from vtjax.spec import FusionSpec

GIGA = 1e9

SPECS = {
    "one stream": FusionSpec.small(1, depth=2, classes=5),
    "one stream, skipping": FusionSpec.small(1, depth=2, classes=5).skipping([1]),
    "one stream, bare": FusionSpec.small(1, depth=1).without_adapters(),
    "one stream, pairs": FusionSpec.small(1, depth=1, classes=2, images=2),
    "two streams, pairs": FusionSpec.small(2, depth=1, classes=2, images=2),
    "two streams, ranking": FusionSpec.small(2, depth=1, ranks=True),
    "two streams": FusionSpec.small(2, depth=1, width=24, classes=5),
    "two streams, fusion only": FusionSpec.small(2, depth=1, arms=2, encoder_skip=None),
    "two streams, skipping": FusionSpec.small(2, depth=2, classes=5).skipping([1, 2, 5]),
}
FULL = {
    "METER": FusionSpec.meter(),
    "METER everywhere": FusionSpec.meter(288, everywhere=True),
    "ViLT": FusionSpec.vilt(),
}


def traced(spec, text):
    """Rows of an abstract model: parameters by top name, and the MACs of one pass."""
    model = Fusion(spec)
    tree = jax.eval_shape(model.init, jax.random.key(0))
    ids = jax.ShapeDtypeStruct((1, text), jnp.int32)
    several = (spec.images,) if spec.images > 1 else ()
    images = jax.ShapeDtypeStruct((1, *several, *spec.image.image_size, spec.image.channels), jnp.float32)
    return tree, walk.walk(model.apply, tree, ids, images)


@pytest.mark.parametrize(
    "name", [name if name == "one stream, skipping" else pytest.param(name, marks=pytest.mark.slow) for name in SPECS]
)
def test_counts_are_those_of_the_model(name):
    spec, text = SPECS[name], 7
    tree, counted = traced(spec, text)
    rows = flops.layers(spec, text)
    assert params.count(tree) == sum(row.params for row in rows) == params.count(spec)
    assert not counted.unknown and counted.macs == sum(row.macs for row in rows)
    for row in rows:
        node = tree
        for part in row.name.split("/"):
            node = node[part]
        assert params.count(node) == row.params, row.name


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_published_sizes_have_the_parameters_that_are_counted(name):
    spec = FULL[name]
    tree = jax.eval_shape(Fusion(spec).init, jax.random.key(0))
    assert params.count(tree) == params.count(spec)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_published_sizes_have_the_macs_that_are_counted(name):
    for spec in (FULL[name], FULL[name].skipping([0, 3, 7])):
        _, counted = traced(spec, fusion.TEXT)
        assert not counted.unknown and counted.macs == flops.macs(spec)


def giga(rows):
    return sum(row.macs for row in rows) / GIGA


@pytest.mark.parametrize(
    ("side", "text", "image", "total", "adapters"), [(384, 1.049, 5.359, 97.7, 1.638), (288, 0.736, 2.913, 55.3, 0.969)]
)
def test_modules_of_meter_cost_what_the_specification_says(side, text, image, total, adapters):
    spec = FusionSpec.meter(side)
    bare, n = spec.without_adapters(), spec.image.tokens
    assert round(giga(fusion.module(bare, 0, 40, n)), 3) == text
    assert round(giga(fusion.module(bare, 6, n, 40)), 3) == image
    assert round(giga(fusion.module(bare, 12, 40, 0)), 3) == 0.286
    assert round(giga(flops.layers(bare)), 1) == total
    assert round(fusion.additional(spec) / GIGA, 3) == adapters
    gone = spec.skipping([0, 6])
    assert round(giga(fusion.module(gone, 0, 40, n)), 3) == 0.018
    if side == 384:
        assert round(giga(fusion.module(gone, 6, n, 40)), 3) == 0.255
    inner = giga(row for row in fusion.module(spec, 6, n, 40) if row.kind == "adapter")
    assert inner == giga(fusion.module(gone, 6, n, 40))  # the stand-in costs what it displaces


@pytest.mark.parametrize(
    ("side", "texts", "images", "added"),
    [
        (384, 4, 0, -2.56),
        (384, 3, 1, -6.87),
        (384, 2, 2, -11.18),
        (384, 1, 3, -15.49),
        (384, 0, 4, -19.80),
        (288, 2, 2, -6.33),
    ],
)
def test_four_skipped_fusion_modules_save_what_the_specification_says(side, texts, images, added):
    spec = FusionSpec.meter(side).skipping([*range(texts), *range(6, 6 + images)])
    assert round(fusion.additional(spec) / GIGA, 2) == added


@pytest.mark.parametrize(("size", "tokens", "added"), [((384, 576), 257, -1.01), ((384, 640), 281, -1.12)])
def test_one_skipped_block_of_vilt_saves_what_the_specification_says(size, tokens, added):
    spec = FusionSpec.vilt(size)
    n = 40 + spec.image.tokens
    assert n == tokens
    bare = spec.without_adapters()
    assert sum(row.macs for row in fusion.module(bare, 0, n, 0)) == 12 * n * 768**2 + 2 * n**2 * 768
    assert round(fusion.additional(spec.skipping([5])) / GIGA, 2) == added


def test_updated_parameters_are_the_published_ones():
    adapter = FusionSpec.meter().inner
    assert [adapter.edit(width=h).params(768, norm=False) for h in (96, 192, 288)] == [148_320, 295_872, 443_424]
    assert adapter.params(768) - adapter.params(768, norm=False) == 1_536
    meter, everywhere, vilt = FusionSpec.meter(), FusionSpec.meter(everywhere=True), FusionSpec.vilt()
    assert fusion.updated(meter) == 12 * 3 * 148_320 == 5_339_520
    assert round(fusion.updated(meter.skipping([0, 1, 6, 7])) / 1e6, 3) == 5.333
    assert round(fusion.updated(everywhere.skipping([12, 13, 14])) / 1e6, 2) == 6.23
    assert round(fusion.updated(vilt) / 1e6, 2) == 3.56


def test_lavins_adapters_have_the_published_sizes():
    style = STYLES["lavin"]
    inner, skip = style.inner.params(4096), style.skip.params(4096)
    assert (inner, style.inner.params(1024), skip) == (81_930, 20_490, 278_562)
    total = 32 * inner + 24 * style.inner.params(1024) + 659_584 + 8_192
    assert [round((total + m * (skip - inner)) / 1e6, 2) for m in (0, 2, 4, 6)] == [3.78, 4.17, 4.57, 4.96]


@pytest.mark.parametrize("tokens", [0, 41, [7, 7, 7]])
def test_a_text_that_no_model_takes_is_refused(tokens):
    with pytest.raises(InputError, match="tokens must be"):
        flops.layers(FusionSpec.small(1), tokens)
