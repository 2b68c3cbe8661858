"""What the loss would be with each of several layers in the place of two neighbours.

The layers before that place run once a batch for all candidates. Memory grows with the number of neither candidates nor
windows. Knows nothing of where candidates come from; `trials` is the same for removals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .anatomy import architecture_of, decoder_layers
from .errors import StreamlineError
from .merging import replace_pair, shared_copy
from .progress import progress_bar
from .scores import BATCH
from .trials import cross_entropy_sum
from .windows import Windows


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
    known: list[Any] = []
    for index in range(first):
        _compute_once(layers[index], known, index == first - 1)
    total = torch.zeros(len(candidates), dtype=torch.float64)
    with progress_bar("trying merges", len(windows.ids)) as bar:
        for batch in windows.ids.split(BATCH):
            known.clear()
            for number, build in enumerate(candidates):
                layers[first] = build()
                total[number] += cross_entropy_sum(trial, batch.to(model.device)).cpu()
            bar.advance(len(batch))
    losses = (total / windows.ids[:, 1:].numel()).nan_to_num(nan=math.inf, posinf=math.inf)
    if not bool(losses.isfinite().any()):
        raise StreamlineError("model: however two layers are merged, the loss on the calibration text is not finite")
    return [float(loss) for loss in losses]


def _compute_once(layer: nn.Module, known: list[Any], keeps: bool) -> None:
    # While an output is known, the layers that led to it pass it on and compute nothing.
    compute = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if known:
            return known[0]
        output = compute(*args, **kwargs)
        if keeps:
            known.append(output)
        return output

    layer.forward = forward
