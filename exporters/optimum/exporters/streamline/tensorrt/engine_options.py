"""The options of an engine, and its limits. Its imports are cheap, because the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass

from optimum.streamline.errors import StreamlineError

MIN_LENGTH = 16
"""The least length of the caches, in tokens: the text of the comparison with torch must fit.

It equals `parity.compare.LONGEST_TEXT`; importing that would import torch.
"""

DEFAULT_LENGTH = 2048
"""The length of the caches, in tokens, if none is given and the model has as many positions."""


@dataclass(frozen=True)
class Limits:
    """The largest requests that an engine takes.

    Args:
        batch: The most rows of a call.
        input: The most new tokens of a call; a longer prompt is processed in several calls.
        length: The most tokens of a text, prompt and answer together: the length of the caches.
    """

    batch: int
    input: int
    length: int


@dataclass(frozen=True)
class EngineOptions:
    """The engine to build, and the GPUs to build it for.

    Args:
        builder: `tensorrt` or `tensorrt-rtx`.
        capabilities: The compute capabilities to build for, 89 for 8.9; empty for the GPU of this machine.
        max_batch: The most rows of a call.
        max_length: The most tokens of a text; by default 2048, or the model's number of positions if that is less.
        max_input: The most new tokens of a call; by default `max_length`.
    """

    builder: str = "tensorrt"
    capabilities: tuple[int, ...] = ()
    max_batch: int = 1
    max_length: int | None = None
    max_input: int | None = None

    def limits(self, context: int) -> Limits:
        """The limits of the engine, with defaults filled in.

        >>> EngineOptions(max_batch=4).limits(1024)
        Limits(batch=4, input=1024, length=1024)

        Args:
            context: The model's number of positions, in tokens.

        Raises:
            StreamlineError: a limit is out of range; names it, its value and the range.
        """
        length = min(DEFAULT_LENGTH, context) if self.max_length is None else self.max_length
        max_new = length if self.max_input is None else self.max_input
        if self.max_batch < 1:
            raise StreamlineError(f"max-batch {self.max_batch}: must be at least 1")
        if not MIN_LENGTH <= length <= context:
            raise StreamlineError(f"max-length {length}: must be from {MIN_LENGTH} to {context}, the model's positions")
        if not 1 <= max_new <= length:
            raise StreamlineError(f"max-input {max_new}: must be from 1 to {length}, which is max-length")
        return Limits(self.max_batch, max_new, length)
