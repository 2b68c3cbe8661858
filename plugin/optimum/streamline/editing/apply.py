"""Changing a model's layers, in place, into what a plan says.

The only file that moves layers. It chooses nothing and trains nothing: a replacement comes in built by
`build_replacement` and, between the two calls, trained by whoever wants it trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.architectures import architecture_of, decoder_layers
from optimum.streamline.models.bare_layers import BareKind, bare_layer, mark_bare, refuse_bare
from optimum.streamline.models.layer_list import renumber_config, set_decoder_layers
from optimum.streamline.models.skipped_sublayers import (
    ATTENTION,
    mark_skipped,
    replace_sublayer,
    skipped_sublayers,
    zero_output,
)
from optimum.streamline.text.windows import Windows

from .linear_map import fit_maps, fold
from .merging import copy_layer
from .plan import TRAINED, Plan, PlannedLayer


@dataclass(frozen=True)
class Replacement:
    """What will stand in for removed layers: a layer for one block of them, or a linear map for each gap.

    Args:
        layer: A layer on its own (not yet part of the model), which takes and gives what the host's decoder layers do.
        attention: The attention that was taken out of it, `None` where it keeps its attention or never had one.
        maps: `linear_map.fit_maps`: by the original number of the layer that each is folded into.
    """

    layer: nn.Module | None = None
    attention: nn.Module | None = None
    maps: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class EditInputs:
    """What an edit needs beside the plan.

    Args:
        calibration: The text that choices are made on; only merges by channels read it.
        replacement: What stands in for what goes, where there is such a thing.
        after_merge: Called with the model's places after each merge but the last.
    """

    calibration: Windows | None = None
    replacement: Replacement | None = None
    after_merge: Callable[[tuple[PlannedLayer, ...]], None] | None = None


@dataclass(frozen=True)
class Change:
    """What was done to a model.

    Args:
        new_layers: The new model's layers, first to last.
        skipped: Names of the sublayers that compute nothing, by number of the new layer.
    """

    new_layers: tuple[PlannedLayer, ...]
    skipped: dict[int, list[str]]


def build_replacement(
    model: PreTrainedModel, plan: Plan, calibration: Windows | None = None, seed: int = 0
) -> Replacement | None:
    """The replacement `plan` asks for; `model` is left alone.

    `layer` is LLM-Streamline's (layer replacement, arXiv 2403.19135), initialised from the block's first layer. `mlp`
    is that layer without its attention: its MLP, norm and residual stay, unlike in the paper's bare feed-forward
    networks, which are `ffn` and `swiglu`, with random weights (`bare_layers`). `linear` is `linear_map.fit_maps`.

    Args:
        calibration: The text that linear maps are fitted on; nothing else needs it.
        seed: Of random weights.

    Raises:
        StreamlineError: the model cannot take this replacement.
    """
    if plan.replacement == "linear":
        if calibration is None:
            raise StreamlineError("replacement 'linear': is fitted on calibration text; there is none")
        return Replacement(maps=fit_maps(model, plan, calibration))
    if plan.replacement == "ffn" or plan.replacement == "swiglu":
        return Replacement(_seeded_bare_layer(plan.replacement, model, seed))
    if plan.replacement not in TRAINED:
        return None
    architecture = architecture_of(model.config)
    layer = copy_layer(model, plan.gone[0])
    if plan.replacement == "layer":
        return Replacement(layer)
    return Replacement(layer, replace_sublayer(layer, architecture, ATTENTION)[architecture.attention])


def apply_plan(model: PreTrainedModel, plan: Plan, replacement: Replacement | None) -> Change:
    """Give `model` the layers of `plan`, in place, with every count and index in its config kept true.

    A skipped sublayer stays in, or goes back into, its layer with a zero output projection, so that the model stays
    one that stock transformers computes, and is named in `config.per_layer_config`.

    Raises:
        StreamlineError: the plan asks for a replacement and there is none.
    """
    refuse_bare(model.config)
    if plan.replacement != "none" and replacement is None:
        raise StreamlineError(f"replacement {plan.replacement!r}: there is none; give what build_replacement makes")
    architecture = architecture_of(model.config)
    layers = decoder_layers(model, architecture)
    for layer, transform in (replacement.maps if replacement else {}).items():
        fold(layers[layer], architecture, transform)
    for layer, sublayer in plan.skipped:
        zero_output(layers[layer], architecture, sublayer)
    new: list[nn.Module] = []
    for place in plan.new_layers:
        if replacement is None or replacement.layer is None or place.kind not in TRAINED:
            new.append(layers[place.originals[0]])
            continue
        if replacement.attention is not None:
            setattr(replacement.layer, architecture.attention, replacement.attention)
            zero_output(replacement.layer, architecture, ATTENTION)
        new.append(replacement.layer)
    set_decoder_layers(model, architecture, new, _origins(plan))
    mark_bare(model.config, _bare_places(plan))
    return Change(plan.new_layers, _mark_dead(model.config, plan))


def planned_config(config: PreTrainedConfig, plan: Plan) -> PreTrainedConfig:
    """The config that `apply_plan` will leave; `config` is left alone."""
    refuse_bare(config)
    planned = copy.deepcopy(config)
    renumber_config(planned, _origins(plan))
    mark_bare(planned, _bare_places(plan))
    _mark_dead(planned, plan)
    return planned


def _seeded_bare_layer(kind: BareKind, model: PreTrainedModel, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return bare_layer(kind, model.config).to(model.device)


def _bare_places(plan: Plan) -> dict[int, BareKind]:
    kinds = {index: place.kind for index, place in enumerate(plan.new_layers)}
    return {index: kind for index, kind in kinds.items() if kind == "ffn" or kind == "swiglu"}


def _origins(plan: Plan) -> list[int]:
    return [place.originals[0] for place in plan.new_layers]


def _mark_dead(config: PreTrainedConfig, plan: Plan) -> dict[int, list[str]]:
    skipped = skipped_sublayers(config)  # of the original's, those whose layers stay
    for index, place in enumerate(plan.new_layers):
        if place.kind == "mlp":
            skipped[index] = [ATTENTION]
        elif place.kind in TRAINED:
            skipped.pop(index, None)
        newly = {sublayer for layer, sublayer in plan.skipped if layer == place.originals[0]}
        if newly:
            skipped[index] = sorted({*skipped.get(index, []), *newly})
    mark_skipped(config, skipped)
    return skipped
