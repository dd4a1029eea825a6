# SPDX-License-Identifier: Apache-2.0
"""What `account.bench` reports, on sides whose times, work and memory are known."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtjax.account import bench, timing
from vtjax.errors import InputError
from vtjax.spec import Lineage, ViTSpec

DENSE = ViTSpec.uniform(depth=2, width=8, heads=2, image_size=8, patch=4, classes=3)
NO_RATES = bench.Rates()


class Device:
    """One that counts its memory as a GPU does: in use, and the highest use so far."""

    def __init__(self) -> None:
        self.used = self.peak = 0

    def use(self, more: int, passing: int = 0) -> None:
        self.peak = max(self.peak, self.used + more + passing)
        self.used += more

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_in_use": self.used, "peak_bytes_in_use": self.peak}


class Silent:
    """One that does not, as a CPU."""

    def memory_stats(self) -> None:
        return None


SILENT = bench.Peak(Silent())


def scripted(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    """`timing.compare` makes its calls, and finds these times."""
    real = timing.compare

    def compare(measures: Any, **options: Any) -> timing.Comparison:
        made = real(measures, pause=0.0, **options)
        turns = {
            name: timing.Timing(tuple((seconds[name],) * len(t) for t in x.rounds)) for name, x in made.timings.items()
        }
        return timing.Comparison(turns, 0.5, 0.6, 0.0)

    monkeypatch.setattr(timing, "compare", compare)


def product(name: str, width: int, macs: Any = None, **fields: Any) -> bench.Candidate:
    """Images `[B, 4]` times a matrix."""
    params = {"kernel": np.ones((4, width), np.float32)}
    return bench.Candidate(name, lambda p, x: x @ p["kernel"], params, 4 * width if macs is None else macs, **fields)


def ready(candidate: bench.Candidate, batches: list[dict[str, Any]]) -> bench.Ready:
    return bench.forward(candidate, candidate.params, batches, SILENT)


def images(*values: float, batch: int = 2) -> list[dict[str, Any]]:
    return [{"image": jnp.full((batch, 4), value)} for value in values]


def test_ratios_are_dense_over_reduced_and_rates_are_per_million_images(monkeypatch):
    scripted(monkeypatch, dense=0.3, reduced=0.1)
    sides = {"reduced": ready(product("r", 3), images(1.0)), "dense": ready(product("d", 6), images(1.0))}
    rates = bench.Rates(price=3.6, watts=100.0, peak_tflops=1e-9)
    result = bench.report(sides, 2, params={"dense": 24, "reduced": 12}, rates=rates, rounds=2, calls=3)
    assert (result["time_ratio"], result["mac_ratio"]) == (pytest.approx(3.0), 2.0)
    assert result["realised"] == pytest.approx(1.5) and result["time_ratio_p10"] == pytest.approx(3.0)
    dense, reduced = result["dense"], result["reduced"]
    assert (dense["macs"], dense["macs_walked"], dense["macs_agree"], dense["params"]) == (24, 24, True, 24)
    assert (reduced["calls"], reduced["median_s"], reduced["images_per_s"]) == (6, 0.1, pytest.approx(20.0))
    # A million images take 1e6 / 20 seconds at 3.6 per hour, 0.001 per second; and 100 J per second.
    assert reduced["cost_per_million"] == pytest.approx(50.0)
    assert reduced["kwh_per_million"] == pytest.approx(5e4 * 100 / 3.6e6)
    assert reduced["model_tflops"] == pytest.approx(2 * 12 * 20 / 1e12)
    assert reduced["mfu"] == pytest.approx(reduced["model_tflops"] / 1e-9)
    # Parameters 4 x 3, images 2 x 4, results 2 x 3, float32, as the compiler planned; a CPU tells nothing itself.
    assert reduced["memory_source"] == "compiled" and reduced["memory_bytes"] >= 4 * (12 + 8 + 6)
    assert reduced["argument_bytes"] == 4 * (12 + 8)
    plain = bench.report(sides, 2, params={"dense": 24, "reduced": 12}, rates=NO_RATES, rounds=1, calls=1)
    assert not {"mfu", "cost_per_million", "kwh_per_million"} & plain["dense"].keys()


def test_a_formula_that_the_walk_does_not_confirm_is_shown_beside_it(monkeypatch):
    scripted(monkeypatch, dense=1.0, reduced=1.0)
    sides = {"reduced": ready(product("r", 3, macs=10), images(1.0)), "dense": ready(product("d", 3), images(1.0))}
    result = bench.report(sides, 2, params={"dense": 1, "reduced": 1}, rates=NO_RATES, rounds=1, calls=1)
    reduced = result["reduced"]
    assert (reduced["macs"], reduced["macs_walked"], reduced["macs_agree"]) == (10, 12, False)
    assert result["mac_ratio"] == 1.2


def test_work_that_depends_on_the_images_is_that_of_the_images_timed(monkeypatch):
    scripted(monkeypatch, dense=1.0, reduced=1.0)
    seen: list[float] = []

    def apply(params: Any, x: Any) -> Any:
        seen.append(float(x[0, 0]))
        return x

    lazy = product("lazy", 3, macs=lambda x: float(x[:, 0].mean()), jit=False, settings={"budget": 0.5})
    lazy = bench.Candidate(lazy.name, apply, lazy.params, lazy.macs, lazy.settings, jit=False)
    batches = images(1.0, 2.0, 6.0)
    sides = {"reduced": ready(lazy, batches), "dense": ready(product("d", 3), batches)}
    assert seen == [1.0, 2.0, 6.0] * 2  # once to compile its pieces, once more
    result = bench.report(sides, 2, params={"dense": 1, "reduced": 1}, rates=NO_RATES, rounds=1, calls=2)
    # Two calls to warm up, two more before the turn, two timed: the fifth and sixth from 1, 2, 6, 1, 2, 6.
    assert seen[6:] == [1.0, 2.0, 6.0, 1.0, 2.0, 6.0]
    reduced = result["reduced"]
    assert reduced["macs"] == 4.0 and result["mac_ratio"] == 3.0 and reduced["budget"] == 0.5
    # What is driven from the host can be neither walked nor planned.
    assert reduced["macs_walked"] is None and "macs_agree" not in reduced
    assert (reduced["memory_bytes"], reduced["memory_source"], reduced["lower_s"]) == (None, None, None)


def test_a_state_is_carried_from_step_to_step(monkeypatch):
    scripted(monkeypatch, dense=1.0, reduced=1.0)
    step = jax.jit(lambda state, x: ({"n": state["n"] + 1, "w": state["w"]}, x @ state["w"]), donate_argnums=0)

    def state() -> Any:
        return {"n": jnp.int32(0), "w": jnp.ones((4, 3))}

    rest = [(jnp.ones((2, 4)),)]
    sides = {name: bench.compiled(step, state(), rest, [4], SILENT, carry=True) for name in bench.SIDES}
    params = {"dense": 1, "reduced": 1}
    result = bench.report(sides, 2, params=params, rates=NO_RATES, training=True, rounds=2, calls=1)
    # When compiled, two to warm up, and two rounds of two and one.
    assert [int(side.first["n"]) for side in sides.values()] == [9, 9]
    # By custom a training step is three forward passes; its own work is what was walked.
    assert result["dense"]["model_tflops"] == pytest.approx(3 * 2 * 4 * 2 / 1e12)
    assert result["dense"]["macs_walked"] == 12 and "macs_agree" not in result["dense"] and result["mac_ratio"] == 1.0


def test_a_device_that_counts_its_memory_is_asked():
    device = Device()
    device.use(100)
    peak = bench.Peak(device)
    device.use(40, passing=20)
    assert peak.read() == 60  # beyond the 100 of others
    lower = bench.Peak(device)
    device.use(5, passing=10)  # 155 stays below the mark of 160
    assert lower.read() is None
    assert bench.Peak(Silent()).read() is None


def test_batches_are_whole_and_repeat_what_is_too_little():
    rows = {"image": np.arange(7), "label": np.arange(7) * 10}
    assert [b["image"].tolist() for b in bench.batches(rows, 3)] == [[0, 1, 2], [3, 4, 5]]
    assert [b["label"].tolist() for b in bench.batches(rows, 9)] == [[0, 10, 20, 30, 40, 50, 60, 0, 10]]


def test_reducers_are_undone_and_history_goes_with_them():
    step = Lineage(parent="0" * 64, operation="ltmp.install")
    start = Lineage(parent="1" * 64, operation="init_from")
    reduced = DENSE.edit(blocks={1: {"reduce": "ltmp:fixed"}}, lineage=(start, step))
    assert bench.undone(reduced) == DENSE
    assert bench.undone(DENSE) == DENSE


@pytest.mark.parametrize(
    ("edits", "why"),
    [
        ({"blocks": {1: {"attn": False, "ffn": False, "adapter": 4}}}, "parts of block 1 were removed"),
        ({"blocks": {0: {"mlp": 16}}}, "its blocks differ in width"),
        # Equally many neurons from every block: only the history tells.
        (
            {"blocks": lambda i, b: dataclasses.replace(b, mlp=16), "lineage": (Lineage("0" * 64, "dgmr.prune"),)},
            "its lineage names dgmr.prune",
        ),
    ],
)
def test_what_the_spec_does_not_hold_has_to_be_named(edits: dict[str, Any], why: str):
    with pytest.raises(InputError, match="name it by --dense=") as error:
        bench.undone(DENSE.edit(**edits))
    assert why in str(error.value)


@pytest.mark.parametrize("rates", [{"price": 0.0}, {"watts": -1.0}, {"peak_tflops": float("inf")}])
def test_rates_are_positive(rates: dict[str, float]):
    (name,) = rates
    with pytest.raises(InputError, match=f"--{name} must be positive and finite, found"):
        bench.Rates(**rates)


def test_a_batch_without_what_the_model_takes():
    needy = product("needy", 3, inputs=lambda batch: (batch["input_ids"],))
    with pytest.raises(InputError, match="needy takes 'input_ids' of a batch, which has image"):
        ready(needy, images(1.0))
