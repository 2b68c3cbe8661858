"""The commands of `optimum-cli streamline`, one file each.

Every optimum-cli command imports this package, so its files import nothing but argparse and optimum's base class at
the top. What a command needs, it imports when it runs.
"""

from __future__ import annotations

import argparse
from typing import ClassVar

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .base import exit_with_error
from .export import ExportCommand
from .orthogonality import OrthogonalityCommand
from .prune import PruneCommand
from .quantize import QuantizeCommand
from .run import RunCommand
from .score import ScoreCommand
from .validate import ValidateCommand

__all__ = ["StreamlineCommand"]


class StreamlineCommand(BaseOptimumCLICommand):
    """`optimum-cli streamline`, the group of the commands above."""

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Make an unknown command one line."""
        parser.error = exit_with_error  # type: ignore[method-assign]

    COMMAND = CommandInfo(name="streamline", help="Make language models shallower, and prove what it cost.")
    SUBCOMMANDS: ClassVar[tuple[CommandInfo, ...]] = tuple(
        CommandInfo(name=command.COMMAND.name, help=command.COMMAND.help, subcommand_class=command)
        for command in (
            RunCommand,
            ScoreCommand,
            PruneCommand,
            QuantizeCommand,
            ExportCommand,
            ValidateCommand,
            OrthogonalityCommand,
        )
    )
