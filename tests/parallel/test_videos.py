# SPDX-License-Identifier: Apache-2.0
"""Models whose frames lie over the context axis: equal to the local model, nothing that grows with the video is sent,
attention is not done twice."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import devices
from tests.data.test_needle import loader
from tests.parallel import videos
from vtjax.data import needle
from vtjax.errors import InputError
from vtjax.models.vlm import VLM
from vtjax.parallel import frames
from vtjax.parallel import mesh as mesh_lib


def on_eight(*cases: str) -> list[dict[str, Any]]:
    environment = {**os.environ, "XLA_FLAGS": devices.flags(8), "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-m", "tests.parallel.videos", *cases]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["forms", "strategies", "recomputed", "slices"])
def test_loss_and_gradients_are_those_of_one_device(case: str) -> None:
    """Over context alone, beside data, beside fsdp and tensor, and over two slices; in float32."""
    found = on_eight(case)
    assert len(found) >= 5 and [r for r in found if not r["error"] < 3e-5] == []


@pytest.mark.slow
def test_what_is_generated_is_what_one_device_generates() -> None:
    found = on_eight("generated")
    assert len(found) == 8 and all(r["same"] for r in found)


@pytest.mark.slow
def test_nothing_that_is_sent_grows_with_the_video() -> None:
    """The compiled step for three times the frames has collectives of the same shapes, and none of images."""
    found = on_eight("sent")
    assert {r["mesh"] for r in found} == {"context", "data", "fsdp"}
    for record in found:
        assert record["few"] and record["few"] == record["many"], record


@pytest.mark.slow
def test_between_slices_only_parts_of_the_attention_and_gradients_of_parameters_go() -> None:
    """Per layer an output, its statistic and a gradient of queries; else parameters' gradients, and what the
    partitioner makes of the embedding of text. None of it grows with the video."""
    found = on_eight("crossing")
    assert [r["form"] for r in found] == ["flamingo", "hyper"]
    for record in found:
        few, rows = record["few"], videos.B * videos.N // 4
        assert few == record["many"], record
        assert sum(count for name, count in few.items() if name.startswith("all-gather")) == 3 * record["layers"]
        assert not [name for name in few if name.startswith(("all-to-all", "reduce-scatter"))], record
        moved = [name for name in few if name.startswith("collective-permute")]
        sizes = [math.prod(int(d) for d in re.findall(r"\d+", name.partition("[")[2])) for name in moved]
        assert sum(sizes) <= rows * videos.TEXT.width, record


def test_frames_are_laid_out_once_each() -> None:
    assert frames.order(6, 2, stripe=True) == [0, 2, 4, 1, 3, 5]
    assert frames.order(6, 2, stripe=False) == [0, 1, 2, 3, 4, 5]
    assert frames.order(3, 8, stripe=True) == [0, 1, 2, -1, -1, -1, -1, -1]
    assert frames.order(7, 3, stripe=True) == [0, 3, 6, 1, 4, -1, 2, 5, -1]
    x = jnp.arange(12).reshape(2, 3, 2)
    assert frames.join(x).tolist() == x.reshape(6, 2).tolist() and frames.padding(3) == 0
    assert frames.split(frames.join(x), 2).tolist() == x.tolist()


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh of several processes knows of its devices."""

    id: int
    process_index: int


def test_frames_that_do_not_divide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh, images = mesh_lib.make({"data": 1}), np.zeros((2, 3, 4), np.float32)
    placed = mesh_lib.place({"images": images}, mesh, frames=("images",))
    assert placed["images"].sharding == mesh_lib.frame_sharding(mesh)
    monkeypatch.setattr(mesh_lib, "_positions", lambda mesh, total: {0: 0, 1: 1})
    for processes, message in (
        ((0, 0, 0, 0), "images must hold a multiple of the mesh's context=4 frames, found 3"),
        ((1, 0, 0, 1), r"the mesh's context=4 frames \(of which 2 positions are this process's\), found 3"),
    ):
        grid = np.array([Device(*place) for place in enumerate(processes)], object).reshape(1, 1, 4, 1)
        with pytest.raises(InputError, match=message):
            mesh_lib.place({"images": images}, jax.sharding.Mesh(grid, mesh_lib.AXES), frames=("images",))


@pytest.mark.parametrize("shape", [(1, 1, 8, 1), (2, 1, 4, 1), (1, 2, 2, 2), (8, 1, 1, 1), (1, 1, 2, 4, 1)])
def test_a_process_makes_the_frames_of_its_devices_only(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four processes of two devices each: what one makes is its part of the whole batch, and together it is all."""
    grid, processes = (
        np.array([Device(i, i // 2) for i in range(8)], object).reshape(shape),
        np.arange(8).reshape(shape) // 2,
    )
    mesh = jax.sharding.Mesh(grid, mesh_lib.AXES if len(shape) == 4 else mesh_lib.WITH_SLICES)
    along = math.prod(shape[2:-1])
    places = frames.order(9, along, stripe=True)
    data = {"cameras": 1, "pack": 3, "length": 9}
    whole, asked, drawn = next(loader(frame_order=places, **data).train(3)), [], needle.Needles.some
    monkeypatch.setattr(needle.Needles, "some", lambda *of: asked.append(of[2]) or drawn(*of))
    held: list[int] = []
    for process in range(4):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        mesh_lib._contexts.cache_clear()
        mine = mesh_lib.local_frames(mesh, len(places))
        own = {tuple(place[2:-1]) for place in np.argwhere(processes == process).tolist()}
        assert len(mine) == len(places) * len(own) // along
        part = next(loader(frame_order=[places[place] for place in mine], **data).train(3))
        for name in ("images", "image_number"):
            np.testing.assert_array_equal(part[name], whole[name][:, mine])
        np.testing.assert_array_equal(part["question"], whole["question"])
        assert asked[-1] == [places[place] for place in mine if places[place] >= 0]
        held += mine
    assert set(held) == set(range(len(places)))
    mesh_lib._contexts.cache_clear()


def test_frames_come_in_any_order_and_share_placeholders() -> None:
    spec, given = videos.described("hyper"), videos.batch()
    apply = jax.jit(lambda b: videos.graded(VLM(spec))(videos.drawn(spec), b)[0])
    turned = np.random.default_rng(1).permutation(videos.F)
    moved = {**given, "images": given["images"][:, turned], "image_number": given["image_number"][:, turned]}
    np.testing.assert_allclose(apply(moved), apply(given), rtol=1e-6)
    hidden = np.where((given["image_number"] > 0)[:, :, None, None, None], given["images"], 7.0).astype(np.float32)
    np.testing.assert_allclose(apply({**given, "images": hidden}), apply(given), rtol=1e-6)


def test_tiles_that_fill_up_are_not_projected() -> None:
    """One tile of four: the visual tokens are those of one tile, the loss is that of four."""
    spec, given = videos.described("mllama"), videos.batch()
    one = given["images"][:, :, None]
    four = np.concatenate([one, np.zeros_like(one), np.zeros_like(one), np.zeros_like(one)], axis=2)
    ratio = np.ones((videos.B, videos.F), np.int32)
    model, params = VLM(spec), videos.drawn(spec)
    told = {name: given[name] for name in ("image_number", "image_interval")}

    def run(images: Any) -> Any:
        return jax.jit(lambda p: model.apply(p, given["ids"], images, aspect_ratio=ratio, **told))(params)

    (small, aux), (large, filled) = run(one), run(four)
    np.testing.assert_allclose(small, large, atol=2e-6)
    assert 4 * aux["visual"].shape[1] == filled["visual"].shape[1]


def attentions(jaxpr: str) -> int:
    """Calls of the attention in a jaxpr."""
    return len(re.findall(r"= shard_map\[", jaxpr))


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_recomputation_projects_again_and_does_not_attend_again(check_vma: bool) -> None:
    """Two layers: two calls forward and two backward, under `names` as without; gradients are the local model's."""
    spec, given, mesh = videos.described("flamingo"), videos.batch(2), mesh_lib.make({})
    params = videos.drawn(spec)
    wanted = jax.jit(videos.graded(VLM(spec)))(params, given)
    calls: Counter[str] = Counter()
    with jax.set_mesh(mesh):
        for remat in ("none", "names", "full"):
            model = videos.distributed(spec, remat=remat, strategy="gather_q", check_vma=check_vma)
            calls[remat] = attentions(str(jax.make_jaxpr(videos.graded(model))(params, given)))
            if remat == "names":
                found = jax.jit(videos.graded(model))(params, given)
    assert dict(calls) == {"none": 4, "names": 4, "full": 6}
    assert videos.worst(found, wanted) < 1e-5
