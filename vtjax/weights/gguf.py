# SPDX-License-Identifier: Apache-2.0
"""GGUF files of Llama, Qwen2 and Qwen3 models: header, spec and dequantised arrays.

The header is read here, because the gguf package takes ten seconds for a vocabulary of 49,152 and checks no extents;
the quantisations are the package's. llama.cpp stores the query and key rows of the `llama` architecture in interleaved
rotary order; they are put back into the half-split order of Hugging Face, which the models use.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vtjax.errors import InputError, MissingExtraError
from vtjax.spec import DecoderBlockSpec, LMSpec, RopeScaling

MAGIC = b"GGUF"
TABLE = "gguf"
ARCHITECTURES = ("llama", "qwen2", "qwen3")

_STRING, _ARRAY = 8, 9
_SCALARS = dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"))) | {10: "<Q", 11: "<q", 12: "<d"}


class File(Mapping[str, np.ndarray]):
    """One GGUF file as a mapping from names to float32 arrays, dequantised on access.

    Attributes:
      shapes: shape of every array, outermost first.
      metadata: the key-value pairs of the header.

    Raises:
      InputError: one line: not a GGUF file, another version, a damaged header, an array beyond the file's end.
      MissingExtraError: the gguf package is missing.
    """

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError:
            raise MissingExtraError("gguf", "gguf", f"reading {path}") from None
        self.path = Path(path)
        try:
            self._data = np.memmap(self.path, np.uint8, "r")
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
        if bytes(self._data[:4]) != MAGIC:
            raise InputError(f"{path} must be a GGUF file, found one that begins with {bytes(self._data[:4])!r}")
        reader = _Reader(self._data.data, self.path)
        version, tensors, pairs = reader.unpack("<I"), reader.unpack("<Q"), reader.unpack("<Q")
        if version not in (2, 3):
            raise InputError(f"{path} must be GGUF of version 2 or 3, found {version}")
        self.metadata: dict[str, Any] = {}
        for _ in range(reader.counted(pairs)):
            name = reader.string()
            self.metadata[name] = reader.value(reader.unpack("<I"))
        found = []
        for _ in range(reader.counted(tensors)):
            name = reader.string()
            dims = [reader.unpack("<Q") for _ in range(reader.counted(reader.unpack("<I")))]
            found.append((name, dims[::-1], reader.unpack("<I"), reader.unpack("<Q")))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise InputError(f"{path} is damaged: general.alignment must be above 0, found {alignment}")
        start = -(-reader.at // alignment) * alignment
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._entries: dict[str, tuple[Any, int, int, int]] = {}
        for name, shape, kind, offset in found:
            if name in self.shapes:
                raise InputError(f"{path}: {name} occurs twice in the header")
            try:
                quantisation = gguf.GGMLQuantizationType(kind)
                block, size = gguf.GGML_QUANT_SIZES[quantisation]
            except (ValueError, KeyError):
                raise InputError(f"{path}: {name} has the quantisation {kind}, which gguf does not know") from None
            if not shape or shape[-1] % block:
                raise InputError(f"{path} is damaged: {name} {shape} must have rows in blocks of {block}")
            row = shape[-1] // block * size
            end = start + offset + math.prod(shape[:-1]) * row
            if end > len(self._data):
                raise InputError(f"{path} is truncated: {name} ends at byte {end}, the file at {len(self._data)}")
            self.shapes[name] = tuple(shape)
            self._entries[name] = quantisation, start + offset, end, row

    def __getitem__(self, name: str) -> np.ndarray:
        import gguf

        quantisation, start, end, row = self._entries[name]
        data = np.asarray(self._data[start:end]).reshape(-1, row)
        try:
            return gguf.quants.dequantize(data, quantisation).astype(np.float32).reshape(self.shapes[name])
        except NotImplementedError:
            raise InputError(f"{self.path}: gguf cannot dequantise {name} ({quantisation.name})") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class _Reader:
    """Reads the header front to back; every length is checked against what is left of the file."""

    def __init__(self, data: memoryview, path: Path):
        self.data, self.path, self.at = data, path, 4

    def take(self, size: int) -> bytes:
        if self.at + size > len(self.data):
            raise InputError(f"{self.path} is truncated or damaged: its header goes beyond the end of the file")
        self.at += size
        return bytes(self.data[self.at - size : self.at])

    def unpack(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def counted(self, count: int) -> int:
        """A number of things that are to follow, of a byte or more each."""
        if count > len(self.data) - self.at:
            raise InputError(f"{self.path} is truncated or damaged: its header announces {count} entries")
        return count

    def string(self) -> str:
        try:
            return self.take(self.unpack("<Q")).decode()
        except UnicodeDecodeError:
            raise InputError(f"{self.path} is damaged: a text in its header is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.unpack("<I"), self.unpack("<Q")
            if inner == _ARRAY:
                raise InputError(f"{self.path} is damaged: its header has an array of arrays")
            if inner in _SCALARS:
                form = _SCALARS[inner]
                return np.frombuffer(self.take(count * struct.calcsize(form)), form).tolist()
            return [self.value(inner) for _ in range(self.counted(count))]
        if kind not in _SCALARS:
            raise InputError(f"{self.path} is damaged: its header has a value of the unknown type {kind}")
        return self.unpack(_SCALARS[kind])


def spec_from_file(file: File) -> LMSpec:
    """The spec that the header and the names of a GGUF file tell.

    Raises:
      InputError: another architecture, a key that is missing, or what an LMSpec cannot describe, by name.
    """
    where, architecture = file.path, file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"{where}: general.architecture must be one of {known}, found {architecture!r}")

    def get(name: str, default: Any = None) -> Any:
        value = file.metadata.get(f"{architecture}.{name}", default)
        if value is None:
            raise InputError(f"{where} must say {architecture}.{name}, found no such key")
        numbers = value if isinstance(value, list) else [value]
        if not all(isinstance(number, int | float) for number in numbers):
            raise InputError(f"{where}: {architecture}.{name} must be a number, found {str(value)[:40]!r}")
        return value

    if get("expert_count", 0):
        raise InputError(f"{where}: {architecture}.expert_count={get('expert_count')} (experts) cannot be described")
    if "token_embd.weight" not in file:
        raise InputError(f"{where} lacks token_embd.weight")
    depth, width = int(get("block_count")), int(get("embedding_length"))
    if not 0 < depth <= len(file):
        raise InputError(f"{where} is damaged: block_count must be in 1..{len(file)}, its arrays, found {depth}")

    def per_block(name: str, default: Any = None) -> list[int]:
        value = get(name, default)
        if isinstance(value, list) and len(value) != depth:
            raise InputError(f"{where}: {architecture}.{name} must have one entry per block, {depth}, found {value}")
        return value if isinstance(value, list) else [int(value)] * depth

    heads = per_block("attention.head_count")
    kv_heads, mlp = per_block("attention.head_count_kv", heads), per_block("feed_forward_length")
    head_dim = int(get("attention.key_length", width // max(heads[0], 1)))
    for name in ("attention.value_length", "rope.dimension_count"):
        if int(get(name, head_dim)) != head_dim:
            raise InputError(f"{where}: {architecture}.{name} must be the key length {head_dim}, found {get(name)}")
    scaling = file.metadata.get(f"{architecture}.rope.scaling.type", "none")
    ends = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return LMSpec(
        vocab=file.shapes["token_embd.weight"][0],
        width=width,
        blocks=tuple(DecoderBlockSpec(h, k, head_dim, m) for h, k, m in zip(heads, kv_heads, mlp, strict=True)),
        context=int(get("context_length")),
        # Written as float32: its shortest form is what was meant.
        eps=float(str(np.float32(get("attention.layer_norm_rms_epsilon")))),
        rope_base=float(get("rope.freq_base", 10_000.0)),
        rope_scaling=_scaling(file, head_dim, float(get("rope.freq_base", 10_000.0)), scaling),
        qkv_bias="blk.0.attn_q.bias" in file,
        out_bias="blk.0.attn_output.bias" in file,
        mlp_bias="blk.0.ffn_down.bias" in file,
        qk_norm="head" if "blk.0.attn_q_norm.weight" in file else "none",
        tied="output.weight" not in file,
        eos=tuple(dict.fromkeys(int(token) for token in ends if token is not None)),
    )


def _scaling(file: File, head_dim: int, base: float, kind: str) -> RopeScaling | None:
    """Linear scaling is a key; of Llama 3's there are only the divisors of all frequencies."""
    factor = file.metadata.get(f"{file.metadata['general.architecture']}.rope.scaling.factor", 1.0)
    if kind == "linear":
        return RopeScaling("linear", float(factor))
    if kind != "none":
        raise InputError(f"{file.path}: rope.scaling.type must be none or linear, found {kind!r}")
    if "rope_freqs.weight" not in file:
        return None
    divisors = file["rope_freqs.weight"]
    scaling = RopeScaling("llama3", float(divisors.max()))
    plain = [base ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    expected = [frequency / scaling.scaled(frequency) for frequency in plain]
    if divisors.shape != (len(plain),) or not np.allclose(divisors, expected, rtol=1e-3):
        raise InputError(f"{file.path}: rope_freqs.weight must be the divisors of Llama 3's scaling, found others")
    return scaling


class Unpermuted(Mapping[str, np.ndarray]):
    """A file's arrays, query and key rows in half-split rotary order."""

    def __init__(self, file: File, spec: LMSpec):
        self.file, self.shapes = file, file.shapes
        self._heads: dict[str, int] = {}
        if file.metadata["general.architecture"] == "llama":
            for i, block in enumerate(spec.blocks):
                self._heads |= {f"blk.{i}.attn_q": block.heads, f"blk.{i}.attn_k": block.kv_heads}

    def __getitem__(self, name: str) -> np.ndarray:
        array = self.file[name]
        heads = self._heads.get(name.rpartition(".")[0])
        if heads is None:
            return array
        return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.file)

    def __len__(self) -> int:
        return len(self.file)
