"""Progress bars with the remaining time. They appear only on a terminal, not in piped output."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .distributed import is_main


class Bar:
    """The progress bar of one task."""

    def __init__(self, progress: Progress, title: str, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=total, note="")

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Move on by `steps`, and show `note` at the end of the bar."""
        self._progress.update(self._task, advance=steps, note=note)

    def at(self, step: int, note: str) -> None:
        """Set the bar to `step`, and show `note` at the end of the bar."""
        self._progress.update(self._task, completed=step, note=note)


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Bar]:
    """Show a progress bar on standard error, in the main process only, until the `with` block ends.

    Args:
        title: The text before the bar.
        total: The number of steps.

    Yields:
        The bar. Where nothing is shown, its methods do nothing.
    """
    console = Console(file=sys.__stderr__, stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    visible = console.is_terminal and is_main()
    with Progress(*columns, console=console, transient=True, disable=not visible) as progress:
        yield Bar(progress, title, total)
