"""Results as one line of text and as HTML for a notebook: tables, and a map with one cell for each original layer.

Every text from outside, such as a model's name, is escaped. The HTML carries its styles inline and loads nothing.

The report page is a jinja2 template (`html.py`). Here the tables are so small that a template for each object would be
longer than the functions below. pandas also writes HTML tables, but the layer map and the bars would still be made by
hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from optimum.streamline.editing.plan import TRAINED, Plan, layer_ranges
from optimum.streamline.evaluation.results import Limit, Report, Verdict
from optimum.streamline.model_files.artifact import Artifact
from optimum.streamline.scoring.similarity import Scores

from .numbers import number, size
from .wording import LIMIT_NAMES, headline, limit_sentence, sentences, table_rows, warnings

# Of each state of a layer: the character on the map, the cell's colour, and the word in the legend. The characters
# tell the states apart where colours do not.
STATES = {
    "kept": ("#", "#6b8fb5", "kept"),
    "removed": ("-", "#d1495b", "removed"),
    "replaced": ("R", "#e39b2d", "replaced by one trained layer"),
    "merged": ("M", "#8867c0", "merged with a neighbour"),
    "patched": ("P", "#4f79a8", "kept, with a linear map folded in"),
    "corrected": ("C", "#54789e", "kept, and corrected"),
    "attention": ("a", "#3a9d8f", "kept without its attention"),
    "mlp": ("m", "#2f8073", "kept without its MLP"),
    "both": ("0", "#245f56", "kept without attention and MLP"),
}
_CELL = 'style="padding:2px 8px;text-align:right"'


def layer_states(plan: Plan) -> tuple[str, ...]:
    """What becomes of each layer of the original, a key of `STATES`, first layer to last."""
    states = ["removed"] * plan.total
    skipped = {layer: [kind for each, kind in plan.skipped if each == layer] for layer, _ in plan.skipped}
    for layer in plan.new_layers:
        first = layer.originals[0]
        if layer.kind in TRAINED or layer.kind == "merged":
            for original in layer.originals:
                states[original] = "merged" if layer.kind == "merged" else "replaced"
        elif layer.kind == "patched":
            states[first] = "patched"
        else:
            for original in layer.originals:
                kinds = skipped.get(original, [])
                whole = "patched" if layer.mapped else "corrected" if layer.corrected else "kept"
                states[original] = "both" if len(kinds) > 1 else kinds[0] if kinds else whole
    return tuple(states)


def layer_map(plan: Plan) -> str:
    """One character for each layer of the original, as `STATES` has them.

    >>> layer_map(Plan(8, (3, 4, 5), "mlp")), layer_map(Plan(6, (4,), skipped=((1, "attention"),)))
    ('[###RRR##]', '[#a##-#]')
    """
    return f"[{''.join(STATES[state][0] for state in layer_states(plan))}]"


def plan_line(plan: Plan) -> str:
    """A plan in one line."""
    return f"Plan({plan.describe()} {layer_map(plan)})"


def plan_html(plan: Plan) -> str:
    """What a plan does, with the layer map and its legend."""
    states = layer_states(plan)
    cells = "".join(
        f'<td style="padding:2px 4px;text-align:center;color:#fff;background:{STATES[state][1]}" '
        f'title="layer {layer}: {STATES[state][2]}">{STATES[state][0]}<br><small>{layer}</small></td>'
        for layer, state in enumerate(states)
    )
    legend = ", ".join(
        f"<b>{character}</b> {words} ({states.count(state)})"
        for state, (character, _, words) in STATES.items()
        if state in states
    )
    return f"<p>{escape(plan.describe())}</p><table><tr>{cells}</tr></table><p><small>{legend}</small></p>"


def scores_line(scores: Scores) -> str:
    """Scores in one line: how many, and the layers that matter least and most."""
    influence = scores.block_influence
    order = sorted(range(len(influence)), key=lambda layer: influence[layer])
    least = ", ".join(f"{layer}: {number(influence[layer])}" for layer in order[:3])
    most = f"{order[-1]}: {number(influence[order[-1]])}"
    return f"Scores({scores.layers} layers, Block Influence: least {least}; most {most})"


def scores_html(scores: Scores) -> str:
    """A table of each layer's Block Influence and its rank, 1 for the least, with a bar."""
    influence = scores.block_influence
    ranks = {layer: rank for rank, layer in enumerate(sorted(range(len(influence)), key=lambda n: influence[n]), 1)}
    top = max(influence) or 1.0
    rows = [
        (str(layer), f"{value:.5f}", str(ranks[layer]), _bar(max(value, 0.0) / top))
        for layer, value in enumerate(influence)
    ]
    head = ("layer", "Block Influence", "rank", "")
    return f"<p>1 - mean cosine of a layer's input and output</p>{_table([head], rows)}"


def verdict_line(verdict: Verdict) -> str:
    """A verdict in one line."""
    if not verdict.limits:
        return "Verdict(passed: no limit is set)"
    word = "passed" if verdict.passed else "undecided" if verdict.undecided else "failed"
    return f"Verdict({word}: {'; '.join(_limit_words(limit) for limit in verdict.limits)})"


def verdict_html(verdict: Verdict) -> str:
    """A table of the limits, and whether each holds."""
    rows = [
        (limit.label, _limit_name(limit), number(limit.measured, 4), _allowed(limit), _outcome(limit))
        for limit in verdict.limits
    ]
    return _table([("model", "limit", "measured", "allowed", "")], _escaped(rows))


def report_line(report: Report) -> str:
    """A report in one line: the verdict, and the cost and gain of each candidate."""
    candidates = [row for row in report.rows if row.role == "candidate"]
    found = [
        f"{row.label}: {row.layers} layers, {number(row.perplexity_ratio.value, 4)}x perplexity, "
        f"{number(row.decode_speedup.value)}x decode speed"
        for row in candidates
    ]
    return f"Report({'; '.join([headline(report), *found])})"


def report_html(report: Report) -> str:
    """The verdict, a sentence on each candidate, the limits, and the comparison with one column a model."""
    parts = [f"<p><b>{escape(headline(report))}.</b></p>"]
    parts += [f"<p><b>{escape(each)}</b></p>" for each in warnings(report)]
    parts += [f"<p>{escape(each)}</p>" for each in sentences(report)]
    limits = "".join(f"<li>{escape(limit_sentence(limit, report))}</li>" for limit in report.verdict.limits)
    parts += [f"<ul>{limits}</ul>"] if limits else []
    rows = [(line.title, *(line.cell(row) for row in report.rows)) for line in table_rows(report)]
    return "".join(parts) + _table([("", *(row.label for row in report.rows))], _escaped(rows))


def artifact_line(artifact: Artifact) -> str:
    """An export in one line."""
    return f"Artifact({artifact.format}, {artifact.precision}, {artifact.path!r}, {_parity(artifact)})"


def artifact_html(artifact: Artifact) -> str:
    """A table of what an export is, and how near it is to torch."""
    rows = [
        ("folder", artifact.path),
        ("format", artifact.format),
        ("numbers", artifact.precision),
        ("made from", artifact.source),
        *((f"largest difference from torch, {check}", f"{value:.2g}") for check, value in artifact.parity.items()),
        ("layers traced", layer_ranges(tuple(sorted(artifact.traced_layers)))),
        ("files", ", ".join(sorted(artifact.files))),
    ]
    if artifact.weight_bytes is not None:
        rows.append(("weights read for a token", size(artifact.weight_bytes)))
    return _table([], _escaped(rows))


def _parity(artifact: Artifact) -> str:
    return f"largest difference from torch {max(artifact.parity.values(), default=0.0):.2g}"


def _limit_words(limit: Limit) -> str:
    return f"{limit.label} {_limit_name(limit)} {number(limit.measured, 4)}, {_allowed(limit)}: {_outcome(limit)}"


def _limit_name(limit: Limit) -> str:
    return LIMIT_NAMES.get(limit.name, "finite logits")


def _allowed(limit: Limit) -> str:
    return "must be a number" if limit.limit is None else f"{'>=' if limit.least else '<='} {limit.limit:g}"


def _outcome(limit: Limit) -> str:
    return "holds" if limit.passed else "undecided" if limit.undecided else "does not hold"


def _bar(share: float) -> str:
    return f'<div style="width:{100 * share:.0f}px;height:0.7em;background:{STATES["kept"][1]}"></div>'


def _escaped(rows: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    return [tuple(escape(cell) for cell in row) for row in rows]


def _table(head: Sequence[Sequence[str]], rows: Iterable[Sequence[str]]) -> str:
    """A table.

    Args:
        head: Rows of headings, as text.
        rows: Rows of cells, as HTML.
    """
    top = "".join(f"<tr>{''.join(f'<th>{cell}</th>' for cell in row)}</tr>" for row in _escaped(head))
    body = "".join(f"<tr>{''.join(f'<td {_CELL}>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{top}{body}</table>"
