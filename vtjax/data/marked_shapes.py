# SPDX-License-Identifier: Apache-2.0
"""Procedural scenes with questions whose difficulty is known, in the style of Sort-of-CLEVR (Santoro et al. 2017).

A scene has six objects of six colours on a plain ground, a large one and five small ones: circles, squares, triangles.
Each carries a black mark of 3 x 3 dots, of one pixel each unless told otherwise, whatever the size of the image.
Fifteen questions of four types:

- `coarse`, three about the large object: its shape, its colour, on which side it lies. Survives strong pooling.
- `object`, four about the object of a colour: its shape, its side. What asks for marks is learned from these.
- `relation`, two about a pair: which one is further left, which one is higher.
- `fine`, six: which mark an object carries. Pooling blurs it.

Answers are balanced by construction: example i asks every form about the objects and for the answer number i in a
shuffled cycle over all combinations, and the scene is drawn so that this is the truth. So within a split every answer
of a form comes equally often (up to one cycle that is not full), also given the text of the question; those of
`object` and `relation` nearly so, as a few combinations contradict each other.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from vtjax.errors import InputError

COLOURS = {
    "red": (225, 30, 30),
    "green": (30, 170, 40),
    "blue": (40, 70, 235),
    "yellow": (240, 220, 30),
}
SHAPES = ("circle", "square", "triangle")
SIDES = ("left", "right")
HEIGHTS = ("above", "below")
MARKS = {
    "minus": ((0, 0, 0), (1, 1, 1), (0, 0, 0)),
    "bar": ((0, 1, 0), (0, 1, 0), (0, 1, 0)),
    "plus": ((0, 1, 0), (1, 1, 1), (0, 1, 0)),
    "ring": ((1, 1, 1), (1, 0, 1), (1, 1, 1)),
}
TYPES = ("coarse", "object", "relation", "fine", "list")
OBJECTS = len(COLOURS)
SMALLEST = 48  # pixels; below it objects would not hold their marks

Subjects = tuple[int, ...]
"""Numbers of the objects that a question names by their colours: none, one or two."""


class Form(NamedTuple):
    """One question: its type, its text with `{}` for each colour, how many it names, and its answers."""

    type: str
    text: str
    named: int
    answers: tuple[str, ...]


def _listed(words: Sequence[str]) -> tuple[str, ...]:
    """All answers that say a word about every object, by colour."""
    every = itertools.product(words, repeat=len(COLOURS))
    return tuple(" ".join(itertools.chain(*zip(COLOURS, chosen, strict=True))) for chosen in every)


LISTED = {"shapes": SHAPES, "sides": SIDES, "marks": tuple(MARKS)}
"""Forms that ask for a word about every object, and the words."""

FORMS = {
    "shape": Form("coarse", "shape of the large one?", 0, SHAPES),
    "colour": Form("coarse", "color of the large one?", 0, tuple(COLOURS)),
    "side": Form("coarse", "side of the large one?", 0, SIDES),
    "its_shape": Form("object", "shape of {}?", 1, SHAPES),
    "its_side": Form("object", "side of {}?", 1, SIDES),
    "beside": Form("relation", "is {} left or right of {}?", 2, SIDES),
    "above": Form("relation", "is {} above or below {}?", 2, HEIGHTS),
    "mark": Form("fine", "mark of {}?", 1, tuple(MARKS)),
    **{form: Form("list", f"{form}?", 0, _listed(words)) for form, words in LISTED.items()},
}
WISHED = tuple(form for form in FORMS if form not in LISTED)
ANSWERS = tuple(dict.fromkeys(answer for form in FORMS.values() for answer in form.answers))
TIMES = dict.fromkeys(FORMS, 1) | {"its_shape": 2, "mark": 4}  # how often a form is asked about an image
QUESTIONS = sum(TIMES.values())
PATIENCE = 200  # placements after which an example gives up its wishes for positions


class Scene(NamedTuple):
    """What an image shows. Objects are numbered by colour, in the order of `COLOURS`.

    Attributes:
      centres: float64 `[6, 2]`, (row, column) in units of the side of the image.
      large: number of the large object.
      shapes, marks: number of each object's shape and mark, `[6]`.
      ground: grey level of the ground.
    """

    centres: np.ndarray
    large: int
    shapes: Int[np.ndarray, " objects"]
    marks: Int[np.ndarray, " objects"]
    ground: int


class Asked(NamedTuple):
    """A question about a scene, with its answer, one of `ANSWERS`."""

    text: str
    answer: str
    type: str


def example(
    split: str, index: int, size: int, seed: int, cells: int = 0, mark: int = 1, objects: float = 1.0
) -> tuple[UInt8[np.ndarray, "S S 3"], list[Asked]]:
    """Image `index` of a split and its questions, a pure function of the arguments.

    Args:
      split: its name enters the random stream, so that splits share no scene.
      size: S, the side in pixels, at least `SMALLEST`.
      cells: objects lie in the middle of the cells of a grid of cells x cells, so that a mark lies within one patch of
        that size; 0 = anywhere.
      mark: pixels of one of the 3 x 3 dots of a mark.
      objects: their size, over the usual one.

    Raises:
      InputError: a size that cannot hold the marks.
    """
    made = scene(split, index, seed, cells, objects)
    return draw(made, size, mark, objects), [ask(made, form, subjects) for form, subjects in _asked(split, index, seed)]


def scene(split: str, index: int, seed: int, cells: int = 0, objects: float = 1.0) -> Scene:
    """The scene that makes the answers of example `index` what the cycle wants."""
    rng = np.random.default_rng((seed, *split.encode(), index))
    wanted = {form: _wanted(split, seed, form, index) for form in WISHED}
    large = wanted["colour"][1]
    shapes, marks = rng.integers(len(SHAPES), size=OBJECTS), rng.integers(len(MARKS), size=OBJECTS)
    for form, of in (("its_shape", shapes), ("mark", marks)):
        for number in range(TIMES[form]):
            (named,), answer = _wanted(split, seed, form, index, number)
            of[named] = answer
    # Where two wishes for one object contradict each other, the one that calls it large comes first.
    shapes[large] = wanted["shape"][1]
    if wanted["its_side"][0] == (large,):
        wanted["its_side"] = (large,), wanted["side"][1]
    for tries in itertools.count():
        centres = _place(rng, large, wanted["side"][1], cells, objects)
        if not _clear(centres, wanted):
            continue
        made = Scene(centres, large, shapes, marks, int(rng.integers(118, 139)))
        if tries >= PATIENCE or all(_truth(made, form, wanted[form][0]) == wanted[form][1] for form in _PLACED):
            return made
    raise AssertionError("counting does not end")


def ask(made: Scene, form: str, subjects: Subjects) -> Asked:
    """The question of a form about some objects, answered by looking at the scene."""
    about, colours = FORMS[form], tuple(COLOURS)
    text = about.text.format(*(colours[number] for number in subjects))
    return Asked(text, about.answers[_truth(made, form, subjects)], about.type)


def draw(made: Scene, size: int, mark: int = 1, objects: float = 1.0) -> UInt8[np.ndarray, "S S 3"]:
    """The image of a scene, `size` pixels wide and high; edges are not smoothed.

    Raises:
      InputError: a size below `SMALLEST`.
    """
    if size < SMALLEST:
        raise InputError(f"size must be at least {SMALLEST} pixels, found {size}")
    image = np.full((size, size, 3), made.ground, np.uint8)
    rows, columns = (np.indices((size, size)) + 0.5) / size
    for number, colour in enumerate(COLOURS.values()):
        centre, radius = made.centres[number], objects * _radius(number, made.large)
        image[inside(SHAPES[made.shapes[number]], (rows - centre[0]) / radius, (columns - centre[1]) / radius)] = colour
        top, left = (int(round(c * size)) - 3 * mark // 2 for c in centre)
        dots = np.kron(tuple(MARKS.values())[made.marks[number]], np.ones((mark, mark))) > 0
        image[top : top + 3 * mark, left : left + 3 * mark][dots] = 0
    return image


_PLACED = ("its_side", "beside", "above")  # forms whose answers are positions that are drawn until they fit
_LARGE, _SMALL = 0.2, 0.13  # radii
_CORNER = 1.27  # how far the corners of squares and triangles reach, in radii: no two objects touch
_MARGIN = 0.05  # by which a position that is asked for differs from the one it is compared with


def _truth(made: Scene, form: str, subjects: Subjects) -> int:
    """The number of the right answer."""
    about = subjects or (made.large,)
    place = made.centres[about[0]]
    other = made.centres[about[1]] if len(about) > 1 else np.array([0.5, 0.5])
    if form in LISTED:
        said = {"shapes": made.shapes, "sides": made.centres[:, 1] > 0.5, "marks": made.marks}[form]
        return int(np.ravel_multi_index(said.astype(int), (len(LISTED[form]),) * OBJECTS))
    truth: dict[str, Any] = {
        **dict.fromkeys(("shape", "its_shape"), made.shapes[about[0]]),
        **dict.fromkeys(("side", "its_side", "beside"), place[1] > other[1]),
        **{"colour": made.large, "above": place[0] > other[0], "mark": made.marks[about[0]]},
    }
    return int(truth[form])


def _clear(centres: np.ndarray, wanted: dict[str, tuple[Subjects, int]]) -> bool:
    """Whether the positions that are asked for are not about the same."""
    (one,), (left, right), (upper, lower) = (wanted[form][0] for form in _PLACED)
    apart = (
        centres[one, 1] - 0.5,
        centres[left, 1] - centres[right, 1],
        centres[upper, 0] - centres[lower, 0],
    )
    return bool(min(map(abs, apart)) >= _MARGIN)


def inside(shape: str, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Where a shape covers the plane; its centre is the origin, and 1 the radius of a circle of about its area."""
    if shape == "circle":
        return down**2 + across**2 <= 1
    if shape == "square":
        return np.maximum(np.abs(down), np.abs(across)) <= 0.89
    return (down <= 0.75) & (down + 1 >= 1.75 * np.abs(across))


def _radius(number: int, large: int) -> float:
    return _LARGE if number == large else _SMALL


def _place(rng: np.random.Generator, large: int, side: int, cells: int, objects: float) -> np.ndarray:
    """Centres of six objects that do not touch, the large one wholly on its side."""
    wide, narrow = objects * _LARGE, objects * _SMALL
    low, high = (0.5 + wide, 1 - wide) if side else (wide, 0.5 - wide)

    def settled(centre: np.ndarray, low: Any, high: Any) -> np.ndarray:
        """In the middle of a cell between the bounds."""
        if not cells:
            return centre
        first, last = (np.asarray(bound) * cells - 0.5 for bound in (low, high))
        return (np.clip(np.round(centre * cells - 0.5), np.ceil(first), np.floor(last)) + 0.5) / cells

    small = [number for number in range(OBJECTS) if number != large]
    centres = np.zeros((OBJECTS, 2))
    while True:
        drawn_large = np.array([rng.uniform(wide, 1 - wide), rng.uniform(low, high)])
        centres[large] = settled(drawn_large, (wide, low), (1 - wide, high))
        # Free places out of thirty: the first that touches nothing placed before.
        edge = 1.2 * narrow
        drawn = settled(rng.uniform(edge, 1 - edge, (30, 2)), edge, 1 - edge)
        free = np.linalg.norm(drawn - centres[large], axis=-1) >= _CORNER * (wide + narrow)
        for number in small:
            if not free.any():
                break
            centres[number] = drawn[free.argmax()]
            free &= np.linalg.norm(drawn - centres[number], axis=-1) >= _CORNER * 2 * narrow
        else:
            return centres


def _asked(split: str, index: int, seed: int) -> list[tuple[str, Subjects]]:
    """(form, subjects) of the questions of an example."""
    return [
        (form, _wanted(split, seed, form, index, number)[0] if form in WISHED else ())
        for form in FORMS
        for number in range(TIMES[form])
    ]


def _wanted(split: str, seed: int, form: str, index: int, number: int = 0) -> tuple[Subjects, int]:
    """(subjects, answer) that example `index` asks a form about and for, for the `number`-th time."""
    every = list(itertools.permutations(range(OBJECTS), FORMS[form].named))
    answers = len(FORMS[form].answers)
    cycle, place = divmod(index, answers * len(every))
    about, answer = divmod(int(_shuffled(split, seed, form, cycle, answers * len(every))[place]), answers)
    if number:
        # Another object, and the answer moved on by as much for all answers of a cycle: every pair comes once again.
        answer += int(
            np.random.default_rng((seed, *split.encode(), *form.encode(), cycle, about, number)).integers(answers)
        )
        about = (about + number) % len(every)
    return every[about], answer % answers


@functools.lru_cache(maxsize=64)
def _shuffled(split: str, seed: int, form: str, cycle: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, *split.encode(), *form.encode(), cycle)).permutation(size)
