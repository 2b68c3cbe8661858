"""Method `come-p` (CoMe-P, arXiv 2510.15304): CoMe with the ratio of each merge chosen by calibration loss."""

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

# The number of steps of the grid of ratios: g in the paper.
GRID = 20


class CoMeP(CoMe):
    """Merge CoMe's pair with the ratio r in {0, 1/20, ..., 1} of lowest calibration loss.

    r is the share of the key-value heads and of the MLP neurons that the first layer gives. The pair and the channels
    are chosen as in `CoMe`. Among equal losses the lowest r wins. r = 0 and r = 1 remove one of the two layers, so no
    merge has a higher calibration loss than the removal of either layer.

    Source: CoMe-P (arXiv 2510.15304), g = 20.

    Deviation, besides those of `CoMe`: the pair goes by the angle on last tokens, as in CoMe. The authors' code for
    CoMe-P, which does not run as published, takes the angle over all tokens.
    """

    def choose(
        self, model: PreTrainedModel, scores: Scores, channels: Sequence[Channels], calibration: Windows
    ) -> Merge:
        """The merge of the closest pair with the lowest loss on `calibration`."""
        first = closest_pair(model, scores)
        heads, neurons = key_value_heads(model.config), len(channels[first]["mlp"])
        # Exact fractions, because in floating point (1 - 0.9) * 10 is less than 1 and would be rounded down to 0.
        ratios = [Fraction(step, GRID) for step in range(GRID + 1)]
        merges = [Merge(first, share_of_first(ratio, heads), share_of_first(ratio, neurons)) for ratio in ratios]
        merges = list(dict.fromkeys(merges))
        losses = candidate_losses(
            model, first, [partial(self.merged, model, merge, channels) for merge in merges], calibration
        )
        return merges[losses.index(min(losses))]
