# SPDX-License-Identifier: Apache-2.0
"""Typed overrides, the access record, loading config files: everything between argv and a resolved config."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from pathlib import Path

import pytest

from configs import common
from vtjax.cli import config as config_lib
from vtjax.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def base():
    return config_lib.from_dict(common.base().to_dict(), "base")


def value(config, name):
    return dict(config_lib.flatten(config))[name]


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("optim.weight_decay", "0", 0.0),  # an int for a float whose default is 0.0
        ("optim.lr", 1, 1.0),
        ("optim.lr", "1e-4", 1e-4),
        ("steps", "1e4", 10_000),
        ("steps", "1_000", 1000),
        ("seed", 7.0, 7),
        ("profile", "(3, 5)", (3, 5)),
        ("profile", "3,5", (3, 5)),
        ("profile", [3, 5], (3, 5)),
        ("data.crop_scale", "0,1", (0.0, 1.0)),  # ints inside a tuple of floats
        ("data.flip", "true", True),
        ("data.flip", "0", False),
        ("data.flip", True, True),
        ("data.name", "cifar10", "cifar10"),
        ("data.path", "", ""),
        ("workdir", "1", "1"),  # a text that looks like a number stays a text
        ("mesh.data", "-1", -1),
    ],
)
def test_an_override_takes_the_type_of_the_leaf(name, given, expected):
    config = base()
    config_lib.override(config, name, given)
    assert value(config, name) == expected
    assert type(value(config, name)) is type(expected)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("seed", "1.5", "config.seed must be an int (now 0), found '1.5'"),
        ("seed", True, "config.seed must be an int"),
        ("seed", "", "config.seed must be an int"),
        ("optim.lr", "fast", "config.optim.lr must be a float (now 0.001), found 'fast'"),
        ("optim.lr", "nan", "must be a float"),
        ("optim.lr", "inf", "must be a float"),
        ("optim.lr", False, "must be a float"),
        ("data.flip", "2", "config.data.flip must be true or false (now False), found '2'"),
        ("data.flip", 1, "must be true or false"),
        ("data.name", 3, "must be a text"),
        ("profile", "96", "config.profile must hold 2 values (now 0,0), found 1: (96,)"),
        ("profile", "1,2,3", "must hold 2 values"),
        ("profile", "()", "must hold 2 values"),
        ("profile", "a,b", "config.profile[0] must be an int"),
        ("data.crop_scale", "0.5,x", "config.data.crop_scale[1] must be a float"),
        ("optim.lrr", "1", "config.optim.lrr does not exist; did you mean config.optim.lr?"),
        ("lr", "1", "config.lr does not exist; did you mean config.optim.lr?"),
        ("optim.learning_rate", "1", "config.optim.learning_rate does not exist; did you mean config.optim.lr?"),
        ("optim.lerning_rate", "1", "did you mean config.optim.lr?"),
        ("wd", "1", "did you mean config.optim.weight_decay?"),
        ("epochs", "1", "did you mean config.steps?"),
        ("bs", "1", "did you mean config.batch_size?"),
        ("data.num_workers", "1", "did you mean config.data.workers?"),
        ("zzz", "1", "config.zzz does not exist"),
        ("optim", "1", "config.optim is a group"),
        ("optim.lr.x", "1", "config.optim.lr.x does not exist"),
        ("", "1", "config. does not exist"),
    ],
)
def test_a_bad_override_is_one_line_that_names_the_leaf(name, given, message):
    config = base()
    before = config.to_dict()
    with pytest.raises(InputError) as error:
        config_lib.override(config, name, given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert config.to_dict() == before


@pytest.mark.parametrize("name", ["model.width", "model.depth", "optim.b3", "zzz"])
def test_a_far_fetched_hint_is_not_given(name):
    with pytest.raises(InputError, match="^config.* does not exist$"):
        config_lib.load_config(f"{ROOT / 'configs' / 'vit.py'}:ti16", overrides={name: "1"})


def test_the_hint_prefers_the_same_group_then_the_outermost():
    config = config_lib.load_config(f"{ROOT / 'configs' / 'vit.py'}:ti16")
    for name, leaf in (
        ("weight_decay", "optim.weight_decay"),
        ("optim.groups.head.wd", "optim.groups.head.weight_decay"),
        ("optm.weight_decay", "optim.weight_decay"),
    ):
        with pytest.raises(InputError, match=rf"did you mean config\.{leaf}\?"):
            config_lib.override(config, name, "1")


def test_overrides_are_split_from_the_other_arguments():
    rest, overrides = config_lib.split_overrides(
        [
            "run",
            "--config=c.py:a",
            "--config.a.b=1",
            "--config.c",
            "-1",
            "--workdir",
            "d",
            "--config.e=x=y",
            "--config.a.b=2",
        ]
    )
    assert rest == ["run", "--config=c.py:a", "--workdir", "d"]
    assert overrides == {"c": "-1", "e": "x=y", "a.b": "2"}
    for argv in (["--config.a"], ["--config.a", "--workdir=d"]):
        with pytest.raises(InputError, match="config.a needs a value"):
            config_lib.split_overrides(argv)


def test_reads_are_recorded_through_attributes_items_and_copies():
    config = base()
    assert config.optim.lr == config["optim.b1"] * 0 + 1e-3
    assert "flip" in config.data and config.get("ema") == 0.0
    dict(copy.deepcopy(config).mesh.items())
    with pytest.raises(InputError) as error:
        config_lib.check_read(config, [])
    unread = str(error.value)
    for name in ("optim.lr", "optim.b1", "ema", "mesh.data", "mesh.tensor"):
        assert f"config.{name}," not in unread, name
    for name in ("optim.b2", "data.flip", "seed"):  # `in` looks, but does not read
        assert f"config.{name}," in unread, name
    config_lib.check_read(config, list(common.base()))
    with pytest.raises(InputError, match=r"^nothing reads config.optim.b2 "):
        config_lib.check_read(config, [k for k in common.base() if k != "optim"] + [
            f"optim.{k}" for k in common.base().optim if k not in ("b2",)
        ])  # fmt: skip


def test_a_config_is_locked_and_pickles():
    config = base()
    with pytest.raises(AttributeError):
        config.optim.learning_rate = 1.0
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    assert config_lib.flatten(config) == sorted(config_lib.flatten(config))
    assert not any(name == "optim.groups" for name, _ in config_lib.flatten(config))


def write(folder: Path, body: str) -> str:
    path = folder / "my.py"
    path.write_text("from ml_collections import ConfigDict\nfrom configs import common\n" + body)
    return str(path)


def test_a_config_file_anywhere_can_use_common(tmp_path):
    path = write(tmp_path, "def get_config(arg='x'):\n  c = common.base()\n  c.workdir = arg\n  return c\n")
    assert config_lib.load_config(path).workdir == "x"
    assert config_lib.load_config(f"{path}:y,z=1").workdir == "y,z=1"
    assert config_lib.load_config(path, "a:b").workdir == "a:b"
    config = config_lib.load_config(path, overrides={"optim.lr": 1, "profile": "1,2"})
    assert (config.optim.lr, config.profile) == (1.0, (1, 2))
    assert config_lib.overridden(config) == {"optim.lr", "profile"}


def test_loading_never_reads_argv(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["notebook", "--config.seed=9", "--nonsense"])
    assert config_lib.load_config(ROOT / "configs" / "vit.py", "tiny").seed == 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def get_config(:\n", "my.py, line 3: "),
        ("x = 1\n", "must define get_config(arg)"),
        ("def get_config(arg):\n  return 1\n", "must return an ml_collections.ConfigDict, found int"),
        ("def get_config():\n  return common.base()\n", "takes no argument, found 'a' after the colon"),
        ("import nothing_of_this_name\n", "my.py, line 3: ModuleNotFoundError: "),
        ("def get_config(arg):\n  c = common.base()\n  return c.nope\n", "my.py, line 5: AttributeError: "),
        ("def get_config(arg):\n  return ConfigDict({'a': None})\n", "config leaf a in "),
        ("def get_config(arg):\n  return ConfigDict({'b': {'a': object()}})\n", "config leaf b.a in "),
        ("def get_config(arg):\n  return ConfigDict({'a': [1, [2]]})\n", "config leaf a in "),
        ("def get_config(arg):\n  return common.optim(lrr=1.0)\n", "my.py, line 4: KeyError: "),
        ("def get_config(arg):\n  raise SystemExit(4)\n", "my.py, line 4: SystemExit: 4"),
    ],
)
def test_a_broken_config_file_is_one_line_with_its_place(tmp_path, body, message):
    path = write(tmp_path, body)
    with pytest.raises(InputError) as error:
        config_lib.load_config(path, "a")
    assert message in str(error.value)


def test_a_list_becomes_a_tuple(tmp_path):
    path = write(tmp_path, "def get_config():\n  return ConfigDict({'a': [1, 2]})\n")
    assert config_lib.load_config(path).a == (1, 2)


def test_a_missing_config_file_is_named(tmp_path):
    for path in (tmp_path / "no.py", tmp_path):
        with pytest.raises(InputError, match=f"config file {path}"):
            config_lib.load_config(path)


def test_a_workdir_brings_its_config_back(tmp_path):
    config = base()
    with pytest.raises(InputError, match="must hold a run, found no config.json"):
        config_lib.of_workdir(str(tmp_path), {})
    (tmp_path / "config.json").write_text(config.to_json())
    again = config_lib.of_workdir(str(tmp_path), {"seed": "3"})
    assert again.seed == 3
    assert again.to_dict() == {**config.to_dict(), "seed": 3}
    older = config.to_dict()
    del older["optim"]["lr"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    with pytest.raises(InputError, match="config.optim.lr must be there, found no such leaf"):
        config_lib.of_workdir(str(tmp_path), {}).optim.lr  # noqa: B018
    with pytest.raises(InputError, match="^config.optim.lr must be there"):
        config_lib.of_workdir(str(tmp_path), {}).optim["lr"]
    assert config.get("nothing", 3) == 3 and "nothing" not in config
    assert not hasattr(config, "nothing")
    for damaged in ("{", "[]", "\x00"):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(InputError, match="config.json must"):
            config_lib.of_workdir(str(tmp_path), {})
