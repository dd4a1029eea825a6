# SPDX-License-Identifier: Apache-2.0
"""Workdirs, weights and data on `gs://`, in real processes against a stand-in for the service: gcsfs reads and writes
the small files, orbax writes the arrays through tensorstore."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.cloud import fake_gcs
from vtjax import paths
from vtjax.errors import MissingExtraError

ROOT = Path(__file__).resolve().parents[2]
TINY = "--config=configs/vit.py:tiny,batch_size=8"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="gcsfs is not installed")


class Bucket:
    """The stand-in, running, and `vtjax` in processes that take it for the real one."""

    def __init__(self, cache: Path):
        self.server = fake_gcs.serve(0)
        self.store = self.server.RequestHandlerClass.store
        url = f"http://localhost:{self.server.server_address[1]}"
        # The last ones: no credentials are looked for, and no other service is asked what kind of bucket it is.
        self.environment = {
            **os.environ,
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "VTJAX_CACHE": str(cache),
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            **{f"FSSPEC_{name}_TOKEN": "anon" for name in ("GS", "GCS")},
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def start(self, *argv: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "vtjax", *argv]
        return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, cwd=ROOT, env=self.environment)

    def vtjax(self, *argv: str, code: int = 0) -> tuple[dict[str, Any], str]:
        child = self.start(*argv)
        output, errors = child.communicate(timeout=200)
        assert child.returncode == code, errors
        return json.loads(output.splitlines()[-1]) if output else {}, errors


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Bucket]:
    made = Bucket(tmp_path / "cache")
    yield made
    made.server.shutdown()


@pytest.mark.slow  # test_kill.py does the same on a local disk in every run
def test_a_run_is_killed_resumed_and_evaluated_on_a_bucket(bucket: Bucket, tmp_path: Path) -> None:
    argv = ["run", f"{TINY},steps=40", "--config.log_every=1", "--config.checkpoint.every=10"]
    straight, _ = bucket.vtjax(*argv, f"--workdir={tmp_path / 'local'}")
    child = bucket.start(*argv, "--workdir=gs://bucket/runs/a")
    assert child.stderr is not None
    for line in child.stderr:
        if line.startswith("step 25/"):
            child.kill()
            break
    child.communicate()
    result, errors = bucket.vtjax(*argv, "--workdir=gs://bucket/runs/a")
    assert "resumed from gs://bucket/runs/a/checkpoints/" in errors
    assert result["params_sha256"] == straight["params_sha256"]
    written = bucket.store.objects["runs/a/metrics.jsonl"][0].decode().splitlines()
    assert [json.loads(line)["step"] for line in written] == list(range(1, 41))
    assert bucket.vtjax(*argv, "--workdir=gs://bucket/runs/a")[0] == result  # finished
    measured, _ = bucket.vtjax("eval", "--workdir=gs://bucket/runs/a")
    assert (measured["top1"], measured["count"]) == (straight["top1"], 256)
    exported = tmp_path / "model.safetensors"
    bucket.vtjax("convert", "gs://bucket/runs/a", str(exported))
    bucket.store.put("weights/model.safetensors", exported.read_bytes())
    again, errors = bucket.vtjax("eval", TINY, "--config.init_from=gs://bucket/weights/model.safetensors")
    assert again["top1"] == straight["top1"] and "fetching gs://bucket/weights/model.safetensors" in errors
    # By name along the search path; the copy of before serves.
    bucket.environment["VTJAX_DATA"] = f"{tmp_path}/nothing:gs://bucket/weights"
    named, errors = bucket.vtjax("eval", TINY, "--config.init_from=model.safetensors")
    assert named["top1"] == straight["top1"] and "fetching" not in errors


def test_images_on_a_bucket(bucket: Bucket, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(10):
            file = tmp_path / "image.png"
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(file)
            bucket.store.put(f"images/{split}/class{label}/a.png", file.read_bytes())
    data = ["--config.data.name=folder", "--config.data.path=gs://bucket/images"]
    argv = ["run", f"{TINY},steps=2", *data, "--config.optim.warmup=0", f"--workdir={tmp_path / 'w'}"]
    result, _ = bucket.vtjax(*argv)
    assert result["count"] == 10


def test_what_is_not_there_is_one_line(bucket: Bucket) -> None:
    for argv, part in (
        (["eval", "--workdir=gs://bucket/none"], "gs://bucket/none must hold a run"),
        (
            ["eval", TINY, "--config.init_from=gs://bucket/none.safetensors"],
            "'gs://bucket/none.safetensors' do not exist",
        ),
        (["run", TINY, "--config.data.path=gs://bucket/none", "--workdir=gs://bucket/w"], "gs://bucket/none"),
    ):
        if argv[0] == "run":
            argv.append("--config.data.name=folder")
        _, errors = bucket.vtjax(*argv, code=2)
        assert errors.count("\n") == 1 and part in errors, errors
    assert bucket.store.objects == {}


def test_without_gcsfs_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, vtjax: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"gs://b/x needs the package 'gcsfs': pip install 'vtjax\[gcs\]'"):
        paths.check_url("gs://b/x")
    done = vtjax("run", TINY, "--workdir=gs://b/x")
    assert done.code == 2 and "vtjax[gcs]" in done.err and done.err.count("\n") == 1


def test_the_search_path_may_hold_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTJAX_DATA", "gs://bucket/a:/b:s3://c/d:e")
    assert paths.search_path()[:4] == ("gs://bucket/a", Path("/b"), "s3://c/d", Path("e"))
