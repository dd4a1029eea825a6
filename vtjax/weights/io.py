# SPDX-License-Identifier: Apache-2.0
"""Reading and writing safetensors files: checked before use, memory-mapped, never half-written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from vtjax.errors import InputError

# BF16 has no numpy dtype: it is the upper half of a float32.
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"} | {
    f"{sign}{bits}": f"<{sign.lower()}{bits // 8}" for sign in "IU" for bits in (8, 16, 32, 64)
}
_DTYPES["BOOL"] = "|b1"
_BYTES = {"F8_E4M3": 1, "F8_E5M2": 1} | {k: int(v[2:]) for k, v in _DTYPES.items()}

_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
_CONVERT = "a pickle can run any code when it is opened: convert it to safetensors where it came from"


class File(Mapping[str, np.ndarray]):
    """One safetensors file as a mapping from names to arrays, read on access.

    float16, bfloat16 and float64 come as float32; integers and booleans keep their type.

    Attributes:
      shapes: shape of every array, without reading it.
      metadata: the file's text metadata.

    Raises:
      InputError: one line that names the file and what is wrong: not a safetensors file (a pickle, an HTML page, a
        Git LFS pointer), truncated, a damaged header, a name that occurs twice.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            size = self.path.stat().st_size
            with open(self.path, "rb") as file:
                start = file.read(8)
                _sniff(self.path, start + file.read(64))
                file.seek(8)
                length = int.from_bytes(start, "little")
                if size < 8 or length > size - 8:
                    raise InputError(
                        f"{path} is truncated or not a safetensors file: expected a header of {length} bytes, "
                        f"found {max(size - 8, 0)}"
                    )
                header = _header(self.path, file.read(length))
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self._entries = {name: _entry(self.path, name, value) for name, value in header.items()}
        self.shapes = {name: entry[1] for name, entry in self._entries.items()}
        _contiguous(self.path, [entry[2:] for entry in self._entries.values()], size - 8 - length)
        self._data = (
            np.memmap(self.path, np.uint8, "r", offset=8 + length) if size > 8 + length else np.zeros(0, np.uint8)
        )

    def __getitem__(self, name: str) -> np.ndarray:
        dtype, shape, begin, end = self._entries[name]
        if dtype not in _DTYPES:
            raise InputError(f"{self.path}: {name} must be float32, float16 or bfloat16, found {dtype}")
        array = self._data[begin:end].view(_DTYPES[dtype]).reshape(shape)
        if dtype == "BF16":
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32) if dtype[0] == "F" else np.array(array)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class Files(Mapping[str, np.ndarray]):
    """Several files as one; a name may occur in one of them only."""

    def __init__(self, files: list[File]):
        self._home: dict[str, File] = {}
        for file in files:
            for name in file:
                if name in self._home:
                    raise InputError(f"{name} occurs twice: in {self._home[name].path} and in {file.path}")
                self._home[name] = file
        self.shapes = {name: file.shapes[name] for name, file in self._home.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._home[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)


def read_folder(folder: Path) -> Files:
    """The weights of a folder: `model.safetensors`, else the shards of `model.safetensors.index.json`, else the only
    safetensors file there.

    Raises:
      InputError: no weights, several candidates, pickles only, a shard that is missing or lacks a name of the index.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return Files([File(single)])
    if index.exists():
        return _sharded(folder, index)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return Files([File(found[0])])
    if found:
        names = ", ".join(p.name for p in found)
        raise InputError(f"{folder} must hold model.safetensors, its index, or one safetensors file, found {names}")
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise InputError(f"{folder} holds no safetensors file, only {pickles[0]}; {_CONVERT}")
    raise InputError(
        f"{folder} must hold model.safetensors or model.safetensors.index.json (or a finished run), found neither"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises `InputError` where the file is missing or holds something else."""
    try:
        data = json.loads(Path(path).read_text())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} must be JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold a JSON object, found {type(data).__name__}")
    return data


def check_sha256(path: Path, expected: str) -> None:
    """Raises `InputError` where the file has another SHA-256 than expected."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise InputError(f"{path} is damaged or another file: expected sha256 {expected}, found {found}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the body succeeds, and disappears when it fails.

    Raises:
      InputError: the place cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, whole or not at all."""
    with replacing(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=dict(metadata))
        except Exception as error:  # safetensors' own type, raised where the disk is full, for example
            raise InputError(f"cannot write {path}: {error}") from None


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n")


def refuse_pickle(path: Path) -> None:
    """Raises `InputError` where the name is that of a pickle."""
    if Path(path).suffix in _PICKLES:
        raise InputError(f"{path} must be a safetensors file, found a pickle; {_CONVERT}")


def _sniff(path: Path, start: bytes) -> None:
    if start.startswith(b"PK\x03\x04") or start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04"):
        raise InputError(f"{path} must be a safetensors file, found a pickle or an archive; {_CONVERT}")
    if start.lstrip()[:9].lower() == b"<!doctype" or start.lstrip()[:5].lower() == b"<html":
        raise InputError(f"{path} must be a safetensors file, found an HTML page (a download that needed a login?)")
    if start.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{path} must be a safetensors file, found a Git LFS pointer: run `git lfs pull` where it is from"
        )


def _header(path: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [k for k, _ in pairs]
        twice = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
        if twice:
            raise InputError(f"{path}: {twice[0]} occurs twice in the header")
        return dict(pairs)

    try:
        header = json.loads(text, object_pairs_hook=once)
    except InputError:
        raise
    except ValueError:
        raise InputError(f"{path} is damaged or not a safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise InputError(f"{path} is damaged: its header must be an object, found {type(header).__name__}")
    return header


def _entry(path: Path, name: str, value: Any) -> tuple[str, tuple[int, ...], int, int]:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(int(s) for s in value["shape"]), value["data_offsets"]
        fits = 0 <= begin <= end and math.prod(shape) * _BYTES[dtype] == end - begin
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise InputError(f"{path} is damaged: the header's entry of {name} is not a dtype, a shape and its bytes")
    return dtype, shape, begin, end


def _contiguous(path: Path, spans: list[tuple[int, int]], size: int) -> None:
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            raise InputError(
                f"{path} is damaged: arrays must lie one after another, found bytes {end}..{begin} between"
            )
        end = stop
    if end != size:
        state = "truncated" if end > size else "damaged"
        raise InputError(f"{path} is {state}: expected {end} bytes of arrays, found {size}")


def _sharded(folder: Path, index: Path) -> Files:
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise InputError(f"{index} must hold a weight_map, found {mapping!r}")
    missing = sorted({name for name in mapping.values() if not (folder / str(name)).is_file()})
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} of the shards in {index.name}: {', '.join(map(str, missing[:5]))}"
        )
    files = Files([File(folder / name) for name in sorted(set(mapping.values()))])
    lost = sorted(set(mapping) - set(files))
    if lost:
        raise InputError(f"{folder}: the shards lack {len(lost)} names of {index.name}: {', '.join(lost[:5])}")
    return files
