# SPDX-License-Identifier: Apache-2.0
"""Where named weights and data are looked for (design: section 4, `VTJAX_DATA`)."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from vtjax.errors import InputError, MissingExtraError

_CHECKOUT = Path(__file__).resolve().parent.parent


def cache_dir() -> Path:
    """The user's cache, the only place where prepared sets are written (`VTJAX_CACHE` moves it)."""
    if "VTJAX_CACHE" in os.environ:
        return Path(os.environ["VTJAX_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "vtjax"


def search_path() -> tuple[Path | str, ...]:
    """Folders in the order in which they are searched: `VTJAX_DATA`, else `data/` of the checkout; then the cache.
    Those on other machines (`gs://...`) are texts."""
    env = os.environ.get("VTJAX_DATA")
    parts = [p for p in re.split(rf"{re.escape(os.pathsep)}(?!//)", env) if p] if env else []
    first = [p if is_url(p) else Path(p).expanduser() for p in parts] or [_CHECKOUT / "data"]
    return (*first, cache_dir())


def find(name: str) -> Path | None:
    """First existing `folder/name` along the search path, or None; a local copy of it where the folder is not local."""
    for folder in search_path():
        if isinstance(folder, Path):
            if (folder / name).exists():
                return folder / name
        elif (found := fetch(f"{folder.rstrip('/')}/{name}")) is not None:
            return found
    return None


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is not on this machine: `gs://...` and the like."""
    return "://" in os.fspath(path)


def is_workdir(path: str | os.PathLike[str]) -> bool:
    """Whether a local or remote folder is the workdir of a run."""
    folder: Any = Path(path)
    if is_url(path):
        from etils import epath

        check_url(os.fspath(path))
        folder = epath.Path(path)
    return (folder / "checkpoints").is_dir()


def check_url(path: str) -> None:
    """Raises `MissingExtraError` where the package that reaches such a place is not installed."""
    if path.startswith("gs://") and importlib.util.find_spec("gcsfs") is None:
        raise MissingExtraError("gcsfs", "gcs", f"{path}")


def fetch(url: str) -> Path | None:
    """A local copy of a file or folder at `gs://...`, in the user's cache; None where there is nothing at `url`.

    Weights are memory-mapped and archives read at random, so they have to be here. A copy is made whole or not at all,
    and anew where the size or the time of a file has changed.

    Raises:
      InputError: the place cannot be reached, or the cache cannot be written.
    """
    from etils import epath

    check_url(url)
    try:
        source = epath.Path(url)
        if not source.exists():
            return None
        files = _files(source)
        found = sorted((os.fspath(p), p.stat().length, p.stat().mtime) for p in files)
        state = hashlib.sha256(repr(found).encode()).hexdigest()[:16]
        target = cache_dir() / "remote" / state / source.name
        if not target.exists():
            print(f"fetching {url}, {sum(size for _, size, _ in found) / 2**20:.0f} MiB", file=sys.stderr, flush=True)
            target.parent.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent.parent))
            for file in files:
                inside = partial / source.name / os.fspath(file).removeprefix(os.fspath(source)).lstrip("/")
                inside.parent.mkdir(parents=True, exist_ok=True)
                with file.open("rb") as there, open(inside, "wb") as here:
                    shutil.copyfileobj(there, here, 1 << 24)
            with contextlib.suppress(OSError):  # another process was faster
                partial.rename(target.parent)
            shutil.rmtree(partial, ignore_errors=True)
        return target
    except InputError:
        raise
    except Exception as error:  # of the file system behind the URL, each of which raises its own
        raise InputError(f"{url} cannot be read: {' '.join(str(error).split())[:300]}") from None


def _files(path: Any) -> list[Any]:
    """The files below a folder, itself where it is one."""
    return [file for child in path.iterdir() for file in _files(child)] if path.is_dir() else [path]


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
