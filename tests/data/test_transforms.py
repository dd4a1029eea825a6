# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vtjax.data import transforms
from vtjax.data.augment import GEOMETRIES, OPERATIONS, Augment, randaugment
from vtjax.errors import InputError

ORACLE = np.load(Path(__file__).parent / "oracle_transforms.npz")
META = json.loads(str(ORACLE["meta"]))


def picture(height: int = 32, width: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("case", range(len(META["cases"])))
def test_evaluation_equals_timm(case: int) -> None:
    name, size, crop, interpolation, squash = META["cases"][case]
    ours = transforms.evaluate(ORACLE[name], tuple(size), crop, interpolation, squash=squash)
    normalised = transforms.normalise(ours[None], tuple(META["mean"]), tuple(META["std"]))[0]
    np.testing.assert_array_equal(normalised, ORACLE[f"evaluate_{case}"])


@pytest.mark.parametrize("case", range(len(META["colours"])))
def test_colours_equal_torchvision(case: int) -> None:
    kind, amount = META["colours"][case]
    ours = np.asarray(getattr(transforms, kind)(Image.fromarray(ORACLE["tall"]), amount))
    np.testing.assert_array_equal(ours, ORACLE[f"colour_{case}"])


def test_images_that_are_cropped_already() -> None:
    image = picture(24, 24)
    assert transforms.evaluate(image, (24, 24), resize=False) is image
    np.testing.assert_array_equal(transforms.evaluate(image, (24, 24), crop=1.0), image)
    with pytest.raises(InputError, match="must be 16x16, found 24x24"):
        transforms.evaluate(image, (16, 16), resize=False)


def test_normalise_against_double_precision() -> None:
    images = picture()[None]
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    expected = (images.astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(transforms.normalise(images, mean, std), expected, atol=2e-6)


def test_random_resized_crop_covers_scale_and_ratio() -> None:
    """On an image that holds its own coordinates, the crop's corners show which part was taken."""
    y, x = np.mgrid[:128, :128].astype(np.uint8)
    image = np.stack([y, x, x], axis=-1)
    areas, aspects, centres = [], [], []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        out = transforms.random_resized_crop(image, (64, 64), rng, (0.2, 0.6), (0.5, 2.0), "nearest").astype(int)
        h = (out[-1, 0, 0] - out[0, 0, 0]) * 64 / 63
        w = (out[0, -1, 1] - out[0, 0, 1]) * 64 / 63
        areas.append(h * w / 128**2)
        aspects.append(w / h)
        centres.append(out[32, 32, :2])
    assert 0.17 < min(areas) < 0.25 and 0.52 < max(areas) < 0.64
    assert 0.45 < min(aspects) < 0.62 and 1.6 < max(aspects) < 2.2
    assert 0.4 < np.mean(np.array(aspects) > 1) < 0.6  # log-uniform: wide and tall equally often
    assert np.all(np.abs(np.mean(centres, axis=0) - 64) < 5)


def test_random_resized_crop_of_a_strip_falls_back_to_its_centre() -> None:
    strip = np.zeros((4, 400, 3), np.uint8)
    strip[:, 198:202] = 255
    out = transforms.random_resized_crop(strip, (8, 8), np.random.default_rng(0), (0.9, 1.0))
    assert out.shape == (8, 8, 3) and out[:, 3:5].min() > 200


def test_random_shift_moves_and_fills_with_black() -> None:
    image = np.full((8, 8, 3), 9, np.uint8)
    image[0, 0] = 200
    seen = set()
    for seed in range(100):
        out = transforms.random_shift(image, np.random.default_rng(seed), 1)
        rows, columns = np.nonzero((out != 0).all(-1))
        seen.add((len(set(rows)), len(set(columns)), bool((out == 200).any())))
    assert seen == {(8, 8, True), (8, 7, True), (7, 8, True), (7, 7, True), (8, 7, False), (7, 8, False), (7, 7, False)}


def test_erase_leaves_the_rest_and_its_input_alone() -> None:
    image = np.full((40, 40, 3), 7, np.uint8)
    before = image.copy()
    shares = []
    for seed in range(100):
        changed = (transforms.random_erase(image, np.random.default_rng(seed)) != 7).any(-1)
        rows, columns = np.nonzero(changed)
        assert changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].mean() > 0.97  # one rectangle
        shares.append(changed.mean())
    np.testing.assert_array_equal(image, before)
    assert 0.01 < min(shares) < 0.06 and 0.25 < max(shares) < 0.36


@pytest.mark.parametrize("index", range(len(OPERATIONS)))
@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_every_randaugment_operation(index: int, magnitude: int) -> None:
    image = picture()
    for sign in (1, -1):
        out = np.asarray(OPERATIONS[index](Image.fromarray(image), magnitude / 10, sign))
        assert out.shape == image.shape and out.dtype == np.uint8
        if magnitude == 0 and index not in (1, 2):  # autocontrast and equalize have no magnitude
            np.testing.assert_array_equal(out, image)
        if magnitude == 9 and index > 2:
            assert (out != image).any()


def test_randaugment_draws_different_operations() -> None:
    image = picture()
    results = {randaugment(image, np.random.default_rng(s), 1, 9).tobytes() for s in range(200)}
    assert len(results) > 20  # 14 operations, most of them with a sign


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_augment_is_a_function_of_the_generator(geometry: str) -> None:
    augment = Augment(geometry, flip=True, jitter=0.4, hue=0.1, randaugment=(2, 9), erase=0.5, crop_scale=(0.3, 1.0))
    image = picture(30, 26)
    before = image.copy()
    a, b, c = (augment.apply(image, np.random.default_rng(s), (16, 16), 0.875, "bicubic") for s in (5, 5, 6))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any() and a.shape == (16, 16, 3)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(
    ("geometry", "flip", "share"), [("none", 1.0, 0), ("flip", 0.0, 0.5), ("crop", True, 0.5), ("crop", 1.0, 1)]
)
def test_flip_probability(geometry: str, flip: float, share: float) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, 4:] = 255
    augment = Augment(geometry, flip=flip, crop_scale=(1.0, 1.0))
    flipped = [
        augment.apply(image, np.random.default_rng(s), (8, 8), 1.0, "bicubic")[0, 0, 0] > 128 for s in range(200)
    ]
    assert abs(np.mean(flipped) - share) <= (0.1 if share == 0.5 else 0)


def test_mixup_and_cutmix_mix_neighbours_and_labels() -> None:
    images = np.arange(4, dtype=np.float32)[:, None, None, None] * np.ones((1, 16, 16, 3), np.float32)
    labels = np.arange(4, dtype=np.int32)
    before = images.copy()
    partner = np.array([1, 0, 3, 2])
    kinds = set()
    for seed in range(40):
        mixed, label2, lam = transforms.mix(images, labels, np.random.default_rng(seed), 0.8, 1.0)
        np.testing.assert_array_equal(label2, partner)
        assert 0 <= lam <= 1
        # Either way the mean pixel is the mean of the labels' values, weighted by lam.
        np.testing.assert_allclose(mixed.mean((1, 2, 3)), lam * labels + (1 - lam) * label2, atol=1e-5)
        kinds.add("mixup" if len(np.unique(mixed[0])) == 1 and 0 < lam < 1 else "cutmix")
    np.testing.assert_array_equal(images, before)
    assert kinds == {"mixup", "cutmix"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"geometry": "corp"}, "data.augment must be one of none, .*; did you mean 'crop'.*found 'corp'"),
        ({"crop_scale": (0.0, 1.0)}, "data.crop_scale must be .*found \\(0.0, 1.0\\)"),
        ({"crop_scale": (0.9, 0.5)}, "data.crop_scale"),
        ({"flip": 1.5}, "data.flip must be in 0..1, found 1.5"),
        ({"jitter": -0.1}, "data.jitter"),
        ({"jitter": float("nan")}, "data.jitter"),
        ({"hue": 0.6}, "data.hue"),
        ({"randaugment": (2, 31)}, "data.randaugment"),
        ({"randaugment": (-1, 9)}, "data.randaugment"),
        ({"erase": 2.0}, "data.erase"),
        ({"mixup": -1.0}, "data.mixup"),
        ({"cutmix": float("inf")}, "data.cutmix"),
    ],
)
def test_values_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Augment(**settings)
    assert "\n" not in str(caught.value)
