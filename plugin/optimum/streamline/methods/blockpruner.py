"""Method `blockpruner` (BlockPruner, arXiv 2406.10594): remove attentions and MLPs one by one, by loss."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from optimum.streamline.editing.plan import Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.architectures import Sublayer, architecture_of, decoder_layers, submodule
from optimum.streamline.models.skipped_sublayers import ATTENTION, MLP, skipped_layers
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.ablation import SublayerSet, fully_removed_layers, removal_losses

from .base import Method, MethodInputs


class BlockPruner(Method):
    """At each step, remove the sublayer s whose removal gives the lowest calibration loss, argmin_s CE(model - R - s).

    R is the set of sublayers removed in earlier steps. A sublayer is the attention or the MLP of a layer, and a removed
    sublayer adds nothing to the residual stream. Among equal losses the first layer wins, and its attention before its
    MLP. A layer that has lost both sublayers is deleted.

    Source: BlockPruner (arXiv 2406.10594), the greedy search over both kinds of sublayer.

    Deviations from the authors' code:

    - It stops when the removed sublayers have as many weights as `remove` layers of average size, not after a number of
      sublayers: attentions and MLPs differ in size. Norms do not count.
    - The last attention of the model stays, because the cache needs one.
    """

    needs_float = "zeroes attentions and MLPs"
    replacements = ("none",)

    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """Remove sublayers greedily until their weights amount to `remove` layers.

        Raises:
            StreamlineError: the last attention would have to go.
        """
        sizes, skipped = sublayer_sizes(inputs.model)
        target = self.count(recipe, inputs.layers) * sum(sizes.values()) / inputs.layers
        removed = skipped
        while sum(sizes[sublayer] for sublayer in removed - skipped) < target:
            candidates = _candidates(sizes, removed)
            if not candidates:
                raise StreamlineError(f"remove {recipe.pruning.remove!r}: the last attention must stay; remove fewer")
            single = [frozenset({sublayer}) for sublayer in candidates]
            losses = removal_losses(inputs.model, inputs.calibration, single, removed)
            removed |= {candidates[losses.index(min(losses))]}
        layers = fully_removed_layers(removed)
        newly_skipped = sorted(sublayer for sublayer in removed - skipped if sublayer[0] not in layers)
        return Plan(inputs.layers, layers, skipped=tuple(newly_skipped))


def sublayer_sizes(model: PreTrainedModel) -> tuple[dict[tuple[int, Sublayer], int], SublayerSet]:
    """The number of weights of every sublayer, and the sublayers that the model skips already.

    Args:
        model: The model.

    Returns:
        The number of weights by (layer, sublayer), 0 for a skipped one; and the set of skipped sublayers.
    """
    architecture = architecture_of(model.config)
    skipped: SublayerSet = frozenset(
        (layer, kind) for kind in (ATTENTION, MLP) for layer in skipped_layers(model.config, kind)
    )
    sizes: dict[tuple[int, Sublayer], int] = {}
    for index, layer in enumerate(decoder_layers(model, architecture)):
        sizes[index, ATTENTION] = _weights(layer, (architecture.attention,))
        sizes[index, MLP] = _weights(layer, architecture.mlp)
    return {sublayer: 0 if sublayer in skipped else size for sublayer, size in sizes.items()}, skipped


def _weights(layer: nn.Module, names: tuple[str, ...]) -> int:
    return sum(parameter.numel() for name in names for parameter in submodule(layer, name).parameters())


def _candidates(sizes: dict[tuple[int, Sublayer], int], removed: SublayerSet) -> list[tuple[int, Sublayer]]:
    remaining = sorted(sublayer for sublayer in sizes if sublayer not in removed)
    attentions = sum(kind == ATTENTION for _, kind in remaining)
    return [(layer, kind) for layer, kind in remaining if attentions > 1 or kind != ATTENTION]
