"""The plots of a report as SVG text, drawn by matplotlib without a display.

Text and axes take the text colour of the page, so that a plot fits a light page and a dark one.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from optimum.streamline.evaluation.intervals import Interval
from optimum.streamline.evaluation.results import Interaction, Measurement

# All colours are readable on light and dark pages, and for readers with red-green colour blindness.
KEPT = "#6b8fb5"
# The colour, the hatch and the legend text of each outcome of a layer. The hatch is for print without colour.
OUTCOMES = {
    "removed": ("#d1495b", "////", "removed"),
    "replaced": ("#e39b2d", "....", "replaced by a trained layer"),
    "merged": ("#8867c0", "xxxx", "merged"),
    "thinned": ("#3a9d8f", "----", "without attention or MLP"),
}
# The largest ratio of the maximum to the median score that a linear axis shows well.
LINEAR_UP_TO = 8
PREFILL, DECODE = "#3a9d8f", "#8867c0"
# A placeholder that `_svg` replaces by the text colour of the page. No plot uses this colour otherwise.
PAGE_COLOUR = "#010203"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": PAGE_COLOUR,
    "axes.labelcolor": PAGE_COLOUR,
    "axes.edgecolor": PAGE_COLOUR,
    "xtick.color": PAGE_COLOUR,
    "ytick.color": PAGE_COLOUR,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "legend.frameon": False,
    "hatch.color": PAGE_COLOUR,
    "hatch.linewidth": 0.5,
}


def layer_importance_svg(scores: Sequence[float], outcomes: Mapping[int, str]) -> str:
    """A bar plot of the Block Influence of every layer of the original.

    Args:
        scores: The Block Influence by layer number, from 0.
        outcomes: The outcome of each layer that was not kept unchanged, a key of `OUTCOMES`, by layer number.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "layers"}):
        figure = Figure(figsize=(max(6.4, 0.22 * len(scores) + 1.2), 3.2), layout="constrained")
        axes = figure.add_subplot()
        bars = axes.bar(range(len(scores)), scores, color=KEPT, width=0.78, linewidth=0)
        for layer, outcome in outcomes.items():
            if outcome in OUTCOMES:
                colour, hatch, _ = OUTCOMES[outcome]
                bars[layer].set(facecolor=colour, hatch=hatch)
        axes.set_xlabel("layer of the original, counted from 0")
        # The first layer often has a hundred times the score of the others, which a linear axis would hide.
        spread = max(scores) > LINEAR_UP_TO * sorted(scores)[len(scores) // 2] > 0 and min(scores) > 0
        if spread:
            axes.set_yscale("log")
            axes.set_ylim(bottom=min(scores) / 3)
        axes.set_ylabel(f"Block Influence{' (log scale)' if spread else ''}")
        axes.set_xlim(-0.6, len(scores) - 0.4)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=24, integer=True))
        handles = [Patch(color=KEPT, label="kept", linewidth=0)]
        for outcome, (colour, hatch, words) in OUTCOMES.items():
            if outcome in outcomes.values():
                handles.append(Patch(facecolor=colour, hatch=hatch, label=words, linewidth=0))
        figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))
        return _svg(figure)


def comparison_svg(rows: Sequence[Measurement]) -> str:
    """A plot of the models with intervals: the perplexity ratio on the left, the speed-ups on the right.

    Hollow marks are ideal speed-ups. A figure that is not finite appears as text.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "comparison"}):
        figure = Figure(figsize=(9.0, 1.5 + 0.5 * len(rows)), layout="constrained")
        loss, speed = figure.subplots(1, 2, sharey=True)
        for position, row in enumerate(rows):
            _draw(loss, position, row.perplexity_ratio, KEPT)
            for offset, measured, ideal, colour in (
                (-0.14, row.prefill_speedup, row.ideal_prefill_speedup, PREFILL),
                (0.14, row.decode_speedup, row.ideal_decode_speedup, DECODE),
            ):
                _draw(speed, position + offset, measured, colour)
                speed.plot([ideal], [position + offset], "o", mfc="none", mec=colour, ms=8)
        loss.set_yticks(range(len(rows)), [f"{_short(row.label)}\n{row.runtime}, {row.dtype}" for row in rows])
        loss.set_ylim(len(rows) - 0.5, -0.5)
        loss.set_xlabel("perplexity divided by the original's (lower is better)")
        speed.set_xlabel("speed-up over the baseline (higher is better)")
        for axes in (loss, speed):
            axes.axvline(1, color=PAGE_COLOUR, linewidth=0.6, linestyle=(0, (4, 3)), zorder=0)
            axes.tick_params(axis="y", length=0)
        handles = [
            speed.plot([], [], "o", color=PREFILL, label="prefill")[0],
            speed.plot([], [], "o", color=DECODE, label="decode")[0],
            speed.plot([], [], "o", mfc="none", mec=PAGE_COLOUR, ms=8, label="ideal")[0],
        ]
        figure.legend(handles=handles, loc="outside upper right", ncols=3)
        return _svg(figure)


def interactions_svg(found: Sequence[Interaction]) -> str:
    """A plot of the costs of pruning and quantizing, alone and together, with a row for each quantizer and order.

    Costs are in nats per token. The hollow mark is the sum of both costs alone. If the interval of both together
    contains it, the data do not contradict that the two are orthogonal.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "interactions"}):
        figure = Figure(figsize=(9.0, 1.5 + 0.42 * len(found)), layout="constrained")
        axes = figure.add_subplot()
        for position, each in enumerate(found):
            if each.pruning is None or each.quantizing is None or each.together is None:
                axes.annotate("not possible", (0, position), xytext=(6, -3), textcoords="offset points")
                continue
            _draw(axes, position - 0.2, each.pruning, KEPT)
            _draw(axes, position, each.quantizing, PREFILL)
            _draw(axes, position + 0.2, each.together, DECODE)
            both = each.pruning.value + each.quantizing.value
            axes.plot([both], [position + 0.2], "o", mfc="none", mec=PAGE_COLOUR, ms=9)
        labels = [f"{each.quantizer}\n{each.steps.replace(',', ', then ')}" for each in found]
        axes.set_yticks(range(len(found)), labels)
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set_xlabel("log-loss minus the original's, nats per token (lower is better)")
        axes.axvline(0, color=PAGE_COLOUR, linewidth=0.6, linestyle=(0, (4, 3)), zorder=0)
        axes.tick_params(axis="y", length=0)
        handles = [
            axes.plot([], [], "o", color=KEPT, label="pruning alone")[0],
            axes.plot([], [], "o", color=PREFILL, label="quantizing alone")[0],
            axes.plot([], [], "o", color=DECODE, label="both")[0],
            axes.plot([], [], "o", mfc="none", mec=PAGE_COLOUR, ms=9, label="sum of both alone")[0],
        ]
        figure.legend(handles=handles, loc="outside upper right", ncols=4)
        return _svg(figure)


def _short(label: str) -> str:
    # The end of a path distinguishes models better than its start.
    return label if len(label) <= 28 else f"…{label[-27:]}"


def _draw(axes: Axes, position: float, figure: Interval, colour: str) -> None:
    if not figure.finite:
        axes.annotate(
            "not a finite number",
            (1, position),
            xytext=(6, -3),
            textcoords="offset points",
            color=OUTCOMES["removed"][0],
        )
        return
    axes.plot([figure.low, figure.high], [position, position], color=colour, linewidth=2.2, solid_capstyle="round")
    axes.plot([figure.value], [position], "o", color=colour, ms=5.5)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    FigureCanvasSVG(figure)
    # No date and no creator, so that the same figures give the same text.
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = text.getvalue()
    # The document type before the <svg> element does not belong into an HTML page.
    return svg[svg.index("<svg") :].replace(PAGE_COLOUR, "currentColor")
