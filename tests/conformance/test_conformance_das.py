# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.conformance das`: recorded arrays are reproduced, and one that is not is named.

tests/oracle/das.npz holds adapters, searches and laws of the recorded file, bit for bit; the whole file, which has the
stacks of layers, is replayed where it is.
"""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest

from tests.conformance import __main__ as conformance
from tests.conformance import das_stacks
from tests.conformance.das_weights import meter_path
from vtjax.models.fusion import Fusion

METHOD = "das"

OUTPUTS = (
    r"(pa|router|repadapter|pladapter|llava)/.*(y_res|y_nores|y_nores_cached|route_fp16|gx|y|out|g/.*)"
    r"|trace/.*/(prob|gate_after|final_select_sorted|skip_ramp|val_first_index)"
    r"|policy/.*/(p|sets|set_prob|inclusion|uniform_inclusion_mc|draw_order)"
    r"|final/.*/select_order|groups/(lr_mult|weight_decay|requires_grad)|sched/lavin_lr"
    r"|(fusion|vilt)/(cfg|n_select|layer0_text_out|.*/(text_feats|image_feats|cls_feats|adapter_grad_norms|skip_flag_[lv]))"
    r"|(lavin|llama)/(cfg|n_select|mask|.*/out)"
)
"""What is compared and used for nothing else."""
USED = r"trace/.*/(fired|gate_before|cand|loss|n_draws|gate_final)"
"""What is compared, and used for what comes after."""


def spoil(array):
    """A copy with one entry wrong: an integer's or flag's last, a float's smallest by 1e-2."""
    out = np.array(array)
    if out.dtype == bool:
        out.flat[-1] = not out.flat[-1]
    elif out.dtype.kind in "iu":
        out.flat[-1] += 1
    else:
        size = np.where(np.isfinite(out), np.abs(out), np.inf)
        out.flat[int(size.argmin())] += 1e-2
    return out


def check(arrays, replay):
    """All is reproduced; and of what is compared, every array that is wrong is found."""
    code, result = replay(arrays)
    assert (code, result["failed"], result["unread"]) == (0, [], [])
    outputs = {name for name in arrays if re.fullmatch(OUTPUTS, name)}
    used = {name for name in arrays if re.fullmatch(USED, name)}
    noisy = {name for name in used if "noisy" in name and name.endswith("loss")}
    assert result["compared"] == len(outputs | used - noisy)
    assert result["groups"] == len({name.split("/")[0] for name in arrays})
    wrong = {name: spoil(arrays[name]) for name in outputs}
    wrong |= {name: arrays[name] + (np.arange(len(arrays[name])) == 0) for name in outputs if name.endswith("/cfg")}
    code, result = replay({**arrays, **wrong})
    assert (code, result["failed"], result["unread"]) == (1, sorted(wrong), [])
    # A copy of a search for every field of it that is used, too, with that one wrong.
    searches = {name: arrays[name] for name in arrays if name.startswith("trace/meter/")}
    copies, wrong = {}, []
    for field in ("fired", "gate_before", "cand", "loss", "n_draws", "gate_final"):
        copies |= {f"{field}/{name}": array for name, array in searches.items()}
        name, array = f"{field}/trace/meter/{field}", searches[f"trace/meter/{field}"]
        # Another subset is found by what follows from it, an arm that does not exist by itself. Of draws any number
        # will do that suffices.
        copies[name] = array + 100 if field == "cand" else 0 * array + 1 if field == "n_draws" else spoil(array)
        wrong.append(name)
    code, result = replay(copies)
    assert code == 1 and set(wrong) <= set(result["failed"]) and result["unread"] == []


def test_what_was_recorded_is_reproduced_and_a_wrong_entry_is_found(recorded, replay):
    check(recorded, replay)


def test_cases_are_known_by_what_they_hold(recorded, replay):
    """A second model, or a case of another name, is replayed, too."""
    renamed = {
        "again/" + name: recorded[name] for name in recorded if name.startswith(("llava/", "final/", "policy/0"))
    }
    code, result = replay(renamed)
    assert (code, result["failed"], result["unread"]) == (0, [], []) and result["compared"] == 13
    code, result = replay({**renamed, "again/more": np.ones(2), "other/x": np.ones(3)})
    assert (code, result["failed"], result["unread"]) == (1, [], ["again/more", "other/x"])


def test_a_missing_input_is_named(recorded, tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "less.npz", **{k: v for k, v in recorded.items() if k != "trace/meter/w"})
    monkeypatch.setattr(sys, "argv", ["conformance", "das", str(tmp_path / "less.npz")])
    assert conformance.main() == 2
    assert "less.npz: expected the array trace/meter/w" in capsys.readouterr().err


def test_the_small_file_is_a_part_of_the_whole_one(recorded, whole):
    for name in recorded:
        np.testing.assert_array_equal(recorded[name], whole[name])


def test_names_of_the_release():
    assert meter_path("cross_modal_image_layers.2.crossattention.output.adapter.up_proj.bias") == (
        "das/block_08/cross/up/bias"
    )
    assert meter_path("adapter_list_v.0.0.adapter_layer_norm_before.weight") == "das/block_06/skip/norm/scale"


@pytest.mark.slow
def test_the_whole_file_is_reproduced(whole, replay):
    assert len(whole) == 1489
    check(whole, replay)


@pytest.mark.slow
def test_streams_of_one_layer_that_see_each_other_are_not_meters(whole, replay, monkeypatch):
    """Invariant 7: an image branch that reads the text of its own layer gives other numbers."""
    arrays = {name: array for name, array in whole.items() if name.startswith("fusion/")}

    class Sequential(Fusion):
        def _modules(self, params, skip, key):
            run, last = super()._modules(params, skip, key), {}

            def one(index, x, y=None, **masks):
                y = last.pop("text") if index >= self.spec.fusion and "text" in last else y
                out = run(index, x, y, **masks)
                if index < self.spec.fusion:
                    last["text"] = out
                return out

            return one

    monkeypatch.setattr(das_stacks, "Fusion", Sequential)
    code, result = replay(arrays)
    assert code == 1 and {"fusion/0/image_feats", "fusion/1/cls_feats"} <= set(result["failed"])
    assert "fusion/3/image_feats" not in result["failed"]  # there all layers are skipped
