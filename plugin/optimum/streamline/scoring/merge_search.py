"""The loss of a model with two neighbouring layers replaced by each of several candidate layers.

The layers before the pair run once a batch for all candidates. After the pair, all candidates go through a layer before
the next one runs. `ablation.py` does the same for removals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum.streamline.editing.merging import replace_pair, shared_copy
from optimum.streamline.editing.residual_stream import run_layer
from optimum.streamline.models.architectures import architecture_of, decoder_layers
from optimum.streamline.models.offloaded_weights import device_of, in_memory
from optimum.streamline.system.progress import progress_bar
from optimum.streamline.text.windows import Windows

from .ablation import layer_inputs, windows_at_once
from .loss import mean_losses, stream_losses


@torch.no_grad()
def candidate_losses(
    model: PreTrainedModel, first: int, candidates: Sequence[Callable[[], nn.Module]], windows: Windows
) -> list[float]:
    """The loss of `model` with each candidate in place of layers `first` and `first` + 1.

    Args:
        model: The model; it is unchanged.
        first: Number of the first layer of the pair.
        candidates: Functions that build one layer each. Every batch builds each layer again, so that memory holds one
            candidate at a time.
        windows: The text to compute the loss on.

    Returns:
        One mean next-token cross-entropy for each candidate, in nats per token; infinite where it is not a number.

    Raises:
        StreamlineError: no candidate has a finite loss.
    """
    shortened = shared_copy(model)
    pair = decoder_layers(model, architecture_of(model.config))[first : first + 2]
    layers = decoder_layers(shortened, architecture_of(shortened.config))
    replace_pair(shortened, first, layers[first])
    layers = decoder_layers(shortened, architecture_of(shortened.config))
    total = torch.zeros(len(candidates), dtype=torch.float64)
    at_once = windows_at_once(model, len(candidates), windows.ids.shape[1])
    with progress_bar("trying merges", len(windows.ids)) as bar:
        for batch in windows.ids.split(at_once):
            ids = batch.to(device_of(model))
            before = layer_inputs(shortened, ids, first)[first]
            streams: list[torch.Tensor] = []
            with in_memory(pair[0]), in_memory(pair[1]):
                for build in candidates:
                    layers[first] = build()
                    streams.append(run_layer(shortened, ids, first, before))
            for number in range(first + 1, len(layers)):
                with in_memory(layers[number]):
                    streams = [run_layer(shortened, ids, number, stream) for stream in streams]
            total += stream_losses(shortened, ids, streams).sum(1).cpu()
            bar.advance(len(batch))
    return mean_losses(total, windows, "merge")
