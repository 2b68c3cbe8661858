"""Method `llm-streamline` (arXiv 2403.19135): replace the block whose input and output have the highest cosine."""

from __future__ import annotations

from collections.abc import Sequence

from optimum.streamline.scoring.similarity import Scores

from .contiguous_block import ContiguousBlockMethod


class LLMStreamline(ContiguousBlockMethod):
    """Replace the block of n layers with the highest mean cosine E[cos(h_j, h_{j+n})] of its input and output.

    The mean is over all tokens. The replacement is one layer by default. It is trained to output what the block did
    (`heal: hidden-mse`), as in the paper. The authors' code recommends the next-token loss instead (`heal: lm`).

    Source: LLM-Streamline (arXiv 2403.19135).

    Deviations, besides those of `ContiguousBlockMethod`, all in the defaults of healing:

    - Warmup over 5% of the updates, not 1%.
    - 4 passes over the text, not 1, with 4 windows an update, not 128.
    - A peak learning rate of 2e-4 x 4096 / width. The authors use 2e-4 for models of width 4096
      (`healing.settings.default_lr`).
    """

    by_scores = True

    def distances(self, scores: Scores, length: int) -> Sequence[float]:
        """The negated mean cosine of every block."""
        return [-cosine for cosine in scores.block_similarity(length)]
