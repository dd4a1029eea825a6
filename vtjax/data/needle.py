# SPDX-License-Identifier: Apache-2.0
"""A needle in a long video: one frame of each camera shows a coloured shape, and questions ask about it.

A video is what one or several cameras see, F frames in all, one camera after the other. A bar along the bottom of every
frame shows how far its camera's part has got, blocks at the top its number, as surveillance footage does; so a model
needs no other sense of time. Around the needle is the haystack: drawn grounds that drift, or frames of real clips; some
frames show a grey shape, which nobody asks about. Questions of four types:

- `color`, `shape`, `quarter`: of the needle of one camera, whose frames alone the question sees;
- `camera`, with several cameras: which of them shows the circle (square, triangle); the question sees all of them.

Answers are balanced by construction: example i asks for number i of a shuffled cycle over all answers of a type.
Videos are drawn when they are read, a pure function of their number: their length is what an evaluation varies, and
written down they would take F times the space of a set of pictures.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from vtjax.data.marked_shapes import COLOURS, SHAPES, inside
from vtjax.data.questions import Questions
from vtjax.errors import InputError

TYPES = ("color", "shape", "quarter", "camera")
NAMES = ("one", "two", "three", "four")  # of cameras
QUARTERS = ("first", "second", "third", "fourth")
ANSWERS = (*COLOURS, *SHAPES, *QUARTERS, *NAMES)
HAYSTACKS = ("drawn", "clips")
SMALLEST = 24  # pixels
MARGIN = 4  # pixels of the bar at the bottom, and of the blocks at the top
DISTRACTORS = 0.25  # of the frames show a grey shape


@dataclasses.dataclass(frozen=True)
class Needles:
    """Videos of a split, by their number.

    Attributes:
      split, seed: enter the random stream, so that splits share no video.
      count: of videos.
      frames, cameras: of a video; the frames of a camera are neighbours, as many as of the others or one more.
      size: side of a frame in pixels.
      clips: real frames `[N, H, W, 3]`, H and W at least `size`, of several clips; none = drawn.
    """

    split: str
    seed: int
    count: int
    frames: int
    cameras: int
    size: int
    clips: tuple[np.ndarray, ...] = ()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "F S S 3"]:
        return self.some(index, range(self.frames))

    def some(self, index: int, frames: Sequence[int]) -> UInt8[np.ndarray, "N S S 3"]:
        """N different frames of a video, in this order: equal to those of the whole, of which nothing else is drawn.

        Raises:
          InputError: a frame that there is not, or one twice.
        """
        wanted, number = np.asarray(frames, np.int64), self.number
        if (outside := wanted[(wanted < 0) | (wanted >= self.frames)]).size:
            raise InputError(f"frames of a video must be in 0..{self.frames - 1}, found {outside[0]}")
        if len(np.unique(wanted)) < len(wanted):
            raise InputError(f"frames of a video must differ, found {wanted.tolist()}")
        rng = np.random.default_rng((self.seed, *self.split.encode(), index, 1))
        found = np.empty((len(wanted), self.size, self.size, 3), np.uint8)
        parts = []
        for camera in range(1, self.cameras + 1):
            own, places = np.flatnonzero(number == camera), np.flatnonzero(number[wanted] == camera)
            times = wanted[places] - own[0]
            found[places] = self._ground(rng, len(own), times)
            parts.append((camera, len(own), dict(zip(times.tolist(), places.tolist(), strict=True))))
        for (camera, length, place), needle in zip(parts, self.needles(index), strict=True):

            def draw(time: int, shape: int, colour: tuple[int, ...], place: dict[int, int] = place) -> None:
                where = self._where(rng)  # also of frames that are not wanted: the others follow in the same stream
                if time in place:
                    self._draw(found[place[time]], shape, colour, *where)

            for time in np.flatnonzero(rng.random(length) < DISTRACTORS).tolist():
                draw(time, int(rng.integers(len(SHAPES))), (int(rng.integers(60, 200)),) * 3)
            draw(needle.frame, needle.shape, tuple(COLOURS.values())[needle.colour])
            for time, at in place.items():
                _label(found[at], camera, (time + 1) / length)
        return found

    @property
    def number(self) -> Int32[np.ndarray, " F"]:
        """The camera of each frame, from 1."""
        return (np.arange(self.frames) * self.cameras // self.frames + 1).astype(np.int32)

    def needles(self, index: int) -> list[Needle]:
        """What each camera of a video shows, and when."""
        rng = np.random.default_rng((self.seed, *self.split.encode(), index, 0))
        # The camera whose shape will be asked for comes by the cycle; a shape stands in one camera only.
        asked, shapes = self._cycle("camera", self.cameras, index), rng.permutation(len(SHAPES))
        first = self._cycle("shape", len(SHAPES), index)
        shapes = np.concatenate([[first], shapes[shapes != first]])
        order = [asked, *(camera for camera in range(self.cameras) if camera != asked)]
        found: dict[int, Needle] = {}
        for place, camera in enumerate(order):
            length = int((self.number == camera + 1).sum())
            quarter = self._cycle(f"quarter {place}", len(QUARTERS), index)
            inside = np.flatnonzero(np.arange(length) * len(QUARTERS) // length == quarter)
            colour = self._cycle(f"colour {place}", len(COLOURS), index)
            found[camera] = Needle(int(rng.choice(inside)), colour, int(shapes[place % len(SHAPES)]), quarter)
        return [found[camera] for camera in range(self.cameras)]

    def asked(self, index: int) -> list[tuple[str, str, str, tuple[int, int]]]:
        """Questions about a video: text, answer, type, and the first and last camera that it sees."""
        found, camera = self.needles(index), self._cycle("camera", self.cameras, index)
        needle, here = found[camera], (camera + 1, camera + 1)
        of = f" of camera {NAMES[camera]}" if self.cameras > 1 else ""
        questions = [
            (f"color{of}?", tuple(COLOURS)[needle.colour], "color", here),
            (f"shape{of}?", SHAPES[needle.shape], "shape", here),
            (f"quarter{of}?", QUARTERS[needle.quarter], "quarter", here),
        ]
        if self.cameras > 1:
            every = (1, self.cameras)
            questions.append((f"camera with {SHAPES[needle.shape]}?", NAMES[camera], "camera", every))
        return questions

    def _cycle(self, what: str, answers: int, index: int) -> int:
        """Number `index` of a cycle that is shuffled anew in every round."""
        cycle, place = divmod(index, answers)
        return int(_shuffled(self.split, self.seed, what, cycle, answers)[place])

    def _ground(self, rng: np.random.Generator, frames: int, times: Int64[np.ndarray, " N"]) -> np.ndarray:
        """Some of the frames of a haystack, `[N, S, S, 3]`, uint8."""
        if self.clips:
            clip = self.clips[int(rng.integers(len(self.clips)))]
            top, left = (int(rng.integers(clip.shape[axis] - self.size + 1)) for axis in (1, 2))
            # Forth and back again, where the clip is shorter than the video.
            time = (int(rng.integers(len(clip))) + times) % max(2 * len(clip) - 2, 1)
            time = np.minimum(time, 2 * len(clip) - 2 - time) if len(clip) > 1 else time * 0
            return clip[time, top : top + self.size, left : left + self.size]
        ends = rng.uniform(80, 170, (2, 3, 3, 3)).astype(np.float32)
        share = (0.5 - 0.5 * np.cos(np.arange(frames) * rng.uniform(0.05, 0.5)))[times, None, None, None]
        coarse = ((1 - share) * ends[0] + share * ends[1]).astype(np.float32)
        along = _interpolation(self.size)
        smooth = np.einsum("pa,fabc,qb->fpqc", along, coarse, along, optimize=True)
        noise = rng.integers(-6, 7, (frames, self.size, self.size, 1))[times]
        return np.clip(smooth + noise, 0, 255).astype(np.uint8)

    def _where(self, rng: np.random.Generator) -> tuple[float, float, float]:
        """Radius, row and column of a shape at a random place, clear of the edges; pixels."""
        radius = self.size * float(rng.uniform(0.2, 0.26))
        low, high = MARGIN + radius, self.size - MARGIN - radius
        return radius, rng.uniform(low, high), rng.uniform(radius, self.size - radius)

    def _draw(
        self, picture: np.ndarray, shape: int, colour: tuple[int, ...], radius: float, row: float, column: float
    ) -> None:
        rows, columns = np.indices((self.size, self.size)) + 0.5
        picture[inside(SHAPES[shape], (rows - row) / radius, (columns - column) / radius)] = colour


@dataclasses.dataclass(frozen=True)
class Needle:
    """What a camera shows in one of its frames; numbers of `COLOURS`, `SHAPES` and `QUARTERS`."""

    frame: int
    colour: int
    shape: int
    quarter: int


def open_needle(
    n: int = 2000, size: int = 32, frames: int = 16, cameras: int = 1, haystack: str = "drawn", seed: int = 0
) -> Mapping[str, Callable[[], Questions]]:
    """`needle` with n videos in "train" and n // 4 (at least one) in "val" and "test" each, 3 questions per video, or 4
    with several cameras. With haystack="clips" (extra `[video]`) training takes other clips than "val" and "test".

    Raises:
      InputError: a value out of range.
      MissingExtraError: clips without the packages that hold and decode them.
    """
    if n < 1 or size < SMALLEST or seed < 0:
        raise InputError(f"needle needs n >= 1, size >= {SMALLEST} and seed >= 0, found {n=}, {size=}, {seed=}")
    if not 1 <= cameras <= len(NAMES) - 1:
        raise InputError(f"needle needs 1..{len(NAMES) - 1} cameras, found {cameras}")
    if frames < len(QUARTERS) * cameras:
        raise InputError(
            f"needle needs {len(QUARTERS)} frames per camera, one in every quarter, found {frames} for {cameras}"
        )
    if haystack not in HAYSTACKS:
        raise InputError(f"needle needs a haystack of {', '.join(HAYSTACKS)}, found {haystack!r}")

    def opened(split: str, count: int) -> Questions:
        clips: tuple[np.ndarray, ...] = ()
        if haystack == "clips":
            from vtjax.data import clips as real

            clips = real.clips("train" if split == "train" else "test", size)
        videos = Needles(split, seed, count, frames, cameras, size, clips)
        asked = [videos.asked(index) for index in range(count)]
        rows = list(itertools.chain(*asked))
        return Questions(
            images=videos,
            texts=tuple(text for text, _, _, _ in rows),
            image=np.repeat(np.arange(count, dtype=np.int32), [len(of) for of in asked]),
            answer=np.array([ANSWERS.index(answer) for _, answer, _, _ in rows], np.int32),
            type=np.array([TYPES.index(kind) for _, _, kind, _ in rows], np.int32),
            answers=ANSWERS,
            types=TYPES,
            sees=np.array([sees for _, _, _, sees in rows], np.int32),
            frames=videos.number,
        )

    sizes = {"train": n, "val": max(1, n // 4), "test": max(1, n // 4)}
    return {split: functools.partial(opened, split, count) for split, count in sizes.items()}


def _label(picture: np.ndarray, camera: int, share: float) -> None:
    """The bar of time and the blocks of the camera's number."""
    picture[-MARGIN + 1 :] = 0
    picture[-MARGIN + 1 :, : round(share * picture.shape[1])] = 255
    picture[: MARGIN - 1] = 0
    for block in range(camera):
        picture[: MARGIN - 1, 2 + 6 * block : 6 + 6 * block] = 255


@functools.lru_cache(maxsize=1024)
def _shuffled(split: str, seed: int, what: str, cycle: int, answers: int) -> np.ndarray:
    return np.random.default_rng((seed, *split.encode(), *what.encode(), cycle)).permutation(answers)


@functools.lru_cache(maxsize=8)
def _interpolation(size: int, knots: int = 3) -> np.ndarray:
    """Linear interpolation between knots at the ends and in the middle, `[size, knots]` float32."""
    at = np.linspace(0, knots - 1, size)[:, None]
    return np.maximum(1 - np.abs(at - np.arange(knots)), 0).astype(np.float32)
