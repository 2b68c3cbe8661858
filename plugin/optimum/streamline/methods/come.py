"""Methods `come`, `come-sp` and `come-mp` (CoMe, arXiv 2510.15304): merge neighbouring layers by their channels."""

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
    """At each step, merge the pair of neighbours (i, i+1) that rotates the residual stream least.

    The pair has the lowest d_i = E[arccos(cos(h_i, h_{i+2})) / pi] on the last tokens of the windows. It becomes one
    layer of the same size. Layer i gives the share r = BI_i / (BI_i + BI_{i+1}) of the key-value heads and of the MLP
    neurons, and layer i+1 gives the rest. BI is the Block Influence. Each layer gives its most sensitive channels
    (`scoring.channel_sensitivity.measure_channels`, `editing.merging.merge_layers`). All scores are measured again
    after every merge.

    Source: CoMe (arXiv 2510.15304), concatenation-based merging.

    Deviations from the authors' code:

    - Query heads stay with their key-value head. The code assigns them wrongly under grouped-query attention.
    - Norm gains are folded into the projections first, so that r = 0 and r = 1 equal the removal of a layer. The code
      averages the gains.
    - Parameters that belong to no channel are averaged with the shares after rounding, not with r.
    - BI and angle use the raw output of the last layer, not its output after the final norm.
    - Cosines below 0 keep their value. The code sets them to 0.
    - Both layers of a pair have the same kind of attention (full or sliding-window, rotary or not). The code ignores
      it.
    """

    needs_float = "merges weights"
    replacements = ("none",)
    by_channel: ClassVar[bool] = True
    """Whether `merged` uses channel sensitivities, so that `apply` measures them before each merge."""

    def needs_memory(self, recipe: Recipe, config: PreTrainedConfig) -> str:
        """Nothing: the layers of a pair are read to be merged, and the new layer is written to disk."""
        return ""

    def check(self, recipe: Recipe, config: PreTrainedConfig) -> None:
        """Refuse a recipe as the base class does, and a model that does not allow so many merges."""
        super().check(recipe, config)
        check_mergeable(config, recipe.resolved_method)
        possible = sum(kind == next_kind for kind, next_kind in pairwise(layer_kinds(config)))
        if self.count(recipe, config.num_hidden_layers) > possible:
            raise StreamlineError(
                f"remove {recipe.pruning.remove!r}: method {recipe.resolved_method} merges neighbours with the same "
                f"kind of attention, and so can lose at most {possible} layers of this model; remove fewer, or use a "
                "method that removes layers"
            )

    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """Plan the merges, each on the model after all earlier ones; `inputs.model` is unchanged."""
        model = shared_copy(inputs.model)
        merges: list[Merge] = []
        for _ in range(self.count(recipe, inputs.layers)):
            scores, channels = measure_channels(model, inputs.calibration)
            merge = self.choose(model, scores, channels, inputs.calibration)
            replace_pair(model, merge.first, self.merged(model, merge, channels))
            merges.append(merge)
        return merge_plan(inputs.layers, merges)

    def apply(self, model: PreTrainedModel, plan: Plan, edit_inputs: EditInputs) -> Change:
        """Make the merges in order. Channels are measured again before each merge, because healing may come between."""
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
        """The next merge: the closest pair, with shares from its merging ratio.

        Args:
            model: The model after all earlier merges.
            scores: The scores of `model`.
            channels: The channel sensitivities of every layer of `model`.
            calibration: The calibration text, for methods that search by loss.
        """
        first = closest_pair(model, scores)
        ratio = ratio_of_first(scores, first)
        heads, neurons = key_value_heads(model.config), len(channels[first]["mlp"])
        return Merge(first, share_of_first(ratio, heads), share_of_first(ratio, neurons))

    def merged(self, model: PreTrainedModel, merge: Merge, channels: Sequence[Channels]) -> nn.Module:
        """The layer that replaces the pair of `merge`; `model` is unchanged."""
        return merge_layers(model, merge, channels)


class CoMeSp(CoMe):
    """CoMe, then one distillation after the last merge.

    The output of each new layer learns to match the output of the last original layer merged into it, and the logits
    learn to match the original's (`healing.losses.Distillation`).

    Source: CoMe (arXiv 2510.15304), Algorithm 3, "CoMe Single-Process Post-training". A process is a stage of training.

    Deviations, besides those of `CoMe`:

    - The authors' code has no post-training. The hyper-parameters are this program's own.
    - The squared error of a hidden state is divided by the squared norm of its target. The paper seems to use the plain
      error, which a few tokens with massive activations would dominate.
    """


class CoMeMp(CoMe):
    """CoMe with a distillation, as in `CoMeSp`, after every merge.

    Each stage trains on an equal part of the text, and for an equal part of the time limit.

    Source: CoMe (arXiv 2510.15304), Algorithm 4, "CoMe Multi-Process Post-training".

    Deviations, besides those of `CoMeSp`: pairs and shares are planned on the unhealed model before the first merge.
    Channel sensitivities are measured on the healed model, before each merge.
    """

    stepwise = True
