# SPDX-License-Identifier: Apache-2.0
"""What the training images go through: the `Augment` settings, and RandAugment."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

from vtjax.data import transforms
from vtjax.data.sources import choices
from vtjax.errors import InputError

GEOMETRIES = ("none", "flip", "shift", "crop")
USED_BY = {"crop_scale": ("crop",), "flip": ("shift", "crop")}  # setting -> the geometries that look at it
MAX_LEVEL = 10  # RandAugment's magnitude scale


@dataclasses.dataclass(frozen=True)
class Augment:
    """Training augmentation; the defaults change nothing.

    Attributes:
      geometry: "none" (evaluation's), "flip" (evaluation's, then a flip), "shift" (evaluation's, moved by up to an
        eighth of the size, black outside) or "crop" (random resized crop).
      flip: probability of a horizontal flip under "shift" and "crop"; True = 0.5. "flip" always has 0.5.
      crop_scale: range of the relative area under "crop".
      jitter: strength of brightness, contrast and saturation changes, 0..1.
      hue: largest turn of the hue, 0..0.5 of the colour circle.
      randaugment: (operations per image, magnitude on the scale 0..10; up to 30 is accepted).
      erase: probability of a rectangle of noise.
      mixup, cutmix: alpha of the Beta distribution; 0 = off.

    Raises:
      InputError: a value out of range, naming the config leaf.
    """

    geometry: str = "none"
    flip: float = 0.0
    crop_scale: tuple[float, float] = (0.08, 1.0)
    jitter: float = 0.0
    hue: float = 0.0
    randaugment: tuple[int, int] = (0, 0)
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        if self.geometry not in GEOMETRIES:
            expected = choices(str(self.geometry), GEOMETRIES)
            raise InputError(f"config.data.augment must be one of {expected}, found {self.geometry!r}")
        limits = {"flip": 1, "jitter": 1, "hue": 0.5, "erase": 1, "mixup": 100, "cutmix": 100}
        for name, limit in limits.items():
            if not 0 <= getattr(self, name) <= limit:
                raise InputError(f"config.data.{name} must be in 0..{limit}, found {getattr(self, name)}")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise InputError(
                f"config.data.crop_scale must be (low, high) with 0 < low <= high <= 1, found {self.crop_scale}"
            )
        if len(self.randaugment) != 2 or self.randaugment[0] < 0 or not 0 <= self.randaugment[1] <= 3 * MAX_LEVEL:
            raise InputError(
                f"config.data.randaugment must be (operations >= 0, magnitude in 0..{3 * MAX_LEVEL}), "
                f"found {self.randaugment}"
            )

    @property
    def random(self) -> bool:
        """Whether single images change at all (mixing happens on batches)."""
        return self.geometry != "none" or bool(self.jitter or self.hue or self.randaugment[0] or self.erase)

    @property
    def mixes(self) -> bool:
        """Whether batches carry `label2` and `lam`."""
        return self.mixup > 0 or self.cutmix > 0

    def apply(
        self,
        image: UInt8[np.ndarray, "H W 3"],
        rng: np.random.Generator,
        size: tuple[int, int],
        crop: float,
        interpolation: str,
        squash: bool = False,
    ) -> UInt8[np.ndarray, "h w 3"]:
        """One training image of (h, w) = `size`; `crop`, `interpolation` and `squash` as for `transforms.evaluate`."""
        if self.geometry == "crop":
            image = transforms.random_resized_crop(image, size, rng, self.crop_scale, interpolation=interpolation)
        else:
            image = transforms.evaluate(image, size, crop, interpolation, squash=squash)
        if self.geometry == "shift":
            image = transforms.random_shift(image, rng, max(1, min(size) // 8))
        flip = {"none": 0.0, "flip": 0.5}.get(self.geometry, 0.5 if self.flip is True else self.flip)
        if flip and rng.random() < flip:
            image = image[:, ::-1]
        if self.randaugment[0]:
            image = randaugment(image, rng, *self.randaugment)
        if self.jitter or self.hue:
            image = transforms.colour_jitter(image, rng, self.jitter, self.hue)
        if self.erase and rng.random() < self.erase:
            image = transforms.random_erase(image, rng)
        return image


def randaugment(
    image: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator, operations: int, magnitude: int
) -> UInt8[np.ndarray, "H W 3"]:
    """RandAugment (Cubuk et al. 2020): `operations` of the 14, drawn with replacement, all at one magnitude.

    Args:
      image: one image.
      rng: source of randomness; also of the sign of rotations, shears, shifts and enhancements.
      operations: how many.
      magnitude: 0..10 spans the paper's ranges; larger values extrapolate where that means something.
    """
    result = Image.fromarray(image)
    for i in rng.integers(len(OPERATIONS), size=operations):
        sign = 1 if rng.random() < 0.5 else -1
        result = OPERATIONS[i](result, magnitude / MAX_LEVEL, sign)
    return np.asarray(result)


GREY = (128, 128, 128)  # fills what rotations, shears and shifts uncover


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GREY)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, level, sign: kind(image).enhance(max(0.0, 1 + sign * 0.9 * level))


Operation = Callable[[Image.Image, float, int], Image.Image]
"""(image, magnitude / 10, +1 or -1) -> image."""

OPERATIONS: tuple[Operation, ...] = (
    lambda image, level, sign: image,
    lambda image, level, sign: ImageOps.autocontrast(image),
    lambda image, level, sign: ImageOps.equalize(image),
    lambda image, level, sign: image.rotate(sign * 30 * level, Image.Resampling.BILINEAR, fillcolor=GREY),
    lambda image, level, sign: ImageOps.solarize(image, max(0, round(256 * (1 - level)))),
    lambda image, level, sign: ImageOps.posterize(image, max(1, 8 - round(4 * level))),
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
    lambda image, level, sign: _affine(image, (1, sign * 0.3 * level, 0, 0, 1, 0)),
    lambda image, level, sign: _affine(image, (1, 0, 0, sign * 0.3 * level, 1, 0)),
    lambda image, level, sign: _affine(image, (1, 0, sign * 0.45 * level * image.width, 0, 1, 0)),
    lambda image, level, sign: _affine(image, (1, 0, 0, 0, 1, sign * 0.45 * level * image.height)),
)
