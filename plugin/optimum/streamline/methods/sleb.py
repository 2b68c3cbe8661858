"""Method `sleb` (SLEB, arXiv 2402.09025): remove layers one by one, by loss."""

from __future__ import annotations

from optimum.streamline.editing.plan import Plan
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.ablation import SublayerSet, fully_removed_layers, removal_losses, whole_layer

from .base import MethodInputs
from .protected_ends import ProtectedEndsMethod


class SLEB(ProtectedEndsMethod):
    """At each step, remove the layer i whose removal gives the lowest calibration loss, argmin_i CE(model - R - i).

    R is the set of layers removed in earlier steps. Among equal losses the first layer wins. The first and the last
    layer are protected by default.

    Source: SLEB (arXiv 2402.09025), the greedy search.
    """

    default_protect = "1,1"

    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """Remove layers greedily."""
        removed: SublayerSet = frozenset()
        for _ in range(self.count(recipe, inputs.layers)):
            earlier = fully_removed_layers(removed)
            candidates = [layer for layer in self.removable(recipe, inputs.layers) if layer not in earlier]
            losses = removal_losses(inputs.model, inputs.calibration, [whole_layer(i) for i in candidates], removed)
            removed |= whole_layer(candidates[losses.index(min(losses))])
        return Plan(inputs.layers, fully_removed_layers(removed), recipe.resolved_replacement)
