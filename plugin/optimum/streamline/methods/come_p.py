"""CoMe-P (arXiv 2510.15304): CoMe with each pair's ratio found by trying a grid of them."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import partial

from transformers import PreTrainedModel

from optimum.streamline.editing.merging import share_of_first
from optimum.streamline.editing.plan import Merge
from optimum.streamline.models.architectures import key_value_heads
from optimum.streamline.models.channels import Channels
from optimum.streamline.scoring.channel_sensitivity import closest_pair
from optimum.streamline.scoring.merge_search import candidate_losses
from optimum.streamline.scoring.similarity import Scores
from optimum.streamline.text.windows import Windows

from .come import CoMe

# The ratios tried are k / GRID: the paper's g.
GRID = 20


class CoMeP(CoMe):
    """Of the ratios r in {0, 1/20, .., 1} the first layer's part is the one of lowest calibration log-loss.

    The pair and the channels are `CoMe`'s, r is the first layer's part of the heads and of the neurons alike, and
    ties go to the lowest r. As r = 0 and r = 1 are removals, no choice is worse on the calibration text than
    removing either of the two. The authors' public code for it does not run; its pair goes by the angle over all
    tokens, this one's by that on last tokens, as in CoMe.
    """

    def choose(
        self, model: PreTrainedModel, scores: Scores, channels: Sequence[Channels], calibration: Windows
    ) -> Merge:
        """The pair's merge of lowest log-loss."""
        first = closest_pair(model, scores)
        heads, neurons = key_value_heads(model.config), len(channels[first]["mlp"])
        # Exact fractions: in floating point (1 - 0.9) * 10 is less than 1.
        ratios = [Fraction(step, GRID) for step in range(GRID + 1)]
        merges = [Merge(first, share_of_first(ratio, heads), share_of_first(ratio, neurons)) for ratio in ratios]
        merges = list(dict.fromkeys(merges))
        losses = candidate_losses(
            model, first, [partial(self.merged, model, merge, channels) for merge in merges], calibration
        )
        return merges[losses.index(min(losses))]
