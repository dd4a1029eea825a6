# SPDX-License-Identifier: Apache-2.0
"""What is read from a compiler's answers: a small program of known collectives, and messages as libtpu words them."""

from __future__ import annotations

import pytest

from vtjax.account import aot
from vtjax.errors import InputError, MissingExtraError
from vtjax.spec import ViTSpec

HLO = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: f32[8,128]) -> f32[8,128] {
  %all-reduce.9 = f32[8,128]{1,0} all-reduce(%p), channel_id=4, replica_groups={{0,1},{2,3}}, to_apply=%add
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-gather.1 = bf16[4,16]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %reduce-scatter.1 = f32[10]{0} reduce-scatter(%y), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
  %all-reduce.8 = f32[8,128]{1,0} all-reduce(%p), channel_id=4, replica_groups={{0,1},{2,3}}, to_apply=%add
}

%condition (t: (s32[], f32[8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[] compare(%i, %constant.1), direction=LT
}

%handed_over (q: f32[4]) -> f32[16] {
  ROOT %all-gather.7 = f32[16]{0} all-gather(%q), channel_id=11, replica_groups=[2,4]<=[8], dimensions={0}
}

%asynchronous (q: f32[4]) -> f32[16] {
  ROOT %custom-call = f32[16]{0} custom-call(%q), custom_call_target="x", called_computations={%handed_over}
}, execution_thread="sparsecore"

ENTRY %main (p0: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]) while(%init), condition=%condition, body=%body
  %fusion.1 = f32[8,128] fusion(%a), kind=kCustom, calls=%fused
  %all-gather-start = (f32[8]{0}, f32[64]{0}) all-gather-start(%b), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}
  %all-gather-done = f32[64]{0} all-gather-done(%all-gather-start)
  %gather-start = ((f32[4]), f32[16], s32[]) async-start(%q), async_execution_thread="sparsecore", calls=%asynchronous
  %gather-done = f32[16]{0} async-done(%gather-start)
  %permute.1 = (s8[9]{0}, s8[9]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%c), channel_id=8, \
source_target_pairs={{0,1},{1,0}}
  %send.1 = (bf16[36,8,128]{2,1,0}, u32[], token[]) send(%d), channel_id=9, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %send-done.1 = token[] send-done(%send.1), channel_id=9, is_host_transfer=true
}
"""


def test_collectives_count_loops_and_split_ones_once() -> None:
    found = aot.collectives(HLO)
    assert found == {
        # 12 times in the loop; what a fusion repeats of it has the same channel.
        "all-reduce": {"count": 12, "bytes": 12 * 8 * 128 * 4},
        # One of these is what a TPU7x hands to a sparse core.
        "all-gather": {"count": 14, "bytes": 12 * 64 * 2 + 64 * 4 + 16 * 4},
        "reduce-scatter": {"count": 12, "bytes": 12 * 10 * 4 * 4},
        "collective-permute": {"count": 1, "bytes": 9},
        "dcn-send": {"count": 1, "bytes": 36 * 8 * 128 * 2},
    }


def test_collectives_of_a_shard_map_have_one_channel_and_count_each() -> None:
    """By shape and by their name in the program."""
    line = '  %{0} = {1} all-to-all(%x), channel_id=1, replica_groups={{{{0,1}}}}, metadata={{op_name="jit(f)/{2}/o"}}'
    made = [("a.1", "f32[8]{0}", "block_00"), ("a.2", "f32[4]{0}", "block_00"), ("a.3", "f32[8]{0}", "block_01")]
    again = ("a.4", "f32[8]{0}", "block_01")  # a piece of the third one
    lines = [line.format(*one) for one in (*made, again)]
    hlo = "\n".join(["HloModule f", "ENTRY %main (x: f32[8]) -> f32[8] {", *lines, "}"])
    assert aot.collectives(hlo) == {"all-to-all": {"count": 3, "bytes": 4 * (8 + 4 + 8)}}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (200.00G) exceeds available HBM (15.75G).",
            200 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 512.50M of 15.75G hbm.", round(512.5 * 2**20)),
        ("INVALID_ARGUMENT: 200.00G of nonsense", None),
    ],
)
def test_what_does_not_fit_names_its_size(message: str, expected: int | None) -> None:
    assert aot.needed_bytes(message) == expected


def test_the_hand_estimate_is_made_of_what_is_kept() -> None:
    spec = ViTSpec.uniform(depth=3, width=64, heads=4, mlp=128, image_size=32, patch=8, classes=10)
    tokens = 2 * 17

    def kept(remat: str) -> int:
        parts = {"rows": 2, "remat": remat, "width_bytes": 2, "trained_bytes": 1000}
        one_block = aot.temporaries(spec, training=False, **parts)
        return aot.temporaries(spec, training=True, **parts) - 2 * one_block - 2000

    for training in (False, True):
        parts = {"rows": 2, "remat": "full", "width_bytes": 2, "trained_bytes": 0, "training": training}
        assert aot.temporaries(spec, stacked_bytes=500, **parts) == 500 + aot.temporaries(spec, **parts)
    assert kept("full") == 3 * tokens * 64 * 2
    assert kept("names") == 3 * tokens * (64 + 64 + 128) * 2
    assert kept("full") < kept("names") < kept("dots") < kept("none")


def test_topologies_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--slices must be 1 or more, found 0"):
        aot.topology("v5e:2x4", 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"vtjax\[tpu\]"):
        aot.topology("v5e:2x4")
