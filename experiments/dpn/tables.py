# SPDX-License-Identifier: Apache-2.0
"""Tables of experiments/dpn/README.md, rebuilt from results/*.jsonl.

python -m experiments.dpn.tables           writes them between their markers
python -m experiments.dpn.tables --check   exits 1 where the README differs
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from experiments.ltmp.tables import circumstances
from vtjax.data.question_sets import EASY_VQA_TYPES
from vtjax.viz import tables

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
TYPES = ("coarse", "object", "relation", "fine")

ANSWER = "at the answer"
"""Of the names of arms in which nothing is added to the texts."""
ALIKE = 0.005
"""Shares of the work that count as the same."""
RELAXING = "routers at the answer budget=0.44"
"""The routers that are asked for more work than they were trained for."""

Records = list[dict[str, Any]]


def build(results: Path = HERE / "results") -> dict[str, str]:
    """Markdown by table name; a table whose records do not exist is absent."""
    made = (
        ("dense", "accuracy", dense),
        ("arms", "accuracy", lambda r: arms(r, ("arms", "tau"))),
        ("routers", "accuracy", lambda r: arms(r, ("routers",))),
        ("gentle", "accuracy", lambda r: arms(r, ("gentle",), controls="gentle")),
        ("easyvqa", "accuracy", lambda r: arms(r, ("easyvqa",), EASY_VQA_TYPES, "easyvqa")),
        ("paths", "accuracy", paths),
        ("relaxed", "accuracy", relaxed),
        ("speed", "speed", speed),
        ("tokens", "speed", tokens),
        ("decode", "speed", decode),
    )
    return tables.from_records(results, made)


def by_arm(records: Records, kind: str) -> dict[str, Records]:
    """The records of every arm, one per seed, in the order of the seeds."""
    found: dict[str, Records] = {}
    for r in sorted((r for r in records if r["kind"] == kind), key=lambda r: r["seed"]):
        found.setdefault(r["name"], []).append(r)
    return found


def dense(records: Records) -> str:
    """The models that every arm starts from."""
    rows = [
        (
            r["seed"],
            f"{r['params']:,}",
            f"{r['steps']:,}",
            *(f"{100 * r[name]:.1f} %" for name in ("top1", *(f"top1@{t}" for t in (*TYPES, "list")))),
        )
        for r in by_arm(records, "dense").get("dense", [])
    ]
    if not rows:
        return ""
    used = [r for r in records if r["kind"] == "dense"]
    return tables.markdown(("seed", "parameters", "steps", "all", *TYPES, "list"), rows) + "\n\n" + circumstances(used)


def arms(records: Records, kinds: tuple[str, ...], types: tuple[str, ...] = TYPES, controls: str = "arms") -> str:
    """Accuracy and work of every arm; what its own decisions are worth against the same ones permuted, among all
    questions and among those of one type; and how it stands to the model that it started from, to the dense arm and to
    the best static path of no more work (`ALIKE`), over the seeds that both have. Arms whose texts have no router token
    ("at the answer") are compared with controls that have none. `controls`: the kind that these are of."""
    rows: list[tuple[Any, ...]] = []
    start, type_by_type = by_arm(records, "start").get("start", []), by_arm(records, "within")
    for kind in kinds:
        for name, found in by_arm(records, kind).items():
            work = mean(found, "mac_ratio")
            tops = [100 * r["top1"] for r in found]
            own = "" if "permuted_correct" not in found[0] else paired([(told(r), permuted(r)) for r in found])
            inside = [(told(r), permuted(r)) for r in type_by_type.get(name, [])]
            alike = {n: r for n, r in by_arm(records, controls).items() if (ANSWER in n) == (ANSWER in name)}
            dense = next((other for n, other in alike.items() if n.startswith("dense")), [])
            seeds = {r["seed"] for r in found}
            fixed = [
                other
                for n, other in alike.items()
                if n.startswith("static")
                and mean(other, "mac_ratio") <= work + ALIKE
                and seeds <= {r["seed"] for r in other}
            ]
            best = max(fixed, key=lambda other: mean([r for r in other if r["seed"] in seeds], "top1"), default=[])
            rows.append(
                (
                    name,
                    len(found),
                    f"{work:.3f}",
                    f"**{np.mean(tops):.1f}**" + (f" [{min(tops):.1f}, {max(tops):.1f}]" if len(tops) > 1 else ""),
                    " / ".join(f"{100 * mean(found, f'top1@{t}'):.0f}" for t in types),
                    " / ".join(f"{mean(found, f'halvings@{t}'):.2f}" for t in types),
                    f"{mean(found, 'information_bits'):.2f}" if own else "",
                    own,
                    paired(inside) if inside else "",
                    beside(found, start),
                    "" if name.startswith("dense") else beside(found, dense),
                    "" if name.startswith(("dense", "static")) else beside(found, best),
                )
            )
    if not rows:
        return ""
    header: tuple[str, ...] = ("arm", "seeds", "work", "accuracy, %", "by type", "halvings by type", "bits")
    header += ("own decisions minus permuted", "within a type", "minus the start", "minus dense", "minus best static")
    used = [r for r in records if r["kind"] in kinds]
    return tables.markdown(header, rows) + "\n\n" + circumstances(used)


def paths(records: Records) -> str:
    """What static paths do to dense models as they are: at each of a few shares of the work the path that keeps most
    answers right, over all seeds."""
    used = [r for r in records if r["kind"] == "paths"]
    if not used:
        return ""
    counts = np.sum([r["count"] for r in used], 0)
    right = np.sum([np.array(r["top1_by_type"]) * r["count"] for r in used], 0)  # [paths, types]
    work, every = np.array(used[0]["work"]), right.sum(1) / counts.sum()
    rows = []
    for most in (1.0, 0.8, 0.7, 0.6, 0.5, 0.47, 0.4, 0.35, 0.3):
        best = max(np.flatnonzero(work <= most), key=lambda i: every[i], default=None)
        if best is not None:
            kinds = " / ".join(f"{100 * x:.0f}" for x in right[best] / counts)
            path = ", ".join(map(str, used[0]["paths"][best]))
            rows.append((f"{most:.2f}", path, f"{work[best]:.3f}", f"{100 * every[best]:.1f}", kinds))
    header = ("at most", "best path", "work", "accuracy, %", "by type")
    return tables.markdown(header, rows) + f"\n\n{counts.sum():,} questions; " + circumstances(used)


def relaxed(records: Records) -> str:
    """The routers that were trained at one budget at others, beside the best static path of no more work in the same
    models as they are, over the questions that all paths were tried on."""
    every = {r["seed"]: r for r in records if r["kind"] == "paths" and "correct" in r}
    starts = by_arm(records, "start").get("start", [])
    asked = by_arm(records, "relaxed")
    trained = {name: r for name, r in by_arm(records, "routers").items() if name == RELAXING} if asked else {}
    rows: list[tuple[Any, ...]] = []
    for name, found in {**trained, **asked}.items():
        inside = [(told(r), bits(r["within_correct"])) for r in found if "within_correct" in r]
        if not inside:
            inside = [(told(r), permuted(r)) for r in by_arm(records, "within").get(found[0]["name"], [])]
        shown = [r for r in found if r["seed"] in every]
        least = np.min([r["mac_ratio"] for r in found]) + 1e-6
        best = 0
        if shown:
            work = np.array(every[shown[0]["seed"]]["work"])
            tops = np.mean([[bits([row]) for row in every[r["seed"]]["correct"]] for r in shown], axis=(0, 2))
            best = int(max(np.flatnonzero(work <= max(least, work.min())), key=lambda i: tops[i]))
        fixed = [every[r["seed"]]["correct"][best] for r in shown]
        against = [(told(r)[: len(row)], bits([row])) for r, row in zip(shown, fixed, strict=True)]
        rows.append(
            (
                name.rpartition(" ")[2] if "at 0." in name else "as trained",
                len(found),
                f"{mean(found, 'mac_ratio'):.3f}",
                f"{100 * mean(found, 'top1'):.1f}",
                " / ".join(f"{100 * mean(found, f'top1@{t}'):.0f}" for t in TYPES),
                paired([(told(r), permuted(r)) for r in found]),
                paired(inside) if inside else "",
                beside(found, starts),
                paired(against) + f" ({', '.join(map(str, every[shown[0]['seed']]['paths'][best]))})" if shown else "",
            )
        )
    if not rows:
        return ""
    header: tuple[str, ...] = ("share asked for", "seeds", "work", "accuracy, %", "by type")
    header += ("own decisions minus permuted", "within a type", "minus the start", "minus best static")
    return tables.markdown(header, rows) + "\n\n" + circumstances([r for r in records if r["kind"] == "relaxed"])


def bits(rows: list[str]) -> np.ndarray:
    """Which questions were answered rightly, a mean over rows of 0 and 1."""
    return np.mean([[int(c) for c in row] for row in rows], 0)


def mean(found: Records, name: str) -> float:
    """Over the seeds."""
    return float(np.mean([r[name] for r in found]))


def told(r: dict[str, Any]) -> np.ndarray:
    """Which questions were answered rightly, `[questions]`."""
    return np.array([int(c) for c in r["correct"]], float)


def permuted(r: dict[str, Any]) -> np.ndarray:
    """The same with decisions of other questions, a mean over permutations."""
    return bits(r["permuted_correct"])


def beside(found: Records, other: Records) -> str:
    """`paired` over the seeds that both have."""
    there = {r["seed"]: r for r in other}
    pairs = [(told(r), told(there[r["seed"]])) for r in found if r["seed"] in there]
    return paired(pairs) if pairs else ""


def paired(pairs: list[tuple[np.ndarray, np.ndarray]]) -> str:
    """Mean difference in points over the seeds. From three seeds on with the half width of the 95 % interval over seeds
    by Student's t, in front of it that of a bootstrap over questions and seeds, which is too narrow where seeds are
    few; of two seeds the difference of each, as two have no interval; of one the interval over its questions."""
    rng, difference = np.random.default_rng(0), np.array([own - other for own, other in pairs])
    seeds, questions = difference.shape
    each = 100 * difference.mean(1)
    if seeds == 2:
        return f"{each.mean():+.1f} (by seed {each[0]:+.1f}, {each[1]:+.1f})"
    draws = [
        difference[rng.integers(0, seeds, seeds)].mean(0)[rng.integers(0, questions, questions)].mean()
        for _ in range(2000)
    ]
    low, high = np.percentile(draws, [2.5, 97.5])
    text = f"{100 * difference.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    if seeds == 1:
        return text
    return f"{text}, t ± {stats.t.ppf(0.975, seeds - 1) * each.std(ddof=1) / seeds**0.5:.1f}"


def speed(records: Records) -> str:
    """Time saved over work saved, the latest record of every case."""
    rows, used = [], [r for r in records if r["kind"] in ("latency", "throughput")]
    for r in _latest(used):
        path = "four paths, two each" if r["batch"] > 1 else ", ".join(map(str, r["paths"]))
        for side in ("switch", "static", "staged"):
            if f"{side}_ratio" in r:
                times = f"{r[f'{side}_ratio']:.2f}"
                rows.append(
                    (
                        r["batch"],
                        r["visual"],
                        path,
                        side,
                        f"{r['mac_ratio']:.2f}",
                        times,
                        f"**{r[f'{side}_realised']:.2f}**" + tables.spread(r, f"{side}_realised"),
                    )
                )
    if not rows:
        return ""
    header = ("batch", "visual tokens", "experts", "program", "times less work", "times as fast", "realised")
    return tables.markdown(header, rows) + "\n\n" + circumstances(used)


PAYS = 0.95  # share of the saved work that must be saved time, the aim at batch 1


def tokens(records: Records) -> str:
    """One question with fewer and fewer visual tokens, and from which count on the saved work is saved time."""
    used = [r for r in records if r["kind"] == "tokens"]
    if not used:
        return ""
    ordered = sorted(_latest(used), key=lambda r: (str(r["paths"]), -r["visual"]))
    rows = [
        (
            ", ".join(map(str, r["paths"])),
            r["visual"],
            *(
                f"{r[name]:.2f}" + tables.spread(r, name)
                for name in ("mac_ratio", "switch_ratio", "switch_realised", "static_realised")
            ),
        )
        for r in ordered
    ]
    header = ("experts", "visual tokens", "times less work", "times as fast", "realised", "realised, static")
    told = []
    for path in dict.fromkeys(str(r["paths"]) for r in ordered):
        # From the largest count down to the first that fails.
        pays = [r["switch_realised"] >= PAYS for r in ordered if str(r["paths"]) == path]
        counts = [r["visual"] for r in ordered if str(r["paths"]) == path]
        least = counts[pays.index(False) - 1] if False in pays[1:] and pays[0] else counts[-1]
        told.append(f"{path[1:-1]}: {f'from {least} tokens on' if pays[0] else 'at no count'}")
    line = f"At least {PAYS} of the saved work is saved time, by path: {'; '.join(told)}."
    return "\n\n".join((tables.markdown(header, rows), line, circumstances(used)))


def decode(records: Records) -> str:
    """Tokens after the first one, over the short caches."""
    rows = []
    for r in _latest(records):
        if r["kind"] == "decode":
            rate, held = r["tokens_per_s"], {name: size / 2**20 for name, size in r["cache_bytes"].items()}
            rows.append(
                (
                    ", ".join(map(str, r["paths"][0])),
                    f"{rate['dense']:.0f}",
                    f"{rate['pooled']:.0f}",
                    f"{r['pooled_ratio']:.2f}" + tables.spread(r, "pooled_ratio"),
                    f"{held['dense']:.1f}",
                    f"{held['pooled']:.1f}",
                )
            )
    if not rows:
        return ""
    header = (
        "experts",
        "tokens/s, dense",
        "tokens/s, pooled",
        "times as fast",
        "cache, MiB, dense",
        "cache, MiB, pooled",
    )
    return tables.markdown(header, rows) + "\n\n" + circumstances([r for r in records if r["kind"] == "decode"])


def _latest(records: Records) -> Records:
    """The last record of every case."""
    return list({(r["kind"], r["visual"], str(r["paths"])): r for r in records}.values())


if __name__ == "__main__":
    sys.exit(tables.command(README, build, __doc__))
