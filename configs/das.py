# SPDX-License-Identifier: Apache-2.0
"""DAS, `configs/das.py:VARIANT[,option=value...]`: tiny, easyvqa_base, easyvqa, sortofclevr, llava15_7b,
lavin_7b_scienceqa; and of fusion encoders fusion_tiny, meter_vqa2, meter_flickr30k, vilt_nlvr2.

Options: `steps` and `batch_size`, where 0 keeps the recipe's own value; `phase`: search or finetune, and of fusion
encoders full (trained whole, without adapters); `arm`: das, or what it is compared with from the same start and with
the same steps, full (everything trained) or lora. Adapters without a search are
`phase=finetune` with `--config.das.skips=0`; layers chosen by chance, with `--config.das.remove=random`; by the greedy
baseline, a search with `--config.das.by=greedy`.
The model that is transferred is trained first and named by `--config.init_from`; fine-tuning names the search. Each
variant's docstring gives command, hardware, time, and the figure to expect with its source.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from configs import common, dpn, vlm
from vtjax.errors import check_choice
from vtjax.methods import das as method

ARMS = ("das", "full", "lora", "prompt", "bridge")


def get_config(arg: str = "tiny") -> ConfigDict:
    """The config of a variant; see its function for what it does."""
    variant, options = common.parse_arg(arg, VARIANTS, steps=0, batch_size=0, phase="search", arm="das")
    config = VARIANTS[variant](options.steps, options.batch_size)
    check_choice("the option arm", options.arm, ARMS)
    if "das" in config:
        config.das.phase = options.phase
        if options.arm != "das":
            other(config, options.arm)
        elif options.phase == "full" and "form" in config.data:
            config.optim.groups = {}
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
    config.guard = common.guard()
    config.optim.groups = {
        "adapters": common.group("^decoder/das/"),
        "unchanged": common.group("", frozen=True),
    }
    return config


def other(config: ConfigDict, arm: str) -> None:
    """Full fine-tuning, low-rank updates, or trained prompts (`experiments.das.others`), or the bridge
    alone, in place of adapters."""
    if "form" in config.data:
        check_choice("the option arm of a fusion encoder", arm, ("das", "full"))
        config.das.phase, config.optim.groups = "full", {}
        return
    config.experiment = "vlm"
    del config.das
    bridge = {name: group for name, group in config.optim.groups.to_dict().items() if name == "bridge"}
    config.optim.groups = {}
    if arm == "lora":
        config.model.lora.rank = 8
        config.optim.groups = {**bridge, "lora": common.group("/lora_"), "unchanged": common.group("", frozen=True)}
    elif arm == "bridge":
        config.optim.groups = {**bridge, "unchanged": common.group("", frozen=True)}
    elif arm == "prompt":
        config.optim.groups = {**bridge, "prompt": common.group("^prompt/"), "unchanged": common.group("", frozen=True)}


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


def easyvqa_base(steps: int, batch_size: int) -> ConfigDict:
    """The model that `easyvqa` transfers: twelve decoder layers over 16 visual tokens (64 patches, pooled), trained on
    easy-VQA's questions about shapes, seven eighths of the images. It has never been asked for a colour.

    Command: `vtjax run --config=configs/das.py:easyvqa_base --workdir=runs/das/base_0`. Hardware: one CPU core.
    Time: two minutes. Expected: accuracy 0.65 to 0.87 on the questions about shapes (five seeds); blindly 0.35.
    """
    config = vlm.easyvqa(steps or 400, batch_size or 32)
    config.data.update(types=("shape",), train_split="train[:3500]", eval_split="test", pack=2)
    config.model.tower.update(width=64, depth=1, mlp=128)
    config.model.bridge.pool = (2, 2)
    config.model.decoder.update(depth=12, width=64, mlp=128)
    config.optim.update(lr=1e-3, warmup=40)
    config.log_every, config.eval_every, config.checkpoint.every = 50, 0, 400
    return config


def easyvqa(steps: int, batch_size: int) -> ConfigDict:
    """Transfer to the questions about colours: eight answers that the model has never given; m = 2 of 12 layers take
    more than the paper's 11.97 % of the work off (its abstract, METER on VQA 2.0).

    Commands: `vtjax run --config=configs/das.py:easyvqa --config.init_from=runs/das/base_0
    --workdir=runs/das/search_0`, then `vtjax run --config=configs/das.py:easyvqa,phase=finetune
    --config.init_from=runs/das/base_0 --config.das.preferences=runs/das/search_0 --workdir=DIR` (a search trains the
    bridge, too, so fine-tuning starts from where it started). Hardware: one CPU core. Time: about a minute each.
    Expected: accuracy 0.931 without two layers, 0.932 with adapters in all (five seeds); blindly 0.12.
    """
    config = easyvqa_base(steps or 200, batch_size or 32)
    config.data.types = ("color",)
    config.optim.update(lr=1e-2, warmup=config.steps // 10)
    # A third of the search as warm-up, as METER has with 3 epochs of 1 (spec section 2.7).
    leaves = {"val_split": "train[3500:]", "warmup": config.steps // 3, "every": 2}
    transfer(config, width=16, skip_width=32, **leaves)
    config.optim.groups.bridge = common.group("^bridge/")  # as LaVIN and LLaVA have it
    return config


def sortofclevr(steps: int, batch_size: int) -> ConfigDict:
    """Transfer of the model that DPN is put into, which knows objects in the middle of cells of a grid, to objects
    anywhere, without their marks: a task that needs the first of its eight layers, so that the choice matters.

    Commands: `vtjax run --config=configs/das.py:sortofclevr --config.init_from=runs/dpn/dense_0
    --workdir=runs/das/sortofclevr/search_0` (the model: `configs/dpn.py:sortofclevr_dense`), then
    `vtjax run --config=configs/das.py:sortofclevr,phase=finetune --config.init_from=runs/dpn/dense_0
    --config.das.preferences=runs/das/sortofclevr/search_0 --workdir=DIR`. Hardware: one CPU core. Time: three minutes
    each. Expected: accuracy 0.80 without two layers, 0.80 with adapters in all (three seeds; by type 0.66 to
    0.93).
    """
    config = dpn.sortofclevr_dense(steps or 200, batch_size)
    config.data.update(cells=0, types=("coarse", "object", "relation"), train_split="train[:3500]")
    config.optim.update(lr=3e-3, warmup=config.steps // 10)
    config.eval_every, config.checkpoint.every = 0, 200
    leaves = {"val_split": "train[3500:]", "warmup": config.steps // 3, "every": 2}
    transfer(config, width=16, skip_width=32, **leaves)
    config.optim.groups.bridge = common.group("^bridge/")
    return config


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
    five of warm-up, every second step an update of eta 0.05. Tower, bridge and prompt are LLaVA's (stand-ins): LaVIN
    reads class tokens of CLIP's layers through a small projector, and has adapters in the tower, too.

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


def fusion(steps: int, batch_size: int, form: str, head: float, **model: Any) -> ConfigDict:
    """The base config of a fusion encoder, with the release's optimiser (spec section 4).

    Args:
      form: of the task, of `vtjax.data.fusion_loader.FORMS`.
      head: factor of the head's rate.
      model: leaves of `config.model`: the family, and the arguments of `FusionSpec`'s maker of that name.
    """
    config = common.base()
    config.experiment = "das"
    config.steps, config.batch_size = steps, batch_size
    config.data = fusion_data(form=form)
    config.loss = ConfigDict({"match": 1.0})  # weight of whether text and image belong together, of captions
    # classes: 0 = as many as the data have answers. The tokenizer: words, a name or a folder.
    config.model = ConfigDict({"tokenizer": "words", "classes": 0, "remat": "none", **model})
    config.das = das()
    del config.das["style"]  # the spec has its own adapters
    config.guard = common.guard()
    config.optim.update(schedule="linear", warmup=steps // 10, b2=0.98, weight_decay=0.01)
    config.optim.groups = method.groups(1 if model["family"] == "vilt" else 2, head)
    return config


def fusion_data(**leaves: Any) -> ConfigDict:
    """The leaves of the data of a fusion encoder: those of `common.data`, and what is made of the questions."""
    config = common.data(name="marked_shapes")
    config.update(
        {
            "form": "answers",  # pairs, captions
            "types": (),  # of the questions, in place of all
            "length": 0,  # tokens of a text; 0: what the longest needs
            "false": 15,  # of captions, false ones beside the true one
            # Of "marked_shapes", as in `common.questions`.
            **{"n": 4000, "size": 64, "objects": 1.0, "mark": 1, "cells": 0},
        }
    )
    return common.with_leaves(config, leaves)


def fusion_tiny(steps: int, batch_size: int) -> ConfigDict:
    """A METER of one fusion layer over one layer each of a text encoder and a tower, on a few procedural questions, for
    tests. `--config.model.streams=1 --config.model.depth=3` makes a ViLT of it, `--config.data.form=pairs` (captions)
    another task.

    Commands: `vtjax run --config=configs/das.py:fusion_tiny,phase=full --workdir=runs/fusion`, a search,
    `vtjax run --config=configs/das.py:fusion_tiny --config.init_from=runs/fusion --workdir=runs/fusion_search`, then
    `vtjax run --config=configs/das.py:fusion_tiny,phase=finetune --config.init_from=runs/fusion
    --config.das.preferences=runs/fusion_search --workdir=DIR`. Hardware: one CPU core. Time: seconds. Expected: the
    loss falls; nothing else means anything.
    """
    shape = {"depth": 1, "width": 16, "heads": 2, "image_size": (32, 32), "patch": 16}
    config = fusion(steps or 24, batch_size or 8, "answers", 10.0, family="small", streams=2, **shape)
    config.data.update(n=24, types=("coarse",), false=3)
    config.das.update(skips=1, every=4, warmup=config.steps // 4)
    config.optim.lr, config.log_every, config.checkpoint.every = 1e-3, 10, 12
    return config


VQA2, NLVR2, FLICKR30K = 443_757 + 214_354, 86_373, 5 * (29_000 + 1_014)
"""Training examples, as the release has them: questions of train and val, statements of train, captions of both."""


def published(config: ConfigDict, steps: int, examples: int, phases: tuple[int, int] = (3, 1)) -> ConfigDict:
    """The release's search (spec section 2.7): 3 epochs, of them one of warm-up; `steps` where they are told."""
    epoch = examples // config.batch_size
    config.steps = steps or phases[0] * epoch
    config.optim.warmup = config.steps // 10
    config.das.warmup = config.steps * phases[1] // phases[0]
    config.data.length = 40
    config.log_every, config.checkpoint.every = 100, 500
    return config


def meter_vqa2(steps: int, batch_size: int) -> ConfigDict:
    """DAS in METER (CLIP-ViT-B/16, RoBERTa-base, six fusion layers) on VQA 2.0: four of the 12 branches of fusion
    layers, three candidates every 10 steps of eta 1, three epochs of search, of them one of warm-up (spec sections 2.7
    and 4). The loss is the sum over 3129 answers, so at first all rewards are 0 and nothing moves; the data here have
    one answer per question, the release's have soft scores.

    Commands: a search, `vtjax run --config=configs/das.py:meter_vqa2 --config.init_from=MODEL
    --config.data.name=PREPARED --config.model.tokenizer=FOLDER --workdir=gs://BUCKET/search`, with a set of questions
    in array_record form and a folder of RoBERTa's tokenizer; then with `phase=finetune,steps=12850` (ten epochs) and
    `--config.das.preferences=gs://BUCKET/search`. Hardware: TPU. Not run: neither the data nor METER's weights are
    here, and nothing converts them yet. Expected, from memory of the paper's table and confirmed by no source here:
    74.80 (test-dev) with -11.16 G FLOPs, against 74.70 of adapters alone. Its abstract says -11.97 % of the FLOPs.
    """
    model = {"family": "meter", "image_size": 384, "everywhere": False, "classes": 3129, "remat": "full"}
    config = fusion(1, batch_size or 512, "answers", 50.0, **{**model, "tokenizer": "roberta-base"})
    config.data.name, config.optim.lr, config.dtype = "vqa_v2", 2.5e-5, "bfloat16"
    config.das.skips = 4
    return published(config, steps, VQA2)


def meter_flickr30k(steps: int, batch_size: int) -> ConfigDict:
    """DAS in METER on retrieval among Flickr30K's captions: one true and 15 false ones for an image, and whether text
    and image belong together; the rest as `meter_vqa2`. The figure of a run is the share of images whose true caption
    has the best of 16 scores, not the recall among all that papers give.

    Commands, hardware: as `meter_vqa2`, with a prepared set whose questions are captions; fine-tuning takes ten epochs,
    `phase=finetune,steps=2930`. Not run: the data and METER's weights are not here. Expected, from memory of the
    paper's table and confirmed by no source here: recall at 1 of 80.12 (images) and 91.80 (texts), against 80.38 and
    91.90 of adapters alone.
    """
    config = meter_vqa2(1, batch_size)
    config.data.update(name="flickr30k", form="captions")
    config.optim.lr, config.optim.groups = 5e-5, method.groups(2, 5.0)
    return published(config, steps, FLICKR30K)


def vilt_nlvr2(steps: int, batch_size: int) -> ConfigDict:
    """DAS in ViLT-B/32 on NLVR2: one of 12 blocks, three candidates every 10 steps of eta 1, three epochs of search, of
    them one of warm-up (spec sections 2.7 and 4). Images are squares; the release keeps their aspect.

    Commands, hardware: as `meter_vqa2`, with a folder of BERT's tokenizer; fine-tuning takes ten epochs,
    `phase=finetune,steps=6740`. Not run: the data and ViLT's weights are not here, and a prepared set of questions
    gives pairs of images that are made of it, not NLVR2's. Expected, from memory of the paper's table and confirmed by
    no source here: 74.89 %, against 75.51 % of adapters alone.
    """
    model = {"family": "vilt", "image_size": 384, "classes": 2, "remat": "full", "tokenizer": "bert-base-uncased"}
    config = fusion(1, batch_size or 128, "pairs", 10.0, **model)
    config.data.name, config.optim.lr, config.dtype = "nlvr2", 5e-4, "bfloat16"
    config.das.skips = 1
    return published(config, steps, NLVR2)


_README = "experiments/das/README.md"
EXPECTED = {
    "tiny": common.Expected("", "for tests and notebooks: its figure means nothing", True, by_data=True),
    "easyvqa_base": common.Expected("0.65 to 0.87 on shapes (five seeds)", _README, True, by_data=True),
    "easyvqa": common.Expected("0.931 with 10 of 12 layers; 0.932 with all", _README, True, by_data=True),
    "sortofclevr": common.Expected("0.80 without two layers, 0.80 with", _README, True, by_data=True),
    "llava15_7b": common.Expected("layers 7, 17, 23, 29 (AID)", "the release", False),
    "lavin_7b_scienceqa": common.Expected("89.15 %", "the release's README", False),
    "fusion_tiny": common.Expected("", "for tests and notebooks: its figure means nothing", True, by_data=True),
    "meter_vqa2": common.Expected("74.80 (test-dev)", "memory of the paper, unconfirmed", False),
    "meter_flickr30k": common.Expected("R@1 80.12 / 91.80", "memory of the paper, unconfirmed", False),
    "vilt_nlvr2": common.Expected("74.89 %", "memory of the paper, unconfirmed", False),
}

VARIANTS = {
    "tiny": tiny,
    "easyvqa_base": easyvqa_base,
    "easyvqa": easyvqa,
    "sortofclevr": sortofclevr,
    "llava15_7b": llava15_7b,
    "lavin_7b_scienceqa": lavin_7b_scienceqa,
    "fusion_tiny": fusion_tiny,
    "meter_vqa2": meter_vqa2,
    "meter_flickr30k": meter_flickr30k,
    "vilt_nlvr2": vilt_nlvr2,
}
