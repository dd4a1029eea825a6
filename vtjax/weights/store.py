# SPDX-License-Identifier: Apache-2.0
"""Loading and saving models: our safetensors format, timm and Hugging Face files and folders.

Our format is one safetensors file with the names of `docs/parameter-names.md` and two metadata entries, `format`
("vtjax") and `spec` (the spec's JSON). Parameters of a method (`params["ltmp"]`, ...) are kept as they are.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vtjax.errors import InputError
from vtjax.spec import LMSpec, Spec, TiledViTSpec, VLMSpec, from_json
from vtjax.weights import gguf, hf, hf_lm, hf_vlm, io, names, registry, timm
from vtjax.weights.names import Params
from vtjax.weights.tables import TABLES

LAYOUTS = ("vtjax", "timm", "hf")
FORMAT = "vtjax"
_GIVE = "vtjax convert --spec=spec.json, or spec=... in Python"


def load(source: str | Path, spec: Spec | None = None) -> tuple[Spec, Params]:
    """Spec and parameters of a file, a folder or a named model.

    Args:
      source: a safetensors or GGUF file; a Hugging Face or timm-hub folder (`config.json` beside one or several
        safetensors files); a name of `weights.registry`; or a hub id (`facebook/dinov2-small`), which is looked for
        along `VTJAX_DATA` and then on the hub.
      spec: for a bare file with timm or Hugging Face names; elsewhere it replaces what the source says.

    Returns:
      The spec, and a nested dict of float32 numpy arrays; float16 and bfloat16 are widened.

    Raises:
      InputError: one line: what is missing, extra or mis-shaped (every name), damaged, not inferable or not found.
    """
    named = registry.NAMED.get(str(source)) if not Path(source).exists() else None
    path = registry.resolve(str(source))
    if named is not None and named.sha256 and path.is_file():
        io.check_sha256(path, named.sha256)
    if path.is_dir():
        return _load_folder(path, spec)
    return _load_file(path, spec, named.spec() if named is not None else None)


def save(path: str | Path, spec: Spec, params: Params, layout: str = "vtjax", *, overwrite: bool = True) -> Path:
    """Writes a model, whole or not at all; float32.

    Args:
      path: a file ending in `.safetensors` (layouts "vtjax" and "timm"), or a folder (layouts "timm" and "hf"), which
        gets `config.json` and `model.safetensors` such that timm or transformers loads it.
      spec, params: the model. Arrays may be jax arrays.
      layout: "vtjax", "timm" or "hf".
      overwrite: False refuses a path that exists.

    Returns:
      The path written.

    Raises:
      InputError: parameters that do not fit the spec or the layout, or a place that cannot be written.
    """
    path = Path(path)
    if layout not in LAYOUTS:
        raise InputError(f"layout must be one of {', '.join(LAYOUTS)}, found {layout!r}")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; remove it or replace it with --overwrite (overwrite=True)")
    is_file = path.suffix == ".safetensors"
    if is_file == path.is_dir() and path.exists():
        raise InputError(f"{path} must be a {'file' if is_file else 'folder'}, found the other")
    if layout == "vtjax":
        if not is_file:
            raise InputError(f"{path} must end in .safetensors for the vtjax layout")
        io.write(path, _own_arrays(spec, params), {"format": FORMAT, "spec": spec.to_json()})
    elif layout == "timm":
        _save_timm(path, spec, params, is_file)
    else:
        if is_file:
            raise InputError(f"{path} must be a folder for the Hugging Face layout, found a file name")
        _save_hf(path, spec, params)
    return path


def _load_file(path: Path, spec: Spec | None, usual: Spec | None) -> tuple[Spec, Params]:
    """A file; `usual` is the spec of the name it was found by, for a file that does not say."""
    io.refuse_pickle(path)
    if path.suffix == ".gguf":
        quantised = gguf.File(path)
        spec = spec or gguf.spec_from_file(quantised)
        where = f"the weights of {path}"
        return spec, names.to_ours(spec, gguf.Unpermuted(quantised, spec), TABLES[gguf.TABLE], "", where)
    file = io.File(path)
    if file.metadata.get("format") == FORMAT:
        stored = from_json(file.metadata.get("spec", ""))
        return _own(spec or stored, file, str(path))
    if spec is None and usual is None and (path.parent / "config.json").exists():
        return _load_foreign(path.parent, file)
    return _load_bare(file, spec or usual, str(path))


def _load_folder(folder: Path, spec: Spec | None) -> tuple[Spec, Params]:
    files = io.read_folder(folder)
    if spec is not None:
        return _load_bare(files, spec, str(folder))
    if not (folder / "config.json").exists():
        raise InputError(
            f"{folder} must hold config.json (Hugging Face or timm) beside its weights, or come with a spec: {_GIVE}"
        )
    return _load_foreign(folder, files)


def _load_foreign(folder: Path, tensors: Mapping[str, np.ndarray]) -> tuple[Spec, Params]:
    config, where = io.read_json(folder / "config.json"), str(folder)
    processor = folder / "preprocessor_config.json"
    spec: Spec
    try:
        if "architecture" in config:
            spec, candidates = timm.spec_from_config(config, where), [n for n in TABLES if n.startswith("timm")]
        elif config.get("model_type") in hf_vlm.FAMILIES:
            images = io.read_json(processor) if processor.exists() else None
            spec = hf_vlm.spec_from_config(config, tensors, images, where, _generation(folder))
            return spec, hf_vlm.to_ours(spec, tensors, f"the weights of {where}")
        elif config.get("model_type") in hf_lm.FAMILIES:
            spec = hf_lm.spec_from_config(config, where, _generation(folder))
            candidates = [hf_lm.TABLE]
        elif "model_type" in config:
            images = io.read_json(processor) if processor.exists() else None
            spec, table = hf.spec_from_config(config, names.shapes_of(tensors), images, where)
            candidates = [table]
        else:
            raise InputError("must have model_type (Hugging Face) or architecture (timm), found neither")
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(where) else f"{where}/config.json: {text}") from None
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{where}/config.json is malformed ({type(error).__name__}: {error})") from None
    return _load_bare(tensors, spec, where, candidates)


def _generation(folder: Path) -> Mapping[str, Any] | None:
    path = folder / "generation_config.json"
    return io.read_json(path) if path.exists() else None


def _load_bare(
    tensors: Mapping[str, np.ndarray], spec: Spec | None, where: str, candidates: list[str] | None = None
) -> tuple[Spec, Params]:
    """Arrays with foreign names, or with ours but without our metadata."""
    if isinstance(spec, VLMSpec) and not any(names.is_own(n) for n in tensors):
        return spec, hf_vlm.to_ours(spec, tensors, f"the weights of {where}")
    if candidates is None and any(names.is_own(n) for n in tensors):
        if spec is None:
            raise InputError(f"{where} holds vtjax names without a spec; give its spec.json ({_GIVE})")
        return _own(spec, tensors, where)
    table, prefix = names.find_table(tensors, candidates or TABLES)
    if spec is None:
        raise InputError(
            f"{where} says nothing about its architecture (heads, activation, epsilon cannot be inferred from arrays); "
            f"give a spec ({_GIVE}), or put the config.json of timm or Hugging Face beside it"
        )
    return spec, names.to_ours(spec, tensors, TABLES[table], prefix, f"the weights of {where}")


def _own(spec: Spec, tensors: Mapping[str, np.ndarray], where: str) -> tuple[Spec, Params]:
    """Our names; what is not the backbone's belongs to a method and is taken as it is."""
    found = {n: s for n, s in names.shapes_of(tensors).items() if names.is_own(n)}
    names.check(names.shapes(spec), found, f"the weights of {where}")
    ordered = [*names.shapes(spec), *(n for n in tensors if n not in found)]
    flat = {n: np.array(tensors[n], order="C") for n in ordered}
    for name in found:
        names.check_floating(name, flat[name], where)
    return spec, names.unflatten(flat)


def _own_arrays(spec: Spec, params: Params) -> dict[str, np.ndarray]:
    flat = dict(names.flatten(params))
    for name, leaf in flat.items():
        if not hasattr(leaf, "dtype"):
            raise InputError(f"the parameters must be arrays in nested dicts, found {type(leaf).__name__} at {name}")
    flat = {n: np.asarray(a) for n, a in flat.items()}
    names.check(names.shapes(spec), {n: a.shape for n, a in flat.items() if names.is_own(n)}, "the parameters")
    # jax's bfloat16 is of no numpy kind, so everything that is neither whole nor boolean is widened.
    # Not ascontiguousarray, which makes a number an array of one.
    return {n: np.asarray(a, a.dtype if a.dtype.kind in "iub" else np.float32, order="C") for n, a in flat.items()}


def _save_timm(path: Path, spec: Spec, params: Params, is_file: bool) -> None:
    if isinstance(spec, LMSpec | VLMSpec):
        raise InputError(f"timm has no language models, found a {type(spec).__name__}; use the layout hf or vtjax")
    if isinstance(spec, TiledViTSpec):
        raise InputError("a TiledViTSpec is written in the layout vtjax only, found timm")
    spec, params = names.with_pos_prefix(spec, params, spec.prefix if spec.pos_prefix == spec.prefix else 0)
    spec, params = names.with_head_bias(spec, params, True)
    tensors = names.to_foreign(spec, params, timm.table(spec), "")
    if is_file:
        io.write(path, tensors, {"format": "pt"})
    else:
        _write_folder(path, tensors, {"config.json": timm.config(spec)})


def _save_hf(path: Path, spec: Spec, params: Params) -> None:
    if isinstance(spec, VLMSpec):
        raise InputError("a VLMSpec is written in the layout vtjax only, found hf; its parts can be in either")
    if isinstance(spec, TiledViTSpec):
        raise InputError("a TiledViTSpec is written in the layout vtjax only, found hf")
    if isinstance(spec, LMSpec):
        config = hf_lm.config(spec)
        _write_folder(path, names.to_foreign(spec, params, TABLES[hf_lm.TABLE], "model."), {"config.json": config})
        return
    count = min(spec.prefix, 1 if spec.layer_scale is not None else 2)
    spec, params = names.with_pos_prefix(spec, params, count)
    if spec.norm_before:
        spec, params = names.with_head_bias(spec, params, False)
    config, table, prefix = hf.config(spec)
    tensors = names.to_foreign(spec, params, TABLES[table], prefix)
    _write_folder(path, tensors, {"config.json": config, "preprocessor_config.json": hf.processor(spec)})


def _write_folder(path: Path, tensors: Mapping[str, np.ndarray], configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes model.safetensors and the JSON files: a new folder appears at once, in an old one each file does."""
    if path.exists():
        target = path
    else:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            target = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from None
    try:
        io.write(target / "model.safetensors", tensors, {"format": "pt"})
        for name, data in configs.items():
            io.write_json(target / name, data)
        if target != path:
            target.chmod(0o755)
            target.rename(path)
    finally:
        if target != path:
            shutil.rmtree(target, ignore_errors=True)
