# SPDX-License-Identifier: Apache-2.0
"""Tiny random multimodal models, recorded from transformers: names, logits, and the counts of published ones."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

import vtjax
from vtjax.data import transforms
from vtjax.errors import InputError
from vtjax.models.lm import LM
from vtjax.ops import cross_attention
from vtjax.ops.cross_attention import Memory
from vtjax.spec import CrossSpec, LMSpec
from vtjax.weights import hf_lm, names

ORACLE = Path(__file__).resolve().parents[1] / "oracle"


def arrays_of(name):
    with np.load(ORACLE / f"vlm_{name}.npz") as data:
        return {n: data[n] for n in data.files}


def folder_of(path, arrays, rename=lambda n: n, **changes):
    (path / "config.json").write_text(json.dumps({**json.loads(str(arrays["config"])), **changes}))
    save_file({rename(n[2:]): a for n, a in arrays.items() if n.startswith("w:")}, path / "model.safetensors")
    return path


def renamed(name):
    """As releases that keep the head beside the decoder write it."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    stem = name.replace("language_model.model.", "language_model.").replace(
        "vision_tower.", "vision_tower.vision_model."
    )
    return f"model.{stem}"


def test_a_llava_folder_gives_the_logits_of_transformers(tmp_path):
    arrays = arrays_of("llava")
    m = vtjax.load(folder_of(tmp_path, arrays))
    assert m.spec.tower.feature_layer == -2 and m.spec.placeholders == 4 and m.spec.image_token == 31
    images = np.zeros((2, 2, 8, 8, 3), np.float32)
    images[0], images[1, 0] = arrays["images"][:2], arrays["images"][2]
    run = jax.jit(lambda p: m.apply(p, arrays["input_ids"], images, image_mask=np.array([[1, 1], [1, 0]])))
    y, aux = run(m.params)
    np.testing.assert_allclose(y, arrays["logits"], atol=2e-5)
    assert aux["visual"].shape == (2, 8, 16)
    (tmp_path / "new").mkdir()
    other = vtjax.load(folder_of(tmp_path / "new", arrays, renamed))
    jax.tree.map(np.testing.assert_array_equal, m.params, other.params)


def test_what_a_folder_leaves_out_is_the_default_of_its_family():
    """The published LLaVA-1.5-7B says of its decoder this, and no more."""
    said = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
    spec = hf_lm.spec_from_config(said, "llava-1.5-7b")
    assert (spec.depth, spec.width, spec.blocks[0].mlp, spec.eos) == (32, 4096, 11008, (2,))
    assert {(b.heads, b.kv_heads, b.head_dim) for b in spec.blocks} == {(32, 32, 128)}
    assert hf_lm.spec_from_config({**said, "eos_token_id": None}, "none").eos == ()
    assert hf_lm.spec_from_config(said, "own", {"eos_token_id": [3, 4]}).eos == (3, 4)


def test_a_llava_folder_answers_in_words(tmp_path):
    m = vtjax.load(folder_of(tmp_path, arrays_of("llava")))
    words = ["[UNK]", "what", "colour", "?", *map(str, range(4, 29))]
    known = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    known.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    known.add_special_tokens(["<answer>", "<end>"])
    known.save(str(tmp_path / "tokenizer.json"))
    picture = np.random.default_rng(0).integers(0, 255, (20, 12, 3)).astype(np.uint8)
    with pytest.raises(InputError, match="must be known how texts are written: by VLMSpec.text, .* or by tokenizer="):
        m.answer(picture, "what ?")
    with pytest.raises(InputError, match="go together, found tokenizer=None, template='plain'"):
        m.answer(picture, "what ?", template="plain")
    with pytest.raises(InputError, match="must know the control tokens that a template says, found no '<s>'"):
        m.answer(picture, "what ?", tokenizer=tmp_path, template="vicuna")
    said = m.answer(picture, "what colour ?", new_tokens=3, tokenizer=tmp_path, template="plain")
    ids = np.array([[0] * 8 + [31] * 4 + [1, 2, 3, known.token_to_id("<answer>")]], np.int32)
    ready = m.spec.preprocess
    assert not ready.squash  # what it was trained on: the middle of the picture
    small = transforms.evaluate(picture, (8, 8), ready.crop, ready.interpolation)
    images = transforms.normalise(small, ready.mean, ready.std)[None]
    tokens, count = m.generate(m.params, ids, images, (np.arange(16)[None] >= 8).astype(np.int32), new_tokens=3)
    assert said == known.decode(np.asarray(tokens)[0, : int(count[0])].tolist())


def renamed_mllama(name):
    """As the modules of transformers 5 are called."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    return f"model.{name.replace('language_model.model.', 'language_model.')}"


def test_a_folder_of_llama_vision_gives_the_logits_of_transformers(tmp_path):
    """Tiled tower, projector and cross-attention, all gates open; three aspect ratios, and a text with filling.

    transformers 5.24 takes what leaves the layers [0, 2]; the model was made, and released, with what enters a layer
    (huggingface/transformers#39785), so the recorded one is that of [1, 3].
    """
    arrays = arrays_of("mllama_tiled")
    vision = {**json.loads(str(arrays["config"]))["vision_config"], "intermediate_layers_indices": [1, 3]}
    m = vtjax.load(folder_of(tmp_path, arrays, vision_config=vision))
    tower = m.spec.tower
    assert (tower.depth, tower.local, tower.features, tower.output_width) == (5, 3, (1, 3), 24)
    assert (m.spec.image_token, m.spec.decoder.ids, m.spec.visual_tokens) == (32, 40, 20)
    ratio = arrays["aspect_ratio"]
    run = jax.jit(lambda p, ratio: m.apply(p, arrays["input_ids"], arrays["images"], aspect_ratio=ratio))
    y, aux = run(m.params, ratio)
    np.testing.assert_allclose(y, arrays["logits"], atol=2e-5)
    assert aux["visual"].shape == (2, 40, 16)
    assert np.abs(run(m.params, np.array([[8, 1], [6, 0]]))[0] - y)[0].max() > 1e-2  # four rows, not three
    (tmp_path / "new").mkdir()
    other = vtjax.load(folder_of(tmp_path / "new", arrays, renamed_mllama, vision_config=vision))
    jax.tree.map(np.testing.assert_array_equal, m.params, other.params)


@pytest.mark.parametrize(
    "part,changes,says",
    [
        ("vision_config", {"hidden_act": "relu"}, "vision_config.hidden_act must be one of gelu, .*found 'relu'"),
        ("vision_config", {"intermediate_layers_indices": [0, 4]}, r"indices must be in 0\.\.3, found 4"),
        ("vision_config", {"intermediate_layers_indices": [-1]}, r"indices must be in 0\.\.3, found -1"),
        ("vision_config", {"supported_aspect_ratios": [[1, 1], [2, 2]]}, "supported_aspect_ratios must be all of"),
        ("vision_config", {"vision_output_dim": 32}, "vision_output_dim must be 24, .*found 32"),
        ("vision_config", {"image_size": 10}, r"positive multiple of patch=4, found \(10, 10\)"),
        ("text_config", {"cross_attention_layers": [3]}, r"cross_attention_layers must be in 0\.\.2, found 3"),
        ("text_config", {"tie_word_embeddings": True}, "tie_word_embeddings must be false, found true"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act must be one of silu, found 'gelu'"),
        ("text_config", {"cross_attention_layers": []}, "CrossSpec.layers must name at least one layer, found none"),
    ],
)
def test_a_folder_of_llama_vision_that_cannot_be_read_is_one_line(tmp_path, part, changes, says):
    arrays = arrays_of("mllama_tiled")
    changed = {part: {**json.loads(str(arrays["config"]))[part], **changes}}
    with pytest.raises(InputError, match=says) as caught:
        vtjax.load(folder_of(tmp_path, arrays, **changed))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings,says",
    [
        ({"max_image_tiles": 6}, "max_image_tiles must be the model's 4, found 6"),
        ({"size": {"height": 9}}, "size must"),
    ],
)
def test_the_image_processor_must_be_that_of_the_tower(tmp_path, settings, says):
    mean = [0.25, 0.5, 0.75]
    good = {"max_image_tiles": 4, "size": {"height": 8, "width": 8}, "resample": 2, "image_mean": mean}
    folder = folder_of(tmp_path, arrays_of("mllama_tiled"))
    (folder / "preprocessor_config.json").write_text(json.dumps(good))
    preprocess = vtjax.load(folder).spec.preprocess
    assert (preprocess.crop, preprocess.interpolation, preprocess.mean) == (1.0, "bilinear", tuple(mean))
    (folder / "preprocessor_config.json").write_text(json.dumps({**good, **settings}))
    with pytest.raises(InputError, match=says):
        vtjax.load(folder)


@pytest.mark.parametrize(
    "changes,says",
    [
        ({"vision_feature_layer": [-2, -3]}, "vision_feature_layer must be one number"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act must be one of gelu, found 'relu'"),
        ({"image_token_index": None, "text_config": {"model_type": "mamba"}}, "text_config.model_type must be one of"),
        ({"multimodal_projector_bias": False}, "2 extra: linear_1.bias, linear_2.bias"),
    ],
)
def test_a_folder_that_cannot_be_read_is_one_line(tmp_path, changes, says):
    with pytest.raises(InputError, match=says):
        vtjax.load(folder_of(tmp_path, arrays_of("llava"), **changes))


def test_cross_attention_layers_are_those_of_llama_vision():
    arrays = arrays_of("mllama")
    text = LMSpec.uniform(
        depth=3, width=16, heads=4, kv_heads=2, mlp=24, vocab=32, extra=8, eps=1e-5, tied=False, rope_base=500_000.0
    ).edit(blocks={1: {"attn": False, "ffn": False}})
    model = LM(text, cross=CrossSpec.mllama((1,), 4, 2, 4, 24))
    ids, visual = arrays["input_ids"], arrays["visual"]
    low, high = cross_attention.interval(jnp.asarray(ids == 32), "run")
    number = jnp.repeat(jnp.array([[1, 2, 3], [1, 2, 0]]), 5, axis=1)
    memory = Memory(jnp.asarray(visual.reshape(2, 15, 16)), number, 0 * number, low, high)
    y, _ = jax.jit(lambda p: model.apply(p, ids, memory=memory))(mllama_params(arrays, text))
    np.testing.assert_allclose(y, arrays["logits"], atol=2e-5)


def mllama_params(arrays, text):
    """The recorded weights by our names."""
    found = {n[2:].removeprefix("model."): a for n, a in arrays.items() if n.startswith("w:")}
    flat = {"embed/tokens": found["embed_tokens.weight"], "norm/scale": found["norm.weight"]}
    flat["head/kernel"] = found["lm_head.weight"].T
    dense = {"attn/query": "q_proj", "attn/key": "k_proj", "attn/value": "v_proj", "attn/out": "o_proj"}
    for layer in range(text.depth):
        crossing = layer == 1
        own, stem = f"block_{layer:02d}/" + ("cross/" if crossing else ""), f"layers.{layer}."
        attention = stem + ("cross_attn." if crossing else "self_attn.")
        flat |= {f"{own}{ours}/kernel": found[f"{attention}{theirs}.weight"].T for ours, theirs in dense.items()}
        flat |= {f"{own}mlp/{n}/kernel": found[f"{stem}mlp.{n}_proj.weight"].T for n in ("gate", "up", "down")}
        flat[f"{own}norm1/scale"] = found[f"{stem}input_layernorm.weight"]
        flat[f"{own}norm2/scale"] = found[f"{stem}post_attention_layernorm.weight"]
        if crossing:
            flat |= {f"{own}attn/{n}_norm/scale": found[f"{attention}{n[0]}_norm.weight"] for n in ("query", "key")}
            flat[f"{own}gate1"] = found[f"{stem}cross_attn_attn_gate"]
            flat[f"{own}gate2"] = found[f"{stem}cross_attn_mlp_gate"]
    return names.unflatten(flat)
