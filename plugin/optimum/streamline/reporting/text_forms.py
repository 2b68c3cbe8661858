"""A report as tables for the terminal, and as Markdown. The sentences come from `wording.py`."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from optimum.streamline.evaluation.results import Report

from .interaction_wording import HEADINGS, MEANING, cells
from .wording import headline, limit_sentence, note, sentences, settings_lines, table_rows, warnings


def comparison_table(report: Report) -> RenderableType:
    """The comparison for a terminal: a table with a column for each model, and the verdict below it."""
    table = Table(title="Comparison with the original")
    table.add_column("")
    for row in report.rows:
        table.add_column(escape(row.label), style="" if row.role == "candidate" else "dim")
    lines = table_rows(report)
    for number, line in enumerate(lines):
        last = number + 1 == len(lines) or lines[number + 1].group != line.group
        table.add_row(line.title, *(escape(line.cell(row)) for row in report.rows), end_section=last)
    limits = [
        Text(limit_sentence(limit, report), "green" if limit.passed else "red") for limit in report.verdict.limits
    ]
    changes = [Text(each, "yellow") for each in warnings(report)]
    return Group(table, *changes, *limits, Text(f"{headline(report)}.", "bold"))


def interactions_table(report: Report) -> RenderableType:
    """The interactions of pruning and quantizing, as a table for a terminal."""
    table = Table(title="Pruning and quantizing together: log-loss above the original's, nats per token")
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold")
    for each in report.interactions:
        table.add_row(*(escape(cell) for cell in cells(each)))
    return table


def to_markdown(report: Report) -> str:
    """The whole report as Markdown."""
    parts = [f"# {headline(report)}", *(f"**{each}**" for each in warnings(report)), *sentences(report)]
    if report.verdict.limits:
        parts.append("\n".join(f"- {limit_sentence(limit, report)}" for limit in report.verdict.limits))
    if report.interactions:
        rows = [HEADINGS, *(cells(each) for each in report.interactions)]
        parts += ["## Pruning and quantizing together", MEANING, _rows(rows)]
    parts += ["## Comparison", _comparison(report), note(report)]
    parts += ["## What the rows mean", "\n".join(f"- **{line.title}**: {line.meaning}" for line in table_rows(report))]
    parts += ["## How it was measured", _rows([("", ""), *settings_lines(report)])]
    return "\n\n".join(parts) + "\n"


def _comparison(report: Report) -> str:
    labels = ["", *(row.label for row in report.rows)]
    return _rows([labels, *([line.title, *(line.cell(row) for row in report.rows)] for line in table_rows(report))])


def _rows(rows: list[list[str]] | list[tuple[str, str]]) -> str:
    # The Markdown box of rich wraps cells to a width and escapes no bar; tabulate would be a dependency for two lines.
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
