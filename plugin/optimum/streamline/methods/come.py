"""CoMe (arXiv 2510.15304): merge neighbouring layers step by step, by concatenating the channels that matter."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from optimum.streamline.editing.apply import Change, EditInputs
from optimum.streamline.editing.merging import check_mergeable, merge_layers, replace_pair, share_of_first, shared_copy
from optimum.streamline.editing.plan import Merge, Plan, merge_plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.architectures import key_value_heads, layer_kinds
from optimum.streamline.models.channels import Channels
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.channel_sensitivity import closest_pair, measure_channels, ratio_of_first
from optimum.streamline.scoring.similarity import Scores
from optimum.streamline.text.windows import Windows

from .base import Method, MethodInputs


class CoMe(Method):
    """Merge the two neighbours that turn the residual stream least together, until enough layers are gone.

    At each step everything is measured anew on the model as it then is. The pair (i, i+1) of lowest d_i, the mean
    angle between h_i and h_{i+2} on the windows' last tokens, becomes one layer of the same size
    (`merging.merge_layers`). Layer k's part of the channels is BI_k / (BI_i + BI_{i+1}) (Block Influence of the model
    as it is, `merging.share_of_first`); which channels those are,
    follows from their sensitivities (`channel_sensitivity.measure_channels`).

    Deviations from the authors' code: query heads go with the key-value head that serves them, where the code mixes
    them up under grouped-query attention; norm gains are folded into the projections first, where the code averages
    them, so that taking all channels from one layer is the same as removing the other; what all channels share is
    weighted by the channels' shares and not by the parts before rounding; BI and angle are of the raw residual
    stream, without the final norm, and cosines below 0 count as they are, where the code takes 0; only neighbours of
    one kind of attention (full or of a sliding window, rotary or not) may be a pair, where the code looks at no kind.
    """

    needs_float = "merges weights"
    replacements = ("none",)
    by_channel: ClassVar[bool] = True
    """Whether merging goes by the channels' sensitivities."""

    def check(self, recipe: Recipe, config: PreTrainedConfig) -> None:
        """Refuse a model whose layers cannot be merged, or not so many of them."""
        super().check(recipe, config)
        check_mergeable(config, recipe.resolved_method)
        possible = sum(ours == theirs for ours, theirs in pairwise(layer_kinds(config)))
        if self.count(recipe, config.num_hidden_layers) > possible:
            raise StreamlineError(
                f"remove {recipe.pruning.remove!r}: method {recipe.resolved_method} merges neighbours of one kind of "
                f"attention; that way this model can lose at most {possible}; remove fewer, or use a method "
                "that removes layers"
            )

    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """The merges, each found on the model that the ones before it leave; `evidence.model` is left alone."""
        model = shared_copy(inputs.model)
        merges: list[Merge] = []
        for _ in range(self.count(recipe, inputs.layers)):
            scores, channels = measure_channels(model, inputs.calibration)
            merge = self.choose(model, scores, channels, inputs.calibration)
            replace_pair(model, merge.first, self.merged(model, merge, channels))
            merges.append(merge)
        return merge_plan(inputs.layers, merges)

    def apply(self, model: PreTrainedModel, plan: Plan, edit_inputs: EditInputs) -> Change:
        """Make the merges one by one, the channels measured anew before each: healing in between counts."""
        for step, merge in enumerate(plan.merges, start=1):
            channels = self._channels(model, edit_inputs.calibration) if self.by_channel else ()
            replace_pair(model, merge.first, self.merged(model, merge, channels))
            if edit_inputs.after_merge is not None and step < len(plan.merges):
                edit_inputs.after_merge(merge_plan(plan.total, plan.merges[:step]).new_layers)
        return Change(plan.new_layers, {})

    def _channels(self, model: PreTrainedModel, calibration: Windows | None) -> Sequence[Channels]:
        if calibration is None:
            raise StreamlineError("plan: its merges go by channels, measured on calibration text; there is none")
        return measure_channels(model, calibration)[1]

    def choose(
        self, model: PreTrainedModel, scores: Scores, channels: Sequence[Channels], calibration: Windows
    ) -> Merge:
        """The next merge of `model` as it is."""
        first = closest_pair(model, scores)
        ratio = ratio_of_first(scores, first)
        heads, neurons = key_value_heads(model.config), len(channels[first]["mlp"])
        return Merge(first, share_of_first(ratio, heads), share_of_first(ratio, neurons))

    def merged(self, model: PreTrainedModel, merge: Merge, channels: Sequence[Channels]) -> nn.Module:
        """The layer that takes the place of the two."""
        return merge_layers(model, merge, channels)


class CoMeSp(CoMe):
    """CoMe-sp, the paper's Algorithm 3, "CoMe Single-Process Post-training": CoMe, then one distillation.

    A process is a stage of training: it runs once, after the last merge, with each layer's hidden state held to that
    of the last original layer merged into it, and the logits to the original's. The authors' public code has no
    post-training, so its hyper-parameters are this program's own.

    Deviation: the error of hidden states is relative to each token's squared norm, where the paper's, as far as it
    could be read, is plain: a few tokens of massive activation would decide that alone (`healing.goals.Distillation`).
    """


class CoMeMp(CoMe):
    """CoMe-mp, the paper's Algorithm 4, "CoMe Multi-Process Post-training": CoMe, with a distillation at each merge.

    As `CoMeSp`, and with its deviation, but a stage of training follows every merge, and the next merge is of the model
    so healed: which pair and what share are planned on the unhealed model, which channels is measured after each stage.
    Text and time are shared out evenly among the stages. The authors' public code has no post-training, so its
    hyper-parameters are this program's own.
    """

    stepwise = True
