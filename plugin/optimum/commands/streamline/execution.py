"""Run a command: log other libraries, turn an error into one line, and return the exit code."""

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
    """Run the command of this name: `execute`, with these flags.

    Returns:
        Its exit code: 0 done, 3 done but over budget, 2 bad input, 1 any other error, 130 interrupted.
    """
    # Bound now: what is printed from here on is the program's own, whatever is redirected later.
    # Of several processes one speaks.
    console = Console(file=sys.stdout, soft_wrap=True, highlight=False, quiet=not is_main())
    asked_to_end.clear()
    ended_before = signal.signal(signal.SIGTERM, interrupt)
    try:
        # What other libraries say where there is no output folder yet to log it in is dropped, unless asked for.
        with captured_logs(None, args.verbose):
            _check_processes(name, args.verbose)
            return execute(args, console)
    except StreamlineError as error:
        _complain(f"error: {error}", error)
        return error.exit_code
    except KeyboardInterrupt as interruption:
        _complain("interrupted", interruption)
        return 130
    finally:
        signal.signal(signal.SIGTERM, ended_before)


def _check_processes(name: str, verbose: bool) -> None:
    if process_count() == 1:
        return
    if not verbose:
        # Heard when torch is loaded: what shares the gradients out would write hints to the terminal.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if name != "prune":
        raise StreamlineError(f"{name}: works in one process; prune is the command that several can share")


def _complain(message: str, error: BaseException) -> None:
    if is_main():
        # A note says what is left to go on from. Errors that are not ours show theirs below their traceback.
        print(message, *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
