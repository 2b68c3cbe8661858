"""Comparing models with their original: accuracy, latency, theoretical cost, intervals, and the verdict on a budget."""

__all__ = [
    "accuracy",
    "contamination",
    "interaction",
    "intervals",
    "latency",
    "multiple_choice",
    "results",
    "theoretical_cost",
    "timing_processes",
    "timing_worker",
    "validate",
    "verdict",
]
