"""The exceptions for faults that a user can correct, and helpers for their messages.

Every error that this package raises on purpose derives from `StreamlineError`. The commands print its message on one
line and exit with its `exit_code`. Any other exception is a bug in this package and keeps its traceback.
"""

from __future__ import annotations

import importlib
from reprlib import Repr
from types import ModuleType
from typing import Any


class StreamlineError(Exception):
    """Bad input. The message names the field, its value and what would be right. Commands exit with code 2."""

    exit_code = 2


class ParityError(StreamlineError):
    """An exported or reloaded model computes something else than its source model. Commands exit with code 1."""

    exit_code = 1


class WorkerError(StreamlineError):
    """A process that ran a model died, for example for lack of memory. Commands exit with code 1."""

    exit_code = 1


def require_extra(module: str, extra: str) -> ModuleType:
    """Import an optional package, or tell the user which extra installs it.

    Args:
        module: The module to import, such as `onnxruntime` or `onnxruntime.quantization`.
        extra: The extra of optimum-streamline that installs it, such as `onnx`.

    Returns:
        The imported module.

    Raises:
        StreamlineError: the package that holds `module` is not installed.
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
    """The first line of an exception's message, to quote in ours.

    A line that ends in a colon is joined with the next line. An exception without a message gives its class name.
    """
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def shown(value: Any) -> str:
    """The `repr` of a value, shortened to a few dozen characters, to quote in a message.

    >>> shown("a" * 1000)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaa...aaaaaaaaaaaaaaaaaaaaaaaaaaaaa'"
    """
    shortener = Repr()
    shortener.maxstring = shortener.maxother = shortener.maxlong = 63
    shortener.maxlevel = 2
    return shortener.repr(value)
