"""Replace the generated parts of a page, which are between marks; the text around them is kept."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from optimum.streamline.system.atomic_output import write_file


def replace_part(page: Path, mark: str, lines: Iterable[str]) -> None:
    """Put lines between `<!-- mark -->` and `<!-- end of mark -->` of a page.

    Args:
        page: The page's file.
        mark: The name of the part.
        lines: The lines of the part.
    """
    start, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(start)
    _, _, after = rest.partition(end)
    write_file(page, "\n".join([before + start, "", *lines, "", end + after]))
