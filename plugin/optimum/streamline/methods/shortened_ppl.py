"""Shortened LLaMA by perplexity (arXiv 2402.02834): remove the layers that are missed least one by one, all at once."""

from __future__ import annotations

from optimum.streamline.editing.plan import Plan
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.ablation import removal_losses, whole_layer

from .base import MethodInputs
from .protected_ends import Protecting


class ShortenedPPL(Protecting):
    """Importance of layer i is CE(model without layer i), the log of the paper's perplexity; the n lowest go at once.

    No layer is protected unless `protect` says so, and ties go to the first layer. The paper's calibration text is ten
    windows of 128 tokens of BookCorpus.
    """

    default_protect = "0,0"

    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """The `remove` layers of lowest loss when each is out alone."""
        layers = self.removable(recipe, inputs.layers)
        losses = removal_losses(inputs.model, inputs.calibration, [whole_layer(layer) for layer in layers])
        lowest = sorted(zip(losses, layers, strict=True))[: self.count(recipe, inputs.layers)]
        return Plan(inputs.layers, tuple(sorted(layer for _, layer in lowest)), recipe.resolved_replacement)
