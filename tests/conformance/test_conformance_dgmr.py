# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.conformance dgmr`: recorded arrays are reproduced, and one that is not is named.

tests/oracle/dgmr.npz holds eight of the recorded file's cases, bit for bit; the whole file is replayed where it is.
"""

from __future__ import annotations

import numpy as np
import pytest

METHOD = "dgmr"

JUNK = {"degen_allzero__idx_official"}  # the release's picks beyond rank 0, so all of them
INPUTS = {"w_in", "b_in", "w_out", "b_out", "w12", "b12", "w3", "b3", "x", "ratio", "keep"}


def compared(arrays):
    """Names of what is compared, by field."""
    out = {}
    for name in arrays:
        field = name.partition("__")[2]
        if field and field not in INPUTS:
            out.setdefault(field, []).append(name)
    return out


def spoil(array):
    """A copy with one entry wrong: an integer's first, a float's smallest by 1e-2."""
    out = np.array(array)
    out.flat[0 if out.dtype.kind in "iu" else int(np.abs(out).argmin())] += 1 if out.dtype.kind in "iu" else 1e-2
    return out


def check(arrays, replay):
    """All is reproduced; and of every compared field, an entry that is wrong in all cases is found in all of them."""
    fields = compared(arrays)
    code, result = replay(arrays)
    assert (code, result["failed"], result["unread"]) == (0, [], [])
    assert result["compared"] == sum(map(len, fields.values())) and result["worst"] < 1e-4
    assert result["groups"] == len(arrays["case_names"])
    assert {name.split("__")[0] for names in fields.values() for name in names} == set(arrays["case_names"].tolist())
    for names in fields.values():
        wrong = {name: spoil(arrays[name]) for name in names if arrays[name].size and name not in JUNK}
        code, result = replay({**arrays, **wrong})
        assert (code, result["failed"], result["unread"]) == (1, sorted(wrong), [])


def test_what_was_recorded_is_reproduced_and_a_wrong_entry_is_found(recorded, replay):
    check(recorded, replay)


def test_what_has_another_shape_is_not_there_or_is_not_read_is_found(recorded, replay):
    names = np.append(recorded["case_names"], "missing")
    more = {"gauss_small_r1__idx": recorded["gauss_small_r1__idx"][:-1], "case_names": names}
    # K is above M there: to select nevertheless, or to have selected, is wrong.
    more["degen_fewer_rows__idx_rule61"] = np.arange(3)
    code, result = replay({**recorded, **more, "gauss_small_r1__more": np.ones(3)})
    assert (code, result["failed"], result["unread"]) == (1, sorted(more), ["gauss_small_r1__more"])


def test_the_small_file_is_a_part_of_the_whole_one(recorded, whole):
    for name in set(recorded) - {"case_names"}:
        np.testing.assert_array_equal(recorded[name], whole[name])


@pytest.mark.slow
def test_the_whole_file_is_reproduced(whole, replay):
    assert len(whole) == 494 and len(whole["case_names"]) == 29
    check(whole, replay)
