"""Calls to a model that are known beforehand: what a comparison asks, of any runner, in whatever order it likes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from optimum.streamline.runtime.runner import Logits, TokenIds

Mask = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Call:
    """Tokens to answer.

    Args:
        input_ids: `[batch, length]`.
        attention_mask: `[batch, everything fed so far]`, these tokens included; 0 for padding, which is on the left.
        follows: Which earlier call's text they continue, by its place; none for a prompt.
    """

    input_ids: TokenIds
    attention_mask: Mask
    follows: int | None = None


CallFunction = Callable[[Sequence[Call]], list[Logits]]
"""The logits `[batch, length, vocabulary]` of each call."""


def token_positions(attention_mask: Mask, new: int) -> npt.NDArray[np.int64]:
    """Where in its own text each of the last `new` tokens is, `[batch, new]`, from 0.

    Args:
        attention_mask: `[batch, everything fed so far]`, 0 for padding, which is on the left.
    """
    # A padding token's position is of no consequence, but must be one.
    found: npt.NDArray[np.int64] = np.maximum(attention_mask.cumsum(axis=1) - 1, 0)[:, -new:]
    return found


class MaskedRunner(Protocol):
    """A `Runner` whose prefill takes a mask, and whose cache remembers it."""

    def prefill(self, input_ids: TokenIds, attention_mask: Mask | None = None) -> tuple[Logits, Any]:
        """As `Runner.prefill`, the mask `[batch, length]` being 0 for padding on the left."""

    def decode(self, input_ids: TokenIds, cache: Any) -> tuple[Logits, Any]:
        """As `Runner.decode`."""


def answer_with(runner: MaskedRunner) -> CallFunction:
    """What answers calls by having `runner` answer one after the other."""

    def answer(calls: Sequence[Call]) -> list[Logits]:
        answers: list[tuple[Logits, Any]] = []
        for call in calls:
            if call.follows is None:
                answers.append(runner.prefill(call.input_ids, call.attention_mask))
            else:
                answers.append(runner.decode(call.input_ids, answers[call.follows][1]))
        return [logits for logits, _ in answers]

    return answer
