# SPDX-License-Identifier: Apache-2.0
"""What `test_videos.py` runs on eight CPU devices: `python -m tests.parallel.videos`. A multimodal model whose frames
lie over the context axis beside the local model on one device; prints JSON, one line per case."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vtjax.models.bridge import Frames
from vtjax.models.vlm import VLM
from vtjax.parallel import frames, rules
from vtjax.parallel import mesh as mesh_lib
from vtjax.parallel.xattn import attend_over
from vtjax.spec import BridgeSpec, CrossSpec, LMSpec, TiledViTSpec, ViTSpec, VLMSpec
from vtjax.weights import names

B, F, N, IMAGE = 4, 5, 16, 5
TOWER = ViTSpec.uniform(depth=1, width=16, heads=2, mlp=16, image_size=8, patch=4)
TILED = TiledViTSpec.uniform(
    depth=2, global_blocks=1, width=16, heads=2, mlp=16, image_size=8, patch=4, tiles=4, features=()
)
TEXT = LMSpec.uniform(depth=2, width=16, heads=4, kv_heads=2, mlp=24, vocab=32, context=64)
CROSS = {
    "flamingo": (TOWER, BridgeSpec("none", cross=CrossSpec.flamingo((0, 1), 16, 2, 8)), TEXT),
    "hyper": (TOWER, BridgeSpec(hidden=16, cross=CrossSpec.hyper((0, 1))), TEXT),
    "fused": (TOWER, BridgeSpec(hidden=16, cross=CrossSpec.fused((0, 1))), TEXT),
    "pooled": (TOWER, BridgeSpec(hidden=16, pool=(2, 2), cross=CrossSpec.hyper((1,))), TEXT),
    "mllama": (
        TILED,
        BridgeSpec("linear", prefix=True, cross=CrossSpec.mllama((1,), 4, 2, 4, 24)),
        TEXT.edit(blocks={1: {"attn": False, "ffn": False}}),
    ),
}
MESHES: dict[str, dict[str, int]] = {
    "context": {"data": 1, "context": 8},
    "data": {"data": 2, "context": 4},
    "fsdp": {"data": 1, "fsdp": 2, "context": 4},
    "all": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
    "slices": {"data": 1, "slice": 2, "context": 4},
    "slices and fsdp": {"data": 1, "fsdp": 2, "slice": 2, "context": 2},
}


class Drop:
    """A reducer of a tower that prunes the first token of every image but the class token."""

    def __call__(self, tokens: Any, aux: Any, knobs: Any) -> Any:
        return tokens.replace(alive=jnp.ones(tokens.x.shape[:2]).at[:, 1].set(0.0)), {}


def described(form: str) -> VLMSpec:
    tower, bridge, text = CROSS[form]
    return VLMSpec(tower, bridge, text, IMAGE)


def drawn(spec: VLMSpec) -> Any:
    rng = np.random.default_rng(2)
    flat = {name: 0.3 * rng.standard_normal(shape) for name, shape in names.shapes(spec).items()}
    return names.unflatten({name: (a + name.endswith("scale")).astype(np.float32) for name, a in flat.items()})


def batch(count: int = F) -> dict[str, np.ndarray]:
    """Texts of two clips, whose frames take turns; each row of the text sees one, both or nothing."""
    rng = np.random.default_rng(0)
    ids = rng.integers(6, 32, (B, N)).astype(np.int32)
    ids[:, [0, 2]] = IMAGE
    number = np.broadcast_to(np.arange(count) % 2 + 1, (B, count)).astype(np.int32).copy()
    number[1, 2:] = 0
    number[1, 1] = 2
    sees = np.stack([rng.integers(1, 3, (B, N)), rng.integers(0, 3, (B, N))], -1).astype(np.int32)
    images = rng.standard_normal((B, count, 8, 8, 3)).astype(np.float32)
    return {"ids": ids, "images": images, "image_number": number, "image_interval": sees}


def laid(given: dict[str, np.ndarray], mesh: Any, stripe: bool) -> dict[str, np.ndarray]:
    """Frames in the order of the devices, filled up."""
    devices = mesh_lib.axes_size(mesh, mesh_lib.frame_axes(mesh))
    order = np.array(frames.order(given["images"].shape[1], devices, stripe))
    there = order >= 0
    images = np.where(there[:, None, None, None], given["images"][:, order], 0)
    return {**given, "images": images, "image_number": np.where(there, given["image_number"][:, order], 0)}


def distributed(spec: VLMSpec, **options: Any) -> VLM:
    attend = {name: options.pop(name) for name in ("strategy", "check_vma") if name in options}
    through = Frames(frames.join, frames.split, frames.constrain, frames.visual)
    # Under a mesh that has slices parts are merged within them first.
    slices = "slice" in jax.sharding.get_abstract_mesh().shape
    over = attend_over(None, ("slice", "context") if slices else "context", slow=slices, **attend)
    return VLM(spec, constrain=rules.constrain, attend=over, frames=through, **options)


def graded(model: VLM) -> Any:
    def loss(params: Any, given: Any) -> jax.Array:
        told = {name: given[name] for name in ("image_number", "image_interval")}
        logits, _ = model.apply(params, given["ids"], given["images"], **told)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), given["ids"][:, 1:, None], -1).mean()

    return jax.value_and_grad(loss)


def placed(spec: VLMSpec, given: dict[str, np.ndarray], mesh: Any) -> tuple[Any, Any]:
    params = drawn(spec)
    params = jax.tree.map(mesh_lib.put, params, rules.shardings(params, mesh))
    return params, mesh_lib.place(given, mesh, B, frames=("images", "image_number"))


def worst(found: Any, wanted: Any) -> float:
    """The largest difference of any array, over that array's largest value (at least a thousandth of the largest of
    all)."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True))
    least = 1e-3 * max(float(np.abs(b).max()) for _, b in pairs)
    return max(float(np.abs(np.asarray(a) - b).max()) / max(float(np.abs(b).max()), least) for a, b in pairs)


def agreement(form: str, mesh_name: str, stripe: bool = True, **options: Any) -> float:
    """Loss and gradients over a mesh against the local model."""
    spec, given = described(form), batch()
    alone = VLM(spec, tower_reducers=options.get("tower_reducers", ()))
    wanted = jax.device_get(jax.jit(graded(alone))(drawn(spec), given))
    mesh = mesh_lib.make(MESHES[mesh_name])
    with jax.set_mesh(mesh):
        found = jax.jit(graded(distributed(spec, **options)))(*placed(spec, laid(given, mesh, stripe), mesh))
        return worst(jax.device_get(found), wanted)


def generated(form: str, mesh_name: str) -> bool:
    """Whether the tokens are the local model's."""
    spec, given = described(form), batch()
    shown = {"images": given["images"], "image_number": given["image_number"], "new_tokens": 6}
    wanted, _ = VLM(spec).generate(drawn(spec), given["ids"], **shown)
    mesh = mesh_lib.make(MESHES[mesh_name])
    with jax.set_mesh(mesh):
        params, put = placed(spec, laid(given, mesh, True), mesh)
        shown |= {name: put[name] for name in ("images", "image_number")}
        found, _ = distributed(spec).generate(params, put["ids"], **shown)
    return np.asarray(found).tolist() == np.asarray(wanted).tolist()


COLLECTIVE = re.compile(r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(")


def collectives(line: str) -> list[str]:
    """Kind and shape of what a line of a compiled program sends; several arrays where it was combined."""
    found = COLLECTIVE.search(line)
    return [] if found is None else [f"{found[2]} {x}" for x in re.findall(r"[a-z]+\d+\[[\d,]*\]", found[1])]


def sent(form: str, mesh_name: str, count: int) -> dict[str, int]:
    """Collectives of the compiled step, by kind and shape."""
    spec, mesh = described(form), mesh_lib.make(MESHES[mesh_name])
    with jax.set_mesh(mesh):
        arguments = placed(spec, laid(batch(count), mesh, True), mesh)
        text = jax.jit(graded(distributed(spec))).lower(*arguments).compile().as_text()
    assert text is not None
    return dict(Counter(told for line in text.splitlines() for told in collectives(line)))


def crossing(form: str, count: int) -> dict[str, int]:
    """The same under two slices: what goes from one to the other."""
    spec, mesh = described(form), mesh_lib.make(MESHES["slices"])
    with jax.set_mesh(mesh):
        arguments = placed(spec, laid(batch(count), mesh, True), mesh)
        text = jax.jit(graded(distributed(spec, strategy="gather_q"))).lower(*arguments).compile().as_text()
    assert text is not None
    found: Counter[str] = Counter()
    for line in text.splitlines():
        if (told := collectives(line)) and any(min(group) < 4 <= max(group) for group in together(line)):
            found.update(told)
    return dict(found)


def together(line: str) -> list[list[int]]:
    """Devices of a collective that speak with each other."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return [[int(d) for d in pair.split(",")] for pair in re.findall(r"[\d,]+\d", pairs[1])]
    if brief := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, whole, turned = ([int(d) for d in part.split(",")] if part else [] for part in brief.groups())
        order = np.arange(np.prod(whole)).reshape(whole)
        return (order.transpose(turned) if turned else order).reshape(shape).tolist()
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? \{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        order = np.arange(math.prod(sizes.values()))
        if named[2]:
            whole, turned = (re.findall(r"\d+", part) for part in re.findall(r"\[[\d,]+\]|T\([\d,]+\)|$", named[2])[:2])
            order = order.reshape([int(d) for d in whole])
            order = order.transpose([int(d) for d in turned]) if turned else order
        along = re.findall(r"'(\w+)'", named[3])
        order = order.reshape(list(sizes.values()))
        axes = [i for i, name in enumerate(sizes) if name in along]
        count = math.prod(order.shape[axis] for axis in axes)
        return np.moveaxis(order, axes, range(-len(axes), 0)).reshape(-1, count).tolist()
    written = re.search(r"replica_groups=\{(\{.*?\})\}", line)
    assert written is not None, line
    return [[int(d) for d in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", written[1])]


def main(cases: list[str]) -> None:
    def say(case: str, **told: Any) -> None:
        print(json.dumps({"case": case, **told}), flush=True)

    if "forms" in cases:
        for form in CROSS:
            for mesh in ("context", "data", "all"):
                say("agreement", form=form, mesh=mesh, error=agreement(form, mesh))
    if "strategies" in cases:
        for strategy in ("gather_q", "gather_q_scatter", "ring_q", "ring_kv", "replicated_q"):
            say("agreement", strategy=strategy, error=agreement("flamingo", "data", strategy=strategy))
        say("agreement", stripe=False, error=agreement("flamingo", "data", stripe=False))
        say("agreement", dropping=True, error=agreement("flamingo", "data", tower_reducers=((0, Drop()),)))
    if "recomputed" in cases:
        for check in (True, False):
            for remat in ("names", "full"):
                told = {"remat": remat, "check_vma": check, "strategy": "gather_q"}
                for form, mesh in (("hyper", "all"), ("flamingo", "data")):
                    say("agreement", form=form, **told, error=agreement(form, mesh, **told))
    if "slices" in cases:
        for form, mesh in (
            ("flamingo", "slices"),
            ("hyper", "slices and fsdp"),
            ("mllama", "slices"),
            ("fused", "slices"),
        ):
            say("agreement", form=form, mesh=mesh, error=agreement(form, mesh))
        say("agreement", remat="names", error=agreement("flamingo", "slices", remat="names"))
    if "generated" in cases:
        for form in CROSS:
            say("generated", form=form, same=generated(form, "data"))
        for mesh in ("context", "all", "slices"):
            say("generated", form="flamingo", mesh=mesh, same=generated("flamingo", mesh))
    if "sent" in cases:
        for form in ("flamingo", "mllama"):
            for mesh in ("context", "data", "fsdp"):  # the tensor axis sums over every token, frames' too
                say("sent", form=form, mesh=mesh, few=sent(form, mesh, 8), many=sent(form, mesh, 24))
    if "crossing" in cases:
        for form in ("flamingo", "hyper"):
            told = {"few": crossing(form, 8), "many": crossing(form, 24)}
            say("crossing", form=form, layers=len(described(form).bridge.cross.layers), **told)


if __name__ == "__main__":
    main(sys.argv[1:])
