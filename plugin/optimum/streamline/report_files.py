"""Writing a report in all its forms into one folder."""

from __future__ import annotations

from pathlib import Path

from .outputs import write_file
from .report import Report
from .report_html import to_html
from .report_text import to_markdown

REPORT_FILE = "report.json"


def write_report(report: Report, folder: Path) -> None:
    """Write `report.json`, `report.md` and `report.html` into `folder`.

    Raises:
        StreamlineError: they cannot be written.
    """
    write_file(folder / "report.html", to_html(report))
    write_file(folder / "report.md", to_markdown(report))
    # Last: where this one stands, the others do.
    write_file(folder / REPORT_FILE, report.to_json())
