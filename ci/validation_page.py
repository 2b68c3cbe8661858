"""Write the tables of docs/validation.md from the figures of `ci/bench validation`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from marked_page import replace_part

PAGE = Path("docs/validation.md")
FIGURES = {"perplexity": "perplexity", "ratio": "perplexity ratio", "kl": "KL", "agreement": "agreement"}


def write_page(results: dict[str, Any]) -> None:
    """Write each table between its marks."""
    tables = {"coverage": _coverage, "drawing": _drawing, "prefix": _prefix, "machine": _machine}
    for name, table in tables.items():
        source = "coverage" if name == "drawing" else name
        if source in results:
            replace_part(PAGE, name, table(results[source]))


def _coverage(figures: dict[str, Any]) -> list[str]:
    text = figures["population"]
    lines = [
        f"Of {text['windows']:,} windows of {text['length']} tokens in {text['documents']} documents, "
        f"{figures['draws']:,} draws a cell.",
        "",
        f"| drawn, resampled | windows | {' | '.join(FIGURES.values())} |",
        f"|---|---|{'---|' * len(FIGURES)}",
    ]
    for row in figures["rows"]:
        cells = [f"{row['share'][name]:.1%}" for name in FIGURES]
        lines.append(f"| {row['way']} | {row['windows']} | {' | '.join(cells)} |")
    return lines


def _drawing(figures: dict[str, Any]) -> list[str]:
    lines = [f"| every window counts | {' | '.join(FIGURES.values())} |", f"|---|{'---|' * len(FIGURES)}"]
    for text, key in (("the same", "whole"), ("by its characters", "by_characters")):
        lines.append(f"| {text} | {' | '.join(f'{figures[key][name]:.4g}' for name in FIGURES)} |")
    return lines


def _prefix(figures: dict[str, Any]) -> list[str]:
    def shown(figure: dict[str, float]) -> str:
        return "{value:.4g} ({low:.4g} to {high:.4g})".format(**figure)

    return [
        f"A Llama of {figures['parameters'] / 1e6:.2f} M parameters after {figures['tokens'] / 1e6:.2f} M tokens, "
        f"judged on {figures['windows']} windows:",
        "",
        "| windows begin with | perplexity (95%) |",
        "|---|---|",
        f"| the token of the beginning | {shown(figures['with'])} |",
        f"| nothing | {shown(figures['without'])} |",
        f"| nothing over the token of the beginning, the same tokens | {shown(figures['ratio'])} |",
    ]


def _machine(facts: dict[str, Any]) -> list[str]:
    return ["; ".join(f"{name} {value}" for name, value in facts.items() if name != "memory_bytes")]
