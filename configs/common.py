# SPDX-License-Identifier: Apache-2.0
"""What every config shares: the leaves of the training loop and of the data, and the parser of `FILE.py:arg`.

Rules that keep every leaf overridable by `--config.a.b=value`: no None and no lists (use "", 0.0 and tuples), floats
written as floats. Zero or the empty string means "off" throughout.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vtjax.errors import InputError

IMAGENET_TRAIN = 1_281_167  # examples in the training split of ImageNet-1k


class Expected(NamedTuple):
    """What a variant should reach: the figure, where it comes from, and whether it was run by us; `by_data`: its size
    follows from data or weights that need not be here (a vocabulary). Every config file has `EXPECTED`, one per
    variant, from which docs/configs.md is made."""

    figure: str
    source: str
    run_here: bool
    by_data: bool = False


def base() -> ConfigDict:
    """All leaves that the loop, the optimiser and the data read, with the defaults of a small run."""
    config = ConfigDict()
    config.experiment = "vit"  # experiments/<name>/main.py
    config.seed = 0
    config.steps = 1000
    config.batch_size = 64  # global, over all devices and processes
    config.workdir = ""
    config.init_from = ""  # a workdir, a converted file or a named weight to start from
    config.mesh = {"data": -1, "fsdp": 1, "context": 1, "tensor": 1}  # -1: all the remaining devices
    config.profile = (0, 0)  # (start, stop): traces the steps start .. stop - 1, counted from 0
    config.log_every = 50
    config.eval_every = 0  # 0: only at the end
    config.allow_config_change = False
    config.heartbeat_timeout = 60  # seconds without a sign of life after which another process counts as lost
    config.checkpoint = {"every": 1000, "keep": 2, "best": "top1"}
    config.ema = 0.0  # decay; evaluation then uses the averaged parameters
    config.accumulate = 1  # micro-batches per step
    config.dtype = "float32"  # of the computation; parameters and optimiser stay float32
    config.optim = optim()
    config.data = data()
    config.model = ConfigDict()
    return config


def optim(**leaves: Any) -> ConfigDict:
    """The optimiser's leaves: AdamW with warm-up and cosine decay, no weight decay."""
    config = ConfigDict(
        {
            "name": "adamw",
            "lr": 1e-3,
            "schedule": "cosine",
            "warmup": 0,  # steps
            "end_lr": 0.0,
            "weight_decay": 0.0,  # decoupled, times the learning rate, on kernels only
            "b1": 0.9,
            "b2": 0.999,
            "momentum": 0.9,  # of "sgd"
            "clip": 0.0,  # global norm
            "groups": {},  # name -> group(...); by alphabet, the first pattern that matches counts
        }
    )
    return with_leaves(config, leaves)


def group(
    pattern: str,
    *,
    lr_scale: float = 1.0,
    weight_decay: float = -1.0,
    frozen: bool = False,
    optional: bool = False,
) -> dict[str, Any]:
    """One parameter group: a regex over paths such as `block_00/attn/query/kernel`, and what it gets.

    A negative `weight_decay` keeps the optimiser's own, on matrices only. `optional`: the pattern may match nothing.
    """
    found = {"pattern": pattern, "lr_scale": lr_scale, "weight_decay": weight_decay, "frozen": frozen}
    return {**found, "optional": True} if optional else found


def guard(**leaves: Any) -> ConfigDict:
    """What `vtjax eval` does where a dynamic model decides otherwise than at calibration.

    `action`: "off"; "warn" (with --decisions); "relax": thresholds go `amount` of the way to the dense model; "dense".
    `bound`: largest Kolmogorov-Smirnov distance of the decisions that is still taken for the same.
    """
    return with_leaves(ConfigDict({"action": "warn", "bound": 0.25, "amount": 0.5}), leaves)


def data(**leaves: Any) -> ConfigDict:
    """The leaves of the data; `augment` is what the training images get, the rest are its parameters."""
    config = ConfigDict(
        {
            "name": "procedural",
            "train_split": "train",
            "eval_split": "test",
            "path": "",
            "workers": 0,
            "prefetch": 2,
            "weights_split": "",  # what `vtjax eval` measures without a workdir; "": eval_split
            "augment": "none",
            "crop_scale": (0.08, 1.0),
            "flip": False,
            "jitter": 0.0,
            "hue": 0.0,
            "repeats": 1,  # copies of an image in a batch, each augmented differently
            "randaugment": (0, 0),
            "mixup": 0.0,
            "cutmix": 0.0,
            "erase": 0.0,
        }
    )
    return with_leaves(config, leaves)


def questions(**leaves: Any) -> ConfigDict:
    """The leaves of the data where it is questions about images (`vtjax.data.question_loader`): those of `data`, and
    how questions share rows. Augmentation stays off."""
    config = data(name="marked_shapes")
    config.update(
        {
            "n": 4000,  # images in the training split of "marked_shapes"
            "size": 64,  # their side, pixels
            "objects": 1.0,  # their size, over the usual one
            "mark": 1,  # pixels of one dot of a mark
            "cells": 0,  # objects lie in the middle of the cells of such a grid; 0: anywhere
            "types": (),  # of the questions, in place of all
            "pack": 1,  # most questions of a row; 1: each has its own
            "buckets": 1,  # most row lengths, each of which is compiled once
            "limit": 0,  # most tokens of a row; 0: what the longest needs
            "learned": 0,  # slots for learned tokens of a row; 0: what the data needs (without data: the limit)
        }
    )
    return with_leaves(config, leaves)


def parse_arg(arg: str, variants: Iterable[str], **options: Any) -> tuple[str, ConfigDict]:
    """Splits `digits,steps=50` into the variant and its options.

    Args:
      arg: `VARIANT[,name=value...]`.
      variants: the known variants.
      **options: name -> default; the default's type is the option's.

    Returns:
      The variant and the options, defaults filled in.

    Raises:
      InputError: an unknown variant or option, a value of the wrong type, or a part without `=`.
    """
    variant, *parts = arg.split(",")
    _known(variant, tuple(variants), "variant of the config")
    values = ConfigDict(options)
    for part in parts:
        name, found, text = part.partition("=")
        _known(name, tuple(options), "option of the config")
        if not found:
            raise InputError(f"config option {name!r} must be written {name}=VALUE, found {part!r}")
        kind = type(options[name])
        try:
            values[name] = kind(text)
        except ValueError:
            raise InputError(f"config option {name!r} must be {kind.__name__}, found {text!r}") from None
    return variant, values


def _known(name: str, known: tuple[str, ...], what: str) -> None:
    if name in known:
        return
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise InputError(f"unknown {what} {name!r}, expected one of {', '.join(known)}{hint}")


def with_leaves(config: ConfigDict, leaves: dict[str, Any]) -> ConfigDict:
    """`config` with some leaves replaced; a misspelt one raises."""
    config.lock().update(leaves)
    return config.unlock()
