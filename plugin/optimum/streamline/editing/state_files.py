"""Hidden states of a model on many windows, in files: they are carried from layer to layer, each layer read once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from optimum.streamline.models.architectures import architecture_of, decoder_layers
from optimum.streamline.models.offloaded_weights import device_of, in_memory
from optimum.streamline.text.window_file import WindowFile
from optimum.streamline.text.windows import BATCH

from .residual_stream import embeddings, run_layer


@torch.no_grad()
def write_embeddings(model: PreTrainedModel, states: WindowFile) -> None:
    """Write the input of layer 0 of every window.

    Args:
        model: The model, in evaluation mode.
        states: The file.
    """
    for ids in _batches(model, states):
        states.write(ids, embeddings(model, ids))


@torch.no_grad()
def carry(model: PreTrainedModel, source: WindowFile, target: WindowFile, layers: range) -> None:
    """Run layers on the states of every window. Each layer runs on all windows before the next one is read.

    Args:
        model: The model, in evaluation mode.
        source: The input of the first layer.
        target: The file for the output of the last layer; it may be `source`. Without layers it is not written.
        layers: The numbers of the layers, in order.
    """
    for layer in layers:
        with in_memory(decoder_layers(model, architecture_of(model.config))[layer]):
            for ids in _batches(model, source):
                target.write(ids, run_layer(model, ids, layer, source.read(ids)))
        source = target


def _batches(model: PreTrainedModel, states: WindowFile) -> Iterator[torch.Tensor]:
    device = device_of(model)
    return (ids.to(device) for ids in states.ids.split(BATCH))
