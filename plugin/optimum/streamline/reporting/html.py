"""A report as one HTML page that needs nothing else: no script, no network, plots inside.

What it says is in `wording.py`, how it looks in `report.html.j2`; this file puts them together.
"""

from __future__ import annotations

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
FATES = {
    "removed": "were removed",
    "replaced": "were replaced by one trained layer",
    "merged": "were merged",
    "thinned": "lost their attention or their MLP",
}


def to_html(report: Report) -> str:
    """The whole report. Text from outside, such as model names, is escaped."""
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
    """The plot of layer importances with a sentence, where the report knows them."""
    if report.scores is None:
        return None
    by_layer = fates(report)
    done = [f"{count} {words}" for fate, words in FATES.items() if (count := list(by_layer.values()).count(fate))]
    return {
        "plot": Markup(layer_importance_svg(report.scores, by_layer)),
        "words": f"Of {len(report.scores)} layers, {' and '.join(done) or 'none was taken out'}.",
    }


def _interactions(report: Report) -> dict[str, Any] | None:
    """How pruning and quantizing meet, as a plot and a table, where the report knows it."""
    if not report.interactions:
        return None
    return {
        "plot": Markup(interactions_svg(report.interactions)),
        "headings": HEADINGS,
        "rows": [cells(each) for each in report.interactions],
        "meaning": MEANING,
    }


def fates(report: Report) -> dict[int, str]:
    """What became of each layer of the original, a key of `FATES` or "kept"; empty where it is not known."""
    if report.scores is None or report.layers is None:
        return {}
    found = dict.fromkeys(range(len(report.scores)), "removed")
    for place in report.layers:
        if place.kind in TRAINED:
            found |= dict.fromkeys(place.originals, "replaced")
        elif place.kind == "merged":
            found |= dict.fromkeys(place.originals, "merged")
        else:  # what a patched layer stands for beside itself was removed
            found[place.originals[0]] = "thinned" if place.kind == "thinned" else "kept"
    return found
