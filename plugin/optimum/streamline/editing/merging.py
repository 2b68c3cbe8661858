"""Merging two neighbouring decoder layers into one of the same size, by concatenating channels or averaging weights.

A channel is a neuron of the MLP, or a key-value head with its query heads. The caller gives the pair and the
sensitivities of the channels (`scoring.channel_sensitivity`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.architectures import (
    Architecture,
    Sublayer,
    architecture_of,
    decoder_layers,
    has_norms_after,
    submodule,
)
from optimum.streamline.models.bare_layers import refuse_bare
from optimum.streamline.models.channels import Channels, rows_of, sublayer_weights
from optimum.streamline.models.layer_list import set_decoder_layers
from optimum.streamline.models.offloaded_weights import copy_in_memory, leave_on_disk, weights_on_disk

from .plan import Merge


def check_mergeable(config: PreTrainedConfig, method: str) -> None:
    """Refuse a model whose layers cannot be merged.

    Args:
        config: The model's config.
        method: The name of the method, for the message.

    Raises:
        StreamlineError: the MLPs are mixtures of experts, the norms come after the projections or have biases that no
            projection can absorb, or the layers differ in structure.
    """
    refuse_bare(config)
    architecture = architecture_of(config)
    reason = ""
    if architecture.experts:
        reason = "its MLPs are mixtures of experts"
    elif has_norms_after(config):
        reason = "its norms come after the projections, and their gains cannot be folded into them"
    elif architecture.bias_field and not getattr(config, architecture.bias_field):
        reason = f"config.{architecture.bias_field} is false, so that the projections have no bias to absorb the norms'"
    elif config.to_dict().get("per_layer_config"):
        reason = "config.per_layer_config makes its layers differ"
    if reason:
        raise StreamlineError(
            f"method {method!r}: layers of this {config.model_type} model cannot be merged, {reason}; "
            "use a method that removes layers, such as shortgpt"
        )


def share_of_first(ratio: float | Fraction, channels: int) -> float:
    """Round a merging ratio to a whole number of channels, and return it as a share.

    The layer with the smaller ratio (the second layer if both are equal) gives the floor of its ratio times `channels`,
    and the other layer gives the rest. So the share is k / `channels` with a whole number k (CoMe, arXiv 2510.15304).

    Args:
        ratio: The ratio of the first layer, 0 to 1.
        channels: The number of channels of the sublayer.

    Returns:
        The share of channels that the first layer gives, 0 to 1.

    >>> share_of_first(0.3, 8), share_of_first(0.7, 8)
    (0.25, 0.75)
    """
    smaller = int(min(ratio, 1 - ratio) * channels)
    return (smaller if ratio < 1 - ratio else channels - smaller) / channels


@torch.no_grad()
def fold_norms(layer: nn.Module, architecture: Architecture) -> None:
    """Fold the gains g and biases b of a layer's norms into the projections after them, in place.

    W (g * x + b) + c = (W diag(g)) x + (W b + c). The layer computes the same as before, and every gain becomes 1.
    """
    for weights in sublayer_weights(architecture).values():
        norm = submodule(layer, weights.norm)
        if getattr(norm, "weight", None) is None:  # OPT with layer_norm_elementwise_affine=False
            continue
        gain, bias = norm.get_parameter("weight"), getattr(norm, "bias", None)
        for path in weights.inputs:
            projection = submodule(layer, path)
            if bias is not None:
                projection.get_parameter("bias").add_(rows_of(projection) @ bias)
            rows_of(projection).mul_(gain + architecture.gain_offset)
        gain.fill_(1.0 - architecture.gain_offset)
        if bias is not None:
            bias.zero_()


@torch.no_grad()
def merge_layers(model: PreTrainedModel, merge: Merge, channels: Sequence[Channels]) -> nn.Module:
    """Concatenate the most sensitive channels of two neighbours into a new layer (CoMe, arXiv 2510.15304).

    For each sublayer with N channels, the first layer gives its k = share * N most sensitive channels and the second
    its N - k most sensitive. They keep their order within a layer, and the first layer's come first. A channel consists
    of its rows of the input projections, with biases, and its columns of the output projection. A key-value head brings
    its query heads.

    Norm gains are folded into the projections first, so that a share of 0 or 1 copies one layer's sublayer exactly. The
    parameters that belong to no single channel are averaged with the shares as weights: the biases of output
    projections, and the gains of the query and key norms.

    Args:
        model: The model; it is unchanged, and the new layer is not part of it.
        merge: The pair and the shares.
        channels: The channel sensitivities of every layer (`scoring.channel_sensitivity.measure_channels`).

    Returns:
        The merged layer.
    """
    architecture = architecture_of(model.config)
    new, other = (_folded(model, layer) for layer in (merge.first, merge.first + 1))
    for name, weights in sublayer_weights(architecture).items():
        share = merge.attention if name == "attention" else merge.mlp
        sensitivity = [channels[layer][name] for layer in (merge.first, merge.first + 1)]
        count = len(sensitivity[0])
        from_first = round(share * count)
        keep = (_most(sensitivity[0], from_first), _most(sensitivity[1], count - from_first))
        output, other_output = submodule(new, weights.output), submodule(other, weights.output)
        inner = rows_of(output).shape[1]
        _join(rows_of(output).T, rows_of(other_output).T, [inner], count, keep)
        if getattr(output, "bias", None) is not None:
            _blend(output.get_parameter("bias"), other_output.get_parameter("bias"), share)
        for path in weights.inputs:
            projection, other_projection = submodule(new, path), submodule(other, path)
            rows = rows_of(projection)
            sizes = _stacked_sizes(name, len(rows), inner) if path in architecture.stacked else [len(rows)]
            _join(rows, rows_of(other_projection), sizes, count, keep)
            if getattr(projection, "bias", None) is not None:
                _join(projection.get_parameter("bias"), other_projection.get_parameter("bias"), sizes, count, keep)
    for path in architecture.head_norms:
        _blend(new.get_parameter(f"{path}.weight"), other.get_parameter(f"{path}.weight"), merge.attention)
    return new


@torch.no_grad()
def average_layers(model: PreTrainedModel, first: int, share: float) -> nn.Module:
    """Average the parameters of layers i = `first` and i + 1: share * W_i + (1 - share) * W_{i+1}.

    Norm gains are folded into the projections first.

    Args:
        model: The model; it is unchanged, and the new layer is not part of it.
        first: Number of the first layer of the pair.
        share: The weight of the first layer, 0 to 1.

    Returns:
        The averaged layer.
    """
    new, other = (_folded(model, layer) for layer in (first, first + 1))
    for parameter, other_parameter in zip(new.parameters(), other.parameters(), strict=True):
        _blend(parameter, other_parameter, share)
    return new


def replace_pair(model: PreTrainedModel, first: int, layer: nn.Module) -> None:
    """Replace layers `first` and `first` + 1 of `model` by `layer`, in place, and update the config.

    If the model's weights are on disk, those of the new layer are written there too.
    """
    architecture = architecture_of(model.config)
    layers = list(decoder_layers(model, architecture))
    leave_on_disk(model, layer)
    origins = [index for index in range(len(layers)) if index != first + 1]
    layers[first : first + 2] = [layer]
    set_decoder_layers(model, architecture, layers, origins)


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with its own modules and config, but the same weights. Change its layers, never its weights."""
    shared = [*model.parameters(), *model.buffers(), *weights_on_disk(model)]
    return copy.deepcopy(model, {id(each): each for each in shared})


def copy_layer(model: PreTrainedModel, index: int) -> nn.Module:
    """A copy of decoder layer number `index`, with its own weights."""
    # The copy refers to the model's config object: with a config of its own it would miss later changes.
    return copy_in_memory(decoder_layers(model, architecture_of(model.config))[index], [model.config])


def _folded(model: PreTrainedModel, index: int) -> nn.Module:
    layer = copy_layer(model, index)
    fold_norms(layer, architecture_of(model.config))
    return layer


def _most(sensitivity: torch.Tensor, count: int) -> torch.Tensor:
    highest = sensitivity.argsort(descending=True, stable=True)[:count]
    return highest.sort().values


def _stacked_sizes(sublayer: Sublayer, rows: int, inner: int) -> list[int]:
    # The sizes of the matrices stacked in one weight: query, key and value, or gate and up projection. `inner` is the
    # width of the query and of the gate. Key and value halve the remaining rows.
    others = 2 if sublayer == "attention" else 1
    return [inner, *[(rows - inner) // others] * others]


def _join(
    new: torch.Tensor, other: torch.Tensor, sizes: list[int], channels: int, keep: Sequence[torch.Tensor]
) -> None:
    # For each stacked matrix: the kept channels of the first layer, then those of the second.
    joined = [
        matrix.unflatten(0, (channels, -1))[kept.to(matrix.device)].flatten(0, 1)
        for matrices in zip(new.split(sizes), other.split(sizes), strict=True)
        for matrix, kept in zip(matrices, keep, strict=True)
    ]
    new.copy_(torch.cat(joined))


def _blend(new: torch.Tensor, other: torch.Tensor, share: float) -> None:
    new.mul_(share).add_(other, alpha=1 - share)
