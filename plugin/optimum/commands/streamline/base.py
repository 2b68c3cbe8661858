"""What every command of `optimum-cli streamline` has in common: strict flags, one line for an error, an exit code."""

from __future__ import annotations

import argparse
import sys
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, NoReturn

from optimum.commands.base import BaseOptimumCLICommand

if TYPE_CHECKING:
    from rich.console import Console


def exit_with_error(message: str) -> NoReturn:
    """Print one line and exit with 2, the code for bad input."""
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)


def _read_strictly(parser: argparse.ArgumentParser) -> None:
    # argparse hands what a subcommand does not know up to the root parser, which answers with its whole usage; and
    # it takes flags between two positional arguments only when asked to.
    parse = parser.parse_known_args

    def parse_all(args: Any = None, namespace: Any = None, **_: Any) -> tuple[argparse.Namespace, list[str]]:
        parser.parse_known_args = parse  # type: ignore[method-assign]
        namespace, unknown = parser.parse_known_intermixed_args(args, namespace)
        if unknown:
            exit_with_error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    parser.parse_known_args = parse_all  # type: ignore[method-assign,assignment]


class Command(BaseOptimumCLICommand):
    """One command: `parse_args` declares its flags, `execute` does the work.

    `execute` imports what it needs when it runs, so that no other command waits for it.
    """

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Make a wrong flag one line and exit code 2, as any other wrong input; no flag is guessed from its start."""
        parser.error = exit_with_error  # type: ignore[method-assign]
        parser.allow_abbrev = False
        _read_strictly(parser)
        parser.formatter_class = argparse.RawTextHelpFormatter

    def run(self) -> None:
        """Run the command and exit with its code."""
        from .execution import run_command

        sys.exit(run_command(self.COMMAND.name, self.execute, self.args))

    @staticmethod
    @abstractmethod
    def execute(args: argparse.Namespace, console: Console) -> int:
        """Do the work, with what the user should know printed on `console`.

        Returns:
            The exit code: 0, or 3 if the result is over budget.

        Raises:
            StreamlineError: bad input, in one line.
        """
