"""Gromov et al. (arXiv 2403.17887): remove the contiguous block that turns the last token's stream least."""

from __future__ import annotations

from collections.abc import Sequence

from optimum.streamline.scoring.similarity import Scores

from .contiguous_block import OneBlock


class Gromov(OneBlock):
    """Of all blocks of n layers, the one of least mean angular distance d = arccos(cos(h_j, h_{j+n})) / pi.

    The distance is that of each window's last token alone, whose stream has seen the whole window. Cosines are clamped
    to [-1, 1]: in public code a cosine that rounding put beyond 1 made its block's distance NaN. For ties, replacements
    and the last block see `OneBlock`.
    """

    by_scores = True

    def distances(self, scores: Scores, length: int) -> Sequence[float]:
        """d of every block."""
        return scores.block_angle(length)
