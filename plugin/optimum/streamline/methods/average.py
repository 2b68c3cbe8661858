"""Method `average`: merge neighbouring layers by averaging their weights, a baseline in CoMe's paper (2510.15304)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from optimum.streamline.editing.merging import average_layers
from optimum.streamline.editing.plan import Merge
from optimum.streamline.models.channels import Channels
from optimum.streamline.scoring.channel_sensitivity import closest_pair, ratio_of_first
from optimum.streamline.scoring.similarity import Scores
from optimum.streamline.text.windows import Windows

from .come import CoMe


class Average(CoMe):
    """Merge CoMe's pairs (i, i+1) by W = r W_i + (1 - r) W_{i+1} for all parameters, r = BI_i / (BI_i + BI_{i+1}).

    BI is the Block Influence. This is the weighted-sum baseline of CoMe's paper (arXiv 2510.15304).

    Deviation: norm gains are folded into the projections first, as in `CoMe`.
    """

    by_channel = False

    def choose(
        self, model: PreTrainedModel, scores: Scores, channels: Sequence[Channels], calibration: Windows
    ) -> Merge:
        """CoMe's next pair, with the ratio r as both shares."""
        first = closest_pair(model, scores)
        ratio = ratio_of_first(scores, first)
        return Merge(first, ratio, ratio)

    def merged(self, model: PreTrainedModel, merge: Merge, channels: Sequence[Channels]) -> nn.Module:
        """The weighted sum of the two layers."""
        return average_layers(model, merge.first, merge.attention)
