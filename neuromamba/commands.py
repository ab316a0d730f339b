"""What each subcommand of `neuromamba` does."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from neuromamba import commands_data, commands_models
from neuromamba.command_options import read_config
from neuromamba.recording import recorded
from neuromamba.stages import Job


def _report(options: argparse.Namespace) -> None:
    from neuromamba.report import run_report

    config = read_config(options)
    with recorded(config, Job("report")):
        run_report(config)


def _summary(options: argparse.Namespace) -> None:
    from neuromamba.report import summary

    print(summary(read_config(options)))


def _status(options: argparse.Namespace) -> None:
    from neuromamba.status import what_is_stale

    lines = what_is_stale(read_config(options))
    print("\n".join(lines) if lines else "everything is up to date")


def _accept(options: argparse.Namespace) -> None:
    from neuromamba.status import accept_code

    for job in accept_code(read_config(options)):
        print(f"accepted: {job}")


def _record(options: argparse.Namespace) -> None:
    from neuromamba.status import record_in_dvc

    record_in_dvc(read_config(options))


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    **commands_data.COMMANDS,
    **commands_models.COMMANDS,
    "report": _report,
    "summary": _summary,
    "status": _status,
    "accept": _accept,
    "record": _record,
}
