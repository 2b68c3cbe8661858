"""Holding measurements against a budget. Knows neither how they were measured nor how a verdict is shown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .intervals import Interval
from .recipe import Budget
from .report import Limit, Measurement, Verdict


def judge(rows: Sequence[Measurement], budget: Budget) -> Verdict:
    """Judge the candidates among `rows`.

    Accuracy limits hold for every candidate. Speed and size limits hold for the candidates in the runtime of
    the last one listed, which is the exported one where there is an export: what would be deployed. The figure
    is judged, at the limit is within it, and the interval is shown beside. Logits that are not numbers fail,
    whatever the budget.
    """
    candidates = [row for row in rows if row.role == "candidate"]
    limits: list[Limit] = []
    for row in candidates:
        if not row.finite:
            limits.append(Limit("finite", row.label, None, row.perplexity.value, None, False))
        limits += _at_most("max_ppl_ratio", row, budget.max_ppl_ratio, row.perplexity_ratio)
        limits += _at_most("max_kl", row, budget.max_kl, row.kl)
    for row in candidates:
        if row.runtime != candidates[-1].runtime:
            continue
        if budget.min_speedup is not None:
            fast_enough = row.decode_speedup.value >= budget.min_speedup
            limits.append(
                Limit(
                    "min_speedup",
                    row.label,
                    budget.min_speedup,
                    row.decode_speedup.value,
                    row.decode_speedup,
                    fast_enough,
                )
            )
        limits += _at_most("max_size_ratio", row, budget.max_size_ratio, row.size_ratio)
    return Verdict(tuple(limits))


def _at_most(name: str, row: Measurement, limit: float | None, figure: Interval | float) -> list[Limit]:
    if limit is None:
        return []
    measured = figure.value if isinstance(figure, Interval) else figure
    interval = figure if isinstance(figure, Interval) else None
    # NaN is not below anything, so it fails here; infinity too.
    return [Limit(name, row.label, limit, measured, interval, math.isfinite(measured) and measured <= limit)]
