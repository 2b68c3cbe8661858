"""Prefill and decode times of runners, measured in rounds that alternate between models.

This module imports no framework, so that a worker process for ONNX Runtime does not load torch.
`torch.utils.benchmark` would load torch, and it times one thing after another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from optimum.streamline.runtime.runner import Runner, TokenIds

from .intervals import Interval, median_interval

PROMPT_LENGTH, DECODE_TOKENS = 256, 32
"""How many tokens a timed model reads at once, and how many it then decodes one by one."""
ROUNDS, WARMUP_ROUNDS = 10, 2
"""How often each model is timed, and how often it runs before that."""


@dataclass(frozen=True)
class Round:
    """The times of one model in one round.

    Args:
        prefill_ms: Milliseconds from a prompt to the logits of all its tokens: the time to first token.
        decode_ms: Milliseconds per token that follows the prompt.
    """

    prefill_ms: float
    decode_ms: float


@dataclass(frozen=True)
class Timing:
    """The times of one model in all rounds after the warm-up, in order and in milliseconds."""

    prefill_ms: tuple[float, ...]
    decode_ms: tuple[float, ...]


def time_round(
    runner: Runner, tokens: TokenIds, prompt_length: int, clock: Callable[[], float] = time.perf_counter
) -> Round:
    """Time a prompt and the tokens that follow it.

    The tokens are given, not sampled. So every model computes the same tokens, and sampling is not timed.

    Args:
        runner: The model.
        tokens: Token ids `[1, length]`: the prompt, then the tokens to decode one by one.
        prompt_length: The length of the prompt, less than `length`.
        clock: A function that returns the time in seconds.
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
    """Run several timers in turn, in the order A B C, C B A, A B C, and so on.

    A slow phase of the machine then slows all models alike. Every second round is reversed, so that no model always
    follows the same other model.

    Args:
        timers: One function for each model, which times one round of it.
        rounds: The number of rounds to keep.
        warmup: The number of rounds to run first and drop.
        on_round: A function to call after each round of all timers, with the warm-up rounds.

    Returns:
        One `Timing` for each timer.
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
    """The median of the times of all rounds, in milliseconds."""
    return median_interval(np.asarray(times, np.float64), seed)


def speedup(baseline: Sequence[float], own: Sequence[float], seed: int) -> Interval:
    """The median over rounds of the baseline's time divided by `own` time in the same round. Above 1 is faster."""
    return median_interval(np.asarray(baseline, np.float64) / np.asarray(own, np.float64), seed)
