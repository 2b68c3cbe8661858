"""Changing a model's layers, in place, into what a plan says.

The only file that moves layers. It chooses nothing and trains nothing: a replacement comes in built by
`build_replacement` and, between the two calls, trained by whoever wants it trained.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .anatomy import architecture_of, decoder_layers, renumber_config, set_decoder_layers, submodule
from .dead import ATTENTION, DeadAttention, dead_sublayers, mark_dead, silence_attention
from .plan import Place, Plan


@dataclass(frozen=True)
class Replacement:
    """A layer that will stand in for a block.

    Args:
        layer: A decoder layer of the host's own form, on its own (not yet part of the model).
        attention: The attention that was taken out of it, `None` where it keeps its attention.
    """

    layer: nn.Module
    attention: nn.Module | None


@dataclass(frozen=True)
class Change:
    """What was done to a model.

    Args:
        places: The new model's layers.
        dead: Sublayers that compute nothing, by new layer number.
    """

    places: tuple[Place, ...]
    dead: dict[int, list[str]]


def build_replacement(model: PreTrainedModel, plan: Plan) -> Replacement | None:
    """The replacement `plan` asks for, initialised from the block's first layer; `model` is left alone.

    `layer` is LLM-Streamline's (layer replacement, arXiv 2403.19135). `mlp` is that layer without its attention: its
    MLP, norm and residual stay, unlike the paper's bare feed-forward network.
    """
    if plan.replacement == "none":
        return None
    architecture = architecture_of(model.config)
    layer = copy.deepcopy(decoder_layers(model, architecture)[plan.gone[0]])
    if plan.replacement == "layer":
        return Replacement(layer, None)
    attention = submodule(layer, architecture.attention)
    setattr(layer, architecture.attention, DeadAttention())
    return Replacement(layer, attention)


def apply_plan(model: PreTrainedModel, plan: Plan, replacement: Replacement | None) -> Change:
    """Give `model` the layers of `plan`, in place, with every count and index in its config kept true.

    A dead attention goes back into its layer with a zero output projection, so that the model stays one that
    stock transformers computes, and is named in `config.per_layer_config`.
    """
    architecture = architecture_of(model.config)
    layers = decoder_layers(model, architecture)
    new: list[nn.Module] = []
    for place in plan.places:
        if place.kind == "kept" or replacement is None:
            new.append(layers[place.originals[0]])
            continue
        if replacement.attention is not None:
            setattr(replacement.layer, architecture.attention, replacement.attention)
            silence_attention(replacement.layer, architecture)
        new.append(replacement.layer)
    set_decoder_layers(model, architecture, new, _origins(plan))
    return Change(plan.places, _mark_replacements(model.config, plan))


def planned_config(config: PreTrainedConfig, plan: Plan) -> PreTrainedConfig:
    """The config that `apply_plan` will leave; `config` is left alone."""
    planned = copy.deepcopy(config)
    renumber_config(planned, _origins(plan))
    _mark_replacements(planned, plan)
    return planned


def _origins(plan: Plan) -> list[int]:
    return [place.originals[0] for place in plan.places]


def _mark_replacements(config: PreTrainedConfig, plan: Plan) -> dict[int, list[str]]:
    dead = dead_sublayers(config)
    for index, place in enumerate(plan.places):
        if place.kind == "mlp":
            dead[index] = [ATTENTION]
        elif place.kind == "layer":
            dead.pop(index, None)
    mark_dead(config, dead)
    return dead
