"""Method `blockpruner` (BlockPruner, arXiv 2406.10594): remove attentions and MLPs one by one, by loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from optimum.streamline.editing.packing import layer_count, new_zeros, sublayers_left
from optimum.streamline.editing.plan import Plan, packed_plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.architectures import Sublayer, architecture_of, can_pack, decoder_layers, submodule
from optimum.streamline.models.removed_sublayers import SublayerKey, SublayerSet, fully_removed_layers
from optimum.streamline.models.skipped_sublayers import ATTENTION, MLP, skipped_of
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.race import race_removals

from .base import Method, MethodInputs, corrects

MAX_UNPAIRED = 1
"""The most layers that a step may leave without their attention or their MLP, if the plan packs.

With more, the cheapest attentions and MLPs go first, wherever they are, and the last steps can only remove what the
model cannot do without (measured: `docs/search.md`).
"""


class BlockPruner(Method):
    """At each step, remove the sublayer s whose removal gives the lowest calibration loss, argmin_s CE(model - R - s).

    R is the set of sublayers removed in earlier steps. A sublayer is the attention or the MLP of a layer, and a removed
    sublayer adds nothing to the residual stream. Among equal losses the first layer wins, and its attention before its
    MLP. A layer that has lost both sublayers is deleted.

    With replacement `corrected`, CE is the loss after a correction of the first MLP after each gap, which is cheap
    (`editing.candidate_corrections.fit_candidates`), on each half of the text with those fitted on the other half. The
    plan itself gets all corrections (`editing.correction.fit_corrections`).

    Source: BlockPruner (arXiv 2406.10594), the greedy search over both kinds of sublayer.

    Deviations from the authors' code:

    - The losses of a step are compared in a race (`scoring.race`), which may choose another of nearly equal losses.
    - It stops when the removed sublayers have as many weights as `remove` layers of average size, not after a number of
      sublayers: attentions and MLPs differ in size. Norms do not count.
    - The last attention of the model stays, because the cache needs one.
    - With the option `packed`, the search ends when the sublayers that are left make `remove` fewer layers
      (`editing.packing`) and leave no new zeros. A step may leave at most `MAX_UNPAIRED` layers that lack their
      attention or their MLP, and later steps complete these. Models that cannot be packed (`can_pack`) are refused
      with it, because what is left of them would keep zeros.
    """

    needs_float = "zeroes attentions and MLPs"
    replacements = ("none", "corrected")
    options = ("packed",)

    def check(self, recipe: Recipe, config: PreTrainedConfig) -> None:
        """Also refuse to pack what cannot be packed: zeros must not be left unless they are asked for."""
        super().check(recipe, config)
        if recipe.pruning.packed and not can_pack(config):
            raise StreamlineError(
                f"method {recipe.resolved_method!r}: an attention and an MLP of two layers of {config.model_type} make "
                "no layer, so it would leave zeroed sublayers; give packed false (--no-packed) to have them, or use "
                "shifted or sleb, which remove whole layers"
            )

    def may_pack(self, recipe: Recipe, config: PreTrainedConfig) -> bool:
        """Whether it packs."""
        return recipe.pruning.packed and can_pack(config)

    def quantized_refusal(self, recipe: Recipe, config: PreTrainedConfig) -> str:
        """It zeroes nothing if it packs."""
        return "" if self.may_pack(recipe, config) else self.needs_float

    def needs_memory(self, recipe: Recipe, config: PreTrainedConfig) -> str:
        """Nothing: what it zeroes is read for that, and written to disk."""
        return ""

    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """Remove sublayers greedily: until there are `remove` fewer layers, or as many weights if they are not packed.

        Raises:
            StreamlineError: the last attention would have to go.
        """
        if recipe.pruning.packed:
            return self._packed_plan(recipe, inputs)
        sizes, skipped = sublayer_sizes(inputs.model)
        target = self.count(recipe, inputs.layers) * sum(sizes.values()) / inputs.layers
        removed = skipped
        while sum(sizes[sublayer] for sublayer in removed - skipped) < target:
            removed |= _best_of(recipe, inputs, removed, sublayers_left(inputs.layers, removed))
        layers = fully_removed_layers(removed)
        newly_skipped = sorted(sublayer for sublayer in removed - skipped if sublayer[0] not in layers)
        return Plan(inputs.layers, layers, recipe.resolved_replacement, tuple(newly_skipped))

    def _packed_plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        earlier = skipped_of(inputs.model.config)
        removed = earlier
        target = inputs.layers - self.count(recipe, inputs.layers)
        while True:
            row = sublayers_left(inputs.layers, removed)
            if layer_count(row) <= target and not new_zeros(row, earlier):
                return packed_plan(inputs.layers, removed, earlier, recipe.resolved_replacement)
            removed |= _best_of(recipe, inputs, removed, _completable(row, target, earlier))


def _completable(row: Sequence[SublayerKey], target: int, earlier: SublayerSet) -> list[SublayerKey]:
    """The sublayers after whose removal later steps can still leave exactly `target` layers and no new zeros."""
    found = []
    for sublayer in row:
        left = [each for each in row if each != sublayer]
        zeros = new_zeros(left, earlier)  # each of these layers goes when the sublayer that it still has is removed
        if zeros <= MAX_UNPAIRED and layer_count(left) - zeros >= target:
            found.append(sublayer)
    return found


def _best_of(
    recipe: Recipe, inputs: MethodInputs, removed: SublayerSet, candidates: Sequence[SublayerKey]
) -> SublayerSet:
    """The candidate of lowest loss, none of which is the last attention."""
    attentions = [sublayer for sublayer in sublayers_left(inputs.layers, removed) if sublayer[1] == ATTENTION]
    single = [frozenset({sublayer}) for sublayer in candidates if [sublayer] != attentions]
    if not single:
        raise StreamlineError(
            f"remove {recipe.pruning.remove!r}: no further attention or MLP can go, and the last attention must stay; "
            "remove fewer"
        )
    return single[race_removals(inputs.model, inputs.calibration, single, removed, corrects(recipe)).best]


def sublayer_sizes(model: PreTrainedModel) -> tuple[dict[tuple[int, Sublayer], int], SublayerSet]:
    """The number of weights of every sublayer, and the sublayers that the model skips already.

    Args:
        model: The model.

    Returns:
        The number of weights by (layer, sublayer), 0 for a skipped one; and the set of skipped sublayers.
    """
    architecture = architecture_of(model.config)
    skipped = skipped_of(model.config)
    sizes: dict[tuple[int, Sublayer], int] = {}
    for index, layer in enumerate(decoder_layers(model, architecture)):
        sizes[index, ATTENTION] = _weights(layer, (architecture.attention,))
        sizes[index, MLP] = _weights(layer, architecture.mlp)
    return {sublayer: 0 if sublayer in skipped else size for sublayer, size in sizes.items()}, skipped


def _weights(layer: nn.Module, names: tuple[str, ...]) -> int:
    return sum(parameter.numel() for name in names for parameter in submodule(layer, name).parameters())
