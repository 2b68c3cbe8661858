"""Method `gromov` (Gromov et al., arXiv 2403.17887): remove a block of layers by the angle at the last token."""

from __future__ import annotations

from collections.abc import Sequence

from optimum.streamline.scoring.similarity import Scores

from .contiguous_block import ContiguousBlockMethod


class Gromov(ContiguousBlockMethod):
    """Remove the block of n layers with the lowest mean angular distance d_j = arccos(cos(h_j, h_{j+n})) / pi.

    The mean is over the last token of every window, whose hidden state depends on the whole window.

    Source: Gromov et al. (arXiv 2403.17887).

    Deviation, besides those of `ContiguousBlockMethod`: cosines are clamped to [-1, 1]. In public code a cosine that is
    rounded to more than 1 makes the distance of its block NaN.
    """

    by_scores = True

    def distances(self, scores: Scores, length: int) -> Sequence[float]:
        """The mean angular distance d_j of every block."""
        return scores.block_angle(length)
