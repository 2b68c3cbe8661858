"""A model without some of its layers or sublayers, for the time of a `with` block.

The model's own forward runs, with placeholder modules in its list of layers. Masks, positions, norms and logit caps are
therefore the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from .architectures import Sublayer, architecture_of, decoder_layers
from .skipped_sublayers import ATTENTION, MLP, replace_sublayer

SublayerKey: TypeAlias = tuple[int, Sublayer]
"""A sublayer: the number of its layer, from 0, and `attention` or `mlp`."""

SublayerSet: TypeAlias = frozenset[SublayerKey]
"""Sublayers. Both sublayers of a layer mean the whole layer, with its norms."""


class _StoredOutput(nn.Module):
    """Placeholder for a layer before the candidate: returns the hidden states that enter the candidate."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        """Return the stored hidden states `[batch, length, width]`; the input is ignored."""
        return self.hidden


class _Identity(nn.Module):
    """Placeholder for a removed layer: returns its input."""

    def forward(self, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        """Return `hidden_states` `[batch, length, width]`."""
        return hidden_states


def whole_layer(layer: int) -> SublayerSet:
    """Both sublayers of layer number `layer`."""
    return frozenset({(layer, ATTENTION), (layer, MLP)})


def fully_removed_layers(removed: SublayerSet) -> tuple[int, ...]:
    """The layers whose attention and MLP are both in `removed`, in rising order."""
    return tuple(sorted({layer for layer, _ in removed if whole_layer(layer) <= removed}))


@contextmanager
def without(
    model: PreTrainedModel, removed: SublayerSet, start: int = 0, hidden: torch.Tensor | None = None
) -> Iterator[None]:
    """Remove sublayers from `model` inside the `with` block, and restore them afterwards.

    Args:
        model: The model to change in place.
        removed: The sublayers to remove.
        start: The first layer to run, where `hidden` is given; the layers before it are not computed.
        hidden: The input of layer `start`, `[windows, length, width]`.
    """
    architecture = architecture_of(model.config)
    layers = decoder_layers(model, architecture)
    original_layers = list(layers)
    dropped: list[tuple[nn.Module, dict[str, nn.Module]]] = []
    try:
        for index, layer in enumerate(original_layers):
            if index < start and hidden is not None:
                layers[index] = _StoredOutput(hidden)
            elif whole_layer(index) <= removed:
                layers[index] = _Identity()
            else:
                dropped += [
                    (layer, replace_sublayer(layer, architecture, kind)) for number, kind in removed if number == index
                ]
        yield
    finally:
        for index, layer in enumerate(original_layers):
            layers[index] = layer
        for layer, modules in dropped:
            for name, module in modules.items():
                setattr(layer, name, module)
