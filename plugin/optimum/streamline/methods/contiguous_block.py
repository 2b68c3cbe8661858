"""The base class of the methods that remove or replace one contiguous block of layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from transformers import PreTrainedConfig

from optimum.streamline.editing.plan import FITTED, TRAINED, Plan
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.similarity import Scores

from .base import Method, MethodInputs, check_attention_stays, first_choice


class ContiguousBlockMethod(Method):
    """A method that removes the block of n layers with the lowest distance between its input and its output.

    With a trained replacement, the block has one layer more than `remove`, because the replacement counts as a layer.
    Among equal distances the first block wins.

    Deviation from the authors' code of all such methods: a block that ends at the last layer is scored with the raw
    output of that layer, not with its output after the final norm.
    """

    replacements = ("none", *FITTED, *TRAINED)

    def check(self, recipe: Recipe, config: PreTrainedConfig) -> None:
        """Refuse a recipe as the base class does, and a replacement that leaves no layer with attention."""
        super().check(recipe, config)
        check_attention_stays(recipe, self.length(recipe, config.num_hidden_layers), config.num_hidden_layers)

    def length(self, recipe: Recipe, total: int) -> int:
        """The number of layers in the block, for a model with `total` layers."""
        return self.count(recipe, total) + (recipe.resolved_replacement in TRAINED)

    @abstractmethod
    def distances(self, scores: Scores, length: int) -> Sequence[float]:
        """The distance of every block of `length` layers, by the number of its first layer."""

    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """Remove or replace the block of lowest distance."""
        length = self.length(recipe, inputs.layers)
        distances = self.distances(inputs.scores, length)
        first = min(range(first_choice(recipe), len(distances)), key=lambda start: (distances[start], start))
        return Plan(inputs.layers, tuple(range(first, first + length)), recipe.resolved_replacement)
