"""What the methods share that never remove some of the first and of the last layers."""

from __future__ import annotations

from typing import ClassVar

from transformers import PreTrainedConfig

from optimum.streamline.errors import StreamlineError
from optimum.streamline.recipe.recipe import Recipe

from .base import Method, first_choice


class Protecting(Method):
    """A method with `protect`: how many of the first and of the last layers stay whatever they score."""

    options = ("protect",)
    default_protect: ClassVar[str]
    """What the method's paper protects."""

    def check(self, recipe: Recipe, config: PreTrainedConfig) -> None:
        """Refuse also a protection that leaves fewer layers than are to go."""
        super().check(recipe, config)
        total = config.num_hidden_layers
        count, free = self.count(recipe, total), len(self.removable(recipe, total))
        if free < count:
            raise StreamlineError(
                f"protect {self.protect(recipe)!r}: leaves {free} of {total} layers to choose from, {count} are to go; "
                "protect or remove fewer"
            )

    def protect(self, recipe: Recipe) -> str:
        """The recipe's `protect`, or the method's own."""
        return recipe.pruning.protect or self.default_protect

    def removable(self, recipe: Recipe, total: int) -> range:
        """The layers that may go."""
        first, last = (int(number) for number in self.protect(recipe).split(","))
        return range(max(first, first_choice(recipe)), total - last)
