"""SLEB (arXiv 2402.09025): remove one layer after the other, each time the one that is missed least."""

from __future__ import annotations

from optimum.streamline.editing.plan import Plan
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.ablation import Parts, gone_layers, removal_losses, whole_layer

from .base import MethodInputs
from .protected_ends import Protecting


class SLEB(Protecting):
    """Greedy by calibration loss: at each step the layer without which, the removed ones out too, it is lowest.

    Step k removes argmin_i CE(model without R and layer i), with R the layers of the steps before. The first and the
    last layer are protected unless `protect` says otherwise, and ties go to the first layer.
    """

    default_protect = "1,1"

    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """The `remove` layers that greedy steps take."""
        removed: Parts = frozenset()
        for _ in range(self.count(recipe, inputs.layers)):
            gone = gone_layers(removed)
            left = [layer for layer in self.removable(recipe, inputs.layers) if layer not in gone]
            losses = removal_losses(inputs.model, inputs.calibration, [whole_layer(i) for i in left], removed)
            removed |= whole_layer(left[losses.index(min(losses))])
        return Plan(inputs.layers, gone_layers(removed), recipe.resolved_replacement)
