# SPDX-License-Identifier: Apache-2.0
"""Replays recorded outputs of the LTMP release (layout: the vectors' own description) through vtjax.

Masked modes ("train", "eval") are replayed in the faithful form, removal ("inference") in the consistent form, whose
live tokens are those that the release keeps.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.conformance.arrays import Arrays
from vtjax.methods import ltmp
from vtjax.models.layers import Attention, Block
from vtjax.ops import losses
from vtjax.ops import token_reduction as ops
from vtjax.ops.tokens import Tokens
from vtjax.spec import BlockSpec, ViTSpec
from vtjax.weights import names, timm

SEPARATOR = "/"
EDGES = {"off": (1.0, 0.0), "all_pruned": (1.0, 1.0), "all_merged": (0.0, 0.0)}
"""(merge threshold, prune threshold) by the name of an edge case."""


def replay(arrays: Arrays) -> None:
    """Runs every case that the file holds."""
    for group, one in (("masker", masker), ("softmax", softmax), ("tome", tome), ("budget", budget), ("fixed", fixed)):
        for case in arrays.children(f"{group}/"):
            one(arrays, f"{group}/{case}/")
    for case in arrays.children("block/"):
        blocks(arrays, case)
    for model in arrays.children():
        if f"{model}/images" in arrays:
            Model(arrays, model).replay()


def masker(arrays: Arrays, at: str) -> None:
    """The straight-through masker and its gradients."""
    values, threshold, tau = (jnp.asarray(arrays[at + name]) for name in ("values", "threshold", "tau"))
    upstream = arrays[at + "upstream"]
    hard = functools.partial(ops.threshold_mask, tau=tau, exact=False)
    arrays.compare(at + "hard", hard(values, threshold), "exact")
    arrays.compare(at + "soft", jax.nn.sigmoid((values - threshold) / tau))
    arrays.compare(at + "inference", ops.threshold_mask(values, threshold, tau), "exact")
    grads = jax.grad(lambda v, t: (hard(v, t) * upstream).sum(), argnums=(0, 1))(values, threshold)
    arrays.compare(at + "grad_values", grads[0], "grad")
    arrays.compare(at + "grad_threshold", grads[1], "grad")


def softmax(arrays: Arrays, at: str) -> None:
    """The masked softmax with and without its training epsilon."""
    logits, mask = jnp.asarray(arrays[at + "logits"]), jnp.asarray(arrays[at + "mask"])
    upstream, eps = arrays[at + "upstream"], float(arrays[at + "eps"])
    for mode, value in (("train", eps), ("eval", 0.0)):
        run = functools.partial(ops.masked_softmax, eps=value)
        arrays.compare(f"{at}{mode}_out", run(logits, mask))
        grads = jax.grad(lambda s, a, run=run: (run(s, a) * upstream).sum(), argnums=(0, 1))(logits, mask)
        arrays.compare(f"{at}{mode}_grad_logits", grads[0], "grad")
        arrays.compare(f"{at}{mode}_grad_mask", grads[1], "grad")


def tome(arrays: Arrays, at: str) -> None:
    """ToMe's matching and merging."""
    metric, x, size = (jnp.asarray(arrays[at + name]) for name in ("metric", "x", "size"))
    prefix = int(arrays[at + "class_token"])
    tokens, _ = ops.merge_top(
        Tokens(x, size[..., 0]),
        None,
        ops.unit_features(metric[:, :, None]),
        int(arrays[at + "r"]),
        prefix,
        by_similarity=not prefix,
    )
    arrays.compare(at + "x_out", tokens.x)
    arrays.compare(at + "size_out", tokens.size[..., None])
    arrays.compare(at + "source", provenance(tokens.source, tokens.x.shape[1]), "exact")


def budget(arrays: Arrays, at: str) -> None:
    """The budget and its gradient."""
    masks, target, width = jnp.asarray(arrays[at + "masks"]), arrays[at + "target"], int(arrays[at + "embed_dim"])
    layers, _, slots = masks.shape
    costs = jnp.tile(jnp.asarray([[4.0 * width**2, 2.0 * width, 8.0 * width**2]]), (layers, 1))

    def ratio(masks: Any) -> Any:
        return ops.budget(masks.mean((1, 2)), slots, costs)[0]

    arrays.compare(at + "r_flops", ratio(masks))
    arrays.compare(at + "reg_loss", (ratio(masks) - target) ** 2)
    arrays.compare(at + "grad_masks", jax.grad(lambda m: (ratio(m) - target) ** 2)(masks), "grad")


def fixed(arrays: Arrays, at: str) -> None:
    """Blocks of the fixed-rate baselines."""
    x, size, heads = (
        jnp.asarray(arrays[at + "x"]),
        jnp.asarray(arrays[at + "size"])[..., 0],
        int(arrays[at + "num_heads"]),
    )
    merge, prune = int(arrays[at + "r_merge"]), int(arrays[at + "r_prune"])
    family, spec, params = block_of(arrays, at, heads)
    for variant in ltmp.FIXED:
        if f"{at}{variant}/x_out" not in arrays:
            continue
        block = Block(family, spec, reducer=ltmp.FixedRate(1, variant, merge, prune))
        tokens = Tokens(x, size if ltmp.merges(variant) else None)
        tokens, _ = jax.jit(lambda p, t, block=block: block.apply({"params": p}, t))(params, tokens)
        arrays.compare(f"{at}{variant}/x_out", tokens.x)
        if ltmp.merges(variant):
            arrays.compare(f"{at}{variant}/size_out", tokens.size[..., None])


def blocks(arrays: Arrays, case: str) -> None:
    """One block in every variant and mode, and its attention alone."""
    at = f"block/{case}/"
    x, size, mask = (
        jnp.asarray(arrays[at + "x"]),
        jnp.asarray(arrays[at + "size"])[..., 0],
        jnp.asarray(arrays[at + "mask"]),
    )
    tau, heads = float(arrays[at + "tau"]), int(arrays[at + "num_heads"])
    family, spec, params = block_of(arrays, at, heads)
    for mode in arrays.children(f"attn/{case}/"):
        alive = None if mode == "inference_all_alive" else mask
        attention = Attention(family, spec, implementation="auto" if alive is None else attend(mode))
        tokens = Tokens(x, size, alive)
        y, aux = attention.apply({"params": params["attn"]}, tokens, ("keys", "importance"))
        arrays.compare(f"attn/{case}/{mode}/out", y)
        arrays.compare(f"attn/{case}/{mode}/key_mean", aux["keys"].mean(2))
        arrays.compare(f"attn/{case}/{mode}/importance", ops.protect(aux["importance"], 1, alive))
    for variant in ltmp.VARIANTS:
        here = f"{at}{variant}/"
        knobs = {
            name: jnp.asarray(arrays[here + name])[0]
            for name in ("merge_threshold", "prune_threshold")
            if here + name in arrays
        }
        run = functools.partial(run_block, family, spec, params, variant, tau)
        for mode in arrays.children(here):
            if mode in ("train", "eval"):
                masked_block(arrays, f"{here}{mode}/", at, run, mode, variant, Tokens(x, size, mask), knobs)
            elif mode.startswith("inference_b"):
                row = int(mode.removeprefix("inference_b"))
                removal_block(arrays, f"{here}{mode}/", run, variant, knobs, x[row], mask[row], size[row])


def run_block(
    family: ViTSpec, spec: BlockSpec, params: Any, variant: str, tau: float, mode: str, tokens: Tokens, knobs: Any
) -> tuple[Tokens, Any, Any]:
    """(tokens that leave the block, residual stream before the MLP, aux)."""
    form = "consistent" if mode == "inference" else "faithful"
    reducer = ltmp.Ltmp(1, variant, form, tau)
    tokens = tokens if ltmp.merges(variant) else tokens.replace(size=None)
    want = ("keys", "importance")

    @jax.jit
    def both(params: Any, tokens: Tokens, knobs: Any) -> Any:
        implementation = "auto" if mode == "inference" else attend(mode)
        whole = Block(family, spec, reducer, implementation=implementation)
        upper = Block(family, BlockSpec(heads=spec.heads, head_dim=spec.head_dim, mlp=0, ffn=False), reducer)
        upper = upper.clone(implementation=implementation)
        out, aux = whole.apply({"params": params}, tokens, knobs, want)
        before, _ = upper.apply({"params": {k: params[k] for k in ("norm1", "attn")}}, tokens, knobs)
        return out, before.x, aux

    return both(params, tokens, knobs)


def masked_block(
    arrays: Arrays, here: str, at: str, run: Any, mode: str, variant: str, tokens: Tokens, knobs: dict[str, Any]
) -> None:
    """Mask mode: values, decisions, provenance, gradients."""
    upstream_x, upstream_mask = arrays[at + "upstream_x"], arrays[at + "upstream_mask"]
    out, before, aux = run(mode, tokens, knobs)
    decisions = aux["decisions"]
    arrays.compare(here + "x_out", out.x)
    arrays.compare(here + "mask_out", out.alive, "exact")
    arrays.compare(here + "pre_mlp", before)
    arrays.compare(here + "key_mean", aux["keys"].mean(2))
    arrays.compare(here + "importance", ops.protect(aux["importance"], 1, tokens.alive))
    if ltmp.merges(variant):
        arrays.compare(here + "size_out", out.size[..., None])
        start = np.broadcast_to(np.eye(out.x.shape[1]), (*out.x.shape[:2], out.x.shape[1]))
        arrays.compare(here + "viz_out", stale(start, decisions, out.source, out.alive), "exact")
    compare_decisions(arrays, here, decisions, lambda name, value: arrays.compare(here + name, value, kind_of(name)))

    def loss(x: Any, mask: Any, knobs: Any) -> Any:
        out, _, _ = run(mode, tokens.replace(x=x, alive=mask), knobs)
        return (out.x * upstream_x).sum() + (out.alive * upstream_mask).sum()

    to_x, to_mask, to_knobs = jax.grad(loss, argnums=(0, 1, 2))(tokens.x, tokens.alive, knobs)
    arrays.compare(here + "grad_x", to_x, "grad")
    arrays.compare(here + "grad_mask", to_mask, "grad")
    for name, value in to_knobs.items():
        arrays.compare(here + f"grad_{name}", value[None], "grad")


def removal_block(
    arrays: Arrays, here: str, run: Any, variant: str, knobs: dict[str, Any], x: Any, mask: Any, size: Any
) -> None:
    """Removal: the survivors of one image, in the release's order."""
    arrays.compare(here + "x_in", x[mask > 0.5][None], "exact")
    x_in = jnp.asarray(arrays[here + "x_in"])
    size_in = None
    if here + "size_in" in arrays:
        arrays.compare(here + "size_in", size[mask > 0.5][None, :, None], "exact")
        size_in = jnp.asarray(arrays[here + "size_in"])[..., 0]
    out, before, aux = run("inference", Tokens(x_in, size_in), knobs)
    kept = int(out.alive.sum())
    arrays.compare(here + "x_out", out.x[:, :kept])
    arrays.compare(here + "pre_mlp", before[:, :kept])
    arrays.compare(here + "importance", ops.protect(aux["importance"], 1, None))
    if ltmp.merges(variant):
        arrays.compare(here + "size_out", out.size[:, :kept, None])
    decisions = dict(aux["decisions"])
    if variant == "ltmp":  # the release prunes what the merge has left
        left = np.concatenate([[True], decisions["merge_mask"][0] < 0.5, np.ones(x_in.shape[1] // 2, bool)])
        decisions |= {name: decisions[name][:, left] for name in ("prune_score", "prune_mask")}
    if variant == "ltpm":  # and matches what the pruning has left
        left = (int(decisions["prune_mask"].sum()) + 1) // 2 - 1
        decisions |= {name: decisions[name][:, :left] for name in ("best_similarity", "best_index", "merge_mask")}
    compare_decisions(arrays, here, decisions, lambda name, value: arrays.compare(here + name, value, kind_of(name)))


def kind_of(name: str) -> str:
    """Tolerance of a decision's array."""
    return "exact" if name.endswith("mask") else "value"


def compare_decisions(arrays: Arrays, here: str, decisions: Any, compare: Any) -> None:
    """Decisions of one block, or of all (arrays with layers in front); the class token's row is added to A's."""
    if "merge_mask" in decisions:
        merged = np.asarray(decisions["merge_mask"])
        lead = [(0, 0)] * (merged.ndim - 1) + [(1, 0)]
        merged = np.pad(merged, lead)
        compare("best_sim", np.pad(np.asarray(decisions["best_similarity"]), lead, constant_values=-np.inf))
        compare("merge_mask", merged)
        partner = np.pad(np.asarray(decisions["best_index"]), lead)
        arrays.compare(here + "best_idx", partner, "exact", where=merged > 0.5)  # others may tie
    if "prune_score" in decisions:
        compare("prune_score", decisions["prune_score"])
        compare("prune_mask", decisions["prune_mask"])


class Model:
    """A whole ViT in every variant and mode."""

    def __init__(self, arrays: Arrays, name: str):
        self.arrays, self.name = arrays, name
        at = f"{name}/"
        weights = {n: arrays[f"{at}w/{n}"] for n in arrays.names(f"{at}w/")}
        self.images = jnp.asarray(arrays[at + "images"]).transpose(0, 2, 3, 1)
        self.labels = jnp.asarray(arrays[at + "labels"])
        self.depth = int(arrays[at + "depth"])
        hidden, width = weights["blocks.0.mlp.fc1.weight"].shape
        self.dense = ViTSpec.uniform(
            depth=self.depth,
            width=width,
            heads=int(arrays[at + "num_heads"]),
            mlp=hidden,
            image_size=self.images.shape[1:3],
            patch=int(arrays[at + "patch_size"]),
            classes=weights["head.weight"].shape[0],
        )
        self.params = jax.tree.map(jnp.asarray, names.to_ours(self.dense, weights, timm.table(self.dense), "", at))
        numbers = ("tau", "reg_lambda", "target", "label_smoothing", "lr_merge", "lr_prune")
        self.tau, self.weight, self.target, self.smoothing, *rates = (float(arrays[at + n]) for n in numbers)
        self.jitted: dict[Any, Any] = {}
        self.rates = dict(zip(("merge_threshold", "prune_threshold"), rates, strict=True))

    def replay(self) -> None:
        """All variants; then the edge cases."""
        for variant in ltmp.VARIANTS:
            here = f"{self.name}/{variant}/"
            kinds = [n for n in ("merge_threshold", "prune_threshold") if f"{here}{n}s" in self.arrays]
            if not kinds:
                continue
            thresholds = {kind: jnp.asarray(self.arrays[f"{here}{kind}s"]) for kind in kinds}
            for mode in ("train", "eval"):
                self.masked(f"{here}{mode}/", variant, mode, thresholds)
            self.removal(f"{here}inference/", variant, thresholds)
            self.descend(f"{here}sgd/", variant)
        for case in EDGES:
            for variant in self.arrays.children(f"{self.name}_edge/{case}/"):
                self.edge(f"{self.name}_edge/{case}/{variant}/", variant, EDGES[case])

    def run(self, variant: str, mode: str) -> Any:
        """Jitted `(thresholds) -> (logits, aux)`."""
        if (variant, mode) in self.jitted:
            return self.jitted[variant, mode]
        spec, _ = ltmp.install(
            self.dense, variant=variant, form="consistent" if mode == "inference" else "faithful", tau=self.tau
        )
        model = ltmp.vit(spec, training=mode == "train")
        apply = jax.jit(lambda knobs: model.apply(self.params, self.images, knobs=knobs, want=("tokens",)))
        return self.jitted.setdefault((variant, mode), apply)

    def losses(self, variant: str) -> Any:
        """Jitted `(thresholds) -> [ce, r, reg, loss]` while training, and its Jacobian."""
        if variant in self.jitted:
            return self.jitted[variant]

        def values(knobs: Any) -> Any:
            logits, aux = self.run(variant, "train")(knobs)
            ce = losses.cross_entropy(logits, self.labels, label_smoothing=self.smoothing).mean()
            fractions = ltmp.alive_fractions(aux, self.dense.tokens).mean(1)
            ratio = ops.budget(fractions, self.dense.tokens, jnp.asarray(ltmp.costs(self.dense)))[0]
            reg = (ratio - self.target) ** 2
            return jnp.stack([ce, ratio, reg, ce + self.weight * reg])

        return self.jitted.setdefault(variant, (jax.jit(values), jax.jit(jax.jacrev(values))))

    def masked(self, here: str, variant: str, mode: str, thresholds: Any) -> None:
        """Mask mode of the whole model; in training its losses and gradients, too."""
        logits, aux = self.run(variant, mode)(thresholds)
        compare = self.arrays.compare
        compare(here + "logits", logits, "logits")
        decisions = [block["decisions"] for block in aux["blocks"]]
        compare(here + "masks", np.stack([d["alive"] for d in decisions]), "exact")
        compare(here + "x_last", aux["tokens"].x)
        stacked = {name: np.stack([d[name] for d in decisions]) for name in decisions[0]}
        compare_decisions(self.arrays, here, stacked, lambda n, v: compare(here + n, v, kind_of(n)))
        if ltmp.merges(variant):
            compare(here + "sizes", np.stack([block["tokens"].size for block in aux["blocks"]]))
            viz, slots = [], self.dense.tokens
            last = np.broadcast_to(np.eye(slots), (len(logits), slots, slots))
            for block in aux["blocks"]:
                last = stale(last, block["decisions"], block["tokens"].source, block["tokens"].alive)
                viz.append(last)
            compare(here + "viz", np.stack(viz), "exact")
        if mode == "train":
            values, jacobian = (f(thresholds) for f in self.losses(variant))
            for i, name in enumerate(("ce", "r_flops", "reg_loss", "loss")):
                compare(here + name, values[i], "logits" if name in ("ce", "loss") else "value")
            for i, name in ((0, "ce"), (2, "reg"), (3, "loss")):
                for kind, grad in jacobian.items():
                    compare(f"{here}grad_{name}_{kind.removesuffix('_threshold')}", grad[i], "grad")

    def removal(self, here: str, variant: str, thresholds: Any) -> None:
        """Removal mode: logits, counts, owners and sizes."""
        logits, aux = self.run(variant, "inference")(thresholds)
        compare = self.arrays.compare
        compare(here + "logits", logits, "logits")
        decisions = [block["decisions"] for block in aux["blocks"]]
        kept = np.stack([d["kept"] for d in decisions])
        compare(here + "counts", kept, "exact")
        after = kept + np.stack([d["pruned"] for d in decisions]) if variant == "ltmp" else kept
        compare(here + "counts_after_merge", after, "exact")
        owners = np.stack([d["source"] for d in decisions])
        compare(here + "owner", owners, "exact")
        live = np.arange(self.dense.tokens) < kept[..., None]
        sizes = [ops.filled(block["tokens"])[0] for block in aux["blocks"]]
        compare(here + "sizes", np.where(live, np.stack(sizes), 0))

    def descend(self, here: str, variant: str) -> None:
        """Plain SGD on the thresholds, clamped to [0, 1] after each step."""
        recorded = {n: self.arrays[f"{here}{n}s"] for n in self.rates if f"{here}{n}s" in self.arrays}
        if not recorded:
            return
        thresholds = {name: jnp.asarray(values[0]) for name, values in recorded.items()}
        seen: list[Any] = []
        path = {name: [values[0]] for name, values in recorded.items()}
        for _ in range(len(next(iter(recorded.values()))) - 1):
            values, jacobian = (f(thresholds) for f in self.losses(variant))
            seen.append((values[3], values[1]))
            for name in recorded:
                step = thresholds[name] - self.rates[name] * jacobian[name][3]
                thresholds[name] = jnp.clip(step, 0.0, 1.0)
                path[name].append(thresholds[name])
        for name in recorded:
            self.arrays.compare(f"{here}{name}s", np.stack(path[name]))
        self.arrays.compare(here + "loss", np.stack([s[0] for s in seen]), "logits")
        self.arrays.compare(here + "r_flops", np.stack([s[1] for s in seen]))

    def edge(self, here: str, variant: str, constants: tuple[float, float]) -> None:
        """Constant thresholds."""
        used = (("merge_threshold", ltmp.merges(variant)), ("prune_threshold", ltmp.prunes(variant)))
        knobs = {name: jnp.full(self.depth, value) for (name, has), value in zip(used, constants, strict=True) if has}
        compare = self.arrays.compare
        logits, aux = self.run(variant, "train")(knobs)
        compare(here + "train_logits", logits, "logits")
        compare(here + "masks", np.stack([block["decisions"]["alive"] for block in aux["blocks"]]), "exact")
        compare(here + "eval_logits", self.run(variant, "eval")(knobs)[0], "logits")
        values, jacobian = (f(knobs) for f in self.losses(variant))
        compare(here + "r_flops", values[1])
        compare(here + "loss", values[3], "logits")
        for kind, grad in jacobian.items():
            compare(f"{here}grad_loss_{kind.removesuffix('_threshold')}", grad[3], "grad")
        removed, _ = self.run(variant, "inference")(knobs)
        # The release's removal mode crashes where nothing is left to match; its masked mode says what is right there.
        stands_in = "inference_logits" if here + "inference_logits" in self.arrays else "eval_logits"
        compare(here + stands_in, removed, "logits")


def attend(mode: str) -> Any:
    """The release's attention in a masked mode."""
    return functools.partial(ops.faithful_attention, training=True) if mode == "train" else ops.faithful_attention


def block_of(arrays: Arrays, at: str, heads: int) -> tuple[ViTSpec, BlockSpec, Any]:
    """A block's family, spec and parameters from weights in PyTorch's layout."""
    weights = {name: arrays[f"{at}w/{name}"] for name in arrays.names(f"{at}w/")}
    hidden, width = weights["mlp.fc1.weight"].shape
    family = ViTSpec.uniform(depth=1, width=width, heads=heads, mlp=hidden, image_size=32, patch=16)
    qkv = {
        name: {"kernel": kernel.T, "bias": bias}
        for name, kernel, bias in zip(
            ("query", "key", "value"),
            np.split(weights["attn.qkv.weight"], 3),
            np.split(weights["attn.qkv.bias"], 3),
            strict=True,
        )
    }

    def dense(name: str) -> dict[str, np.ndarray]:
        return {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}

    params = {
        "attn": {**qkv, "out": dense("attn.proj")},
        "mlp": {"up": dense("mlp.fc1"), "down": dense("mlp.fc2")},
        **{n: {"scale": weights[f"{n}.weight"], "bias": weights[f"{n}.bias"]} for n in ("norm1", "norm2")},
    }
    return family, family.blocks[0], jax.tree.map(jnp.asarray, params)


def provenance(source: Any, slots: int) -> np.ndarray:
    """0/1 `[B, slots, originals]` from `source`."""
    return (np.asarray(source)[:, None, :] == np.arange(slots)[None, :, None]).astype(np.uint8)


def stale(before: np.ndarray, decisions: Any, source: Any, alive: Any) -> np.ndarray:
    """The release's provenance after a block: slots are re-ordered as A, B; a merged token's originals are added to its
    partner's, a dead slot keeps the row it had. For live slots it is what `source` says, else an AssertionError."""
    after = before.copy()
    for row, (merged, partner) in enumerate(zip(decisions["merge_mask"], decisions["best_index"], strict=True)):
        for i in np.flatnonzero(np.asarray(merged) > 0.5):
            after[row, 2 * int(partner[i]) + 1] += before[row, 2 * i + 2]
    slots = before.shape[1]
    after = after[:, np.concatenate([np.arange(0, slots, 2), np.arange(1, slots, 2)])]
    live = np.asarray(alive) > 0.5
    assert (after[live] == provenance(source, slots)[live]).all(), "source disagrees with what was merged"
    return after
