"""Write the tables of docs/search.md from docs/search.json."""

from __future__ import annotations

from statistics import mean
from typing import Any

from export_cases import ROOT
from marked_page import replace_part

PAGE = ROOT / "docs" / "search.md"
SEARCHES = {
    "layers": "`sleb`: layers",
    "pairs": "`shifted`: pairs",
    "sublayers": "`blockpruner --no-packed`: attentions and MLPs",
}


def write_page(results: dict[str, Any]) -> None:
    """Write each table that was measured.

    Args:
        results: The contents of docs/search.json.
    """
    if "races" in results:
        replace_part(PAGE, "races", _races(results["races"]))
    if "literal" in results:
        replace_part(PAGE, "literal", _literal(results["literal"]))
    if "packed" in results:
        replace_part(PAGE, "packed", _packed(results["packed"]))
    if "trials" in results:
        replace_part(PAGE, "trials", _trials(results["trials"]))
    if "cost" in results:
        replace_part(PAGE, "cost", _cost(results["cost"]))
    if "caches" in results:
        replace_part(PAGE, "caches", _caches(results["caches"]))


def _races(measured: dict[str, Any]) -> list[str]:
    lines = [
        "| search | steps | same choice | largest excess loss, nats | share of the windows |",
        "|---|---|---|---|---|",
    ]
    every: list[dict[str, float]] = []
    for search, name in SEARCHES.items():
        every += measured["steps"][search]
        lines.append(_race_row(name, measured["steps"][search]))
    return [*lines, _race_row("all", every)]


def _race_row(name: str, steps: list[dict[str, float]]) -> str:
    same, windows = (mean(step[key] for step in steps) for key in ("same", "share_of_windows"))
    excess = max(step["excess"] for step in steps)
    return f"| {name} | {len(steps)} | {same:.0%} | {excess:.4f} | {windows:.2f} |"


def _literal(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| method | layers removed | seconds | as in the paper | of that | same choice |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours, theirs = row["seconds"], row["literal_seconds"]
        cells = [
            f"`{row['method']}`",
            f"{row['removed']} of 16",
            f"{ours:.0f}",
            f"{theirs:.0f}",
            f"{ours / theirs:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} | {'yes' if row['same'] else 'no'} |")
    return lines


def _packed(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| layers removed | method | layers left | parameters | unhealed | healed |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        zeros = f", {row['zeros']} sublayers zero" if row["zeros"] else ""
        left = f"{row['layers']}{zeros}"
        cells = [f"{row['removed']} of 16", row["method"], left, f"{row['parameters'] / 1e6:.2f} M"]
        cells += [f"{row['unhealed']:.3f}", f"{row['healed']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _trials(rows: list[dict[str, Any]]) -> list[str]:
    shares = list(rows[0]["divergence"])
    names = ["plan of", *[f"after {float(share):.3g}" for share in shares[:-1]], "in the end"]
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for row in rows:
        cells = [row["candidate"]]
        for share in shares:
            value = f"{row['divergence'][share]:.3f}"
            best = row["divergence"][share] == min(each["divergence"][share] for each in rows)
            cells.append(f"**{value}**" if best else value)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cost(row: dict[str, Any]) -> list[str]:
    alone, together = row["seconds"], row["seconds_with_trials"]
    return [
        "| plans | one training, seconds of the processor | with the trials | ratio |",
        "|---|---|---|---|",
        f"| {row['plans']} | {alone:.0f} | {together:.0f} | {together / alone:.2f} |",
    ]


def _caches(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| `--heal-cache` | healed | seconds of the processor |", "|---|---|---|"]
    for row in rows:
        value, low, high = row["ratio"]
        lines.append(f"| `{row['form']}` | {value:.4f} ({low:.3f} to {high:.3f}) | {row['seconds']:.0f} |")
    return lines
