# SPDX-License-Identifier: Apache-2.0
"""`vtjax inspect` and `vtjax convert` on language models, in this process."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.weights.test_weights_lm import ORACLE
from vtjax.cli import main
from vtjax.spec import LMSpec


@pytest.fixture
def folder(tmp_path):
    from safetensors.numpy import save_file

    with np.load(ORACLE / "lm_qwen2.npz") as data:
        arrays = {name: data[name] for name in data.files}
    target = tmp_path / "hf"
    target.mkdir()
    (target / "config.json").write_text(str(arrays["config"]))
    save_file({n[2:]: a for n, a in arrays.items() if n.startswith("w:")}, target / "model.safetensors")
    recorded = {
        "input_ids": arrays["input_ids"],
        "attention_mask": arrays["left_mask"],
        "logits": arrays["left_logits"],
    }
    np.savez(tmp_path / "io.npz", **recorded)
    np.savez(tmp_path / "wrong.npz", **{**recorded, "input_ids": recorded["input_ids"] + 30})
    return target


def run(capsys, *arguments):
    """(exit code, the last line's JSON, what went to standard error)."""
    code = main.main([str(a) for a in arguments])
    told = capsys.readouterr()
    last = told.out.splitlines()[-1] if told.out else "null"
    return code, json.loads(last), told.err


def test_inspect_counts_a_prompt(folder, capsys):
    code, told, text = run(capsys, "inspect", folder, "--tokens=9")
    assert code == 0 and told["prompt_tokens"] == 9 and told["spec"]["kind"] == "LMSpec"
    by_hand = 2 * (9 * 16 * (16 + 8 + 8 + 16) + 2 * 81 * 16 + 3 * 9 * 16 * 24) + 16 * 32
    assert told["macs_per_prompt"] == by_hand and "MACs per prompt of 9 tokens" in text
    assert told["kinds"]["embed"]["params"] == 512 and "kv_heads=2" in text
    code, told, text = run(capsys, "inspect", folder, folder)
    assert code == 0 and told["spec_diff"] == {} and "MACs per prompt" in text


def test_convert_replays_ids_and_masks(folder, tmp_path, capsys):
    code, told, _ = run(capsys, "convert", folder, tmp_path / "a", f"--check={tmp_path / 'io.npz'}")
    assert code == 0 and told["max_abs_diff"] < 5e-5 and (tmp_path / "a.safetensors").is_file()
    code, told, _ = run(capsys, "convert", tmp_path / "a.safetensors", tmp_path / "back", "--layout=hf")
    assert code == 0 and json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "qwen2"
    for name, says in (("wrong", "whole numbers below 32"), ("a", "must be an npz file")):
        check = tmp_path / ("a.safetensors" if name == "a" else f"{name}.npz")
        code, _, text = run(capsys, "convert", folder, tmp_path / "b", f"--check={check}")
        assert code == 2 and says in text and not (tmp_path / "b.safetensors").exists()


def test_what_is_no_language_model_has_no_prompt(tmp_path, capsys):
    from vtjax.spec import ViTSpec

    (tmp_path / "spec.json").write_text(ViTSpec.uniform(depth=1, width=8, heads=2, image_size=16).to_json())
    code, _, text = run(capsys, "inspect", tmp_path / "spec.json", "--tokens=9")
    assert code == 2 and "--tokens is the length of a language model's prompt" in text
    (tmp_path / "lm.json").write_text(LMSpec.uniform(depth=1, width=8, heads=2, mlp=8, vocab=9).to_json())
    code, told, text = run(capsys, "inspect", tmp_path / "spec.json", tmp_path / "lm.json")
    assert code == 0 and "MACs per image or prompt" in text and told["macs_per_prompt"][0] is None
