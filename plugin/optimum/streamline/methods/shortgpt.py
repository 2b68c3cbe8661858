"""ShortGPT (arXiv 2403.03853): remove the layers of lowest Block Influence, all at once."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..edit import Change, Replacement, apply_plan
from ..errors import StreamlineError
from ..plan import Plan
from ..recipe import Recipe, parse_remove
from ..scores import Scores
from .checks import refuse_layers, require_remove


class ShortGPT:
    """Score every layer by its Block Influence, BI_i = 1 - E[cos(h_i, h_{i+1})], and delete the n lowest at once.

    Deviations from the authors' code, none from the paper: BI is a mean over tokens and not a sum, the last layer
    is judged by its raw output and not by its output after the model's final norm, and ties go to the first layer.
    """

    summary = "the layers of lowest Block Influence, all at once (2403.03853)"

    def check(self, recipe: Recipe, total: int) -> None:
        """Refuse explicit layers, and a replacement, which needs one contiguous block."""
        refuse_layers(recipe, "shortgpt")
        parse_remove(require_remove(recipe), total)
        if recipe.replacement != "none":
            raise StreamlineError(
                f"replacement {recipe.replacement!r}: shortgpt removes scattered layers; "
                "a replacement needs one block: use method llm-streamline, or layers such as 5-9"
            )

    def plan(self, recipe: Recipe, scores: Scores) -> Plan:
        """The `remove` layers of lowest Block Influence."""
        influence = scores.block_influence
        count = parse_remove(require_remove(recipe), scores.layers)
        lowest = sorted(range(scores.layers), key=lambda layer: (influence[layer], layer))[:count]
        return Plan(scores.layers, tuple(sorted(lowest)))

    def apply(self, model: PreTrainedModel, plan: Plan, replacement: Replacement | None) -> Change:
        """Remove the layers, in place."""
        return apply_plan(model, plan, replacement)
