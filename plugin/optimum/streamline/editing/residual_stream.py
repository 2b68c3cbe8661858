"""The residual stream of a model at one depth, and what one layer makes of it.

The model's own forward runs, so masks, positions and the scale of the embeddings are the model's own.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum.streamline.models.architectures import architecture_of, decoder_layers, layer_output
from optimum.streamline.models.offloaded_weights import run_layers
from optimum.streamline.models.removed_sublayers import SublayerSet, whole_layer, without


class _StopForward(Exception):
    """Ends a forward pass early."""


def stream_after(model: PreTrainedModel, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """The raw residual stream `[batch, length, width]` after a layer; the layers after it do not run."""
    seen: list[torch.Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(layer_output(output))
        raise _StopForward

    layers = decoder_layers(model, architecture_of(model.config))
    with layers[layer].register_forward_hook(keep), suppress(_StopForward):
        model.base_model(ids, use_cache=False)
    return seen[0]


def final_stream(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The output of the last layer `[batch, length, width]`, before the final norm."""
    final: list[torch.Tensor] = []
    last = decoder_layers(model, architecture_of(model.config))[-1]
    with last.register_forward_hook(lambda _, args, output: final.append(layer_output(output))):
        run_layers(model, ids)
    return final[0]


def embeddings(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The input of layer 0 `[batch, length, width]`."""
    with without(model, whole_layer(0)):  # an identity then, whose output is its input
        return stream_after(model, ids, 0)


def run_layer(
    model: PreTrainedModel, ids: torch.Tensor, layer: int, hidden: torch.Tensor, removed: SublayerSet = frozenset()
) -> torch.Tensor:
    """The output of one layer, given its input.

    Args:
        model: The model.
        ids: The token ids `[batch, length]` that the input comes from.
        layer: The number of the layer.
        hidden: Its input `[batch, length, width]`. Layer 0 reads the embeddings of `ids` instead.
        removed: Sublayers to leave out. Without both of its sublayers, a layer gives its input.

    Returns:
        `[batch, length, width]`.
    """
    with without(model, removed, layer, hidden):
        return stream_after(model, ids, layer)
