# SPDX-License-Identifier: Apache-2.0
"""Ahead-of-time compiles for TPU topologies on a machine without TPUs: does it fit, and what does it send.

libtpu holds the compiler; `jax.experimental.topologies` describes devices that need not exist. What is reported is what
that compiler decided for one device of the mesh.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from vtjax.errors import InputError, MissingExtraError
from vtjax.spec import ViTSpec

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation.

    Attributes:
      hbm_gb: memory of a chip as published on the page of its version, cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and
        tpu7x. The pages say GB or GiB; powers of two are meant.
      available_gib: what the compiler of libtpu 0.0.52 grants to one device of it, as it says itself when a program
        does not fit. v4 and TPU7x chips are two devices in a topology.
    """

    hbm_gb: int
    available_gib: float


CHIPS = {
    "TPU v4": Chip(32, 15.25),
    "TPU v5 lite": Chip(16, 15.75),
    "TPU v5": Chip(95, 95.73),
    "TPU v6 lite": Chip(32, 31.24),
    "TPU7x": Chip(192, 94.74),
}
"""By `device_kind`: v4, v5e, v5p, v6e, TPU7x."""

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

# libtpu looks for a TPU VM's metadata, and complains on standard error where there is none.
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def topology(name: str, slices: int = 1) -> list[Any]:
    """Devices of a TPU topology such as "v5e:2x4", "v5p:8x8x8", "tpu7x:2x2x1", `slices` times.

    Raises:
      MissingExtraError: libtpu is not installed.
      InputError: no such topology, or fewer than one slice.
    """
    if slices < 1:
        raise InputError(f"--slices must be 1 or more, found {slices}")
    if importlib.util.find_spec("libtpu") is None:
        raise MissingExtraError("libtpu", "tpu", "compiling for a TPU topology")
    from jax.experimental import topologies

    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    several = {"num_slices": slices} if slices > 1 else {}
    try:
        devices: list[Any] = list(topologies.get_topology_desc(name, platform="tpu", **several).devices)
    except Exception as error:  # jaxlib names no class of its own for this
        reason = " ".join(str(error).split())
        raise InputError(
            f"--topology must name TPU chips and how they lie, such as v5e:2x4, v6e:16x16, v5p:8x8x8 or tpu7x:2x2x1, "
            f"found {name!r} ({reason})"
        ) from None
    if devices[0].device_kind not in CHIPS:
        raise InputError(f"--topology must be of one of {', '.join(CHIPS)}, found {name!r} ({devices[0].device_kind})")
    return devices


def compile_step(jitted: Any, arguments: Sequence[Any], devices: Sequence[Any]) -> dict[str, Any]:
    """Compiles `jitted` with abstract `arguments` (shardings on a mesh of `devices`), under that mesh.

    Returns:
      `fits`; `hbm_bytes_per_device` (arguments, results that reuse none of them, temporaries and the program) and
      `hbm_limit`, what the compiler grants; `temp_bytes`, `argument_bytes`, `output_bytes`, `alias_bytes`,
      `code_bytes`; `collectives`, see `collectives`; `compile_s` (lowering included). A program that the compiler
      rejects for its size has `fits` false, the size that the compiler named (of the part that it looked at), and no
      collectives.

    Raises:
      RuntimeError: the compile failed for another reason.
    """
    limit = round(CHIPS[devices[0].device_kind].available_gib * GIB)
    start = time.perf_counter()
    try:
        # The program as the compiler itself writes it: jaxlib cannot read every program of libtpu (0.0.52 for TPU7x).
        with tempfile.TemporaryDirectory() as folder:
            options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            compiled = jitted.lower(*arguments).compile(options)
            (program,) = Path(folder).glob("*.after_optimizations.txt")
            hlo = program.read_text(encoding="utf-8")
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise
        seconds = round(time.perf_counter() - start, 1)
        return {"fits": False, "hbm_bytes_per_device": needed, "hbm_limit": limit, "compile_s": seconds}
    seconds = round(time.perf_counter() - start, 1)
    memory = compiled.memory_analysis()
    parts = {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
    }
    total = sum(parts.values()) - 2 * parts["alias_bytes"]
    return {
        "fits": total <= limit,
        "hbm_bytes_per_device": total,
        "hbm_limit": limit,
        **parts,
        "collectives": collectives(hlo),
        "compile_s": seconds,
    }


def needed_bytes(message: str) -> int | None:
    """Bytes that a compiler's out-of-memory message names; None where it is no such message."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    units = {"B": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    for pattern in (r"\(([\d.]+)([BKMGT])\) exceeds available", r"Used ([\d.]+)([BKMGT]) of", r"([\d.]+)([KMGT])"):
        if found := re.search(pattern, message):
            return round(float(found[1]) * units[found[2]])
    return None


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """Collectives of a compiled program (its HLO text), by kind: `count` and `bytes` per device and call.

    A collective in a loop counts as often as the loop runs. Bytes are those of its result (of its operand for a
    reduce-scatter). What an asynchronous collective is split into counts once. "dcn-send" is what crosses slices: the
    compiler reduces within a slice first, then hands the data to the host.
    """
    found: dict[tuple[str, str], Collective] = {}
    for one in each_collective(hlo):
        key = one.kind, one.channel
        found[key] = max(found.get(key, one), one, key=lambda c: (c.times, c.bytes))
    out: dict[str, dict[str, int]] = {}
    for (kind, _), one in sorted(found.items()):
        entry = out.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += one.times
        entry["bytes"] += one.times * one.bytes
    return out


class Collective(NamedTuple):
    """One collective in the text of a program.

    Attributes:
      kind: of `COLLECTIVES`, or "dcn-send".
      dtype: of its result as HLO says it ("f32", "s32"); the first one of several.
      bytes: of its result (of its operand for a reduce-scatter) per call of it.
      times: how often one call of the program runs it.
      channel: equal for what the TPU's compiler split one into: its channel, shape and name in the program.
    """

    kind: str
    dtype: str
    bytes: int
    times: int
    channel: str


def each_collective(hlo: str) -> list[Collective]:
    """Collectives of a compiled program in the order of its text; those in computations that never run are absent."""
    bodies = _computations(hlo)
    times = _times(bodies)
    found = []
    for name, lines in bodies.items():
        for number, line in enumerate(lines):
            if (one := _collective(line)) is None or not times.get(name):
                continue
            channel = re.search(r"channel_id=(\d+)", line)
            dtype = re.search(r"[a-z]\w*(?=\[)", line.partition("= ")[2])
            place = f"{name}:{number}"
            if channel:
                # All of a shard_map's collectives have one channel; the pieces of one have its name and shape, too.
                named = re.search(r'op_name="([^"]*)"', line)
                shape = line.partition("= ")[2].partition(" ")[0]
                place = f"{channel[1]}:{shape}:{named[1] if named else ''}"
            found.append(Collective(one[0], dtype[0] if dtype else "", one[1], times[name], place))
    return found


def _collective(line: str) -> tuple[str, int] | None:
    match = re.search(r"= (.*?) ([a-z-]+)\(", line)
    if match is None:
        return None
    kind = match[2].removesuffix("-start")
    if kind == "send" and "is_host_transfer=true" in line and "megascale" in line:
        return "dcn-send", _bytes(match[1])[0]
    if kind not in COLLECTIVES:
        return None
    sizes = _bytes(match[1])
    if match[2] in ("all-gather-start", "collective-permute-start"):  # operands, results, and what belongs to neither
        sizes = [size for size in sizes if size > 4]
        sizes = sizes[len(sizes) // 2 :]
    size = sum(sizes)
    if kind == "reduce-scatter":
        size *= _group_size(line)
    return kind, size


def _bytes(shapes: str) -> list[int]:
    widths = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
    found = []
    for kind, sizes in re.findall(r"\b(pred|bf16|f8|[fsu]\d+)\w*\[([\d,]*)\]", shapes):
        count = math.prod(int(size) for size in sizes.split(",") if size)
        found.append(count * (1 if kind == "f8" else widths.get(kind, 4)))
    return found


def _group_size(line: str) -> int:
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    return 1


def _computations(hlo: str) -> dict[str, list[str]]:
    """Lines of every computation by name; the entry under ""."""
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        if (head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)) and not line.startswith(" "):
            lines = bodies.setdefault("" if head[1] else head[2], [])
        elif line.startswith("  "):
            lines.append(line)
    return bodies


def _times(bodies: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs in one call of the program; a branch counts as taken."""
    times: dict[str, int] = {}

    def visit(name: str, count: int) -> None:
        times[name] = times.get(name, 0) + count
        for line in bodies.get(name, ()):
            if " while(" in line:
                body, condition = (re.search(rf"{part}=%?([\w.-]+)", line) for part in ("body", "condition"))
                if body and condition:
                    visit(body[1], count * _trips(line, bodies.get(condition[1], [])))
                continue
            for called in re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)", line):
                visit(called, count)
            # Branches; and what a TPU7x hands to its sparse cores.
            if several := re.search(r"(?:branch|called)_computations=\{([^}]*)\}", line):
                for called in re.findall(r"%?([\w.-]+)", several[1]):
                    visit(called, count)

    visit("", 1)
    return times


def _trips(line: str, condition: Sequence[str]) -> int:
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(known[1])
    constants = {int(n) for text in condition for n in re.findall(r"[su]32\[\]\S* constant\((\d+)\)", text)}
    return constants.pop() if len(constants) == 1 else 1


def temporaries(
    spec: ViTSpec,
    *,
    rows: int,
    training: bool,
    remat: str,
    width_bytes: int,
    trained_bytes: int,
    stacked_bytes: int = 0,
    tensor: int = 1,
) -> int:
    """A hand estimate of the temporary memory of a step on one device, in bytes: what should be there, not what is.

    Training: gradients of what is trained and the updates made of them (the guard looks at all before it applies one),
    what `remat` keeps of every block, and the backward pass of one block.
    Evaluation: the forward pass of one block. Both: the parameters that a scan stacks. Much more than this is a bug to
    find: activations that the partitioner replicates, as a rule.

    Args:
      rows: images on the device; with `accumulate`, of one micro-batch.
      remat: "none", "full", "dots", "names".
      width_bytes: of an activation.
      trained_bytes: of the trained parameters on the device, float32.
      stacked_bytes: of the blocks' parameters on the device, in the type of the activations, where blocks are scanned.
      tensor: devices that share the widths inside a layer.
    """
    tokens, width = rows * spec.tokens, spec.width
    kept, largest = 0, 0
    for block in spec.blocks:
        inner = block.heads * block.head_dim // tensor if block.attn else 0
        hidden = block.mlp // tensor if block.ffn else 0
        gated = hidden * (2 if spec.activation == "swiglu" else 1)
        scores = rows * (block.heads // tensor or 1) * spec.tokens**2 if block.attn else 0
        # Norms, q k v, attention, hidden before and after the activation; scores in float32, their shares beside them.
        whole = tokens * (4 * width + 4 * inner + 2 * gated) * width_bytes + scores * (4 + width_bytes)
        least = {"full": width, "names": width + inner + hidden, "dots": 2 * width + 3 * inner + gated}
        kept += tokens * least[remat] * width_bytes if remat in least else whole
        largest = max(largest, whole)
    if not training:
        return largest + stacked_bytes
    return kept + 2 * largest + 2 * trained_bytes + stacked_bytes
