# SPDX-License-Identifier: Apache-2.0
"""Image transforms on numpy arrays and Pillow: timm's evaluation transform, and what training images go through.

Images are uint8 [H, W, 3] until `normalise`. Whatever is random takes a `np.random.Generator`. No function changes its
input.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, Int32, UInt8
from PIL import Image, ImageEnhance

from vtjax.errors import InputError

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def evaluate(
    image: UInt8[np.ndarray, "H W 3"],
    size: tuple[int, int],
    crop: float = 0.875,
    interpolation: str = "bicubic",
    resize: bool = True,
    squash: bool = False,
) -> UInt8[np.ndarray, "h w 3"]:
    """timm's evaluation geometry (crop modes "center" and "squash"): resize with antialiasing, and centre crop.

    A square target is reached by way of a shorter side of floor(size / crop) pixels; one that is not square by way of
    the smallest image that covers (floor(h / crop), floor(w / crop)), which `squash` makes the size itself, whatever
    the aspect. Rounding as torchvision's.

    Args:
      image: one image.
      size: (h, w) of the result.
      crop: share of the resized side that the crop keeps, in (0, 1].
      interpolation: one of `INTERPOLATIONS`.
      resize: False for images that are cropped already: they are returned as they are.
      squash: do not keep the aspect.

    Raises:
      InputError: without `resize`, where the image does not have the target size.
    """
    height, width = image.shape[:2]
    if not resize:
        if (height, width) != size:
            raise InputError(f"an image that is not to be resized must be {size[0]}x{size[1]}, found {height}x{width}")
        return image
    through = math.floor(size[0] / crop), math.floor(size[1] / crop)
    if squash:
        new = through
    elif through[0] == through[1]:
        # torchvision's Resize(int): the longer side is cut to an integer, not rounded.
        shorter = min(height, width)
        new = int(through[0] * height / shorter), int(through[0] * width / shorter)
    else:
        ratio = min(height / through[0], width / through[1])
        new = round(height / ratio), round(width / ratio)
    if new != (height, width):
        image = np.asarray(Image.fromarray(image).resize(new[::-1], INTERPOLATIONS[interpolation]))
    top, left = (int(round((n - s) / 2.0)) for n, s in zip(new, size, strict=True))
    return image[top : top + size[0], left : left + size[1]]


def normalise(
    images: UInt8[np.ndarray, "*B H W 3"], mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Float32[np.ndarray, "*B H W 3"]:
    """(x / 255 - mean) / std in float32, with torch's order of operations."""
    result = images.astype(np.float32)
    result /= np.float32(255)
    result -= np.asarray(mean, np.float32)
    result /= np.asarray(std, np.float32)
    return result


def random_resized_crop(
    image: UInt8[np.ndarray, "H W 3"],
    size: tuple[int, int],
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bicubic",
) -> UInt8[np.ndarray, "h w 3"]:
    """A random part of the image, resized (Szegedy et al. 2015).

    Args:
      image: one image.
      size: (h, w) of the result.
      rng: source of randomness.
      scale: range of the part's area, relative to the image's.
      ratio: range of the part's width / height, drawn log-uniformly.
      interpolation: one of `INTERPOLATIONS`.
    """
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            break
    else:  # the largest central part whose aspect is in range
        aspect = min(max(width / height, ratio[0]), ratio[1])
        h, w = min(height, round(width / aspect)), min(width, round(height * aspect))
        top, left = (height - h) // 2, (width - w) // 2
    if (h, w) == size:
        return image[top : top + h, left : left + w]
    box = (left, top, left + w, top + h)
    return np.asarray(Image.fromarray(image).resize(size[::-1], INTERPOLATIONS[interpolation], box=box))


def random_shift(image: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator, reach: int) -> UInt8[np.ndarray, "H W 3"]:
    """Moved by up to `reach` pixels each way, black where the image ends (CIFAR's "pad and crop")."""
    height, width = image.shape[:2]
    padded = np.zeros((height + 2 * reach, width + 2 * reach, 3), np.uint8)
    padded[reach : reach + height, reach : reach + width] = image
    top, left = rng.integers(2 * reach + 1, size=2)
    return padded[top : top + height, left : left + width]


def brightness(image: Image.Image, factor: float) -> Image.Image:
    """Blend with black."""
    return ImageEnhance.Brightness(image).enhance(factor)


def contrast(image: Image.Image, factor: float) -> Image.Image:
    """Blend with the mean grey."""
    return ImageEnhance.Contrast(image).enhance(factor)


def saturation(image: Image.Image, factor: float) -> Image.Image:
    """Blend with the image's grey values."""
    return ImageEnhance.Color(image).enhance(factor)


def hue(image: Image.Image, turns: float) -> Image.Image:
    """Hue turned by `turns` of the colour circle, in -0.5..0.5."""
    hsv = np.array(image.convert("HSV"))
    hsv[..., 0] += np.uint8(int(turns * 255) % 256)  # wraps round
    return Image.fromarray(hsv, "HSV").convert("RGB")


def colour_jitter(
    image: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator, strength: float, hue_turns: float = 0.0
) -> UInt8[np.ndarray, "H W 3"]:
    """Brightness, contrast and saturation by factors in [1 - strength, 1 + strength], hue by up to `hue_turns`, in
    random order."""
    low = max(0.0, 1 - strength)
    todo: list[tuple[Callable[[Image.Image, float], Image.Image], float]] = [
        (f, rng.uniform(low, 1 + strength)) for f in (brightness, contrast, saturation)
    ]
    todo.append((hue, rng.uniform(-hue_turns, hue_turns)))
    result = Image.fromarray(image)
    for i in rng.permutation(4):
        adjust, amount = todo[i]
        if adjust is not hue or hue_turns:
            result = adjust(result, amount)
    return np.asarray(result)


def random_erase(
    image: UInt8[np.ndarray, "H W 3"],
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 10 / 3),
) -> UInt8[np.ndarray, "H W 3"]:
    """A random rectangle filled with uniform noise (Zhong et al. 2020); `scale` and `ratio` are its relative area and
    its height / width."""
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < height and 0 < w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            image = image.copy()
            image[top : top + h, left : left + w] = rng.integers(0, 256, (h, w, 3), np.uint8)
            break
    return image


def mix(
    images: Float32[np.ndarray, "B H W 3"],
    labels: Int32[np.ndarray, " B"],
    rng: np.random.Generator,
    mixup: float,
    cutmix: float,
) -> tuple[Float32[np.ndarray, "B H W 3"], Int32[np.ndarray, " B"], float]:
    """Mixes each even row with the odd row after it, and the other way round (mixup, Zhang et al. 2018; CutMix, Yun et
    al. 2019). Neighbours, so that a process needs no rows of another one; the rows are shuffled anyway.

    Args:
      images, labels: a batch with an even number of rows.
      rng: source of randomness; equal on all processes.
      mixup, cutmix: alpha of the Beta distribution of each, 0 = off. With both on, a coin decides for the whole batch.

    Returns:
      The images, the labels of the partners, and lam: the target is lam * label + (1 - lam) * label2.
    """

    def swap(rows: np.ndarray) -> np.ndarray:
        return rows.reshape(-1, 2, *rows.shape[1:])[:, ::-1].reshape(rows.shape)

    cut = cutmix > 0 and (mixup <= 0 or rng.random() < 0.5)
    alpha = cutmix if cut else mixup
    lam = float(rng.beta(alpha, alpha))
    partners = swap(images)
    if not cut:
        return images * np.float32(lam) + partners * np.float32(1 - lam), swap(labels), lam
    height, width = images.shape[1:3]
    h, w = int(height * math.sqrt(1 - lam)), int(width * math.sqrt(1 - lam))
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = max(0, y - h // 2), min(height, y + h // 2)
    left, right = max(0, x - w // 2), min(width, x + w // 2)
    images = images.copy()
    images[:, top:bottom, left:right] = partners[:, top:bottom, left:right]
    # The rectangle may hang over the edge, so lam is what was really kept.
    return images, swap(labels), 1 - (bottom - top) * (right - left) / (height * width)
