# SPDX-License-Identifier: Apache-2.0
"""Figures of token reduction: the panels show what was kept, merged and pruned, the charts what they were given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

from vtjax.errors import InputError
from vtjax.viz import curves, reduction, tokens

GRID = (3, 4)


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).random((12, 16, 3))


@pytest.fixture
def sources() -> np.ndarray:
    """One prefix token and 12 patches. First patches 0 and 1 merge, then 5 joins them, 11 joins 10, and 3 and 7 go."""
    first = np.array([0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    second = np.array([0, 4, 4, 2, -1, 5, 4, 3, -1, 6, 7, 8, 8])
    return np.stack([np.arange(13), first, second])


def texts(figure: Any) -> list[str]:
    return [t.get_text() for t in figure.findobj(Text) if t.get_text()]


def pictures(figure: Any) -> list[np.ndarray]:
    """The panels' pictures, without the legend, which is drawn first."""
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes[3:]]


def patch(picture: np.ndarray, index: int) -> np.ndarray:
    high, wide = picture.shape[0] // GRID[0], picture.shape[1] // GRID[1]
    row, column = divmod(index, GRID[1])
    return picture[row * high : (row + 1) * high, column * wide : (column + 1) * wide]


def outline(picture: np.ndarray, index: int, side: tuple[int, int]) -> str:
    """Colour in the middle of the patch's edge: (-1, 0) top, (0, 1) right."""
    cell = patch(picture, index)
    row, column = ((n - 1) * (s + 1) // 2 if s else n // 2 for n, s in zip(cell.shape[:2], side, strict=True))
    return to_hex(cell[row, column])


def test_panels_show_the_three_states(image: np.ndarray, sources: np.ndarray) -> None:
    figure = tokens.layer_maps(image, sources, grid=GRID, prefix=1, title="A title")
    photograph, untouched, _, last = pictures(figure)
    np.testing.assert_array_equal(photograph, image)
    factor = len(last) // 12
    grown = image.repeat(factor, 0).repeat(factor, 1)
    np.testing.assert_array_equal(untouched, grown)
    for index in (2, 4, 6, 8, 9):
        np.testing.assert_array_equal(patch(last, index), patch(grown, index))
    for group in ((0, 1, 5), (10, 11)):
        mean = np.mean([patch(image, i).mean((0, 1)) for i in group], 0)
        for i in group:
            cell = patch(last, i)
            np.testing.assert_allclose(cell[cell.shape[0] // 2, cell.shape[1] // 2], mean)
    for index in (3, 7):
        assert {to_hex(c) for c in patch(last, index).reshape(-1, 3)} == {tokens.PRUNED, tokens.HATCH}


def test_outlines_go_around_groups_and_differ_where_groups_touch(image: np.ndarray, sources: np.ndarray) -> None:
    last = pictures(tokens.layer_maps(image, sources, grid=GRID, prefix=1))[-1]
    above, below = outline(last, 0, (-1, 0)), outline(last, 10, (-1, 0))
    assert {above, below} <= set(tokens.OUTLINES) and above != below
    assert {outline(last, i, s) for i, s in ((0, (1, 0)), (1, (0, 1)), (5, (0, -1)))} == {above}
    # Patches 0 and 1, 1 and 5, 10 and 11 are of one group: no line between them.
    mean = np.mean([patch(image, i).mean((0, 1)) for i in (0, 1, 5)], 0)
    assert outline(last, 0, (0, 1)) == outline(last, 5, (-1, 0)) == to_hex(mean)
    assert outline(last, 10, (0, 1)) not in tokens.OUTLINES


def test_no_two_groups_that_touch_share_a_colour() -> None:
    # Rows of bricks, each row shifted or not: 45 to 50 groups for ten colours, each beside at most six others.
    shifts = np.random.default_rng(1).integers(0, 2, 10)
    slots = np.stack([100 * row + (np.arange(10) + shift) // 2 for row, shift in enumerate(shifts)])
    roots = tokens._roots(slots.ravel())
    colours = tokens._outline_colours(roots, (10, 10), 0, {})
    assert len(colours) >= 45 and set(colours.values()) == set(range(10))
    alone = -2 - np.arange(100).reshape(10, 10)  # patches that are no group have no colour
    drawn = np.array([colours.get(r, a) for r, a in zip(roots.tolist(), alone.flat, strict=True)]).reshape(10, 10)
    roots = roots.reshape(10, 10)
    for here, there in (
        (np.s_[:, 1:], np.s_[:, :-1]),
        (np.s_[1:], np.s_[:-1]),
        (np.s_[1:, 1:], np.s_[:-1, :-1]),
        (np.s_[1:, :-1], np.s_[:-1, 1:]),
    ):
        np.testing.assert_array_equal(drawn[here] == drawn[there], roots[here] == roots[there])


def test_a_group_gets_its_former_colour_unless_it_is_taken_beside_it() -> None:
    near, apart = np.array([0, 0, 2, 2, -1, 5]), np.array([0, 0, -1, 3, 3, 5])
    assert tokens._outline_colours(near, (1, 6), 0, {0: 7, 2: 7}) == {0: 7, 2: 0}
    assert tokens._outline_colours(apart, (1, 6), 0, {0: 7, 3: 7}) == {0: 7, 3: 7}
    corner, other_corner = np.array([0, 0, -1, -1, -1, -1, 6, 6]), np.array([-1, -1, 2, 2, 4, 4, -1, -1])
    assert tokens._outline_colours(corner, (2, 4), 0, {0: 7, 6: 7}) == {0: 7, 6: 0}
    assert tokens._outline_colours(other_corner, (2, 4), 0, {2: 7, 4: 7}) == {2: 7, 4: 0}


def test_a_group_keeps_its_colour_though_its_slot_moves(image: np.ndarray, sources: np.ndarray) -> None:
    for_layers = pictures(tokens.layer_maps(image, sources, grid=GRID, prefix=1))
    assert outline(for_layers[2], 0, (-1, 0)) == outline(for_layers[3], 0, (-1, 0))


def test_captions_count_tokens(image: np.ndarray, sources: np.ndarray) -> None:
    seen = texts(tokens.layer_maps(image, sources, grid=GRID, prefix=1, layers=[1, 2], title="A title"))
    assert {"A title", "Photograph", "13 tokens", "3 x 4 patches, 1 prefix"} <= set(seen)
    assert "Layer 1" not in seen
    place = seen.index("Layer 2")
    assert seen[place : place + 3] == ["Layer 2", "12 left", "1 merged, 0 pruned"]
    place = seen.index("Layer 3")
    assert seen[place : place + 3] == ["Layer 3", "8 left", "3 merged, 2 pruned"]
    assert [s.split(":")[0] for s in seen[:3]] == ["kept", "merged", "pruned"]


def test_a_patch_merged_with_a_prefix_token_is_merged(image: np.ndarray) -> None:
    sources = np.arange(14)[None].copy()
    sources[0, 6] = 1
    figure = tokens.layer_maps(image, sources, grid=GRID, prefix=2)
    last = pictures(figure)[-1]
    assert outline(last, 4, (-1, 0)) in tokens.OUTLINES
    assert {"13 left", "1 merged, 0 pruned", "3 x 4 patches, 2 prefix"} <= set(texts(figure))


@pytest.mark.parametrize(("depth", "shown"), [(1, [1]), (6, [1, 2, 3, 4, 5, 6]), (12, [1, 2, 4, 6, 8, 10, 12])])
def test_layers_that_are_shown_unless_named(image: np.ndarray, depth: int, shown: list[int]) -> None:
    figure = tokens.layer_maps(image, np.tile(np.arange(12), (depth, 1)), grid=GRID, prefix=0)
    assert [int(t[6:]) for t in texts(figure) if t.startswith("Layer ")] == shown
    assert "3 x 4 patches" in texts(figure)


def test_side_by_side_has_a_row_per_method(image: np.ndarray, sources: np.ndarray) -> None:
    nothing = np.tile(np.arange(13), (2, 1))
    figure = tokens.side_by_side(
        image, {"one": sources, "two": nothing}, grid=GRID, prefix=1, layers=[0, 1], title="Both"
    )
    shown = pictures(figure)
    assert len(shown) == 6
    np.testing.assert_array_equal(shown[0], image)
    np.testing.assert_array_equal(shown[3], image)
    assert (shown[2] != shown[5]).any() and (shown[1] == shown[5]).all()
    places = [axes.get_position() for axes in figure.axes[3:]]
    assert places[0].y0 == places[2].y0 > places[3].y1 and places[0].x0 == places[3].x0 < places[1].x0
    assert {"one", "two", "Both"} <= set(texts(figure))


def overlaps(figure: Any) -> list[tuple[str, str]]:
    """Pairs of texts that cover each other, or a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    found = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]
    # An axis keeps the labels of ticks out of view among its children.
    ticks = {id(label) for axes in figure.axes for a in (axes.xaxis, axes.yaxis) for label in a.findobj(Text)}
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in found if id(t) not in ticks]
    boxes += [("a picture", axes.get_window_extent(renderer)) for axes in figure.axes if axes.images]
    return [(a, b) for i, (a, x) in enumerate(boxes) for b, y in boxes[i + 1 :] if x.overlaps(y)]


def test_no_text_covers_another(sources: np.ndarray) -> None:
    square = np.random.default_rng(0).random((28, 28, 3))
    many = np.tile(np.arange(197), (12, 1))
    maps = tokens.layer_maps(square, many, grid=(14, 14), prefix=1, title="A title")
    rows = tokens.side_by_side(
        square,
        {"a method with a long name": many, "two": many},
        grid=(14, 14),
        prefix=1,
        layers=[2, 5, 8, 11],
        title="T",
    )
    narrow = tokens.layer_maps(square, many, grid=(14, 14), prefix=1, layers=[0])
    seeds = {"merge_threshold": np.full((3, 12), 0.5), "prune_threshold": np.full((3, 12), 0.005)}
    over = {name: (np.arange(4), np.tile(values[0], (4, 1))) for name, values in seeds.items()}
    for figure in (maps, rows, narrow, reduction.thresholds(seeds, over, title="A title")):
        assert overlaps(figure) == []


def test_thresholds_draw_means_ranges_and_histories(tmp_path: Path) -> None:
    seeds = np.array([[0.9, 0.8, 0.7], [0.7, 0.8, 0.9]])
    steps, values = np.array([0, 10, 20, 30]), np.arange(12.0).reshape(4, 3) / 1000
    figure = reduction.thresholds(
        {"merge_threshold": seeds, "prune_threshold": values[-1]}, {"prune_threshold": (steps, values)}, title="All"
    )
    merge, prune, history = (axes for axes in figure.axes if axes.get_title(loc="left"))
    assert [a.get_title(loc="left") for a in (merge, prune)] == ["Merge threshold", "Prune threshold"]
    assert (merge.get_title(loc="right"), prune.get_title(loc="right")) == ("mean and range of 2 seeds", "")
    np.testing.assert_allclose(merge.lines[0].get_xydata(), [[1, 0.8], [2, 0.8], [3, 0.8]])
    (band,) = merge.findobj(PolyCollection)
    assert {(1, 0.9), (1, 0.7), (2, 0.8)} <= {(x, round(y, 9)) for x, y in band.get_paths()[0].vertices}
    np.testing.assert_allclose(prune.lines[0].get_ydata(), values[-1])
    assert not prune.findobj(PolyCollection)
    assert merge.get_ylim()[0] > 0.1 > prune.get_ylim()[1]
    assert len(history.lines) == 3 and len({to_hex(line.get_color()) for line in history.lines}) == 3
    np.testing.assert_allclose(history.lines[2].get_xydata(), np.stack([steps, values[:, 2]], 1))
    assert history.get_position().x0 == prune.get_position().x0 and history.get_position().y1 < prune.get_position().y0
    bar = next(axes for axes in figure.axes if axes.get_title() == "layer")
    assert list(bar.get_yticks()) == [1, 3]
    assert "All" in texts(figure)
    assert curves.save(figure, tmp_path / "t.png").stat().st_size < 300_000


def test_thresholds_of_a_history_alone() -> None:
    figure = reduction.thresholds({}, {"merge_threshold": (np.arange(2), np.ones((2, 5)))})
    assert len(figure.axes) == 2 and len(figure.axes[0].lines) == 5


def test_tradeoff_draws_points_bars_and_the_dense_model(tmp_path: Path) -> None:
    one = [(0.8, 0.7, 0.65, 0.8), (0.4, 0.5, 0.4, 0.6)]
    figure = reduction.tradeoff({"one": one, "two": [(0.6, 0.6, 0.6, 0.6)]}, dense=(1.0, 0.75), title="A title")
    (axes,) = figure.axes
    line, _, (bars,) = axes.containers[0]
    np.testing.assert_allclose(line.get_xydata(), [[0.4, 0.5], [0.8, 0.7]])
    np.testing.assert_allclose(bars.get_segments(), [[[0.4, 0.4], [0.4, 0.6]], [[0.8, 0.65], [0.8, 0.8]]])
    across, star = axes.lines[:2]
    assert set(across.get_ydata()) == {0.75} and across.get_linestyle() == ":"
    np.testing.assert_allclose(star.get_xydata(), [[1.0, 0.75]])
    assert {t.get_text() for t in axes.get_legend().get_texts()} == {"one", "two", "dense"}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("MACs per image, relative to dense", "top-1")
    assert "A title" in texts(figure)
    assert curves.save(figure, tmp_path / "t.png").stat().st_size < 300_000
    plain = reduction.tradeoff({"one": one}, ylabel="recall").axes[0]
    assert plain.get_ylabel() == "recall" and "dense" not in [t.get_text() for t in plain.get_legend().get_texts()]


def test_shares_draw_the_median_and_two_bands() -> None:
    counts = np.stack([np.full(11, 20), np.arange(10, 21)])
    figure = reduction.shares(counts, 20)
    (axes,) = figure.axes
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[0, 100], [1, 100], [2, 75]])
    wide, narrow = (b.get_paths()[0].vertices for b in axes.findobj(PolyCollection)[:2])
    for band, low, high in ((wide, 50, 100), (narrow, 55, 95)):
        at_end = band[band[:, 0] == 2][:, 1]
        np.testing.assert_allclose([at_end.min(), at_end.max()], [low, high])
    assert {"15 tokens", "input", "Live tokens, 11 images", "live tokens, of 20"} <= set(texts(figure))
    assert "Mine" in texts(reduction.shares(counts, 20, title="Mine"))


@pytest.mark.parametrize("depth", [1, 12, 13, 32])
def test_layer_ticks_have_room_and_name_the_last(depth: int) -> None:
    axes = reduction.shares(np.ones((depth, 1)), 1).axes[0]
    named = {t.get_text(): x for t, x in zip(axes.get_xticklabels(), axes.get_xticks(), strict=True)}
    assert named["input"] == 0 and named[str(depth)] == depth and len(named) <= 13
    assert all(float(name) == x for name, x in named.items() if name != "input")


def test_save_keeps_the_picture_in_256_colours(image: np.ndarray, sources: np.ndarray, tmp_path: Path) -> None:
    figure = tokens.layer_maps(image, sources, grid=GRID, prefix=1)
    full = curves.save(figure, tmp_path / "full.png")
    small = tokens.save(figure, tmp_path / "deep" / "small.png")
    with Image.open(full) as a, Image.open(small) as b:
        assert b.format == "PNG" and b.mode == "P"
        b.load()  # checks the sums of all chunks
        before, after = (np.asarray(i.convert("RGB"), float) for i in (a, b))
    assert before.shape == after.shape and len(np.unique(after.reshape(-1, 3), axis=0)) <= 256
    assert np.sqrt(((before - after) ** 2).mean()) < 8
    assert (after[0, 0] == 255).all()
    assert [f.name for f in small.parent.iterdir()] == ["small.png"]
    again = tokens.save(tokens.layer_maps(image, sources, grid=GRID, prefix=1), tmp_path / "again.png")
    assert again.read_bytes() == small.read_bytes()


def test_a_photograph_of_full_size_stays_small(tmp_path: Path) -> None:
    """Noise that is smoothed a little is as hard to pack as a photograph of water."""
    rng = np.random.default_rng(0)
    noise = rng.random((226, 226, 3))
    photograph = np.mean([noise[i : i + 224, j : j + 224] for i in range(3) for j in range(3)], 0)
    sources = np.tile(np.arange(197), (4, 1))
    file = tokens.save(tokens.layer_maps(photograph, sources, grid=(14, 14), prefix=1), tmp_path / "a.png")
    with Image.open(file) as made:
        assert made.width >= 900
    assert file.stat().st_size < 300_000


GOOD = {"grid": GRID, "prefix": 1}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i, s: tokens.layer_maps(i[..., 0], s, **GOOD), r"\[H, W, 3\], found float64 \[12, 16\]"),
        (lambda i, s: tokens.layer_maps((i * 255).astype(np.uint8), s, **GOOD), "found uint8"),
        (lambda i, s: tokens.layer_maps(i * 255, s, **GOOD), r"image must be in \[0, 1\]"),
        (lambda i, s: tokens.layer_maps(i * np.nan, s, **GOOD), r"image must be in \[0, 1\]"),
        (lambda i, s: tokens.layer_maps(i[:11], s, **GOOD), "divide into 3 x 4 patches"),
        (lambda i, s: tokens.layer_maps(i, s, grid=GRID, prefix=0), r"sources must have shape \[L, 12\]"),
        (lambda i, s: tokens.layer_maps(i, s[0], **GOOD), r"sources must have shape \[L, 13\].*found \[13\]"),
        (lambda i, s: tokens.layer_maps(i, s[:0], **GOOD), r"found \[0, 13\]"),
        (lambda i, s: tokens.layer_maps(i, s.astype(float), **GOOD), "integers of -1 or more, found float64"),
        (lambda i, s: tokens.layer_maps(i, s - 1, **GOOD), "found int64 from -2"),
        (lambda i, s: tokens.layer_maps(i, s, layers=[3], **GOOD), r"the 3 of sources, from 0, found \[3\]"),
        (lambda i, s: tokens.layer_maps(i, s, layers=[], **GOOD), "layers must name"),
        (lambda i, s: tokens.side_by_side(i, {}, layers=[0], **GOOD), "at least one reduction"),
        (lambda i, s: tokens.side_by_side(i, {"a": s, "b": s[:1]}, layers=[1], **GOOD), r"of methods\['b'\]"),
        (lambda i, s: tokens.side_by_side(i, {"a": s[:, 1:]}, layers=[1], **GOOD), r"methods\['a'\] must have shape"),
        (lambda i, s: reduction.thresholds({}), "at least one name"),
        (
            lambda i, s: reduction.thresholds({"t": np.array(0.5)}),
            r"final\['t'\] must have shape \[L\] or \[S, L\], found \[\]",
        ),
        (lambda i, s: reduction.thresholds({"t": np.array([np.inf])}), r"final\['t'\] must be finite, found 1 "),
        (
            lambda i, s: reduction.thresholds({}, {"t": (np.ones(2), np.ones((3, 2)))}),
            "as many rows as steps, 2, found 3",
        ),
        (lambda i, s: reduction.tradeoff({}), "at least one method"),
        (lambda i, s: reduction.tradeoff({"a": [(1, 2, 3)]}), r"shape \[points, 4\], found \[1, 3\]"),
        (lambda i, s: reduction.tradeoff({"a": [(1, 2, 3, 4)]}), "low <= y <= high"),
        (lambda i, s: reduction.shares(np.ones(3), 5), r"counts must have shape \[L, n\]"),
        (lambda i, s: reduction.shares(np.full((2, 2), 6), 5), r"in \[0, tokens=5\], found 6 to 6"),
    ],
)
def test_bad_input_is_one_clear_line(image: np.ndarray, sources: np.ndarray, call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        call(image, sources)
    assert "\n" not in str(raised.value)
