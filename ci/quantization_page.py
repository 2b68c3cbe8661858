"""Write the tables of docs/quantization.md from the figures of `ci/bench orthogonality`."""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from optimum.streamline.evaluation.intervals import Interval, median_interval
from optimum.streamline.evaluation.results import Interaction
from optimum.streamline.reporting.interaction_wording import interaction_sentence
from optimum.streamline.reporting.numbers import size

PAGE = Path(__file__).parents[1] / "docs" / "quantization.md"
FIGURES = ("pruning", "quantizing", "together", "term")
MARK = "<!-- {} {} -->"


def write_page(results: dict[str, Any]) -> None:
    """Write each table between its marks."""
    text = PAGE.read_text(encoding="utf-8")
    tables: dict[str, list[str]] = {}
    if "table" in results:
        tables |= {"interactions": _interactions(results["table"]), "models": _models(results["table"])}
    if "product" in results:
        tables["product"] = _product(results["product"])
    for name, lines in tables.items():
        begin, end = MARK.format("begin", name), MARK.format("end", name)
        before, _, rest = text.partition(begin)
        _, mark, after = rest.partition(end)
        assert mark, f"{PAGE} has no mark for {name}"
        text = "\n".join([before + begin, *lines, end]) + after
    PAGE.write_text(text, encoding="utf-8")


def _interactions(runs: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| layers | quantizer | order | pruning alone | quantizing alone | both | interaction, by seed | reading |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str], list[Interaction]] = defaultdict(list)
    for run in runs:
        for each in run["interactions"]:
            figures = {name: each[name] and Interval(**each[name]) for name in FIGURES}
            groups[run["recipe"], each["quantizer"], each["steps"]].append(Interaction(**{**each, **figures}))
    for (recipe, quantizer, steps), by_seed in groups.items():
        lines.append(f"| {recipe} | {quantizer} | {steps.replace(',', ', then ')} | {' | '.join(_cells(by_seed))} |")
    return lines


def _cells(by_seed: list[Interaction]) -> list[str]:
    """The last five cells of a row, from the interactions of all seeds."""
    if by_seed[0].missing:
        return ["", "", "", "", f"not possible: {by_seed[0].missing.partition(';')[0]}"]
    means = [f"{statistics.mean(getattr(each, name).value for each in by_seed):.4f}" for name in FIGURES[:3]]
    terms = [each.term for each in by_seed if each.term is not None]
    term_cell = "; ".join(f"{term.value:+.4f} [{term.low:+.4f}, {term.high:+.4f}]" for term in terms)
    # The number of nats is left out of each seed's sentence, because the column before has it.
    readings = Counter(re.sub(r" [0-9.e-]+ nats per token", "", interaction_sentence(each)) for each in by_seed)
    return [*means, term_cell, "; ".join(f"{text} ({count} of {len(by_seed)})" for text, count in readings.items())]


def _models(runs: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| layers | model | ran on | size | perplexity over the original's | KL, nats | ms a token | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        if run["seed"] != 0:
            continue
        for row in run["rows"]:
            cells = (
                run["recipe"],
                row["label"],
                row["runtime"],
                size(row["disk_bytes"]),
                _interval(Interval(**row["perplexity_ratio"]), 3),
                _interval(Interval(**row["kl"]), 4),
                _interval(Interval(**row["decode_ms"]), 2),
                size(row["peak_bytes"]),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _product(rows: dict[str, Any]) -> list[str]:
    dense = rows["dense, fp32"]
    lines = ["| model | layers | size | times smaller | ms a token | times faster |", "|---|---|---|---|---|---|"]
    turns = {name: np.array(row["decode_turns_ms"]) for name, row in rows.items()}
    gains = {name: turns["dense, fp32"] / taken for name, taken in turns.items()}
    for name, row in rows.items():
        cells = (
            name,
            str(row["layers"]),
            size(row["bytes"]),
            f"{dense['bytes'] / row['bytes']:.2f}",
            _interval(median_interval(turns[name], 0), 2),
            _interval(median_interval(gains[name], 0), 2),
        )
        lines.append(f"| {' | '.join(cells)} |")
    share = median_interval(gains["pruned, int4"] / (gains["pruned, fp32"] * gains["dense, int4"]), 0)
    smaller = dense["bytes"] / rows["pruned, int4"]["bytes"]
    lines += [
        "",
        f"Both together are {smaller:.2f} times smaller, and decode at {_interval(share, 2)} of the product of the two "
        "gains.",
    ]
    return lines


def _interval(figure: Interval, digits: int) -> str:
    return f"{figure.value:.{digits}f} [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"
