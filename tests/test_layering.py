# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, read from the source; and what an import may cost, measured in a fresh process."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from vtjax import errors, paths

ROOT = Path(__file__).resolve().parent.parent

# Package -> packages of ours that it may import. Everyone may import itself and SHARED.
SHARED = {"errors", "paths"}
ALLOWED = {
    "errors": set(),
    "paths": set(),
    "spec": set(),
    "ops": set(),
    "models": {"ops", "spec"},
    "methods": {"models", "ops", "parallel", "spec"},
    "parallel": {"ops"},
    "data": set(),  # `Preprocess` is a protocol there
    "weights": {"spec"},
    "train": {"parallel", "account", "spec"},  # spec: what a checkpoint carries, never a model
    "account": {"spec"},
    "viz": set(),
    "cli": {"spec", "ops", "models", "methods", "parallel", "data", "weights", "train", "account", "viz", "__init__"},
    "answer": {"data", "spec", "weights"},  # a model is given to it
    "__main__": {"cli"},
    "__init__": {"answer", "models", "methods", "weights", "spec", "train"},  # train.checkpoint: load() reads workdirs
}
# Third-party packages that each layer may import, where the layer is restricted at all; the standard library is free.
OUTSIDE: dict[str, set[str]] = {
    "errors": set(),
    "paths": {"etils"},  # inside a function: only for what is on other machines
    "spec": set(),
    "ops": {"jax", "jaxtyping", "numpy", "einops"},
    "parallel": {"jax", "jaxtyping", "numpy", "absl"},
    "account": {"jax", "jaxlib", "jaxtyping", "numpy"},
    "viz": {"numpy", "PIL"},
    "__init__": set(),
}
# May appear inside functions only: optional, or slow to import.
GUARDED = {"tensorflow", "tensorflow_datasets", "matplotlib", "sklearn", "huggingface_hub", "gguf", "tokenizers", "av"}
# Oracles for recording arrays; never a dependency.
FORBIDDEN = {"torch", "torchvision", "timm", "transformers"}

MODULES = sorted((ROOT / "vtjax").rglob("*.py"))


def package_of(file: Path) -> str:
    """`vtjax/models/vit.py` -> `models`, `vtjax/spec.py` -> `spec`."""
    return file.relative_to(ROOT / "vtjax").parts[0].removesuffix(".py")


def imports(tree: ast.AST, inside_function: bool = False) -> Iterator[tuple[str, bool, int]]:
    """(dotted name, is inside a function, line) of every import."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, inside_function, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the full name"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", inside_function, node.lineno
        deeper = inside_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(node, deeper)


def breaches(package: str, source: str) -> list[str]:
    """What in a module of `package` the tables do not allow."""
    found = []
    for name, inside_function, line in imports(ast.parse(source)):
        top, *rest = name.split(".")
        if top == "vtjax":
            target = rest[0] if rest and (rest[0] in ALLOWED or (ROOT / "vtjax" / rest[0]).is_dir()) else "__init__"
            if target not in ALLOWED.get(package, set()) | SHARED | {package}:
                found.append(f"line {line}: {package} may not import vtjax.{target}")
        elif top in ("configs", "experiments", "notebooks", "tests"):
            found.append(f"line {line}: nothing in vtjax imports {top}")
        elif top in FORBIDDEN:
            found.append(f"line {line}: {top} is an oracle, not a dependency")
        elif top in GUARDED:
            if not inside_function:
                found.append(f"line {line}: {top} may be imported inside a function only")
        elif package in OUTSIDE and top not in OUTSIDE[package] and top not in sys.stdlib_module_names:
            found.append(f"line {line}: {package} may not import {top}")
    return found


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_follow_the_table(file: Path) -> None:
    package = package_of(file)
    assert package in ALLOWED, f"{package} is not in the table of layers; give it a place"
    assert breaches(package, file.read_text()) == []


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("ops", "from vtjax.spec import ViTSpec"),
        ("ops", "def f():\n    import vtjax.models.vit"),
        ("ops", "import flax.linen as nn"),
        ("spec", "import numpy"),
        ("errors", "from vtjax import spec"),
        ("train", "from vtjax.models.vit import ViT"),
        ("train", "from vtjax import methods"),
        ("data", "from vtjax import load"),
        ("data", "from vtjax.spec import Preprocess"),
        ("cli", "import configs.vit"),
        ("weights", "import torch"),
        ("data", "import tensorflow_datasets as tfds"),
        ("viz", "import matplotlib.pyplot as plt"),
    ],
)
def test_the_reader_sees_a_breach(package: str, source: str) -> None:
    assert len(breaches(package, source)) == 1


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("viz", "def f():\n    import matplotlib.pyplot as plt"),
        ("models", "import flax.linen as nn\nfrom vtjax.ops import attention\nfrom vtjax.errors import InputError"),
        ("models", "from vtjax import paths"),
        ("__init__", "def load(name):\n    from vtjax.train import checkpoint"),
    ],
)
def test_the_reader_lets_the_rest_through(package: str, source: str) -> None:
    assert breaches(package, source) == []


def test_the_readme_shows_the_same_table() -> None:
    rows = re.findall(r"^\| `vtjax/(\w+)(?:/|\.py)` \|.*\| (.*) \|$", (ROOT / "README.md").read_text(), re.M)
    shown = {layer: set(re.findall(r"\w+", text)) & set(ALLOWED) for layer, text in rows if layer != "cli"}
    hidden = SHARED | {"cli", "__main__", "__init__"}
    assert shown == {layer: allowed for layer, allowed in ALLOWED.items() if layer not in hidden}


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [d for name, group in project["optional-dependencies"].items() if name != "dev" for d in group]
    declared = {_key(d) for d in [*project["dependencies"], *extras]} | {"jaxlib"}
    sources = importlib.metadata.packages_distributions()
    missing = set()
    for file in MODULES:
        tops = {name.split(".")[0] for name, _, _ in imports(ast.parse(file.read_text()))}
        for top in tops - set(sys.stdlib_module_names) - {"vtjax"}:
            names = {_key(d) for d in sources.get(top, [top])}
            if not names & declared:
                missing.add(f"{file.relative_to(ROOT)}: {top}")
    assert missing == set()


def _key(requirement: str) -> str:
    """Normalised name of a distribution: `jax[tpu]>=0.10` -> `jax`."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=~! ]", requirement)[0]).lower()


def _loaded(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `code`."""
    report = "import sys; print('\\n' + ' '.join({m.split('.')[0] for m in sys.modules}))"
    script = f"try:\n    {code}\nexcept SystemExit as e:\n    assert not e.code, e.code\n{report}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {"tensorflow", "tensorflow_datasets", "matplotlib", "sklearn", "torch", "transformers"}


def test_import_of_the_package_is_light() -> None:
    assert _loaded("import vtjax") & (HEAVY | {"jax", "flax", "grain"}) == set()


def test_help_loads_nothing_heavy() -> None:
    code = "import runpy, sys; sys.argv = ['vtjax', '--help']; runpy.run_module('vtjax', run_name='__main__')"
    assert _loaded(code) & HEAVY == set()


def test_every_module_imports_without_tensorflow() -> None:
    names = [".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in MODULES]
    names = [n for n in names if not n.endswith("__main__")]
    assert _loaded(f"import {', '.join(names)}") & HEAVY == set()


def test_errors_and_paths_are_importable_first() -> None:
    assert issubclass(errors.MissingExtraError, errors.InputError)
    assert paths.find("no-such-file") is None
