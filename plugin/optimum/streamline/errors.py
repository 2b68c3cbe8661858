"""The errors a user can cause, each with one line that says what to do.

Everything raised on purpose derives from `StreamlineError`; the commands print its message on one
line and exit with `exit_code`. Anything else is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import importlib
from reprlib import Repr
from types import ModuleType
from typing import Any


class StreamlineError(Exception):
    """Bad input: names the field, the value and what would be right. Commands exit with 2."""

    exit_code = 2


class ParityError(StreamlineError):
    """An exported or reloaded model does not compute what its source computes. Commands exit with 1."""

    exit_code = 1


class WorkerError(StreamlineError):
    """A process that ran a model died: a crash, or no memory left. Commands exit with 1."""

    exit_code = 1


def require_extra(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra of this distribution brings it.

    Raises:
        StreamlineError: `module` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise StreamlineError(
            f'this needs the package {module.split(".")[0]}: pip install "optimum-streamline[{extra}]"'
        ) from None


def first_line(error: BaseException) -> str:
    """The first line of what another library's error says, with the next if it ends in a colon, or the error's name."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def shown(value: Any) -> str:
    """A value as a message quotes it: of any length in a few dozen characters.

    >>> shown("a" * 1000)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaa...aaaaaaaaaaaaaaaaaaaaaaaaaaaaa'"
    """
    brief = Repr()
    brief.maxstring = brief.maxother = brief.maxlong = 63
    brief.maxlevel = 2
    return brief.repr(value)
