"""BlockPruner (arXiv 2406.10594): remove attentions and MLPs one after the other, each time the one missed least."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from optimum.streamline.editing.plan import Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.architectures import Sublayer, architecture_of, decoder_layers, submodule
from optimum.streamline.models.skipped_sublayers import ATTENTION, MLP, skipped_layers
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.ablation import Parts, gone_layers, removal_losses

from .base import Method, MethodInputs


class BlockPruner(Method):
    """Greedy by calibration loss over sublayers, each of which leaves the residual stream as it is when it is out.

    Step k removes argmin_s CE(model without R and sublayer s), with R the sublayers of the steps before; ties go to
    the first layer, and there to the attention. It stops once the weights removed are at least `remove` times those
    of the mean layer's sublayers: attentions and MLPs are of different size, so a count of them says nothing. The norms
    around sublayers do not count. A layer that has lost both goes entirely; the last attention stays, for the cache.
    """

    needs_float = "zeroes attentions and MLPs"
    replacements = ("none",)

    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """The sublayers that greedy steps take, until they amount to `remove` layers."""
        sizes, skipped = sublayer_sizes(inputs.model)
        target = self.count(recipe, inputs.layers) * sum(sizes.values()) / inputs.layers
        removed = skipped
        while sum(sizes[part] for part in removed - skipped) < target:
            left = _candidates(sizes, removed)
            if not left:
                raise StreamlineError(f"remove {recipe.pruning.remove!r}: the last attention has to stay; remove fewer")
            losses = removal_losses(inputs.model, inputs.calibration, [frozenset({part}) for part in left], removed)
            removed |= {left[losses.index(min(losses))]}
        gone = gone_layers(removed)
        return Plan(
            inputs.layers, gone, skipped=tuple(sorted(part for part in removed - skipped if part[0] not in gone))
        )


def sublayer_sizes(model: PreTrainedModel) -> tuple[dict[tuple[int, Sublayer], int], Parts]:
    """The weights of every sublayer, 0 for one that is dead already, and which those are."""
    architecture = architecture_of(model.config)
    skipped: Parts = frozenset(
        (layer, kind) for kind in (ATTENTION, MLP) for layer in skipped_layers(model.config, kind)
    )
    sizes: dict[tuple[int, Sublayer], int] = {}
    for index, layer in enumerate(decoder_layers(model, architecture)):
        sizes[index, ATTENTION] = _weights(layer, (architecture.attention,))
        sizes[index, MLP] = _weights(layer, architecture.mlp)
    return {part: 0 if part in skipped else size for part, size in sizes.items()}, skipped


def _weights(layer: nn.Module, names: tuple[str, ...]) -> int:
    return sum(parameter.numel() for name in names for parameter in submodule(layer, name).parameters())


def _candidates(sizes: dict[tuple[int, Sublayer], int], removed: Parts) -> list[tuple[int, Sublayer]]:
    left = sorted(part for part in sizes if part not in removed)
    attentions = sum(sublayer == ATTENTION for _, sublayer in left)
    return [part for part in left if attentions > 1 or part[1] != ATTENTION]
