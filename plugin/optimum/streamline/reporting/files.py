"""Writing a report in all its forms into one folder."""

from __future__ import annotations

from pathlib import Path

from optimum.streamline.evaluation.results import Report
from optimum.streamline.system.atomic_output import REPORT_FILE, write_file

from .html import to_html
from .text_forms import to_markdown


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
