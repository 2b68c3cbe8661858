"""LLM-Streamline (arXiv 2403.19135): replace the contiguous block that turns the residual stream least."""

from __future__ import annotations

from ..evidence import Evidence
from ..plan import TRAINED, Plan
from ..recipe import Recipe
from .base import Method


class LLMStreamline(Method):
    """Of all blocks of n layers, the one whose input and output are most alike: highest mean cos(h_j, h_{j+n}).

    With a trained replacement the block is one layer longer than `remove`, so that the net fall is what was
    asked for, as the authors count it. Ties go to the first block. A block that ends at the last layer is judged
    by the raw residual stream, not, as in the authors' code, by the stream after the model's final norm.
    """

    summary = "the block of highest input-output cosine, removed or replaced (2403.19135)"
    replacements = ("none", "linear", *TRAINED)

    def plan(self, recipe: Recipe, evidence: Evidence) -> Plan:
        """The best block of the length asked for."""
        length = self.count(recipe, evidence.layers) + (recipe.replacement in TRAINED)
        similarity = evidence.scores.block_similarity(length)
        # A linear map is folded into the layer before the block: there has to be one.
        starts = range(recipe.replacement == "linear", len(similarity))
        first = max(starts, key=lambda start: (similarity[start], -start))
        return Plan(evidence.layers, tuple(range(first, first + length)), recipe.replacement)
