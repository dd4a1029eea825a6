# SPDX-License-Identifier: Apache-2.0
"""What exactness buys: accuracy of one trained model on longer and longer videos, beside what is cheaper.

    vtjax run --config=configs/lvxattn.py:video --workdir=runs/needle
    python -m experiments.lvxattn.needle --workdir=runs/needle
    python -m experiments.lvxattn.needle --workdir=runs/needle --frames=1024,2048 --batch=1 --read=64,128,256,512
    python -m experiments.lvxattn.needle --workdir=runs/needle --frames=1024,2048 --batch=1 --what=time

Each way sees the same videos of the test split:

- `exact`: all frames, laid over eight (pretended) devices; equal to attention on one device that holds them all;
- `sampled`: every k-th frame, on one device;
- `pooled`: of each frame the mean of its keys and of its values, on one device: a frame is one token;
- `top`: attention to the `--kept` frames whose mean key fits some row of the text best, on one device.

`--cameras=2`: videos of two cameras, for a run of configs/lvxattn.py:cameras; accuracy is told by type of question.

How many frames the last three read, evenly over the video, is `--read`; without it `sampled` reads `--kept` and the
other two all. `device_bytes` is what the compiled program takes of a device (arguments, temporaries, results),
`one_device_bytes` what exact attention takes of a single one: where that is above `--limit`, a device of that size
cannot hold the video, and `held_by_one` is false. Batches are `--batch` videos.

`--what=time` measures how long a batch takes each way, and so how many frames the others may read in the time of exact
attention (`needle_time.py`); it wants a machine that does nothing else. Records go to results/needle.jsonl.
"""

from __future__ import annotations

import argparse
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

RECORDS = Path(__file__).resolve().parent / "results" / "needle.jsonl"
CONFIG = "configs/lvxattn.py:video"
WAYS = ("exact", "sampled", "pooled", "top")
DEVICES = 8
KEPT = 16
"""Frames of the videos of training."""
VIDEOS = ("haystack", "cameras", "frames", "batch")
"""What tells in a record which videos it is about."""
COUNTS = ("frames", "read", "videos", "kept", "batch", "limit", "cameras", "rounds")
"""Options that are positive numbers; of the first two, several."""


def pooled(tokens: int) -> Any:
    """An `ops.cross_attention.Attend` to the mean key and value of every frame of so many tokens."""
    from vtjax.ops import cross_attention

    def attend(q: Any, k: Any, v: Any, *, low: Any, high: Any, number: Any) -> Any:
        k, v = (by_frame(x, tokens).mean(2) for x in (k, v))
        return cross_attention.attend(q, k, v, low=low, high=high, number=number[:, ::tokens])

    return attend


def top(tokens: int, kept: int) -> Any:
    """An `Attend` to the `kept` frames whose mean key has the largest score with any head of any row that sees it."""
    import jax
    import jax.numpy as jnp

    from vtjax.ops import cross_attention, partial_softmax

    def attend(q: Any, k: Any, v: Any, *, low: Any, high: Any, number: Any) -> Any:
        mean, frame = by_frame(k, tokens).mean(2), number[:, ::tokens]
        wide = jnp.repeat(mean, q.shape[2] // mean.shape[2], axis=2)
        score = jnp.einsum("bnhd,bfhd->bnfh", q, wide).max(-1)
        score = jnp.where(partial_softmax.seen(low, high, frame), score, -jnp.inf).max(1)
        best = jax.lax.top_k(score, min(kept, score.shape[1]))[1]

        def taken(x: Any) -> Any:
            x = by_frame(x, tokens)
            x = jnp.take_along_axis(x, best.reshape(*best.shape, *(1,) * (x.ndim - 2)), axis=1)
            return x.reshape(len(x), -1, *x.shape[3:])

        return cross_attention.attend(q, taken(k), taken(v), low=low, high=high, number=taken(number))

    return attend


def by_frame(x: Any, tokens: int) -> Any:
    """`[B, F T, ...]` -> `[B, F, T, ...]`."""
    return x.reshape(len(x), -1, tokens, *x.shape[2:])


class Prepared(NamedTuple):
    """A way, compiled for batches of one length.

    Attributes:
      run: `(params, placed batch) -> sums` of `experiments.vlm.main.sums`.
      params: on the devices.
      data: whose batches hold the frames that are read.
      place: a batch on the devices.
      kinds: of the questions.
      told: what is static, for the record.
    """

    run: Any
    params: Any
    data: Any
    place: Any
    kinds: tuple[str, ...]
    told: dict[str, Any]


def prepared(way: str, frames: int, read: int, m: Any, arguments: argparse.Namespace) -> Prepared:
    """One way for videos of so many frames, of which it reads `read`; with the bytes it takes of a device."""
    import jax

    from experiments.lvxattn import main as experiment
    from experiments.vlm import main as vlm
    from vtjax.cli import config as config_lib
    from vtjax.data import needle
    from vtjax.models.vlm import VLM
    from vtjax.parallel import frames as frames_lib
    from vtjax.parallel import mesh as mesh_lib

    over = DEVICES if way == "exact" else 1
    leaves = {"data.frames": frames, "batch_size": arguments.batch, "mesh.context": over, "mesh.data": 1}
    leaves |= {"data.n": 4 * arguments.videos, "data.haystack": arguments.haystack, "data.prefetch": 2}
    # The words are those of the model; without a training split nothing else is drawn from it.
    leaves |= {"data.train_split": "", "data.cameras": arguments.cameras, "data.pack": len(needle.TYPES)}
    config = config_lib.load_config(CONFIG, overrides={name: str(value) for name, value in leaves.items()})
    order = list(range(frames))[:: -(-frames // read)]
    if way == "exact":
        order = frames_lib.order(frames, over, config.attend.stripe)
    options = experiment.options(config)
    tokens = m.spec.visual_tokens
    if way in ("pooled", "top"):
        options["attend"] = pooled(tokens) if way == "pooled" else top(tokens, arguments.kept)

    of: Any = types.SimpleNamespace(spec=m.spec)  # all that the data want of a task
    data = vlm.data(config, of, frame_order=order)
    mesh = mesh_lib.make(config.mesh, jax.devices()[:over])
    kinds = vlm.types_of(config)

    def compiled(options: dict[str, Any], mesh: Any, batch: Any) -> tuple[Any, Any, int]:
        model = VLM(m.spec, **options)
        evaluated = jax.jit(lambda params, batch: vlm.sums(vlm.asked(model, params, batch), batch, kinds))
        with jax.set_mesh(mesh):
            params = jax.tree.map(lambda x: mesh_lib.put(x, mesh_lib.replicated(mesh)), m.params)
            placed = mesh_lib.place(batch, mesh, arguments.batch, experiment.OVER)
            found = evaluated.lower(params, placed).compile()
        plan: Any = found.memory_analysis()
        taken = plan.argument_size_in_bytes + plan.temp_size_in_bytes + plan.output_size_in_bytes
        return found, params, int(taken)

    first = next(iter(data.eval()))
    run, params, taken = compiled(options, mesh, first)
    told = {"way": way, "frames": frames, "batch": arguments.batch, "devices": over, "device_bytes": taken}
    told |= {"read": frames if way == "exact" else len(order), "cameras": arguments.cameras}
    if way == "exact":
        whole = compiled(experiment.options(config), mesh_lib.make({"data": 1}, jax.devices()[:1]), first)[2]
        told |= {"one_device_bytes": whole, "limit_bytes": arguments.limit, "held_by_one": whole <= arguments.limit}
    if way == "top":
        told["kept"] = min(arguments.kept, len(order))

    def place(batch: Any) -> Any:
        return mesh_lib.place(batch, mesh, arguments.batch, experiment.OVER)

    return Prepared(run, params, data, place, kinds, told)


def measured(way: str, frames: int, read: int, m: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of one way on videos of so many frames, and the bytes it takes of a device."""
    import jax

    this = prepared(way, frames, read, m, arguments)
    total: dict[str, float] = {}
    for batch in this.data.eval():
        for name, value in jax.device_get(this.run(this.params, this.place(batch))).items():
            total[name] = total.get(name, 0.0) + float(value)
    kinds = (kind for kind in this.kinds if total[f"count@{kind}"])
    parts = {kind: total[f"top1@{kind}"] / total[f"count@{kind}"] for kind in kinds}
    return {**this.told, "questions": int(total["count"]), "top1": total["top1"] / total["count"], **parts}


def reads(way: str, frames: int, wanted: Sequence[int], kept: int) -> list[int]:
    """How many frames a way reads, where `wanted` says so or not."""
    if way == "exact":
        return [frames]
    return [min(count, frames) for count in wanted or ((kept if way == "sampled" else frames),)]


def videos_of(r: dict[str, Any]) -> tuple[Any, ...]:
    """Which videos a record is about."""
    return tuple(r[name] for name in VIDEOS)


def latest(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last accuracy of every haystack, number of cameras, length and way, with what this reads and keeps. Records
    of before `--read` and `--batch` were of the reads that are taken without the one, and of four videos."""
    full = []
    for r in records:
        if "way" in r:
            usual = reads(r["way"], r["frames"], (), r.get("kept", 0))[0]
            kept = r["kept"] if r["way"] == "top" else 0  # the others keep what they read
            full.append({"read": usual, "batch": 4, "cameras": 1, **r, "kept": kept})
    return list({(videos_of(r), r["way"], r["read"], r["kept"]): r for r in full}.values())


def cases(records: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Every exact record of one camera, with those of the other ways on the same videos, `top` with `KEPT` frames; by
    haystack and length."""
    used = [r for r in latest(records) if r["cameras"] == 1]
    used = [r for r in used if r["way"] != "top" or r["kept"] == min(KEPT, r["read"])]
    found = []
    for exact in sorted((r for r in used if r["way"] == "exact"), key=videos_of):
        others = [r for r in used if r["way"] != "exact" and videos_of(r) == videos_of(exact)]
        found.append((exact, others))
    return found


def is_usual(r: dict[str, Any]) -> bool:
    """Whether a record's way reads what it reads without `--read`."""
    return bool(r["read"] == reads(r["way"], r["frames"], (), KEPT)[0])


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: accuracy by length and way, and what a device holds. `sampled` reads as many frames as `top` keeps, the
    other two read all."""
    from vtjax.viz import tables

    rows = []
    for exact, others in cases(records):
        usual = {r["way"]: r for r in others if is_usual(r)}
        memory = [f"{exact[name] / 2**20:.1f}" for name in ("one_device_bytes", "device_bytes")]
        held = "yes" if exact["held_by_one"] else "no"
        accuracy = [f"{r['top1']:.3f}" if r else "" for r in (exact, *(usual.get(way) for way in WAYS[1:]))]
        rows.append((exact["haystack"], str(exact["frames"]), str(exact["batch"]), *memory, held, *accuracy))
    head = ("haystack", "frames", "rows", "MiB on one device", f"MiB on each of {DEVICES}", "one holds it", *WAYS)
    return tables.markdown(head, rows)


def by_read(records: list[dict[str, Any]]) -> str:
    """Markdown: accuracy of the cheaper ways by the frames that they read, and what they take of their device."""
    from vtjax.viz import tables

    rows = []
    for exact, others in cases(records):
        if all(map(is_usual, others)):  # the other table has them
            continue
        for read in sorted({r["read"] for r in others}):
            by = {r["way"]: r for r in others if r["read"] == read}
            taken = max(r["device_bytes"] for r in by.values()) / 2**20
            accuracy = [f"{by[way]['top1']:.3f}" if way in by else "" for way in WAYS[1:]]
            rows.append((exact["haystack"], exact["frames"], f"{exact['top1']:.3f}", read, f"{taken:.1f}", *accuracy))
    head = ("haystack", "frames", "exact", "frames read", "MiB on its device", *WAYS[1:])
    return tables.markdown(head, rows) if rows else ""


def by_type(records: list[dict[str, Any]]) -> str:
    """Markdown: accuracy of exact attention by type of question, with several cameras."""
    from experiments.ltmp.tables import circumstances
    from vtjax.data import needle
    from vtjax.viz import tables

    used = [r for r in latest(records) if r["cameras"] > 1 and r["way"] == "exact"]
    used.sort(key=lambda r: (r["cameras"], r["frames"]))
    rows = []
    for r in used:
        accuracy = (f"{r[name]:.3f}" for name in ("top1", *needle.TYPES))
        rows.append((r["haystack"], r["cameras"], r["frames"], r["questions"], *accuracy))
    head = ("haystack", "cameras", "frames", "questions", "all", *needle.TYPES)
    return tables.markdown(head, rows) + "\n\n" + circumstances(used) if rows else ""


def figure(records: list[dict[str, Any]]) -> Any:
    """Accuracy against the length of the video, of what is read without `--read`; dashed: where one device no longer
    holds it."""
    from vtjax.viz import curves

    found = [(exact, others) for exact, others in cases(records) if (exact["haystack"], exact["batch"]) == ("drawn", 4)]
    used = [r for exact, others in found for r in (exact, *filter(is_usual, others))]
    drawn = curves.new_figure(6.4, 3.9)
    axes = drawn.add_subplot()
    for color, way in zip(curves.COLORS, WAYS, strict=False):
        points = sorted((r["frames"], r["top1"]) for r in used if r["way"] == way)
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker="o", linewidth=2.0, label=way)
    beyond = sorted(r["frames"] for r in used if r.get("held_by_one") is False)
    if beyond:
        axes.axvline(beyond[0], color=curves.MUTED, linestyle="--", linewidth=0.9)
    axes.set(xscale="log", xlabel="frames", ylabel="accuracy", ylim=(0, 1))
    lengths = sorted({r["frames"] for r in used})
    axes.set_xticks(lengths, labels=[str(length) for length in lengths])
    axes.minorticks_off()
    axes.legend(frameon=False)
    return drawn


def wrong(arguments: argparse.Namespace) -> str:
    """A line about an option that no measurement can have, or nothing."""
    if arguments.only and arguments.only not in WAYS:
        return f"--only must be one of {', '.join(WAYS)}, found {arguments.only!r}"
    for name in COUNTS:
        value = str(getattr(arguments, name))
        if name == "read" and not value:
            continue
        if not all(number.isdecimal() and int(number) > 0 for number in value.split(",")):
            return f"--{name} must be above 0, found {value!r}"
    return ""


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="of a run of configs/lvxattn.py:video, clips or cameras")
    parser.add_argument("--what", default="accuracy", choices=("accuracy", "time"))
    parser.add_argument("--frames", default="16,32,64,128,256,512", help="lengths of the videos")
    parser.add_argument("--videos", type=int, default=64, help="of every length, three questions each")
    parser.add_argument("--read", default="", help="frames that the ways on one device read, several numbers")
    parser.add_argument("--kept", type=int, default=KEPT, help="frames that `top` attends to")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--limit", type=int, default=32 * 2**20, help="bytes that a device is taken to have")
    parser.add_argument("--cameras", type=int, default=1)
    parser.add_argument("--haystack", default="drawn", choices=("drawn", "clips"))
    parser.add_argument("--only", default="", help="one of the ways")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each way, for times")
    parser.add_argument("--out", type=Path, default=RECORDS)
    arguments = parser.parse_args()
    if line := wrong(arguments):
        print(line, file=sys.stderr)
        return 2
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={DEVICES}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    frames, wanted = (list(map(int, filter(None, text.split(",")))) for text in (arguments.frames, arguments.read))
    if arguments.what == "time":
        from experiments.lvxattn import needle_time

        return needle_time.run(frames, wanted, arguments)

    import vtjax
    from vtjax.account import record

    m = vtjax.load(arguments.workdir)
    for length in frames:
        for way in (arguments.only,) if arguments.only else WAYS:
            for read in reads(way, length, wanted, arguments.kept):
                told = {"haystack": arguments.haystack, **measured(way, length, read, m, arguments)}
                print(record.write(arguments.out, told), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
