"""Two decoder layers into one of the same size, by channels or by weighted sum, and its place in the model.

Knows what a channel is in every architecture: a neuron of the MLP, or a key-value head with the query heads it
serves. It knows neither which layers are worth merging nor which channels matter: those come in.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import chain

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

from .plan import Merge


def check_mergeable(config: PreTrainedConfig, method: str) -> None:
    """Refuse a model whose layers have no channels to merge.

    Raises:
        StreamlineError: its MLPs are mixtures of experts, its norms stand behind the projections or have biases that
            no projection can take up, or its layers are not all alike.
    """
    refuse_bare(config)
    architecture = architecture_of(config)
    why = ""
    if architecture.experts:
        why = "its MLPs are mixtures of experts"
    elif has_norms_after(config):
        why = "its norms stand behind the projections, where nothing is linear in their channels"
    elif architecture.bias_field and not getattr(config, architecture.bias_field):
        why = f"config.{architecture.bias_field} is false: the norms' biases have no bias to be folded into"
    elif config.to_dict().get("per_layer_config"):
        why = "config.per_layer_config makes its layers differ"
    if why:
        raise StreamlineError(
            f"method {method!r}: layers of this {config.model_type} model cannot be merged, {why}; "
            "use a method that removes layers, such as shortgpt"
        )


def share_of_first(ratio: float | Fraction, channels: int) -> float:
    """The share of its channels that the first of two layers gives, where its part should be `ratio`.

    The layer of the smaller part, the second if they are equal, gives the whole channels that its part holds, and
    the other gives the rest, so that the share is k / `channels` with a whole k.

    >>> share_of_first(0.3, 8), share_of_first(0.7, 8)
    (0.25, 0.75)
    """
    smaller = int(min(ratio, 1 - ratio) * channels)
    return (smaller if ratio < 1 - ratio else channels - smaller) / channels


@torch.no_grad()
def fold_norms(layer: nn.Module, architecture: Architecture) -> None:
    """Move the gains and biases of a layer's norms into the projections that read them, in place.

    W (g * x + b) + c = (W diag(g)) x + (W b + c): the function stays, and every norm's gain becomes 1.
    """
    for half in sublayer_weights(architecture).values():
        norm = submodule(layer, half.norm)
        if getattr(norm, "weight", None) is None:  # OPT's layer_norm_elementwise_affine
            continue
        weight, bias = norm.get_parameter("weight"), getattr(norm, "bias", None)
        for path in half.inputs:
            projection = submodule(layer, path)
            if bias is not None:
                projection.get_parameter("bias").add_(rows_of(projection) @ bias)
            rows_of(projection).mul_(weight + architecture.gain_offset)
        weight.fill_(1.0 - architecture.gain_offset)
        if bias is not None:
            bias.zero_()


@torch.no_grad()
def merge_layers(model: PreTrainedModel, merge: Merge, channels: Sequence[Channels]) -> nn.Module:
    """Concatenate the channels that matter most of two neighbours into a new layer (CoMe, arXiv 2510.15304).

    Of N channels of a sublayer the first layer gives its k = share N of highest sensitivity, the second its N - k;
    they keep their order, the first layer's before the second's. A channel takes its rows of the input projections,
    with their biases, and its columns of the output projection; a key-value head takes the query heads it serves.
    Norm gains are folded first, so that a share of 0 or 1 leaves exactly one layer's sublayer. What all channels
    share is a sum weighted by the shares: biases of output projections, gains of the norms of queries and keys.

    Args:
        model: Left alone; the new layer is not part of it.
        channels: The sensitivities of every layer's channels.
    """
    architecture = architecture_of(model.config)
    new, other = (_folded(model, layer) for layer in (merge.first, merge.first + 1))
    for name, half in sublayer_weights(architecture).items():
        share = merge.attention if name == "attention" else merge.mlp
        sensitivity = [channels[layer][name] for layer in (merge.first, merge.first + 1)]
        count = len(sensitivity[0])
        given = round(share * count)
        keep = (_most(sensitivity[0], given), _most(sensitivity[1], count - given))
        output, other_output = submodule(new, half.output), submodule(other, half.output)
        inner = rows_of(output).shape[1]
        _join(rows_of(output).T, rows_of(other_output).T, [inner], count, keep)
        if getattr(output, "bias", None) is not None:
            _blend(output.get_parameter("bias"), other_output.get_parameter("bias"), share)
        for path in half.inputs:
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
    """`share` of every parameter of layer `first` and the rest of the next one's, norm gains folded first.

    Args:
        model: Left alone; the new layer is not part of it.
    """
    new, other = (_folded(model, layer) for layer in (first, first + 1))
    for parameter, other_parameter in zip(new.parameters(), other.parameters(), strict=True):
        _blend(parameter, other_parameter, share)
    return new


def replace_pair(model: PreTrainedModel, first: int, layer: nn.Module) -> None:
    """Put `layer` in the place of layers `first` and `first` + 1, in place, with the config kept true."""
    architecture = architecture_of(model.config)
    layers = list(decoder_layers(model, architecture))
    origins = [index for index in range(len(layers)) if index != first + 1]
    layers[first : first + 2] = [layer]
    set_decoder_layers(model, architecture, layers, origins)


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own structure and config that shares every weight: to change layers of, never weights."""
    tensors: Iterator[torch.Tensor] = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def copy_layer(model: PreTrainedModel, index: int) -> nn.Module:
    """A decoder layer with weights of its own, for the same model.

    Layers of one model have one config: a copy of it would not follow the model's.
    """
    layers = decoder_layers(model, architecture_of(model.config))
    return copy.deepcopy(layers[index], {id(model.config): model.config})


def _folded(model: PreTrainedModel, index: int) -> nn.Module:
    layer = copy_layer(model, index)
    fold_norms(layer, architecture_of(model.config))
    return layer


def _most(sensitivity: torch.Tensor, count: int) -> torch.Tensor:
    highest = sensitivity.argsort(descending=True, stable=True)[:count]
    return highest.sort().values


def _stacked_sizes(sublayer: Sublayer, rows: int, inner: int) -> list[int]:
    # Queries are as wide as what comes out of the attention, keys and values share the rest; gates are as wide as
    # what comes out of the MLP, and so is what they gate.
    others = 2 if sublayer == "attention" else 1
    return [inner, *[(rows - inner) // others] * others]


def _join(
    new: torch.Tensor, other: torch.Tensor, sizes: list[int], channels: int, keep: Sequence[torch.Tensor]
) -> None:
    joined = [
        part.unflatten(0, (channels, -1))[kept.to(part.device)].flatten(0, 1)
        for parts in zip(new.split(sizes), other.split(sizes), strict=True)
        for part, kept in zip(parts, keep, strict=True)
    ]
    new.copy_(torch.cat(joined))


def _blend(new: torch.Tensor, other: torch.Tensor, share: float) -> None:
    new.mul_(share).add_(other, alpha=1 - share)
