# SPDX-License-Identifier: Apache-2.0
"""`vtjax convert`: one model file or folder to another, with a replay of recorded inputs."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vtjax.errors import InputError
from vtjax.spec import LMSpec, ModelSpec, Spec, VLMSpec, from_json
from vtjax.weights import registry, store
from vtjax.weights.names import Params, flatten

Forward = Callable[..., tuple[Any, dict[str, Any]]]


def convert(
    src: str | Path,
    dst: str | Path,
    spec: Spec | str | Path | None = None,
    *,
    layout: str = "vtjax",
    check: str | Path | None = None,
    atol: float = 5e-4,
    apply: Callable[[Spec], Forward] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Converts a model; DST is written whole or not at all.

    Args:
      src: as `weights.load`.
      dst: as `weights.save`; a vtjax DST gets the suffix `.safetensors` where it has none.
      spec: a spec or its JSON file, for a bare SRC.
      layout: of DST: "vtjax", "timm" or "hf".
      check: an npz, replayed before anything is written, with `logits` or `features` or both, and what they came from:
        `images` `[B,H,W,3]` float32 (normalised), or of a language model `input_ids` `[B,N]` and perhaps
        `attention_mask`, whose padding is not compared.
      atol: largest absolute difference allowed. Frameworks agree on logits to about 1e-5; on features that reach 20,
        as those of ViT-Ti/16 do, each is 1e-4 from what float64 gives.
      apply: builds the model's `(params, *inputs) -> (logits, aux)`; needed for `check` (weights import no model).
      overwrite: replace a DST that exists.

    Returns:
      `src`, `dst`, `layout`, `params` (how many numbers), `written`; with a check `max_abs_diff` (over all that was
      compared; None where it is not finite), `differences` (per array), `atol`, `passed`. Where the check fails, DST
      is not written.

    Raises:
      InputError: bad SRC or spec, SRC and DST the same, a DST that exists, a check that cannot be replayed.
    """
    target = Path(dst)
    if layout == "vtjax" and target.suffix != ".safetensors":
        target = target.with_name(f"{target.name}.safetensors")
    if check is not None and apply is None:
        raise InputError("a check needs a model: convert(..., apply=...)")
    source = registry.resolve(str(src))
    if _read(source) & _written(target):
        raise InputError(f"source and destination are the same: {src} and {dst}")
    if target.exists() and not overwrite:
        raise InputError(f"{target} exists; remove it or replace it with --overwrite (overwrite=True)")
    loaded, params = store.load(src, _spec(spec))
    out: dict[str, Any] = {"src": str(src), "dst": str(target), "layout": layout}
    out["params"] = sum(int(np.asarray(a).size) for _, a in flatten(params))
    if check is not None and apply is not None:
        out |= _replay(apply(loaded), loaded, params, Path(check), atol)
    out["written"] = out.get("passed", True)
    if out["written"]:
        store.save(target, loaded, params, layout, overwrite=overwrite)
    return out


def _read(source: Path) -> set[Path]:
    return {p.resolve() for p in source.iterdir()} if source.is_dir() else {source.resolve()}


def _written(target: Path) -> set[Path]:
    if target.suffix == ".safetensors":
        return {target.resolve()}
    return {(target / name).resolve() for name in ("model.safetensors", "config.json", "preprocessor_config.json")}


def _spec(spec: Spec | str | Path | None) -> Spec | None:
    if spec is None or isinstance(spec, ModelSpec):
        return spec
    try:
        text = Path(spec).read_text()
    except OSError as error:
        raise InputError(f"cannot read the spec {spec}: {error.strerror}") from None
    return from_json(text)


_INPUTS = ("images", "input_ids", "attention_mask")


def _images(spec: Spec, inputs: dict[str, np.ndarray], path: Path) -> tuple[np.ndarray, ...]:
    shape, expected = inputs["images"].shape, (*spec.image_size, spec.channels)
    if len(shape) != 4 or shape[1:] != expected:
        raise InputError(f"{path}: images must be [B, {', '.join(map(str, expected))}], found {list(shape)}")
    return (inputs["images"].astype(np.float32),)


def _lm_inputs(spec: Spec, inputs: dict[str, np.ndarray], path: Path) -> tuple[np.ndarray, ...]:
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= spec.vocab:
        found = f"{ids.dtype} {list(ids.shape)}"
        raise InputError(f"{path}: input_ids must be [B, N], whole numbers below {spec.vocab}, found {found}")
    if mask is not None and mask.shape != ids.shape:
        raise InputError(f"{path}: attention_mask must be {list(ids.shape)}, found {list(mask.shape)}")
    return (ids.astype(np.int32),) if mask is None else (ids.astype(np.int32), mask.astype(np.int32))


def _vlm_inputs(spec: Spec, inputs: dict[str, np.ndarray], path: Path) -> tuple[Any, ...]:
    """Ids, images and mask; the model checks that they fit each other."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if "images" not in inputs:
        raise InputError(f"{path} must hold images beside input_ids, found none")
    return ids.astype(np.int32), inputs["images"].astype(np.float32), None if mask is None else mask.astype(np.int32)


def _replay(forward: Forward, spec: Spec, params: Params, path: Path, atol: float) -> dict[str, Any]:
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise InputError(f"{path} must be an npz file, found a single array")
        with file:
            recorded = {k: file[k] for k in (*_INPUTS, "logits", "features") if k in file.files}
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except InputError:
        raise
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{path} must be an npz file: {error}") from None
    inputs = {k: recorded.pop(k) for k in _INPUTS if k in recorded}
    kinds: dict[type, tuple[str, Any]] = {LMSpec: ("input_ids", _lm_inputs), VLMSpec: ("input_ids", _vlm_inputs)}
    first, read = kinds.get(type(spec), ("images", _images))
    if first not in inputs or not recorded:
        held = ", ".join([*inputs, *recorded])
        raise InputError(f"{path} must hold {first} and logits or features, found {held or 'neither'}")
    y, aux = forward(params, *read(spec, inputs, path))
    found = {"logits": np.asarray(y), "features": np.asarray(aux["features"])}
    differences = {}
    for name in recorded:
        if found[name].shape != recorded[name].shape:
            shapes = f"expected {list(recorded[name].shape)}, found {list(found[name].shape)}"
            raise InputError(f"{path}: the model's {name} have another shape: {shapes}")
        difference = np.abs(found[name].astype(np.float64) - recorded[name])
        if "attention_mask" in inputs:
            difference = difference[inputs["attention_mask"] > 0]
        differences[name] = float(difference.max()) if difference.size else 0.0
    worst = float(np.max(list(differences.values())))
    passed = bool(worst <= atol)  # False where the model gives NaN, which is no JSON number
    finite = [d if math.isfinite(d) else None for d in (worst, *differences.values())]
    per_array = dict(zip(differences, finite[1:], strict=True))
    return {"max_abs_diff": finite[0], "differences": per_array, "atol": atol, "passed": passed}
