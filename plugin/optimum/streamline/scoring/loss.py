"""Next-token cross-entropy of a model on token windows."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum.streamline.errors import StreamlineError
from optimum.streamline.text.windows import Windows


def mean_losses(total: torch.Tensor, windows: Windows, however: str) -> list[float]:
    """Nats per predicted token, from each trial's sum over `windows`; infinite where it is not a number.

    Args:
        however: What a message says of all trials.

    Raises:
        StreamlineError: no trial's loss is finite.
    """
    losses = (total / windows.ids[:, 1:].numel()).nan_to_num(nan=math.inf, posinf=math.inf)
    if not bool(losses.isfinite().any()):
        raise StreamlineError(f"model: {however}, the loss on the calibration text is not finite")
    return [float(loss) for loss in losses]


def cross_entropy_sum(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The next-token cross-entropy of `model` summed over the tokens of `ids` `[windows, length]`: nats, float64.

    The first token of a window is predicted by none.
    """
    logits = model(ids, use_cache=False).logits
    # Window by window: the softmax of all of them would take the logits' memory once more.
    losses = [
        nn.functional.cross_entropy(row[:-1].float(), following[1:], reduction="none").double().sum()
        for row, following in zip(logits, ids, strict=True)
    ]
    return torch.stack(losses).sum()
