"""Writing a report as JSON, Markdown and HTML into one folder."""

from __future__ import annotations

from pathlib import Path

from optimum.streamline.evaluation.results import Report
from optimum.streamline.system.atomic_output import REPORT_FILE, write_file

from .html import to_html
from .text_forms import to_markdown


def write_report(report: Report, folder: Path) -> None:
    """Write `report.json`, `report.md` and `report.html` into `folder`. A file with the same content is left alone.

    Raises:
        StreamlineError: a file cannot be written.
    """
    # `report.json` comes last, so that its presence means that all three files are complete.
    forms = {"report.html": to_html(report), "report.md": to_markdown(report), REPORT_FILE: report.to_json()}
    for name, text in forms.items():
        if not _holds(folder / name, text):
            write_file(folder / name, text)


def _holds(file: Path, text: str) -> bool:
    try:
        return file.read_bytes() == text.encode()
    except OSError:
        return False
