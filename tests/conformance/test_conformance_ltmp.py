# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.conformance ltmp`: recorded arrays are reproduced, and one that is not is named."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest

from tests.conformance import __main__ as conformance

METHOD = "ltmp"

BLOCK = r"block/n13/(w/.*|x|size|mask|tau|num_heads)"
MODEL = r"vit/(w/.*|images|labels|tau|reg_lambda|target|label_smoothing|patch_size|num_heads|depth|lr_merge|lr_prune)"

# Per group: names of the inputs, names of what is compared, and of those the arrays that are spoiled. One case each.
CASES = {
    "masker": (r"masker/special/(values|threshold|tau|upstream)", r"masker/special/.*", ["masker/special/inference"]),
    "softmax": (
        r"softmax/masked_is_largest/(logits|mask|eps|upstream)",
        r"softmax/masked_is_largest/.*",
        ["softmax/masked_is_largest/train_grad_mask"],
    ),
    "attn": (BLOCK, r"attn/n13/(train|inference_all_alive)/.*", ["attn/n13/train/importance"]),
    "block": (
        BLOCK + r"|block/n13/upstream_.*|block/n13/ltmp/(merge|prune)_threshold",
        r"block/n13/ltmp/train/.*",
        ["block/n13/ltmp/train/grad_merge_threshold"],
    ),
    "block without the dead": (
        BLOCK + r"|block/n13/ltpm/(merge|prune)_threshold",
        r"block/n13/ltpm/inference_b0/.*",
        ["block/n13/ltpm/inference_b0/merge_mask"],
    ),
    "tome": (r"tome/odd_r3/(metric|x|size|r|class_token)", r"tome/odd_r3/.*", ["tome/odd_r3/source"]),
    "fixed": (
        r"fixed/n15/(w/.*|x|size|num_heads|r_merge|r_prune)",
        r"fixed/n15/prune_merge/.*",
        ["fixed/n15/prune_merge/x_out"],
    ),
    "budget": (r"budget/a/(masks|embed_dim|target)", r"budget/a/.*", ["budget/a/r_flops"]),
    "vit and vit_edge": (
        MODEL + r"|vit/ltp/prune_thresholds",
        r"vit/ltp/(train|eval|inference)/.*|vit_edge/all_pruned/ltp/.*",
        ["vit/ltp/inference/counts", "vit_edge/all_pruned/ltp/loss"],
    ),
}


def trimmed(recorded, case):
    """The arrays of one case, and the names of those that are compared."""
    inputs, outputs, spoiled = CASES[case]
    given = {name for name in recorded if re.fullmatch(inputs, name)}
    compared = {name for name in recorded if re.fullmatch(outputs, name)} - given
    assert set(spoiled) <= compared
    return {name: recorded[name] for name in recorded if name in given | compared}, compared


def spoil(array):
    """A copy with one entry wrong: an integer flipped, a float off by 1e-2 where that is most."""
    out = np.array(array)
    if out.dtype == bool:
        out.flat[-1] = not out.flat[-1]
    elif out.dtype.kind in "iu":
        out.flat[-1] = out.flat[-1] + 1
    else:
        size = np.where(np.isfinite(out), np.abs(out), np.inf)
        out.flat[int(size.argmin())] += 1e-2
    return out


def test_every_group_of_the_file_has_a_case(recorded):
    groups = {name.split("/")[0] for name in recorded}
    assert groups == {name.split("/")[0] for _, _, spoiled in CASES.values() for name in spoiled}


@pytest.mark.parametrize("case", CASES)
def test_what_was_recorded_is_reproduced_and_a_wrong_entry_is_found(case, recorded, replay):
    arrays, compared = trimmed(recorded, case)
    code, result = replay(arrays)
    assert (code, result["failed"], result["unread"]) == (0, [], [])
    assert result["compared"] == len(compared) and result["worst"] < 1e-4
    wrong = CASES[case][2]
    code, result = replay({**arrays, **{name: spoil(arrays[name]) for name in wrong}})
    assert (code, result["failed"], result["unread"]) == (1, wrong, [])
    assert result["compared"] == len(compared)


def test_arrays_of_another_shape_or_nan_are_found(recorded, replay):
    arrays, _ = trimmed(recorded, "budget")
    holed = np.array(arrays["budget/a/grad_masks"])
    holed[0, 0, 0] = np.nan
    arrays |= {"budget/a/grad_masks": holed, "budget/a/r_flops": arrays["budget/a/r_flops"][None]}
    code, result = replay(arrays)
    assert (code, result["failed"]) == (1, ["budget/a/grad_masks", "budget/a/r_flops"])


def test_an_array_that_nobody_reads_is_a_miss(recorded, replay):
    arrays, compared = trimmed(recorded, "budget")
    extra = {"budget/a/more": np.ones(3), "another/group": np.ones(2)}
    code, result = replay({**arrays, **extra})
    assert (code, result["failed"], result["unread"]) == (1, [], ["another/group", "budget/a/more"])
    assert result["compared"] == len(compared)


def test_inputs_without_outputs_pass_for_nothing(recorded, replay):
    inputs = CASES["budget"][0]
    code, result = replay({name: recorded[name] for name in recorded if re.fullmatch(inputs, name)})
    assert (code, result["compared"], result["failed"]) == (1, 0, [])


def test_an_edge_case_of_another_name_is_a_miss(recorded, replay):
    arrays, _ = trimmed(recorded, "vit and vit_edge")
    renamed = {name.replace("vit_edge/all_pruned", "vit_edge/some_pruned"): value for name, value in arrays.items()}
    code, result = replay(renamed)
    assert code == 1 and result["unread"] and all(name.startswith("vit_edge/some_pruned/") for name in result["unread"])


def test_a_missing_input_is_named(recorded, tmp_path, monkeypatch, capsys):
    arrays, _ = trimmed(recorded, "budget")
    np.savez(tmp_path / "less.npz", **{name: value for name, value in arrays.items() if name != "budget/a/target"})
    monkeypatch.setattr(sys, "argv", ["conformance", "ltmp", str(tmp_path / "less.npz")])
    assert conformance.main() == 2
    assert "less.npz: expected the array budget/a/target" in capsys.readouterr().err


def test_what_is_no_file_of_arrays_is_refused(tmp_path, monkeypatch, capsys, file):
    (tmp_path / "text.npz").write_text("no arrays")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "half.npz").write_bytes(file.read_bytes()[:20000])
    for name in ("text.npz", "missing.npz", "empty.npz", "half.npz"):
        monkeypatch.setattr(sys, "argv", ["conformance", "ltmp", str(tmp_path / name)])
        assert conformance.main() == 2
        printed = capsys.readouterr()
        assert printed.out == "" and f"{name}: expected an .npz file of plain arrays" in printed.err


@pytest.mark.slow
def test_the_whole_file_is_reproduced(file, recorded, replay):
    code, result = replay(file)
    assert (code, result["failed"], result["unread"]) == (0, [], [])
    assert len(recorded) == 852 and result["compared"] > 600 and result["groups"] == 9
