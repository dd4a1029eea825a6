# SPDX-License-Identifier: Apache-2.0
"""Greedy pivoted Gram-Schmidt: which neurons of an MLP to keep so that the others are least missed. DGMR's selection.

Letters: M neurons (rows), N inputs (columns), K neurons to keep, L layers, H neurons of a gated MLP, D outputs.

Of all rows the one farthest from the span of those already picked is next; the first is the longest. After N picks, or
when no row is left outside that span, a new round starts with the remaining rows at their original weights. Round by
round this is QR with column pivoting of the transpose. Only input weights are looked at: no biases, no output weights,
no data. Source: DGMR spec sections 1, 4 and 6.1.

Three forms pick the same rows, up to rounding where two are equally far:
  deflated: every pick is projected out of every row (the released algorithm). M N a pick, thrice through memory;
  lazy: rows stay as they are, their squared distances are downdated by one product with the pick's direction;
  blocked: a panel of picks among a few hundred candidates at a time, after it a product with all rows for their
    distances, after some panels another that rotates them. The default.
"""

from __future__ import annotations

import functools
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from vtjax.errors import InputError, check_choice

FORMS = ("deflated", "lazy", "blocked")
MODES = ("concat", "gate", "value")
"""What a gated MLP is scored by: gate and value weights side by side, or one of them."""

_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
_EPS = float(np.finfo(np.float32).eps)

# Squared distances that were downdated are compared only above this part of the largest at the last exact count: below
# it they have lost digits. 1e-4 is too little (spec section 4.2).
_GUARD = 1e-2
_REFRESH = 64  # picks after which the lazy form counts anew

# Of the blocked form: candidates and picks at most per panel, panels per update of the matrix, and stages in which the
# matrix of a round gets narrower. Chosen for time on CPUs; every value gives the same picks, up to rounding.
_CANDIDATES, _PICKS, _PANELS, _STAGES = 256, 16, 4, 4

Matrix = Shaped[Array | np.ndarray, "..."]


class Selection(NamedTuple):
    """Picked rows, in pick order; with a leading axis of layers where there are several.

    Attributes:
      indices: int32 `[K]`, always distinct.
      norms: float32 `[K]`, distance of each row from the span of the earlier picks of its round, in units of the
        weights. They fall within a round, and may rise where the next one starts. 0 for rows that are zero, or below
        float32's normal numbers, which CPUs flush; infinite where a length exceeds float32.
    """

    indices: Int[Array, "*L K"]
    norms: Float[Array, "*L K"]


def select(weights: Matrix, k: int | np.integer, *, form: str = "blocked") -> Int[Array, " K"]:
    """The `k` rows to keep, in pick order: `select_with_norms(...).indices`."""
    return select_with_norms(weights, k, form=form).indices


def select_with_norms(weights: Matrix, k: int | np.integer, *, form: str = "blocked") -> Selection:
    """The `k` rows to keep, in pick order, and their distances.

    In float32 on every backend, whatever the dtype of the weights. Compiled once per shape, `k` and form. May be part
    of a larger jitted function, or run on weights whose rows are sharded over a mesh: devices then exchange candidates
    and distances, never the matrix.

    Args:
      weights: floating `[M, N]`, one neuron a row (the transpose of a Flax kernel); `scores` makes it of a gated MLP.
      k: how many, in 1..M. Fewer are the beginning of more.
      form: of `FORMS`.

    Raises:
      InputError: weights that are no floating matrix or not finite, or `k` outside 1..M. Inside a jitted function
        values cannot be refused: where a weight is not finite, all `norms` are infinite and the indices mean nothing.
    """
    weights = jnp.asarray(weights)
    _check(weights, k, form, "[M, N]")
    return _select(weights, int(k), form)


def select_layers(
    weights: Matrix, k: int | np.integer, *, form: str = "blocked", mesh: Mesh | None = None
) -> Selection:
    """`select_with_norms` of layers of one shape, one after the other, in one program.

    Args:
      weights: floating `[L, M, N]`.
      mesh: the layers are split over all its devices, which do not communicate; L need not divide.

    Returns:
      Indices and norms `[L, K]`.

    Raises:
      InputError: as `select_with_norms`.
    """
    weights = jnp.asarray(weights)
    _check(weights, k, form, "[L, M, N]")
    return _select_layers(weights, int(k), form, mesh)


def scores(w12: Float[Array | np.ndarray, "H2 N"], mode: str = "concat") -> Float[Array, "H S"]:
    """The rows that neurons of a gated MLP are selected by. Spec section 1.5.

    Args:
      w12: gate weights, then value weights, H rows each: silu(W12[:H] x) * (W12[H:] x).
      mode: of `MODES`. S is 2 N for "concat", so its rounds have 2 N picks, else N.

    Raises:
      InputError: an unknown mode, no matrix, or an odd number of rows.
    """
    check_choice("mode", mode, MODES)
    if np.ndim(w12) != 2:
        raise InputError(f"w12 must be [2 H, N], found {list(np.shape(w12))}")
    if len(w12) % 2:
        raise InputError(f"w12 must have as many gate as value rows, found {len(w12)} rows")
    gate, value = jnp.split(jnp.asarray(w12), 2)
    return {"concat": jnp.concatenate([gate, value], 1), "gate": gate, "value": value}[mode]


def shortfall(weights: Matrix, indices: Int[Array | np.ndarray, " K"]) -> float:
    """How far a selection is from greedy, in float64 on the host: the certificate of spec section 7.5.

    Where float32 meets a near-tie, orders may differ and both be right; this judges an order by itself.

    Returns:
      The largest of 1 - (squared distance of the pick) / (that of the best row at that moment), over all picks of all
      rounds: 0 where every pick was the best one, about 1e-7 for float32. No more than 1e-5 is asked for.

    Raises:
      InputError: weights that are not finite, or indices that are no distinct rows.
    """
    rows, picks = np.asarray(weights).astype(np.float64), np.asarray(indices)
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise InputError(f"weights must be finite [M, N], found {list(rows.shape)}, or NaN or infinite ones")
    if picks.ndim != 1 or not picks.size or not np.issubdtype(picks.dtype, np.integer):
        raise InputError(f"indices must be whole numbers [K], found {picks.dtype} {list(picks.shape)}")
    if len(set(picks.tolist())) < len(picks) or picks.min() < 0 or picks.max() >= len(rows):
        raise InputError(f"indices must be distinct rows in 0..{len(rows) - 1}, found {picks[:8].tolist()} ...")
    total, taken, worst, done = (rows * rows).sum(1), np.zeros(len(rows), bool), 0.0, 0
    while done < len(picks):
        ahead = picks[done : done + rows.shape[1]]
        left = np.where(taken, -1.0, total)
        floor = (4 * _EPS) ** 2 * rows.shape[1] * left.max()
        if floor == 0:  # only zero rows are left
            break
        basis = np.linalg.qr(rows[ahead].T)[0]
        for at, pick in enumerate(ahead):
            if (best := left.max()) <= floor:
                break
            if at % 128 == 0:
                along = rows @ basis[:, at : at + 128]
            worst = max(worst, 1 - left[pick] / best)
            taken[pick] = True
            left = np.where(taken, -1.0, left - along[:, at % 128] ** 2)
            done += 1
    return float(worst)


def _check(weights: Array, k: Any, form: str, shape: str) -> None:
    check_choice("form", form, FORMS)
    floating = jnp.issubdtype(weights.dtype, jnp.floating)
    if weights.ndim != shape.count(",") + 1 or not floating or 0 in weights.shape:
        raise InputError(f"weights must be floating {shape}, found {weights.dtype} {list(weights.shape)}")
    if isinstance(k, bool) or not isinstance(k, numbers.Integral) or not 1 <= int(k) <= weights.shape[-2]:
        raise InputError(f"K must be a whole number in 1..M = {weights.shape[-2]}, found {k!r}")
    if not isinstance(weights, jax.core.Tracer) and not bool(jnp.isfinite(weights.astype(jnp.float32)).all()):
        raise InputError("weights must be finite in float32, found NaN or infinite ones")


class _Picks(NamedTuple):
    """The first `count` entries of `indices [K]` and `norms [K]` are picked, and so is where `taken [M]` is True."""

    count: Array  # type: ignore[assignment]  # the tuple's own count is not needed
    indices: Array
    norms: Array
    taken: Array


class _Round(NamedTuple):
    """Where a round starts: its rows times 2^-exponent, zero where taken, and their squared norms, -1 where taken.

    It ends at `last` picks, or when no squared distance is above `floor`.
    """

    rows: Array
    squares: Array
    exponent: Array
    last: Array
    floor: Array

    def goes_on(self, picks: _Picks, squares: Array) -> Array:
        return (picks.count < self.last) & (squares.max() > self.floor)

    def add(self, picks: _Picks, rows: Array, norms: Array, count: Array | int) -> _Picks:
        """Picks the first `count` of `rows`."""
        which = jnp.arange(len(rows))
        at = jnp.where(which < count, picks.count + which, len(picks.indices))
        return _Picks(
            picks.count + count,
            picks.indices.at[at].set(rows.astype(jnp.int32), mode="drop"),
            picks.norms.at[at].set(jnp.ldexp(norms, self.exponent), mode="drop"),
            picks.taken.at[jnp.where(which < count, rows, len(picks.taken))].set(True, mode="drop"),
        )


@functools.partial(jax.jit, static_argnames=("k", "form"))
def _select(weights: Array, k: int, form: str) -> Selection:
    weights = weights.astype(jnp.float32)
    height, width = weights.shape
    finite = jnp.isfinite(weights).all()
    pick = {"deflated": _deflated, "lazy": _lazy, "blocked": _blocked}[form]

    def one_round(carry: tuple[_Picks, Array]) -> tuple[_Picks, Array]:
        picks, _ = carry
        rows = jnp.where(picks.taken[:, None] | ~finite, 0, weights)
        # By a power of two, which rounds nothing: squares neither overflow nor vanish.
        exponent = jnp.clip(jnp.frexp(jnp.abs(rows).max())[1], -126, 126)
        rows = rows * jnp.ldexp(jnp.float32(1), -exponent)
        squares = _squares(rows, picks.taken)
        floor = (4 * _EPS) ** 2 * width * squares.max()
        last = jnp.minimum(picks.count + width, k)
        return pick(picks, _Round(rows, squares, exponent, last, floor)), squares.max() > 0

    picks = _Picks(jnp.int32(0), jnp.zeros(k, jnp.int32), jnp.zeros(k, jnp.float32), jnp.zeros(height, bool))
    picks, _ = jax.lax.while_loop(lambda carry: (carry[0].count < k) & carry[1], one_round, (picks, jnp.bool_(True)))
    # What is left now is zero, and taken by index.
    rest, place = jnp.argsort(picks.taken, stable=True).astype(jnp.int32), jnp.arange(k)
    indices = jnp.where(place < picks.count, picks.indices, rest[jnp.maximum(place - picks.count, 0)])
    return Selection(indices, jnp.where(finite, picks.norms, jnp.inf))


@functools.partial(jax.jit, static_argnames=("k", "form", "mesh"))
def _select_layers(weights: Array, k: int, form: str, mesh: Mesh | None) -> Selection:
    def run(weights: Array) -> Selection:
        # Not vmap: it would let all layers wait for the slowest, in as many copies.
        return jax.lax.map(lambda layer: _select(layer, k, form), weights)

    if mesh is None:
        return run(weights)
    layers, spec = len(weights), PartitionSpec(mesh.axis_names)
    padded = jnp.pad(weights, ((0, -layers % mesh.size), (0, 0), (0, 0)))
    found = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(padded)
    return jax.tree.map(lambda x: x[:layers], found)


def _squares(rows: Array, taken: Array) -> Array:
    """Squared norms, -1 where taken."""
    return jnp.where(taken, -1.0, (rows * rows).sum(1))


def _row(rows: Array, index: Array) -> Array:
    """One row. As a gather, of which only the result is exchanged where rows are sharded; a slice moves the matrix."""
    return rows[index[None]][0]


def _direction(rows: Array, index: Array, basis: Array) -> tuple[Array, Array]:
    """Unit vector along what of a row is outside the span of an orthonormal basis (twice is enough), and its length."""
    row = _row(rows, index)
    for _ in range(2):
        row = row - _dot(_dot(basis, row), basis)
    norm = jnp.sqrt((row * row).sum())
    return row / norm, norm


def _deflated(picks: _Picks, start: _Round) -> _Picks:
    """Form A of the spec."""

    def pick(carry: tuple[_Picks, Array, Array]) -> tuple[_Picks, Array, Array]:
        picks, rows, squares = carry
        best = squares.argmax()
        norm = jnp.sqrt(squares[best])
        unit = _row(rows, best) / norm
        rows = rows - jnp.outer(_dot(rows, unit), unit)
        picks = start.add(picks, best[None], norm[None], 1)
        return picks, rows, _squares(rows, picks.taken)

    carry = (picks, start.rows, start.squares)
    return jax.lax.while_loop(lambda carry: start.goes_on(carry[0], carry[2]), pick, carry)[0]


def _lazy(picks: _Picks, start: _Round) -> _Picks:
    """Form B of the spec."""
    begin, size = picks.count, min(*start.rows.shape, len(picks.indices))

    def until_refresh(carry: tuple[_Picks, Array, Array]) -> tuple[_Picks, Array, Array]:
        first, limit = carry[2].max(), carry[0].count + _REFRESH

        def more(carry: tuple[_Picks, Array, Array]) -> Array:
            picks, _, squares = carry
            return start.goes_on(picks, squares) & (picks.count < limit) & (squares.max() >= _GUARD * first)

        def pick(carry: tuple[_Picks, Array, Array]) -> tuple[_Picks, Array, Array]:
            picks, basis, squares = carry
            best = squares.argmax()
            unit, norm = _direction(start.rows, best, basis)
            squares = jnp.maximum(squares - _dot(start.rows, unit) ** 2, 0)
            basis = basis.at[picks.count - begin].set(unit)
            picks = start.add(picks, best[None], norm[None], 1)
            return picks, basis, jnp.where(picks.taken, -1, squares)

        picks, basis, _ = jax.lax.while_loop(more, pick, carry)
        rows = start.rows - _dot(_dot(start.rows, basis.T), basis)
        return picks, basis, _squares(rows, picks.taken)

    carry = (picks, jnp.zeros((size, start.rows.shape[1]), jnp.float32), start.squares)
    return jax.lax.while_loop(lambda carry: start.goes_on(carry[0], carry[2]), until_refresh, carry)[0]


def _blocked(picks: _Picks, start: _Round) -> _Picks:
    """Form C of the spec, with reflections in place of projections.

    After t picks of a round the rows are rotated such that the picks' span is the first t columns. What lies there is
    gone for good: it is set to zero, and from stage to stage cut off, which halves the work where K = N. Some panels of
    picks are rotated for at once; until then all rows only give up what the new columns hold of them, for their
    distances, and the candidates are rotated by themselves.
    """
    begin, width = picks.count, start.rows.shape[1]
    stages = _STAGES if width >= 64 * _STAGES else 1
    cuts = [64 * round(width * stage / stages / 64) for stage in range(stages)] + [width]
    rows, squares = start.rows, start.squares
    for before, cut, after in zip([0, *cuts], cuts, cuts[1:], strict=False):
        if cut >= len(picks.indices):
            break
        stage = start._replace(
            rows=rows[:, cut - before :], squares=squares, last=jnp.minimum(start.last, begin + after)
        )
        picks, rows, squares = _narrow(picks, stage, begin + cut)
    return picks


def _narrow(picks: _Picks, stage: _Round, begin: Array) -> tuple[_Picks, Array, Array]:
    """One stage, whose first column belongs to pick number `begin`. Returns picks, rotated rows, squared distances."""
    height, width = stage.rows.shape
    size = min(_PICKS, height, width)
    column = jnp.arange(width)

    def block(carry: tuple[_Picks, Array, Array]) -> tuple[_Picks, Array, Array]:
        picks, rows, squares = carry
        exact = squares.max()

        def more(carry: tuple[Array, _Picks, Array, _Rotation]) -> Array:
            panel, picks, squares, _ = carry
            return stage.goes_on(picks, squares) & (panel < _PANELS) & (squares.max() >= _GUARD * exact)

        def panel(carry: tuple[Array, _Picks, Array, _Rotation]) -> tuple[Array, _Picks, Array, _Rotation]:
            index, picks, squares, rotation = carry
            used = picks.count - begin
            most = jnp.minimum(stage.last - picks.count, size)
            least = jnp.maximum(stage.floor, _GUARD * exact)
            found = _panel(rows, rotation, squares, used, most, least, size)
            rotation = rotation.then(rows, found.vectors, found.factor, index * size)
            picks = stage.add(picks, found.rows, found.norms, found.count)
            # What of the rows is in the picks' columns now leaves them. A slice does not reach over the end: a mask.
            start = jnp.minimum(used, width - size)
            there = jax.lax.dynamic_slice_in_dim(column, start, size)
            gone = jax.lax.dynamic_slice_in_dim(rows, start, size, 1)
            gone -= _dot(rotation.coefficients, jax.lax.dynamic_slice_in_dim(rotation.vectors, start, size, 1))
            gone = jnp.where((there >= used) & (there < used + found.count), gone, 0)
            squares = jnp.where(picks.taken, -1, jnp.maximum(squares - (gone * gone).sum(1), 0))
            return index + 1, picks, squares, rotation

        most = _PANELS * size
        nothing = _Rotation(*(jnp.zeros(shape, jnp.float32) for shape in ((height, most), (most, width))))
        _, picks, _, rotation = jax.lax.while_loop(more, panel, (jnp.int32(0), picks, squares, nothing))
        rows = rows - _dot(rotation.coefficients, rotation.vectors)
        rows = jnp.where(column < picks.count - begin, 0, rows)
        return picks, rows, _squares(rows, picks.taken)

    carry = (picks, stage.rows, stage.squares)
    return jax.lax.while_loop(lambda carry: stage.goes_on(carry[0], carry[2]), block, carry)


class _Rotation(NamedTuple):
    """A product of reflections that has yet to be applied: rows `[M, N]` become rows - F V.

    Attributes:
      coefficients: F `[M, p]`.
      vectors: V `[p, N]`, zero where no panel has been.
    """

    coefficients: Array
    vectors: Array

    def of(self, rows: Array, which: Array) -> Array:
        """The rotated rows `which`."""
        return rows[which] - _dot(self.coefficients[which], self.vectors)

    def then(self, rows: Array, vectors: Array, factor: Array, place: Array) -> _Rotation:
        """With the reflection x - x V' T V after it, at `place`: rows that are rotated already lose F' V."""
        along = _dot(rows, vectors.T) - _dot(self.coefficients, _dot(self.vectors, vectors.T))
        return _Rotation(
            jax.lax.dynamic_update_slice_in_dim(self.coefficients, _dot(along, factor), place, 1),
            jax.lax.dynamic_update_slice_in_dim(self.vectors, vectors, place, 0),
        )


class _Panel(NamedTuple):
    """The first `count` entries of `rows [p]` and `norms [p]` are picks, whose span x - x V' T V takes to columns.

    Attributes:
      rows: of the matrix; while the panel is being made, of the candidates.
      vectors: V `[p, N]`, Householder's, zero beyond `count`.
      factor: T `[p, p]`, upper triangular, zero beyond `count`.
    """

    count: Array  # type: ignore[assignment]  # the tuple's own count is not needed
    rows: Array
    norms: Array
    vectors: Array
    factor: Array


def _panel(
    rows: Array, rotation: _Rotation, squares: Array, used: Array, most: Array, least: Array, size: int
) -> _Panel:
    """The next picks, 1 to `most` of them, which the reflection takes to the columns from `used` on.

    The lazy form among the candidates, which are the rows with the largest distances. Distances only fall, so as long
    as the best candidate is farther than the best row outside was at the start, it is the next pick.
    LAPACK is not asked: after every call its threads would keep busy the cores that XLA's wait for.
    """
    height, width = rows.shape
    candidates, column = min(_CANDIDATES, height), jnp.arange(width)
    # Without the barriers XLA fuses what is read of it, and sorts all rows.
    top, which = map(jax.lax.optimization_barrier, jax.lax.top_k(squares, min(candidates + 1, height)))
    outside = top[candidates] if candidates < height else jnp.float32(-1)
    which = jnp.sort(which[:candidates])  # among equals the first index is taken
    near = jnp.where(column < used, 0, rotation.of(rows, which))

    def more(carry: tuple[_Panel, Array]) -> Array:
        found, left = carry
        best = left.max()
        return (found.count < most) & ((found.count == 0) | ((best > outside) & (best > least)))

    def pick(carry: tuple[_Panel, Array]) -> tuple[_Panel, Array]:
        (count, order, norms, vectors, factor), left = carry
        best, here = left.argmax().astype(jnp.int32), used + count
        row = _row(near, best)
        row -= _dot(_dot(_dot(vectors, row), factor), vectors)
        row = jnp.where(column < here, 0, row)
        norm = jnp.sqrt((row * row).sum())
        vector = row + jnp.where(column == here, jnp.where(row[here] < 0, -norm, norm), 0)
        scale = 2 / (vector * vector).sum()
        last = jnp.where(jnp.arange(size) == count, scale, -scale * _dot(factor, _dot(vectors, vector)))
        vectors, factor = vectors.at[count].set(vector), factor.at[:, count].set(last)
        # Where the new column comes from, before any reflection.
        unit = jnp.where(column == here, 1, 0) - _dot(_dot(factor, vectors[:, here]), vectors)
        left = (left - _dot(near, unit) ** 2).at[best].set(-1)
        return _Panel(count + 1, order.at[count].set(best), norms.at[count].set(norm), vectors, factor), left

    none = (jnp.zeros(shape, jnp.float32) for shape in ((size,), (size, width), (size, size)))
    left = jnp.where(squares[which] < 0, -1, (near * near).sum(1))
    found, _ = jax.lax.while_loop(more, pick, (_Panel(jnp.int32(0), jnp.zeros(size, jnp.int32), *none), left))
    return found._replace(rows=which[found.rows])
