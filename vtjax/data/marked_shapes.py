# SPDX-License-Identifier: Apache-2.0
"""Procedural scenes with questions whose difficulty is known, in the style of Sort-of-CLEVR (Santoro et al. 2017).

A scene has six objects of six colours on a plain ground, a large one and five small ones: circles, squares, triangles.
Each carries a black mark of 3 x 3 dots, of one pixel each unless told otherwise, whatever the size of the image. Three
questions of each of three types:

- `coarse`, about the large object: its shape, its colour, on which side it lies. Survives strong pooling.
- `relation`, two hops: the shape of what is nearest to (farthest from) an object, how many objects share its shape.
- `fine`: which mark an object carries. Pooling blurs it.

Answers are balanced by construction: example i asks every form about colour and for answer number i in a shuffled
cycle over all pairs, and the scene is drawn so that this is the truth. So within a split every answer of a form comes
equally often (up to one cycle that is not full), also given the text of the question.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from vtjax.errors import InputError

COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 160, 44),
    "blue": (40, 90, 220),
    "orange": (255, 140, 20),
    "purple": (150, 70, 190),
    "cyan": (30, 190, 200),
}
SHAPES = ("circle", "square", "triangle")
SIDES = ("left", "right")
COUNTS = ("1", "2", "3", "4")
MARKS = {
    "minus": ((0, 0, 0), (1, 1, 1), (0, 0, 0)),
    "bar": ((0, 1, 0), (0, 1, 0), (0, 1, 0)),
    "plus": ((0, 1, 0), (1, 1, 1), (0, 1, 0)),
    "ring": ((1, 1, 1), (1, 0, 1), (1, 1, 1)),
}
TYPES = ("coarse", "relation", "fine")
ANSWERS = (*SHAPES, *COLOURS, *SIDES, *COUNTS, *MARKS)
OBJECTS = len(COLOURS)
SMALLEST = 48  # pixels; below it objects would not hold their marks


class Form(NamedTuple):
    """One question: its type, its text with `{}` for a colour, whether it names one, and its answers."""

    type: str
    text: str
    coloured: bool
    answers: tuple[str, ...]


FORMS = {
    "shape": Form("coarse", "what shape is the large object?", False, SHAPES),
    "colour": Form("coarse", "what color is the large object?", False, tuple(COLOURS)),
    "side": Form("coarse", "is the large object on the left or on the right?", False, SIDES),
    "nearest": Form("relation", "what shape is the object nearest to the {} object?", True, SHAPES),
    "farthest": Form("relation", "what shape is the object farthest from the {} object?", True, SHAPES),
    "count": Form("relation", "how many objects have the shape of the {} object?", True, COUNTS),
    "mark": Form("fine", "what mark is on the {} object?", True, tuple(MARKS)),
}
MARKS_ASKED = 3
PATIENCE = 60  # placements after which an example gives up its wishes for the nearest and the farthest shape


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
    """Image `index` of a split and its nine questions, a pure function of the arguments.

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
    return draw(made, size, mark, objects), [ask(made, form, colour) for form, colour in _asked(split, index, seed)]


def scene(split: str, index: int, seed: int, cells: int = 0, objects: float = 1.0) -> Scene:
    """The scene that makes the answers of example `index` what the cycle wants."""
    rng = np.random.default_rng((seed, *split.encode(), index))
    wanted = {form: _wanted(split, seed, form, index) for form in FORMS}
    large, side = wanted["colour"][1], wanted["side"][1]
    marks = rng.integers(len(MARKS), size=OBJECTS)
    for number in range(MARKS_ASKED):
        colour, mark = _mark(split, seed, index, number)
        marks[colour] = mark
    for tries in itertools.count():
        centres = _place(rng, large, side, cells, objects)
        distance = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
        ends = _nearest(distance[wanted["nearest"][0]]), _farthest(distance[wanted["farthest"][0]])
        if ends[0] is None or ends[1] is None:
            continue
        fits = (_EVERY[:, large] == wanted["shape"][1]) & (_alike(wanted["count"][0]) == wanted["count"][1] + 1)
        # A few wishes contradict each other: an object cannot be alone in its shape and have its like nearest to it.
        if tries < PATIENCE:
            fits &= (_EVERY[:, ends[0]] == wanted["nearest"][1]) & (_EVERY[:, ends[1]] == wanted["farthest"][1])
        if fits.any():
            break
    shapes = _EVERY[rng.choice(np.flatnonzero(fits))]
    return Scene(centres, large, shapes, marks, int(rng.integers(205, 246)))


def ask(made: Scene, form: str, colour: int) -> Asked:
    """The question of a form about the object of a colour, answered by looking at the scene."""
    distance = np.linalg.norm(made.centres - made.centres[colour], axis=-1)
    alone = np.where(np.arange(OBJECTS) == colour, np.inf, distance)
    truth: dict[str, Callable[[], int]] = {
        "shape": lambda: int(made.shapes[made.large]),
        "colour": lambda: made.large,
        "side": lambda: int(made.centres[made.large, 1] > 0.5),
        "nearest": lambda: int(made.shapes[alone.argmin()]),
        "farthest": lambda: int(made.shapes[distance.argmax()]),
        "count": lambda: int((made.shapes == made.shapes[colour]).sum()) - 1,
        "mark": lambda: int(made.marks[colour]),
    }
    about = FORMS[form]
    return Asked(about.text.format(tuple(COLOURS)[colour]), about.answers[truth[form]()], about.type)


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
        image[_inside(SHAPES[made.shapes[number]], (rows - centre[0]) / radius, (columns - centre[1]) / radius)] = (
            colour
        )
        top, left = (int(round(c * size)) - 3 * mark // 2 for c in centre)
        dots = np.kron(tuple(MARKS.values())[made.marks[number]], np.ones((mark, mark))) > 0
        image[top : top + 3 * mark, left : left + 3 * mark][dots] = 0
    return image


# All ways to give six objects three shapes, [729, 6].
_EVERY = np.array(list(itertools.product(range(len(SHAPES)), repeat=OBJECTS)))
_LARGE, _SMALL = 0.17, 0.085  # radii
_CORNER = 1.27  # how far the corners of squares and triangles reach, in radii: no two objects touch
_MARGIN = 0.04  # between the nearest and the next one, the farthest and the next one


def _alike(colour: int) -> np.ndarray:
    """How many objects have the shape of that object, in each of the 729 ways."""
    return (_EVERY[:, [colour]] == _EVERY).sum(1)


def _inside(shape: str, down: np.ndarray, across: np.ndarray) -> np.ndarray:
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


def _nearest(distance: np.ndarray) -> int | None:
    """The object nearest to the one at distance 0; None where another one is about as near."""
    order = np.argsort(distance)
    return int(order[1]) if distance[order[2]] - distance[order[1]] >= _MARGIN else None


def _farthest(distance: np.ndarray) -> int | None:
    """The farthest object; None where another one is about as far."""
    order = np.argsort(-distance)
    return int(order[0]) if distance[order[0]] - distance[order[1]] >= _MARGIN else None


def _asked(split: str, index: int, seed: int) -> list[tuple[str, int]]:
    """(form, colour) of the nine questions of an example."""
    forms = [(form, _wanted(split, seed, form, index)[0]) for form in FORMS if form != "mark"]
    return forms + [("mark", _mark(split, seed, index, number)[0]) for number in range(MARKS_ASKED)]


def _wanted(split: str, seed: int, form: str, index: int) -> tuple[int, int]:
    """(colour, answer) that example `index` asks a form about and for."""
    answers, colours = len(FORMS[form].answers), OBJECTS if FORMS[form].coloured else 1
    cycle, place = divmod(index, answers * colours)
    colour, answer = divmod(int(_shuffled(split, seed, form, cycle, answers * colours)[place]), answers)
    return colour, answer


def _mark(split: str, seed: int, index: int, number: int) -> tuple[int, int]:
    """(colour, mark) of one of the questions about marks; their colours differ."""
    colour, mark = _wanted(split, seed, "mark", index)
    # The same mark cycle, moved on: over a whole cycle every pair comes once for each number.
    return (colour + 2 * number) % OBJECTS, (mark + number) % len(MARKS)


@functools.lru_cache(maxsize=64)
def _shuffled(split: str, seed: int, form: str, cycle: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, *split.encode(), *form.encode(), cycle)).permutation(size)
