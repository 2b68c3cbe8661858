"""A report as one self-contained HTML page: no script, no network access, and plots as SVG.

The sentences come from `wording.py`, the layout from `report.html.j2`.
"""

from __future__ import annotations

from collections import Counter
from importlib.resources import files
from itertools import groupby
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from optimum.streamline.editing.plan import TRAINED
from optimum.streamline.evaluation.results import Report

from .interaction_wording import HEADINGS, MEANING, cells
from .plots import comparison_svg, interactions_svg, layer_importance_svg
from .wording import headline, limit_sentence, note, sentences, settings_lines, table_rows, warnings

TEMPLATE = "report.html.j2"
OUTCOMES = {
    "removed": "were removed",
    "replaced": "were replaced by one trained layer",
    "merged": "were merged",
    "thinned": "lost their attention or their MLP",
}


def to_html(report: Report) -> str:
    """The whole report as HTML. Text from outside, such as model names, is escaped."""
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        report=report,
        headline=headline(report),
        tone="neutral" if not report.verdict.limits else "good" if report.verdict.passed else "bad",
        warnings=warnings(report),
        sentences=sentences(report),
        limits=[(limit_sentence(limit, report), limit.passed) for limit in report.verdict.limits],
        groups=[(name, list(lines)) for name, lines in groupby(table_rows(report), key=lambda line: line.group)],
        note=note(report),
        comparison=Markup(comparison_svg(report.rows)),
        layers=_layers(report),
        interactions=_interactions(report),
        settings=settings_lines(report),
    )


def _layers(report: Report) -> dict[str, Markup | str] | None:
    """The plot of layer scores and a sentence; `None` if the report has no scores."""
    if report.scores is None:
        return None
    by_layer = layer_outcomes(report)
    counts = Counter(by_layer.values())
    changes = [f"{counts[outcome]} {words}" for outcome, words in OUTCOMES.items() if counts[outcome]]
    return {
        "plot": Markup(layer_importance_svg(report.scores, by_layer)),
        "words": f"Of {len(report.scores)} layers, {' and '.join(changes) or 'none was removed'}.",
    }


def _interactions(report: Report) -> dict[str, Any] | None:
    """The plot and the table of interactions; `None` if the report has none."""
    if not report.interactions:
        return None
    return {
        "plot": Markup(interactions_svg(report.interactions)),
        "headings": HEADINGS,
        "rows": [cells(each) for each in report.interactions],
        "meaning": MEANING,
    }


def layer_outcomes(report: Report) -> dict[int, str]:
    """The outcome of each layer of the original: a key of `OUTCOMES`, or "kept". Empty if the report does not know."""
    if report.scores is None or report.layers is None:
        return {}
    found = dict.fromkeys(range(len(report.scores)), "removed")
    for layer in report.layers:
        if layer.kind in TRAINED:
            found |= dict.fromkeys(layer.originals, "replaced")
        elif layer.kind == "merged":
            found |= dict.fromkeys(layer.originals, "merged")
        elif layer.kind == "packed":
            found |= dict.fromkeys(layer.originals, "thinned")
        else:  # a patched layer also stands for removed layers, which stay "removed"
            found[layer.originals[0]] = "thinned" if layer.kind == "thinned" else "kept"
    return found
