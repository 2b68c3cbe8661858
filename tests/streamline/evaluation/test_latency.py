"""Timing, with a clock that the test controls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from optimum.streamline.evaluation.latency import Round, alternate, median_time, speedup, time_round
from optimum.streamline.runtime.runner import Logits, TokenIds


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class SlowRunner:
    """Takes 2 ms a prompt token and 5 ms a decoded one; its cache counts the tokens."""

    runtime = "fake"

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.fed: list[list[int]] = []

    def prefill(self, input_ids: TokenIds) -> tuple[Logits, Any]:
        self.clock.now += 0.002 * input_ids.shape[1]
        self.fed.append(input_ids[0].tolist())
        return np.zeros((1, input_ids.shape[1], 4), np.float32), input_ids.shape[1]

    def decode(self, input_ids: TokenIds, cache: Any) -> tuple[Logits, Any]:
        assert cache == sum(map(len, self.fed))
        self.clock.now += 0.005
        self.fed.append(input_ids[0].tolist())
        return np.zeros((1, 1, 4), np.float32), cache + 1


def test_prefill_and_decode_are_timed_apart() -> None:
    clock = Clock()
    runner = SlowRunner(clock)
    timing = time_round(runner, np.arange(13)[None], 10, clock)
    assert timing.prefill_ms == pytest.approx(20.0)
    assert timing.decode_ms == pytest.approx(5.0)
    assert runner.fed == [list(range(10)), [10], [11], [12]]


def test_models_alternate_and_warmup_is_dropped() -> None:
    order: list[str] = []

    def timer(name: str) -> Round:
        order.append(name)
        return Round(float(len(order)), 10.0 * len(order))

    bar: list[None] = []
    first, second = alternate([lambda: timer("A"), lambda: timer("B")], 2, 1, lambda: bar.append(None))
    assert order == ["A", "B", "B", "A", "A", "B"]
    assert (first.prefill_ms, first.decode_ms) == ((4.0, 5.0), (40.0, 50.0))
    assert (second.prefill_ms, second.decode_ms) == ((3.0, 6.0), (30.0, 60.0))
    assert len(bar) == 3


def test_speedup_is_of_each_round_on_its_own() -> None:
    # The machine gets ten times slower half way, and slows both.
    baseline = [10.0, 10.0, 10.0, 100.0, 100.0, 100.0]
    own = [5.0, 5.0, 5.0, 50.0, 50.0, 50.0]
    figure = speedup(baseline, own, seed=0)
    assert (figure.low, figure.value, figure.high) == (2.0, 2.0, 2.0)
    noisy = speedup([10.0, 12.0, 9.0, 11.0, 10.0], [5.0, 5.5, 5.2, 4.8, 5.1], seed=0)
    assert noisy.value == 2.0  # of 2, 2.18, 1.73, 2.29 and 1.96; the ratio of the medians is 1.96
    assert noisy.low < noisy.value < noisy.high


def test_a_model_is_as_fast_as_itself() -> None:
    figure = speedup([3.1, 2.9, 3.7], [3.1, 2.9, 3.7], seed=0)
    assert (figure.low, figure.value, figure.high) == (1.0, 1.0, 1.0)


def test_time_is_the_median() -> None:
    assert median_time([1.0, 2.0, 90.0], seed=0).value == 2.0
