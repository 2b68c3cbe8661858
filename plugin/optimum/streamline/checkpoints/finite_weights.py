"""Refuse a model whose weights are not finite, after it is loaded and before it is saved."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.offloaded_weights import read_parameter

_PART = 1 << 24  # the elements that are checked at once: the result of a check takes a byte for each


def check_finite_weights(name: str, model: PreTrainedModel) -> None:
    """Refuse a model with a NaN or infinite weight.

    Args:
        name: The model's name for the message.
        model: The model.

    Raises:
        StreamlineError: a weight is not finite.
    """
    for key, _ in model.named_parameters():
        if not _is_finite(read_parameter(model, key)):
            raise StreamlineError(f"model {name!r}: weight {key} holds NaN or infinite values")


def _is_finite(values: torch.Tensor) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in values.reshape(-1).split(_PART))
