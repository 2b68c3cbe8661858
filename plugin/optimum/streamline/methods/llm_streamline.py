"""LLM-Streamline (arXiv 2403.19135): replace the contiguous block that turns the residual stream least."""

from __future__ import annotations

from collections.abc import Sequence

from optimum.streamline.scoring.similarity import Scores

from .contiguous_block import OneBlock


class LLMStreamline(OneBlock):
    """Of all blocks of n layers, the one whose input and output are most alike: highest mean cos(h_j, h_{j+n}).

    A trained replacement counts as a layer that stays, as the authors count it. For ties, replacements and the last
    block see `OneBlock`.

    The replacement, by default a layer, is trained to put out what the block did (`heal: hidden-mse`), the paper's
    training; its authors' code recommends cross-entropy, `heal: lm`. Deviations in both: a warmup of 5% of the updates
    (theirs 1%), 4 passes (theirs 1) of 4 windows an update (theirs 128 sequences), and a peak rate of 2e-4 x 4096 /
    width, theirs at a width of 4096 (`healing.settings.default_lr`).
    """

    by_scores = True

    def distances(self, scores: Scores, length: int) -> Sequence[float]:
        """The mean cosine of every block, negated."""
        return [-cosine for cosine in scores.block_similarity(length)]
