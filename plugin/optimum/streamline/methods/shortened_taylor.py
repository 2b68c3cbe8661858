"""Method `shortened-taylor` (Shortened LLaMA, arXiv 2402.02834): remove the layers of lowest Taylor importance."""

from __future__ import annotations

from transformers import PreTrainedConfig

from optimum.streamline.editing.plan import Plan
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.taylor import taylor_importance

from .base import MethodInputs
from .protected_ends import ProtectedEndsMethod


class ShortenedTaylor(ProtectedEndsMethod):
    """Score layer i by the sum of |w dL/dw| over its weights w, and remove the n lowest layers at once.

    L is the mean cross-entropy over all calibration tokens. Its gradient is summed over the windows before the absolute
    value is taken. The weights are all matrices, those of experts too, and the gains of norms, as in the authors' code.
    Biases, which LLaMA does not have, do not count. The first four and the last two layers are protected by default,
    which is the paper's "+" variant. Among equal scores the first layer wins.

    Source: Shortened LLaMA (arXiv 2402.02834), the Taylor criterion.

    Deviation: the paper calibrates on ten windows of 128 tokens of BookCorpus; here the text is the recipe's.
    """

    needs_float = "takes gradients"
    default_protect = "4,2"

    def needs_memory(self, recipe: Recipe, config: PreTrainedConfig) -> str:
        """Nothing: the gradient goes back one layer at a time."""
        return ""

    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """Remove the layers of lowest Taylor importance."""
        importance = taylor_importance(inputs.model, inputs.calibration)
        layers = self.removable(recipe, inputs.layers)
        lowest = sorted(layers, key=lambda layer: (importance[layer], layer))[: self.count(recipe, inputs.layers)]
        return Plan(inputs.layers, tuple(sorted(lowest)), recipe.resolved_replacement)
