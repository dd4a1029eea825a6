# SPDX-License-Identifier: Apache-2.0
"""The search for the longest input that fits stops between two lengths that were compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from experiments.lvxattn import memory

LIMIT = 16_000


@pytest.mark.parametrize(
    "size",
    [
        lambda keys: 1000 + keys / 100,
        lambda keys: 1000 + 14 * math.sqrt(keys),  # less and less per key, as XLA shares buffers
        lambda keys: keys / 20,
        lambda keys: 3000 + keys / 100 + (5000 if keys > 700_000 else 0),
    ],
)
def test_the_longest_input_is_between_one_that_fits_and_one_that_does_not(
    size: Callable[[int], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def planned(topology: str, layers: int, mode: str, strategy: str, keys: int, turns: str) -> dict[str, Any]:
        tried.append(keys)
        return {"keys": keys, "fits": size(keys) <= LIMIT, "hbm_bytes_per_device": size(keys), "hbm_limit": LIMIT}

    monkeypatch.setattr(memory, "planned", planned)
    fits, above = memory.between("v5e:2x4", "names", "gather_q", 8)
    assert fits["fits"] and not above["fits"] and fits["keys"] < above["keys"] <= memory.BRACKET * fits["keys"]
    assert {fits["keys"], above["keys"]} <= set(tried) and all(keys % (8 * 512) == 0 for keys in tried)
    with pytest.raises(RuntimeError, match="no length between 1048576 and None in 1 compiles"):
        monkeypatch.setattr(memory, "planned", lambda *given: {**planned(*given), "fits": True})
        memory.between("v5e:2x4", "names", "gather_q", 8, most=1)
