# SPDX-License-Identifier: Apache-2.0
"""Tables of experiments/vit/README.md, rebuilt from results/*.jsonl.

python -m experiments.vit.tables           writes them between their markers
python -m experiments.vit.tables --check   exits 1 where the README differs
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vtjax.viz import tables

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"


def build(results: Path = HERE / "results") -> dict[str, str]:
    """Markdown by table name; a table whose records do not exist is absent."""
    makers = (("beside_torch", beside_torch), ("figures", figures), ("aot", aot), ("scale", scale))
    return tables.from_records(results, ((name, name, make) for name, make in makers))


def figures(records: list[dict[str, Any]]) -> str:
    """The latest record of every figure, beside its aim."""
    latest = {r["figure"]: r for r in records}
    rows = []
    if r := latest.get("logits"):
        seen = f"{r['max_abs_diff']:.1e} on {r['images']} photographs (timm {r['timm_version']})"
        rows.append(("largest logit difference to timm, ViT-Ti/16, float32", "below 1e-4", seen, r))
    if r := latest.get("resume"):
        kills = f"{r['kills']['step']} kills at a step, {r['kills']['save']} during a save"
        seen = f"{r['equal']} of {r['runs']} runs ({kills})"
        rows.append(("resumed runs whose `params_sha256` equals the undisturbed run's", "all", seen, r))
    if r := latest.get("clone"):
        for target, aim in (("demo", "300 s"), ("test", "600 s")):
            failed = "" if r[f"make_{target}_exit"] == 0 else f", exit code {r[f'make_{target}_exit']}"
            rows.append(
                (f"`make {target}` in an empty clone", f"below {aim}", f"{r[f'make_{target}_s']:.0f} s{failed}", r)
            )
    return _aims(rows)


def scale(records: list[dict[str, Any]]) -> str:
    """The latest record of every figure, beside its aim, and the loss curves below."""
    latest = {r["figure"]: r for r in records}
    rows = []
    if r := latest.get("curves"):
        places = {"eight": "8 devices", "two": "2 processes"}
        for what, key, aim in (
            ("first 10 steps, all logged", "rel_diff_first_10", "at most 1e-5"),
            (f"{r['steps']} steps, {r['logged']} logged", "rel_diff_all", "none: rounding grows"),
        ):
            seen = ", ".join(f"{r[key][name]:.1e} on {place}" for name, place in places.items())
            rows.append((f"largest relative difference of the loss to 1 device, `digits`, {what}", aim, seen, r))
        seen = ", ".join(f"{r['top1'][name]:.1%} on {place}" for name, place in {"one": "1 device", **places}.items())
        rows.append((f"top-1 after {r['steps']} steps", "alike", seen, r))
    if r := latest.get("kills"):
        count = sum(r["kills"].values())
        who = f"{count} kills: {r['kills']['0']} of process 0, {r['kills']['1']} of process 1"
        equal = "equal" if r["equal"] else "**not equal**"
        rows.append(("`params_sha256` of two processes, killed and resumed, to the run left alone", "equal", equal, r))
        seen = f"{r['ended_with_76']} ended so, {r['named_the_lost']} named it ({who})"
        rows.append(("the other process ends with code 76 and names the lost one", f"all {count}", seen, r))
        seen = f"median {r['median_s']:.1f} s, at most {r['max_s']:.1f} s"
        rows.append((f"time until it has ended, `heartbeat_timeout={r['heartbeat_timeout']}`", "below 20 s", seen, r))
    if r := latest.get("sweep"):
        what = f"a sweep of {r['points']} points"
        seen = f"{r['compilations']['sweep']}, beside {r['compilations']['runs']} in runs of their own"
        rows.append((f"compilations of the training step, {what}", "1", seen, r))
        ratio = r["runs_s"] / r["sweep_s"]
        seen = f"{r['sweep_s']:.0f} s, beside {r['runs_s']:.0f} s in runs of their own ({ratio:.1f} times as long)"
        rows.append((f"time, {what}", "shorter", seen, r))
        rows.append(("points whose `params_sha256` is their own run's", "all", f"{r['equal']} of {r['points']}", r))
    lines = [_aims(rows)]
    if "curves" in latest:
        lines.append("![Loss curves of 1 device, 8 devices and 2 processes](results/scale_curves.png)")
    for text in dict.fromkeys(
        f"{r['hardware']['cpu']}, {r['hardware']['cores']} cores; jax {r['versions']['jax']}." for r in latest.values()
    ):
        lines.append(text)
    return "\n\n".join(lines)


def _aims(rows: Iterable[tuple[str, str, str, dict[str, Any]]]) -> str:
    """A table of (what, aim, seen, record)."""
    cells = [
        (
            what,
            aim,
            seen,
            f"`python -m experiments.vit.{r['command'].replace('.py', '')}`",
            f"{r['date'][:10]}, {r['commit']}",
        )
        for what, aim, seen, r in rows
    ]
    return tables.markdown(("what", "aim", "seen", "command", "when, commit"), cells)


def beside_torch(records: list[dict[str, Any]]) -> str:
    """The latest record of every case, with and without huge pages, and the circumstances below."""
    latest = {(r["kind"], r["model"], r["batch"], huge_pages(r)): r for r in records}
    rows = []
    for (kind, model, batch, pages), r in latest.items():
        low, high = r["ratio_range"]
        times = [f"{1000 * r[side]['median_s']:.2f} ms" for side in ("vtjax", "torch")]
        other = "not known" if r["other_cores"] is None else f"{r['other_cores']:.2f}"
        work = "training step" if kind == "train" else "forward"
        speed = f"{r['images_per_s']['vtjax']:.1f}"
        rows.append(
            (work, model, batch, pages, *times, speed, f"**{r['ratio']:.2f}**", f"{low:.2f} to {high:.2f}", other)
        )
    header = (
        "work",
        "model",
        "batch",
        "huge pages",
        "vtjax",
        "PyTorch",
        "vtjax images/s",
        "ratio",
        "p10 to p90",
        "other busy cores",
    )
    lines = [tables.markdown(header, rows)]
    for text in dict.fromkeys(_circumstances(r) for r in latest.values()):
        lines.append(text)
    return "\n\n".join(lines)


def aot(records: list[dict[str, Any]]) -> str:
    """The latest record of every compile for a TPU topology, and the circumstances below."""
    latest = {(r["config"], r["step"], r["topology"], r["slices"], str(r["mesh"])): r for r in records}
    rows = []
    for r in latest.values():
        place = f"{r['slices']} x {r['topology']}" if r["slices"] > 1 else r["topology"]
        sent = (
            f"{kind} {e['count']:,} ({e['bytes'] / 2**20:,.1f} MiB)" for kind, e in r.get("collectives", {}).items()
        )
        rows.append(
            (
                f"`{r['config'].rpartition('/')[2]}`",
                r["step"],
                place,
                r["devices"],
                f"{r['hbm_bytes_per_device'] / 2**30:.2f}",
                f"{r['hbm_limit'] / 2**30:.2f}",
                "yes" if r["fits"] else "**no**",
                r.get("temp_ratio"),
                f"{r['compile_s']:.0f}",
                ", ".join(sent),
            )
        )
    header = ("config", "step", "topology", "devices", "GiB per device", "of", "fits", "temporary / by hand", "s")
    lines = [tables.markdown((*header, "collectives per step (per device)"), rows)]
    for text in dict.fromkeys(
        f"{r['hardware']['cpu']}, {r['hardware']['cores']} cores; jax {r['versions']['jax']}, libtpu {r['libtpu']}; "
        f"{r['date'][:10]}, commit {r['commit']}."
        for r in latest.values()
    ):
        lines.append(text)
    return "\n\n".join(lines)


def huge_pages(r: dict[str, Any]) -> str:
    """Whether both processes ran with glibc's huge pages."""
    return "yes" if "hugetlb=1" in r["glibc_tunables"] else "no"


def _circumstances(r: dict[str, Any]) -> str:
    parts = [
        r["hardware"]["cpu"],
        f"{r['threads']} threads, float32",
        f"jax {r['versions']['jax']}, torch {r['torch_version']}, timm {r['timm_version']}",
        f"AdamW {r['adamw']}, OpenMP waits: {r['omp_wait_policy']}",
        f"{r['vtjax']['calls']} calls each, {r['date'][:10]}, commit {r['commit']}",
    ]
    explained = "Medians over all calls; ratio = PyTorch's over ours. p10 to p90: the same ratio, round by round."
    return "; ".join(parts) + ". " + explained


if __name__ == "__main__":
    sys.exit(tables.command(README, build, __doc__))
