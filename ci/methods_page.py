"""Write the generated parts of docs/methods.md: tables and plots of the rows of `ci/bench methods`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from methods_cases import HEALED, LAYERS, MODELS, REMOVED, SEEDS, Row
from optimum.streamline.system.atomic_output import write_file

PAGE = Path("docs/methods.md")
ALL_ROWS = Path("docs/methods-rows.md")
PLOTS = Path("docs")
# The colours of the curves that stand out in a plot; all others are thin and grey.
COLOURS = {
    "shortgpt": "#4477aa",
    "llm-streamline none": "#228833",
    "come": "#ccbb44",
    "layerchop max-gap": "#aa3377",
    "sleb": "#66ccee",
    "blockpruner": "#000000",
}


def write_page(rows: Sequence[Row]) -> None:
    """Write the tables between their marks, the page of all rows, and the plots."""
    for model in MODELS:
        replace(f"unhealed {model}", wide(rows, model, "unhealed", REMOVED))
    replace("healed", wide(rows, "reference", "healed", HEALED, long=True))
    for model in MODELS:
        if model != "reference":
            replace(f"healed {model}", wide(rows, model, "healed", HEALED, long=True))
    replace("seeds", seeds(rows))
    replace("default", long_table(row for row in rows if row.part == "default"))
    replace("sweep", wide(rows, "reference", "sweep", HEALED[:1], long=True))
    head = "# All rows of `ci/bench methods`\n\nWritten by it; [methods.md](methods.md) says what they mean.\n\n"
    write_file(ALL_ROWS, head + long_table(rows))
    for model in MODELS:
        plot(rows, model, "unhealed", PLOTS / f"methods-unhealed-{model}.svg")
    plot(rows, "reference", "healed", PLOTS / "methods-healed.svg")


def replace(part: str, text: str) -> None:
    """Put `text` between the marks of a part of the page."""
    start, end = f"<!-- {part}: written by ci/bench methods -->", f"<!-- end of {part} -->"
    page = PAGE.read_text(encoding="utf-8")
    if start not in page or end not in page:
        raise SystemExit(f"{PAGE}: has no marks for {part!r}; add {start} and {end}")
    before, _, rest = page.partition(start)
    write_file(PAGE, f"{before}{start}\n\n{text}\n{end}{rest.partition(end)[2]}")


def wide(rows: Sequence[Row], model: str, part: str, counts: Sequence[int], long: bool = False) -> str:
    """A table with a row per method and a column per number of removed layers.

    Args:
        rows: All measured rows.
        model: A key of `MODELS`.
        part: The part of the page.
        counts: The numbers of removed layers.
        long: Whether a cell also has parameters and seconds.
    """
    found = {(row.name, row.removed): row for row in rows if row.model == model and row.part == part}
    names = list(dict.fromkeys(name for name, removed in found if removed))
    names.sort(key=lambda name: found[name, counts[-1]].ratio[0] if (name, counts[-1]) in found else 1e9)
    heads = [f"{removed} of {LAYERS} ({removed / LAYERS:.1%})" for removed in counts]
    lines = [f"| method | {' | '.join(heads)} |", f"|---|{'---|' * len(counts)}"]
    for row in (row for row in rows if row.model == model and row.part == part and not row.removed):
        lines.append(f"| {row.name} | {' | '.join([ratio(row)] * len(counts))} |")
    for name in names:
        cells = [cell(found.get((name, removed)), long) for removed in counts]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(row: Row | None, long: bool) -> str:
    """The perplexity ratio with its interval; if `long`, also parameters and seconds. Empty without a row."""
    if row is None:
        return ""
    return f"{ratio(row)}; {row.parameters / 1e6:.2f} M, {row.seconds:.0f} s" if long else ratio(row)


def ratio(row: Row) -> str:
    """The perplexity over the dense model's, with its 95% interval."""
    return "{:.3f} ({:.3f} to {:.3f})".format(*row.ratio)


def seeds(rows: Iterable[Row]) -> str:
    """A table of the rows that were measured with every seed: mean and range of their ratios."""
    by_name: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row.model == "reference" and row.part in ("healed", "seeds"):
            by_name.setdefault((row.name, row.removed), []).append(row)
    lines = ["| method | layers removed | ratio, mean of seeds | lowest | highest |", "|---|---|---|---|---|"]
    for (name, removed), same in by_name.items():
        if len(same) == len(SEEDS):
            of = [row.ratio[0] for row in same]
            lines.append(f"| {name} | {removed} | {sum(of) / len(of):.4f} | {min(of):.4f} | {max(of):.4f} |")
    return "\n".join(lines) + "\n"


def long_table(rows: Iterable[Row]) -> str:
    """A table with every row and every column."""
    heads = ("model", "removed", "method", "seed", "perplexity (95%)", "ratio to dense (95%)")
    lines = [
        f"| {' | '.join(heads)} | parameters | seconds | peak MiB | done |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        level = "{:.2f} ({:.2f} to {:.2f})".format(*row.perplexity)
        figures = f"{row.parameters:,} | {row.seconds:.1f} | {row.peak_mib:.0f} | {row.layers}"
        lines.append(f"| {row.model} | {row.removed} | {row.name} | {row.seed} | {level} | {ratio(row)} | {figures} |")
    return "\n".join(lines) + "\n"


def plot(rows: Iterable[Row], model: str, part: str, file: Path) -> None:
    """Plot the perplexity ratio against the share of removed parameters, with one curve per method."""
    curves: dict[str, list[tuple[float, float]]] = {}
    rows = [row for row in rows if row.model == model]
    dense = next((row.parameters for row in rows if not row.removed), None)
    if dense is None:
        return
    for row in rows:
        if row.part == part and row.removed and not row.name.startswith("random"):
            curves.setdefault(row.name, [(0.0, 1.0)]).append((100 * (1 - row.parameters / dense), row.ratio[0]))
    with matplotlib.rc_context({"svg.hashsalt": file.name, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        for name, points in curves.items():
            x, y = zip(*sorted(points), strict=True)
            colour = COLOURS.get(name.removesuffix(": distill"))
            axes.plot(x, y, color=colour or "#bbbbbb", linewidth=1.8 if colour else 0.8, zorder=2 if colour else 1)
            if colour:
                axes.plot([], [], color=colour, label=name)
        axes.plot([], [], color="#bbbbbb", linewidth=0.8, label="the others")
        axes.set(xlabel="parameters removed, %", ylabel="perplexity over the dense model's", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.legend(frameon=False, fontsize=8)
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)
