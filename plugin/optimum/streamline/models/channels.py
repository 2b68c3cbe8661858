"""The channels of a layer, which are its attention heads and MLP neurons, and the weights of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .architectures import Architecture, Sublayer

# The sensitivity of the model's output to each channel of a layer: `[key-value heads]` for the attention, `[neurons]`
# for the MLP.
Channels = dict[Sublayer, torch.Tensor]


@dataclass(frozen=True)
class SublayerWeights:
    """Module paths of one sublayer's weights, starting at its layer.

    Args:
        norm: The norm before the sublayer.
        inputs: The projections that read the norm. Each channel has its own rows in them.
        output: The projection into the residual stream. Each channel has its own columns in it.
    """

    norm: str
    inputs: tuple[str, ...]
    output: str


def sublayer_weights(architecture: Architecture) -> dict[Sublayer, SublayerWeights]:
    """The weights of the attention and of the MLP in a layer of this architecture."""
    return {
        "attention": SublayerWeights(
            architecture.attention_norm, architecture.attention_in, architecture.attention_out
        ),
        "mlp": SublayerWeights(architecture.mlp_norm, architecture.mlp_in, architecture.mlp_out[0]),
    }


def rows_of(projection: nn.Module) -> torch.Tensor:
    """A view of a projection's weight as `[outputs, inputs]`.

    Args:
        projection: An `nn.Linear`, or GPT-2's `Conv1D`, which stores its weight as `[inputs, outputs]`.
    """
    weight = projection.get_parameter("weight")
    return weight.T if isinstance(projection, Conv1D) else weight
