"""The commands of `optimum-cli streamline`, one file each.

Every call of optimum-cli imports the files of the commands. So at the top they import only argparse and optimum's base
class. What a command needs, it imports when it runs.
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
    """`optimum-cli streamline`, the group of our commands."""

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Report an unknown command in one line."""
        parser.error = exit_with_error  # type: ignore[method-assign]

    COMMAND = CommandInfo(
        name="streamline", help="Prune, replace and heal the layers of language models, and prove what it cost."
    )
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
