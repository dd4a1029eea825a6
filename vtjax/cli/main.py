# SPDX-License-Identifier: Apache-2.0
"""`vtjax COMMAND ...`: dispatch, the promise about output, and exit codes.

Text for people goes to standard error; standard output ends with one line of JSON. A command is a module with
`arguments(parser)` and `run(args) -> (exit code, result)`; it is imported when it is used, so that help is instant.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from vtjax.cli import config as config_lib
from vtjax.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_NON_FINITE, InputError, NonFiniteError, Preempted

COMMANDS = {
    "run": "train and evaluate; a second start resumes",
    "eval": "evaluate a checkpoint or the weights named in the config",
    "sweep": "run or evaluate every point of a grid; points that differ in traced values only share one compilation",
    "convert": "convert pretrained weights to or from timm and Hugging Face files",
    "bench": "time a reduced model beside its dense baseline, with memory, work, cost and energy",
    "aot": "compile a config's step for a TPU topology, without a TPU: does it fit, what does it send",
    "inspect": "spec, parameters and MACs of a model, or the difference of two",
}

EPILOG = """\
exit codes: 0 done, 1 a check missed its tolerance, 2 bad input (a full disk, too), 3 training met a non-finite value,
            75 preempted (start it again), 76 another process of the run was lost (start all of them again),
            130 interrupted (training has saved, unless it was interrupted twice)

examples:
  vtjax run --config=configs/vit.py:digits --workdir=runs/digits
  vtjax run --config=configs/vit.py:digits --workdir=runs/slow --config.optim.lr=3e-4 --config.steps=500
  vtjax eval --config=configs/vit.py:ti16
  vtjax sweep --config=configs/vit.py:digits --grid=config.optim.lr=1e-3,3e-3 --grid=config.seed=0,1 --workdir=runs/lr
  vtjax bench --config=configs/vit.py:ti16 --dense=vit_ti16_augreg --batch=16 --price=1.2 --watts=65
  vtjax aot --config=configs/vit.py:b16_i1k --topology=v5e:2x4
  vtjax inspect configs/vit.py:ti16 configs/vit.py:b16_i1k
  vtjax convert HF_FOLDER model.safetensors
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: arguments after the program's name; default `sys.argv[1:]`.

    Returns:
      The exit code: 0, 1 (a check missed), 2 (bad input), 3 (non-finite), 75 (preempted), 130 (interrupted). A process
      that loses another one of its run ends with 76, and does not return.
    """
    code, together = 1, False
    try:
        code, together = _main(list(sys.argv[1:] if argv is None else argv))
    except Exception:
        # One of several must not stay, and keep the others waiting: jax's own exit waits for all.
        if (launch := _launch()) is None or not launch.joined():
            raise
        traceback.print_exc()
    if (launch := _launch()) is not None:
        launch.leave(code, together=together)
    return code


def _launch() -> Any:
    """`vtjax.parallel.launch` where the command has loaded it; importing it for help would take JAX along."""
    return sys.modules.get("vtjax.parallel.launch")


def _main(arguments: list[str]) -> tuple[int, bool]:
    """The exit code, and whether all processes of a run end in this way together."""
    debug = "--debug" in arguments
    _leave_libtpu_alone()
    command = next((a for a in arguments if not a.startswith("-")), "")
    # Orbax warns about files that it can do without, and logs the traceback of what it raises; both would hide the one
    # line that counts.
    logging.getLogger("absl").setLevel(logging.DEBUG if debug else logging.CRITICAL)
    for name in ("gcsfs", "google.auth"):  # what they try before they find a way in
        logging.getLogger(name).setLevel(logging.DEBUG if debug else logging.CRITICAL)
    logging.getLogger("vtjax").setLevel(logging.DEBUG if debug else logging.WARNING)
    try:
        parsed = _parse([a for a in arguments if a != "--debug"])
        parsed.debug = debug
        with contextlib.redirect_stdout(sys.stderr):  # what libraries print is for people
            code, result = importlib.import_module(f"vtjax.cli.{parsed.command}").run(parsed)
        _answer(_finite(result))
        return code, True
    except BrokenPipeError:
        # The reader of our output left (`vtjax ... | head`): nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, False
    # Of the system: a path that is not there or not allowed, a disk that is full.
    except (InputError, OSError) as error:
        return _fail(EXIT_BAD_INPUT, command, _message(error), debug), False
    except NonFiniteError as error:
        return _fail(EXIT_NON_FINITE, command, str(error), debug), True
    except Preempted as error:
        word = "interrupted" if error.code == EXIT_INTERRUPTED else "preempted"
        _answer({word: True})
        return (error.code if isinstance(error.code, int) else 1), True
    except KeyboardInterrupt:
        return _fail(EXIT_INTERRUPTED, command, "interrupted", debug), False


def _leave_libtpu_alone() -> None:
    """On a machine without TPUs, where libtpu is installed for `vtjax aot`, JAX would try it first, at length."""
    chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    gpu = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
    if importlib.util.find_spec("libtpu") and not chips and not gpu:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _parse(arguments: list[str]) -> argparse.Namespace:
    rest, overrides = config_lib.split_overrides(arguments)
    parser = _Parser(
        prog="vtjax",
        description="Cheaper vision transformers and multimodal LLMs in JAX.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    wanted = next((a for a in rest if not a.startswith("-")), None)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False
        )
        sub.add_argument(
            "--debug", action="store_true", help="show the traceback of an error, and every parameter of a run"
        )
        if name == wanted:
            importlib.import_module(f"vtjax.cli.{name}").arguments(sub)
    parsed = parser.parse_args(rest)
    parsed.overrides = overrides
    return parsed


def _answer(result: Any) -> None:
    if (launch := _launch()) is not None:
        launch.restore_stdout()
    print(json.dumps(result, allow_nan=False), flush=True)


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _fail(code: int, command: str, message: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"vtjax {command}: ".replace(" :", ":") + " ".join(message.split()), file=sys.stderr, flush=True)
    return code


def _finite(value: Any) -> Any:
    """JSON has no NaN: a non-finite number becomes null."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
