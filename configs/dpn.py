# SPDX-License-Identifier: Apache-2.0
"""DPN, `configs/dpn.py:VARIANT[,option=value...]`: tiny, sortofclevr, easyvqa, smollm2, llava15_7b, llava_hr_7b.

Options: `steps` and `batch_size`, where 0 keeps the recipe's own value; `trainable`: routers, lora or all. The dense
model that DPN is put into is trained first, by `configs/vlm.py` or `configs/dpn.py:sortofclevr_dense`, and named by
`--config.init_from`. Each variant's docstring gives command, hardware, time, and the figure to expect with its source.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from configs import common, vlm


def get_config(arg: str = "tiny") -> ConfigDict:
    """The config of a variant; see its function for what it does."""
    variant, options = common.parse_arg(arg, VARIANTS, steps=0, batch_size=0, trainable="all")
    config = VARIANTS[variant](options.steps, options.batch_size)
    if "dpn" in config:
        config.dpn.trainable = options.trainable
    return config


def dpn(**leaves: Any) -> ConfigDict:
    """The leaves of the method; defaults are the release's (spec section 12)."""
    config = ConfigDict(
        {
            "at": (),  # layers before each stage; (): three, in segments of equal depth
            "pool": "max",  # avg, dwconv
            "router": "mlp",  # linear
            "token": "router",  # answer: the template's token in front of the answer is read, and none is added (ours)
            "temperature": 10.0,  # of its softmax
            "detach": False,  # no gradient through the router's input
            "gate": "prob",  # st: 1 in the forward pass (ours); off
            "n_min": 18,  # tokens of an image that a draw leaves at least
            "floor_at_eval": False,  # at inference, too
            "mode": "adaptive",  # random; forced, by_type: config.dpn.path; off: no pooling
            "path": (),  # experts of the stages, 0..2, for all questions, or for each type in turn
            "trainable": "all",  # routers, lora
            "loss": "argmax_global",  # argmax_per_stage, expected; macs: what is above the budget (ours)
            "tau": 1.5,  # halvings per stage that the hinge asks for, on average
            "budget": 0.5,  # share of the dense work, of loss="macs"
            "lam": 1e-3,  # its weight
            "lam_warmup": 0,  # steps over which it grows
            "route_group": 0,  # rows of the batch that share a hinge; 0: all of them
            # Weight of the divergence from the model without poolings, which reads the same texts: with token="router"
            # a token that it does not know (ours).
            "distill": 0.0,
            "quality": 0.0,  # weight of what experts would do to the loss (ours)
            "quality_share": 0.25,  # of the batch that all experts are tried on
            # Count what an expert makes worse, not what it makes better: a blurred image lowers the loss of an answer
            # that is wrong and sure of it, which is no reason to pool.
            "harm_only": False,
            "layout": "lattice",  # packed: in training, fewer slots where experts are not chosen by routers
            "exec": "staged",  # the form that `vtjax bench` times: switch (one question at a time), masked
        }
    )
    return common.with_leaves(config, leaves)


def insertion(config: ConfigDict, *, router_lr: float = 1.0, **leaves: Any) -> ConfigDict:
    """A config of `configs.vlm` with DPN in it: one question per row, routers in a group of their own."""
    config.experiment = "dpn"
    config.dpn = dpn(**leaves)
    config.guard = common.guard()
    config.data.update(pack=1)
    config.optim.groups = {
        "dpn": common.group("/dpn/|/router_token$", lr_scale=router_lr),
        "model": common.group(".", optional=True),
    }
    return config


def tiny(steps: int, batch_size: int) -> ConfigDict:
    """A model of 70 thousand parameters with 64 visual tokens on a few procedural questions, for tests and notebooks.

    Command: `vtjax run --config=configs/dpn.py:tiny --workdir=DIR`. Hardware: one CPU core. Time: seconds.
    Expected: the loss falls; nothing else means anything.
    """
    config = vlm.tiny(steps, batch_size)
    config.data.update(size=64)
    config.model.tower.update(image_size=(64, 64), patch=8, depth=1)
    config.model.decoder.update(depth=8)
    return insertion(config, n_min=2, gate="st")


def sortofclevr_dense(steps: int, batch_size: int) -> ConfigDict:
    """The dense model of `sortofclevr`: procedural questions about 16 x 16 visual tokens, fifteen to a row.

    Command: `vtjax run --config=configs/dpn.py:sortofclevr_dense --workdir=runs/dpn/dense_0`. Hardware: one CPU core.
    Time: 30 minutes. Expected: accuracy 0.89 to 0.96 (three seeds); one of them reads marks after
    3500 steps, `steps=3500`, not after 2500; every type 20 points above its majority answer
    (measured, experiments/dpn/README.md).
    """
    config = vlm.easyvqa(steps or 2500, batch_size or 8)
    # One layer on the patches: detail is not mixed over the image before the decoder. A mark lies within one patch.
    config.data.update(name="marked_shapes", n=4000, size=128, cells=16, mark=2, pack=15, eval_split="test[:200]")
    config.model.tower.update(image_size=(128, 128), depth=1)
    config.model.decoder.update(depth=8, mlp=256)
    # At 1e-3 colours and places are learned as soon, and marks never.
    config.optim.update(lr=5e-4, warmup=100)
    config.eval_every = 500
    return config


def sortofclevr(steps: int, batch_size: int) -> ConfigDict:
    """DPN in that model; every arm of the comparison starts from it and takes equal steps.

    Command: `vtjax run --config=configs/dpn.py:sortofclevr --config.init_from=runs/dpn/dense_0 --workdir=DIR`.
    Hardware: one CPU core. Time: 5 minutes. Expected: see experiments/dpn/README.md.
    """
    config = insertion(sortofclevr_dense(steps or 300, batch_size or 16), router_lr=10.0, n_min=4)
    # Lists teach to find an object by its colour; no path is chosen for them.
    config.data.types = ("coarse", "object", "relation", "fine")
    config.optim.update(lr=3e-4, warmup=config.steps // 20)
    config.eval_every = 0
    config.checkpoint.every = 200
    return config


def easyvqa(steps: int, batch_size: int) -> ConfigDict:
    """DPN in the small model of easy-VQA (64 visual tokens; three layers are too few, so this one has eight).

    Command: `vtjax run --config=configs/vlm.py:easyvqa --config.model.decoder.depth=8 --workdir=runs/easyvqa8`, then
    `vtjax run --config=configs/dpn.py:easyvqa --config.init_from=runs/easyvqa8 --workdir=DIR`. Not run yet.
    """
    config = insertion(vlm.easyvqa(steps or 600, batch_size or 64), router_lr=10.0, n_min=2)
    config.model.decoder.depth = 8
    config.optim.update(lr=3e-4, warmup=config.steps // 20)
    return config


def smollm2(steps: int, batch_size: int) -> ConfigDict:
    """DPN in ViT-Ti/16 and SmolLM2 on easy-VQA, at 256 pixels: 256 visual tokens.

    Command: `vtjax run --config=configs/dpn.py:smollm2,trainable=lora --config.model.lora.rank=8
    --config.init_from=runs/smollm2 --workdir=DIR`, after configs/vlm.py:smollm2 at the same size. Not run yet.
    """
    config = insertion(vlm.smollm2(steps or 300, batch_size or 32), router_lr=10.0, n_min=4)
    config.model.tower.image_size = (256, 256)
    return config


def llava15_7b(steps: int, batch_size: int) -> ConfigDict:
    """DPN-LLaVA-1.5-7B: routing after layers 8, 16 and 24 of 32, everything trained, one epoch (spec section 4).

    Command: `vtjax run --config=configs/dpn.py:llava15_7b --workdir=gs://BUCKET/dpn` with a prepared set of questions
    (`--config.data.name`) and `--config.init_from` a folder of LLaVA-1.5 before instruction tuning. Hardware: TPU.
    Expected: the paper's 56 % less work at +0.74 % on ten benchmarks, whose tables could not be recovered. Not run.
    """
    return insertion(vlm.llava15_7b(steps, batch_size))


def llava_hr_7b(steps: int, batch_size: int) -> ConfigDict:
    """DPN on the 32 x 32 grid of LLaVA-HR-7B; its tower is a stand-in, see configs/vlm.py. Expected: the paper's 40 %
    less work at -0.4 %. Not run."""
    return insertion(vlm.llava_hr_7b(steps, batch_size))


_README = "experiments/dpn/README.md"
_PAPER = "the paper's abstract"
EXPECTED = {
    "tiny": common.Expected("", "for tests and notebooks: its figure means nothing", True, by_data=True),
    "sortofclevr_dense": common.Expected("0.89 to 0.96 (three seeds)", _README, False, by_data=True),
    "sortofclevr": common.Expected("not measured yet", _README, False, by_data=True),
    "easyvqa": common.Expected("not measured yet", _README, False, by_data=True),
    "smollm2": common.Expected("not measured yet", _README, False, by_data=True),
    "llava15_7b": common.Expected("56 % less work, +0.74 %", _PAPER, False),
    "llava_hr_7b": common.Expected("40 % less work, -0.4 %", _PAPER, False),
}

VARIANTS = {
    "tiny": tiny,
    "sortofclevr_dense": sortofclevr_dense,
    "sortofclevr": sortofclevr,
    "easyvqa": easyvqa,
    "smollm2": smollm2,
    "llava15_7b": llava15_7b,
    "llava_hr_7b": llava_hr_7b,
}
