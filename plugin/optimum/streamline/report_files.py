"""Writing a report in all its forms into one folder."""

from __future__ import annotations

from pathlib import Path

from .outputs import write_file
from .report import Report
from .report_html import to_html
from .report_text import to_markdown

REPORT_FILE = "report.json"


def write_report(report: Report, folder: Path) -> None:
    """Write `report.json`, `report.md` and `report.html` into `folder`; a file that says the same already stays.

    Raises:
        StreamlineError: they cannot be written.
    """
    # `report.json` last: where this one stands, the others do.
    forms = {"report.html": to_html(report), "report.md": to_markdown(report), REPORT_FILE: report.to_json()}
    for name, text in forms.items():
        if not _holds(folder / name, text):
            write_file(folder / name, text)


def _holds(file: Path, text: str) -> bool:
    try:
        return file.read_bytes() == text.encode()
    except OSError:
        return False
