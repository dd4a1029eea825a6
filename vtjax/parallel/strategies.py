# SPDX-License-Identifier: Apache-2.0
"""What each way to distribute cross-attention sends, and how long it should take; `choose` takes the shortest.

All of it is arithmetic on static shapes, done while tracing. Bytes are those that one device sends for one layer, exact
(spec section 3.3); seconds are a model (section 6.5) with the numbers of a `Hardware`, good for comparing strategies.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

STRATEGIES = (
    "gather_q",
    "gather_q_scatter",
    "ring_q",
    "ring_kv",
    "ring_kv_expanded",
    "ulysses",
    "replicated_q",
    "gspmd",
    "local",
)
STATISTIC = 4  # bytes of a log-sum-exp


class Case(NamedTuple):
    """Sizes of a call: devices, batch, rows of text, visual tokens, query heads, key heads, head width, bytes of an
    element, and of one of a partial result (`wire`); 0 where these are equal."""

    n: int
    batch: int
    rows: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    bytes: int
    wire: int = 0

    @property
    def partial(self) -> float:
        """How much larger partial results are than what they are made of."""
        return self.wire / self.bytes if self.wire else 1.0

    @property
    def q(self) -> int:
        """Bytes of all queries; outputs and gradients have as many."""
        return self.batch * self.rows * self.heads * self.head_dim * self.bytes

    @property
    def statistics(self) -> int:
        """Bytes of one float32 per row and head."""
        return self.batch * self.rows * self.heads * STATISTIC

    @property
    def kv(self) -> int:
        """Bytes of all keys and values."""
        return 2 * self.batch * self.keys * self.kv_heads * self.head_dim * self.bytes


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device and its links. The defaults are about a TPU v5e's.

    Attributes:
      flops: of matrix products, per second, as a kernel reaches them.
      memory: bytes per second.
      link: bytes per second that a device sends.
      latency: seconds of one collective.
      tile: rows of queries that a kernel keeps while keys pass by.
      torus: dimensions of the network; 0 = a switch. On a torus of many devices an all-to-all crosses most links.
      buffers: bytes for what a strategy holds of queries or keys that are not the device's own.
    """

    flops: float = 100e12
    memory: float = 800e9
    link: float = 90e9
    latency: float = 4e-6
    tile: int = 1024
    torus: int = 2
    buffers: float = 4 * 2**30

    def __post_init__(self) -> None:
        """Raises ValueError for what is no size."""
        sizes = self.flops, self.memory, self.link, self.tile, self.buffers
        if min(sizes) <= 0 or min(self.latency, self.torus) < 0:
            raise ValueError(f"hardware must have positive sizes, and latency and torus of 0 or more, found {self}")

    def stretch(self, n: int) -> float:
        """How much longer an all-to-all over n devices takes than a reduction of as many bytes (spec section 6.4)."""
        return max(1.0, n ** (1 / self.torus) / 4) if self.torus else 1.0


V5E = Hardware()


class Sent(NamedTuple):
    """Bytes that a device sends in the forward and the backward pass, collectives that wait for each other, and bytes
    of all of them that all-to-alls send."""

    forward: float
    backward: float
    steps: int
    exchanged: float = 0


def sent(case: Case, strategy: str) -> Sent:
    """What one device sends for one layer.

    Raises:
      ValueError: sizes below 1, query heads that are no multiple of key heads; an unknown strategy; "gspmd", whose
        collectives are the partitioner's.
    """
    if min(case[:-1]) < 1 or case.wire < 0 or case.heads % case.kv_heads:
        raise ValueError(f"sizes must be 1 or more, and query heads a multiple of key heads, found {case}")
    r, n, w = (case.n - 1) / case.n, case.n, case.partial
    q, known, kv = case.q, case.statistics, case.kv
    wide = kv * case.heads // case.kv_heads
    found = {
        "local": Sent(0, 0, 0),
        "gather_q": Sent(
            r * (q + w * q + known), r * (2 * q + w * q + 2 * known), 4, exchanged=r * (2 * w * q + known)
        ),
        "gather_q_scatter": Sent(r * (q + w * q + 3 * known), r * (2 * q + w * q + 2 * known), 5),
        "ring_q": Sent(r * (q + w * q + known), r * (2 * q + w * q + 2 * known), 2 * n),
        "ring_kv": Sent(r * kv, (1 + w) * r * kv, 2 * n),
        "ring_kv_expanded": Sent(r * wide, (1 + w) * r * wide, 2 * n),
        "ulysses": Sent(
            r / n * (2 * q + kv + known),
            r / n * (3 * q + 2 * kv + 2 * known),
            4,
            exchanged=r / n * (5 * q + 3 * kv + 3 * known),
        ),
        "replicated_q": Sent(
            (n - 1) * case.batch * case.rows * case.heads * (case.head_dim + 1) * STATISTIC,
            2 * r * case.batch * case.rows * case.heads * case.head_dim * STATISTIC,
            2,
        ),
    }
    if strategy not in found:
        raise ValueError(f"strategy must be one of {', '.join(found)}, found {strategy!r}")
    return found[strategy] if n > 1 else Sent(0, 0, 0)


def held(case: Case, strategy: str) -> float:
    """Bytes that a device holds of others while it attends, the larger of both passes: all queries with what they find,
    in float32 and as it travels, or with two gradients; two blocks of a ring; all devices' parts (spec section 6.5).

    Raises:
      ValueError: as `sent`.
    """
    sent(case, strategy)
    if case.n == 1 or strategy == "local":
        return 0.0
    q, w, n = case.q, case.partial, case.n
    everywhere = q + max(q * STATISTIC / case.bytes + w * q, (1 + w) * q)
    wide = case.kv * case.heads // case.kv_heads
    return {
        "gather_q": everywhere,
        "gather_q_scatter": everywhere,
        "ring_q": 2 * (2 + w) * q / n,
        "ring_kv": 2 * (1 + w) * case.kv / n,
        "ring_kv_expanded": 2 * (1 + w) * wide / n,
        "ulysses": (3 * q + 2 * case.kv) / n,
        "replicated_q": n * case.batch * case.rows * case.heads * (case.head_dim + 1) * STATISTIC,
    }[strategy]


def seconds(case: Case, strategy: str, hardware: Hardware = V5E) -> float:
    """Forward and backward pass of one layer: work, or the memory traffic of the keys, and what is sent. Rings send
    beside the work; the others in front of it and behind it."""
    n, moved = case.n, sent(case, strategy)
    work = (4 + 14) * case.batch * case.rows * case.keys * case.heads * case.head_dim / (n * hardware.flops)
    group = case.heads // case.kv_heads
    ring = strategy.startswith("ring")
    passes = (n if ring else 1) * math.ceil(max(case.rows // n if ring else case.rows, 1) * group / hardware.tile)
    read = 3 * passes * case.kv / (n * hardware.memory)
    longer = (hardware.stretch(n) - 1) * moved.exchanged
    over = (moved.forward + moved.backward + longer) / hardware.link
    busy, waits = max(work, read), moved.steps * hardware.latency
    return (max(busy, over) if ring else busy + over) + waits


def choose(case: Case, hardware: Hardware = V5E) -> str:
    """The strategy that should take the least time, of those that `hardware.buffers` has room for; `ulysses` where the
    key heads divide.

    A ring must save a tenth of the time: that its hops hide behind work is the model's hope, and `gather_q` reads the
    keys once and holds no copies of them (spec sections 6.4 and 6.5).
    """
    sent(case, "local")  # refuses what is no case
    if case.n == 1:
        return "local"
    able = ["gather_q", "gather_q_scatter", "ring_q", "ring_kv"]
    if case.rows < case.n:  # of more, a device has its own rows only: they would be gathered first
        able.append("replicated_q")
    if case.kv_heads % case.n == 0:
        able.append("ulysses")
    fits = [strategy for strategy in able if held(case, strategy) <= hardware.buffers]
    able = fits or [min(able, key=lambda strategy: held(case, strategy))]

    def cost(strategy: str) -> float:
        return seconds(case, strategy, hardware) / (0.9 if strategy.startswith("ring") else 1.0)

    return min(able, key=cost)
