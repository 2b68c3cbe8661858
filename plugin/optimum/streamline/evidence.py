"""What a method has to go by when it chooses: the model, the calibration text and the scores of its layers."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from .scores import Scores
from .windows import Windows


@dataclass(frozen=True)
class Evidence:
    """What a choice is made from; a method that changes `model` to try something changes it back.

    Args:
        model: The original, in fp32, in evaluation mode.
        calibration: The text to choose on.
        scores: `scores.measure_scores` of the two.
        held_out: Text to compare plans on, for a method that does.
    """

    model: PreTrainedModel
    calibration: Windows
    scores: Scores
    held_out: Windows | None = None

    @property
    def layers(self) -> int:
        """How many layers the model has."""
        return self.scores.layers
