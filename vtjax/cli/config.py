# SPDX-License-Identifier: Apache-2.0
"""Configs: `FILE.py:arg` plus `--config.a.b=value`, on ml_collections, without reading `sys.argv`.

The default value of a leaf fixes its type. What absl's config flags get wrong is handled here: an int is accepted for
a float and `1e4` for an int, a tuple keeps its length, None and lists are refused when the config is loaded, and a leaf
that nobody reads is an error (`check_read`), because a setting without effect is a wrong experiment.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.util
import inspect
import json
import math
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from vtjax import paths
from vtjax.errors import InputError

CHECKOUT = Path(__file__).resolve().parents[2]
"""Holds `configs/` and `experiments/`, which are found by name and not installed."""

BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

ALIASES = {
    "learning_rate": "lr",
    "base_lr": "lr",
    "min_lr": "end_lr",
    "wd": "weight_decay",
    "decay": "weight_decay",
    "warmup_steps": "warmup",
    "warmup_epochs": "warmup",
    "grad_clip": "clip",
    "clip_norm": "clip",
    "beta1": "b1",
    "beta2": "b2",
    "epochs": "steps",
    "num_steps": "steps",
    "max_steps": "steps",
    "train_steps": "steps",
    "bs": "batch_size",
    "batch": "batch_size",
    "ema_decay": "ema",
    "grad_accum": "accumulate",
    "smoothing": "label_smoothing",
    "num_classes": "classes",
    "num_workers": "workers",
    "resolution": "image_size",
    "img_size": "image_size",
    "patch_size": "patch",
    "embed_dim": "width",
    "num_layers": "depth",
    "num_heads": "heads",
    "checkpoint_every": "every",
    "save_every": "every",
    "output_dir": "workdir",
    "precision": "dtype",
}
"""Other words for the last part of a leaf's name, for the hint about a leaf that does not exist."""


class MissingLeaf(InputError, AttributeError, KeyError):
    """Code reads a leaf that a config has not."""

    __str__ = Exception.__str__  # not a KeyError's, which quotes


class Config(ConfigDict):
    """A `ConfigDict` that remembers which leaves were read, and which an override set."""

    def __init__(self, values: Mapping[str, Any], record: Record | None = None, prefix: str = ""):
        super().__init__(type_safe=True)
        object.__setattr__(self, "_record", Record() if record is None else record)
        object.__setattr__(self, "_prefix", prefix)
        for key, value in values.items():
            child = Config(value, self._record, f"{prefix}{key}.") if isinstance(value, Mapping) else value
            ConfigDict.__setitem__(self, key, child)
        self.lock()

    def __getitem__(self, key: str) -> Any:
        try:
            value = super().__getitem__(key)
        except KeyError as error:
            raise self._missing(key) from error
        # Dotted keys come back here one part at a time.
        if "." not in key and not isinstance(value, ConfigDict):
            self._record.read.add(f"{self._prefix}{key}")
        return value

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name.startswith("_"):
                raise
            raise self._missing(name) from error

    def _missing(self, name: str) -> MissingLeaf:
        return MissingLeaf(
            f"config.{self._prefix}{name} must be there, found no such leaf: a run may be older than it; then "
            f"--config=FILE.py:VARIANT beside --workdir brings it"
        )

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As `ConfigDict.to_dict`; writing a config down is not reading its leaves."""
        read = set(self._record.read)
        plain = super().to_dict(*args, **kwargs)
        self._record.read = read
        return plain

    def __deepcopy__(self, memo: dict[int, Any]) -> Config:
        return Config(self.to_dict(), self._record, self._prefix)

    def __reduce__(self) -> Any:
        return Config, (self.to_dict(), None, self._prefix)


Mapping.register(Config)  # it has all of a mapping's methods, and functions ask for one


class Record:
    """Dotted names of the leaves that were read, and of those that an override set; `FILE.py:VARIANT`, if known."""

    def __init__(self) -> None:
        self.read: set[str] = set()
        self.set: set[str] = set()
        self.source = ""


def load_config(path: str | Path, arg: str = "", overrides: Mapping[str, Any] | None = None) -> Config:
    """The config that `path`'s `get_config(arg)` returns, with overrides applied.

    Args:
      path: a Python file; `FILE.py:arg` is split when `arg` is empty.
      arg: passed to `get_config`, whose own default counts when this is empty.
      overrides: dotted leaf -> value, either of the leaf's type or a text as on the command line.

    Raises:
      InputError: a missing or broken file, an unknown variant or leaf, or a value of the wrong type or length.
    """
    text = str(path)
    if not arg and ".py:" in text:
        text, _, arg = text.partition(".py:")
        text += ".py"
    module = load_module(Path(text), "config file")
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise InputError(f"config file {text} must define get_config(arg), found none")
    takes_arg = bool(inspect.signature(get_config).parameters)
    if arg and not takes_arg:
        raise InputError(f"config file {text} takes no argument, found {arg!r} after the colon")
    raw = _run(lambda: get_config(arg) if arg else get_config(), text)
    if not isinstance(raw, ConfigDict):
        raise InputError(f"get_config of {text} must return an ml_collections.ConfigDict, found {type(raw).__name__}")
    config = from_dict(raw.to_dict(), text)
    variant = arg or next(iter(inspect.signature(get_config).parameters.values())).default if takes_arg else ""
    config._record.source = f"{text}:{variant.split(',')[0]}" if isinstance(variant, str) and variant else ""
    for name, value in (overrides or {}).items():
        override(config, name, value)
    return config


def of_workdir(workdir: str, overrides: Mapping[str, Any]) -> Config:
    """The config that a run was started with, `DIR/config.json`, with overrides applied.

    Raises:
      InputError: the file is missing or damaged, or as `load_config`.
    """
    paths.check_url(workdir)
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise InputError(f"workdir {workdir} must hold a run, found no {path.name}")
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} must be JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a JSON object, found {type(values).__name__}")
    config = from_dict(values, str(path))
    for name, value in overrides.items():
        override(config, name, value)
    return config


def from_dict(values: Mapping[str, Any], where: str) -> Config:
    """A config from plain values (JSON's lists become tuples).

    Raises:
      InputError: a leaf whose type cannot be overridden (None, a list of objects, anything but numbers and text).
    """
    return Config(_checked(values, "", where))


def _checked(values: Mapping[str, Any], prefix: str, where: str) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            checked[key] = _checked(value, f"{name}.", where)
        elif isinstance(value, list | tuple):
            if not all(isinstance(v, bool | int | float | str) for v in value):
                raise InputError(f"config leaf {name} in {where} must be a tuple of numbers or texts, found {value!r}")
            checked[key] = tuple(value)
        elif isinstance(value, bool | int | float | str):
            checked[key] = value
        else:
            raise InputError(f"config leaf {name} in {where} must be a bool, int, float, str or tuple, found {value!r}")
    return checked


def override(config: Config, name: str, value: Any) -> None:
    """Sets the leaf `name` (dotted) to `value`, converted to the type of the leaf's present value.

    Raises:
      InputError: no such leaf (with a suggestion), a group instead of a leaf, or a value of the wrong type or length.
    """
    leaves = dict(flatten(config))
    if name not in leaves:
        inside = [leaf for leaf in leaves if leaf.startswith(f"{name}.")]
        if inside:
            raise InputError(f"config.{name} is a group, expected one of its leaves, for example config.{inside[0]}")
        close = _closest(name, leaves)
        hint = f"; did you mean config.{close}?" if close else ""
        raise InputError(f"config.{name} does not exist{hint}")
    *parents, key = name.split(".")
    node: Any = config
    for parent in parents:
        node = node[parent]
    with node.ignore_type():
        node[key] = convert(value, leaves[name], f"config.{name}")
    config._record.set.add(name)


def _closest(name: str, leaves: Iterable[str]) -> str:
    """The leaf that was probably meant: one whose last part is, or is another word for, what was typed; or ""."""
    parent, _, typed = name.rpartition(".")
    by_part: dict[str, list[str]] = {}
    for leaf in leaves:
        by_part.setdefault(leaf.rpartition(".")[2], []).append(leaf)
    words = [*by_part, *(alias for alias, part in ALIASES.items() if part in by_part)]
    found = difflib.get_close_matches(typed, words, n=1, cutoff=0.7)
    if not found:
        return ""
    part = found[0] if found[0] in by_part else ALIASES[found[0]]
    return min(by_part[part], key=lambda leaf: (leaf.rpartition(".")[0] != parent, leaf.count("."), leaf))


def convert(value: Any, like: Any, name: str) -> Any:
    """`value` (a text or already typed) as the type of `like`.

    Raises:
      InputError: naming the leaf, the type expected and what was found.
    """
    if isinstance(like, tuple):
        return _tuple(value, like, name)
    if isinstance(like, str):
        if isinstance(value, str):
            return value
    elif isinstance(like, bool):
        if isinstance(value, bool) or (isinstance(value, str) and value.lower() in BOOLEANS):
            return value if isinstance(value, bool) else BOOLEANS[value.lower()]
    elif not isinstance(value, bool):
        number = _number(value)
        if number is not None and isinstance(like, float):
            return float(number)
        if number is not None and number == int(number):
            return int(number)
    kind = {bool: "true or false", int: "an int", float: "a float", str: "a text"}[type(like)]
    raise InputError(f"{name} must be {kind} (now {like!r}), found {value!r}")


def _number(value: Any) -> int | float | None:
    """A finite number from a text or a number, else None."""
    for kind in (int, float):
        try:
            number = kind(value) if isinstance(value, str) else value
            if isinstance(number, int | float) and math.isfinite(number):
                return number
        except ValueError:
            continue
    return None


def _tuple(value: Any, like: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = tuple(part.strip() for part in value.strip("()").split(",") if part.strip())
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if like and len(values) != len(like):
        example = ",".join(repr(v) for v in like)
        raise InputError(f"{name} must hold {len(like)} values (now {example}), found {len(values)}: {values!r}")
    # An empty tuple fixes neither the length nor the type.
    return tuple(convert(v, like[i], f"{name}[{i}]") for i, v in enumerate(values)) if like else values


def arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """The options that every command with a config has; `from_args` reads them."""
    parser.add_argument("--config", required=required, metavar="FILE.py[:VARIANT]", help="what to run")
    parser.add_argument("--config.LEAF", dest="leaf", metavar="VALUE", help="override, e.g. --config.optim.lr=3e-4")
    parser.add_argument(
        "--multihost", action="store_true", help="one of several processes of a cluster, which is asked"
    )
    parser.add_argument("--print_config", action="store_true", help="print the resolved config as JSON and stop")


def from_args(args: argparse.Namespace) -> Config:
    """The config that the command line names, overrides applied."""
    return load_config(args.config, overrides=args.overrides)


def of_command(args: argparse.Namespace) -> Config:
    """The config of a command that takes `--config` or, by the config it was started with, `--workdir`.

    Raises:
      InputError: neither, or as `load_config` and `of_workdir`.
    """
    if args.config:
        return from_args(args)
    if args.workdir:
        return of_workdir(args.workdir, args.overrides)
    raise InputError(f"{args.command} needs --config=FILE.py:VARIANT or --workdir=DIR, found neither")


def split_overrides(argv: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Takes `--config.a.b=value` and `--config.a.b value` out of an argument list.

    Returns:
      The remaining arguments and dotted leaf -> text, in order; a repeated leaf keeps its last value.

    Raises:
      InputError: an override without a value.
    """
    rest: list[str] = []
    overrides: dict[str, str] = {}
    tokens = iter(argv)
    for token in tokens:
        if not token.startswith("--config."):
            rest.append(token)
            continue
        name, found, value = token.removeprefix("--config.").partition("=")
        if not found:
            value = next(tokens, "--")
            if value.startswith("--"):
                raise InputError(f"--config.{name} needs a value: --config.{name}=VALUE")
        overrides.pop(name, None)
        overrides[name] = value
    return rest, overrides


def flatten(config: ConfigDict | Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted name, value) of every leaf, sorted by name; not recorded as a read."""
    plain = config.to_dict() if isinstance(config, ConfigDict) else config
    leaves: list[tuple[str, Any]] = []
    for key in sorted(plain):
        value = plain[key]
        leaves += flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return leaves


def overridden(config: Config) -> frozenset[str]:
    """The leaves that an override set."""
    return frozenset(config._record.set)


def source(config: Config) -> str:
    """`FILE.py:VARIANT` that the config was loaded from, without options; "" where there is none."""
    return config._record.source


def check_read(config: Config, later: Iterable[str]) -> None:
    """Raises `InputError` if a leaf has not been read by now.

    Args:
      config: a config from which everything has been built.
      later: leaves, or groups of them, that are known to be read later or only under other settings.
    """
    known = tuple(later)
    unread = [
        name
        for name, _ in flatten(config)
        if name not in config._record.read and not any(name == k or name.startswith(f"{k}.") for k in known)
    ]
    if unread:
        names = ", ".join(f"config.{n}" for n in unread)
        raise InputError(f"nothing reads {names} under these settings: check the name, or leave it out")


def load_module(path: Path, what: str) -> ModuleType:
    """Imports a Python file by path; the checkout is put on `sys.path`, so that `from configs import common` works.

    Raises:
      InputError: the file is missing, not Python, or fails while it is imported.
    """
    if not path.is_file():
        raise InputError(f"{what} {path} does not exist" if not path.exists() else f"{what} {path} must be a file")
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    name = f"vtjax_file_{path.resolve().parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{what} {path} must be a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses of the file look their module up
    loader = spec.loader
    _run(lambda: loader.exec_module(module), str(path))
    return module


def _run(call: Any, path: str) -> Any:
    """`call()`, with any exception of the user's file as one line that gives the file's line."""
    try:
        return call()
    except InputError:
        raise
    except SyntaxError as error:
        raise InputError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:  # a file that calls sys.exit must not end us without a word
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if Path(f.filename).resolve() == Path(path).resolve()]
        where = f"{path}, line {lines[-1]}" if lines else path
        raise InputError(f"{where}: {type(error).__name__}: {error}") from error
