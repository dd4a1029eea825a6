# SPDX-License-Identifier: Apache-2.0
"""All five methods in one multimodal model, `configs/all_five.py:VARIANT[,option=value...]`: tiny, video.

A chain of runs, each of which starts from the one before (`--config.init_from`) and adds the method that the option
`add` names: base, dgmr, ltmp, dpn, search, das. Attention to the frames of a video is distributed in all of them
(LV-XAttn, `config.mesh.context` devices; the numbers are those of one). Other options: `steps` and `batch_size`, where
0 keeps the recipe's own value.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from configs import common, das, dpn, ltmp, lvxattn, vlm
from vtjax.errors import check_choice

STEPS = ("base", "dgmr", "ltmp", "dpn", "search", "das")


def get_config(arg: str = "tiny") -> ConfigDict:
    """The config of a variant; see its function for what it does."""
    variant, options = common.parse_arg(arg, VARIANTS, steps=0, batch_size=0, add="base")
    check_choice("the option add", options.add, STEPS)
    return VARIANTS[variant](options.steps, options.batch_size, options.add)


def five(config: ConfigDict, add: str, **leaves: Any) -> ConfigDict:
    """A config of `configs.lvxattn` with the leaves of the other four; `leaves` by method."""
    config.experiment = "all_five"
    config.add = add
    config.guard = common.guard()
    config.dgmr = ConfigDict({"keep": 0, "score": "concat"})  # neurons of every MLP of the tower
    config.ltmp = ConfigDict({name: ltmp.ltmp()[name] for name in LTMP})
    config.dpn = ConfigDict({name: dpn.dpn()[name] for name in DPN})
    config.das = das.das()
    for name, settings in leaves.items():
        common.with_leaves(config[name], settings)
    config.das.phase = "search" if add == "search" else "finetune"
    if add in ("search", "das"):
        config.optim.groups = {"adapters": common.group("^decoder/das/"), "unchanged": common.group("", frozen=True)}
    else:
        config.optim.groups = {
            "merging": common.group("/ltmp/merge_threshold$", lr_scale=20.0, optional=True),
            "pruning": common.group("/ltmp/prune_threshold$", lr_scale=0.5, optional=True),
            "routers": common.group("/dpn/|/router_token$", lr_scale=10.0, optional=True),
            "the rest": common.group("."),
        }
    return config


LTMP = ("variant", "tau", "similarity", "merge_threshold", "prune_threshold", "target", "budget_weight")
DPN = ("at", "pool", "router", "token", "temperature", "gate", "n_min", "budget", "lam", "quality", "quality_share")


def tiny(steps: int, batch_size: int, add: str) -> ConfigDict:
    """A decoder of six layers on videos of 8 frames of 4 x 4 patches, for tests and notebooks.

    Commands: `vtjax run --config=configs/all_five.py:tiny --workdir=runs/tiny_base`, then
    `vtjax run --config=configs/all_five.py:tiny,add=dgmr --config.init_from=runs/tiny_base --workdir=runs/tiny_dgmr`,
    and so on. Hardware: one CPU core. Time: a minute for all of them. Expected: every step builds, trains and is loaded
    by the next; nothing else means anything.
    """
    config = lvxattn.tiny(steps or 6, batch_size or 4, 8)
    config.log_every = config.checkpoint.every = 3
    config.data.update(n=24, pack=1)
    config.model.tower.update(patch=8, depth=2)
    config.model.bridge = vlm.bridge(projector="linear", cross="hyper", layers=(0, 2))
    config.model.decoder.update(depth=6)
    return five(
        config,
        add,
        dgmr={"keep": 24},
        ltmp={"target": 0.8},
        dpn={"at": (2,), "gate": "st", "n_min": 2, "budget": 0.8, "lam": 1.0, "quality": 1.0},
        das={"skips": 1, "every": 2, "warmup": 1, "width": 4, "skip_width": 8, "candidates": 2},
    )


def video(steps: int, batch_size: int, add: str) -> ConfigDict:
    """The needle in a video of 8 frames of 8 x 8 patches; twelve decoder layers, of which five read the frames.

    Commands: `vtjax run --config=configs/all_five.py:video --workdir=runs/all_five/base_0`, then with `add=dgmr` and
    `--config.init_from=runs/all_five/base_0`, `add=ltmp`, `add=dpn`, `add=search`, and `add=das`, each from the one
    before; `python -m experiments.all_five.steps train` does it. Hardware: one CPU core. Time: 22 minutes for the base,
    about 3 for each step. Expected: accuracy 0.88 at every step, and 0.37 of the dense MACs at the last (one seed, see
    experiments/all_five/README.md).
    """
    first = add == "base"
    config = lvxattn.video(steps or (2500 if first else 400), batch_size or 16, 8)
    config.checkpoint.every = config.eval_every = 500 if first else 0
    config.checkpoint.every = config.checkpoint.every or 200
    # One question to a row: experts are chosen by the question, and the model has to know rows of this form.
    config.data.update(n=20000, pack=3 if first else 1, eval_split="test[:500]")
    config.model.tower.update(patch=4, depth=3, mlp=256)
    config.model.bridge.layers = (0, 2, 4, 6, 8)
    config.model.decoder.update(depth=12)
    config.optim.update(lr=1e-3 if first else 3e-4, warmup=config.steps // 20)
    if add in ("search", "das"):
        config.optim.lr = 3e-3
    return five(
        config,
        add,
        dgmr={"keep": 96},
        ltmp={"target": 0.6},
        dpn={"at": (4, 8), "gate": "st", "n_min": 4, "budget": 0.6, "lam": 3.0},
        das={"skips": 2, "warmup": config.steps // 3, "width": 16, "skip_width": 32},
    )


_README = "experiments/all_five/README.md"
EXPECTED = {
    "tiny": common.Expected("", "for tests and notebooks: its figure means nothing", True, by_data=True),
    "video": common.Expected("accuracy 0.88 at every step", _README, True, by_data=True),
}

VARIANTS = {"tiny": tiny, "video": video}
