# SPDX-License-Identifier: Apache-2.0
"""Rows of token ids: questions about the same image share its prefix, and none sees another one.

A row is prefix | question 1 | question 2 | ... | padding. `segments` says which is which: 0 = prefix, q = question q,
-1 = padding. A question's positions go on from the prefix, as if it were alone; `ops.packing.attention_mask` lets it
attend to the prefix and to itself. So each question gives what it gives in a row of its own. Letters: S tokens,
Q questions of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from vtjax.data.conversation import Encoded
from vtjax.errors import InputError


class Row(NamedTuple):
    """One row of a batch.

    Attributes:
      input_ids: tokens, placeholders of images included.
      positions: of each token in its conversation; 0 for padding.
      segments: 0 = shared prefix, 1..Q = question, -1 = padding.
      labels: the token that comes next in the conversation, where it is learned; else 0.
      weights: 1 where the label is learned, else 0.
    """

    input_ids: Int32[np.ndarray, " S"]
    positions: Int32[np.ndarray, " S"]
    segments: Int32[np.ndarray, " S"]
    labels: Int32[np.ndarray, " S"]
    weights: Float32[np.ndarray, " S"]


def row(conversations: Sequence[Encoded], prefix: int, length: int, pad: int) -> Row:
    """Conversations that begin with the same `prefix` tokens in one row of `length`.

    Args:
      prefix: tokens that they share, of which none is learned; 0 with one conversation: it shares nothing.
      length: S.
      pad: fills the row up.

    Raises:
      InputError: no conversation; other first tokens; a prefix that holds learned ones, or leaves nothing before the
        first learned one; more than `length` tokens.
    """
    if not conversations:
        raise InputError("a row must hold at least one conversation, found none")
    shared = conversations[0].ids[:prefix]
    total = size([len(c.ids) for c in conversations], prefix)
    if total > length:
        raise InputError(f"a row must have at most {length} tokens, found {total}")
    arrays = [np.zeros(length, np.int32) for _ in range(4)]
    ids, positions, segments, labels = arrays
    weights = np.zeros(length, np.float32)
    ids[:], segments[:] = pad, -1
    ids[:prefix], positions[:prefix], segments[:prefix] = shared, np.arange(prefix), 0
    start = prefix
    for number, one in enumerate(conversations, 1):
        if not np.array_equal(one.ids[:prefix], shared):
            raise InputError(f"the conversations of a row must share their first {prefix} tokens, found others")
        # The first token of a question cannot be learned: what comes before it in the row is another question's.
        if one.learned[: prefix + 1].any():
            raise InputError(f"nothing may be learned before token {prefix + 1} of a conversation, found such tokens")
        here = slice(start, start + len(one.ids) - prefix)
        ids[here] = one.ids[prefix:]
        positions[here] = np.arange(prefix, len(one.ids))
        segments[here] = number
        labels[here][:-1] = np.where(one.learned, one.ids, 0)[prefix + 1 :]
        weights[here][:-1] = one.learned[prefix + 1 :]
        start = here.stop
    return Row(ids, positions, segments, labels, weights)


def size(lengths: Sequence[int], prefix: int) -> int:
    """Tokens of a row of conversations of these lengths."""
    return prefix + sum(lengths) - prefix * len(lengths)


def share(lengths: Sequence[int], prefix: int, most: int, limit: int = 0) -> list[range]:
    """Which neighbours go into a row together: as few rows as possible, of numbers that differ by at most one.

    Args:
      lengths: tokens of each conversation, prefix included, all with the same prefix.
      most: conversations of a row.
      limit: tokens of a row; 0 = any number.

    Raises:
      InputError: a conversation that is longer than the limit by itself.
    """
    if limit and max(lengths) > limit:
        raise InputError(f"a question must have at most {limit} tokens with its image, found {max(lengths)}")
    for rows in range(-(-len(lengths) // most), len(lengths) + 1):
        edges = np.linspace(0, len(lengths), rows + 1).round().astype(int).tolist()
        parts = [range(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
        if not limit or all(size([lengths[i] for i in part], prefix) <= limit for part in parts):
            return parts
    raise AssertionError("rows of one conversation fit")


def buckets(lengths: Sequence[int], count: int, multiple: int = 8) -> tuple[int, ...]:
    """At most `count` row lengths, multiples of `multiple`, ascending: the quantiles of `lengths`; the last one is
    enough for all."""
    quantiles = np.quantile(np.asarray(lengths), np.arange(1, count + 1) / count, method="higher")
    return tuple(sorted({-(-int(q) // multiple) * multiple for q in quantiles}))
