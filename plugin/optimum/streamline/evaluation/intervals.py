"""Bootstrap 95% intervals of weighted means and of medians.

They are percentile intervals: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13. The same
seed and number of samples always give the same resamples. So figures measured on the same windows, or in the same
rounds, are resampled together.
`scipy.stats.bootstrap` cannot resample the documents that the samples are from, and no dependency installs scipy.
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
# The smallest number of documents to resample by document. The spread of fewer documents is too uncertain.
FEWEST_GROUPS = 20


@dataclass(frozen=True)
class Interval:
    """A figure and the bounds of its 95% interval, all in the unit of the figure; NaN if it cannot be computed."""

    value: float
    low: float
    high: float

    @property
    def finite(self) -> bool:
        """Whether the figure itself is a number."""
        return math.isfinite(self.value)

    def map(self, function: Callable[[Any], Any]) -> Interval:
        """The interval of `function` of the figure, for an increasing function."""
        with np.errstate(over="ignore"):
            return Interval(*(float(function(bound)) for bound in (self.value, self.low, self.high)))


def mean_interval(totals: Samples, counts: Samples, seed: int, groups: Sequence[int] = ()) -> Interval:
    """The sum of `totals` divided by the sum of `counts`, resampled over windows or over groups of windows.

    Args:
        totals: `[n]`, one sum for each window.
        counts: `[n]`, the number of tokens in each sum.
        seed: The seed of the bootstrap.
        groups: `[n]`, the document of each window; empty if that is not known. With enough documents (`grouped`), whole
            documents are resampled, which is a cluster bootstrap.
    """
    if grouped(groups):
        _, group_of_window = np.unique(groups, return_inverse=True)
        totals = np.bincount(group_of_window, weights=totals).astype(np.float64)
        counts = np.bincount(group_of_window, weights=counts).astype(np.float64)
    times = _drawn_times(len(totals), seed)
    with np.errstate(invalid="ignore"):  # 0 times an infinite sum is NaN, which is the right answer
        return _interval(float(totals.sum() / counts.sum()), (times @ totals) / (times @ counts))


def grouped(groups: Sequence[int]) -> bool:
    """Whether intervals resample groups: there are at least `FEWEST_GROUPS` of them."""
    return len(set(groups)) >= FEWEST_GROUPS


def softmax_mean_interval(values: Samples, logits: Samples, seed: int) -> Interval:
    """sum_i w_i values_i with w = softmax(logits), resampled over the n entries. Each resample has its own softmax.

    Args:
        values: `[n]`.
        logits: `[n]`. They may be large, because the maximum is subtracted before the softmax.
        seed: The seed of the bootstrap.
    """

    def mean(times: npt.NDArray[np.int64]) -> float:
        drawn = times > 0
        weights = times[drawn] * np.exp(logits[drawn] - logits[drawn].max())
        return float((weights * values[drawn]).sum() / weights.sum())

    resampled = [mean(times) for times in _drawn_times(len(values), seed)]
    return _interval(mean(np.ones(len(values), np.int64)), np.array(resampled))


def median_interval(samples: Samples, seed: int) -> Interval:
    """The median of `samples` `[n]`, resampled over the n entries."""
    drawn = np.random.default_rng(seed).integers(0, len(samples), (RESAMPLES, len(samples)))
    return _interval(float(np.median(samples)), np.median(samples[drawn], axis=1))


@lru_cache(maxsize=1)  # all figures of one comparison use the same resamples
def _drawn_times(count: int, seed: int) -> npt.NDArray[np.int64]:
    # How often each of `count` entries is drawn in each resample: `[RESAMPLES, count]`.
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)


def _interval(value: float, resampled: Samples) -> Interval:
    with np.errstate(invalid="ignore"):
        low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
