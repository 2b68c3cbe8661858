"""How pruning and quantizing interact, in words and table cells."""

from __future__ import annotations

from optimum.streamline.evaluation.results import Interaction

from .numbers import number, with_interval


def reading(found: Interaction) -> str:
    """The interaction in plain words.

    >>> from optimum.streamline.evaluation.intervals import Interval
    >>> cost = Interval(0.1, 0.05, 0.15)
    >>> reading(Interaction("int4", "prune,quantize", quantizing=cost, term=Interval(0.03, 0.01, 0.05)))
    'quantizing costs 0.0300 nats a token more after pruning'
    >>> reading(Interaction("int4", "prune,quantize", quantizing=cost, term=Interval(0.0, -0.01, 0.02)))
    'additive within the interval'
    """
    if found.term is None:
        return f"not measured: {found.missing}"
    if not found.term.finite:
        return "not a number: one of the models is broken on this text"
    if found.term.low <= 0 <= found.term.high:
        return "additive within the interval"
    more = "more" if found.term.value > 0 else "less"
    does = "quantizing costs" if found.steps == "prune,quantize" else "pruning costs"
    after = "after pruning" if found.steps == "prune,quantize" else "in the quantized model"
    return f"{does} {number(abs(found.term.value))} nats a token {more} {after}"


def cells(found: Interaction) -> list[str]:
    """One line of a table: quantizer, order, three losses over the dense model's, the interaction, and the reading."""
    figures = (found.pruning, found.quantizing, found.together, found.term)
    shown = ["" if figure is None else with_interval(figure) for figure in figures]
    return [found.quantizer, found.steps.replace(",", ", then "), *shown, reading(found)]


HEADINGS = ["quantizer", "order", "pruning alone", "quantizing alone", "both", "interaction", "reading"]
MEANING = (
    "Mean log-loss over the original's, nats a token, on the same tokens, with paired bootstrap 95% intervals over "
    "windows. The interaction is what both together cost beyond the sum of what each costs alone: 0 is what orthogonal "
    "means."
)
