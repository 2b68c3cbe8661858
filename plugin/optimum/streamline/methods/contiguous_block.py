"""What the methods share that take one contiguous block of layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from transformers import PreTrainedConfig

from optimum.streamline.editing.plan import TRAINED, Plan
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.similarity import Scores

from .base import Method, MethodInputs, check_attention_stays, first_choice


class OneBlock(Method):
    """A method that takes, of all blocks of n layers, the one whose input and output are least apart.

    With a trained replacement the block is one layer longer than `remove`, so that the net fall is what was asked
    for. Ties go to the first block. A block that ends at the last layer is judged by the raw residual stream, where
    public code takes the stream after the model's final norm.
    """

    replacements = ("none", "linear", *TRAINED)

    def check(self, recipe: Recipe, config: PreTrainedConfig) -> None:
        """Refuse what the base class refuses, and a replacement that leaves no attention."""
        super().check(recipe, config)
        check_attention_stays(recipe, self.length(recipe, config.num_hidden_layers), config.num_hidden_layers)

    def length(self, recipe: Recipe, total: int) -> int:
        """How many of `total` layers the block has."""
        return self.count(recipe, total) + (recipe.resolved_replacement in TRAINED)

    @abstractmethod
    def distances(self, scores: Scores, length: int) -> Sequence[float]:
        """How far apart input and output are of each block of `length` layers, by its first layer."""

    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """The best block of the length asked for."""
        length = self.length(recipe, inputs.layers)
        distances = self.distances(inputs.scores, length)
        first = min(range(first_choice(recipe), len(distances)), key=lambda start: (distances[start], start))
        return Plan(inputs.layers, tuple(range(first, first + length)), recipe.resolved_replacement)
