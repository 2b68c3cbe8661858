"""The type of the `notify` arguments: functions that get one line on what a step does or found."""

from __future__ import annotations

from collections.abc import Callable

Notify = Callable[[str], None]
"""Gets one message, without a line break at its end. `print` is one; the commands give one that prints with rich."""


def silent(message: str) -> None:
    """A `Notify` that drops every message."""
