# SPDX-License-Identifier: Apache-2.0
"""`vtjax inspect`: spec, parameters and MACs of a model, or what tells two models apart."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vtjax.cli import config as config_lib
from vtjax.errors import InputError
from vtjax.spec import ModelSpec, Spec


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vtjax inspect`."""
    parser.add_argument(
        "model",
        metavar="CONFIG_OR_DIR",
        help="FILE.py:VARIANT (with --config.LEAF=VALUE), a workdir, a spec.json, a weights file or folder, or a name",
    )
    parser.add_argument("other", metavar="OTHER", nargs="?", help="a second model: show the difference")
    parser.add_argument("--tokens", type=int, metavar="N", help="of a language model's prompt, for its MACs (512)")


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """One model: model, params, macs_per_image (a language model: macs_per_prompt, prompt_tokens), kinds, spec. Two:
    pairs of these, and spec_diff."""
    from vtjax.cli.assemble import say

    if args.tokens is not None and args.tokens < 1:
        raise InputError(f"--tokens must be 1 or more, found {args.tokens}")
    first = open_model(args.model, args.overrides, args.tokens)
    if args.tokens is not None and not first.prompt_tokens:
        raise InputError(f"--tokens is the length of a language model's prompt, and {args.model} is none")
    if args.other is None:
        say(_describe(first))
        return 0, {**first.facts(), "spec": first.spec.to_dict()}
    second = open_model(args.other, args.overrides, args.tokens)
    say(_compare(first, second))
    facts = first.facts(), second.facts()
    pairs = {name: [each.get(name) for each in facts] for name in dict.fromkeys([*facts[0], *facts[1]])}
    return 0, {**pairs, "spec_diff": {k: list(v) for k, v in first.spec.diff(second.spec).items()}}


@dataclasses.dataclass(frozen=True)
class Inspected:
    """A model by name, its spec, and its parameters (arrays, or abstract where there are none yet)."""

    name: str
    spec: Spec
    params: Any
    tokens: int | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt that MACs are counted for, with one image if the model takes any; 0 for what is no
        language model."""
        from vtjax.account import flops
        from vtjax.spec import LMSpec, VLMSpec

        if isinstance(self.spec, VLMSpec):
            return self.tokens or self.spec.placeholders + flops.QUESTION
        return (self.tokens or flops.PROMPT) if isinstance(self.spec, LMSpec) else 0

    @property
    def work(self) -> str:
        """Name of the figure that `facts` has for the MACs."""
        return "macs_per_prompt" if self.prompt_tokens else "macs_per_image"

    def facts(self) -> dict[str, Any]:
        """JSON-able: model, params, MACs by the name `work`, and per kind of layer params, macs and their shares. Where
        MLPs were pruned, `unpruned` has the same of the model before."""
        from vtjax.account import flops, params
        from vtjax.methods import dgmr

        tokens = self.prompt_tokens or None
        out = {
            "model": self.name,
            "params": params.count(self.params),
            self.work: flops.macs(self.spec, tokens),
            **({"prompt_tokens": tokens} if tokens else {}),
            "kinds": _kinds(self.spec, tokens),
        }
        if tokens:
            return out
        if (before := dgmr.original(self.spec)) is not None:
            count = params.count(before)
            out["unpruned"] = {"params": count, "macs_per_image": flops.macs(before), "kinds": _kinds(before)}
        return out


def _kinds(spec: Spec, tokens: int | None = None) -> dict[str, dict[str, Any]]:
    from vtjax.account import flops

    rows = flops.by_kind(flops.layers(spec, tokens))
    params, macs = (max(sum(getattr(row, name) for row in rows), 1) for name in ("params", "macs"))
    return {
        row.kind: {
            **{"params": row.params, "params_share": row.params / params},
            **{"macs": row.macs, "macs_share": row.macs / macs},
        }
        for row in rows
    }


def open_model(target: str, overrides: Mapping[str, Any], tokens: int | None = None) -> Inspected:
    """A config's model (by its spec alone where the weights are not here), a workdir, a spec, or weights.

    Args:
      tokens: of a language model's prompt; None = `flops.PROMPT`.

    Raises:
      InputError: none of these.
    """
    import jax

    import vtjax
    from vtjax import spec as spec_lib
    from vtjax.cli import assemble
    from vtjax.weights import registry

    if target.partition(":")[0].endswith(".py"):
        config = config_lib.load_config(target, overrides=overrides)
        if (spec := registry.absent_spec(config.init_from)) is None:
            task = assemble.task(config)
            return Inspected(target, task.spec, jax.eval_shape(task.init, jax.random.key(0))[0])
        assemble.check_numbers(config)
        module = assemble.experiment(config.experiment)
        spec = module.surgery(config, spec) if hasattr(module, "surgery") else spec
        given = {name: config.model[name] for name in ("image_size", "classes") if name in config.model}
        return _abstract(target, spec.edit(**given), config.init_from)
    if target.endswith(".json"):
        if not Path(target).is_file():
            raise InputError(f"spec file {target} does not exist")
        return _abstract(target, spec_lib.from_json(Path(target).read_text()), tokens=tokens)
    if (spec := registry.absent_spec(target)) is not None:
        return _abstract(target, spec, target)
    model = vtjax.load(target)
    return Inspected(target, model.spec, model.params, tokens)


def _abstract(target: str, spec: Any, absent: str = "", tokens: int | None = None) -> Inspected:
    """A model by its spec alone; `absent` names weights that were not found."""
    import jax

    from vtjax.cli.assemble import say
    from vtjax.models import build

    if absent:
        say(f"the weights {absent!r} were not found along VTJAX_DATA; this is the spec that the registry has for them")
    return Inspected(target, spec, jax.eval_shape(build(spec).init, jax.random.key(0)), tokens)


def _describe(model: Inspected) -> str:
    from vtjax.account import params

    facts = model.facts()
    per = f"prompt of {model.prompt_tokens} tokens" if model.prompt_tokens else "image"
    head = f"{model.name}: {facts['params']:,} parameters, {facts[model.work]:,} MACs per {per} (1 MAC = 2 FLOPs)"
    arrays = [(*row[:4], f"{row.share:.1%}", f"{row.mbytes:.2f}") for row in params.table(model.params)]
    kinds = [
        (kind, k["params"], f"{k['params_share']:.1%}", k["macs"], f"{k['macs_share']:.1%}")
        for kind, k in facts["kinds"].items()
    ]
    if "unpruned" in facts:
        head += f"\nMLPs: {_mlps(facts)}; before they were pruned {_mlps(facts['unpruned'])}"
    return "\n\n".join(
        (
            head,
            _table(("field", "value"), _fields(model.spec)),
            _table(("parameters of", "kind", "arrays", "params", "share", "MB"), arrays),
            _table(("kind", "params", "share of params", "MACs", "share of MACs"), kinds),
        )
    )


def _mlps(facts: Mapping[str, Any]) -> str:
    params, macs = (facts["kinds"]["mlp"][f"{name}_share"] for name in ("params", "macs"))
    return f"{params:.1%} of {facts['params']:,} parameters, {macs:.1%} of {facts['macs_per_image']:,} MACs"


def _fields(spec: Spec) -> list[tuple[str, Any]]:
    """The spec's fields; equal neighbouring blocks share a line."""
    lines: list[tuple[str, Any]] = []
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if isinstance(value, ModelSpec):
            lines += [(f"{field.name}.{name}", part) for name, part in _fields(value)]
            continue
        if field.name != "blocks":
            lines.append((field.name, value))
            continue
        for block, group in itertools.groupby(enumerate(value), key=lambda item: item[1]):
            indices = [index for index, _ in group]
            span = str(indices[0]) if len(indices) == 1 else f"{indices[0]}..{indices[-1]}"
            lines.append((f"blocks[{span}]", _line(dataclasses.asdict(block))))
    return lines


def _line(value: Any) -> Any:
    """A value for a cell; the fields of a block in one line."""
    return ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, Mapping) else value


def _compare(first: Inspected, second: Inspected) -> str:
    a, b = first.facts(), second.facts()
    rows: list[tuple[Any, ...]] = []
    work = [first.work, second.work]
    per = " or ".join(dict.fromkeys(name.removeprefix("macs_per_") for name in work))
    for label, names in (("parameters", ["params"] * 2), (f"MACs per {per}", work)):
        x, y = a[names[0]], b[names[1]]
        rows.append((label, x, y, f"{y / max(x, 1):.3f}"))
    for share in ("params_share", "macs_share"):
        mlps = [facts["kinds"].get("mlp", {share: 0.0})[share] for facts in (a, b)]
        told = "parameters" if share == "params_share" else "MACs"
        rows.append((f"MLPs' share of {told}", *(f"{value:.1%}" for value in mlps), ""))
    for kind in dict.fromkeys([*a["kinds"], *b["kinds"]]):
        macs = [facts["kinds"].get(kind, {"macs": 0})["macs"] for facts in (a, b)]
        if any(macs):
            rows.append((f"MACs of {kind}", *macs, f"{macs[1] / macs[0]:.3f}" if macs[0] else ""))
    differences = [(name, _line(x), _line(y)) for name, (x, y) in first.spec.diff(second.spec).items()]
    head = ("", first.name, second.name)
    spec = _table(("spec", *head[1:]), differences) if differences else "equal specs"
    return f"{_table((*head, 'ratio'), rows)}\n\n{spec}"


def _table(header: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    from vtjax.viz import tables

    return tables.text(header, list(rows))
