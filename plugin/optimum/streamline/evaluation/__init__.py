"""Comparing models with their original: accuracy, latency, theoretical cost, confidence intervals, and the limits that
the user set (the budget).
"""

__all__ = [
    "accuracy",
    "contamination",
    "interaction",
    "intervals",
    "latency",
    "multiple_choice",
    "one_at_a_time",
    "results",
    "theoretical_cost",
    "timing_processes",
    "timing_worker",
    "validate",
    "verdict",
]
