# SPDX-License-Identifier: Apache-2.0
"""Replays recorded outputs of the DGMR release (layout: the vectors' own description) through vtjax.

A case is plain, gated or degenerate by the fields that it has. All three forms of the selection have to give the
recorded picks, in order; where rows are equal bit for bit, any of them. Degenerate cases are compared with the rule of
spec section 6.1, beyond the rank not with the release.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.conformance.arrays import Arrays
from vtjax.errors import InputError
from vtjax.models.layers import ACTIVATIONS
from vtjax.ops import gram_schmidt, linear

SEPARATOR = "__"
GREEDY = 1e-5
"""Squared distances of picks may fall short of the best by this part."""


def replay(arrays: Arrays) -> None:
    """Runs every case that the file holds."""
    cases = [case for case in arrays.children() if case != "case_names"]
    if "case_names" in arrays and sorted(arrays["case_names"].tolist()) != sorted(cases):
        arrays.miss("case_names")
    for case in cases:
        at = case + SEPARATOR
        if at + "w12" in arrays:
            gated(arrays, at)
        elif at + "idx" in arrays:
            plain(arrays, at)
        elif at + "idx_rule61" in arrays:
            degenerate(arrays, at)


def plain(arrays: Arrays, at: str) -> None:
    """An MLP of two layers."""
    w_in, b_in, w_out, b_out = (arrays[at + name] for name in ("w_in", "b_in", "w_out", "b_out"))
    keep = picks(arrays, at, w_in, int(w_in.shape[1] * float(arrays[at + "ratio"])))
    pruned = {"w_in": w_in[keep], "b_in": b_in[keep], "w_out": w_out[:, keep], "b_out": b_out}
    outputs(arrays, at, (w_in, b_in, w_out, b_out), pruned)


def gated(arrays: Arrays, at: str) -> None:
    """A gated MLP, by the project's own convention (spec section 1.5)."""
    w12, b12, w3, b3, score = (arrays[at + name] for name in ("w12", "b12", "w3", "b3", "score"))
    half = len(w12) // 2
    # The mode is named nowhere: it is the one whose scores are these.
    found = [np.asarray(gram_schmidt.scores(w12, mode)) for mode in gram_schmidt.MODES]
    same = [rows for rows in found if rows.shape == score.shape] or found
    rows = max(same, key=lambda rows: (rows == score).sum() if rows.shape == score.shape else 0)
    arrays.compare(at + "score", rows, "exact")
    keep = picks(arrays, at, rows, int(arrays[at + "keep"]))
    both = np.concatenate([keep, keep + half])
    pruned = {"w12": w12[both], "b12": b12[both], "w3": w3[:, keep], "b3": b3}
    outputs(arrays, at, (w12, b12, w3, b3), pruned)


def degenerate(arrays: Arrays, at: str) -> None:
    """Rows that do not span enough. What the release does beyond the rank is junk; its first picks are not."""
    w_in, wanted, official = arrays[at + "w_in"], arrays[at + "idx_rule61"], arrays[at + "idx_official"]
    rank = np.linalg.matrix_rank(w_in.astype(np.float64))
    arrays.compare(at + "rank", rank, "exact")
    k, classes = int(w_in.shape[1] * float(arrays[at + "ratio"])), row_classes(arrays, at, w_in)
    if more := k > len(w_in):
        arrays.compare(at + "idx_rule61", wanted[:0], "exact")
        try:
            gram_schmidt.select(w_in, k)
            arrays.miss(at + "idx_rule61")
        except InputError:
            k = len(w_in)
    keep, norms = selected(w_in, k, wanted, classes)
    if not more:
        compare_picks(arrays, at + "idx_rule61", keep, classes)
    if len(set(keep.tolist())) < k or gram_schmidt.shortfall(w_in, keep) > GREEDY:
        arrays.miss(at + "idx_rule61")
    arrays.compare(at + "idx_official", np.concatenate([keep[:rank], official[rank:]]), "exact")
    along(arrays, at, w_in, keep[:rank], norms[:rank], classes)


def picks(arrays: Arrays, at: str, rows: np.ndarray, k: int) -> np.ndarray:
    """Compares what is selected, and returns it."""
    recorded, classes = arrays[at + "idx"], row_classes(arrays, at, rows)
    keep, norms = selected(rows, k, recorded, classes)
    compare_picks(arrays, at + "idx", keep, classes)
    if gram_schmidt.shortfall(rows, keep) > GREEDY:
        arrays.miss(at + "idx")
    along(arrays, at, rows, keep, norms, classes)
    # Of equal rows another one may be recorded, with another bias.
    return recorded if keep.shape == recorded.shape and (classes[keep] == classes[recorded]).all() else keep


def selected(rows: np.ndarray, k: int, recorded: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Picks and distances of the first form that does not give what was recorded, else of the last one."""
    for form in gram_schmidt.FORMS:
        keep, norms = map(np.asarray, gram_schmidt.select_with_norms(rows, k, form=form))
        if keep.shape != recorded.shape or (classes[keep] != classes[recorded]).any():
            break
    return keep, norms


def along(arrays: Arrays, at: str, rows: np.ndarray, keep: np.ndarray, norms: np.ndarray, classes: np.ndarray) -> None:
    """Distances and margins at every pick, and the orders of QR in both precisions."""
    arrays.compare(at + "resid_norm", norms, "norm")
    arrays.compare(at + "margin", margins(rows, keep))
    for name in ("idx_qr64", "idx_qr32"):
        compare_picks(arrays, at + name, keep, classes)


def margins(rows: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """(distance of the pick - that of the best other row) / distance of the pick, in float64."""
    found, width = np.zeros(len(keep)), rows.shape[1]
    for at, pick in enumerate(keep):
        if at % width == 0:
            residual = np.where(np.isin(np.arange(len(rows)), keep[:at])[:, None], 0, rows.astype(np.float64))
        norms = np.linalg.norm(residual, axis=1)
        best, norms[pick] = norms[pick], -1
        norms[keep[:at]] = -1
        found[at] = (best - max(norms.max(), 0.0)) / best
        residual -= np.outer(residual @ residual[pick], residual[pick]) / best**2
    return found


def row_classes(arrays: Arrays, at: str, rows: np.ndarray) -> np.ndarray:
    """Compares and returns, for every row, the first row that equals it."""
    _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    classes = first[inverse.reshape(-1)]
    arrays.compare(at + "row_class", classes, "exact")
    return classes


def compare_picks(arrays: Arrays, name: str, keep: np.ndarray, classes: np.ndarray) -> None:
    """Picks in order, up to equal rows."""
    recorded = arrays[name]
    rows = keep.shape == recorded.shape and len(set(recorded.tolist()) & set(range(len(classes)))) == len(recorded)
    equal = rows and (classes[keep] == classes[recorded]).all()
    arrays.compare(name, recorded if equal else keep, "exact")


def outputs(arrays: Arrays, at: str, full: tuple[np.ndarray, ...], pruned: dict[str, np.ndarray]) -> None:
    """Compares pruned weights, and what comes out before and after."""
    for name, value in pruned.items():
        arrays.compare(f"{at}{name}_pruned", value, "exact")
    with jax.enable_x64(True):  # the recorded float32 is off by two thirds of its tolerance; ours would be, too
        arrays.compare(at + "y_full", mlp(arrays[at + "x"], *full), "product")
        arrays.compare(at + "y_pruned", mlp(arrays[at + "x"], *pruned.values()), "product")


def mlp(*arrays: np.ndarray) -> Any:
    """x, w_in, b_in, w_out, b_out -> y, with weights in PyTorch's layout; twice as many rows of `w_in` as `w_out` has
    columns are a gated MLP's gate and value."""
    x, w_in, b_in, w_out, b_out = (jnp.asarray(array, jnp.float64) for array in arrays)
    hidden = linear.matmul(x, w_in.T) + b_in
    half = w_out.shape[1]
    if len(w_in) == half:
        hidden = ACTIVATIONS["gelu"](hidden)
    else:
        hidden = ACTIVATIONS["swiglu"](hidden[:, :half]) * hidden[:, half:]
    return linear.matmul(hidden, w_out.T) + b_out
