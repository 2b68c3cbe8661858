"""Method `sleb` (SLEB, arXiv 2402.09025): remove layers one by one, by loss."""

from __future__ import annotations

from optimum.streamline.editing.plan import Plan
from optimum.streamline.models.removed_sublayers import SublayerSet, fully_removed_layers, whole_layer
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.race import race_removals

from .base import MethodInputs, corrects
from .protected_ends import ProtectedEndsMethod


class SLEB(ProtectedEndsMethod):
    """At each step, remove the layer i whose removal gives the lowest calibration loss, argmin_i CE(model - R - i).

    R is the set of layers removed in earlier steps. The losses of a step are compared in a race (`scoring.race`), which
    may choose another of nearly equal losses. Among equal losses the first layer wins. The first and the last layer are
    protected by default.

    With replacement `corrected`, CE is the loss after a correction of the first MLP after each gap, which is cheap
    (`editing.candidate_corrections.fit_candidates`), on each half of the text with those fitted on the other half. The
    plan itself gets all corrections (`editing.correction.fit_corrections`).

    Source: SLEB (arXiv 2402.09025), the greedy search.
    """

    default_protect = "1,1"

    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """Remove layers greedily."""
        removed: SublayerSet = frozenset()
        for _ in range(self.count(recipe, inputs.layers)):
            earlier = fully_removed_layers(removed)
            candidates = [layer for layer in self.removable(recipe, inputs.layers) if layer not in earlier]
            whole = [whole_layer(layer) for layer in candidates]
            removed |= whole[race_removals(inputs.model, inputs.calibration, whole, removed, corrects(recipe)).best]
        return Plan(inputs.layers, fully_removed_layers(removed), recipe.resolved_replacement)
