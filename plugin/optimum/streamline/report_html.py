"""A report as one HTML page that needs nothing else: no script, no network, plots inside.

What it says is in `report_table.py`, how it looks in `report.html.j2`; this file puts them together.
"""

from __future__ import annotations

from importlib.resources import files
from itertools import groupby

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from .plots import comparison_svg, layer_importance_svg
from .report import Report
from .report_table import LINES, headline, limit_sentence, note, sentences, settings_lines

TEMPLATE = "report.html.j2"


def to_html(report: Report) -> str:
    """The whole report. Text from outside, such as model names, is escaped."""
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        report=report,
        headline=headline(report),
        tone="neutral" if not report.verdict.limits else "good" if report.verdict.passed else "bad",
        sentences=sentences(report),
        limits=[(limit_sentence(limit), limit.passed) for limit in report.verdict.limits],
        groups=[(name, list(lines)) for name, lines in groupby(LINES, key=lambda line: line.group)],
        note=note(report),
        comparison=Markup(comparison_svg(report.rows)),
        layers=_layers(report),
        settings=settings_lines(report),
    )


def _layers(report: Report) -> dict[str, Markup | str] | None:
    """The plot of layer importances with a sentence, where the report knows them."""
    if report.scores is None:
        return None
    removed, replaced = fates(report)
    fates_of = ((len(removed), "removed"), (len(replaced), "replaced by one trained layer"))
    done = [f"{count} were {fate}" for count, fate in fates_of if count]
    return {
        "plot": Markup(layer_importance_svg(report.scores, removed, replaced)),
        "words": f"Of {len(report.scores)} layers, {' and '.join(done) or 'none was taken out'}.",
    }


def fates(report: Report) -> tuple[frozenset[int], frozenset[int]]:
    """The original layers that were removed, and those that a replacement stands for; none where it is not known."""
    if report.scores is None or report.layers is None:
        return frozenset(), frozenset()
    replaced = frozenset(number for place in report.layers if place.kind != "kept" for number in place.originals)
    kept = {number for place in report.layers if place.kind == "kept" for number in place.originals}
    return frozenset(range(len(report.scores))) - kept - replaced, replaced
