"""Shortened LLaMA by Taylor expansion (arXiv 2402.02834): remove the layers whose weights the loss leans on least."""

from __future__ import annotations

from optimum.streamline.editing.plan import Plan
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.taylor import taylor_importance

from .base import MethodInputs
from .protected_ends import Protecting


class ShortenedTaylor(Protecting):
    """Importance of layer i is the sum of |w dL/dw| over the entries w of its weights; the n lowest go at once.

    L is the mean cross-entropy over all calibration tokens, and one gradient of it is taken: |.| stands outside of
    the sum over windows. The first four and the last two layers are protected, the paper's "+", unless `protect` says
    otherwise; ties go to the first layer. Weights are the matrices, all experts' among them, and the norms' gains, as
    in the authors' code; biases, which LLaMA has none of, do not count. The paper's calibration text is ten windows of
    128 tokens of BookCorpus.
    """

    needs_float = "takes gradients"
    default_protect = "4,2"

    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """The `remove` layers of lowest Taylor importance."""
        importance = taylor_importance(inputs.model, inputs.calibration)
        layers = self.removable(recipe, inputs.layers)
        lowest = sorted(layers, key=lambda layer: (importance[layer], layer))[: self.count(recipe, inputs.layers)]
        return Plan(inputs.layers, tuple(sorted(lowest)), recipe.resolved_replacement)
