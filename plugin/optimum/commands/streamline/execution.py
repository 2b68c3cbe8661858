"""Run a command: hide the messages of other libraries, report an error in one line, and return the exit code."""

from __future__ import annotations

import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable

from rich.console import Console

from optimum.streamline.errors import StreamlineError
from optimum.streamline.system.distributed import is_main, process_count
from optimum.streamline.system.library_logs import captured_logs

from .console import asked_to_end, interrupt


def run_command(name: str, execute: Callable[[Namespace, Console], int], args: Namespace) -> int:
    """Run a command.

    Args:
        name: The command's name.
        execute: The function that does the work.
        args: The parsed flags.

    Returns:
        The exit code: 0 done, 3 done but over budget, 2 bad input, 1 any other error, 130 interrupted.
    """
    # The console keeps the present stdout, so our own messages reach the terminal even while stdout is redirected to
    # hide other libraries. Of several processes, only the main one prints.
    console = Console(file=sys.stdout, soft_wrap=True, highlight=False, quiet=not is_main())
    asked_to_end.clear()
    ended_before = signal.signal(signal.SIGTERM, interrupt)
    try:
        # There is no folder for a log file yet, so the messages of other libraries are dropped without --verbose.
        with captured_logs(None, args.verbose):
            _check_processes(name, args.verbose)
            return execute(args, console)
    except StreamlineError as error:
        _print_error(f"error: {error}", error)
        return error.exit_code
    except KeyboardInterrupt as interruption:
        _print_error("interrupted", interruption)
        return 130
    finally:
        signal.signal(signal.SIGTERM, ended_before)


def _check_processes(name: str, verbose: bool) -> None:
    if process_count() == 1:
        return
    if not verbose:
        # torch reads this when it is imported. Its distributed library would write hints to the terminal otherwise.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if name != "prune":
        raise StreamlineError(f"{name}: must run in one process; only prune can use several")


def _print_error(message: str, error: BaseException) -> None:
    if is_main():
        # A note says which training checkpoints are left. Python prints the notes of other exceptions itself.
        print(message, *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
