"""What the loss would be with each of several layers in the place of two neighbours.

The layers before that place run once a batch for all candidates. Memory grows with the number of neither candidates nor
windows. Knows nothing of where candidates come from; `trials` is the same for removals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum.streamline.editing.merging import replace_pair, shared_copy
from optimum.streamline.models.architectures import architecture_of, decoder_layers
from optimum.streamline.system.progress import progress_bar
from optimum.streamline.text.windows import BATCH, Windows

from .ablation import layer_inputs, without
from .loss import cross_entropy_sum, mean_losses


@torch.no_grad()
def candidate_losses(
    model: PreTrainedModel, first: int, candidates: Sequence[Callable[[], nn.Module]], windows: Windows
) -> list[float]:
    """For each candidate in the place of layers `first` and `first` + 1, the mean next-token cross-entropy, in nats.

    Args:
        model: Left alone.
        candidates: Each builds its layer; it is built anew for every batch, so that only one is held at a time.

    Returns:
        One loss a candidate, infinite where it is not a number.

    Raises:
        StreamlineError: no candidate's loss is finite.
    """
    trial = shared_copy(model)
    layers = decoder_layers(trial, architecture_of(trial.config))
    replace_pair(trial, first, layers[first])
    layers = decoder_layers(trial, architecture_of(trial.config))
    total = torch.zeros(len(candidates), dtype=torch.float64)
    with progress_bar("trying merges", len(windows.ids)) as bar:
        for batch in windows.ids.split(BATCH):
            ids = batch.to(model.device)
            before = layer_inputs(trial, ids, first)[first]
            for number, build in enumerate(candidates):
                layers[first] = build()
                with without(trial, frozenset(), first, before):
                    total[number] += cross_entropy_sum(trial, ids).cpu()
            bar.advance(len(batch))
    return mean_losses(total, windows, "however two layers are merged")
