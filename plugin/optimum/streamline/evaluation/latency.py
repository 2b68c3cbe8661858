"""Prefill and decode times of anything that has the form of a `Runner`, in rounds that alternate between models.

Pure: the clock and the runners are given, so this is tested with plain objects. It knows neither processes nor
models, and imports no framework, so that a worker on ONNX Runtime stays free of torch: `torch.utils.benchmark` would
not do, and it times one thing after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from optimum.streamline.runtime.runner import Runner, TokenIds

from .intervals import Interval, median_interval


@dataclass(frozen=True)
class Round:
    """One timing of one model.

    Args:
        prefill_ms: From a prompt to the logits of all its tokens: the time to the first token.
        decode_ms: Per token, of the tokens fed one by one after it.
    """

    prefill_ms: float
    decode_ms: float


@dataclass(frozen=True)
class Timing:
    """All rounds of one model, warm-up dropped, in the order they were run."""

    prefill_ms: tuple[float, ...]
    decode_ms: tuple[float, ...]


def time_round(
    runner: Runner, tokens: TokenIds, prompt_length: int, clock: Callable[[], float] = time.perf_counter
) -> Round:
    """Time one prompt and the tokens that follow it.

    The tokens are given, not sampled: every model computes on the same ones, and sampling is not timed.

    Args:
        tokens: `[1, length]`, the prompt first; the rest is decoded one by one.
        prompt_length: How many of them are the prompt; fewer than all.
        clock: Seconds.
    """
    started = clock()
    _, cache = runner.prefill(tokens[:, :prompt_length])
    prefilled = clock()
    for position in range(prompt_length, tokens.shape[1]):
        _, cache = runner.decode(tokens[:, position : position + 1], cache)
    ended = clock()
    steps = tokens.shape[1] - prompt_length
    return Round(1e3 * (prefilled - started), 1e3 * (ended - prefilled) / steps)


def alternate(
    timers: Sequence[Callable[[], Round]], rounds: int, warmup: int, on_round: Callable[[], None]
) -> list[Timing]:
    """Run the timers in turn, A B C, C B A, A B C, so that what slows the machine slows them all alike.

    Every other round runs backwards: a model is not always timed after the same other one, nor always last.

    Args:
        timers: One a model; each call is one round of it.
        warmup: Rounds to run first and forget.
        on_round: Called after each round of all timers, warm-up included.
    """
    kept: list[list[Round]] = [[] for _ in timers]
    for number in range(warmup + rounds):
        order = range(len(timers))
        for index in reversed(order) if number % 2 else order:
            timing = timers[index]()
            if number >= warmup:
                kept[index].append(timing)
        on_round()
    return [Timing(tuple(r.prefill_ms for r in each), tuple(r.decode_ms for r in each)) for each in kept]


def median_time(times: Sequence[float], seed: int) -> Interval:
    """Median of the rounds' times, ms."""
    return median_interval(np.asarray(times, np.float64), seed)


def speedup(baseline: Sequence[float], own: Sequence[float], seed: int) -> Interval:
    """Median over rounds of the baseline's time over one's own in the same round: above 1 is faster."""
    return median_interval(np.asarray(baseline, np.float64) / np.asarray(own, np.float64), seed)
