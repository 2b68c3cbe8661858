"""The interaction of pruning and quantizing in words: table cells, headings and their explanation."""

from __future__ import annotations

from optimum.streamline.evaluation.results import Interaction

from .numbers import number, with_interval


def interaction_sentence(found: Interaction) -> str:
    """What an interaction means, in a few words.

    >>> from optimum.streamline.evaluation.intervals import Interval
    >>> cost = Interval(0.1, 0.05, 0.15)
    >>> interaction_sentence(Interaction("int4", "prune,quantize", quantizing=cost, term=Interval(0.03, 0.01, 0.05)))
    'quantizing costs 0.0300 nats per token more after pruning'
    >>> interaction_sentence(Interaction("int4", "prune,quantize", quantizing=cost, term=Interval(0.0, -0.01, 0.02)))
    'additive within the interval'
    """
    if found.term is None:
        return f"not measured: {found.missing}"
    if not found.term.finite:
        return "not a number: the logits of a model are not finite on this text"
    if found.term.low <= 0 <= found.term.high:
        return "additive within the interval"
    more = "more" if found.term.value > 0 else "less"
    does = "quantizing costs" if found.steps == "prune,quantize" else "pruning costs"
    after = "after pruning" if found.steps == "prune,quantize" else "in the quantized model"
    return f"{does} {number(abs(found.term.value))} nats per token {more} {after}"


def cells(found: Interaction) -> list[str]:
    """The cells of an interaction's table row, in the order of `HEADINGS`."""
    figures = (found.pruning, found.quantizing, found.together, found.term)
    shown = ["" if figure is None else with_interval(figure) for figure in figures]
    return [found.quantizer, found.steps.replace(",", ", then "), *shown, interaction_sentence(found)]


HEADINGS = ["quantizer", "order", "pruning alone", "quantizing alone", "both", "interaction", "conclusion"]
MEANING = (
    "A cost is the mean log-loss of a model minus the original's, in nats per token, on the same tokens. Brackets hold "
    "paired 95% bootstrap intervals over windows. The interaction is the cost of both together, minus the cost of "
    "pruning alone and the cost of quantizing alone. If it is 0, the two are orthogonal."
)
