"""Gromov et al. (arXiv 2403.17887): remove the contiguous block that turns the last token's stream least."""

from __future__ import annotations

from ..evidence import Evidence
from ..plan import TRAINED, Plan
from ..recipe import Recipe
from .base import Method


class Gromov(Method):
    """Of all blocks of n layers, the one of least mean angular distance d = arccos(cos(h_j, h_{j+n})) / pi.

    The distance is that of each window's last token alone, whose stream has seen the whole window. With a trained
    replacement the block is one layer longer than `remove`, so that the net fall is what was asked for. Ties go to
    the first block. Cosines are clamped to [-1, 1]: in public code a cosine that rounding put beyond 1 made its
    block's distance NaN. A block that ends at the last layer is judged by the raw residual stream.
    """

    summary = "the block of least angular distance on last tokens, removed or replaced (2403.17887)"
    replacements = ("none", "linear", *TRAINED)

    def plan(self, recipe: Recipe, evidence: Evidence) -> Plan:
        """The best block of the length asked for."""
        length = self.count(recipe, evidence.layers) + (recipe.replacement in TRAINED)
        angle = evidence.scores.block_angle(length)
        # A linear map is folded into the layer before the block: there has to be one.
        starts = range(recipe.replacement == "linear", len(angle))
        first = min(starts, key=lambda start: (angle[start], start))
        return Plan(evidence.layers, tuple(range(first, first + length)), recipe.replacement)
