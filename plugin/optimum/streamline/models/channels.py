"""The channels of a layer: attention heads and MLP neurons, and the rows of weight that belong to each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .architectures import Architecture, Sublayer

# How much the output depends on each channel of a layer: `[key-value heads]` and `[neurons]`.
Channels = dict[Sublayer, torch.Tensor]


@dataclass(frozen=True)
class SublayerWeights:
    """Where the weights of one sublayer are, as paths from its layer.

    Args:
        norm: The norm before it.
        inputs: The projections that read that norm; each channel has its own rows in them.
        output: The projection into the residual stream; each channel has its own columns in it.
    """

    norm: str
    inputs: tuple[str, ...]
    output: str


def sublayer_weights(architecture: Architecture) -> dict[Sublayer, SublayerWeights]:
    """Both sublayers of a layer."""
    return {
        "attention": SublayerWeights(
            architecture.attention_norm, architecture.attention_in, architecture.attention_out
        ),
        "mlp": SublayerWeights(architecture.mlp_norm, architecture.mlp_in, architecture.mlp_out[0]),
    }


def rows_of(projection: nn.Module) -> torch.Tensor:
    """A view of a projection's weight as `[outputs, inputs]`, however it is stored."""
    weight = projection.get_parameter("weight")
    return weight.T if isinstance(projection, Conv1D) else weight
