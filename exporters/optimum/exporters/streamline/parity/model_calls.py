"""The calls of a comparison with torch, as data, so that a runner can answer them in any order.

A runner for little memory answers all calls with one part of the graph before it opens the next part.
"""

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
    """One call to a model: new tokens, and the earlier call whose cache they continue.

    Args:
        input_ids: The new tokens, `[batch, length]`.
        attention_mask: The mask of all tokens so far, these included, `[batch, total length]`; 0 for padding, which is
            on the left.
        follows: The index, in the list of calls, of the earlier call that these tokens continue; `None` for a prompt.
    """

    input_ids: TokenIds
    attention_mask: Mask
    follows: int | None = None


CallFunction = Callable[[Sequence[Call]], list[Logits]]
"""A function that answers calls: it returns the logits `[batch, length, vocabulary]` of each."""


def token_positions(attention_mask: Mask, new: int) -> npt.NDArray[np.int64]:
    """The position of each of the last `new` tokens in its own text, `[batch, new]`, from 0; padding does not count.

    Args:
        attention_mask: The mask of all tokens so far, `[batch, total length]`; 0 for padding, which is on the left.
        new: The number of new tokens per row.
    """
    # The position of a padding token has no effect, but it must be a valid index.
    positions: npt.NDArray[np.int64] = np.maximum(attention_mask.cumsum(axis=1) - 1, 0)[:, -new:]
    return positions


class MaskedRunner(Protocol):
    """A `Runner` whose prefill takes an attention mask, and whose cache keeps it."""

    def prefill(self, input_ids: TokenIds, attention_mask: Mask | None = None) -> tuple[Logits, Any]:
        """As `Runner.prefill`, with an attention mask `[batch, length]`: 0 for padding, which is on the left."""

    def decode(self, input_ids: TokenIds, cache: Any) -> tuple[Logits, Any]:
        """As `Runner.decode`."""


def answer_with(runner: MaskedRunner) -> CallFunction:
    """A function that answers calls with `runner`, one after the other, each with the cache of the call it follows."""

    def answer(calls: Sequence[Call]) -> list[Logits]:
        answers: list[tuple[Logits, Any]] = []
        for call in calls:
            if call.follows is None:
                answers.append(runner.prefill(call.input_ids, call.attention_mask))
            else:
                answers.append(runner.decode(call.input_ids, answers[call.follows][1]))
        return [logits for logits, _ in answers]

    return answer
