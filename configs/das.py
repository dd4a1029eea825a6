# SPDX-License-Identifier: Apache-2.0
"""DAS, `configs/das.py:VARIANT[,option=value...]`: tiny, shapes_base, shapes, llava15_7b, lavin_7b_scienceqa.

Options: `steps` and `batch_size`, where 0 keeps the recipe's own value; `phase`: search or finetune; `arm`: das, or
what it is compared with from the same start and with the same steps, full (everything trained) or lora. Adapters
without a search are `phase=finetune` with `--config.das.skips=0`; layers chosen by chance, with
`--config.das.remove=random`; by the greedy baseline, a search with `--config.das.by=greedy`.
The model that is transferred is trained first and named by `--config.init_from`; fine-tuning names the search. Each
variant's docstring gives command, hardware, time, and the figure to expect with its source.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from configs import common, dpn, vlm
from vtjax.errors import check_choice

ARMS = ("das", "full", "lora")


def get_config(arg: str = "tiny") -> ConfigDict:
    """The config of a variant; see its function for what it does."""
    variant, options = common.parse_arg(arg, VARIANTS, steps=0, batch_size=0, phase="search", arm="das")
    config = VARIANTS[variant](options.steps, options.batch_size)
    check_choice("the option arm", options.arm, ARMS)
    if "das" in config:
        config.das.phase = options.phase
        if options.arm != "das":
            other(config, options.arm)
    return config


def das(**leaves: Any) -> ConfigDict:
    """The leaves of the method; defaults are the release's for METER (spec section 2.7), but for the adapters."""
    config = ConfigDict(
        {
            "phase": "search",  # finetune
            "style": "llama",  # of the adapters: lavin, llava, vilt
            "width": 0,  # of those inside of layers; 0: the style's
            "skip_width": 0,  # of those instead of layers
            "skips": 2,  # m, layers that are left out
            # Of a search.
            "by": "bandit",  # greedy, after training with equal preferences
            "policy": "race",  # uniform_topm, the paper's
            "candidates": 3,  # per update
            "every": 10,  # steps between updates
            "rate": 1.0,
            "warmup": 0,  # steps before the first update
            "ramp": 0,  # steps, after half of which m is reached (LLaVA); 0: at once
            "val_split": "val",  # of the questions that candidates are judged by; "": the training split's
            "fixed_val_batch": False,  # the same one for all updates (the release); else a fresh one each
            "greedy_batches": 4,
            "preferences": "",  # workdir of a search: this one begins with what it learned, or fine-tuning takes it
            # Of fine-tuning.
            "remove": "search",  # which layers: random, or a list such as [1, 2]
            "keep": False,  # go on with the adapters of the search (ours)
        }
    )
    return common.with_leaves(config, leaves)


def transfer(config: ConfigDict, **leaves: Any) -> ConfigDict:
    """A config of `configs.vlm` in which adapters are trained, and nothing else."""
    config.experiment = "das"
    config.das = das(**leaves)
    config.optim.groups = {
        "adapters": common.group("^decoder/das/"),
        "unchanged": common.group("", frozen=True),
    }
    return config


def other(config: ConfigDict, arm: str) -> None:
    """Full fine-tuning, or low-rank updates, in place of adapters."""
    config.experiment = "vlm"
    del config.das
    config.optim.groups = {}
    if arm == "lora":
        config.model.lora.rank = 8
        config.optim.groups = {"lora": common.group("/lora_"), "unchanged": common.group("", frozen=True)}


def tiny(steps: int, batch_size: int) -> ConfigDict:
    """A decoder of four layers on a few procedural questions, for tests and notebooks.

    Commands: `vtjax run --config=configs/das.py:tiny --workdir=runs/das_search`, then
    `vtjax run --config=configs/das.py:tiny,phase=finetune --config.init_from=runs/das_search --workdir=DIR`.
    Hardware: one CPU core. Time: seconds. Expected: the loss falls; nothing else means anything.
    """
    config = vlm.tiny(steps, batch_size)
    config.data.update(pack=5)
    config.model.tower.update(depth=1)
    config.model.decoder.update(depth=4)
    return transfer(config, skips=1, every=4, warmup=config.steps // 4, width=4, skip_width=8)


def shapes_base(steps: int, batch_size: int) -> ConfigDict:
    """The model that `shapes` transfers: twelve decoder layers, trained on questions about the large object, on marks
    and on lists; no question about a named object or a pair of them.

    Command: `vtjax run --config=configs/das.py:shapes_base --workdir=runs/das/base_0`. Hardware: one CPU core. Time:
    about an hour. Not run yet.
    """
    config = dpn.sortofclevr_dense(steps, batch_size)
    config.data.types = ("coarse", "fine", "list")
    config.model.decoder.depth = 12
    return config


def shapes(steps: int, batch_size: int) -> ConfigDict:
    """Transfer to questions about one object and about pairs; m = 2 of 12 layers take more than the paper's 11.97 % of
    the work off (its abstract, METER on VQA 2.0).

    Commands: `vtjax run --config=configs/das.py:shapes --config.init_from=runs/das/base_0 --workdir=runs/das/search_0`,
    then `vtjax run --config=configs/das.py:shapes,phase=finetune --config.init_from=runs/das/search_0 --workdir=DIR`.
    Hardware: one CPU core. Not run yet.
    """
    config = shapes_base(steps or 600, batch_size or 16)
    config.data.types = ("object", "relation")
    config.optim.update(lr=3e-3, warmup=config.steps // 20)
    config.eval_every = 0
    config.checkpoint.every = 200
    # A third of the search as warm-up, and 40 updates, as METER has with 3 epochs of 1 (spec section 2.7).
    return transfer(config, warmup=config.steps // 3, width=16, skip_width=32)


SCIENCEQA = 12_726  # training examples


def llava15_7b(steps: int, batch_size: int) -> ConfigDict:
    """DAS in LLaVA-1.5-7B, as its authors have it for Slake and AID: four of 32 layers, two adapters of width 64 in the
    kept ones, 256 instead of the others, five candidates every 3 steps of eta 0.1, m ramped (spec section 2.7).

    Commands: a search, `vtjax run --config=configs/das.py:llava15_7b --workdir=gs://BUCKET/search` with a prepared set
    of questions (`--config.data.name`) and `--config.init_from=MODEL`, a folder of Hugging Face's llava-1.5-7b-hf; then
    `vtjax run --config=configs/das.py:llava15_7b,phase=finetune --config.init_from=MODEL
    --config.das.preferences=gs://BUCKET/search`, as the search trains the projector, too. Hardware: TPU. Expected: for
    AID the release took layers 7, 17, 23 and 29 out (accuracy not recovered). Not run: the data are not here.
    """
    config = vlm.llava15_7b(steps or 1000, batch_size or 128)
    config.optim.update(lr=4e-4, warmup=config.steps * 3 // 100, b2=0.999, clip=1.0)
    transfer(config, style="llava", skips=4, candidates=5, every=3, rate=0.1, warmup=config.steps // 20)
    config.das.ramp = config.das.warmup
    config.optim.groups.bridge = common.group("^bridge/", lr_scale=0.05)
    return config


def lavin_7b_scienceqa(steps: int, batch_size: int) -> ConfigDict:
    """DAS in LaVIN-7B on ScienceQA: four of 32 layers, router adapters of width 8 and 32, ten epochs of search, of them
    five of warm-up, 150 updates per epoch of eta 0.05. Tower, bridge and prompt are LLaVA's (stand-ins): LaVIN reads
    class tokens of CLIP's layers through a small projector, and has adapters in the tower, too.

    Commands: as `llava15_7b`; fine-tuning takes 20 epochs, `phase=finetune,steps=7940`, and 2 of them as warm-up,
    `--config.optim.warmup=794`. Hardware: TPU. Expected: the
    release's average of 89.15 % with four layers removed, against 89.41 % with none (its README). Not run: the data are
    not here.
    """
    config = vlm.llava15_7b(1, batch_size or 32)
    epoch = SCIENCEQA // config.batch_size
    config.steps, config.accumulate = steps or 10 * epoch, 1
    config.optim.update(lr=9e-3 * config.batch_size / 256, warmup=config.steps * 2 // 5, b2=0.95, weight_decay=0.02)
    config.model.stand_ins = (
        "tower, bridge and prompt: LLaVA's for LaVIN's",
        "decoder: Vicuna-7B's shape for LLaMA-7B's",
    )
    transfer(config, style="lavin", skips=4, every=max(epoch // 150, 1), rate=0.05, warmup=config.steps // 2)
    config.optim.groups.bridge = common.group("^bridge/")
    return config


_README = "experiments/das/README.md"
EXPECTED = {
    "tiny": common.Expected("", "for tests and notebooks: its figure means nothing", True, by_data=True),
    "shapes_base": common.Expected("not measured yet", _README, False, by_data=True),
    "shapes": common.Expected("not measured yet", _README, False, by_data=True),
    "llava15_7b": common.Expected("layers 7, 17, 23, 29 (AID)", "the release", False),
    "lavin_7b_scienceqa": common.Expected("89.15 %", "the release's README", False),
}

VARIANTS = {
    "tiny": tiny,
    "shapes_base": shapes_base,
    "shapes": shapes,
    "llava15_7b": llava15_7b,
    "lavin_7b_scienceqa": lavin_7b_scienceqa,
}
