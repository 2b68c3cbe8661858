"""Applying a plan: building the replacement it asks for, and changing the model's layers in place.

`build_replacement` makes the replacement, the caller trains it if need be (`healing/`), and `apply_plan` puts it in.
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
    """The replacement of removed layers: one layer for a block of them, or a linear map for each run of them.

    Args:
        layer: A layer that is not yet part of the model. It takes and returns the same as the model's decoder
            layers.
        attention: For replacement `mlp`: the attention module that was dropped from `layer`. Otherwise `None`.
        maps: For replacement `linear`: the result of `linear_map.fit_maps`.
    """

    layer: nn.Module | None = None
    attention: nn.Module | None = None
    maps: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class EditInputs:
    """The inputs of an edit, beside the model and the plan.

    Args:
        calibration: The calibration text, on which CoMe measures channel sensitivities.
        replacement: The replacement that the plan asks for; `None` if it asks for none.
        after_merge: A function to call after every merge but the last, with the layers that the model then has.
    """

    calibration: Windows | None = None
    replacement: Replacement | None = None
    after_merge: Callable[[tuple[PlannedLayer, ...]], None] | None = None


@dataclass(frozen=True)
class Change:
    """The result of an edit.

    Args:
        new_layers: The layers of the new model, in order.
        skipped: Skipped sublayers, by number of the new layer.
    """

    new_layers: tuple[PlannedLayer, ...]
    skipped: dict[int, list[str]]


def build_replacement(
    model: PreTrainedModel, plan: Plan, calibration: Windows | None = None, seed: int = 0
) -> Replacement | None:
    """Build the replacement that a plan asks for.

    - `layer`: a copy of the first layer of the removed block, as in LLM-Streamline (arXiv 2403.19135).
    - `mlp`: the same copy without its attention. It keeps the MLP, its norm and its residual connection.
    - `ffn`, `swiglu`: LLM-Streamline's feed-forward networks, bare layers without norm and residual connection, with
      random weights (`models.bare_layers`).
    - `linear`: a linear map for each run of removed layers (`linear_map.fit_maps`).

    Args:
        model: The original; it is unchanged.
        plan: The plan.
        calibration: The text that linear maps are fitted on; the other kinds do not need it.
        seed: The seed of the random weights.

    Returns:
        The replacement, or `None` if the plan asks for none.

    Raises:
        StreamlineError: the model cannot take this replacement.
    """
    if plan.replacement == "linear":
        if calibration is None:
            raise StreamlineError("replacement 'linear': has no calibration text to be fitted on; give calibration")
        return Replacement(maps=fit_maps(model, plan, calibration))
    if plan.replacement == "ffn" or plan.replacement == "swiglu":
        return Replacement(_seeded_bare_layer(plan.replacement, model, seed))
    if plan.replacement not in TRAINED:
        return None
    architecture = architecture_of(model.config)
    layer = copy_layer(model, plan.removed[0])
    if plan.replacement == "layer":
        return Replacement(layer)
    return Replacement(layer, replace_sublayer(layer, architecture, ATTENTION)[architecture.attention])


def apply_plan(model: PreTrainedModel, plan: Plan, replacement: Replacement | None) -> Change:
    """Change the layers of `model` as `plan` says, in place, and update its config.

    A skipped sublayer stays in its layer with a zero output projection, so that stock transformers can run the model.
    `config.per_layer_config` names it.

    Args:
        model: The original.
        plan: The plan.
        replacement: From `build_replacement`, trained if need be.

    Returns:
        The new layers and the skipped sublayers.

    Raises:
        StreamlineError: the plan asks for a replacement and `replacement` is `None`.
    """
    refuse_bare(model.config)
    if plan.replacement != "none" and replacement is None:
        raise StreamlineError(f"replacement {plan.replacement!r}: is missing; give the result of build_replacement")
    architecture = architecture_of(model.config)
    layers = decoder_layers(model, architecture)
    for layer, transform in (replacement.maps if replacement else {}).items():
        fold(layers[layer], architecture, transform)
    for layer, sublayer in plan.skipped:
        zero_output(layers[layer], architecture, sublayer)
    new: list[nn.Module] = []
    for planned in plan.new_layers:
        if replacement is None or replacement.layer is None or planned.kind not in TRAINED:
            new.append(layers[planned.originals[0]])
            continue
        if replacement.attention is not None:
            setattr(replacement.layer, architecture.attention, replacement.attention)
            zero_output(replacement.layer, architecture, ATTENTION)
        new.append(replacement.layer)
    set_decoder_layers(model, architecture, new, _origins(plan))
    mark_bare(model.config, _bare_kinds(plan))
    return Change(plan.new_layers, _mark_skipped(model.config, plan))


def planned_config(config: PreTrainedConfig, plan: Plan) -> PreTrainedConfig:
    """The config that a model will have after `apply_plan`; `config` itself is unchanged."""
    refuse_bare(config)
    planned = copy.deepcopy(config)
    renumber_config(planned, _origins(plan))
    mark_bare(planned, _bare_kinds(plan))
    _mark_skipped(planned, plan)
    return planned


def _seeded_bare_layer(kind: BareKind, model: PreTrainedModel, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return bare_layer(kind, model.config).to(model.device)


def _bare_kinds(plan: Plan) -> dict[int, BareKind]:
    kinds = {index: planned.kind for index, planned in enumerate(plan.new_layers)}
    return {index: kind for index, kind in kinds.items() if kind == "ffn" or kind == "swiglu"}


def _origins(plan: Plan) -> list[int]:
    return [planned.originals[0] for planned in plan.new_layers]


def _mark_skipped(config: PreTrainedConfig, plan: Plan) -> dict[int, list[str]]:
    skipped = skipped_sublayers(config)  # already skipped in the original, in layers that stay
    for index, planned in enumerate(plan.new_layers):
        if planned.kind == "mlp":
            skipped[index] = [ATTENTION]
        elif planned.kind in TRAINED:
            skipped.pop(index, None)
        newly_skipped = {sublayer for layer, sublayer in plan.skipped if layer == planned.originals[0]}
        if newly_skipped:
            skipped[index] = sorted({*skipped.get(index, []), *newly_skipped})
    mark_skipped(config, skipped)
    return skipped
