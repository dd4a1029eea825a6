# SPDX-License-Identifier: Apache-2.0
"""Where named weights and data are looked for (design: section 4, `VTJAX_DATA`)."""

from __future__ import annotations

import os
from pathlib import Path

from vtjax.errors import InputError

_CHECKOUT = Path(__file__).resolve().parent.parent


def cache_dir() -> Path:
    """The user's cache, the only place where prepared sets are written (`VTJAX_CACHE` moves it)."""
    if "VTJAX_CACHE" in os.environ:
        return Path(os.environ["VTJAX_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "vtjax"


def search_path() -> tuple[Path, ...]:
    """Folders in the order in which they are searched: `VTJAX_DATA`, else `data/` of the checkout; then the cache."""
    env = os.environ.get("VTJAX_DATA")
    first = [Path(p).expanduser() for p in env.split(os.pathsep) if p] if env else [_CHECKOUT / "data"]
    return (*first, cache_dir())


def find(name: str) -> Path | None:
    """First existing `folder/name` along the search path, or None."""
    for folder in search_path():
        if (folder / name).exists():
            return folder / name
    return None


def require(name: str, how: str) -> Path:
    """As `find`, but raises.

    Args:
      name: file or folder name, relative to the folders of the search path.
      how: how to get what is missing; ends the message.

    Raises:
      InputError: naming the file, the folders searched and `how`.
    """
    found = find(name)
    if found is None:
        looked = ", ".join(str(p) for p in search_path())
        raise InputError(f"{name!r} was not found in {looked} (search path VTJAX_DATA); {how}")
    return found
