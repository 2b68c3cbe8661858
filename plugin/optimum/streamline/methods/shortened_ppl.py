"""Method `shortened-ppl` (Shortened LLaMA, arXiv 2402.02834): remove the layers with the lowest single-removal loss."""

from __future__ import annotations

from optimum.streamline.editing.plan import Plan
from optimum.streamline.models.removed_sublayers import whole_layer
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.ablation import removal_losses

from .base import MethodInputs
from .protected_ends import ProtectedEndsMethod


class ShortenedPPL(ProtectedEndsMethod):
    """Score layer i by CE(model without layer i) on the calibration text, and remove the n lowest layers at once.

    CE is the mean cross-entropy, the logarithm of the paper's perplexity, so the order is the same. Among equal scores
    the first layer wins. No layer is protected by default.

    Source: Shortened LLaMA (arXiv 2402.02834), the perplexity criterion.

    Deviation: the paper calibrates on ten windows of 128 tokens of BookCorpus; here the text is the recipe's.
    """

    default_protect = "0,0"

    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """Remove the layers whose single removal gives the lowest loss."""
        layers = self.removable(recipe, inputs.layers)
        losses = removal_losses(inputs.model, inputs.calibration, [whole_layer(layer) for layer in layers])
        lowest = sorted(zip(losses, layers, strict=True))[: self.count(recipe, inputs.layers)]
        return Plan(inputs.layers, tuple(sorted(layer for _, layer in lowest)), recipe.resolved_replacement)
