"""The numbers of `ci/bench validation` as tables: docs/validation.md. Measures nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from marked_page import replace_part

PAGE = Path("docs/validation.md")
FIGURES = {"perplexity": "perplexity", "ratio": "perplexity ratio", "kl": "KL", "agreement": "agreement"}


def write_page(results: dict[str, Any]) -> None:
    """Write every generated part between its marks."""
    tables = {"coverage": _coverage, "drawing": _drawing, "prefix": _prefix, "machine": _machine}
    for name, table in tables.items():
        source = "coverage" if name == "drawing" else name
        if source in results:
            replace_part(PAGE, name, table(results[source]))


def _coverage(found: dict[str, Any]) -> list[str]:
    of = found["population"]
    lines = [
        f"Of {of['windows']:,} windows of {of['length']} tokens in {of['documents']} documents, {found['draws']:,} "
        "draws a cell.",
        "",
        f"| drawn, resampled | windows | {' | '.join(FIGURES.values())} |",
        f"|---|---|{'---|' * len(FIGURES)}",
    ]
    for row in found["rows"]:
        cells = [f"{row['share'][name]:.1%}" for name in FIGURES]
        lines.append(f"| {row['way']} | {row['windows']} | {' | '.join(cells)} |")
    return lines


def _drawing(found: dict[str, Any]) -> list[str]:
    lines = [f"| every window counts | {' | '.join(FIGURES.values())} |", f"|---|{'---|' * len(FIGURES)}"]
    for text, key in (("the same", "whole"), ("by its characters", "by_characters")):
        lines.append(f"| {text} | {' | '.join(f'{found[key][name]:.4g}' for name in FIGURES)} |")
    return lines


def _prefix(found: dict[str, Any]) -> list[str]:
    def shown(figure: dict[str, float]) -> str:
        return "{value:.4g} ({low:.4g} to {high:.4g})".format(**figure)

    return [
        f"A Llama of {found['parameters'] / 1e6:.2f} M parameters after {found['tokens'] / 1e6:.2f} M tokens, judged "
        f"on {found['windows']} windows:",
        "",
        "| windows begin with | perplexity (95%) |",
        "|---|---|",
        f"| the token of the beginning | {shown(found['with'])} |",
        f"| nothing | {shown(found['without'])} |",
        f"| nothing over the token of the beginning, the same tokens | {shown(found['ratio'])} |",
    ]


def _machine(facts: dict[str, Any]) -> list[str]:
    return ["; ".join(f"{name} {value}" for name, value in facts.items() if name != "memory_bytes")]
