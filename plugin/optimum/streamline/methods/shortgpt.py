"""Method `shortgpt` (ShortGPT, arXiv 2403.03853): remove the layers of lowest Block Influence."""

from __future__ import annotations

from collections.abc import Sequence

from optimum.streamline.editing.plan import Plan
from optimum.streamline.models.removed_sublayers import whole_layer, without
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.similarity import measure_scores

from .base import Method, MethodInputs, first_choice


class ShortGPT(Method):
    """Remove the n layers of lowest Block Influence BI_i = 1 - E[cos(h_i, h_{i+1})], where E is the mean over tokens.

    All n layers are removed at once. With the option `iterative`, they are removed one by one, and BI is measured again
    after each removal, in n - 1 more passes over the calibration text.

    Source: ShortGPT (arXiv 2403.03853). `iterative` is not in the paper. An ablation in Prune&Comp (AAAI 2026) finds
    iterative removal better.

    Deviations from the authors' code:

    - BI is a mean over tokens, not a sum. The order is the same.
    - The last layer is scored with its raw output, not with its output after the final norm.
    - Among equal scores the first layer wins.
    """

    by_scores = True
    options = ("iterative",)

    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """Remove the layers of lowest Block Influence."""
        count = self.count(recipe, inputs.layers)
        first = first_choice(recipe)
        if recipe.pruning.iterative:
            removed = _one_by_one(inputs, count, first)
        else:
            removed = _by_influence(range(inputs.layers), inputs.scores.block_influence, first)[:count]
        return Plan(inputs.layers, tuple(sorted(removed)), recipe.resolved_replacement)


def _by_influence(layers: Sequence[int], influence: Sequence[float], first: int) -> list[int]:
    """`layers` by rising influence, without the layers before number `first`."""
    # Sorting is stable: among equal values the first layer stays first.
    ranked = sorted(zip(influence, layers, strict=True), key=lambda pair: pair[0])
    return [layer for _, layer in ranked if layer >= first]


def _one_by_one(inputs: MethodInputs, count: int, first: int) -> list[int]:
    kept, removed = list(range(inputs.layers)), list[int]()
    influence: Sequence[float] = inputs.scores.block_influence
    for step in range(count):
        if step:
            with without(inputs.model, frozenset().union(*map(whole_layer, removed))):
                measured = measure_scores(inputs.model, inputs.calibration).block_influence
            influence = [measured[layer] for layer in kept]
        lowest = _by_influence(kept, influence, first)[0]
        kept.remove(lowest)
        removed.append(lowest)
    return removed
