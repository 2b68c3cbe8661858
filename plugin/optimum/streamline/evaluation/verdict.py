"""The verdict: comparing measurements with the limits of a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

from optimum.streamline.recipe.recipe import Budget, Judge

from .intervals import Interval
from .results import Limit, Measurement, Verdict


def judge(rows: Sequence[Measurement], budget: Budget, by: Judge = "bound") -> Verdict:
    """Judge the candidates among `rows` by a budget.

    Accuracy limits apply to every candidate. Speed and size limits apply to the candidates in the runtime of the last
    candidate, which is the exported one if there is an export, because that is the one to deploy. A figure equal to a
    limit is within it. A candidate whose accuracy figures are not finite fails any budget.

    Args:
        rows: The measurements.
        budget: The limits.
        by: What must be within a limit: the whole interval (`bound`) or the figure (`point`). A figure without an
            interval is judged by itself.
    """
    candidates = [row for row in rows if row.role == "candidate"]
    limits: list[Limit] = []
    for row in candidates:
        if not row.finite:
            limits.append(Limit("finite", row.label, None, row.perplexity.value, None, row.perplexity.value))
        limits += _held("max_ppl_ratio", row, budget.max_ppl_ratio, row.perplexity_ratio, by)
        limits += _held("max_kl", row, budget.max_kl, row.kl, by)
    for row in candidates:
        if row.runtime == candidates[-1].runtime:
            limits += _held("min_speedup", row, budget.min_speedup, row.decode_speedup, by)
            limits += _held("max_size_ratio", row, budget.max_size_ratio, row.size_ratio, by)
    return Verdict(tuple(limits), by)


def more_to_settle(limit: Limit, count: int) -> int | None:
    """Estimate how many more windows or rounds would bring the whole interval within a limit, if the figure stays.

    The width of an interval shrinks as 1 / sqrt(n). Let h be the distance from the figure to the end of the interval
    that is past the limit, and d the distance from the figure to the limit. With m samples instead of n, h becomes
    h sqrt(n / m). This equals d for m = n (h / d)^2.

    Args:
        limit: An undecided limit (`Limit.undecided`).
        count: n, the number of windows or rounds so far.

    Returns:
        m - n, rounded up; `None` if the figure equals the limit, because then no number is enough.
    """
    assert limit.limit is not None
    room = abs(limit.limit - limit.measured)
    if room == 0:
        return None
    return max(1, math.ceil(count * ((limit.judged - limit.measured) / room) ** 2) - count)


def _held(name: str, row: Measurement, limit: float | None, figure: Interval | float, by: Judge) -> list[Limit]:
    if limit is None:
        return []
    if not isinstance(figure, Interval):
        return [Limit(name, row.label, limit, figure, None, figure)]
    bound = figure.low if name.startswith("min_") else figure.high
    return [Limit(name, row.label, limit, figure.value, figure, figure.value if by == "point" else bound)]
