"""Refuse a model whose weights are not finite, after it is loaded and before it is saved."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.offloaded_weights import open_unmapped, read_parameter

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
            raise StreamlineError(_refusal(name, key))


def check_finite_files(name: str, files: tuple[Path, ...]) -> None:
    """Refuse safetensors files with a NaN or infinite weight. Memory holds one tensor at a time.

    Args:
        name: The model's name for the message.
        files: The files.

    Raises:
        StreamlineError: a weight is not finite.
    """
    for file in files:
        with open_unmapped(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118 - this is no dictionary
                if not _is_finite(tensors.get_tensor(key)):
                    raise StreamlineError(_refusal(name, key))


def _is_finite(values: torch.Tensor) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in values.reshape(-1).split(_PART))


def _refusal(name: str, key: str) -> str:
    return f"model {name!r}: weight {key} holds NaN or infinite values"
