"""Applying a plan: building the replacement it asks for, and changing the model's layers in place.

`build_replacement` makes the replacement, the caller trains it if need be (`healing/`), and `apply_plan` puts it in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.architectures import Sublayer, architecture_of, can_pack, decoder_layers, submodule
from optimum.streamline.models.bare_layers import BareKind, bare_layer, mark_bare, refuse_bare
from optimum.streamline.models.layer_list import renumber_config, set_decoder_layers
from optimum.streamline.models.module_patterns import renumbered_names
from optimum.streamline.models.removed_sublayers import SublayerKey
from optimum.streamline.models.skipped_sublayers import (
    ATTENTION,
    mark_skipped,
    replace_sublayer,
    skipped_of,
    skipped_sublayers,
    zero_output,
)
from optimum.streamline.text.windows import Windows

from .correction import Corrections, add_corrections, check_something_corrected, fit_corrections
from .linear_map import fit_maps, fold
from .merging import copy_layer
from .plan import FITTED, TRAINED, Plan, PlannedLayer

AnyPlan = TypeVar("AnyPlan", bound=Plan)


@dataclass(frozen=True)
class Replacement:
    """The replacement of removed layers: one layer for a block of them, or matrices in closed form.

    Args:
        layer: A layer that is not yet part of the model. It takes and returns the same as the model's decoder
            layers.
        attention: For replacement `mlp`: the attention module that was dropped from `layer`. Otherwise `None`.
        maps: For replacement `linear`: the result of `linear_map.fit_maps`.
        corrections: For replacement `corrected`: the result of `correction.fit_corrections`.
    """

    layer: nn.Module | None = None
    attention: nn.Module | None = None
    maps: dict[SublayerKey, torch.Tensor] = field(default_factory=dict)
    corrections: Corrections = field(default_factory=dict)


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
    - `linear`: a linear map for each run of removed sublayers (`linear_map.fit_maps`).
    - `corrected`: corrections of what is left (`correction.fit_corrections`).

    Args:
        model: The original; it is unchanged.
        plan: The plan.
        calibration: The text that linear maps and corrections are fitted on; the other kinds do not need it.
        seed: The seed of the random weights.

    Returns:
        The replacement, or `None` if the plan asks for none.

    Raises:
        StreamlineError: the model cannot take this replacement.
    """
    if plan.replacement in FITTED and calibration is None:
        raise StreamlineError(
            f"replacement {plan.replacement!r}: has no calibration text to be fitted on; give calibration"
        )
    if plan.replacement == "linear" and calibration is not None:
        return Replacement(maps=fit_maps(model, plan, calibration))
    if plan.replacement == "corrected" and calibration is not None:
        check_something_corrected(plan)
        return Replacement(corrections=fit_corrections(model, frozenset(plan.sublayers_removed), calibration))
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
    _refuse_unpackable(model.config, plan)
    if plan.replacement != "none" and replacement is None:
        raise StreamlineError(f"replacement {plan.replacement!r}: is missing; give the result of build_replacement")
    architecture = architecture_of(model.config)
    layers = decoder_layers(model, architecture)
    for sublayer, transform in (replacement.maps if replacement else {}).items():
        fold(model, sublayer, transform)
    add_corrections(model, replacement.corrections if replacement else {})
    _zero_skipped(model, plan)
    _move_mlps(model, plan)
    new: list[nn.Module] = []
    for planned in plan.new_layers:
        if replacement is None or replacement.layer is None or planned.kind not in TRAINED:
            new.append(layers[planned.originals[0]])
            continue
        if replacement.attention is not None:
            setattr(replacement.layer, architecture.attention, replacement.attention)
            zero_output(replacement.layer, architecture, ATTENTION)
        new.append(replacement.layer)
    set_decoder_layers(model, architecture, new, *_origins(plan))
    mark_bare(model.config, _bare_kinds(plan))
    return Change(plan.new_layers, _mark_skipped(model.config, plan))


def _zero_skipped(model: PreTrainedModel, plan: Plan) -> None:
    """Zero the output projections of sublayers that are removed from layers that stay."""
    architecture, earlier = architecture_of(model.config), skipped_of(model.config)
    layers = decoder_layers(model, architecture)
    for planned in plan.new_layers:
        for sublayer in _skipped_in(planned, plan):
            if (planned.originals[0], sublayer) not in earlier:  # those are zero, and quantized ones cannot be set
                zero_output(layers[planned.originals[0]], architecture, sublayer)


def _move_mlps(model: PreTrainedModel, plan: Plan) -> None:
    """Give each packed layer its MLP: the layer of its attention gets the modules of the other."""
    architecture = architecture_of(model.config)
    layers = decoder_layers(model, architecture)
    packed = [planned.originals for planned in plan.new_layers if planned.kind == "packed"]
    mlps = {mlp: {name: submodule(layers[mlp], name) for name in architecture.mlp_part} for _, mlp in packed}
    for attention, mlp in packed:
        for name, module in mlps[mlp].items():
            setattr(layers[attention], name, module)


def with_skips(plan: AnyPlan, config: PreTrainedConfig) -> AnyPlan:
    """A plan that names the sublayers which a model with this config skips already, if they matter to it."""
    if not plan.packs and plan.replacement not in FITTED:
        return plan
    return replace(plan, already_skipped=tuple(sorted(skipped_of(config))))


def planned_config(config: PreTrainedConfig, plan: Plan) -> PreTrainedConfig:
    """The config that a model will have after `apply_plan`; `config` itself is unchanged."""
    refuse_bare(config)
    _refuse_unpackable(config, plan)
    planned = copy.deepcopy(config)
    renumber_config(planned, *_origins(plan))
    mark_bare(planned, _bare_kinds(plan))
    _mark_skipped(planned, plan)
    return planned


def _refuse_unpackable(config: PreTrainedConfig, plan: Plan) -> None:
    """Refuse a plan that packs a model that cannot be packed, or with other zeros, a defect of the method."""
    if plan.packs and not can_pack(config):
        raise ValueError(f"packs: an attention and an MLP of two layers of {config.model_type} make no layer")
    if (plan.packs or plan.replacement in FITTED) and set(plan.already_skipped) != skipped_of(config):
        raise ValueError(f"already_skipped {plan.already_skipped!r}: the model skips {sorted(skipped_of(config))!r}")


def renamed_modules(
    names: Iterable[str], new_layers: Sequence[PlannedLayer], config: PreTrainedConfig
) -> list[tuple[str, str]]:
    """Give the linear modules of an edited model their new names.

    Args:
        names: Module names in the original.
        new_layers: The layers of the new model.
        config: The config of the original or of the new model.

    Returns:
        Pairs of new name and old name. Names in removed parts are left out; a name outside the layers stays.
    """
    attentions = [planned.attention_originals for planned in new_layers]
    mlps = [planned.mlp_originals for planned in new_layers]
    return renumbered_names(names, attentions, mlps, architecture_of(config).mlp_part)


def _seeded_bare_layer(kind: BareKind, model: PreTrainedModel, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return bare_layer(kind, model.config).to(model.device)


def _bare_kinds(plan: Plan) -> dict[int, BareKind]:
    kinds = {index: planned.kind for index, planned in enumerate(plan.new_layers)}
    return {index: kind for index, kind in kinds.items() if kind == "ffn" or kind == "swiglu"}


def _origins(plan: Plan) -> tuple[list[int], list[int]]:
    """For each new layer, the original layers that its attention and its MLP come from."""
    new_layers = plan.new_layers
    return [new.attention_originals[0] for new in new_layers], [new.mlp_originals[0] for new in new_layers]


def _skipped_in(planned: PlannedLayer, plan: Plan) -> list[Sublayer]:
    """The sublayers that one layer of the new model skips by this plan; if it packs, also those skipped before."""
    if planned.kind == "packed":
        return []
    return [sublayer for layer, sublayer in (*plan.skipped, *plan.already_skipped) if layer == planned.originals[0]]


def _mark_skipped(config: PreTrainedConfig, plan: Plan) -> dict[int, list[str]]:
    # Those that the original skipped already, in layers that stay. A plan that packs names them itself.
    skipped = {} if plan.packs else skipped_sublayers(config)
    for index, planned in enumerate(plan.new_layers):
        if planned.kind == "mlp":
            skipped[index] = [ATTENTION]
        elif planned.kind in TRAINED:
            skipped.pop(index, None)
        newly_skipped = _skipped_in(planned, plan)
        if newly_skipped:
            skipped[index] = sorted({*skipped.get(index, []), *newly_skipped})
    mark_skipped(config, skipped)
    return skipped
