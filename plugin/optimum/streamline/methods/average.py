"""The weighted sum of neighbouring layers: what CoMe (arXiv 2510.15304) compares itself with."""

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
    """The weighted sum that CoMe's paper compares itself with: CoMe's pairs, all parameters of the two summed.

    The weights are BI_i / (BI_i + BI_{i+1}) and the rest; norm gains are folded into the projections first.
    """

    by_channel = False

    def choose(
        self, model: PreTrainedModel, scores: Scores, channels: Sequence[Channels], calibration: Windows
    ) -> Merge:
        """The next pair, and the first one's weight as both shares."""
        first = closest_pair(model, scores)
        ratio = ratio_of_first(scores, first)
        return Merge(first, ratio, ratio)

    def merged(self, model: PreTrainedModel, merge: Merge, channels: Sequence[Channels]) -> nn.Module:
        """The weighted sum of the two."""
        return average_layers(model, merge.first, merge.attention)
