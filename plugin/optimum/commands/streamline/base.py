"""The base class of every command: strict parsing of flags, and a wrong flag as one line."""

from __future__ import annotations

import argparse
import sys
import textwrap
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from optimum.commands.base import BaseOptimumCLICommand

if TYPE_CHECKING:
    from rich.console import Console


def exit_with_error(message: str) -> NoReturn:
    """Print one line and exit with 2, the code for bad input."""
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)


def _read_strictly(parser: argparse.ArgumentParser, add_flags: Callable[[argparse.ArgumentParser], None]) -> None:
    # Every optimum-cli command sets up the parsers of all others: ours imports its flags when it is the one that runs.
    # argparse hands what a subcommand does not know up to the root parser, which answers with its whole usage; and
    # it takes flags between two positional arguments only when asked to.
    parse = parser.parse_known_args

    def parse_all(args: Any = None, namespace: Any = None, **_: Any) -> tuple[argparse.Namespace, list[str]]:
        parser.parse_known_args = parse  # type: ignore[method-assign]
        add_flags(parser)
        namespace, unknown = parser.parse_known_intermixed_args(args, namespace)
        if unknown:
            exit_with_error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    parser.parse_known_args = parse_all  # type: ignore[method-assign,assignment]


class HelpFormatter(argparse.HelpFormatter):
    """Wraps each line of a flag's help by itself, so that a list stays a list."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        lines: list[str] = []
        for line in text.splitlines():
            indent = " " * (len(line) - len(line.lstrip()))
            wrap = textwrap.TextWrapper(width, break_on_hyphens=False, break_long_words=False)
            wrap.initial_indent, wrap.subsequent_indent = indent, indent * 2
            lines += wrap.wrap(line.strip())
        return lines


class Command(BaseOptimumCLICommand):
    """One command: `add_flags` declares its flags, `execute` does the work.

    Both import what they need when they run, so that no other command waits for it.
    """

    def parse_args(self, parser: argparse.ArgumentParser) -> None:
        """Make a wrong flag one line and exit code 2, as any other wrong input; no flag is guessed from its start."""
        parser.error = exit_with_error  # type: ignore[method-assign]
        parser.allow_abbrev = False
        parser.formatter_class = HelpFormatter
        _read_strictly(parser, self.add_flags)

    def run(self) -> None:
        """Run the command and exit with its code."""
        from .execution import run_command

        sys.exit(run_command(self.COMMAND.name, self.execute, self.args))

    @staticmethod
    @abstractmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """Add the command's flags to its parser."""

    @staticmethod
    @abstractmethod
    def execute(args: argparse.Namespace, console: Console) -> int:
        """Do the work, with what the user should know printed on `console`.

        Returns:
            The exit code: 0, or 3 if the result is over budget.

        Raises:
            StreamlineError: bad input, in one line.
        """
