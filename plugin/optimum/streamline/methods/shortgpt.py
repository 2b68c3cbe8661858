"""ShortGPT (arXiv 2403.03853): remove the layers of lowest Block Influence, all at once or one by one."""

from __future__ import annotations

from collections.abc import Sequence

from optimum.streamline.editing.plan import Plan
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.ablation import whole_layer, without
from optimum.streamline.scoring.similarity import measure_scores

from .base import Method, MethodInputs, first_choice


class ShortGPT(Method):
    """Score every layer by its Block Influence, BI_i = 1 - E[cos(h_i, h_{i+1})], and delete the n lowest.

    The paper deletes them at once. With `iterative` they go one by one, and before each choice but the first BI is
    measured anew on the model as it was left: n - 1 more passes over the calibration text. That is no part of the
    paper; it is general practice, and an ablation of Prune&Comp (AAAI 2026) finds it better than at once.

    Deviations from the authors' code: BI is a mean over tokens and not a sum, the last layer
    is judged by its raw output and not by its output after the model's final norm, and ties go to the first layer.
    """

    by_scores = True
    options = ("iterative",)

    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """The `remove` layers of lowest Block Influence."""
        count = self.count(recipe, inputs.layers)
        spared = first_choice(recipe)
        if recipe.pruning.iterative:
            gone = _one_by_one(inputs, count, spared)
        else:
            gone = _by_influence(range(inputs.layers), inputs.scores.block_influence, spared)[:count]
        return Plan(inputs.layers, tuple(sorted(gone)), recipe.resolved_replacement)


def _by_influence(layers: Sequence[int], influence: Sequence[float], spared: int) -> list[int]:
    # Sorting is stable: of equal ones the first stays first.
    ranked = sorted(zip(influence, layers, strict=True), key=lambda pair: pair[0])
    return [layer for _, layer in ranked if layer >= spared]


def _one_by_one(inputs: MethodInputs, count: int, spared: int) -> list[int]:
    kept, gone = list(range(inputs.layers)), list[int]()
    influence: Sequence[float] = inputs.scores.block_influence
    for step in range(count):
        if step:
            with without(inputs.model, frozenset().union(*map(whole_layer, gone))):
                measured = measure_scores(inputs.model, inputs.calibration).block_influence
            influence = [measured[layer] for layer in kept]
        lowest = _by_influence(kept, influence, spared)[0]
        kept.remove(lowest)
        gone.append(lowest)
    return gone
