# SPDX-License-Identifier: Apache-2.0
"""The specs of adapters, and lists of modules to skip."""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from vtjax.errors import InputError
from vtjax.spec import fields

FORMS = ("bottleneck", "router", "residual")
NORM_PLACES = ("none", "in", "out")
INITS = ("normal", "xavier")


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """A small trained module beside, before or in place of a frozen layer (DAS spec, section 3).

    Attributes:
      form: "bottleneck", s up(relu(down(x))) (METER, ViLT, LLaMA); "router", two grouped linear up-maps, mixed by
        weights that the first token decides (LaVIN); "residual", x + up(relu(down(x))) (LLaVA).
      width: of the bottleneck, h.
      norm: where a bottleneck has a LayerNorm of its own: "none", "in" (before the down-projection) or "out" (after
        the scale).
      scale: s; the initial value where it is `learned`.
      learned: s is trained.
      init: "normal" (deviation 0.02) or "xavier", of the weights. A router's grouped up-maps start at 0 in any case.
      zero: the up-projection starts at 0, so that the adapter adds nothing at first.
      groups: of a router's up-maps; divides the width and the model's.
      temperature: of a router's weights, t.
      dropout: rate on a router's bottleneck while training.
    """

    form: str
    width: int
    norm: str = "none"
    scale: float = 1.0
    learned: bool = False
    init: str = "normal"
    zero: bool = False
    groups: int = 2
    temperature: float = 10.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        fields.choice(self, "form", FORMS)
        fields.choice(self, "norm", NORM_PLACES)
        fields.choice(self, "init", INITS)
        if self.width <= 0:
            raise InputError(f"AdapterSpec.width must be above 0, found {self.width}")
        if not math.isfinite(self.scale):
            raise InputError(f"AdapterSpec.scale must be finite, found {self.scale}")
        if self.form != "bottleneck" and (self.norm != "none" or self.learned):
            raise InputError(f"AdapterSpec.norm and learned are a bottleneck's, found them with form={self.form!r}")
        if self.form == "residual" and self.scale != 1.0:
            raise InputError(f"AdapterSpec.form='residual' has no scale, found {self.scale}")
        if self.form == "router" and (self.groups <= 0 or self.width % self.groups):
            raise InputError(f"AdapterSpec.groups must divide width={self.width}, found {self.groups}")
        if not 0 < self.temperature < math.inf:
            raise InputError(f"AdapterSpec.temperature must be above 0, found {self.temperature}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"AdapterSpec.dropout must be in [0, 1), found {self.dropout}")

    def check(self, d: int) -> None:
        """Raises InputError where a model of width d cannot have it."""
        if self.form == "router" and d % self.groups:
            raise InputError(f"AdapterSpec.groups must divide the model's width {d}, found {self.groups}")

    def params(self, d: int, norm: bool = True) -> int:
        """Parameters beside a stream of width d; without `norm` as published counts have it, norms left out."""
        h, bias = self.width, self.width + d
        if self.form == "router":
            return d * h + h + 2 * (d * h // self.groups + d) + 2 * d + 2
        own = 2 * d if norm and self.norm != "none" else 0
        return 2 * d * h + bias + own + int(self.learned)

    def macs(self, d: int, tokens: int) -> int:
        """MACs for a sequence of so many tokens."""
        if self.form == "router":
            return tokens * (d * self.width + 2 * d * self.width // self.groups) + 2 * d
        return 2 * tokens * d * self.width

    def edit(self, **changes: Any) -> AdapterSpec:
        """A copy with some fields replaced; raises InputError as the constructor."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> AdapterSpec:
        """Raises InputError for unknown or missing fields and wrong types, by name."""
        found: AdapterSpec = fields.build(cls, data, cls.__name__)
        return found


def skip_list(skips: Any, arms: int) -> tuple[int, ...]:
    """A list of modules to skip in its one canonical form, ascending.

    Args:
      skips: whole numbers in any order, or such a list as text (`"[1, 2]"`), as a config or a command line has it.
      arms: how many modules there are.

    Raises:
      InputError: what is no list of whole numbers, one that is out of range, or one that stands twice.
    """
    given = skips
    if isinstance(skips, str):
        try:
            skips = ast.literal_eval(skips)
        except (SyntaxError, ValueError):
            skips = None
        skips = (skips,) if isinstance(skips, int) else skips
    if not isinstance(skips, Iterable) or isinstance(skips, str | bytes | dict):
        raise InputError(f"skips must be a list of modules, found {given!r}")
    numbers = []
    for skip in skips:
        try:
            number = None if isinstance(skip, bool | float | str) else skip.__index__()
        except (AttributeError, TypeError):
            number = None
        if number is None:
            raise InputError(f"skips must hold whole numbers, found {skip!r}")
        if not 0 <= number < arms:
            raise InputError(f"skips must be in 0..{arms - 1}, found {number}")
        if number in numbers:
            raise InputError(f"skips must name each module once, found {number} twice")
        numbers.append(number)
    return tuple(sorted(numbers))
