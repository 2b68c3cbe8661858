"""Write the generated parts of docs/methods.md: tables and a plot of the rows of `ci/bench methods`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from methods_cases import DISTILLED, LAYERS, MODELS, REMOVED, VARIED, Row
from optimum.streamline.system.atomic_output import write_file

PAGE = Path("docs/methods.md")
ALL_ROWS = Path("docs/methods-rows.md")
PLOT = Path("docs/methods.svg")
TITLES = {"reference": "reference model (Llama)", "qwen3": "Qwen3", "gpt2": "GPT-2"}
COLOURS = {4: "#4477aa", 8: "#aa3377"}
# Larger ratios before healing are drawn at this edge of the plot.
LARGEST = 2.5


def write_page(rows: Sequence[Row]) -> None:
    """Write the tables between their marks, the page of all rows, and the plot."""
    for model in MODELS:
        replace(model, before_and_after([row for row in rows if row.model == model]))
    replace("default", rows_in_full([row for row in rows if row.part == "default"]) or "Not measured yet.\n")
    replace("settings", settings(rows))
    replace("self", self_text(rows))
    head = "# All rows of `ci/bench methods`\n\nWritten by it; [methods.md](methods.md) says what they mean.\n\n"
    write_file(ALL_ROWS, head + rows_in_full(rows))
    plot(rows)


def replace(part: str, text: str) -> None:
    """Put `text` between the marks of a part of the page."""
    start, end = f"<!-- {part}: written by ci/bench methods -->", f"<!-- end of {part} -->"
    page = PAGE.read_text(encoding="utf-8")
    if start not in page or end not in page:
        raise SystemExit(f"{PAGE}: has no marks for {part!r}; add {start} and {end}")
    before, _, rest = page.partition(start)
    write_file(PAGE, f"{before}{start}\n\n{text}\n{end}{rest.partition(end)[2]}")


def by_method(rows: Iterable[Row], part: str) -> dict[str, dict[int, Row]]:
    """The rows of a part by name and number of removed layers; the lowest ratio at most removed layers is first."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row.part == part and row.removed:
            found.setdefault(row.name, {})[row.removed] = row
    last = REMOVED[-1]
    return dict(sorted(found.items(), key=lambda each: each[1][last].ratio[0] if last in each[1] else float("inf")))


def before_and_after(rows: Sequence[Row]) -> str:
    """A model's table: a row per method, and for each number of removed layers a column before and after healing.

    The healed methods are first, the best one at a half on top; then the others, in the same order before healing.
    """
    before, after = by_method(rows, "unhealed"), by_method(rows, "healed")
    heads = [f"{removed} of {LAYERS}, {state}" for removed in REMOVED for state in ("unhealed", "healed")]
    lines = [f"| method | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for name in dict.fromkeys([*after, *before]):
        cells = [ratio(of.get(name, {}).get(removed)) for removed in REMOVED for of in (before, after)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def settings(rows: Sequence[Row]) -> str:
    """The table of settings that take less memory, below the row of the same healing with the default settings."""
    place = ("reference", "healed", REMOVED[0], VARIED)
    found = [row for row in rows if (row.model, row.part, row.removed, row.name) == place]
    if not found or not any(row.part == "settings" for row in rows):
        return "Not measured yet.\n"
    usual = found[0]
    lines = ["| setting | ratio to dense (95%) | over that of the defaults |", "|---|---|---|"]
    for row in (usual, *(row for row in rows if row.part == "settings")):
        name = "the defaults" if row is usual else row.name
        lines.append(f"| {name} | {ratio(row)} | {row.ratio[0] / usual.ratio[0]:.4f} |")
    return "\n".join(lines) + "\n"


def self_text(rows: Sequence[Row]) -> str:
    """The table of healing on text that the original samples, beside the same healing on the given text."""
    given = {(row.model, row.removed): row for row in rows if row.part == "healed" and row.name == VARIED}
    lines = []
    for row in rows:
        if row.part == "self" and (row.model, row.removed) in given:
            both = f"{ratio(given[row.model, row.removed])} | {ratio(row)}"
            lines.append(f"| {row.model} | {row.removed} of {LAYERS} | {both} |")
    if not lines:
        return "Not measured yet.\n"
    heads = [
        "| model | removed | ratio on given text (95%) | ratio on the original's text (95%) |",
        "|---|---|---|---|",
    ]
    return "\n".join([*heads, *lines]) + "\n"


def ratio(row: Row | None) -> str:
    """The perplexity over the dense model's, with its 95% interval. Empty without a row."""
    return "" if row is None else "{:.3f} ({:.3f} to {:.3f})".format(*row.ratio)


def rows_in_full(rows: Sequence[Row]) -> str:
    """A table with every row and every column; empty without rows."""
    if not rows:
        return ""
    heads = ("model", "removed", "method", "part", "perplexity (95%)", "ratio to dense (95%)")
    lines = [
        f"| {' | '.join(heads)} | parameters | seconds | peak MiB | done |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        level = "{:.2f} ({:.2f} to {:.2f})".format(*row.perplexity)
        figures = f"{row.parameters:,} | {row.seconds:.1f} | {row.peak_mib:.0f} | {row.layers}"
        lines.append(f"| {row.model} | {row.removed} | {row.name} | {row.part} | {level} | {ratio(row)} | {figures} |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row]) -> None:
    """Plot the distilled methods, a panel per model: the ratio before healing (hollow) and after it (filled)."""
    names = [name for name in ("auto", *reversed(DISTILLED)) if any(row.name == name for row in rows)]
    with matplotlib.rc_context({"svg.hashsalt": PLOT.name, "axes.spines.top": False, "axes.spines.right": False}):
        figure, panels = plt.subplots(1, len(MODELS), figsize=(10, 3.8), layout="constrained", sharex=True, sharey=True)
        for panel, model in zip(panels, MODELS, strict=True):
            drawn = [row for row in rows if row.model == model and row.part in ("unhealed", "healed") and row.removed]
            for row in (row for row in drawn if row.name in names):
                healed, colour = row.part == "healed", COLOURS[row.removed]
                place = names.index(row.name) + (0.15 if row.removed == REMOVED[0] else -0.15)
                low, high = (min(bound, LARGEST) for bound in row.ratio[1:])
                panel.plot([low, high], [place, place], color=colour, linewidth=1)
                face = colour if healed else "white"
                panel.plot(min(row.ratio[0], LARGEST), place, "o", color=colour, markerfacecolor=face, markersize=5)
            panel.set(title=TITLES[model], xscale="log", xlim=(0.99, 1.04 * LARGEST), yticks=range(len(names)))
            panel.set_yticklabels(names)
            panel.set_xticks([1, 1.1, 1.25, 1.5, 2, 2.5], minor=False)
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            panel.grid(axis="x", color="#dddddd", linewidth=0.6)
        for removed in REMOVED:
            panels[-1].plot([], [], "o", color=COLOURS[removed], label=f"{removed} of {LAYERS} layers removed")
        panels[-1].plot([], [], "o", color="#555555", markerfacecolor="white", label="without healing")
        figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=len(REMOVED) + 1)
        figure.supxlabel("perplexity over the dense model's", fontsize=9)
        figure.savefig(PLOT, metadata={"Date": None})
        plt.close(figure)
