"""The next-token cross-entropy of a model on token windows, in nats."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum.streamline.errors import StreamlineError
from optimum.streamline.text.windows import Windows


def mean_losses(total: torch.Tensor, windows: Windows, candidate: str) -> list[float]:
    """The mean loss per predicted token of several candidates, from their sums.

    Args:
        total: Summed cross-entropy of each candidate over `windows`, nats, `[candidates]`.
        windows: The windows that the sums are over.
        candidate: The word for a candidate in an error message, such as "removal".

    Returns:
        One loss for each candidate, in nats per token; infinite where the loss is not a number.

    Raises:
        StreamlineError: no candidate has a finite loss.
    """
    losses = (total / windows.ids[:, 1:].numel()).nan_to_num(nan=math.inf, posinf=math.inf)
    if not bool(losses.isfinite().any()):
        raise StreamlineError(f"model: the loss on the calibration text is not finite for any {candidate} tried")
    return [float(loss) for loss in losses]


def cross_entropy_sum(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The next-token cross-entropy of `model`, summed over tokens.

    Args:
        model: The model.
        ids: Token ids `[windows, length]`; the first token of each window is not predicted.

    Returns:
        A float64 scalar, in nats.
    """
    return window_losses(model, ids).sum()


def window_losses(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The next-token cross-entropy of `model` on each window, summed over its tokens.

    Args:
        model: The model.
        ids: Token ids `[windows, length]`; the first token of each window is not predicted.

    Returns:
        `[windows]`, float64, in nats.
    """
    logits = model(ids, use_cache=False).logits
    # One window at a time: a softmax over all windows would need as much memory again as the logits.
    losses = [
        nn.functional.cross_entropy(row[:-1].float(), following[1:], reduction="none").double().sum()
        for row, following in zip(logits, ids, strict=True)
    ]
    return torch.stack(losses)
