"""The base class of the methods that never remove some of the first and the last layers."""

from __future__ import annotations

from typing import ClassVar

from transformers import PreTrainedConfig

from optimum.streamline.errors import StreamlineError
from optimum.streamline.recipe.recipe import Recipe

from .base import Method, first_choice


class ProtectedEndsMethod(Method):
    """A method with the option `protect`, such as "4,2": the first 4 and the last 2 layers always stay."""

    options = ("protect",)
    default_protect: ClassVar[str]
    """The value of `protect` where the recipe gives none, from the method's paper."""

    def check(self, recipe: Recipe, config: PreTrainedConfig) -> None:
        """Refuse a recipe as the base class does, and a `protect` that leaves too few layers to remove."""
        super().check(recipe, config)
        total = config.num_hidden_layers
        count, free = self.count(recipe, total), len(self.removable(recipe, total))
        if free < count:
            raise StreamlineError(
                f"protect {self.protect(recipe)!r}: leaves {free} of {total} layers to choose from, but {count} must "
                "go; protect or remove fewer"
            )

    def protect(self, recipe: Recipe) -> str:
        """The recipe's `protect`, or the default of the method."""
        return recipe.pruning.protect or self.default_protect

    def removable(self, recipe: Recipe, total: int) -> range:
        """The layers that the method may remove, of `total`."""
        first, last = (int(number) for number in self.protect(recipe).split(","))
        return range(max(first, first_choice(recipe)), total - last)
