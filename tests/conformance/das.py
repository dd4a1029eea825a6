# SPDX-License-Identifier: Apache-2.0
"""Replays recorded outputs of the DAS release (layout: the vectors' own description) through vtjax.

A folder of the file is a case of the kind that the arrays in it say, whatever its name. Stacks are replayed twice, with
a traced `skip` where the model has one and with the modules removed; both have to give what was recorded.

Of a few settings the file says nothing: scale and norm of an adapter, turn and warm-up of a search. They are taken from
the recorded outputs, coarsely, and then have to reproduce all of these.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.conformance.arrays import Arrays
from tests.conformance.das_stacks import decoder, single_stream, two_streams
from tests.conformance.das_weights import adapter, meter_path
from vtjax.methods import das
from vtjax.models import adapters
from vtjax.ops import adapters as ops
from vtjax.ops import bandit, norms
from vtjax.spec import AdapterSpec
from vtjax.train import optim

SEPARATOR = "/"
MISSED = (ValueError, IndexError)


def replay(arrays: Arrays) -> None:
    """Runs every case that the file holds."""
    for at in folders(arrays):
        here = set(arrays.children(at))
        for marks, run in KINDS:
            if marks <= here:
                run(arrays, at)
                break


def folders(arrays: Arrays) -> list[str]:
    """All prefixes of names that end in a separator."""
    parts = [name.split(SEPARATOR)[:-1] for name in arrays.names()]
    paths = itertools.chain.from_iterable(itertools.accumulate(p, lambda a, b: f"{a}{SEPARATOR}{b}") for p in parts)
    return [f"{path}{SEPARATOR}" for path in dict.fromkeys(paths)]


def parallel(arrays: Arrays, at: str) -> None:
    """METER's and ViLT's adapter, with gradients."""
    p, x, cotangent = adapter(arrays, f"{at}w/"), jnp.asarray(arrays[at + "x"]), arrays[at + "cot"]
    recorded = arrays[at + "y_nores"].astype(np.float64)
    found = []
    for norm in ("in", "out") if "norm" in p else ("none",):
        y = np.asarray(ops.bottleneck(x, p, norm=norm), np.float64)
        # What the output is of that with s = 1; an outer norm takes the scale out again.
        scale = 1.0 if norm == "out" or "scale" in p else round(float((y * recorded).sum() / (y * y).sum()), 2)
        found.append((np.abs(scale * y - recorded).mean(), norm, scale))
    _, norm, scale = min(found)
    spec = AdapterSpec("bottleneck", p["down"]["kernel"].shape[1], norm=norm, scale=scale, learned="scale" in p)

    def total(p: Any, x: Any) -> Any:
        return ((x + adapters.apply(spec, p, x)) * cotangent).sum()

    y = adapters.apply(spec, p, x)
    arrays.compare(at + "y_nores", y)
    arrays.compare(at + "y_res", x + y)
    to_p, to_x = jax.grad(total, argnums=(0, 1))(p, x)
    arrays.compare(at + "gx", to_x)
    for name in arrays.names(f"{at}g/"):
        grad = to_p
        for part in adapter_path(name):
            grad = grad[part]
        arrays.compare(f"{at}g/{name}", grad.T if name.endswith("proj.weight") else grad)


def adapter_path(name: str) -> tuple[str, ...]:
    """Ours of a name of the METER adapter."""
    *path, last = meter_path(f"adapter_list_l.0.0.{name}").split("/")[3:]
    return (*path, last)


def router(arrays: Arrays, at: str) -> None:
    """LaVIN's adapter."""
    p, x = adapter(arrays, f"{at}w/"), jnp.asarray(arrays[at + "x"])
    scale, temperature = arrays[at + "scale_t"].tolist()
    spec = AdapterSpec("router", p["down"]["kernel"].shape[1], scale=scale, temperature=temperature)
    arrays.compare(at + "route_fp16", ops.route(x[:, 0], p, temperature), "gate")
    y = adapters.apply(spec, p, x)
    arrays.compare(at + "y_nores", y)
    arrays.compare(at + "y_res", x + y)
    weights = jnp.asarray(arrays[at + "cached_w"], jnp.float32)
    arrays.compare(at + "y_nores_cached", adapters.apply(spec, p, x, weights))


def unrouted(arrays: Arrays, at: str) -> None:
    """Two linear maps, the second by groups; or LLaVA's adapter, and the layer that it stands in for."""
    p, x = adapter(arrays, f"{at}w/"), jnp.asarray(arrays[at + "x"])
    if "up0" in p:
        arrays.compare(at + "y", ops.grouped(ops.linear_map(x, p["down"]), p["up0"]))
        return
    spec = adapters.LLAVA.edit(width=p["down"]["kernel"].shape[1])
    arrays.compare(at + "y", adapters.apply(spec, p, x))
    if f"{at}skip/h" in arrays:
        h, eps = jnp.asarray(arrays[f"{at}skip/h"]), float(arrays[f"{at}skip/rms_eps"])
        stand_in = adapters.Attached(spec, "skip", eps=eps)
        p = p | {"norm_in": {"scale": jnp.asarray(arrays[f"{at}skip/rms_w"])}}
        arrays.compare(f"{at}skip/out", h + stand_in(h, {"skip": p}))
        again = h + adapters.apply(spec, p, norms.rms_norm(h, p["norm_in"]["scale"], eps))
        arrays.compare(f"{at}skip/out", again)


def plain(arrays: Arrays, at: str) -> None:
    """LLaMA's adapter."""
    p, x = adapter(arrays, f"{at}w/"), jnp.asarray(arrays[at + "x"])
    spec = adapters.LLAMA.edit(width=p["down"]["kernel"].shape[1], scale=float(arrays[at + "scale"]))
    y = adapters.apply(spec, p, x)
    arrays.compare(at + "y_nores", y)
    arrays.compare(at + "y_res", x + y)


def trace(arrays: Arrays, at: str) -> None:
    """A whole search against a planted loss: cadence, and every update from what it began with."""
    before, subsets, losses = (arrays[at + name] for name in ("gate_before", "cand", "loss"))
    m, c, rate = arrays[at + "mclr"].tolist()
    arms = before.shape[1]
    settings = cadence(arrays, at, bandit.Bandit(arms, int(m), int(c), rate=rate))
    arrays.compare(at + "prob", np.exp(bandit.log_weights(before)), "gate")
    drawn = arrays[at + "n_draws"]
    arrays.compare(at + "n_draws", np.where(drawn == 0, 0, np.maximum(drawn, int(c))), "exact")  # 0 = not recorded
    if "val_first_index" in arrays.children(at):  # all candidates of an update see one batch
        arrays.compare(
            at + "val_first_index", np.repeat(arrays[at + "val_first_index"][:, :1], int(c), axis=1), "exact"
        )
    planted = arrays[at + "base"] + arrays[at + "w"][np.clip(subsets, 0, arms - 1)].sum(-1)
    if np.median(np.abs(planted - losses)) < 1e-3:  # else there is noise in it
        arrays.compare(at + "loss", planted, "gate")
    after, valid = [], []
    for gate, candidates, loss in zip(before, subsets, losses, strict=True):
        state = settings.start()._replace(preference=gate)
        different = len({tuple(s) for s in candidates.tolist()}) == len(candidates)
        try:
            after.append(bandit.update(settings, state, candidates, loss).preference)
            valid.append(different and (np.diff(candidates) > 0).all())
        except ValueError:
            after.append(gate)
            valid.append(False)
    arrays.compare(at + "cand", np.where(np.asarray(valid)[:, None, None], subsets, -1), "exact")
    arrays.compare(at + "gate_after", np.stack(after), "gate")
    arrays.compare(at + "gate_before", np.stack([before[0], *after[:-1]]), "gate")
    arrays.compare(at + "gate_final", after[-1], "gate")
    arrays.compare(at + "final_select_sorted", np.sort(bandit.final(arrays[at + "gate_final"], int(m))), "exact")


def cadence(arrays: Arrays, at: str, settings: bandit.Bandit) -> bandit.Bandit:
    """Compares when updates were due; and, of LLaVA, how many modules were skipped."""
    fired, lengths = arrays[at + "fired"], [int(n) for n in arrays[at + "epoch_len"]]
    calls, warmup = np.flatnonzero(fired), 0
    if at + "skip_ramp" in arrays:
        warmup = int(arrays[at + "warmup_steps"])
        ramp = [bandit.ramped(settings.skips, call, warmup) for call in range(1, len(fired) + 1)]
        arrays.compare(at + "skip_ramp", ramp, "exact")
        progress: list[float] = list(range(1, len(fired) + 1))
    elif len(lengths) == 1:
        progress = [call / lengths[0] for call in range(lengths[0])]
    else:
        progress = [epoch for epoch, length in enumerate(lengths) for _ in range(length)]
    if len(progress) != len(fired) or not len(calls):
        arrays.miss(at + "fired")
        return settings
    due, state = [], settings.start()
    turn = int(np.diff(calls).min(initial=len(fired)))
    unit = 1 if len(lengths) > 1 else 1 / max(len(fired), 1)
    first, last = warmup or progress[calls[0]], progress[calls[-1]] + unit
    cadenced = bandit.Bandit(
        settings.arms, settings.skips, settings.candidates, turn, settings.rate, first, np.inf if warmup else last
    )
    for now in progress:
        state, here = bandit.tick(cadenced, state, now)
        due.append(here)
    arrays.compare(at + "fired", due, "exact")
    return cadenced


def policy(arrays: Arrays, at: str) -> None:
    """Exact laws of both policies, and the race with recorded noise."""
    r, m = arrays[at + "r"], int(arrays[at + "m"])
    arrays.compare(at + "p", np.exp(bandit.log_weights(r)), "gate")
    arrays.compare(at + "sets", list(itertools.combinations(range(len(r)), m)), "exact")
    sets = [tuple(s) for s in itertools.combinations(range(len(r)), m)]
    arrays.compare(at + "set_prob", [bandit.subset_probability(r, s) for s in sets], "gate")
    arrays.compare(at + "inclusion", bandit.inclusion(r, m), "gate")
    arrays.compare(at + "uniform_inclusion_mc", bandit.inclusion(r, m, "uniform_topm"), "sampled")
    keys = bandit.log_weights(r) - np.log(arrays[at + "exp_noise"].astype(np.float64))
    arrays.compare(at + "draw_order", bandit.largest(keys, m), "exact")


def choice(arrays: Arrays, at: str) -> None:
    """The final choice, in order."""
    arrays.compare(at + "select_order", bandit.final(arrays[at + "score"], int(arrays[at + "m"])), "exact")


def groups(arrays: Arrays, at: str) -> None:
    """Which parameters METER trains, and at what rate. The head's factor is that of the file."""
    names, recorded = [str(name) for name in arrays[at + "name"]], arrays[at + "lr_mult"]
    of_head = [r for name, r in zip(names, recorded, strict=True) if re.match(r"(vqa|nlvr2)_classifier\.", name)]
    table = das.groups(2, float(np.median(of_head)) if of_head else 1.0)
    group_of: Callable[[str], str | None] = optim.group_of({"groups": table})
    paths = [meter_path(name) for name in names]
    found = [group_of(path) for path in paths]
    stated = [table["unchanged" if group is None else group] for group in found]
    # The release puts the text encoder's pooler into a group, too, and freezes it.
    pooler = [name.startswith("text_transformer.") and "pooler" in name for name in names]
    scale = [1.0 if odd else s["lr_scale"] for odd, s in zip(pooler, stated, strict=True)]
    decay = [
        das.WEIGHT_DECAY * (not name.endswith("bias")) if odd else s["weight_decay"]
        for name, odd, s in zip(names, pooler, stated, strict=True)
    ]
    arrays.compare(at + "lr_mult", scale, "exact")
    arrays.compare(at + "weight_decay", decay, "exact")
    arrays.compare(at + "requires_grad", [group is not None for group in found], "exact")


def schedule(arrays: Arrays, at: str) -> None:
    """LaVIN's learning rate, in fractional epochs."""
    import ml_collections

    lr, least, warmup, epochs = arrays[at + "lavin_args"].tolist()
    unit = 1000  # steps per epoch
    config = ml_collections.ConfigDict(
        {"schedule": "cosine", "lr": lr, "end_lr": least, "warmup": round(warmup * unit)}
    )
    rate = optim.schedule(config, round(epochs * unit))
    arrays.compare(at + "lavin_lr", [rate(epoch * unit) for epoch in arrays[at + "lavin_epoch"].tolist()], "rate")


KINDS: tuple[tuple[set[str], Callable[[Arrays, str], None]], ...] = (
    ({"x0", "y0", "cfg"}, two_streams),
    ({"text", "image", "cfg"}, single_stream),
    ({"h0", "cfg"}, decoder),
    ({"y_res", "cot"}, parallel),
    ({"scale_t"}, router),
    ({"scale", "y_res"}, plain),
    ({"w", "x", "y"}, unrouted),
    ({"fired", "cand"}, trace),
    ({"exp_noise", "r"}, policy),
    ({"score", "select_order"}, choice),
    ({"lr_mult", "name"}, groups),
    ({"lavin_args"}, schedule),
)
"""The arrays and folders by which a case is known, and what replays it."""
