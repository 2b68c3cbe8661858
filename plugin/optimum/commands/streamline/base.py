"""The base class of the commands: it parses flags strictly, and reports a wrong flag in one line.

optimum-cli gives each of its commands an argparse parser. A library such as typer or click brings its own parser, so it
cannot add a command to optimum-cli; argparse is adapted here instead.
"""

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
    # Every call of optimum-cli sets up the parsers of all commands. Ours adds its flags only when it is the one that
    # runs, because they import other rooms. Left alone, argparse would also pass unknown flags on to the root parser,
    # which prints its whole usage, and would refuse flags between two positional arguments.
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
    """Wraps each line of a help text separately, so that a list keeps its lines."""

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

    Both import what they need inside, so that other commands do not wait for the imports.
    """

    def parse_args(self, parser: argparse.ArgumentParser) -> None:
        """Report a wrong flag in one line with exit code 2, like any bad input. Abbreviated flags are refused."""
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
        """Do the work, and print the results on `console`.

        Returns:
            The exit code: 0, or 3 if the result is over budget.

        Raises:
            StreamlineError: bad input. The message is one line.
        """
