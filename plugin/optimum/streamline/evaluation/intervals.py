"""Bootstrap 95% intervals of weighted means and of a median.

Percentile bootstrap: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13. One seed and one
number of samples always draw the same resamples, so that everything measured on the same windows, or in the same
rounds, is resampled together. `scipy.stats.bootstrap` resamples entries but not the documents that they are from, and
no dependency brings scipy. This file knows neither models nor clocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95
# With fewer documents, how far apart they are is not known well enough to say how far off their mean is.
FEWEST_GROUPS = 20


@dataclass(frozen=True)
class Interval:
    """A figure and the bounds of its 95% interval, all in the figure's own unit; NaN where it cannot be known."""

    value: float
    low: float
    high: float

    @property
    def finite(self) -> bool:
        """Whether the figure itself is a number."""
        return math.isfinite(self.value)

    def map(self, function: Callable[[Any], Any]) -> Interval:
        """The interval of a rising function of the figure."""
        with np.errstate(over="ignore"):
            return Interval(*(float(function(bound)) for bound in (self.value, self.low, self.high)))


def mean_interval(totals: Samples, counts: Samples, seed: int, groups: Sequence[int] = ()) -> Interval:
    """Sum of `totals` over sum of `counts`, resampled over their entries, or over what these belong to.

    Args:
        totals: `[n]`, one sum a window.
        counts: `[n]`, how many tokens each sum is over.
        groups: `[n]`, of each window the document it is from, which are then resampled whole (a cluster bootstrap);
            empty where that is not known. See `grouped` for when they are.
    """
    if grouped(groups):
        _, new_layers = np.unique(groups, return_inverse=True)
        totals = np.bincount(new_layers, weights=totals).astype(np.float64)
        counts = np.bincount(new_layers, weights=counts).astype(np.float64)
    times = _drawn_times(len(totals), seed)
    with np.errstate(invalid="ignore"):  # a window left out of a resample times an infinite sum is NaN, and is said so
        return _interval(float(totals.sum() / counts.sum()), (times @ totals) / (times @ counts))


def grouped(groups: Sequence[int]) -> bool:
    """Whether entries are resampled by their groups: there are at least `FEWEST_GROUPS`."""
    return len(set(groups)) >= FEWEST_GROUPS


def softmax_mean_interval(values: Samples, logits: Samples, seed: int) -> Interval:
    """sum_i w_i values_i with w = softmax_i(logits), resampled over entries: each resample has its own softmax.

    Args:
        values: `[n]`.
        logits: `[n]`, of any size: the largest among those drawn is taken off first.
    """

    def mean(times: npt.NDArray[np.int64]) -> float:
        drawn = times > 0
        weights = times[drawn] * np.exp(logits[drawn] - logits[drawn].max())
        return float((weights * values[drawn]).sum() / weights.sum())

    resampled = [mean(times) for times in _drawn_times(len(values), seed)]
    return _interval(mean(np.ones(len(values), np.int64)), np.array(resampled))


def median_interval(samples: Samples, seed: int) -> Interval:
    """Median of `samples` `[n]`, resampled over its entries."""
    drawn = np.random.default_rng(seed).integers(0, len(samples), (RESAMPLES, len(samples)))
    return _interval(float(np.median(samples)), np.median(samples[drawn], axis=1))


@lru_cache(maxsize=1)  # the figures of one comparison are resampled together
def _drawn_times(count: int, seed: int) -> npt.NDArray[np.int64]:
    # How often each of `count` entries is drawn, `[RESAMPLES, count]`.
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)


def _interval(value: float, resampled: Samples) -> Interval:
    with np.errstate(invalid="ignore"):
        low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
