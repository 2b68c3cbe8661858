"""Progress bars with the time that remains, on a terminal only: piped output shows none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .distributed import is_main


class Bar:
    """One task's bar: `advance` it, or put it where it is, and say a word on how it goes."""

    def __init__(self, progress: Progress, title: str, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=total, note="")

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Move on by `steps`; `note` stands at the end of the bar."""
        self._progress.update(self._task, advance=steps, note=note)

    def at(self, step: int, note: str) -> None:
        """Stand at `step`, wherever the bar stood before; `note` stands at its end."""
        self._progress.update(self._task, completed=step, note=note)


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Bar]:
    """A bar on standard error for `total` steps, of the main process; it disappears when the block ends."""
    console = Console(file=sys.__stderr__, stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    shown = console.is_terminal and is_main()
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        yield Bar(progress, title, total)
