"""LLM-Streamline (arXiv 2403.19135): replace the contiguous block that turns the residual stream least."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..edit import Change, Replacement, apply_plan
from ..plan import Plan
from ..recipe import Recipe, parse_remove
from ..scores import Scores
from .checks import refuse_layers, require_remove


class LLMStreamline:
    """Of all blocks of n layers, the one whose input and output are most alike: highest mean cos(h_j, h_{j+n}).

    With a replacement the block is one layer longer than `remove`, so that the net fall is what was
    asked for, as the authors count it. Ties go to the first block. A block that ends at the last layer is judged
    by the raw residual stream, not, as in the authors' code, by the stream after the model's final norm.
    """

    summary = "the block of highest input-output cosine, removed or replaced (2403.19135)"

    def check(self, recipe: Recipe, total: int) -> None:
        """Refuse explicit layers and an impossible count."""
        refuse_layers(recipe, "llm-streamline")
        parse_remove(require_remove(recipe), total)

    def plan(self, recipe: Recipe, scores: Scores) -> Plan:
        """The best block of the length asked for."""
        length = parse_remove(require_remove(recipe), scores.layers) + (recipe.replacement != "none")
        similarity = scores.block_similarity(length)
        first = max(range(len(similarity)), key=lambda start: (similarity[start], -start))
        return Plan(scores.layers, tuple(range(first, first + length)), recipe.replacement)

    def apply(self, model: PreTrainedModel, plan: Plan, replacement: Replacement | None) -> Change:
        """Remove or replace the block, in place."""
        return apply_plan(model, plan, replacement)
