"""What a command prints while it works, and how a signal ends it."""

from __future__ import annotations

from threading import Event
from typing import NoReturn

from rich.console import Console

from optimum.streamline.system.notify import Notify

asked_to_end = Event()


def interrupt(*_: object) -> NoReturn:
    """End the command as Ctrl-C does: unfinished output is removed."""
    # Native code that calls back into Python may swallow the exception (seen while a model was loading): the flag
    # then ends the command at the next message.
    asked_to_end.set()
    raise KeyboardInterrupt


def notifier(console: Console) -> Notify:
    """A function that prints one message, and ends the command if a signal asked for that."""

    def notify(message: str) -> None:
        if asked_to_end.is_set():
            raise KeyboardInterrupt
        console.print(message, markup=False)

    return notify
