# SPDX-License-Identifier: Apache-2.0
"""Compilations are kept for the tests of this folder and their child processes: most of them build one program."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

SETTINGS = {
    "jax_compilation_cache_dir": "",
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@pytest.fixture(autouse=True, scope="package")
def compilations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    wanted = {**SETTINGS, "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compilations"))}
    former = {name: getattr(jax.config, name) for name in wanted}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in wanted.items():
            patch.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
        for name, value in former.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
