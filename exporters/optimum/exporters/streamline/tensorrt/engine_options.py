"""What is asked of an engine. Imports nothing heavy: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass

from optimum.streamline.errors import StreamlineError

MIN_LENGTH = 16
"""Tokens of the text that a graph is compared with torch on, for which its caches must have room."""

DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class Limits:
    """The largest requests to an engine.

    Args:
        batch: Rows.
        input: New tokens a call: the longest prompt, or part of one.
        length: Tokens of a text, prompt and answer together: the places of the caches.
    """

    batch: int
    input: int
    length: int


@dataclass(frozen=True)
class EngineOptions:
    """What to build, and for which GPUs.

    Args:
        builder: `tensorrt` or `tensorrt-rtx`.
        capabilities: Compute capabilities to build for, 89 for 8.9; none for the GPU that is there.
        max_batch: Rows.
        max_length: Tokens of a text; by default 2048, or what positions the model has.
        max_input: New tokens a call; by default as many as a text has.
    """

    builder: str = "tensorrt"
    capabilities: tuple[int, ...] = ()
    max_batch: int = 1
    max_length: int | None = None
    max_input: int | None = None

    def limits(self, context: int) -> Limits:
        """The limits of an engine for a model of so many positions.

        >>> EngineOptions(max_batch=4).limits(1024)
        Limits(batch=4, input=1024, length=1024)

        Raises:
            StreamlineError: one is none, or cannot be reached.
        """
        length = min(DEFAULT_LENGTH, context) if self.max_length is None else self.max_length
        entry = length if self.max_input is None else self.max_input
        if self.max_batch < 1:
            raise StreamlineError(f"max-batch {self.max_batch}: must be at least 1")
        if not MIN_LENGTH <= length <= context:
            raise StreamlineError(f"max-length {length}: must be from {MIN_LENGTH} to {context}, the model's positions")
        if not 1 <= entry <= length:
            raise StreamlineError(f"max-input {entry}: must be from 1 to {length}, which is max-length")
        return Limits(self.max_batch, entry, length)
