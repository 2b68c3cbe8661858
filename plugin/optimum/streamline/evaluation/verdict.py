"""Holding measurements against a budget. Knows neither how they were measured nor how a verdict is shown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from optimum.streamline.recipe.recipe import Budget, Judge

from .intervals import Interval
from .results import Limit, Measurement, Verdict


def judge(rows: Sequence[Measurement], budget: Budget, by: Judge = "bound") -> Verdict:
    """Judge the candidates among `rows`.

    Accuracy limits hold for every candidate. Speed and size limits hold for the candidates in the runtime of
    the last one listed, which is the exported one where there is an export: what would be deployed. At the limit
    is within it. Logits that are not numbers fail, whatever the budget.

    Args:
        by: What must be within a limit: `bound`, the whole interval, so its end nearest the limit or past it; or
            `point`, the figure itself. A figure without an interval is judged as it is.
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
    """About how many more windows, or rounds, would bring the whole interval within a limit, if the figure stays.

    An interval's half-width shrinks as 1 / sqrt(n). From n samples to m, the distance h of its bad end from the figure
    becomes h sqrt(n / m); that is d, the distance of the limit from the figure, at m = n (h / d)^2.

    Args:
        limit: One that is undecided (`Limit.undecided`).
        count: n, how many its interval is of.

    Returns:
        m - n, rounded up; `None` where d is 0: the figure is at the limit, and no number would.
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
