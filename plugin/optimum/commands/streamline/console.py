"""Print the messages of a running command, and end it on a signal."""

from __future__ import annotations

from threading import Event
from typing import NoReturn

from rich.console import Console

from optimum.streamline.system.notify import Notify

asked_to_end = Event()


def interrupt(*_: object) -> NoReturn:
    """End the command as Ctrl-C does: unfinished output is removed."""
    # Native code that calls Python may swallow the exception, as happened while a model was loading. Then this flag
    # ends the command at the next message.
    asked_to_end.set()
    raise KeyboardInterrupt


def notifier(console: Console) -> Notify:
    """A function that prints one message, or ends the command if a signal has asked for it."""

    def notify(message: str) -> None:
        if asked_to_end.is_set():
            raise KeyboardInterrupt
        console.print(message, markup=False)

    return notify
