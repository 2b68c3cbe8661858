"""Keep the messages of other libraries off the terminal, and write them to a log file.

Only Python's own streams are redirected. A C++ library that writes to the file descriptor itself is silenced where it
is loaded. contextlib's redirect functions do not suffice: logging handlers keep the streams they were made with.
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
    """Append everything that is printed, warned or logged inside the `with` block to a file.

    Args:
        path: The log file. With `None` the messages are discarded, for a command without an output folder.
        verbose: Leave every message on the terminal and write no file.
    """
    if verbose:
        yield
        return
    terminal = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    with (path or Path(os.devnull)).open("a", encoding="utf-8") as log:
        # A logging handler keeps the stream that it was created with, so it must be redirected separately.
        moved = {handler: handler.stream for handler in _stream_handlers() if handler.stream in terminal}
        for handler in moved:
            handler.setStream(log)
        try:
            with redirect_stdout(log), redirect_stderr(log):
                yield
        finally:
            # A library that was imported inside the block may have created a handler on the log file. Point it to the
            # terminal.
            for handler in _stream_handlers():
                if handler.stream is log:
                    # transformers binds its handler's flush to the stream of that moment, which is closed from here on.
                    vars(handler).pop("flush", None)
                    handler.setStream(moved.get(handler, sys.stderr))


def _stream_handlers() -> list[_StreamHandler]:
    """The handlers of all loggers that write to a stream of their own, file handlers left out."""
    loggers = [
        logging.root,
        *(each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)),
    ]
    handlers = {handler for logger in loggers for handler in logger.handlers}
    streams = [each for each in handlers if isinstance(each, logging.StreamHandler) and "stream" in vars(each)]
    return [each for each in streams if not isinstance(each, logging.FileHandler)]
