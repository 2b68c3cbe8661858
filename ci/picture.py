"""Draws docs/demo.svg, the picture in the README: `python ci/picture.py demo-output`, after `ci/demo`.

Which sublayers were removed or merged is read from the demo's record, the figures from the table in the README: the
picture says what the table says.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from optimum.streamline.system.atomic_output import write_file

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "demo.svg"
KEPT, MERGED, BEFORE = "#2f6db3", "#8867c0", "#a9b4c0"
REMOVED, INK, FAINT = "#d1495b", "#1f2933", "#6b7785"
# Readable without installed fonts, and on GitHub, which shows an SVG as an image of its own.
STYLE = "font-family: system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
WIDTH, HEIGHT = 880, 330
# What is compared: the title, the line of the README's table that the bars show, its columns of original and candidate,
# what follows the figures, and the line that says the change.
BARS = (
    ("Perplexity", "Perplexity", (1, 2), "", "Perplexity ratio"),
    ("Speed in ONNX", "Time per token", (3, 4), " a token", "Decode speed-up (ideal 1.28)"),
    ("Size in ONNX", "Size on disk", (3, 4), "", "Size on disk"),
)


def read_table(readme: str) -> dict[str, list[str]]:
    """The lines of the table in the README by their name, each with its cells."""
    rows = [line.strip("|").split("|") for line in readme.splitlines() if line.startswith("| ")]
    return {row[0].strip(): [cell.strip() for cell in row] for row in rows}


def picture(
    table: dict[str, list[str]], total: int, removed: dict[str, list[str]], merged: Sequence[Sequence[int]] = ()
) -> str:
    """The picture as SVG.

    Args:
        table: As `read_table` gives it.
        total: Layers of the original.
        removed: Which sublayer of which layer was removed: layer number to `attention`, `mlp` or both.
        merged: The layers that were merged into one, each as layer numbers in rising order.
    """
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'style="{STYLE}" role="img">',
        "<title>The demo: what was removed, and what it changed</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#ffffff"/>',
        *_layers(total, removed, merged),
        *(part for column, bar in enumerate(BARS) for part in _pair(table, 40 + 280 * column, bar)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def removed_sublayers(record: dict[str, Any]) -> dict[str, list[str]]:
    """What a plan removed: the sublayers by the number of the original layer. None of a merged layer is.

    Args:
        record: The contents of `streamline.json`.
    """
    left: set[tuple[int, str]] = set()
    for layer in record["layers"]:
        skipped = record["dead"].get(str(layer["layer"]), [])
        originals = layer["originals"] if layer["kind"] == "merged" else layer["originals"][:1]
        for kind in ("attention", "mlp"):
            if kind not in skipped:
                left |= {(layer.get(kind, original), kind) for original in originals}
    return {
        str(layer): [kind for kind in ("attention", "mlp") if (layer, kind) not in left]
        for layer in range(record["source"]["layers"])
    }


def _layers(total: int, removed: dict[str, list[str]], merged: Sequence[Sequence[int]]) -> list[str]:
    counts = {kind: sum(kind in kinds for kinds in removed.values()) for kind in ("attention", "mlp")}
    count = f"{_count(counts['attention'], 'attention')} and {_count(counts['mlp'], 'MLP')} removed"
    if merged:
        count = f"{sum(map(len, merged))} merged into {len(merged)}"
    parts = [_text(40, 38, f"A model of {total} layers: {count}, the rest healed", 17, INK, "600")]
    step = (WIDTH - 40 - 130) / total
    for row, (kind, name) in enumerate((("attention", "attention"), ("mlp", "MLP"))):
        top = 80 + 38 * row
        parts.append(_text(40, top + 20, name, 14, INK))
        for layer in range(total):
            group = next((group for group in merged if layer in group), [layer])
            if layer == group[0]:
                width = step * len(group) - 8
                parts.append(_box(130 + layer * step, top, width, kind in removed.get(str(layer), []), len(group) > 1))
    for layer in range(total):
        parts.append(_text(130 + layer * step + (step - 8) / 2, 70, str(layer), 11, FAINT, anchor="middle"))
    return parts


def _box(left: float, top: float, width: float, removed: bool, merged: bool) -> str:
    shape = f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="30" rx="4" '
    if not removed:
        return f'{shape}fill="{MERGED if merged else KEPT}"/>'
    middle = f"{left + width / 2:.1f}"
    cross = f'<path d="M{middle} {top + 15}m-6-6l12 12m0-12l-12 12" stroke="{REMOVED}" stroke-width="2"/>'
    return f'{shape}fill="none" stroke="{REMOVED}" stroke-dasharray="4 3"/>{cross}'


def _pair(table: dict[str, list[str]], left: int, bar: tuple[str, str, tuple[int, int], str, str]) -> list[str]:
    title, line, columns, unit, change_line = bar
    figures = [_figure(table[line][column]) for column in columns]
    change = re.findall(r"[\d.]+(?=x\))|^[\d.]+", table[change_line][columns[1]])[-1]
    parts = [_text(left, 200, f"{title}: {change}x", 15, INK, "600")]
    longest = max(float(figure.split()[0]) for figure in figures)
    labels = (("original", BEFORE), ("pruned and healed", KEPT))
    for row, (figure, (label, colour)) in enumerate(zip(figures, labels, strict=True)):
        top, width = 214 + 46 * row, 140 * float(figure.split()[0]) / longest
        parts.append(f'<rect x="{left}" y="{top}" width="{width:.1f}" height="22" rx="3" fill="{colour}"/>')
        parts.append(_text(left + width + 8, top + 16, figure + unit, 14, INK))
        parts.append(_text(left, top + 36, label, 11, FAINT))
    return parts


def _figure(cell: str) -> str:
    """A cell's figure with its unit, without what follows in brackets."""
    return re.split(r" [\[(]", cell)[0]


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def _text(x: float, y: float, words: str, size: int, colour: str, weight: str = "400", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{colour}" '
        f'text-anchor="{anchor}">{escape(words)}</text>'
    )


if __name__ == "__main__":
    record = json.loads((Path(sys.argv[1]) / "streamline.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    parts = (record["source"]["layers"], removed_sublayers(record), record["merged"])
    write_file(PICTURE, picture(read_table(readme), *parts))
