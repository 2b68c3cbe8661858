"""Bootstrap intervals: they contain the figure, shrink with more samples, and keep NaN."""

from __future__ import annotations

import math

import numpy as np
import pytest

from optimum.streamline.evaluation.intervals import FEWEST_GROUPS, mean_interval, median_interval


def test_mean_is_weighted_by_counts() -> None:
    figure = mean_interval(np.array([10.0, 0.0]), np.array([1.0, 9.0]), seed=0)
    assert figure.value == 1.0


def test_mean_interval_is_near_the_normal_one() -> None:
    rng = np.random.default_rng(1)
    samples = rng.normal(5.0, 2.0, 400)
    figure = mean_interval(samples, np.ones(400), seed=0)
    error = 1.96 * samples.std() / 20
    assert figure.low < figure.value < figure.high
    assert math.isclose(figure.value - figure.low, error, rel_tol=0.1)
    assert math.isclose(figure.high - figure.value, error, rel_tol=0.1)


def test_same_seed_same_interval() -> None:
    samples, counts = np.arange(20.0), np.ones(20)
    assert mean_interval(samples, counts, 3) == mean_interval(samples, counts, 3)
    assert mean_interval(samples, counts, 3) != mean_interval(samples, counts, 4)


def test_median_interval_ignores_an_outlier() -> None:
    figure = median_interval(np.array([1.0, 1.1, 1.2, 1.1, 1.0, 1.2, 1.1, 1.1, 900.0]), seed=0)
    assert figure.value == 1.1
    assert 1.0 <= figure.low <= figure.value <= figure.high <= 1.2


def test_constant_samples_have_no_width() -> None:
    figure = median_interval(np.ones(7), seed=0)
    assert (figure.low, figure.value, figure.high) == (1.0, 1.0, 1.0)


def test_not_a_number_stays_so() -> None:
    figure = mean_interval(np.array([1.0, math.nan, 2.0]), np.ones(3), seed=0)
    assert math.isnan(figure.value)
    assert not figure.finite
    infinite = mean_interval(np.array([1.0, math.inf]), np.ones(2), seed=0).map(np.exp)
    assert math.isinf(infinite.value)
    assert not infinite.finite


def test_windows_of_one_document_are_drawn_together() -> None:
    # 25 documents of four equal windows: a hundred windows tell no more than 25.
    chance = np.random.default_rng(0)
    level = chance.normal(size=25)
    documents = [number for number in range(25) for _ in range(4)]
    totals, counts = level[documents], np.ones(100)
    together = mean_interval(totals, counts, 1, documents)
    of_documents = mean_interval(4 * level, 4 * np.ones(25), 1)
    assert (together.low, together.high) == pytest.approx((of_documents.low, of_documents.high))
    alone = mean_interval(totals, counts, 1)
    assert together.value == pytest.approx(alone.value)
    assert 1.7 < (together.high - together.low) / (alone.high - alone.low) < 2.3


def test_few_documents_are_not_resampled() -> None:
    totals, counts = np.arange(40.0), np.ones(40)
    few = [number % (FEWEST_GROUPS - 1) for number in range(40)]
    enough = [number % FEWEST_GROUPS for number in range(40)]
    assert mean_interval(totals, counts, 1, few) == mean_interval(totals, counts, 1)
    assert mean_interval(totals, counts, 1, enough) != mean_interval(totals, counts, 1)


def test_each_window_from_a_document_of_its_own_is_drawn_alone() -> None:
    totals, counts = np.arange(40.0), np.ones(40)
    assert mean_interval(totals, counts, 1, range(40)) == mean_interval(totals, counts, 1)
