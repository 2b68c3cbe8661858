"""Keeping other libraries' chatter off the terminal: `captured_logs` sends it to a file.

Each library has a switch of its own to be quiet, and none that keeps what it says; contextlib moves the streams, but
not the handlers that hold them.

Python's streams only: a C++ library that writes to the file descriptor is told to be quiet where it is opened.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

LOG_FILE = "streamline.log"

_StreamHandler = logging.StreamHandler[Any]


@contextmanager
def captured_logs(path: Path | None, verbose: bool = False) -> Iterator[None]:
    """Append to `path` what is printed, warned and logged inside the block.

    Args:
        path: The file, or `None` where there is no output folder to hold one: what is said is dropped.
        verbose: Leave everything on the terminal, and write no file.
    """
    if verbose:
        yield
        return
    terminal = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    with (path or Path(os.devnull)).open("a", encoding="utf-8") as log:
        # A handler keeps the stream it was made with, so redirecting the streams does not move it.
        moved = {handler: handler.stream for handler in _stream_handlers() if handler.stream in terminal}
        for handler in moved:
            handler.setStream(log)
        try:
            with redirect_stdout(log), redirect_stderr(log):
                yield
        finally:
            # Libraries imported inside the block made handlers on the file: those move to the terminal.
            for handler in _stream_handlers():
                if handler.stream is log:
                    handler.setStream(moved.get(handler, sys.stderr))


def _stream_handlers() -> list[_StreamHandler]:
    """Every logger's handlers that hold a stream of their own and write no file of their own."""
    loggers = [
        logging.root,
        *(each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)),
    ]
    handlers = {handler for logger in loggers for handler in logger.handlers}
    streams = [each for each in handlers if isinstance(each, logging.StreamHandler) and "stream" in vars(each)]
    return [each for each in streams if not isinstance(each, logging.FileHandler)]
