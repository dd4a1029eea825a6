# SPDX-License-Identifier: Apache-2.0
"""`vtjax run`: trains and evaluates what a config describes; started again, it resumes from its workdir."""

from __future__ import annotations

import argparse
from typing import Any

from vtjax.cli import config as config_lib


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vtjax run`."""
    config_lib.arguments(parser)
    parser.add_argument("--workdir", default="", help="folder of the run; one that holds a run resumes it")


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Trains; returns (0, the content of `result.json`)."""
    config = config_lib.from_args(args)
    if args.workdir:
        config_lib.override(config, "workdir", args.workdir)
    if args.print_config:
        return 0, config.to_dict()

    from vtjax.cli import assemble, decisions

    assemble.check_workdir(config.workdir)
    assemble.join_processes(config, args)
    task, data = assemble.assemble(config)

    from vtjax.parallel import launch
    from vtjax.train import loop

    with launch.naming_the_lost(config.heartbeat_timeout):
        result = loop.train(task, data, config, config.workdir)
        decisions.calibrate(task, data, config, config.workdir)
    return 0, result
