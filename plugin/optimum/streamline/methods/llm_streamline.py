"""LLM-Streamline (arXiv 2403.19135): replace the contiguous block that turns the residual stream least."""

from __future__ import annotations

from collections.abc import Sequence

from ..scores import Scores
from .one_block import OneBlock


class LLMStreamline(OneBlock):
    """Of all blocks of n layers, the one whose input and output are most alike: highest mean cos(h_j, h_{j+n}).

    A trained replacement counts as a layer that stays, as the authors count it. For ties, replacements and the last
    block see `OneBlock`.
    """

    summary = "the block of highest input-output cosine, removed or replaced (2403.19135)"

    def distances(self, scores: Scores, length: int) -> Sequence[float]:
        """The mean cosine of every block, negated."""
        return [-cosine for cosine in scores.block_similarity(length)]
