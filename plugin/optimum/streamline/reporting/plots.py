"""The report's plots as SVG text, drawn by matplotlib without a display.

Text and axes take the colour of the page around them, so that one plot suits a light page and a dark one. This
file knows figures and layer numbers, nothing of pages.
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

# Readable on white and on near black, and told apart by those who do not tell red from green.
KEPT = "#6b8fb5"
# Colour and hatch of what became of a layer, and the word for it: colour alone would not do in print.
FATES = {
    "removed": ("#d1495b", "////", "removed"),
    "replaced": ("#e39b2d", "....", "replaced by a trained layer"),
    "merged": ("#8867c0", "xxxx", "merged"),
    "thinned": ("#3a9d8f", "----", "without attention or MLP"),
}
# Largest over median score that a linear axis still shows well.
LINEAR_UP_TO = 8
PREFILL, DECODE = "#3a9d8f", "#8867c0"
# Stands for the page's own text colour; no plot draws in it otherwise.
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


def layer_importance_svg(scores: Sequence[float], fates: Mapping[int, str]) -> str:
    """A bar for each layer of the original: how much it changes the residual stream.

    Args:
        scores: Block Influence by original layer number, 0-based.
        fates: What became of the layers that were not kept as they are, a key of `FATES` each.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "layers"}):
        figure = Figure(figsize=(max(6.4, 0.22 * len(scores) + 1.2), 3.2), layout="constrained")
        axes = figure.add_subplot()
        bars = axes.bar(range(len(scores)), scores, color=KEPT, width=0.78, linewidth=0)
        for layer, fate in fates.items():
            if fate in FATES:
                colour, hatch, _ = FATES[fate]
                bars[layer].set(facecolor=colour, hatch=hatch)
        axes.set_xlabel("layer of the original, counted from 0")
        # A first layer often changes the stream a hundred times as much as the others, which a linear axis hides.
        spread = max(scores) > LINEAR_UP_TO * sorted(scores)[len(scores) // 2] > 0 and min(scores) > 0
        if spread:
            axes.set_yscale("log")
            axes.set_ylim(bottom=min(scores) / 3)
        axes.set_ylabel(f"Block Influence{' (log scale)' if spread else ''}")
        axes.set_xlim(-0.6, len(scores) - 0.4)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=24, integer=True))
        handles = [Patch(color=KEPT, label="kept", linewidth=0)]
        for fate, (colour, hatch, words) in FATES.items():
            if fate in fates.values():
                handles.append(Patch(facecolor=colour, hatch=hatch, label=words, linewidth=0))
        figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))
        return _svg(figure)


def comparison_svg(rows: Sequence[Measurement]) -> str:
    """What each model lost and gained: perplexity ratio on the left, speed-ups on the right, with intervals.

    Hollow marks are the ideal speed-ups. A figure that is not a number is written, not drawn.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "comparison"}):
        figure = Figure(figsize=(9.0, 1.5 + 0.5 * len(rows)), layout="constrained")
        loss, speed = figure.subplots(1, 2, sharey=True)
        for place, row in enumerate(rows):
            _draw(loss, place, row.perplexity_ratio, KEPT)
            for offset, measured, ideal, colour in (
                (-0.14, row.prefill_speedup, row.ideal_prefill_speedup, PREFILL),
                (0.14, row.decode_speedup, row.ideal_decode_speedup, DECODE),
            ):
                _draw(speed, place + offset, measured, colour)
                speed.plot([ideal], [place + offset], "o", mfc="none", mec=colour, ms=8)
        loss.set_yticks(range(len(rows)), [f"{_short(row.label)}\n{row.runtime}, {row.dtype}" for row in rows])
        loss.set_ylim(len(rows) - 0.5, -0.5)
        loss.set_xlabel("perplexity over the original's (left is better)")
        speed.set_xlabel("speed over its baseline's (right is better)")
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
    """What pruning and quantizing cost alone and together, in nats, one line a quantizer and order.

    The hollow mark is the sum of what each costs alone: where the full one, with its interval, lies on it, the two are
    orthogonal.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "interactions"}):
        figure = Figure(figsize=(9.0, 1.5 + 0.42 * len(found)), layout="constrained")
        axes = figure.add_subplot()
        for place, each in enumerate(found):
            if each.pruning is None or each.quantizing is None or each.together is None:
                axes.annotate("not possible", (0, place), xytext=(6, -3), textcoords="offset points")
                continue
            _draw(axes, place - 0.2, each.pruning, KEPT)
            _draw(axes, place, each.quantizing, PREFILL)
            _draw(axes, place + 0.2, each.together, DECODE)
            both = each.pruning.value + each.quantizing.value
            axes.plot([both], [place + 0.2], "o", mfc="none", mec=PAGE_COLOUR, ms=9)
        labels = [f"{each.quantizer}\n{each.steps.replace(',', ', then ')}" for each in found]
        axes.set_yticks(range(len(found)), labels)
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set_xlabel("log-loss over the original's, nats a token (left is better)")
        axes.axvline(0, color=PAGE_COLOUR, linewidth=0.6, linestyle=(0, (4, 3)), zorder=0)
        axes.tick_params(axis="y", length=0)
        handles = [
            axes.plot([], [], "o", color=KEPT, label="pruning alone")[0],
            axes.plot([], [], "o", color=PREFILL, label="quantizing alone")[0],
            axes.plot([], [], "o", color=DECODE, label="both")[0],
            axes.plot([], [], "o", mfc="none", mec=PAGE_COLOUR, ms=9, label="sum of the two alone")[0],
        ]
        figure.legend(handles=handles, loc="outside upper right", ncols=4)
        return _svg(figure)


def _short(label: str) -> str:
    # The end of a path tells models apart.
    return label if len(label) <= 28 else f"…{label[-27:]}"


def _draw(axes: Axes, place: float, figure: Interval, colour: str) -> None:
    if not figure.finite:
        axes.annotate(
            "not a finite number", (1, place), xytext=(6, -3), textcoords="offset points", color=FATES["removed"][0]
        )
        return
    axes.plot([figure.low, figure.high], [place, place], color=colour, linewidth=2.2, solid_capstyle="round")
    axes.plot([figure.value], [place], "o", color=colour, ms=5.5)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    FigureCanvasSVG(figure)
    # Neither date nor creator: the same figures give the same text.
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = text.getvalue()
    # The document type before the element names a schema on the network, and has no place in a page.
    return svg[svg.index("<svg") :].replace(PAGE_COLOUR, "currentColor")
