# SPDX-License-Identifier: Apache-2.0
"""Multiply-accumulates of any traceable function, by a walk over its jaxpr. Nothing is compiled or run.

XLA's own `cost_analysis` counts the body of a scan once, whatever its length; this walk multiplies.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval

from vtjax.errors import InputError

# Primitives of jax.lax that do work of another kind than one operation per element.
_NOT_FREE = frozenset({"custom_linear_solve", "fft", "while", "cond", "scan", "dot_general", "conv_general_dilated"})

# Elementwise, movement, reduction, communication and bookkeeping: no MACs. What jax.lax does not export is listed.
_FREE = frozenset(p.name for n, p in vars(jax.lax).items() if n.endswith("_p") and hasattr(p, "name")) - _NOT_FREE | {
    *("add_any", "broadcast_to", "debug_callback", "debug_print", "empty", "empty2", "layout_constraint", "name"),
    *("axis_size", "platform_index", "reciprocal", "reshard", "mesh_cast", "zeros_like", "check", "dimension_size"),
    *("pvary", "pcast", "preduced", "psum_invariant", "all_gather_invariant", "all_gather_reduced", "reduce_scatter"),
    *("pbroadcast", "unreduced_psum", "unreduced_reduce_scatter", "reduced_vary_cast_p", "vary_unreduced_cast_p"),
    *("random_bits", "random_clone", "random_fold_in", "random_gamma", "random_seed", "random_split", "random_unwrap"),
    *("random_wrap", "threefry2x32", "threefry4x32", "philox2x32", "philox4x32", "iota_2x32_shape"),
    *("get", "swap", "addupdate", "new_ref", "empty_ref", "free_ref", "freeze", "to_edtype", "from_edtype"),
    *("with_memory_space_constraint", "inspect_sharding", "lu_pivots_to_permutation"),
}

# Never entered: what the sub-jaxpr says is not what runs.
_OPAQUE = frozenset({"pallas_call", "core_map", "mpmd_map"})


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a walk found.

    Attributes:
      macs: multiply-accumulates of all counted products, on all devices together.
      by_primitive: the same by primitive (`dot_general`, `conv_general_dilated`).
      unknown: calls of primitives whose work the walk cannot see (kernels, custom calls, callbacks, factorisations),
        by name; their MACs are missing from `macs`.
      assumed: choices that were made for loops and branches, one line each.
    """

    macs: int
    by_primitive: dict[str, int]
    unknown: dict[str, int]
    assumed: tuple[str, ...] = ()

    @property
    def flops(self) -> int:
        """2 per MAC."""
        return 2 * self.macs


def walk(
    fn: Callable[..., Any], *args: Any, while_trips: int | None = None, platform: str | None = None, **kwargs: Any
) -> Counts:
    """Traces `fn(*args, **kwargs)` and counts.

    `dot_general` and `conv_general_dilated` are counted (a convolution as if its padding and dilation zeros were
    multiplied). A scan counts its body times its length. Of the branches of a `cond` the dearest is counted, and
    `assumed` says so where they differ; of `lax.platform_dependent` the branch of `platform`. A `shard_map` body counts
    once per device of its manual axes, replicated work included. jit, remat, custom_jvp, custom_vjp and the like are
    entered. What no output depends on is not counted: XLA drops it too.

    Args:
      fn: the function; static arguments must be bound.
      args, kwargs: arrays or `jax.ShapeDtypeStruct`s.
      while_trips: number of iterations to assume for every `while` whose body multiplies.
      platform: "cpu", "tpu", "cuda", "rocm"; None = JAX's default backend.

    Raises:
      InputError: a `while` loop with matrix products, and no `while_trips`.
    """
    if platform is None:
        platform = jax.default_backend()
        platform = "cuda" if platform == "gpu" else platform
    walker = _Walker(while_trips, platform)
    jaxpr = jax.make_jaxpr(fn)(*args, **kwargs).jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    tally = walker.jaxpr(used)
    return Counts(tally.total, dict(tally.macs), dict(tally.unknown), tuple(dict.fromkeys(walker.assumed)))


@dataclasses.dataclass
class _Tally:
    macs: Counter[str] = dataclasses.field(default_factory=Counter)
    unknown: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def total(self) -> int:
        return sum(self.macs.values())

    def add(self, other: _Tally, times: int = 1) -> None:
        for mine, theirs in ((self.macs, other.macs), (self.unknown, other.unknown)):
            for name, value in theirs.items():
                mine[name] += times * value


class _Walker:
    def __init__(self, while_trips: int | None, platform: str):
        self.while_trips, self.platform = while_trips, platform
        self.assumed: list[str] = []

    def jaxpr(self, jaxpr: Jaxpr) -> _Tally:
        tally = _Tally()
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            if name == "dot_general":
                tally.macs[name] += _dot_general(eqn)
            elif name == "conv_general_dilated":
                tally.macs[name] += _convolution(eqn)
            elif name == "scan":
                tally.add(self.closed(eqn.params["jaxpr"]), eqn.params["length"])
            elif name == "while":
                self.loop(eqn, tally)
            elif name == "cond":
                tally.add(self.branches(eqn))
            elif name == "shard_map":
                mesh, axes = eqn.params["mesh"], eqn.params["newly_manual_axes"]
                tally.add(self.closed(eqn.params["jaxpr"]), math.prod(mesh.shape[a] for a in axes))
            elif name not in _FREE:
                inner = [] if name in _OPAQUE else list(_jaxprs(eqn.params))
                if len(inner) == 1:
                    tally.add(self.closed(inner[0]))
                else:
                    tally.unknown[_label(eqn)] += 1
        return tally

    def closed(self, jaxpr: Jaxpr | ClosedJaxpr) -> _Tally:
        return self.jaxpr(jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr)

    def loop(self, eqn: Any, tally: _Tally) -> None:
        test, body = self.closed(eqn.params["cond_jaxpr"]), self.closed(eqn.params["body_jaxpr"])
        if not (test.total or body.total or test.unknown or body.unknown):
            return
        if self.while_trips is None:
            raise InputError(
                f"a while loop holds {test.total + body.total} MACs per iteration and its number of iterations is not "
                "known; pass while_trips=, or use scan"
            )
        self.assumed.append(f"while: {self.while_trips} iterations")
        tally.add(test, self.while_trips + 1)
        tally.add(body, self.while_trips)

    def branches(self, eqn: Any) -> _Tally:
        tallies = [self.closed(branch) for branch in eqn.params["branches"]]
        platforms = eqn.params.get("branches_platforms")
        if platforms is not None:
            chosen = next(i for i, names in enumerate(platforms) if names is None or self.platform in names)
            if any(t != tallies[0] for t in tallies):
                self.assumed.append(f"platform_dependent: the branch for {self.platform}")
            return tallies[chosen]
        dearest = _Tally()
        dearest.add(max(tallies, key=lambda t: t.total))
        # The work of an unknown call has no size to compare, so it is reported from whichever branch holds it.
        for tally in tallies:
            dearest.unknown |= tally.unknown
        totals = [t.total for t in tallies]
        if len(set(totals)) > 1:
            self.assumed.append(f"cond: the dearest of branches with {', '.join(map(str, totals))} MACs")
        return dearest


def _dot_general(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)


def _convolution(eqn: Any) -> int:
    """Output elements x kernel elements per output feature; the kernel's input dimension is per group already."""
    out_features, *reads = eqn.params["dimension_numbers"].rhs_spec
    kernel = eqn.invars[1].aval.shape
    return math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel[i] for i in reads)


def _jaxprs(params: dict[str, Any]) -> Iterator[Jaxpr | ClosedJaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, Jaxpr | ClosedJaxpr):
                yield item


def _label(eqn: Any) -> str:
    """The primitive's name, with the kernel's or custom call's own name where it has one."""
    params = eqn.params
    own = params.get("target_name") or params.get("name") or getattr(params.get("name_and_src_info"), "name", None)
    return f"{eqn.primitive.name}:{own}" if own else eqn.primitive.name
